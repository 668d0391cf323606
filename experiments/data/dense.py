"""Transforms of an image and its mask, which treat both alike.

Examples are those of `masks`; what comes out is `{'image': uint8 [H, W, 3],
'mask': int32 [h, w], 'scale': float32 [2]}`, where a row or a column of the
mask is `scale` rows or columns of the image. They are Grain transforms: all
chance comes from the generator that Grain gives each example.
"""

import dataclasses

import grain
import numpy as np
from PIL import Image

from experiments.data.images import from_pillow, to_pillow
from experiments.data.masks import VOID

_FILL = (124, 116, 104)  # ImageNet's mean colour


def training(size, *, scale, flip):
  """What images and masks go through in training.

  Args:
    size: height and width, in pixels.
    scale: range of the factor of their sides.
    flip: probability of mirrored ones.

  Returns:
    A list of Grain transforms.
  """
  transforms = [RandomScaleCrop(tuple(size), tuple(scale))]
  if flip:
    transforms.append(RandomFlip(flip))
  return transforms


@dataclasses.dataclass(frozen=True)
class Fit(grain.transforms.Map):
  """The whole image as the model takes it, and its mask at its own size.

  An image keeps its shape, in the upper left corner of what the model sees; the
  rest is ImageNet's mean colour, and in the mask void.

  Attributes:
    size: height and width of what the model sees, in pixels.
    canvas: height and width of the largest mask; all are filled up to it.
    resize: whether an image is scaled to the largest that fits, by antialiased
      bicubic; else it has to fit as it is.
  """

  size: tuple[int, int]
  canvas: tuple[int, int]
  resize: bool

  def map(self, element):
    image, mask = element['image'], element['mask']
    own = np.array(mask.shape)
    inner = own
    if self.resize:
      factor = min(np.array(self.size) / own)
      inner = np.clip(np.round(factor * own).astype(int), 1, self.size)
      image = _resize(image, inner)
    return {
      'image': _fill_up(image, self.size, _FILL),
      'mask': _fill_up(mask, self.canvas, VOID),
      'scale': (inner / own).astype(np.float32),
    }


@dataclasses.dataclass(frozen=True)
class RandomScaleCrop(grain.transforms.RandomMap):
  """Scales both sides by one random factor, and cuts a random box out.

  What is smaller than the box lies in its upper left corner, as in `Fit`.

  Attributes:
    size: height and width of the box, in pixels.
    scale: range of the factor, drawn uniformly.
  """

  size: tuple[int, int]
  scale: tuple[float, float]

  def random_map(self, element, rng):
    image, mask = element['image'], element['mask']
    own = np.array(mask.shape)
    factor = rng.uniform(*self.scale)
    new = np.maximum(np.round(factor * own).astype(int), 1)
    top, left = rng.integers(np.maximum(new - self.size, 0) + 1)
    rows, columns = (
      slice(start, start + side)
      for start, side in zip((top, left), self.size, strict=True)
    )
    image = _resize(image, new)[rows, columns]
    # The nearest pixel: between two classes there is none.
    nearest = [
      ((np.arange(n) + 0.5) * side / n).astype(int)[kept]
      for n, side, kept in zip(new, own, (rows, columns), strict=True)
    ]
    return {
      'image': _fill_up(image, self.size, _FILL),
      'mask': _fill_up(mask[np.ix_(*nearest)], self.size, VOID),
      'scale': np.ones(2, np.float32),
    }


@dataclasses.dataclass(frozen=True)
class RandomFlip(grain.transforms.RandomMap):
  """Mirrors left and right, with a probability."""

  probability: float

  def random_map(self, element, rng):
    if rng.random() < self.probability:
      mirrored = {key: element[key][:, ::-1] for key in ('image', 'mask')}
      element = {**element, **mirrored}
    return element


def _resize(image, size):
  height, width = map(int, size)
  return from_pillow(
    to_pillow(image).resize((width, height), Image.Resampling.BICUBIC)
  )


def _fill_up(pixels, size, value):
  """[h, w, ...] in the upper left corner of [*size, ...] of a value."""
  height, width = pixels.shape[:2]
  filled = np.empty((*size, *pixels.shape[2:]), pixels.dtype)
  filled[:] = value
  filled[:height, :width] = pixels
  return filled
