"""Image files, decoded when they are asked for."""

import dataclasses
import io
import itertools
import os
import pathlib
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

# Of files that Pillow decodes by itself.
SUFFIXES = (
  *('.apng', '.avif', '.bmp', '.dib', '.gif', '.jfif', '.jp2', '.jpe', '.jpeg'),
  *('.jpg', '.pbm', '.pgm', '.png', '.pnm', '.ppm', '.tga', '.tif', '.tiff'),
  '.webp',
)
# Pillow warns of images above a limit, not by name, and refuses those above
# twice that: only these are too large.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)


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
    OSError: it is no image, a broken one, or too large a one.
    ValueError: its pixels have more than 8 bits.
  """
  try:
    with Image.open(io.BytesIO(data)) as image:
      image.load()
    deep = image.mode.startswith(('I', 'F'))
    if image.mode == 'P':  # else a transparent colour among them makes it warn
      image = image.convert('RGBA')
    converted = image if deep else image.convert(mode)
  except Exception as error:  # Pillow's readers raise all kinds of them
    raise OSError(
      f'{name} ({len(data)} bytes) is not readable: {reason(error)}.'
    ) from error
  if deep:
    raise ValueError(
      f'{name} has pixels of mode {image.mode!r}; convert it to 8 bits.'
    )
  return from_pillow(converted)


def reason(error):
  if isinstance(error, Image.DecompressionBombError):
    size_and_limit, _, _ = str(error).partition(',')
    return f'{size_and_limit}; resize it, or remove it'
  if isinstance(error, UnidentifiedImageError):  # its text is of a BytesIO
    return 'Pillow knows no such image format; replace it, or remove it'
  text = ' '.join(str(error).split()) or type(error).__name__
  return f'{text.rstrip(".")}; replace it, or remove it'


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
    groups: see `sources`.
  """

  folder: pathlib.Path
  names: tuple[str, ...]
  labels: np.ndarray
  class_names: tuple[str, ...]
  mode: str = 'RGB'
  groups: np.ndarray | None = None

  def __len__(self):
    return len(self.names)

  def __getitem__(self, index):
    file = self.folder / self.names[index]
    image = decode(file.read_bytes(), file, self.mode)
    return {'image': image, 'label': self.labels[index]}

  @property
  def ids(self):
    """As `resolve` says."""
    return resolve(self.folder, self.names)


def stretches(keys, length):
  """Groups of examples that follow one another, for a source's `groups`.

  Args:
    keys: one an example; where it changes, a group ends.
    length: the most examples of a group.

  Returns:
    [N] int, from 0 up.
  """
  groups, number = [], 0
  for _, run in itertools.groupby(keys):
    groups.append(number + np.arange(len(list(run))) // length)
    number = groups[-1][-1] + 1
  return np.concatenate(groups)


def resolve(folder, names):
  """Resolved path of every file.

  Each folder is listed once, which tells the links in it, and no other file is
  looked at. Copies and hard links are not told.

  Args:
    folder: that the names start from, a pathlib.Path.
    names: of the files.

  Returns:
    A list of strings.
  """
  folders, resolved = {}, []
  for name in names:
    parent, _, file = name.rpartition('/')
    if parent not in folders:
      real = os.path.realpath(folder / parent)
      with os.scandir(real) as entries:
        links = {entry.name for entry in entries if entry.is_symlink()}
      folders[parent] = real, links
    real, links = folders[parent]
    path = f'{real}/{file}'
    resolved.append(os.path.realpath(path) if file in links else path)
  return resolved
