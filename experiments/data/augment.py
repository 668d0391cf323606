"""Transforms of images, uint8 [H, W, 3] or grey [H, W, 1].

They are those of DeiT's recipe, in timm's definitions, and Grain transforms:
all chance comes from the generator that Grain gives each example.

RandAugment is written out in Pillow's operations because no library had it that
needs no PyTorch, takes a generator and costs few milliseconds and megabytes.

References:
  Touvron et al., "Training data-efficient image transformers", 2021.
  Cubuk et al., "RandAugment", 2020.
  Zhong et al., "Random Erasing Data Augmentation", 2020.
  https://github.com/huggingface/pytorch-image-models
"""

import dataclasses
import math

import grain
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from experiments.data.images import from_pillow, to_pillow

_BICUBIC = Image.Resampling.BICUBIC  # antialiased where it shrinks
# ImageNet's mean colour, and mean and standard deviation over all channels: to
# fill images up, and for noise. A model's input is normalised by its own.
_FILL = (124, 116, 104)
_MEAN, _STD = 115, 58


def evaluation(image_size, crop=1.0):
  """What images go through at evaluation: resize, then the centre crop.

  Args:
    image_size: of the crop, in pixels.
    crop: its share of the shorter side; 0.875 in DeiT's recipe.

  Returns:
    A list of Grain transforms.

  Raises:
    ValueError: the crop is larger than the image.
  """
  if not 0 < crop <= 1:
    raise ValueError(f'crop is {crop}; it is a share of the side, up to 1.')
  return [CentreCrop(image_size, crop)]


def training(
  image_size,
  *,
  scale,
  flip,
  randaugment,
  erasing,
  ratio=(3 / 4, 4 / 3),
):
  """What images go through in training.

  Args:
    image_size: in pixels.
    scale: range of the random crop's share of the area.
    flip: probability of a mirrored image.
    randaugment: whether to use `RandAugment`.
    erasing: probability of `RandomErasing`.
    ratio: range of the crop's width : height; DeiT's default.

  Returns:
    A list of Grain transforms.
  """
  transforms = [RandomCrop(image_size, tuple(scale), tuple(ratio))]
  if flip:
    transforms.append(RandomFlip(flip))
  if randaugment:
    transforms.append(RandAugment())
  if erasing:
    transforms.append(RandomErasing(erasing))
  return transforms


@dataclasses.dataclass(frozen=True)
class CentreCrop(grain.transforms.Map):
  """Resizes the shorter side to size / crop, and cuts size x size out."""

  size: int
  crop: float

  def map(self, element):
    image = to_pillow(element['image'])
    shorter = int(self.size / self.crop)
    sides = [int(shorter * side / min(image.size)) for side in image.size]
    image = image.resize(sides, _BICUBIC)
    left, top = (round((side - self.size) / 2) for side in sides)
    image = image.crop((left, top, left + self.size, top + self.size))
    return {**element, 'image': from_pillow(image)}


@dataclasses.dataclass(frozen=True)
class RandomCrop(grain.transforms.RandomMap):
  """Cuts a random box out, and resizes it to size x size.

  Attributes:
    size: in pixels.
    scale: range of the box's share of the area, drawn uniformly.
    ratio: range of its width : height, drawn uniformly in the logarithm.
  """

  size: int
  scale: tuple[float, float]
  ratio: tuple[float, float]

  def random_map(self, element, rng):
    image = to_pillow(element['image'])
    image = image.resize(
      (self.size, self.size), _BICUBIC, box=self._box(*image.size, rng)
    )
    return {**element, 'image': from_pillow(image)}

  def _box(self, width, height, rng):
    for _ in range(10):
      box = _random_box(width, height, self.scale, self.ratio, rng)
      if box is not None:
        return box
    # The image is too narrow or too flat: its middle, as near as can be.
    ratio = np.clip(width / height, *self.ratio)
    w = min(width, round(height * ratio))
    h = min(height, round(width / ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@dataclasses.dataclass(frozen=True)
class RandomFlip(grain.transforms.RandomMap):
  """Mirrors left and right, with a probability."""

  probability: float

  def random_map(self, element, rng):
    if rng.random() < self.probability:
      element = {**element, 'image': element['image'][:, ::-1]}
    return element


@dataclasses.dataclass(frozen=True)
class RandAugment(grain.transforms.RandomMap):
  """Some random operations, of random strength: rand-m9-mstd0.5-inc1.

  Attributes:
    num_ops: of `OPERATIONS` that are drawn, one after another.
    probability: that one that was drawn is applied.
    magnitude: mean of the strength, which goes from 0 to 10.
    std: its standard deviation.
  """

  num_ops: int = 2
  probability: float = 0.5
  magnitude: float = 9.0
  std: float = 0.5

  def random_map(self, element, rng):
    image = to_pillow(element['image'])
    for _ in range(self.num_ops):
      operation = OPERATIONS[rng.choice(list(OPERATIONS))]
      magnitude = np.clip(rng.normal(self.magnitude, self.std), 0, 10)
      strength = magnitude / 10 * rng.choice((-1, 1))
      if rng.random() < self.probability:
        image = operation(image, strength)
    return {**element, 'image': from_pillow(image)}


@dataclasses.dataclass(frozen=True)
class RandomErasing(grain.transforms.RandomMap):
  """Fills a random box with noise, with a probability.

  Every value is drawn on its own, from a normal distribution with the mean and
  deviation of ImageNet's pixels: about N(0, 1) once it is normalised.

  Attributes:
    probability: that there is a box at all.
    scale: range of the box's share of the area, drawn uniformly.
    ratio: range of its width : height, drawn uniformly in the logarithm.
  """

  probability: float
  scale: tuple[float, float] = (0.02, 1 / 3)
  ratio: tuple[float, float] = (0.3, 1 / 0.3)

  def random_map(self, element, rng):
    if rng.random() >= self.probability:
      return element
    image = element['image'].copy()
    height, width, channels = image.shape
    for _ in range(10):
      box = _random_box(width, height, self.scale, self.ratio, rng)
      if box is not None:
        left, top, right, bottom = box
        shape = (bottom - top, right - left, channels)
        noise = rng.normal(_MEAN, _STD, shape)
        image[top:bottom, left:right] = np.clip(np.rint(noise), 0, 255)
        break
    return {**element, 'image': image}


def _random_box(width, height, scale, ratio, rng):
  """(left, top, right, bottom) of a random box; None if it does not fit."""
  area = rng.uniform(*scale) * width * height
  aspect = math.exp(rng.uniform(*np.log(ratio)))
  w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
  if not (0 < w <= width and 0 < h <= height):
    return None
  left = int(rng.integers(width - w + 1))
  top = int(rng.integers(height - h + 1))
  return left, top, left + w, top + h


def _affine(image, *matrix):
  return image.transform(
    image.size,
    Image.Transform.AFFINE,
    matrix,
    _BICUBIC,
    fillcolor=_fill(image),
  )


def _fill(image):
  return _FILL if image.mode == 'RGB' else _MEAN


def _point(image, function):
  """Applies a function of pixel values 0..255."""
  table = [function(value) for value in range(256)]
  return image.point(table * len(image.getbands()))


def _posterize(image, s):
  dropped = 4 + int(4 * abs(s))  # bits; Pillow's own refuses to drop all eight
  return _point(image, lambda value: value >> dropped << dropped)


def _solarize_add(image, s):
  added = int(110 * abs(s))
  return _point(image, lambda v: min(v + added, 255) if v < 128 else v)


def _enhance(kind):
  return lambda image, s: kind(image).enhance(max(0.1, 1 + 0.9 * s))


# RandAugment's: functions of an image and a strength s from -1 to 1.
OPERATIONS = {
  'autocontrast': lambda image, s: ImageOps.autocontrast(image),
  'equalize': lambda image, s: ImageOps.equalize(image),
  'invert': lambda image, s: ImageOps.invert(image),
  'rotate': lambda image, s: image.rotate(
    30 * s, _BICUBIC, fillcolor=_fill(image)
  ),
  'posterize': _posterize,
  'solarize': lambda image, s: ImageOps.solarize(
    image, 256 - int(256 * abs(s))
  ),
  'solarize_add': _solarize_add,
  'colour': _enhance(ImageEnhance.Color),
  'contrast': _enhance(ImageEnhance.Contrast),
  'brightness': _enhance(ImageEnhance.Brightness),
  'sharpness': _enhance(ImageEnhance.Sharpness),
  'shear_x': lambda image, s: _affine(image, 1, 0.3 * s, 0, 0, 1, 0),
  'shear_y': lambda image, s: _affine(image, 1, 0, 0, 0.3 * s, 1, 0),
  'translate_x': lambda image, s: _affine(
    image, 1, 0, 0.45 * s * image.width, 0, 1, 0
  ),
  'translate_y': lambda image, s: _affine(
    image, 1, 0, 0, 0, 1, 0.45 * s * image.height
  ),
}
