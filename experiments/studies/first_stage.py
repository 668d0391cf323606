"""What a study starts from, where its parts were not pretrained together.

A new projector, and LoRA on the decoder, learn a broad task once; merged, that
is theta_0. It is kept, for all methods and seeds.
"""

import functools
import hashlib
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import cache, optimizers, parallel, train
from experiments.configs import base
from experiments.data import pipeline
from experiments.models import lora

# The keys of a study that change what is learned.
_KEYS = (
  *('model', 'first_stage', 'first_block', 'image_size', 'prompt', 'separator'),
  *('text_length', 'answer_length', 'options'),
)


def learn(config, task, model, first_sets, sets, layout, progress):
  """Brings a model to where its study starts, or reads what was kept of that.

  Args:
    config: the study.
    task: its own.
    model: a `vision_language.VisionLanguage`; it is changed.
    first_sets: `{'train': EvalSet, 'val': EvalSet}` of the broad task.
    sets: those of the study.
    layout: a `parallel.Layout`.
    progress: as `study.load` takes it.
  """
  del sets
  stage = config.first_stage
  adapted = lora.add(
    model,
    stage.lora,
    stage.lora,
    modules=stage.lora_modules,
    rngs=nnx.Rngs(0),
  )
  trained = nnx.Any(nnx.LoRAParam, lambda path, _: path[0] == 'projector')
  graphdef, params, frozen = nnx.split(adapted, trained, ...)
  file = kept(config)
  if file.exists():
    _read(file, params)
  else:
    if config.first_block:
      first_sets = cache.run_lower_blocks(
        task, model, first_sets, config.eval_batch_size, layout, progress
      )
    parts = task, graphdef, layout.put(params), layout.put(frozen)
    params = _train(config, parts, first_sets, layout, progress)
    if jax.process_index() == 0:
      _write(file, params)
  merged = lora.merge(nnx.merge(graphdef, params, frozen))
  nnx.update(model, nnx.state(merged))


def kept(config):
  """The file that a first stage is kept in."""
  about = {key: config[key] for key in _KEYS}
  about = {
    key: value.to_dict() if hasattr(value, 'to_dict') else value
    for key, value in about.items()
  }
  name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
  folder = pathlib.Path(os.path.expanduser(config.cache_dir), 'first_stage')
  return folder / f'{name[:16]}.npz'


def _train(config, parts, sets, layout, progress):
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
  batches = functools.partial(
    _batches, sets['train'], stage.batch_size, parallel.shard()
  )
  tuning = train.FineTuning(*parts, batches, {'val': sets['val']}, own, layout)
  method = optimizers.from_config(own, base.method('', optimizer='adam'))
  with progress(stage.num_steps, 'first stage', 'step') as bar:
    run = tuning.run(*method, 0, callback=lambda *_: bar.update())
  return run.params


def _batches(train_set, batch_size, shard, seed, start=0):
  return pipeline.train_batches(
    train_set.source,
    train_set.transforms,
    batch_size=batch_size,
    seed=seed,
    start=start,
    shard=shard,
  )


def _write(file, params):
  file.parent.mkdir(parents=True, exist_ok=True)
  arrays = {
    '.'.join(map(str, path)): np.asarray(leaf[...])
    for path, leaf in nnx.to_flat_state(params)
  }
  temporary = file.with_suffix('.tmp.npz')
  np.savez(temporary, **arrays)
  os.replace(temporary, file)


def _read(file, params):
  with np.load(file, allow_pickle=False) as arrays:
    for path, leaf in nnx.to_flat_state(params):
      leaf[...] = jnp.asarray(arrays['.'.join(map(str, path))])
