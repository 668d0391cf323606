"""Evaluation: one compiled function over any number of named sets."""

from typing import Any, NamedTuple

import numpy as np

from experiments.data import pipeline


class EvalSet(NamedTuple):
  """A labelled set.

  Attributes:
    source: of examples, as `data.sources.open_source` returns it.
    transforms: from its images to the inputs of the model.
    num_workers: processes that read it; 0 for threads.
    classes: bools [C], the classes that it has; None for all.
  """

  source: Any
  transforms: Any = ()
  num_workers: int = 0
  classes: np.ndarray | None = None

  def batches(self, batch_size):
    """Dicts of 'image' and 'label', in order; the last one is short."""
    return pipeline.eval_batches(
      self.source,
      self.transforms,
      batch_size=batch_size,
      num_workers=self.num_workers,
    )


def predictions(function, eval_set, batch_size, progress=lambda n: None):
  """Applies a compiled function to every example of a set.

  Args:
    function: inputs [batch_size, ...] -> array [batch_size, ...].
    eval_set: an `EvalSet`; a short batch is filled up, and cut again.
    batch_size: of every call, so that one program serves all.
    progress: called with the number of examples done, after each batch.

  Returns:
    NumPy arrays: outputs [N, ...] and labels [N].
  """
  outputs, labels, running = [], [], None

  def fetch():
    array, rows = running
    outputs.append(np.asarray(array)[:rows])
    progress(rows)

  # A batch behind, so that the device has work while the next one is read.
  for batch in eval_set.batches(batch_size):
    inputs, rows = batch['image'], len(batch['label'])
    filling = np.repeat(inputs[:1], batch_size - rows, 0)
    array = function(np.concatenate([inputs, filling]))
    if running:
      fetch()
    running = array, rows
    labels.append(batch['label'])
  fetch()
  return np.concatenate(outputs), np.concatenate(labels)


def evaluate(predict, metrics, sets, batch_size):
  """Metrics of every set.

  Args:
    predict: inputs [batch_size, ...] -> outputs [batch_size, ...].
    metrics: outputs [N, ...], labels [N], the set's classes -> a dict.
    sets: `{name: EvalSet}`, ID and OOD alike.
    batch_size: of every call of `predict`.

  Returns:
    `{name: metrics}`.
  """
  return {
    name: metrics(*predictions(predict, a_set, batch_size), a_set.classes)
    for name, a_set in sets.items()
  }
