"""What a config says in vain: keys that no study has, or without effect."""

import difflib
import os

from ml_collections import ConfigDict

from experiments import optimizers
from experiments.configs import base

_PATHS = ('output_dir', 'data_dir', 'cache_dir', 'model.pretrained')


def normalise(config, defaults, files=()):
  """Checks the keys; makes ~ or ~user at the start of a path the home folder.

  Args:
    config: a study; it is changed.
    defaults: a config with every key of its kind.
    files: the keys that name files, beside those of all kinds.

  Raises:
    ValueError: of a key that no study has, or that is missing, and of a user
      that is not known.
  """
  _compare('config', config, defaults)
  _compare('config.model', config.model, defaults.model)
  for name, method in config.methods.items():
    _compare(f'config.methods.{name}', method, base.method(''))
  for key in (*_PATHS, *files):
    path = os.path.expanduser(_get(config, key))
    if path.startswith('~'):
      raise ValueError(
        f'config.{key} is {path!r}, of a user that is not known here; write '
        'the path out, or ./~ for what is named so.'
      )
    config.update_from_flattened_dict({key: path})


def _compare(where, config, known):
  if not isinstance(config, ConfigDict):
    raise ValueError(f'{where} is {config!r}; it has the keys of base.method.')
  for key in config:
    if key not in known:
      close = difflib.get_close_matches(key, known, 1)
      hint = (
        f'did you mean {close[0]}' if close else f'it has {", ".join(known)}'
      )
      raise ValueError(f'{where}.{key} is no key of a study; {hint}?')
  for key in known:
    if key not in config:
      raise ValueError(
        f'{where}.{key} is missing; change single keys of {where}, not all of '
        'it.'
      )


def one_of(key, value, known):
  """Refuses a value that is none of the known ones; a ValueError names them."""
  if value not in known:
    raise ValueError(
      f'config.{key} is {value!r}; it must be one of {", ".join(known)}.'
    )


# Keys, whether they have an effect in a study, and if not, why and what to do.
RULES = (
  (
    ('warmup_learning_rate',),
    lambda c: c.warmup,
    'there is no warm-up',
    'set config.warmup',
  ),
)

# The same of a method.
METHOD_RULES = (
  (
    (
      'rate',
      'weight_decay',
      'spd',
      'anchor_head',
      'train',
      'layer_decay',
      'starts_from',
      'lora',
    ),
    lambda m: m.optimizer,
    'it is of a training run',
    'set config.{method}.optimizer',
  ),
  (
    ('alpha',),
    lambda m: m.average_of,
    'nothing is averaged',
    'set config.{method}.average_of',
  ),
  (
    ('weight_decay',),
    lambda m: m.optimizer not in optimizers.WITHOUT_DECAY,
    'the optimizer takes none',
    'use another one, such as adamw',
  ),
  (
    ('condition', 'anchor', 'anchor_head'),
    lambda m: m.spd is not None,
    'it is of SPD, which is off',
    'set config.{method}.spd',
  ),
  (
    ('fire',),
    lambda m: m.condition == 'random',
    'no layer is drawn',
    'set config.{method}.condition to random',
  ),
  (
    ('optimizer',),
    lambda m: m.optimizer != 'ftp' or m.train != 'head',
    'the head alone is trained, which FTP leaves to Adam',
    'set config.{method}.train to all',
  ),
  (
    ('spd',),
    lambda m: m.anchor_head or m.train != 'head',
    'the head alone is trained, and has no anchor',
    'set config.{method}.anchor_head to True',
  ),
  (
    ('lora',),
    # A probe has the factors at their start, so that LoRA can start from it.
    lambda m: m.train in ('all', 'head'),
    'its factors are not trained',
    'set config.{method}.train to all',
  ),
  (
    ('lora_kind', 'lora_alpha', 'lora_dropout', 'lora_modules'),
    lambda m: m.lora,
    'there is no LoRA',
    'set config.{method}.lora',
  ),
  (
    ('anchor',),
    lambda m: m.lora,
    "it is of LoRA's factors, and there are none",
    'set config.{method}.lora',
  ),
  (
    ('layer_decay',),
    lambda m: m.train != 'head',
    'the head alone is trained, whose rate is the full one',
    'set config.{method}.train to all',
  ),
)


def check_effects(rules, config, defaults, method=''):
  """Refuses every key that was changed from its default, but has no effect.

  Args:
    rules: such as `RULES`.
    config: a study, or a method, with the right keys.
    defaults: the same, unchanged.
    method: the path of the method in the study.

  Raises:
    ValueError: naming the key, why, and what to change.
  """
  for keys, acts, why, remedy in rules:
    for key in keys:
      value, default = _get(config, key), _get(defaults, key)
      if value != default and not acts(config):
        path = f'{method}.{key}' if method else key
        raise ValueError(
          f'config.{path} is {value!r}, which has no effect: {why}; '
          f'{remedy.format(method=method)}, or this back to {default!r}.'
        )


def _get(config, key):
  for name in key.split('.'):
    config = config[name]
  return config
