"""Image files, decoded when they are asked for."""

import dataclasses
import io
import pathlib

import numpy as np
from PIL import Image


def decode(data, name, mode='RGB'):
  """Decodes an image file.

  Grey, palette and CMYK images become RGB, an alpha channel is dropped, and an
  EXIF orientation is left alone, as in the usual ImageNet pipelines.

  Args:
    data: the bytes of the file.
    name: what an error calls the file.
    mode: 'RGB', or 'L' for grey.

  Returns:
    uint8 [H, W, 3], or [H, W, 1] of grey.

  Raises:
    OSError: it is no image, or a broken one.
    ValueError: its pixels have more than 8 bits.
  """
  try:
    with Image.open(io.BytesIO(data)) as image:
      image.load()
  except (OSError, SyntaxError, ValueError) as error:  # as Pillow's readers do
    raise OSError(
      f'{name} ({len(data)} bytes) is not readable: {error}.'
    ) from (error)
  if image.mode.startswith(('I', 'F')):
    raise ValueError(
      f'{name} has pixels of mode {image.mode!r}; convert it to 8 bits.'
    )
  if image.mode == 'P':  # else a transparent colour among them makes it warn
    image = image.convert('RGBA')
  return from_pillow(image.convert(mode))


def to_pillow(image):
  """Pillow's image of uint8 [H, W, 3], or [H, W, 1] for a grey one."""
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def from_pillow(image):
  """uint8 [H, W, 3] of Pillow's image, or [H, W, 1] of a grey one."""
  pixels = np.asarray(image)
  return pixels[..., None] if pixels.ndim == 2 else pixels


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
  """A source: labelled image files.

  Attributes:
    folder: that the names start from.
    names: of the files, N of them.
    labels: [N] int32.
    class_names: one for each label, in order.
    mode: 'RGB', or 'L' for grey.
  """

  folder: pathlib.Path
  names: tuple[str, ...]
  labels: np.ndarray
  class_names: tuple[str, ...]
  mode: str = 'RGB'

  def __len__(self):
    return len(self.names)

  def __getitem__(self, index):
    file = self.folder / self.names[index]
    image = decode(file.read_bytes(), file, self.mode)
    return {'image': image, 'label': self.labels[index]}
