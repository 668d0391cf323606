"""Evaluation: one compiled function over any number of named sets."""

import numpy as np


def in_batches(function, x, batch_size, progress=lambda n: None):
  """Applies a compiled function to the rows of `x`.

  Args:
    function: batch [batch_size, ...] -> array [batch_size, ...].
    x: array [N, ...]; the last batch is filled up, and cut again.
    batch_size: of every call, so that one program serves all.
    progress: called with the number of rows done, after each batch.

  Returns:
    NumPy array [N, ...].
  """
  outputs = []
  for start in range(0, len(x), batch_size):
    batch = x[start : start + batch_size]
    rows = len(batch)
    filled = np.concatenate([batch, np.repeat(x[:1], batch_size - rows, 0)])
    outputs.append(np.asarray(function(filled))[:rows])
    progress(rows)
  return np.concatenate(outputs)


def evaluate(logits_fn, metrics_fn, sets, batch_size):
  """Metrics of every set.

  Args:
    logits_fn: inputs [batch_size, ...] -> logits [batch_size, C].
    metrics_fn: logits [N, C], labels [N] -> a dict of floats.
    sets: `{name: (inputs [N, ...], labels [N])}`, ID and OOD alike.
    batch_size: of every call of `logits_fn`.

  Returns:
    `{name: metrics}`.
  """
  return {
    name: metrics_fn(in_batches(logits_fn, inputs, batch_size), labels)
    for name, (inputs, labels) in sets.items()
  }
