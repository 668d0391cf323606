"""Questions about images, with the answers that people gave.

A source of them is one as `sources` describes it, with examples `{'image':
uint8 [H, W, 3], 'question': str, 'answer': str}`, the answer being the most
frequent one of those that were given, and besides `questions`, a `Question` for
each example.
"""

import collections
import dataclasses
import json
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from experiments.data import images

_ANSWERS = 10  # of every question
_COCO = re.compile(r'(?:COCO_[a-z]+\d{4}_)?(\d{12})(?:_\d+)?\.jpg')
_MISSING = 'it is not there'
# How files end; what ends otherwise is decoded to be sure.
_ENDS = (b'\xff\xd9', b'IEND\xaeB`\x82')


class Question(NamedTuple):
  """One of a set.

  Attributes:
    number: that the set calls it by.
    image: its file, from the source's folder on.
    text: the question.
    answers: that people gave, ten of them.
    kind: of the answer, such as 'yes/no', 'number' or 'other'; '' if not known.
    group: of questions that are about the same; see `is_scored`.
    is_scored: False of an original, which is answered beside the questions that
      were made of it, and counts in no accuracy.
  """

  number: str
  image: str
  text: str
  answers: tuple[str, ...]
  kind: str = ''
  group: str = ''
  is_scored: bool = True

  @property
  def answer(self):
    """The most frequent one; of several the first."""
    return collections.Counter(self.answers).most_common(1)[0][0]

  @property
  def picture(self):
    """What is shown, also where it was edited: COCO's number, or the file."""
    match = _COCO.fullmatch(self.image.rpartition('/')[2])
    return match[1] if match else self.image


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
  """A source: questions about image files.

  Attributes:
    folder: that the images' names start from.
    questions: N of them.
    class_names: none; so the next one.
    labels: see there.
  """

  folder: pathlib.Path
  questions: tuple[Question, ...]
  class_names: tuple[str, ...] = ()
  labels: None = None

  def __len__(self):
    return len(self.questions)

  def __getitem__(self, index):
    question = self.questions[index]
    file = self.folder / question.image
    return {
      'image': images.decode(file.read_bytes(), file),
      'question': question.text,
      'answer': question.answer,
    }

  @property
  def names(self):
    return tuple(question.image for question in self.questions)

  @property
  def groups(self):
    """Questions of one group, else of one image."""
    keys = [question.group or question.picture for question in self.questions]
    return np.unique(keys, return_inverse=True)[1]

  @property
  def ids(self):
    """Resolved path of every image, and the question."""
    paths = images.resolve(self.folder, self.names)
    return [
      f'{path}: {question.text}'
      for path, question in zip(paths, self.questions, strict=True)
    ]


def check_images(folder, names):
  """Refuses images that are missing, empty or cut short, naming all of them.

  Raises:
    OSError: one for all.
  """
  names = sorted(set(names))
  problems = []
  for name in names:
    if problem := _problem(folder / name):
      problems.append(f'{folder / name}: {problem}')
  if problems:
    kind = OSError
    if all(problem.endswith(_MISSING) for problem in problems):
      kind = FileNotFoundError
    raise kind(
      f'{folder}: {len(problems)} of {len(names)} images cannot be used; set '
      'data_dir and root to where they lie, or fetch these again:\n  '
      + '\n  '.join(problems)
    )


def _problem(file):
  try:
    with file.open('rb') as opened:
      size = opened.seek(0, 2)
      opened.seek(max(size - 8, 0))
      if opened.read().endswith(_ENDS):
        return None
    images.decode(file.read_bytes(), file)
  except FileNotFoundError:
    return _MISSING
  except (OSError, ValueError) as error:
    return str(error).removeprefix(f'{file} ').rstrip('.')
  return None


def read(questions, annotations, keys=('question_id',)):
  """Pairs of a question and its annotation, with ten strings for `answers`.

  Args:
    questions: the file; a list, or one under the key `questions`.
    annotations: the file; the same, under `annotations`.
    keys: that tell the questions of the set apart.
  """
  asked = entries(questions, load(questions), 'questions')
  answered = entries(annotations, load(annotations), 'annotations')
  asked = unique(questions, asked, keys)
  answered = unique(annotations, answered, keys)
  for file, other, lost in (
    (annotations, questions, answered.keys() - asked.keys()),
    (questions, annotations, asked.keys() - answered.keys()),
  ):
    if lost:
      raise ValueError(
        f'{file}: {len(lost)} of its entries have none in {other.name}, such '
        f'as {_named(keys, min(lost, key=str))}; are both of one release?'
      )
  pairs = []
  for key, question in asked.items():
    given = [a['answer'] for a in answered[key]['answers']]
    answers = ten(annotations, question['question_id'], given)
    pairs.append((question, {**answered[key], 'answers': answers}))
  return pairs


def load(file) -> Any:
  if not file.is_file():
    raise FileNotFoundError(
      f'{file} is no file; set data_dir and path to where the set lies.'
    )
  try:
    return json.loads(file.read_bytes())
  except ValueError as error:
    raise ValueError(
      f'{file} is cut short or damaged ({error}): fetch it again.'
    ) from error


def entries(file, loaded, key=None):
  """The entries of a file, which are all there is, or lie under a key."""
  if isinstance(loaded, dict):
    loaded = loaded.get(key)
  if not isinstance(loaded, list):
    raise ValueError(
      f'{file} is no list of {key or "entries"}; is it the file that its '
      'authors published?'
    )
  return loaded


def unique(file, rows, keys):
  """Rows by their keys, in order."""
  found = {}
  for number, row in enumerate(rows):
    if missing := [name for name in keys if name not in row]:
      raise ValueError(f'{file}: entry {number} has no {missing[0]}: {row}.')
    key = tuple(row[name] for name in keys)
    if key in found:
      raise ValueError(
        f'{file}: {_named(keys, key)} is there twice; take one out.'
      )
    found[key] = row
  return found


def _named(keys, key):
  pairs = zip(keys, key, strict=True)
  return ', '.join(f'{name} {value}' for name, value in pairs)


def ten(file, number, answers):
  if len(answers) != _ANSWERS:
    raise ValueError(
      f'{file}: question {number} has {len(answers)} answers, not {_ANSWERS}; '
      'mend it, or take it out.'
    )
  return tuple(answers)
