"""Images in class folders, and images that a list file names."""

import collections
import functools
import os
import pathlib

import numpy as np
from absl import logging

from experiments import files
from experiments.data import images

_LISTS = pathlib.Path(__file__).parent / 'classes'
# What may lie beside images without a word: text, and what file managers leave.
_NOTES = (
  *('.csv', '.db', '.html', '.ini', '.json', '.log', '.md', '.toml', '.txt'),
  *('.xml', '.yaml', '.yml'),
)
_SPLITS = {'train', 'training', 'val', 'valid', 'validation', 'test', 'testing'}


def open_folder(data_dir, path, classes=None):
  """Opens a folder that has a folder of images for each class.

  The images of a class lie in its folder or deeper; links are followed. What
  begins with a dot is no content. A warning counts and names the other files
  that are not read, but for text and what file managers leave, and the class
  folders that have no image.

  Folders are named after their classes. If their names are the numbers 0 to
  C - 1, as in ImageNet-V2, those are the labels, where sorted as text '10'
  would come before '2'. Any other numbers (years, 1 to C, some of 0 to C - 1)
  are names like others. With `classes`, whose order alone gives the labels,
  folders may also be numbered by label, some of 0 to C - 1, with leading zeros
  or without, if `classes` has none of these numbers for a name.

  Args:
    data_dir: where `path` and `classes` start from.
    path: of the folder.
    classes: names of the classes in the order of labels, as `read_classes`
      takes them; not all of them need a folder. If None, the names of the
      folders, sorted by code points unless they are 0 to C - 1.

  Returns:
    An `images.ImageFiles`, in the order of labels and file names.

  Raises:
    FileNotFoundError: no such folder or list, or no image in it.
    ValueError: a folder is not one of the classes, or all of them are splits.
  """
  root = files.expand(path, data_dir)
  if not root.is_dir():
    raise FileNotFoundError(
      f'{root} is no folder; it should have a folder of images for each class. '
      'Set data_dir to where the data lies.'
    )
  folders, others = [], []
  for entry in sorted(os.listdir(root)):
    if not entry.startswith('.'):
      (folders if (root / entry).is_dir() else others).append(entry)
  if not folders:
    raise FileNotFoundError(
      f'{root} has no folders, one for each class, in it.'
    )
  if not classes and _SPLITS.issuperset(map(str.lower, folders)):
    raise ValueError(
      f'{root} has the folders {", ".join(folders)}, which are splits; set '
      'path to one of them, or classes if they are classes.'
    )
  if classes:
    class_names = read_classes(classes, data_dir)
  else:
    class_names = tuple(map(str, range(len(folders))))
    if set(class_names) != set(folders):
      class_names = tuple(folders)
  label_of = _labels(root, folders, class_names, classes)

  names, labels, empty = [], [], []
  for folder in sorted(folders, key=label_of.get):
    found, left = _walk(root, folder)
    names += found
    labels += [label_of[folder]] * len(found)
    others += left
    if not found:
      empty.append(folder)
  if not names:
    raise FileNotFoundError(
      f'{root} has {len(folders)} folders and no image in them; images end in '
      f'{", ".join(images.SUFFIXES)}.'
    )
  _warn(root, others, empty)
  return images.ImageFiles(
    root, tuple(names), np.array(labels, np.int32), class_names
  )


def _labels(root, folders, class_names, classes):
  """The label of each class folder, `{folder: label}`."""
  C = len(class_names)
  label_of = {name: label for label, name in enumerate(class_names)}
  are_numbers = all(name.isascii() and name.isdecimal() for name in folders)
  if are_numbers and label_of.keys().isdisjoint(folders):
    label_of = {name: int(name) for name in folders}
    if len(set(label_of.values())) < len(folders):
      raise ValueError(
        f'{root} has two folders of one number, such as 1 and 01: '
        f'{", ".join(folders[:5])}; rename them to the names in {classes!r}.'
      )
  if unknown := [name for name in folders if label_of.get(name, C) >= C]:
    raise ValueError(
      f'{root / unknown[0]} is none of the {C} classes of {classes!r}; all '
      'folders have names out of it, or, where it has none of their names, '
      f'numbers from 0 to {C - 1}.'
    )
  return label_of


def _walk(root, folder):
  """Names of the images in a class folder or deeper, and of what is left.

  A folder that links to one around it, or to one that was read, is left.
  """
  found, others, ahead = [], [], [folder]
  around = pathlib.Path(os.path.realpath(root))
  seen = set(map(str, (around, *around.parents)))
  while ahead:
    name = ahead.pop()
    real = os.path.realpath(root / name)
    if real in seen:
      others.append(name)
      continue
    seen.add(real)
    with os.scandir(root / name) as entries:
      entries = sorted(entries, key=lambda entry: entry.name, reverse=True)
    for entry in entries:
      path = f'{name}/{entry.name}'
      if entry.name.startswith('.'):
        continue
      # What is no link is told without a look at it: there may be millions.
      is_link = entry.is_symlink()
      if os.path.isdir(entry) if is_link else entry.is_dir():
        ahead.append(path)
      elif entry.name.lower().endswith(images.SUFFIXES) and (
        os.path.isfile(entry) if is_link else entry.is_file()
      ):
        found.append(path)
      else:
        others.append(path)
  return sorted(found), others


def _warn(root, others, empty):
  """Says in a line which files are not read, and which classes have none."""
  kinds = collections.defaultdict(list)
  for name in sorted(others):
    suffix = pathlib.PurePath(name).suffix.lower()
    if suffix not in _NOTES:
      kinds[suffix].append(name)
  parts = []
  if kinds:
    named = [f'{len(own)} like {own[0]}' for own in kinds.values()]
    parts.append(
      f'{sum(map(len, kinds.values()))} files are not read ({_few(named)}): an '
      'image lies in the folder of a class and ends in '
      f'{", ".join(images.SUFFIXES)}'
    )
  if empty:
    parts.append(f'{len(empty)} class folders have no image, {_few(empty)}')
  if parts:
    _warn_once(f'{root}: {"; ".join(parts)}.')


def _few(words):
  return ', '.join(words[:5]) + ', ...' * (len(words) > 5)


@functools.cache
def _warn_once(line):
  """Training and validation set are parts of one folder, opened for each."""
  logging.warning('%s', line)


def open_list(data_dir, path, root=None, classes=None):
  """Opens a list of images: lines of 'path label', as DomainNet has them.

  Args:
    data_dir: where the other paths start from.
    path: of the list file.
    root: the folder that the listed paths start from; the list's own if None.
    classes: names of the classes in the order of labels, as `read_classes`
      takes them. If None, the names of the folders that the images lie in, one
      for each label.

  Returns:
    An `images.ImageFiles`, in the list's order.

  Raises:
    FileNotFoundError: no such list, or a listed image is missing.
    ValueError: a line has no label, or the class names cannot be told; or as
      `files.read_lines`.
  """
  file = files.expand(path, data_dir)
  root = file.parent if root is None else files.expand(root, data_dir)
  names, labels = [], []
  for number, line in enumerate(_read_lines(file), start=1):
    name, *label = line.rsplit(maxsplit=1)
    if not (label and label[0].isascii() and label[0].isdecimal()):
      raise ValueError(
        f"{file}:{number}: {line!r} is not 'path label', with a label from 0 "
        'on; leave out images without one.'
      )
    names.append(name)
    labels.append(int(label[0]))
  if missing := [
    name for name in names if not os.path.isfile(os.path.join(root, name))
  ]:
    raise FileNotFoundError(
      f'{root / missing[0]} is missing, {len(missing)} of the {len(names)} '
      f'images in {file}; unpack them there, or set root.'
    )
  if classes:
    class_names = read_classes(classes, data_dir)
  else:
    class_names = _folder_names(file, names, labels)
  if (label := max(labels)) >= len(class_names):
    raise ValueError(
      f'{file}:{labels.index(label) + 1}: label {label}, {classes!r} '
      f'{len(class_names)} names; labels are numbers from 0 on.'
    )
  return images.ImageFiles(
    root, tuple(names), np.array(labels, np.int32), class_names
  )


def read_classes(classes, data_dir='.'):
  """Reads a list of class names, whose order numbers the classes.

  The lists that come with this project: 'imagenet', the WordNet ids of its
  1,000 classes, sorted; 'imagenet_a' and 'imagenet_r', those of the 200 that
  ImageNet-A and -R have; 'domainnet', 345 names in the official order, which is
  not quite alphabetical. They are those of tensorflow-datasets and, for A and
  R, of the evaluation scripts of github.com/hendrycks/natural-adv-examples and
  github.com/hendrycks/imagenet-r. Of masks, in the order of their ids:
  'camvid', 11 classes as SegNet numbers them; 'pascal_voc', 20 and the
  background; 'pascal_context', 59 and the background.

  Args:
    classes: the name of such a list, or the path of a text file of one name a
      line.
    data_dir: where that path starts from.

  Returns:
    A tuple of names.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it has a name twice, or as `files.read_lines`.
  """
  file = _LISTS / f'{classes}.txt'
  if not file.is_file():
    file = files.expand(classes, data_dir)
  lines = {}
  for number, name in enumerate(_read_lines(file), 1):
    if (first := lines.setdefault(name, number)) < number:
      raise ValueError(
        f'{file} has a name twice: {name!r}, in lines {first} and {number}.'
      )
  return tuple(lines)


def class_mask(classes):
  """Which of ImageNet's 1,000 classes a set has.

  Args:
    classes: 'imagenet_a' or 'imagenet_r', as `read_classes` takes them.

  Returns:
    bool [1000].

  Raises:
    ValueError: a name is not one of ImageNet's.
  """
  names, own = read_classes('imagenet'), read_classes(classes)
  if unknown := set(own) - set(names):
    raise ValueError(f'{classes!r}: {min(unknown)!r} is no class of ImageNet.')
  return np.isin(names, own)


def _folder_names(file, names, labels):
  """Names of the classes, out of the paths of their images."""
  folders = [pathlib.PurePath(name).parent.name for name in names]
  pairs = sorted(set(zip(labels, folders, strict=True)))
  numbers, class_names = zip(*pairs, strict=True)
  if numbers != tuple(range(len(numbers))):
    raise ValueError(
      f'{file}: the images of labels 0 to {max(labels)} do not lie in one '
      'folder a label, to name the classes; name them in `classes`.'
    )
  return class_names


def _read_lines(file):
  if not file.is_file():
    raise FileNotFoundError(
      f'{file} is no file; set data_dir to where the data lies.'
    )
  return files.read_lines(file)
