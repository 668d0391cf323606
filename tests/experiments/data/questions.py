"""Files of questions, in the format of LLM-Adapters, and a tokenizer."""

import json
import re

import numpy as np

THINGS = ['ice', 'fire', 'sand', 'milk', 'gold', 'wind', 'rain', 'salt']


def record(text, options, answer, kind='answer'):
  names = [f'{kind}{i + 1}' for i in range(len(options))]
  listed = ' '.join(
    f'{name.capitalize()}: {option}'
    for name, option in zip(names, options, strict=True)
  )
  return {
    'instruction': 'Please choose the correct answer to the question: '
    f'{text}\n\n{listed}\n\nAnswer format: {"/".join(names)}',
    'input': '',
    'output': f'the correct answer is {names[answer]}',
    'answer': names[answer],
  }


def write(file, number, seed=0, num_options=4):
  """Questions of random things, whose right answer is named in them."""
  rng = np.random.default_rng(seed)
  records = []
  for i in range(number):
    options = rng.choice(THINGS, num_options, replace=False).tolist()
    answer = int(rng.integers(num_options))
    text = f'which of them is {options[answer]} no {seed} {i}?'
    records.append(record(text, options, answer))
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(records, indent=1))


class Letters:
  """A tokenizer: a letter is a token, and so is ' ' with what follows it."""

  start, end = None, 1

  def encode(self, text):
    return [2 + hash_of(token) for token in re.findall(r' ?.|\n', text)]

  def decode(self, ids):
    return ' '.join(map(str, ids))


def hash_of(token):
  value = 0
  for letter in token:
    value = (31 * value + ord(letter)) % 90
  return value
