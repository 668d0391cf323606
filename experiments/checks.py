"""What a config says in vain: keys that no study has, or without effect."""

import difflib
import os

from ml_collections import ConfigDict

from experiments import optimizers, parallel
from experiments.configs import base
from experiments.pretrained import load as pretrained

_PATHS = (
  'output_dir',
  'data_dir',
  'cache_dir',
  'model.pretrained',
  'prompts',
  'class_names',
)


def normalise(config):
  """Checks the keys; makes ~ or ~user at the start of a path the home folder.

  Raises:
    ValueError: of a key that no study has, or that is missing, and of a user
      that is not known.
  """
  _compare('config', config, base.base())
  _compare('config.model', config.model, base.base().model)
  for name, method in config.methods.items():
    _compare(f'config.methods.{name}', method, base.method(''))
  for key in _PATHS:
    path = os.path.expanduser(_get(config, key))
    if path.startswith('~'):
      raise ValueError(
        f'config.{key} is {path!r}, of a user that is not known here; write '
        'the path out, or ./~ for what is named so.'
      )
    config.update_from_flattened_dict({key: path})


def _compare(where, found, known):
  if not isinstance(found, ConfigDict):
    raise ValueError(f'{where} is {found!r}; it has the keys of base.method.')
  for key in found:
    if key not in known:
      close = difflib.get_close_matches(key, known, 1)
      hint = (
        f'did you mean {close[0]}' if close else f'it has {", ".join(known)}'
      )
      raise ValueError(f'{where}.{key} is no key of a study; {hint}?')
  for key in known:
    if key not in found:
      raise ValueError(
        f'{where}.{key} is missing; change single keys of {where}, not all of '
        'it.'
      )


# Of a study: keys, whether they have an effect, and if not, why and what to do.
_RULES = (
  (
    ('data_dir',),
    lambda c: any(
      source.get('kind') != 'elpv'
      for source in (c.train, c.val, *c.eval_sets.values())
    ),
    'the images of ELPV lie in its package',
    'name another kind of source',
  ),
  (
    ('prompts', 'class_names'),
    lambda c: c.head == 'zero_shot',
    'the head is not made of texts',
    'set config.head to zero_shot',
  ),
  (
    ('model.remat',),
    lambda c: c.first_block < _depth(c) - 1,
    'only the last block is trained, which is never recomputed',
    'lower config.first_block',
  ),
  (
    ('crop_scale', 'flip', 'randaugment', 'erasing'),
    lambda c: c.augment,
    'it is of augmentation, which is off',
    'set config.augment to True',
  ),
  (
    ('repeats',),
    lambda c: c.augment or c.mixup or c.cutmix,
    'the views of an image are all the same without augmentation',
    'set config.augment to True',
  ),
  (
    ('mixup', 'cutmix'),
    lambda c: _images_to_mix(c) > 1,
    'what is mixed is a part of a batch, under pmap of one device, and that is '
    'one image',
    'raise config.batch_size or lower config.accumulate',
  ),
  (
    ('mixup', 'cutmix'),
    lambda c: c.mix_probability,
    'no batch is mixed',
    'raise config.mix_probability',
  ),
  (
    ('mixup',),
    lambda c: not c.cutmix or c.mix_switch < 1,
    'it is always CutMix',
    'lower config.mix_switch',
  ),
  (
    ('cutmix',),
    lambda c: not c.mixup or c.mix_switch > 0,
    'it is always Mixup',
    'raise config.mix_switch',
  ),
  (
    ('mix_probability',),
    lambda c: c.mixup or c.cutmix,
    'there is neither Mixup nor CutMix',
    'set config.mixup or config.cutmix',
  ),
  (
    ('mix_switch',),
    lambda c: c.mixup and c.cutmix,
    'Mixup and CutMix are not both on',
    'set config.mixup and config.cutmix',
  ),
  (
    ('warmup_learning_rate',),
    lambda c: c.warmup,
    'there is no warm-up',
    'set config.warmup',
  ),
)

# The same of a method.
_METHOD_RULES = (
  (
    (
      'rate',
      'weight_decay',
      'spd',
      'anchor_head',
      'train',
      'layer_decay',
      'starts_from',
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
    ('anchor_head',),
    lambda m: m.spd is not None,
    'it is of SPD, which is off',
    'set config.{method}.spd',
  ),
  (
    ('spd',),
    lambda m: m.anchor_head or m.train != 'head',
    'the head alone is trained, and has no anchor',
    'set config.{method}.anchor_head to True',
  ),
  (
    ('layer_decay',),
    lambda m: m.train != 'head',
    'the head alone is trained, whose rate is the full one',
    'set config.{method}.train to all',
  ),
)


def check_effects(config):
  """Refuses every key that was changed from its default, but has no effect.

  Args:
    config: a study with the right keys, of a known model.

  Raises:
    ValueError: naming the key, why, and what to change.
  """
  _apply(_RULES, config, base.base(), '')
  for name, method in config.methods.items():
    _apply(_METHOD_RULES, method, base.method(''), f'methods.{name}')


def _apply(rules, config, defaults, method):
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


def _depth(config):
  model = config.model
  return pretrained.vit_config(model.name, model.pretrained).depth


def _images_to_mix(config):
  devices = 1
  if config.layout == 'pmap':
    devices = parallel.layout(config.layout).num_devices
  return config.batch_size // (devices * config.accumulate)
