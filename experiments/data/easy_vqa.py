"""easy-VQA: questions about one coloured shape in a small image.

4,000 + 1,000 images of 64 x 64 pixels with 38,575 + 9,673 questions of 13
answers, out of the package `easy-vqa` (MIT). A shift in two stages: a model
learns all of it on a half of the images, with disturbed ones among them, and is
then tuned on a narrow part of the other half.

References:
  https://github.com/vzhou842/easy-VQA
"""

import dataclasses
import re

import numpy as np

from experiments import packages
from experiments.data import questions

_REQUIREMENT = 'easy-vqa==1.0'
_ANSWERS = 10  # as often as its answer counts, as if ten people agreed
COLORS = ('black', 'blue', 'brown', 'gray', 'green', 'red', 'teal', 'yellow')
SHAPES = ('circle', 'rectangle', 'triangle')
# What the narrow part shows, and asks: a form for each kind of answer.
_NARROW_COLORS, _NARROW_SHAPES = COLORS[:6], SHAPES[:2]
_NARROW_FORMS = (
  re.compile(r'what color is the shape\?'),
  re.compile(r'what shape is in the image\?'),
  re.compile(r'is there a \w+( shape)?\?'),
)
SPLITS = ('broad', 'broad_val', 'train', 'val', 'test', 'pairs', 'forms')


def find():
  """The folder of the installed package's files.

  Raises:
    ModuleNotFoundError: the package is not installed.
  """
  return packages.package_file('easy_vqa', 'data', _REQUIREMENT)


def open_easy_vqa(data_dir, split, inverted=False):
  """Opens a split of the installed package's questions.

  Each image has a colour and a shape, which its questions tell; the eighth of
  the images whose questions do not are left out. Narrow are six of the eight
  colours with two of the three shapes, and three forms of questions.

  Args:
    data_dir: of the other kinds of sources.
    split: of the training images
      'broad', 'broad_val': the even ones, all questions, each about its image
        as it is, flipped, with noise, or inverted;
      'train', 'val': the odd ones, narrow; every fifth image validates;
      of the test images
      'test': narrow pairs and forms, the ID test;
      'pairs': pairs that are not narrow, narrow forms;
      'forms': narrow pairs, forms that are not.
    inverted: whether dark is bright in every image; only shapes are asked for.

  Returns:
    A source of `questions`; the answer of each is there ten times.

  Raises:
    ValueError: no such split.
    ModuleNotFoundError: the package is not installed.
  """
  del data_dir
  if split not in SPLITS:
    raise ValueError(
      f'easy_vqa has no split {split!r}; it has {", ".join(SPLITS)}.'
    )
  folder = find()
  is_train = split in ('broad', 'broad_val', 'train', 'val')
  part = 'train' if is_train else 'test'
  rows = questions.load(folder / part / 'questions.json')
  shown = _shown(rows)
  rows = [
    row
    for row in rows
    if row[2] in shown and _is_in(split, row, *shown[row[2]])
  ]
  views = np.full(len(rows), _INVERTED if inverted else 0)
  if split.startswith('broad'):
    # Not a Generator, whose stream is not frozen.
    views = np.random.RandomState(0).randint(0, len(_VIEWS), len(rows))
  kept = [
    i
    for i, row in enumerate(rows)
    if views[i] != _INVERTED or kind(row[1]) == 'shape'
  ]
  found = [_question(part, i, *rows[i]) for i in kept]
  return Viewed(folder, tuple(found), views=views[kept])


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Viewed(questions.Questions):
  """Questions, each about a view of its image.

  Attributes:
    views: [N] int, of `_VIEWS`.
  """

  views: np.ndarray

  def __getitem__(self, index):
    example = super().__getitem__(index)
    view = _VIEWS[self.views[index]]
    return {**example, 'image': view(example['image'], index)}


def kind(answer):
  """Of an answer: 'color', 'shape' or 'yes/no'."""
  if answer in COLORS:
    return 'color'
  return 'shape' if answer in SHAPES else 'yes/no'


def _question(part, number, text, answer, image):
  return questions.Question(
    f'{part} {number}',
    f'{part}/images/{image}.png',
    text,
    (answer,) * _ANSWERS,
    kind(answer),
  )


def _is_in(split, row, color, shape):
  text, _, image = row
  if split.startswith('broad'):
    held_out = image % 20 == 0
    return image % 2 == 0 and held_out == (split == 'broad_val')
  narrow_pair = color in _NARROW_COLORS and shape in _NARROW_SHAPES
  narrow_form = any(form.fullmatch(text) for form in _NARROW_FORMS)
  if split in ('train', 'val'):
    held_out = image % 10 == 1
    if image % 2 == 0 or held_out != (split == 'val'):
      return False
  return (narrow_pair, narrow_form) == (split != 'pairs', split != 'forms')


def _shown(rows):
  """`{image: (colour, shape)}`, of the images whose questions tell both."""
  found = {}
  for text, answer, image in rows:
    words = re.findall(r'\w+', text)
    # A yes to what is not there tells nothing; a question with what does.
    if kind(answer) == 'yes/no':
      is_there = (answer == 'yes') != bool({'no', 'not'}.intersection(words))
      words = words if is_there else []
    found.setdefault(image, set()).update([answer, *words])
  pairs = {
    image: [[w for w in words if w in told] for words in (COLORS, SHAPES)]
    for image, told in found.items()
  }
  return {
    image: (colors[0], shapes[0])
    for image, (colors, shapes) in pairs.items()
    if colors and shapes
  }


def _clean(image, index):
  del index
  return image


def _flipped(image, index):
  del index
  return image[:, ::-1]


def _noisy(image, index):
  noise = np.random.RandomState(index).normal(0, 25, image.shape)
  return np.clip(image + noise, 0, 255).astype(np.uint8)


def _inverted(image, index):
  del index
  return 255 - image


# Of an image and its index.
_VIEWS = (_clean, _flipped, _noisy, _inverted)
_INVERTED = _VIEWS.index(_inverted)
