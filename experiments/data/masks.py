"""Images whose every pixel has a class, in a mask: a picture of ids.

A source of them is one as `sources` describes it, with examples `{'image':
uint8 [H, W, 3], 'mask': int32 [H, W]}`, `VOID` where a pixel counts for
nothing, and besides `sizes`, int [N, 2], height and width of every image. When
it is opened, all of its masks are read once, so that whatever is wrong with any
of them is told before anything is trained.
"""

import concurrent.futures
import dataclasses
import functools
import pathlib
from typing import NamedTuple

import numpy as np
from absl import logging
from PIL import Image

from experiments import files
from experiments.data import folders, images

VOID = -1
KINDS = ('masks', 'camvid', 'pascal_context')  # of sources, with masks

_STRETCH = 10  # frames of CamVid that are no independent draws

# Modes of Pillow whose values are ids: bits, grey, palette, 16 and 32 bits.
_MODES = ('1', 'L', 'P', 'I;16', 'I;16B', 'I;16L', 'I')
# PASCAL-Context by its number of classes: the list of their names, how many of
# it are left out, the id of the first class, and the id that is void.
_CONTEXT = {
  '21': ('pascal_voc', 0, 0, 255),
  '59': ('pascal_context', 1, 1, 0),
  '60': ('pascal_context', 0, 0, 255),
}


class Ids(NamedTuple):
  """What the values of a mask mean.

  Attributes:
    first: the id of class 0; the others follow it.
    void: the id that counts for nothing.
    num_classes: C.
  """

  first: int
  void: int
  num_classes: int

  def __str__(self):
    last = self.first + self.num_classes - 1
    return (
      f'{self.num_classes} classes, {self.first} to {last}, void {self.void}'
    )


def open_masks(data_dir, path, masks, classes, void=255):
  """Opens a folder of images, and one of masks that are named like them.

  Each image, `path`/NAME.jpg or deeper, has the mask `masks`/NAME.png; either
  may end otherwise. Masks are grey, of a palette, or of 16 bits; the value of a
  pixel is its class.

  Args:
    data_dir: where `path`, `masks` and `classes` start from.
    path: of the images' folder.
    masks: of the masks' folder.
    classes: names of the classes in the order of their ids, as
      `folders.read_classes` takes them.
    void: the id of the pixels that count for nothing.

  Returns:
    A `MaskFiles`, sorted by name.

  Raises:
    FileNotFoundError: no such folder or list, or no image in it.
    ValueError: it names every image without a mask, and every mask of another
      size than its image, or with an id that is neither a class nor void.
  """
  root = files.expand(data_dir)
  found, theirs = (_pictures(root, folder) for folder in (path, masks))
  pairs, problems = [], []
  for stem, names in found.items():
    own = theirs.pop(stem, [])
    if len(names) == len(own) == 1:
      pairs.append((names[0], own[0]))
    elif not own:
      where = files.expand(masks, root) / f'{stem}.png'
      problems.append(f'{root / names[0]}: it has no mask {where}')
    else:
      problems += [
        f'{root / name}: it is one of {len(names) + len(own)} files that are '
        f'named {stem}, and are to be one image and one mask'
        for name in names
      ]
  if theirs:
    logging.warning(
      '%s: %d masks have no image, such as %s; they are not read.',
      files.expand(masks, root),
      len(theirs),
      min(theirs),
    )
  class_names = folders.read_classes(classes, data_dir)
  ids = Ids(0, void, len(class_names))
  return _open(root, pairs, class_names, ids, problems)


def open_camvid(data_dir, split, path='camvid', sequences=None):
  """Opens CamVid in the layout of SegNet's tutorial, of 11 classes.

  DATA_DIR/PATH has {train,val,test}/*.png, {train,val,test}annot/*.png and the
  lists {train,val,test}.txt, whose lines are an image and its mask. Of the
  paths in them the last two parts count; images may end otherwise.

  Args:
    data_dir: where `path` starts from.
    split: 'train', 'val' or 'test', or some of them, as 'train+test'.
    path: of the folder.
    sequences: beginnings of the names of the frames to take, such as
      ('0016E5', '0006R0'); all by default.

  Returns:
    A `MaskFiles`, in the order of the lists. Ten frames of a sequence that
    follow one another, most of them ten seconds, are a group.

  Raises:
    FileNotFoundError: no such list or folder.
    ValueError: of a line, or of images and masks as `open_masks`.
  """
  root = files.expand(path, data_dir)
  pairs, problems = [], []
  for part in split.split('+'):
    if part not in ('train', 'val', 'test'):
      raise ValueError(
        f'camvid has no split {part!r}; its splits are train, val and test, or '
        'some of them, as train+test.'
      )
    pairs += _read_pairs(root, root / f'{part}.txt', problems)
  sequences = ('',) if sequences is None else tuple(sequences)
  pairs = [
    pair for pair in pairs if pair[0].rpartition('/')[2].startswith(sequences)
  ]
  class_names = folders.read_classes('camvid')
  ids = Ids(0, len(class_names), len(class_names))
  source = _open(root, pairs, class_names, ids, problems)
  names = [name.rpartition('/')[2] for name in source.names]
  drives = [name.partition('_')[0] for name in names]
  groups = images.stretches(drives, _STRETCH)
  return dataclasses.replace(source, groups=groups)


def open_pascal_context(data_dir, path, split, classes):
  """Opens PASCAL-Context: VOC 2010's images with PNG masks.

  With 21 classes, those of VOC, the folder is PASCAL_MT: JPEGImages/*.jpg,
  ImageSets/Context/{train,val}.txt, and masks in semseg/VOC12 or, where it has
  none, in semseg/pascal-context; 255 is void. With 59 or 60 it is
  VOCdevkit/VOC2010: JPEGImages, ImageSets/SegmentationContext/{train,val}.txt
  and SegmentationClassContext/*.png; 0 is the background, which is a class of
  the 60 and void among the 59.

  Args:
    data_dir: where `path` starts from.
    path: of the folder.
    split: 'train' or 'val'.
    classes: '21', '59' or '60'.

  Returns:
    A `MaskFiles`, in the order of the list.

  Raises:
    FileNotFoundError: no such list.
    ValueError: there are not so many classes; of images and masks as
      `open_masks`.
  """
  if str(classes) not in _CONTEXT:
    raise ValueError(
      f'pascal_context: classes is {classes!r}; it is one of '
      f'{", ".join(_CONTEXT)}.'
    )
  names, left_out, first, void = _CONTEXT[str(classes)]
  root = files.expand(path, data_dir)
  sets, places = 'SegmentationContext', ('SegmentationClassContext',)
  if str(classes) == '21':
    sets, places = 'Context', ('semseg/VOC12', 'semseg/pascal-context')
  pairs, problems = [], []
  for name in _lines(root / f'ImageSets/{sets}/{split}.txt'):
    masks = [f'{place}/{name}.png' for place in places]
    own = [mask for mask in masks if (root / mask).is_file()]
    if own:
      pairs.append((f'JPEGImages/{name}.jpg', own[0]))
    else:
      image = root / f'JPEGImages/{name}.jpg'
      problems.append(f'{image}: it has no mask {" or ".join(masks)}')
  class_names = folders.read_classes(names)[left_out:]
  ids = Ids(first, void, len(class_names))
  return _open(root, pairs, class_names, ids, problems)


@dataclasses.dataclass(frozen=True, eq=False)
class MaskFiles:
  """A source: image files with masks.

  Attributes:
    folder: that the names start from.
    names: of the images, N of them.
    masks: of their masks.
    class_names: in the order of the ids.
    of: the `Ids` of the masks.
    sizes: [N, 2], height and width.
    labels: none: an image has no class.
    groups: see `sources`.
  """

  folder: pathlib.Path
  names: tuple[str, ...]
  masks: tuple[str, ...]
  class_names: tuple[str, ...]
  of: Ids
  sizes: np.ndarray
  labels: None = None
  groups: np.ndarray | None = None

  def __len__(self):
    return len(self.names)

  def __getitem__(self, index):
    file = self.folder / self.names[index]
    ids = read_ids(self.folder / self.masks[index])
    return {
      'image': images.decode(file.read_bytes(), file),
      'mask': np.where(ids == self.of.void, VOID, ids - self.of.first),
    }

  @property
  def ids(self):
    """Resolved path of every image."""
    return images.resolve(self.folder, self.names)


def read_ids(file):
  """The ids in a mask, int32 [H, W]; of a palette, not its colours.

  Raises:
    OSError: it is no image, or a broken one.
    ValueError: it is a colour picture.
  """
  try:
    with Image.open(file) as image:
      image.load()
  except FileNotFoundError:
    raise
  except Exception as error:  # Pillow's readers raise all kinds of them
    raise OSError(f'{file} is not readable: {images.reason(error)}.') from error
  if image.mode not in _MODES:
    raise ValueError(
      f'{file} is a picture of mode {image.mode!r}, not of ids; a mask is '
      'grey, of a palette, or of 16 bits.'
    )
  return np.asarray(image).astype(np.int32)


def _open(root, pairs, class_names, ids, problems):
  if not pairs and not problems:
    raise FileNotFoundError(
      f'{root} has no image of these with a mask; set data_dir to where the '
      'data lies.'
    )
  sizes, others, counts = _survey(root, tuple(pairs), ids)
  problems = [*problems, *others]
  if problems:
    raise ValueError(
      f'{root}: {len(problems)} images or masks cannot be used. Mend them, or '
      'take them out:\n  ' + '\n  '.join(problems)
    )
  if not counts:
    raise ValueError(
      f'{root}: every pixel of its {len(pairs)} masks is void; there are {ids}.'
    )
  names, masks = zip(*pairs, strict=True)
  return MaskFiles(root, names, masks, class_names, ids, sizes)


@functools.lru_cache
def _survey(root, pairs, ids):
  """Looks at every mask, and at the size of every image.

  Kept, since a study may corrupt one set of images in many ways.

  Returns:
    The sizes, [N, 2]; a list of what is wrong, a string each; and whether any
    pixel counts.
  """
  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = list(pool.map(functools.partial(_look, root, ids), pairs))
  sizes = np.array([size for size, _, _ in found if size], np.int32)
  problems = [problem for _, problem, _ in found if problem]
  return sizes, problems, any(counts for *_, counts in found)


def _look(root, ids, pair):
  """The size of an image, (height, width); what is wrong; whether it counts."""
  image, mask = (root / name for name in pair)
  try:
    with Image.open(image) as opened:
      size = opened.size[::-1]
  except Exception as error:  # as `read_ids`
    return None, f'{image}: {images.reason(error)}', False
  try:
    values = read_ids(mask)
  except (OSError, ValueError) as error:
    return None, str(error).rstrip('.'), False
  if values.shape != size:
    height, width = values.shape
    problem = f'{height} x {width} pixels, its image {size[0]} x {size[1]}'
    return None, f'{mask}: it has {problem}', False
  beyond = (values < ids.first) | (values >= ids.first + ids.num_classes)
  if (beyond := values[beyond & (values != ids.void)]).size:
    problem = f'it has the id {beyond.min()}; there are {ids}'
    return None, f'{mask}: {problem}', False
  return size, None, bool((values != ids.void).any())


def _pictures(root, folder):
  """Names of the images in a folder or deeper, `{stem: [name]}`, sorted."""
  top = files.expand(folder, root)
  if not top.is_dir():
    raise FileNotFoundError(
      f'{top} is no folder; set data_dir to where the data lies.'
    )
  found = {}
  for file in sorted(top.rglob('*')):
    inside = file.relative_to(top)
    hidden = any(part.startswith('.') for part in inside.parts)
    if file.suffix.lower() in images.SUFFIXES and not hidden:
      stem = inside.with_suffix('').as_posix()
      found.setdefault(stem, []).append(f'{folder}/{inside.as_posix()}')
  return found


def _read_pairs(root, file, problems):
  """The pairs of one of SegNet's lists, as they are called in `root`."""
  listed, pairs = {}, []
  for number, line in enumerate(_lines(file), 1):
    parts = line.split()
    if len(parts) != 2:
      raise ValueError(
        f'{file}:{number}: {line[:80]!r} is not the path of an image, a blank, '
        'and that of its mask.'
      )
    pair = []
    for part in parts:
      folder, name = pathlib.PurePosixPath(part).parts[-2:]
      if folder not in listed:
        listed[folder] = _by_stem(root / folder)
      stem = pathlib.PurePosixPath(name).stem
      if stem in listed[folder]:
        pair.append(f'{folder}/{listed[folder][stem]}')
      else:
        problems.append(
          f'{root / folder / name}: it is not there, but in line {number} of '
          f'{file.name}'
        )
    if len(pair) == 2:
      pairs.append(tuple(pair))
  return pairs


def _by_stem(folder):
  if not folder.is_dir():
    raise FileNotFoundError(
      f'{folder} is no folder; set data_dir to where the data lies.'
    )
  return {
    file.stem: file.name
    for file in sorted(folder.iterdir())
    if file.suffix.lower() in images.SUFFIXES
  }


def _lines(file):
  if not file.is_file():
    raise FileNotFoundError(
      f'{file} is no file; set data_dir to where the data lies.'
    )
  return files.read_lines(file)
