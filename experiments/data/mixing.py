"""Mixup and CutMix of a batch, on the device.

As DeiT mixes (timm's batch mode): one lambda and one box for a batch, each
image mixed with its mirror in the batch.

References:
  Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018.
  Yun et al., "CutMix", 2019.
"""

import jax
import jax.numpy as jnp


def mix(key, images, targets, *, mixup, cutmix, probability, switch):
  """Mixes images and targets.

  Args:
    key: of the batch.
    images: [B, H, W, C], any number type.
    targets: [B, classes] float.
    mixup: alpha of lambda ~ Beta(alpha, alpha); 0 for no Mixup.
    cutmix: the same of CutMix.
    probability: that a batch is mixed at all.
    switch: that it is CutMix, where both are on.

  Returns:
    images [B, H, W, C], float32 where they are mixed, and targets.
  """
  if not mixup and not cutmix:
    return images, targets
  images = jnp.asarray(images, jnp.float32)
  lambda_key, box_key, on_key, switch_key = jax.random.split(key, 4)
  on = jax.random.bernoulli(on_key, probability)
  cut = jnp.bool_(cutmix > 0)
  if mixup and cutmix:
    cut = jax.random.bernoulli(switch_key, switch)
  alpha = jnp.where(cut, cutmix, mixup)
  lam = jax.random.beta(lambda_key, alpha, alpha)
  # What an image keeps of itself: of each pixel lambda, or each or none of it.
  _, H, W, _ = images.shape
  box_HxWx1 = _box(box_key, H, W, lam)
  kept = jnp.where(cut, 1.0 - box_HxWx1, lam)
  kept = jnp.where(on, kept, 1.0)
  share = jnp.mean(kept)  # of the box as it was clipped at the border
  mixed = kept * images + (1 - kept) * images[::-1]
  return mixed, share * targets + (1 - share) * targets[::-1]


def _box(key, H, W, lam):
  """1 in a box of 1 - lambda of the area with its centre anywhere, else 0."""
  side = jnp.sqrt(1 - lam)
  inside = []
  for axis_key, size in zip(jax.random.split(key), (H, W), strict=True):
    length = jnp.floor(side * size)
    centre = jax.random.randint(axis_key, (), 0, size)
    start = centre - length // 2
    pixels = jnp.arange(size)
    inside.append((pixels >= start) & (pixels < start + length))
  rows, columns = inside
  return (rows[:, None] & columns)[..., None].astype(jnp.float32)
