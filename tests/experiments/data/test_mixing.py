"""Mixup and CutMix: what is mixed into an image is mixed into its target."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import mixing

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 16, 12, 3), np.uint8)
TARGETS = np.eye(4, dtype=np.float32)
OFF = {'mixup': 0.0, 'cutmix': 0.0, 'probability': 1.0, 'switch': 0.5}


def mix_many(n=400, **changes):
  one = functools.partial(mixing.mix, **{**OFF, **changes})
  keys = jax.random.split(jax.random.key(0), n)
  images, targets = jax.jit(jax.vmap(one, (0, None, None)))(
    keys, jnp.asarray(IMAGES), jnp.asarray(TARGETS)
  )
  return np.asarray(images), np.asarray(targets)


def shares(targets):
  """Lambda, read off the targets, and checked against their mirror."""
  lam = targets[:, 0, 0]
  expected = (
    lam[:, None, None] * TARGETS + (1 - lam)[:, None, None] * TARGETS[::-1]
  )
  np.testing.assert_allclose(targets, expected, atol=1e-6)
  return lam


@pytest.mark.parametrize(
  'changes', [{}, {'mixup': 0.8, 'cutmix': 1.0, 'probability': 0.0}]
)
def test_off_is_the_identity(changes):
  images, targets = mix_many(5, **changes)
  np.testing.assert_array_equal(images, [IMAGES] * 5)
  np.testing.assert_array_equal(targets, [TARGETS] * 5)


def test_mixup():
  images, targets = mix_many(mixup=0.8)
  lam = shares(targets)
  weight = lam[:, None, None, None, None]
  np.testing.assert_allclose(
    images, weight * IMAGES + (1 - weight) * IMAGES[::-1], atol=1e-3
  )
  # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)) = .096; 400 of them.
  assert abs(lam.mean() - 0.5) < 0.06
  assert abs(lam.var() - 0.096) < 0.02


def test_cutmix():
  images, targets = mix_many(cutmix=1.0)
  lam = shares(targets)
  own = (images == IMAGES).all(-1)
  other = (images == IMAGES[::-1]).all(-1)
  assert (own | other).all()
  # The share of the target is the share of the pixels, to the last one.
  np.testing.assert_allclose(own[:, 0].mean((1, 2)), lam, atol=0.02)
  pasted = ~own[:, 0]
  # A box: the pixels of its rows and columns, no others.
  box = pasted.any(2)[:, :, None] & pasted.any(1)[:, None, :]
  assert (pasted == box).mean() > 0.999
  # Uniform lambda, and boxes cut at the border: more is kept than half.
  assert 0.5 < lam.mean() < 0.75
  assert len(np.unique(pasted.any(2).argmax(1))) > 10
  assert len(np.unique(pasted.any(1).argmax(1))) > 8


def test_switching():
  images, _ = mix_many(mixup=0.8, cutmix=1.0, switch=0.25)
  whole = (images == np.round(images)).all((1, 2, 3, 4))
  # Mixup leaves fractions, CutMix does not: a quarter of 400, +- 4 deviations.
  assert abs(whole.mean() - 0.25) < 0.09
