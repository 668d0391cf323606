"""The lower blocks, which are not trained, are run once.

What enters `config.first_block` is kept in memory, in float16, in the place of
the examples: an epoch then costs the upper blocks alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import evaluate
from experiments.data import sources


def run_lower_blocks(task, model, sets, batch_size, layout, progress):
  """Sets of what enters the first block that is trained.

  Args:
    task: with `lower(model, batch)`: the batch with hidden states in the place
      of the inputs that only they need. Its other keys stay.
    model: of arrays.
    sets: `{name: EvalSet}`. One whose own task has no `lower` stays as it is.
    batch_size: of every call; the devices divide it.
    layout: a `parallel.Layout`.
    progress: as `study.load` takes it.

  Returns:
    `{name: EvalSet}`, of the same rows in the same order.
  """
  graphdef, state = nnx.split(model)
  function = functools.partial(
    jax.jit(functools.partial(_lower, task, graphdef)), layout.put(state)
  )
  cached = dict(sets)
  lowered = {
    name: one
    for name, one in sets.items()
    if one.task is None or hasattr(one.task, 'lower')
  }
  total = sum(len(one.source) for one in lowered.values())
  with progress(total, 'lower blocks, run once', 'example') as bar:
    for name, eval_set in lowered.items():
      columns = evaluate.apply(
        function, eval_set, batch_size, layout, bar.update
      )
      cached[name] = dataclasses.replace(
        eval_set,
        source=sources.Arrays(columns),
        transforms=(),
        num_workers=0,
      )
  return cached


def shapes(task, model, batch):
  """The same of a batch, all in `jax.ShapeDtypeStruct`s."""
  graphdef, state = nnx.split(model)
  return jax.eval_shape(functools.partial(_lower, task, graphdef), state, batch)


def _lower(task, graphdef, state, batch):
  return {
    name: value if name in batch else value.astype(jnp.float16)
    for name, value in task.lower(nnx.merge(graphdef, state), batch).items()
  }
