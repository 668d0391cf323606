"""Evaluation: one compiled function over any number of named sets."""

from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import parallel
from experiments.data import pipeline

# Images that threads have read before the first process has started: every
# evaluation starts its own.
FEW = 2000


class EvalSet(NamedTuple):
  """A labelled set.

  Attributes:
    source: of examples, as `data.sources.open_source` returns it.
    transforms: from its images to the inputs of the model.
    num_workers: processes that read it, where it is large; 0 for threads.
    classes: bools [C], the classes that it has; None for all.
  """

  source: Any
  transforms: Any = ()
  num_workers: int = 0
  classes: np.ndarray | None = None

  def batches(self, batch_size):
    """Dicts of 'image' and 'label', in order: this process' rows of each.

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


def predictions(
  function, eval_set, batch_size, layout, progress=lambda n: None
):
  """Applies a compiled function to every example of a set.

  Args:
    function: inputs [batch_size, ...] -> array [batch_size, ...].
    eval_set: an `EvalSet`.
    batch_size: of every call, so that one program serves all; the devices
      divide it.
    layout: a `parallel.Layout`; each call is split over its devices.
    progress: called with the number of examples done, after each batch.

  Returns:
    NumPy arrays, in every process: outputs [N, ...] and labels [N].
  """
  found, running, total = [], None, len(eval_set.source)

  def fetch():
    found.append(jax.device_get(running))
    progress(min(batch_size, total - (len(found) - 1) * batch_size))

  # A batch behind, so that the device has work while the next one is read.
  for rows in eval_set.batches(batch_size):
    batch = layout.put_batch({key: rows[key] for key in ('image', 'label')})
    ahead = layout.gather((function(batch['image']), batch['label']))
    if running:
      fetch()
    running = ahead
  fetch()
  outputs, labels = (
    np.concatenate(arrays)[:total] for arrays in zip(*found, strict=True)
  )
  return outputs, labels


def evaluate(predict, metrics, sets, batch_size, layout):
  """Metrics of every set.

  Args:
    predict: inputs [batch_size, ...] -> outputs [batch_size, ...].
    metrics: outputs [N, ...], labels [N], the set's classes -> a dict.
    sets: `{name: EvalSet}`, ID and OOD alike.
    batch_size: of every call of `predict`.
    layout: a `parallel.Layout`.

  Returns:
    `{name: metrics}`.
  """
  return {
    name: metrics(
      *predictions(predict, a_set, batch_size, layout), a_set.classes
    )
    for name, a_set in sets.items()
  }
