"""One study: config -> what all of its methods share, whatever its kind."""

import dataclasses
import functools
import math
import re

from flax import nnx

from experiments import cache, checks, optimizers, parallel, sweep, train
from experiments.configs import base
from experiments.data import pipeline
from experiments.models import lora
from experiments.studies import (
  classification,
  multiple_choice,
  segmentation,
  vqa,
)

# By `config.task`: modules as `studies.base` describes them.
KINDS = {
  'classification': classification,
  'multiple_choice': multiple_choice,
  'segmentation': segmentation,
  'vqa': vqa,
}


def kind(config):
  """The module of a study's kind.

  Raises:
    ValueError: there is no such kind.
  """
  task = config.get('task', base.base().task)  # `normalise` names what misses
  checks.one_of('task', task, KINDS)
  return KINDS[task]


def normalise(config):
  """As `checks.normalise`, for the kind of the study."""
  checks.normalise(config, kind(config).defaults(), kind(config).FILES)


def check(config):
  """Refuses a study that could not end, before any time is spent on it.

  Where the budget is in epochs, it becomes `config.num_steps`; a ~ in a path
  becomes the home directory.

  Returns:
    `{'train': source, 'val': source, eval set: source ...}`.

  Raises:
    ValueError, OSError, ModuleNotFoundError: saying what to change.
  """
  _check_keys(config)
  _check_devices(config)
  sources = kind(config).check(config)
  _check_budget(config, len(sources['train']))
  return sources


def load(config, sources, progress):
  """Reads what is read once, and sets the model up for fine-tuning.

  Where `config.first_block` is not 0, the blocks below are not trained: they
  are run once, see `cache`.

  Args:
    config: a study that `check` accepted.
    sources: as `check` returned them.
    progress: (total, description, unit) -> a context with `update(n)`.

  Returns:
    A `train.FineTuning`.

  Raises:
    ValueError, OSError: of a checkpoint or an example that cannot be read.
  """
  layout = parallel.layout(config.layout)
  with progress(1, 'pretrained weights', 'model') as bar:
    parts = kind(config).build(config, sources)
    bar.update()
  sets = _alike(parts.sets, sources)
  if config.first_block:
    sets = cache.run_lower_blocks(
      parts.task, parts.model, sets, config.eval_batch_size, layout, progress
    )
  if parts.fit:
    parts.fit(sets, layout, progress)
  graphdef, params, frozen = nnx.split(parts.model, parts.trained, ...)
  return train.FineTuning(
    parts.task,
    graphdef,
    layout.put(params),
    layout.put(frozen),
    functools.partial(_train_batches, config, sets['train'], parts.augment),
    {name: one for name, one in sets.items() if name != 'train'},
    config,
    layout,
    parts.interpolate,
  )


def _alike(sets, sources):
  """The sets, each with the first one that has the same examples, if any."""
  first, found = {}, dict(sets)
  for name, one in sets.items():
    # The training set can be large; packed rows of text have no ids.
    if name == 'train' or not hasattr(sources[name], 'ids'):
      continue
    like = first.setdefault(tuple(sources[name].ids), name)
    if like != name:
      found[name] = dataclasses.replace(one, like=like)
  return found


def shapes(config):
  """The `studies.base.Parts` of a study as jax.ShapeDtypeStructs.

  Raises:
    ValueError: saying what to change.
  """
  _check_keys(config)
  return kind(config).shapes(config)


def _train_batches(config, train_set, transforms, seed, start=0):
  return pipeline.train_batches(
    train_set.source,
    train_set.transforms if transforms is None else transforms,
    batch_size=config.batch_size,
    seed=seed,
    num_workers=train_set.num_workers,
    repeats=config.repeats,
    start=start,
    shard=parallel.shard(),
  )


def _check_keys(config):
  """The keys of all studies, without looking at a file or a device."""
  normalise(config)
  for key in (
    'num_seeds',
    'batch_size',
    'eval_batch_size',
    'eval_every',
    'repeats',
    'accumulate',
    'save_every',
    'keep',
    'log_every',
  ):
    if config[key] < 1:
      raise ValueError(f'config.{key} is {config[key]}; it must be at least 1.')
  if not config.metrics or not config.methods:
    raise ValueError(
      'config.metrics and config.methods name at least one each.'
    )
  checks.one_of('decay', config.decay, optimizers.DECAYS)
  sweep.check(config)
  for family in config.methods:
    settings = sweep.settings_of(config, family)
    for name, method in ({family: config.methods[family]} | settings).items():
      _check_method(config, name, method)
  for name, eval_sets in config.means.items():
    for a_set in eval_sets:
      checks.one_of(f'means.{name}', a_set, config.eval_sets)
  for key in ('clip_norm', 'num_workers', 'profile'):
    if not config[key] >= 0:
      raise ValueError(f'config.{key} is {config[key]}; it is 0 or more.')
  if not 0 <= config.ema < 1:
    raise ValueError(f'config.ema is {config.ema}; it is 0 or more, below 1.')
  if not 0 < config.learning_rate < math.inf:
    raise ValueError(
      f'config.learning_rate is {config.learning_rate}; it is above 0.'
    )
  for key in ('warmup_learning_rate', 'min_learning_rate'):
    if not 0 <= config[key] <= config.learning_rate:
      raise ValueError(
        f'config.{key} is {config[key]}; it is from 0 to '
        f'config.learning_rate, {config.learning_rate}.'
      )
  checks.check_effects(checks.RULES, config, base.base())
  for name, method in config.methods.items():
    checks.check_effects(
      checks.METHOD_RULES, method, base.method(''), f'methods.{name}'
    )


def _check_devices(config):
  number = parallel.layout(config.layout).num_devices
  parts = number * config.accumulate
  if config.batch_size % parts:
    raise ValueError(
      f'config.batch_size is {config.batch_size}; it must be a multiple of '
      f'{parts}: {number} devices times config.accumulate.'
    )
  if config.eval_batch_size % number:
    raise ValueError(
      f'config.eval_batch_size is {config.eval_batch_size}; it must be a '
      f'multiple of {number}, the number of devices.'
    )


def _check_budget(config, num_examples):
  if bool(config.num_steps) == bool(config.num_epochs):
    raise ValueError(
      f'config.num_steps is {config.num_steps} and config.num_epochs '
      f'{config.num_epochs}; set one, and the other to 0.'
    )
  if config.num_epochs:
    steps = config.num_epochs * num_examples / config.batch_size
    config.num_steps = round(steps)
  if config.num_steps < 1:
    raise ValueError(
      f'config.num_steps is {config.num_steps}; it must be at least 1.'
    )
  if not 0 <= round(config.warmup * config.num_steps) < config.num_steps:
    raise ValueError(
      f'config.warmup is {config.warmup}; it is the share of the '
      f'{config.num_steps} steps that warm up, less than all of them.'
    )
  if config.batch_size > num_examples:
    raise ValueError(
      f'config.batch_size is {config.batch_size}, of {num_examples} training '
      'examples; make it smaller.'
    )


def _check_method(config, name, method):
  key = f'methods.{name}'
  if method.optimizer and method.average_of:
    raise ValueError(
      f'config.{key} has an optimizer and averages {method.average_of!r}; it '
      'is one or the other.'
    )
  if method.optimizer:
    checks.one_of(f'{key}.optimizer', method.optimizer, optimizers.OPTIMIZERS)
    checks.one_of(f'{key}.train', method.train, optimizers.TRAINED)
    checks.one_of(f'{key}.anchor', method.anchor, optimizers.ANCHORS)
    checks.one_of(f'{key}.condition', method.condition, optimizers.CONDITIONS)
    checks.one_of(f'{key}.lora_kind', method.lora_kind, lora.KINDS)
  if method.condition == 'estimated' and method.optimizer not in ('', 'adam'):
    raise ValueError(
      f'config.{key}.condition is estimated, of steps of Adam, and its '
      f'optimizer {method.optimizer!r}; set config.{key}.optimizer to adam, or '
      'the condition to exact.'
    )
  if method.optimizer == 'ftp' and method.layer_decay != 1:
    raise ValueError(
      f'config.{key}.layer_decay is {method.layer_decay}; it would scale the '
      'steps of FTP after their projection: set it to 1.0.'
    )
  if not method.fire or not all(0 <= p <= 1 for p in method.fire):
    raise ValueError(
      f'config.{key}.fire is {method.fire}; it has a probability for all '
      'layers, or one a layer, each from 0 to 1.'
    )
  for part, low, high in (
    ('rate', 0, math.inf),
    ('weight_decay', 0, math.inf),
    ('spd', 0, math.inf),
    ('layer_decay', 0, math.inf),
    ('alpha', 0, 1),
    ('lora', 0, math.inf),
    ('lora_alpha', 0, math.inf),
  ):
    value = method[part]
    if value is not None and not low <= value <= high:
      raise ValueError(
        f'config.{key}.{part} is {value}; it is from {low} to {high}.'
      )
  try:
    re.compile(method.lora_modules)
  except re.error as error:
    raise ValueError(
      f'config.{key}.lora_modules is {method.lora_modules!r}, which is no '
      f'regular expression: {error}.'
    ) from error
  if not 0 <= method.lora_dropout < 1:
    raise ValueError(
      f'config.{key}.lora_dropout is {method.lora_dropout}; it is 0 or more, '
      'below 1.'
    )
  if method.starts_from and config.methods.get(method.starts_from, {}).get(
    'starts_from'
  ):
    raise ValueError(
      f'config.{key} starts from {method.starts_from!r}, which starts from '
      'another run itself; name one that starts from theta_0.'
    )
  origin = config.methods.get(method.starts_from, method)
  for part in ('lora', 'lora_kind', 'lora_alpha', 'lora_modules'):
    if method[part] != origin[part]:
      raise ValueError(
        f'config.{key}.{part} is {method[part]!r}, and it starts from '
        f'{method.starts_from!r}, where it is {origin[part]!r}; make them one.'
      )
  for verb, source in (
    ('averages', method.average_of),
    ('starts from', method.starts_from),
  ):
    if source and not config.methods.get(source, {}).get('optimizer'):
      raise ValueError(
        f'config.{key} {verb} the run of {source!r}, which is not run; add '
        f'it: --methods={",".join([source, *config.methods])}.'
      )
