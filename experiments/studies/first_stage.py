"""What a study starts from, where pretrained weights alone are not enough.

A model learns a broad task once, and that is theta_0 of all methods and seeds:
a new projector and LoRA, merged, or the upper blocks and a head. It is kept in
`config.cache_dir`.
"""

import functools
import hashlib
import json
import zipfile

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from experiments import cache, files, optimizers, parallel, train
from experiments.configs import base
from experiments.data import pipeline, sources

_SETS = ('train', 'val')
# What a study does after it; all other keys may change what is learned.
_LATER = (
  *('train', 'val', 'eval_sets', 'means', 'methods', 'num_steps', 'num_epochs'),
  *('batch_size', 'accumulate', 'eval_every', 'learning_rate', 'repeats'),
  *('warmup_learning_rate', 'min_learning_rate', 'ema', 'sweep'),
  'tuning_seeds',
)


def open_sets(config):
  """The sources of the first stage, `{'train': source, 'val': source}`.

  There are none where it has no steps.

  Raises:
    ValueError, OSError, ModuleNotFoundError: saying what to change.
  """
  stage = config.first_stage
  if not stage.num_steps:
    return {}
  for key in ('num_steps', 'batch_size', 'eval_every'):
    if stage[key] < 1:
      raise ValueError(
        f'config.first_stage.{key} is {stage[key]}; it must be at least 1.'
      )
  if stage.learning_rate <= 0 or stage.weight_decay < 0 or stage.seed < 0:
    raise ValueError(
      'config.first_stage: learning_rate is above 0, weight_decay and seed are '
      f'0 or more; they are {stage.learning_rate}, {stage.weight_decay} and '
      f'{stage.seed}.'
    )
  opened = {
    name: sources.open_source(stage[name].to_dict(), config.data_dir)
    for name in _SETS
  }
  if not len(opened['val']):
    raise ValueError(
      f'first_stage.val: no example is left of {stage.val.to_dict()}.'
    )
  devices = parallel.layout(config.layout).num_devices
  if stage.batch_size % devices or stage.batch_size > len(opened['train']):
    raise ValueError(
      f'config.first_stage.batch_size is {stage.batch_size}; it must be a '
      f'multiple of {devices}, the number of devices, and no more than its '
      f'{len(opened["train"])} training examples.'
    )
  return opened


def check_keys(config, defaults):
  """Refuses keys that a first stage has not.

  Args:
    config: the study.
    defaults: a config with every key of its kind.
  """
  unknown = {*config.first_stage} ^ {*defaults.first_stage}
  if unknown:
    raise ValueError(
      f'config.first_stage.{min(unknown)} is missing, or no key; its keys are '
      f'{", ".join(defaults.first_stage)}.'
    )


def learn(config, task, model, trained, sets, augment, fit, layout, progress):
  """Brings a model to where its study starts, or reads what was kept of that.

  Args:
    config: the study.
    task: as `train.FineTuning` takes it.
    model: an `nnx.Module`, pretrained; it is changed.
    trained: NNX filter of the params that learn.
    sets: `{'train': EvalSet, 'val': EvalSet}` of the broad task.
    augment: transforms of a training example; None for those of evaluation.
    fit: as `studies.base.Parts` has it; it comes before the steps.
    layout: a `parallel.Layout`.
    progress: as `study.load` takes it.
  """
  file = kept(config, model, sets)
  graphdef, params, frozen = nnx.split(model, trained, ...)
  found = _read(file, params)
  # All processes learn, or none does.
  if not np.all(multihost_utils.process_allgather(found is not None)):
    if config.first_block:
      sets = cache.run_lower_blocks(
        task, model, sets, config.eval_batch_size, layout, progress
      )
    if fit:
      fit(sets, layout, progress)
      graphdef, params, frozen = nnx.split(model, trained, ...)
    parts = task, graphdef, layout.put(params), layout.put(frozen)
    params = _train(config, parts, sets, augment, layout, progress)
    found = jax.device_get(layout.gather(params))
    if jax.process_index() == 0:
      arrays = {name: leaf[...] for name, leaf in _leaves(found)}
      files.write_arrays(file, arrays, compressed=False)
  nnx.update(model, found)


def kept(config, model, sets):
  """The file that a first stage is kept in.

  Its name stands for all that changes what is learned: the config, the
  pretrained weights, and which examples there are.

  Args:
    config: the study.
    model: before the first stage.
    sets: of the first stage.
  """
  about = {
    key: value
    for key, value in config.to_dict().items()
    if key not in (*base.FREE, *_LATER)
  }
  about |= {name: _examples(sets[name].source) for name in _SETS}
  digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
  for path, leaf in _leaves(nnx.state(model, nnx.Param)):
    value = np.asarray(leaf[...])
    digest.update(f'{path} {value.shape} {value.dtype}'.encode())
    digest.update(value.tobytes())
  folder = files.expand('first_stage', config.cache_dir)
  return folder / f'{digest.hexdigest()[:16]}.npz'


def _examples(source):
  labels = None if source.labels is None else source.labels.tolist()
  return source.ids, labels


def _train(config, parts, sets, augment, layout, progress):
  """The params that validation chooses."""
  stage = config.first_stage
  own = config.copy_and_resolve_references()
  own.update(
    num_steps=stage.num_steps,
    eval_every=stage.eval_every,
    learning_rate=stage.learning_rate,
    warmup_learning_rate=0.0,
    min_learning_rate=0.0,
    accumulate=1,
    ema=0.0,
  )
  transforms = sets['train'].transforms if augment is None else augment
  batches = functools.partial(
    _batches, sets['train'], transforms, stage.batch_size
  )
  tuning = train.FineTuning(*parts, batches, {'val': sets['val']}, own, layout)
  method = base.method('', optimizer='adamw', weight_decay=stage.weight_decay)
  with progress(stage.num_steps, 'first stage', 'step') as bar:
    run = tuning.run(
      *optimizers.from_config(own, method),
      stage.seed,
      callback=lambda *_: bar.update(),
    )
  return run.params


def _batches(train_set, transforms, batch_size, seed, start=0):
  return pipeline.train_batches(
    train_set.source,
    transforms,
    batch_size=batch_size,
    seed=seed,
    num_workers=train_set.num_workers,
    start=start,
    shard=parallel.shard(),
  )


def _leaves(state):
  """(name, variable) of everything in it."""
  for path, leaf in nnx.to_flat_state(state):
    yield '.'.join(map(str, path)), leaf


def _read(file, like):
  """The params that were kept; None where they are not there, or not whole.

  Every array is read to its end, where its check sum is.
  """
  params = jax.tree.map(lambda leaf: leaf, like)
  try:
    with open(file, 'rb') as data, np.load(data) as arrays:
      for name, leaf in _leaves(params):
        value = arrays[name]
        if (value.shape, value.dtype) != (leaf.shape, leaf.dtype):
          return None
        leaf[...] = value
  except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
    return None
  return params
