"""Questions with options, as text: the files of LLM-Adapters' benchmark.

A file is a JSON list of {"instruction", "input", "output", "answer"}. The
instruction ends with its options and their names,

  ... question\n\nAnswer1: text Answer2: text\n\nAnswer format: answer1/answer2

and the answer is one of the names. Commonsense-170K's training set and its
eight test sets are such files.

References:
  Hu et al., "LLM-Adapters: An Adapter Family for Parameter-Efficient
  Fine-Tuning of Large Language Models", 2023;
  https://github.com/AGI-Edgerunners/LLM-Adapters
"""

import dataclasses
import hashlib
import json
import re
from typing import NamedTuple

import numpy as np

from experiments import files

_KEYS = ('instruction', 'input', 'output', 'answer')
_NAMES = re.compile(r'\s*Answer format:\s*(\S+)\s*$')
_PREAMBLE = re.compile(r'Please (choose|answer) .*?\b(question|sentence): ')


class Example(NamedTuple):
  """A question.

  Attributes:
    instruction: what is asked, with the list of the options.
    question: the same without the list, and without 'Please choose ...: '.
    context: what belongs to it, mostly ''.
    names: of its K options, such as 'answer1'.
    options: their texts; where the question lists none, they are the names.
    output: the whole right answer, such as 'the correct answer is answer1'.
    answer: the number of the right option, from 0.
  """

  instruction: str
  question: str
  context: str
  names: tuple[str, ...]
  options: tuple[str, ...]
  output: str
  answer: int

  def response(self, option):
    """`output` as it would be if option `option` was right."""
    right = self.names[self.answer]
    return self.output.replace(right, self.names[option])


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
  """A source of `Example`s; see `data.sources`.

  Attributes:
    examples: N of them.
    ids: N strings.
    groups: see `sources`.
    class_names: of the options, where all examples have the same ones.
  """

  examples: list[Example]
  ids: list[str]
  groups: np.ndarray
  class_names: tuple[str, ...] = ()
  names: None = None

  @property
  def labels(self):
    """The right options, [N] int32."""
    return np.array([e.answer for e in self.examples], np.int32)

  def __len__(self):
    return len(self.examples)

  def __getitem__(self, index):
    return self.examples[index]


def open_questions(data_dir, path, without=()):
  """Reads questions of one file or more.

  Args:
    data_dir: the folder that relative paths start from.
    path: of a file, or a tuple of paths, whose questions follow one another.
    without: the same: files whose questions are left out, such as those that a
      test set shares with the training set. A question is its instruction.

  Returns:
    An `Examples`. Equal questions have one id and one group.

  Raises:
    OSError: a file cannot be read.
    ValueError: it is no such file, or an answer is none of the options; it
      names the line.
  """
  examples = _read_all(path, data_dir)
  left_out = {example.instruction for example in _read_all(without, data_dir)}
  examples = [e for e in examples if e.instruction not in left_out]
  ids = [
    hashlib.sha256(e.instruction.encode()).hexdigest()[:16] for e in examples
  ]
  return Examples(examples, ids, np.unique(ids, return_inverse=True)[1])


def _read_all(paths, data_dir):
  paths = (paths,) if isinstance(paths, str) else paths
  return [e for path in paths for e in _read(files.expand(path, data_dir))]


def _read(file):
  try:
    text = file.read_text('utf-8-sig')
  except UnicodeDecodeError as error:
    raise ValueError(f'{file} is not UTF-8: {error.reason}.') from error
  except OSError as error:
    raise type(error)(
      f'{file} cannot be read: {error.strerror}; it is a file of LLM-Adapters, '
      'https://github.com/AGI-Edgerunners/LLM-Adapters, under config.data_dir.'
    ) from error
  return [
    _example(f'{file}:{text.count(chr(10), 0, start) + 1}', record)
    for start, record in _records(file, text)
  ]


def _records(file, text):
  """The members of a JSON list, and where in the text each begins."""
  decoder = json.JSONDecoder()
  blank = re.compile(r'\s*')

  def skip(start):
    return blank.match(text, start).end()

  def refuse(what, at):
    line = text.count('\n', 0, at) + 1
    raise ValueError(
      f'{file}:{line}: {what}; the file is a JSON list of objects with '
      f'{", ".join(_KEYS)}. Copy it anew.'
    )

  place = skip(0)
  if text[place : place + 1] != '[':
    refuse('no list begins here', place)
  place, found = skip(place + 1), []
  while True:
    try:
      record, end = decoder.raw_decode(text, place)
    except json.JSONDecodeError as error:
      refuse(error.msg, error.pos)
    found.append((place, record))
    place = skip(end)
    mark = text[place : place + 1]
    if mark == ']':
      return found
    if mark != ',':
      refuse('a comma or the end of the list is missing', place)
    place = skip(place + 1)


def _example(where, record):
  """An `Example` of what a file has.

  Args:
    where: file and line.
    record: a dict of strings.
  """
  if not isinstance(record, dict):
    raise ValueError(f'{where}: {record!r:.60} is no object.')
  for key in _KEYS:
    if not isinstance(record.get(key), str):
      raise ValueError(
        f'{where}: the object that begins here has no string {key!r}; it has '
        f'{", ".join(record) or "nothing"}.'
      )
  instruction, context, output, answer = (record[key] for key in _KEYS)
  found = _NAMES.search(instruction)
  if not found:
    raise ValueError(
      f'{where}: the instruction does not end with its options, such as '
      f"'Answer format: answer1/answer2': {instruction[-60:]!r}."
    )
  names = tuple(found[1].split('/'))
  if answer not in names:
    raise ValueError(
      f'{where}: the answer {answer!r} is none of the options, '
      f'{", ".join(names)}.'
    )
  if answer not in output:
    raise ValueError(
      f'{where}: the output {output[:60]!r} does not name the answer '
      f'{answer!r}.'
    )
  question, options = _options(where, instruction[: found.start()], names)
  return Example(
    instruction,
    _PREAMBLE.sub('', question, 1),
    context,
    names,
    options,
    output,
    names.index(answer),
  )


def _options(where, text, names):
  """Splits 'question Answer1: text Answer2: text' -> question, texts."""
  if all(not re.search(rf'\b{name}:', text, re.IGNORECASE) for name in names):
    return text, names  # of true and false
  parts = []
  for name in names:
    head, mark, text = text.partition(f'{name.capitalize()}:')
    if not mark:
      raise ValueError(
        f'{where}: the instruction has no option {name.capitalize()}: after '
        f'{head[-40:]!r}.'
      )
    parts.append(head.strip())
  options = (*parts[1:], text.strip())
  if not all(options):
    raise ValueError(f'{where}: an option is empty: {options}.')
  return parts[0], options
