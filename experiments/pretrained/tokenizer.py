"""The tokenizer of a decoder: text -> token ids, and back."""

import dataclasses
import json
import pathlib
from typing import Any

import tokenizers

FILE = 'tokenizer.json'
_CONFIG = 'tokenizer_config.json'


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """It neither pads nor cuts.

  Attributes:
    tokens: the `tokenizers.Tokenizer`, whose own start and end are left out.
    start: the id that texts begin with; None where the model has none.
    end: the id that texts end with.
  """

  tokens: Any
  start: int | None
  end: int

  def encode(self, text):
    """The ids of a text, without start and end."""
    return self.tokens.encode(text, add_special_tokens=False).ids

  def decode(self, ids):
    """The text of ids, without special tokens."""
    return self.tokens.decode(list(ids), skip_special_tokens=True)

  def files(self):
    """What `load` reads, and transformers: `{name: a dict of JSON}`."""
    special = {
      'bos_token': self.start,
      'eos_token': self.end,
    }
    tokens = json.loads(self.tokens.to_str())
    if self.start is not None and tokens.get('post_processor') is None:
      name = self.tokens.id_to_token(self.start)
      starts = {'SpecialToken': {'id': name, 'type_id': 0}}
      text = {'Sequence': {'id': 'A', 'type_id': 0}}
      tokens['post_processor'] = {
        'type': 'TemplateProcessing',
        'single': [starts, text],
        'pair': [starts, text],
        'special_tokens': {
          name: {'id': name, 'ids': [self.start], 'tokens': [name]}
        },
      }
    about = {
      key: None if id_ is None else self.tokens.id_to_token(id_)
      for key, id_ in special.items()
    }
    about['tokenizer_class'] = 'PreTrainedTokenizerFast'
    return {FILE: tokens, _CONFIG: about}

  @property
  def vocab_size(self):
    """One more than its largest id."""
    return max(self.tokens.get_vocab().values()) + 1


def load(folder):
  """Reads tokenizer.json, and tokenizer_config.json for start and end.

  Args:
    folder: a pathlib.Path, that of the checkpoint.

  Raises:
    FileNotFoundError: one of the two is missing.
    ValueError: one is damaged, or they do not say what ends a text.
  """
  tokens = read(pathlib.Path(folder, FILE))
  tokens.no_padding()
  tokens.no_truncation()
  about = _read(
    pathlib.Path(folder, _CONFIG), lambda path: json.loads(path.read_bytes())
  )

  def id_of(key):
    token = about.get(key)
    token = token.get('content') if isinstance(token, dict) else token
    return None if token is None else tokens.token_to_id(token)

  end = id_of('eos_token')
  if end is None:
    raise ValueError(
      f'{folder}: eos_token of {_CONFIG} is {about.get("eos_token")!r}, which '
      f'{FILE} does not have; take both from one model.'
    )
  start = id_of('bos_token')
  # Whether a text gets one is the tokenizer's own word, where it has one.
  starts = tokens.encode('a').ids[:1] == [start]
  return Tokenizer(tokens, start if starts else None, end)


def read(path):
  """The `tokenizers.Tokenizer` of a tokenizer.json, as it is.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged.
  """
  return _read(path, lambda path: tokenizers.Tokenizer.from_file(str(path)))


def _read(path, read_one):
  if not path.exists():
    raise FileNotFoundError(
      f'{path} is missing: copy it there from where the checkpoint is from.'
    )
  try:
    return read_one(path)
  except Exception as error:  # tokenizers raises no other kind
    raise ValueError(
      f'{path} is cut short or damaged ({error}): download it again.'
    ) from error


def check(tokenizer, vocab_size, source):
  """Refuses the tokenizer of another vocabulary; a ValueError says so.

  Args:
    tokenizer: a `Tokenizer`.
    vocab_size: of the model, whose table may have unused rows at the end.
    source: of the checkpoint, for the error.
  """
  if tokenizer.vocab_size > vocab_size:
    raise ValueError(
      f'{source}: its tokenizer has ids up to {tokenizer.vocab_size - 1}, the '
      f'model {vocab_size} of them; take the tokenizer of this model.'
    )
