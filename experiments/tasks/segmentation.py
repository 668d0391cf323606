"""Semantic segmentation: the loss, what is scored of it, and the metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data.masks import VOID
from experiments.models import segmenter


@dataclasses.dataclass(frozen=True)
class Segmentation:
  """The task of a `segmenter.Segmenter`. Hashable: it is part of the program.

  A batch is {'image': [B, H, W, 3] from 0 to 255, 'mask': [B, h, w] classes, or
  `masks.VOID`, 'scale': [B, 2]}, rows and columns of the image for one of the
  mask; or, with the tokens that enter `first_block` in the place of the images,
  {'hidden': [B, T, D], 'mask', 'scale'}.

  Attributes:
    num_classes: C.
    first_block: see `lower`.
    grid: rows and columns of the tokens that `lower` keeps.
    metric_names: keys of `METRICS`.
  """

  num_classes: int
  first_block: int
  grid: tuple[int, int]
  metric_names: tuple[str, ...]

  def loss(self, model, batch, key):
    """The training loss, a scalar: cross-entropy of the pixels.

    It is the mean over the pixels of an image that are not void, zero where all
    of them are; and of these the mean over the B images: so that of the parts
    of a batch is that of the whole.

    Args:
      model: the segmenter.
      batch: see the class.
      key: of this step, for drop path.
    """
    mask = batch['mask']
    counts = mask != VOID
    losses = optax.softmax_cross_entropy_with_integer_labels(
      self._logits(model, batch, key), jnp.where(counts, mask, 0)
    )
    pixels = counts.sum((1, 2))
    sums = jnp.where(counts, losses, 0).sum((1, 2))
    return jnp.mean(sums / jnp.maximum(pixels, 1))

  def outputs(self, model, batch):
    """{'confusion': int32 [B, C, C]}: the pixels of a class, by prediction."""
    with jax.named_scope('confusion'):
      truth, predicted = (
        jax.nn.one_hot(classes, self.num_classes).reshape(
          len(classes), -1, self.num_classes
        )
        for classes in (batch['mask'], self.predict(model, batch))
      )
      # Void is all zeros. Sums of ones, exact in float32 up to 2^24.
      confusion = jnp.einsum(
        'bpt,bpc->btc',
        truth,
        predicted,
        preferred_element_type=jnp.float32,
      )
    return {'confusion': confusion.astype(jnp.int32)}

  def predict(self, model, batch):
    """The class of every pixel of the masks, void or not, int32 [B, h, w]."""
    return self._logits(model, batch).argmax(-1).astype(jnp.int32)

  def lower(self, model, batch):
    """The batch with the tokens that enter `first_block` for its images."""
    tokens, _ = model.embed(batch['image'])
    tokens = model.backbone.encode(tokens, stop=self.first_block)
    return {'hidden': tokens, 'mask': batch['mask'], 'scale': batch['scale']}

  def features(self, model, batch):
    """What a linear decoder sees of each patch, and its most frequent class.

    Returns:
      {'features': [B, rows, columns, D], 'label': int32 [B, rows, columns]};
      `masks.VOID` where all pixels of a patch are void.
    """
    features = self._features(model, batch)[-1]
    truth = jax.nn.one_hot(batch['mask'], self.num_classes)
    shares = segmenter.gather(
      truth, features.shape[1:3], batch['scale'] / model.stride
    )
    label = jnp.where(shares.any(-1), shares.argmax(-1), VOID)
    return {'features': features, 'label': label.astype(jnp.int32)}

  def metrics(self, outputs, eval_set):
    """Metrics of a whole set, by its one confusion matrix.

    Args:
      outputs: of every example, [N, C, C].
      eval_set: not looked at.

    Returns:
      `{name: float in [0, 1]}`.
    """
    del eval_set
    confusion = outputs['confusion'].sum(0, dtype=np.int64)
    return {name: METRICS[name](confusion) for name in self.metric_names}

  def _logits(self, model, batch, key=None):
    """[B, h, w, C] float32, at the pixels of the masks."""
    coarse = model.head(self._features(model, batch, key))
    with jax.named_scope('upsample'):
      return segmenter.resize(
        coarse.astype(jnp.float32),
        batch['mask'].shape[1:],
        batch['scale'] / model.stride,
      )

  def _features(self, model, batch, key=None):
    """`key` is drop path's, in training."""
    if 'hidden' in batch:
      tokens, grid = batch['hidden'].astype(jnp.float32), self.grid
      return model.features(tokens, grid, self.first_block, key=key)
    tokens, grid = model.embed(batch['image'])
    return model.features(tokens, grid, key=key)


def _miou(confusion_CxC):
  """The mean over the classes that the truth has of |both| / |either|.

  A class that no image of the set has is left out, whether or not some pixel is
  taken for it: its own quotient would be undefined without such a pixel, and 0
  with one. Those pixels count against the class that they are of.
  """
  true, right = confusion_CxC.sum(1), np.diag(confusion_CxC)
  either = true + confusion_CxC.sum(0) - right
  has = true > 0
  return float(np.mean(right[has] / either[has]))


def _pixel_accuracy(confusion_CxC):
  return float(np.trace(confusion_CxC) / confusion_CxC.sum())


def patch_miou(logits_NxC, labels_N):
  """The `miou` of patches, each of one class."""
  C = logits_NxC.shape[1]
  pairs = labels_N * C + logits_NxC.argmax(1)
  return _miou(np.bincount(pairs, minlength=C * C).reshape(C, C))


METRICS = {'miou': _miou, 'pixel_accuracy': _pixel_accuracy}
