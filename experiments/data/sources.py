"""Sources of labelled images, or texts: random access to what lies on disk.

A source has a length; `source[i]` is `{'image': uint8 [H, W, 3 or 1], 'label':
int32}`, or a `text.Example`; `class_names` is a tuple; `labels` [N] int32 and
`names`, of the files, are None where they cannot be known without reading
everything; `ids` is a list of strings, made when it is asked for, that tell
which example of what lies on disk each one is, by whatever path and however it
is changed; `groups` [N] are numbers, the same of examples that are no
independent draws, such as cells of one module, or None. It can be pickled, and
no image is read until it is asked for. Sources of `masks` have a mask in the
place of the label, and `sizes`; those of `vqa` and `easy_vqa` a question and
its answer, and `questions`.
"""

import functools
import inspect

import numpy as np
from PIL import Image

from experiments.data import (
  corruptions,
  easy_vqa,
  elpv,
  folders,
  images,
  masks,
  text,
  tfds,
  vader,
  vqa,
)

_TEXTS = ('questions', 'vader')


def open_source(spec, data_dir):
  """Opens what a config describes.

  Args:
    spec: a mapping. `kind` is one of
        'tfds': `tfds.open_tfds`, with name and split,
        'folder': `folders.open_folder`, with path and classes,
        'list': `folders.open_list`, with path, root and classes,
        'elpv': `elpv.open_elpv`, with split,
        'masks': `masks.open_masks`, with path, masks, classes and void,
        'camvid': `masks.open_camvid`, with path, split and sequences,
        'pascal_context': `masks.open_pascal_context`, with path, split and
          classes,
        'questions': `text.open_questions`, with path and without,
        'vader': `vader.open_vader`, with name and margin,
        'vqa': `vqa.open_vqa`, with name, path, root and split,
        'easy_vqa': `easy_vqa.open_easy_vqa`, with split and inverted,
        'joined': `open_joined`, with of;
      and of any kind, in this order,
        resize: of images, pixels a side that every one is brought to,
        corruption: of images, `{'name', 'severity'}`, of
          `corruptions.Corruption`; its seed is the image's position among all
          of them,
        part: `{'shares', 'take', 'seed'}`, as `part` takes them,
        limit: at most so many examples, drawn with seed 0.
    data_dir: the folder that relative paths start from; here and in them `~`
      is the user's home.

  Returns:
    The source.

  Raises:
    ValueError: a key is unknown, missing or has a wrong value.
    OSError, ModuleNotFoundError: as the function of the kind does.
  """
  own = dict(spec)
  kind = own.pop('kind', None)
  if kind not in _KINDS:
    raise ValueError(
      f'A source is of the kind {", ".join(_KINDS)}, not {kind!r}: {spec}.'
    )
  size, corruption, held_out, limit = (
    own.pop(key, None) for key in ('resize', 'corruption', 'part', 'limit')
  )
  if kind in _TEXTS and (size, corruption) != (None, None):
    raise ValueError(f'resize and corruption are of images, not of {spec}.')
  source = _call(_KINDS[kind], spec, data_dir, **own)
  if size is not None:
    source = Mapped(source, functools.partial(_resize, size=size))
  if corruption is not None:
    source = Mapped(source, _call(corruptions.Corruption, spec, **corruption))
  if held_out is not None:
    source = _call(part, spec, source, **held_out)
  if limit is not None:
    if limit < 1:
      raise ValueError(f'limit is {limit}; it must be at least 1: {spec}.')
    rows = _shuffled(np.arange(len(source)), 0)[:limit]
    source = Rows(source, np.sort(rows))
  return source


def open_joined(data_dir, of):
  """Several sources of labelled images as one, the first one's examples first.

  Args:
    data_dir: as `open_source` takes it.
    of: `{name: source}`, described as `open_source` takes them; the names are
      for the reader.

  Returns:
    A `Joined`.

  Raises:
    ValueError: there is none, they are no labelled images, or their classes are
      not the same.
    OSError, ModuleNotFoundError: as `open_source`.
  """
  opened = {name: open_source(spec, data_dir) for name, spec in of.items()}
  if not opened:
    raise ValueError('joined: of is empty; name the sources, {name: source}.')
  (first, source), *_ = opened.items()
  for name, other in opened.items():
    if other.labels is None or other.names is None:
      raise ValueError(
        f'joined: {name} is no set of labelled images: {of[name]}; join those '
        'of folders, lists or ELPV.'
      )
    if other.class_names != source.class_names:
      raise ValueError(
        f'joined: the classes of {name} are {", ".join(other.class_names)}, '
        f'those of {first} {", ".join(source.class_names)}; set `classes` of '
        'both to one list of all names.'
      )
  return Joined(tuple(opened.values()))


def part(source, shares, take, seed=0):
  """One of several parts that hold every example once.

  Each class is shuffled and cut on its own; so is the whole where the labels
  are not known. Where the source has groups, they are what is shuffled, and a
  group is in one part only. A part depends on nothing else than the arguments.

  Args:
    source: the whole.
    shares: of the parts, which sum to 1.
    take: the number of the part, from 0.
    seed: of the shuffle.

  Returns:
    A source.

  Raises:
    ValueError: the shares do not sum to 1, or there is no such part.
  """
  if abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
    raise ValueError(f'part: shares are {shares}; they must sum to 1.')
  if take not in range(len(shares)):
    raise ValueError(
      f'part: take is {take}; the parts are 0 to {len(shares) - 1}.'
    )
  stops = np.cumsum([0, *shares])[take : take + 2]
  if (groups := source.groups) is not None:
    return Rows(source, _rows_of_groups(groups, stops, seed))
  labels = np.zeros(len(source)) if source.labels is None else source.labels
  rows = []
  for label in np.unique(labels):
    own = _shuffled(np.flatnonzero(labels == label), [seed, int(label)])
    start, stop = np.round(stops * len(own)).astype(int)
    rows.append(own[start:stop])
  return Rows(source, np.sort(np.concatenate(rows)))


def _rows_of_groups(groups, stops, seed):
  """The rows of the groups that begin in a stretch of all, in random order."""
  numbers, sizes = np.unique(groups, return_counts=True)
  order = _shuffled(np.arange(len(numbers)), seed)
  begins = np.cumsum(sizes[order]) - sizes[order]
  start, stop = np.round(stops * len(groups))
  own = numbers[order[(start <= begins) & (begins < stop)]]
  return np.flatnonzero(np.isin(groups, own))


def _join_groups(parts):
  """Groups of sources one after the other; an example without is one alone."""
  if all(part.groups is None for part in parts):
    return None
  joined = np.zeros(0, int)
  for part in parts:
    own = np.arange(len(part)) if part.groups is None else part.groups
    joined = np.concatenate([joined, own + joined.max(initial=-1) + 1])
  return joined


class Joined:
  """A source: others of the same classes, one after the other."""

  def __init__(self, parts):
    self.class_names = parts[0].class_names
    self.labels = np.concatenate([part.labels for part in parts])
    self.names = tuple(name for part in parts for name in part.names)
    self.groups = _join_groups(parts)
    self._parts, self._stops = parts, np.cumsum([len(part) for part in parts])

  @property
  def ids(self):
    return [one for part in self._parts for one in part.ids]

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    number = int(np.searchsorted(self._stops, index, side='right'))
    part = self._parts[number]
    return part[index - int(self._stops[number]) + len(part)]


class Arrays:
  """A source of what lies in memory: `{name: [N, ...]}`."""

  def __init__(self, columns):
    self.columns = columns

  def __len__(self):
    return len(next(iter(self.columns.values())))

  def __getitem__(self, index):
    return {name: column[index] for name, column in self.columns.items()}


class Rows:
  """A source: some rows of another one."""

  def __init__(self, source, rows):
    self.class_names = source.class_names
    self.labels = None if source.labels is None else source.labels[rows]
    groups = source.groups
    self.groups = None if groups is None else groups[rows]
    self.names = source.names and tuple(source.names[row] for row in rows)
    if hasattr(source, 'sizes'):
      self.sizes = source.sizes[rows]
    if hasattr(source, 'questions'):
      self.questions = tuple(source.questions[row] for row in rows)
    self._source, self._rows = source, rows

  @property
  def ids(self):
    ids = self._source.ids
    return [ids[row] for row in self._rows]

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index):
    return self._source[self._rows[index]]


class Mapped:
  """A source: another one with a function of image and index applied."""

  def __init__(self, source, function):
    self.class_names = source.class_names
    self.labels, self.names = source.labels, source.names
    self.groups = source.groups
    for name in ('sizes', 'questions'):
      if hasattr(source, name):
        setattr(self, name, getattr(source, name))
    self._source, self._function = source, function

  @property
  def ids(self):
    return self._source.ids

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    example = self._source[index]
    return {**example, 'image': self._function(example['image'], index)}


def _shuffled(rows, seed):
  # RandomState's stream is frozen, unlike Generator's: a part stays a part.
  return np.random.RandomState(seed).permutation(rows)


def _resize(image, index, size):
  """To size x size pixels, by antialiased bicubic."""
  del index
  image = images.to_pillow(image)
  return images.from_pillow(
    image.resize((size, size), Image.Resampling.BICUBIC)
  )


def _call(function, spec, *args, **keys):
  """Calls a function with keys out of a spec, which it may not take."""
  try:
    inspect.signature(function).bind(*args, **keys)
  except TypeError as error:
    raise ValueError(f'{error}, in the source {spec}.') from error
  return function(*args, **keys)


_KINDS = {
  'tfds': tfds.open_tfds,
  'folder': folders.open_folder,
  'list': folders.open_list,
  'elpv': elpv.open_elpv,
  'masks': masks.open_masks,
  'camvid': masks.open_camvid,
  'pascal_context': masks.open_pascal_context,
  'questions': text.open_questions,
  'vader': vader.open_vader,
  'vqa': vqa.open_vqa,
  'easy_vqa': easy_vqa.open_easy_vqa,
  'joined': open_joined,
}
