import numpy as np
import pytest

from experiments.data import dense

RNG = np.random.default_rng(0)


def example(height, width):
  """An image that tells its rows and columns, and a mask that does too."""
  rows, columns = np.mgrid[:height, :width]
  image = np.stack([rows, columns, rows + columns], -1).astype(np.uint8)
  return {'image': image, 'mask': (1000 * rows + columns).astype(np.int32)}


def test_a_whole_image_as_it_is():
  given = example(20, 30)
  found = dense.Fit((32, 32), (25, 40), resize=False).map(given)
  assert found['image'].shape == (32, 32, 3)
  assert found['mask'].shape == (25, 40)
  np.testing.assert_array_equal(found['image'][:20, :30], given['image'])
  np.testing.assert_array_equal(found['mask'][:20, :30], given['mask'])
  assert (found['image'][20:] == (124, 116, 104)).all()
  assert (found['mask'][20:] == -1).all()
  assert (found['mask'][:, 30:] == -1).all()
  assert found['scale'].tolist() == [1, 1]


@pytest.mark.parametrize(
  ('own', 'inner'), [((180, 240), (84, 112)), ((240, 180), (84, 63))]
)
def test_a_whole_image_that_is_scaled(own, inner):
  """It keeps its shape, and its mask its size."""
  given = {
    'image': np.full((*own, 3), 200, np.uint8),
    'mask': RNG.integers(0, 9, own, np.int32),
  }
  found = dense.Fit((84, 112), (240, 240), resize=True).map(given)
  height, width = inner
  assert (found['image'][:height, :width] == 200).all()
  assert (found['image'][height:] == (124, 116, 104)).all()
  assert (found['image'][:, width:] == (124, 116, 104)).all()
  np.testing.assert_array_equal(
    found['mask'][: own[0], : own[1]], given['mask']
  )
  assert (found['mask'] == -1).sum() == 240 * 240 - own[0] * own[1]
  np.testing.assert_allclose(found['scale'], np.divide(inner, own), rtol=1e-6)


@pytest.mark.parametrize('size', [(16, 24), (60, 90)])
def test_image_and_mask_are_cut_alike(size):
  """Whatever the factor, a pixel's class is that of where it was."""
  cut = dense.RandomScaleCrop(size, (0.5, 2.0))
  rows, columns = np.mgrid[:40, :50]
  stripes = (rows // 8 + columns // 10) % 2
  given = {
    'image': (255 * stripes[..., None] * np.ones(3)).astype(np.uint8),
    'mask': stripes.astype(np.int32),
  }
  shares = []
  for seed in range(20):
    found = cut.random_map(given, np.random.default_rng(seed))
    assert found['image'].shape == (*size, 3)
    assert found['mask'].shape == size
    assert found['scale'].tolist() == [1, 1]
    inside = found['mask'] >= 0
    shares.append(inside.mean())
    assert (found['image'][~inside] == (124, 116, 104)).all()
    agrees = (found['image'][..., 0] > 127) == (found['mask'] == 1)
    assert agrees[inside].mean() > 0.95
  assert len(set(shares)) > 1 or min(shares) == 1


def test_the_factor_and_the_place_are_drawn():
  cut = dense.RandomScaleCrop((10, 10), (2.0, 2.0))
  given = example(20, 20)
  masks = [
    cut.random_map(given, np.random.default_rng(seed))['mask']
    for seed in range(300)
  ]
  # Twice as large, each class is 2 x 2 pixels.
  corners = {mask[0, 0] for mask in masks}
  assert corners >= {0, 15_015}
  for mask in masks:
    assert len(np.unique(mask)) in (25, 30, 36)
  wide = dense.RandomScaleCrop((100, 100), (0.5, 2.0))
  sides = [
    (wide.random_map(given, np.random.default_rng(seed))['mask'][:, 0] >= 0)
    for seed in range(300)
  ]
  sides = [side.sum() for side in sides]
  assert min(sides) == 10
  assert max(sides) == 40
  assert abs(np.mean(sides) - 25) < 2


@pytest.mark.parametrize('probability', [0.0, 0.5, 1.0])
def test_both_are_mirrored(probability):
  flip = dense.RandomFlip(probability)
  given = example(4, 6)
  mirrored = 0
  for seed in range(100):
    found = flip.random_map(given, np.random.default_rng(seed))
    if found['mask'][0, 0]:
      mirrored += 1
      np.testing.assert_array_equal(found['image'], given['image'][:, ::-1])
      np.testing.assert_array_equal(found['mask'], given['mask'][:, ::-1])
    else:
      np.testing.assert_array_equal(found['image'], given['image'])
  assert abs(mirrored - 100 * probability) < 20


def test_what_training_is_made_of():
  names = [
    type(transform).__name__
    for transform in dense.training([8, 8], scale=[1, 2], flip=0.5)
  ]
  assert names == ['RandomScaleCrop', 'RandomFlip']
  assert len(dense.training([8, 8], scale=[1, 2], flip=0.0)) == 1
