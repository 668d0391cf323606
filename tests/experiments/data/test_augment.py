import numpy as np
import pytest
from PIL import Image

from experiments.data import augment, images

RECIPE = {
  'scale': (0.08, 1.0),
  'flip': 0.5,
  'randaugment': True,
  'erasing': 0.25,
}


def make_image(height, width, channels=3, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, channels), np.uint8)


def ramps(height, width):
  """An image whose channels are x, y and 0, for where pixels come from."""
  y, x = np.mgrid[:height, :width]
  return np.stack([x, y, 0 * x], -1).astype(np.uint8)


def apply(transforms, image, seed=0):
  element = {'image': image, 'label': np.int32(3)}
  rng = np.random.default_rng(seed)
  for transform in transforms:
    if hasattr(transform, 'map'):
      element = transform.map(element)
    else:
      element = transform.random_map(element, rng)
  assert element['label'] == 3
  assert element['image'].dtype == np.uint8
  return element['image']


@pytest.mark.parametrize('channels', [1, 3])
def test_evaluation_of_a_square_is_a_plain_resize(channels):
  image = make_image(40, 40, channels)
  found = apply(augment.evaluation(28), image)
  for c in range(channels):
    small = Image.fromarray(image[..., c]).resize((28, 28), Image.BICUBIC)
    np.testing.assert_array_equal(found[..., c], small)
  assert found.shape == (28, 28, channels)


def test_evaluation_at_its_own_size_changes_nothing():
  image = make_image(32, 32)
  np.testing.assert_array_equal(apply(augment.evaluation(32), image), image)


@pytest.mark.parametrize('crop', [1.0, 0.875])
@pytest.mark.parametrize('shape', [(96, 150), (150, 96), (97, 97)])
def test_evaluation_cuts_the_centre(shape, crop):
  """What is left is the middle, crop times the shorter side wide."""
  found = apply(augment.evaluation(56, crop), ramps(*shape)).astype(float)
  height, width = shape
  side = crop * min(shape)
  for values, length in ((found[..., 0], width), (found[..., 1].T, height)):
    row = values.mean(0)
    assert (values == values[0]).all()
    # A pixel, for roundings of sizes and offsets; 2 % of the side, for those of
    # the scale; bicubic is exact on ramps, but for the borders.
    middle = row[4:-4].mean()
    assert middle == pytest.approx((length - 1) / 2, abs=1)
    slope = (row[-5] - row[4]) / (len(row) - 9)
    assert slope == pytest.approx(side / 56, rel=0.02)


def test_evaluation_crop_is_deits():
  """DeiT: 224 of 256 pixels, resized with the shorter side at 256."""
  image = make_image(300, 400)
  whole = Image.fromarray(image).resize((341, 256), Image.BICUBIC)
  left = round((341 - 224) / 2)
  wanted = whole.crop((left, 16, left + 224, 240))
  np.testing.assert_array_equal(
    apply(augment.evaluation(224, 0.875), image), wanted
  )


@pytest.mark.parametrize('crop', [0, 1.1])
def test_evaluation_crop_is_a_share(crop):
  with pytest.raises(ValueError, match=rf'crop is {crop}; it is a share'):
    augment.evaluation(224, crop)


def test_training_with_all_of_it_off_is_a_resize():
  off = augment.training(
    32, scale=(1, 1), ratio=(1, 1), flip=0, randaugment=False, erasing=0
  )
  for size in (32, 50):
    image = make_image(size, size)
    np.testing.assert_array_equal(
      apply(off, image), apply(augment.evaluation(32), image)
    )


def test_training_parts_are_switched_on_one_by_one():
  def names(**options):
    return [
      type(t).__name__ for t in augment.training(32, **{**RECIPE, **options})
    ]

  assert names() == [
    'RandomCrop',
    'RandomFlip',
    'RandAugment',
    'RandomErasing',
  ]
  assert names(flip=0, erasing=0) == ['RandomCrop', 'RandAugment']
  assert names(randaugment=False) == [
    'RandomCrop',
    'RandomFlip',
    'RandomErasing',
  ]


@pytest.mark.parametrize('channels', [1, 3])
def test_training_is_the_generators(channels):
  transforms = augment.training(24, **RECIPE)
  image = make_image(40, 30, channels)
  found = [apply(transforms, image, seed) for seed in range(20)]
  assert {image.shape for image in found} == {(24, 24, channels)}
  again = [apply(transforms, image, seed) for seed in range(20)]
  np.testing.assert_array_equal(found, again)
  assert len({image.tobytes() for image in found}) == 20


def test_random_crop_has_its_area_and_ratio():
  transform = augment.RandomCrop(16, (0.25, 0.5), (0.5, 2.0))
  image = ramps(200, 250)
  areas, ratios, lefts = [], [], []
  for seed in range(300):
    found = apply([transform], image, seed).astype(float)
    # The box ends half a pixel, of 1/16 of it, beyond the first and last one.
    width = np.ptp(found[8, :, 0]) * 16 / 15
    height = np.ptp(found[:, 8, 1]) * 16 / 15
    areas.append(width * height / (200 * 250))
    ratios.append(width / height)
    lefts.append(found[8, 0, 0])
  # 2 %, for boxes of whole pixels.
  assert 0.25 * 0.98 < min(areas) < 0.27
  assert 0.48 < max(areas) < 0.5 * 1.02
  assert 0.5 * 0.96 < min(ratios) < 0.55
  assert 1.8 < max(ratios) < 2 * 1.04
  # Uniform area: the mean of 300 draws has a standard error of 0.004.
  assert np.mean(areas) == pytest.approx(0.375, abs=0.015)
  assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.1)
  assert min(lefts) < 10
  assert max(lefts) > 120


def test_random_crop_of_an_image_no_box_fits():
  """Wide and flat: the middle, at the largest ratio."""
  transform = augment.RandomCrop(30, (1, 1), (3 / 4, 4 / 3))
  found = apply([transform], ramps(30, 250)).astype(float)
  assert np.ptp(found[15, :, 0]) * 30 / 29 == pytest.approx(40, abs=1.5)
  assert found[15, :, 0].mean() == pytest.approx(124.5, abs=1)
  tall = apply([transform], ramps(250, 30)).astype(float)
  assert np.ptp(tall[:, 15, 1]) * 30 / 29 == pytest.approx(40, abs=1.5)


def test_random_flip():
  image = make_image(4, 6)
  flipped = [
    apply([augment.RandomFlip(0.3)], image, seed) for seed in range(400)
  ]
  mirrored = [np.array_equal(f, image[:, ::-1]) for f in flipped]
  same = [np.array_equal(f, image) for f in flipped]
  assert sum(mirrored) + sum(same) == 400
  # Four standard errors of 0.023.
  assert np.mean(mirrored) == pytest.approx(0.3, abs=0.09)


def test_random_erasing():
  image = np.zeros((60, 80, 3), np.uint8)
  before = image.copy()
  areas, noise = [], []
  for seed in range(400):
    found = apply([augment.RandomErasing(0.25)], image, seed)
    erased = (found != 0).any(-1)
    areas.append(erased.mean())
    if erased.any():
      rows, columns = (
        np.flatnonzero(erased.any(1)),
        np.flatnonzero(erased.any(0)),
      )
      box = found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
      # A box, of which hardly a pixel is black.
      assert erased.sum() > 0.99 * box.shape[0] * box.shape[1]
      noise.append(box.reshape(-1, 3))
  np.testing.assert_array_equal(image, before)
  areas = np.array(areas)
  # Four standard errors of 0.022.
  assert np.mean(areas > 0) == pytest.approx(0.25, abs=0.09)
  # 5 %, for boxes of whole pixels.
  assert 0.02 * 0.95 < areas[areas > 0].min() < 0.05
  assert 0.28 < areas.max() < 1 / 3 * 1.05
  noise = np.concatenate(noise).astype(float)
  # ImageNet's; clipping at 0 moves them by half a unit and two.
  np.testing.assert_allclose(noise.mean(0), 115, atol=1.5)
  np.testing.assert_allclose(noise.std(0), 58, atol=3)
  # Each value on its own.
  np.testing.assert_allclose(np.corrcoef(noise.T), np.eye(3), atol=0.02)


# RandAugment: its operations at strength s against formulas.


def operations(image, s):
  """All of them, applied."""
  return {
    name: images.from_pillow(operation(images.to_pillow(image), s)).astype(int)
    for name, operation in augment.OPERATIONS.items()
  }


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('s', [-0.9, 0.9, 0.5, 1.0])
def test_randaugment_of_pixel_values(s, channels):
  image = make_image(20, 30, channels)
  found = operations(image, s)
  image, level = image.astype(int), abs(s)
  np.testing.assert_array_equal(found['invert'], 255 - image)
  kept = 4 - int(4 * level)  # 4 bits to none
  np.testing.assert_array_equal(
    found['posterize'], image // 2 ** (8 - kept) * 2 ** (8 - kept)
  )
  threshold = 256 - int(256 * level)
  np.testing.assert_array_equal(
    found['solarize'], np.where(image < threshold, image, 255 - image)
  )
  np.testing.assert_array_equal(
    found['solarize_add'],
    np.where(image < 128, np.minimum(image + int(110 * level), 255), image),
  )
  factor = max(0.1, 1 + 0.9 * s)
  np.testing.assert_allclose(
    found['brightness'], np.clip(factor * image, 0, 255), atol=1
  )
  grey = image @ [0.299, 0.587, 0.114] if channels == 3 else image[..., 0]
  wanted = grey.mean() + factor * (image - grey.mean())
  np.testing.assert_allclose(found['contrast'], np.clip(wanted, 0, 255), atol=2)
  wanted = grey[..., None] + factor * (image - grey[..., None])
  np.testing.assert_allclose(found['colour'], np.clip(wanted, 0, 255), atol=2)


def test_randaugment_stretches_values():
  image = make_image(64, 64) // 2 + 30  # 30 to 157
  found = operations(image, 0.9)
  stretched = found['autocontrast']
  assert (stretched.min(), stretched.max()) == (0, 255)
  np.testing.assert_allclose(
    stretched, (image.astype(int) - 30) * 255 / 127, atol=1
  )
  # 128 values are moved on, each a little too far up.
  shares = np.bincount(found['equalize'].ravel() // 64) / image.size
  np.testing.assert_allclose(shares, 0.25, atol=0.05)


def test_randaugment_sharpens_and_blurs():
  image = make_image(40, 40) // 2 + 60
  inner = np.s_[1:-1, 1:-1]
  before = image[inner].std()
  assert operations(image, 0.9)['sharpness'][inner].std() > 1.4 * before
  assert operations(image, -0.9)['sharpness'][inner].std() < 0.8 * before


@pytest.mark.parametrize('s', [-1.0, 0.5, 0.9])
def test_randaugment_moves_pixels(s):
  """Ramps tell where each pixel of the result was before."""
  size = 100
  y, x = np.mgrid[:size, :size].astype(float)
  centre = (size - 1) / 2
  angle = np.deg2rad(30 * s)
  rotated = (
    np.cos(angle) * (x - centre) - np.sin(angle) * (y - centre) + centre,
    np.sin(angle) * (x - centre) + np.cos(angle) * (y - centre) + centre,
  )
  # Half a pixel: shears turn about the corner of the first one.
  wanted = {
    'rotate': rotated,
    'shear_x': (x + 0.3 * s * (y + 0.5), y),
    'shear_y': (x, y + 0.3 * s * (x + 0.5)),
    'translate_x': (x + 0.45 * s * size, y),
    'translate_y': (x, y + 0.45 * s * size),
  }
  found = operations(ramps(size, size), s)
  for operation, (from_x, from_y) in wanted.items():
    # Rounding; a few pixels in, for bicubic at the border.
    margin = 3
    inside = (np.minimum(from_x, from_y) > margin) & (
      np.maximum(from_x, from_y) < size - 1 - margin
    )
    assert inside.sum() > 0.4 * size**2
    np.testing.assert_allclose(
      found[operation][inside][:, 0], from_x[inside], atol=1
    )
    np.testing.assert_allclose(
      found[operation][inside][:, 1], from_y[inside], atol=1
    )
    outside = (np.minimum(from_x, from_y) < -2) | (
      np.maximum(from_x, from_y) > size + 1
    )
    assert outside.any()
    assert (found[operation][outside] == [124, 116, 104]).all()


def test_randaugment_fills_grey_images_with_grey():
  found = operations(np.zeros((20, 20, 1), np.uint8), 1.0)
  assert found['translate_x'][0, -1] == 115


def test_randaugment_with_no_operation_is_the_identity():
  image = make_image(20, 20)
  for transform in (
    augment.RandAugment(num_ops=0),
    augment.RandAugment(probability=0),
  ):
    np.testing.assert_array_equal(apply([transform], image), image)


class Recorder:
  """Takes an operation's place, and records its strength."""

  def __init__(self):
    self.strengths = []

  def __call__(self, image, s):
    self.strengths.append(s)
    return image


def test_randaugment_draws_operations_and_strengths(monkeypatch):
  """rand-m9-mstd0.5-inc1: two draws of 15, each applied half the time."""
  recorders = [Recorder() for _ in augment.OPERATIONS]
  assert len(recorders) == 15
  monkeypatch.setattr(augment, 'OPERATIONS', dict(enumerate(recorders)))
  image = make_image(2, 2)
  for seed in range(3000):
    apply([augment.RandAugment()], image, seed)
  counts = np.array([len(r.strengths) for r in recorders])
  # 3000 expected, 200 of each operation: four standard deviations.
  assert counts.sum() == pytest.approx(3000, abs=160)
  np.testing.assert_allclose(counts, 200, atol=56)
  strengths = np.concatenate([r.strengths for r in recorders])
  assert np.mean(strengths > 0) == pytest.approx(0.5, abs=0.04)
  # N(9, 0.5) clipped at 10 has a mean of 8.996: a standard error of 0.01.
  assert 10 * np.abs(strengths).mean() == pytest.approx(8.996, abs=0.04)
  assert 10 * np.abs(strengths).std() == pytest.approx(0.49, abs=0.03)
  assert np.abs(strengths).max() == 1.0
