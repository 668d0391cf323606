"""Evaluation: one compiled function over any number of named sets."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from experiments import parallel
from experiments.data import pipeline

# Examples that threads have read before the first process has started: every
# evaluation starts its own.
FEW = 2000


@dataclasses.dataclass(frozen=True, eq=False)
class EvalSet:
  """A set of examples.

  Attributes:
    source: of examples, dicts of arrays.
    transforms: Grain transforms from them to what the task takes.
    num_workers: processes that read it, where it is large; 0 for threads.
    info: what stays on the host, such as strings; row i is of example i.
    task: that scores this set; None for the study's own.
    groups: [N]; the examples of one group are no independent draws, such as
      frames that follow one another. None: all are.
    like: name of an earlier set of the same examples, such as those that this
      one has corrupted; '' for none.
  """

  source: Any
  transforms: Any = ()
  num_workers: int = 0
  info: Any = None
  task: Any = None
  groups: Any = None
  like: str = ''

  def batches(self, batch_size):
    """Dicts of [B, ...], in order: this process' rows of each.

    They are full; the last example fills the last one.
    """
    is_large = len(self.source) > FEW
    return pipeline.eval_batches(
      self.source,
      self.transforms,
      batch_size=batch_size,
      num_workers=self.num_workers if is_large else 0,
      shard=parallel.shard(),
    )


def apply(function, eval_set, batch_size, layout, progress=lambda n: None):
  """Applies a compiled function to every example of a set.

  Args:
    function: batch -> tree of [batch_size, ...].
    eval_set: an `EvalSet`.
    batch_size: of every call, so that one program serves all; the devices
      divide it.
    layout: a `parallel.Layout`; each call is split over its devices.
    progress: called with the number of examples done, after each batch.

  Returns:
    The tree, of NumPy arrays [N, ...], in every process.
  """
  parts, running, total = [], None, len(eval_set.source)

  def fetch():
    parts.append(jax.device_get(running))
    progress(min(batch_size, total - (len(parts) - 1) * batch_size))

  # A batch behind, so that the device has work while the next one is read.
  for rows in eval_set.batches(batch_size):
    ahead = layout.gather(function(layout.put_batch(rows)))
    if running is not None:
      fetch()
    running = ahead
  fetch()
  return jax.tree.map(lambda *rows: np.concatenate(rows)[:total], *parts)


def evaluate(outputs, task, sets, batch_size, layout, keep=None):
  """Metrics of every set.

  Args:
    outputs: (task, batch) -> its outputs, a tree of [batch_size, ...].
    task: with `metrics(outputs, eval_set)`, for sets without their own.
    sets: `{name: EvalSet}`, ID and OOD alike.
    batch_size: of every call of `outputs`.
    layout: a `parallel.Layout`.
    keep: called with a set's name, its task, its outputs [N, ...] and the set.

  Returns:
    `{name: metrics}`.
  """
  metrics = {}
  for name, eval_set in sets.items():
    own = eval_set.task or task
    columns = apply(
      functools.partial(outputs, own), eval_set, batch_size, layout
    )
    metrics[name] = own.metrics(columns, eval_set)
    if keep:
      keep(name, own, columns, eval_set)
  return metrics
