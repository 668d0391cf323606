"""A second kind of study: vectors to numbers. It has no image and no label."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import evaluate
from experiments.configs import base
from experiments.data import sources
from experiments.models import blocks
from experiments.studies import base as studies

FILES = ()


@dataclasses.dataclass(frozen=True)
class Regression:
  """Squared error of a `Net`."""

  first_block: int

  def loss(self, model, batch, key):
    del key
    return jnp.mean((self._predict(model, batch) - batch['y']) ** 2)

  def outputs(self, model, batch):
    return {'y': batch['y'], 'error': self._predict(model, batch) - batch['y']}

  def lower(self, model, batch):
    return {
      'hidden': model.encode(batch['x'], stop=self.first_block),
      'y': batch['y'],
    }

  def metrics(self, outputs, eval_set):
    y, error = outputs['y'], outputs['error']
    # The host's strings are of the same rows.
    assert list(eval_set.info) == [f'{value:.3f}' for value in y]
    close = float(np.mean(np.abs(error) < 0.5))
    return {'r2': float(1 - np.mean(error**2) / np.var(y)), 'close': close}

  def _predict(self, model, batch):
    if 'hidden' in batch:
      hidden = batch['hidden'].astype(jnp.float32)
      hidden = model.encode(hidden, start=self.first_block)
    else:
      hidden = model.encode(batch['x'])
    return model.head(hidden)[:, 0]


class Net(nnx.Module):
  """Blocks of one Linear each, and a head."""

  def __init__(self, width, *, rngs: nnx.Rngs):
    self.blocks = nnx.List(
      [nnx.Linear(width, width, rngs=rngs) for _ in range(3)]
    )
    self.head = nnx.Linear(width, 1, rngs=rngs)

  def encode(self, x, start=0, stop=None):
    for block in self.blocks[start:stop]:
      x = jnp.tanh(block(x))
    return x


def defaults():
  config = base.base()
  config.width = 8
  return config


def check(config):
  rng = np.random.default_rng(0)

  def draw(number, shift):
    x = rng.normal(shift, 1, (number, config.width)).astype(np.float32)
    y = np.sin(x).sum(1) + rng.normal(size=number)
    return sources.Arrays({'x': x, 'y': y.astype(np.float32)})

  opened = {'train': draw(96, 0.0), 'val': draw(40, 0.0)}
  return opened | {name: draw(40, 1.0) for name in config.eval_sets}


def build(config, sources):
  sets = {
    name: evaluate.EvalSet(
      source, info=[f'{y:.3f}' for y in source.columns['y']]
    )
    for name, source in sources.items()
  }
  return _parts(config, Net(config.width, rngs=nnx.Rngs(0)), sets)


def shapes(config):
  net = nnx.eval_shape(lambda: Net(config.width, rngs=nnx.Rngs(0)))
  return _parts(config, net, {})


def _parts(config, model, sets):
  example = {
    'x': jax.ShapeDtypeStruct((config.width,), jnp.float32),
    'y': jax.ShapeDtypeStruct((), jnp.float32),
  }
  return studies.Parts(
    Regression(config.first_block),
    model,
    blocks.from_block(config.first_block),
    sets,
    example,
  )


def get_config(arg=''):
  """The methods of `tiny_study`; the argument is not looked at."""
  del arg
  config = defaults()
  config.update(
    task='regression',
    title='vectors',
    output_dir='runs/vectors',
    eval_sets={'ID': {}},
    num_steps=24,
    batch_size=16,
    eval_batch_size=16,
    eval_every=8,
    save_every=3,
    log_every=2,
    learning_rate=1e-2,
  )
  config.methods.update(
    {
      'zero_shot': base.method('start'),
      'adamw': base.method('AdamW', optimizer='adamw', weight_decay=0.1),
      'spd_1': base.method('Adam-SPD', optimizer='adam', spd=1.0),
    }
  )
  return config
