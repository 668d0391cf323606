"""Images in class folders, and images that a list file names."""

import os
import pathlib

import numpy as np

from experiments.data import images

_LISTS = pathlib.Path(__file__).parent / 'classes'
_SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.png', '.webp')


def open_folder(data_dir, path, classes=None):
  """Opens a folder that has a folder of images for each class.

  Folders are named after their classes. Where all of the names are numbers, as
  in ImageNet-V2, they are those of the classes; sorted as text, '10' would come
  before '2'.

  Args:
    data_dir: where `path` and `classes` start from.
    path: of the folder.
    classes: names of the classes in the order of labels, as `read_classes`
      takes them; not all of them need a folder. If None, the sorted names of
      the folders, or all numbers up to the largest one.

  Returns:
    An `images.ImageFiles`, in the order of labels and file names.

  Raises:
    FileNotFoundError: no such folder or list, or no image in it.
    ValueError: a folder is not one of the classes.
  """
  root = pathlib.Path(data_dir, path)
  if not root.is_dir():
    raise FileNotFoundError(
      f'{root} is no folder; it should have a folder of images for each class. '
      'Set data_dir to where the data lies.'
    )
  folders = sorted(p.name for p in root.iterdir() if p.is_dir())
  if not folders:
    raise FileNotFoundError(
      f'{root} has no folders, one for each class, in it.'
    )
  numbered = all(name.isdecimal() for name in folders)
  if classes:
    class_names = read_classes(classes, data_dir)
  elif numbered:
    class_names = tuple(map(str, range(max(map(int, folders)) + 1)))
  else:
    class_names = tuple(folders)
  if numbered:
    label_of = {name: int(name) for name in folders}
  else:
    label_of = {name: label for label, name in enumerate(class_names)}
  for folder in folders:
    if label_of.get(folder, len(class_names)) >= len(class_names):
      raise ValueError(
        f'{root / folder} is none of the {len(class_names)} classes of '
        f'{classes!r}.'
      )

  names, labels = [], []
  for folder in sorted(folders, key=label_of.get):
    files = [
      f'{folder}/{file}'
      for file in sorted(os.listdir(root / folder))
      if file.lower().endswith(_SUFFIXES)
    ]
    names += files
    labels += [label_of[folder]] * len(files)
  if not names:
    raise FileNotFoundError(
      f'{root} has {len(folders)} folders and no image in them; images end in '
      f'{", ".join(_SUFFIXES)}.'
    )
  return images.ImageFiles(
    root, tuple(names), np.array(labels, np.int32), class_names
  )


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
    ValueError: a line has no label, or the class names cannot be told.
  """
  file = pathlib.Path(data_dir, path)
  root = file.parent if root is None else pathlib.Path(data_dir, root)
  names, labels = [], []
  for number, line in enumerate(_read_lines(file), start=1):
    name, _, label = line.rpartition(' ')
    if not (name and label.isdecimal()):
      raise ValueError(
        f"{file}, line {number}: {line!r} is not 'path label', with a label "
        'from 0 on.'
      )
    names.append(name)
    labels.append(int(label))
  if missing := [name for name in names if not (root / name).is_file()]:
    raise FileNotFoundError(
      f'{root / missing[0]} is missing, {len(missing)} of the {len(names)} '
      f'images in {file}; unpack them there, or set root.'
    )
  if classes:
    class_names = read_classes(classes, data_dir)
  else:
    class_names = _folder_names(file, names, labels)
  if max(labels) >= len(class_names):
    raise ValueError(
      f'{file} has a label {max(labels)}, {classes!r} {len(class_names)} names.'
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
  github.com/hendrycks/imagenet-r.

  Args:
    classes: the name of such a list, or the path of a text file of one name a
      line.
    data_dir: where that path starts from.

  Returns:
    A tuple of names.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is empty, or has a name twice.
  """
  file = _LISTS / f'{classes}.txt'
  if not file.is_file():
    file = pathlib.Path(data_dir, classes)
  class_names = tuple(_read_lines(file))
  if len(set(class_names)) < len(class_names):
    raise ValueError(f'{file} has a name twice.')
  return class_names


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
  lines = file.read_text().splitlines()
  if not lines:
    raise ValueError(f'{file} is empty.')
  return lines
