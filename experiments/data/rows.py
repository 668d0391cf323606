"""Rows of tokens, all of one shape: what a language model's step takes.

Letters: N rows, T tokens of one, A places of a row that are scored. A column is
an array [N, ...]:

  ids [T]        int32
  positions [T]  int32, counted in each example, and on from its prompt in each
                 of its options
  example [T]    int32, 1, 2, ...: which of the row's examples a token is of; 0
                 is padding
  option [T]     int32, k: a token of option k, which sees the prompt and its
                 own; 0: the prompt, or all of a training example
  source [A]     int32, the token whose output predicts
  target [A]     int32, the id that is to be predicted
  weight [A]     float32, 0 where a place is unused

and of rows with options, K an example at most, answer [E] int32, the right
option of each of a row's examples, from 0, and -1 where there are fewer; and
choice [A] int32, e K + k of a place of option k of example e, both from 0, plus
1, and 0 where it is unused.
"""

import numpy as np

from experiments.data import prompts

_ROUND = 8  # sizes are multiples of it, so that sets share programs


class Encoder:
  """Examples -> token ids."""

  def __init__(self, tokenizer, template, response):
    """
    Args:
      tokenizer: with `encode(text)`, a list of ids, `end`, an id, and `start`,
        one that texts begin with, or None.
      template: key of `prompts.TEMPLATES`.
      response: key of `prompts.RESPONSES`. An option is not followed by the
        end, which its score would not have either.
    """
    self._tokenizer = tokenizer
    self._ends = response == 'output'
    self._template = prompts.TEMPLATES[template]
    self._response = prompts.RESPONSES[response]

  def training(self, example, max_length):
    """Prompt and answer, cut to a length; after an output the end, with room.

    Args:
      example: a `text.Example`.
      max_length: of what is returned.

    Returns:
      The ids, the number of them that are the prompt's, and how many there
      were before the cut.
    """
    prompt, (ids,) = self._split(example, [example.answer], training=True)
    ids = prompt + ids
    whole = len(ids)
    if self._ends and whole < max_length:
      ids.append(self._tokenizer.end)
    return ids[:max_length], len(prompt), whole

  def options(self, example):
    """The ids of the prompt, and a list of those of every option's answer."""
    return self._split(example, range(len(example.names)), training=False)

  def prompt(self, example):
    """The ids of the prompt alone, to be continued."""
    return self._encode(self._template(example, False))

  def _encode(self, text):
    start = self._tokenizer.start
    ids = self._tokenizer.encode(text)
    return ids if start is None else [start, *ids]

  def _split(self, example, options, training):
    """What is the same before all answers, and what follows in each.

    Prompt and answer are encoded as one text, and a token over the seam is the
    answer's.
    """
    prompt = self._template(example, training)
    encode = self._encode
    whole = [encode(prompt + self._response(example, k)) for k in options]
    ids = encode(prompt)
    shared = min(_shared(ids, one) for one in whole)
    return ids[:shared], [one[shared:] for one in whole]


def _shared(a, b):
  """How many ids at the beginning are the same."""
  pairs = enumerate(zip(a, b, strict=False))
  return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def pack(lengths, size):
  """Shares examples out over few rows: best fit, the longest first.

  Args:
    lengths: of the examples, none above `size`.
    size: of a row.

  Returns:
    A list of rows, lists of examples. Nothing else decides it.
  """
  rows, with_room = [], [[] for _ in range(size + 1)]
  for index in np.argsort(-np.asarray(lengths), kind='stable').tolist():
    length = lengths[index]
    room = next((r for r in range(length, size) if with_room[r]), None)
    if room is None:
      rows.append([])
      row, room = len(rows) - 1, size
    else:
      row = with_room[room].pop()
    rows[row].append(index)
    with_room[room - length].append(row)
  return rows


def training(sequences, size, on_prompts):
  """Packed rows of training examples.

  With n targets in all N rows, each has the weight N / n: the mean over rows of
  their weighted sums is the mean over all targets.

  Args:
    sequences: pairs of ids and of how many of them are the prompt's.
    size: T.
    on_prompts: whether the prompt's tokens are targets too.

  Returns:
    A dict of columns.
  """
  packed = pack([len(ids) for ids, _ in sequences], size)
  places = []  # of each row: (source, target)
  columns = _tokens(len(packed), size)
  for row, members in enumerate(packed):
    start, own = 0, []
    for number, member in enumerate(members, 1):
      ids, prompt = sequences[member]
      _fill(columns, row, start, ids, number, 0, 0)
      first = 1 if on_prompts else max(prompt, 1)
      own += [(start + i - 1, ids[i]) for i in range(first, len(ids))]
      start += len(ids)
    places.append(own)
  weight = len(packed) / max(sum(map(len, places)), 1)
  return columns | _places(
    [[(*place, weight, 0) for place in own] for own in places], choices=False
  )


def scoring(encoded, answers, size, num_options):
  """Packed rows of examples: a prompt, and options that do not see each other.

  An option's tokens have the weight 1 / their number: the weighted sum of their
  log-probabilities is the mean.

  Args:
    encoded: of each example, the prompt's ids and a list of those of every
      option, none of them empty.
    answers: the right options, from 0.
    size: T, at least that of the longest example.
    num_options: K, the most options that an example of any set has.

  Returns:
    A dict of columns.
  """
  packed = pack([length(*one) for one in encoded], size)
  columns = _tokens(len(packed), size)
  answer = np.full((len(packed), max(map(len, packed))), -1, np.int32)
  places = []
  for row, members in enumerate(packed):
    start, own = 0, []
    for number, member in enumerate(members):
      answer[row, number] = answers[member]
      prompt, options = encoded[member]
      _fill(columns, row, start, prompt, number + 1, 0, 0)
      last = start + len(prompt) - 1
      start = last + 1
      for k, ids in enumerate(options, 1):
        _fill(columns, row, start, ids, number + 1, k, len(prompt))
        sources = [last, *range(start, start + len(ids) - 1)]
        choice = number * num_options + k
        pairs = zip(sources, ids, strict=True)
        own += [(*pair, 1 / len(ids), choice) for pair in pairs]
        start += len(ids)
    places.append(own)
  return columns | _places(places, choices=True) | {'answer': answer}


def length(prompt, options):
  """The tokens of an example and all of its options."""
  return len(prompt) + sum(map(len, options))


def alike(sets):
  """The columns of several sets, filled up to one shape, so that they share
  programs.

  Args:
    sets: dicts of columns.
  """
  shapes = {
    name: np.max([columns[name].shape[1:] for columns in sets], axis=0)
    for name in sets[0]
  }

  def fill(name, column):
    room = [(0, 0), *((0, int(n)) for n in shapes[name] - column.shape[1:])]
    return np.pad(column, room, constant_values=-(name == 'answer'))

  return [
    {name: fill(name, column) for name, column in columns.items()}
    for columns in sets
  ]


def generation(prompts_ids, answers):
  """Rows of prompts alone: ids, and how many of them there are."""
  columns = _tokens(len(answers), rounded(max(map(len, prompts_ids))))
  for row, ids in enumerate(prompts_ids):
    columns['ids'][row, : len(ids)] = ids
  return {
    'ids': columns['ids'],
    'length': np.array(list(map(len, prompts_ids)), np.int32),
    'answer': np.array(answers, np.int32),
  }


def padding(columns):
  """The share of the tokens that are padding."""
  return float(np.mean(columns['example'] == 0))


def _tokens(num_rows, size):
  names = ('ids', 'positions', 'example', 'option')
  return {name: np.zeros((num_rows, size), np.int32) for name in names}


def _fill(columns, row, start, ids, example, option, position):
  stop = start + len(ids)
  columns['ids'][row, start:stop] = ids
  columns['positions'][row, start:stop] = position + np.arange(len(ids))
  columns['example'][row, start:stop] = example
  columns['option'][row, start:stop] = option


def _places(places, choices):
  """Columns of source, target, weight, choice, of each row's list of them."""
  size = rounded(max(map(len, places)))
  columns = {
    'source': np.zeros((len(places), size), np.int32),
    'target': np.zeros((len(places), size), np.int32),
    'weight': np.zeros((len(places), size), np.float32),
    'choice': np.zeros((len(places), size), np.int32),
  }
  for row, own in enumerate(places):
    for column, values in zip(
      columns.values(), zip(*own, strict=True), strict=False
    ):
      column[row, : len(own)] = values
  if not choices:
    del columns['choice']
  return columns


def rounded(size):
  """The size, or a little more."""
  return -(-max(size, 1) // _ROUND) * _ROUND
