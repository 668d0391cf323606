"""Evaluation is exact on ragged last batches, and one program."""

import jax
import numpy as np

from experiments import evaluate


def test_ragged_batches_are_exact():
  traced = []

  @jax.jit
  def double(x):
    traced.append(x.shape)
    return 2 * x

  x = np.arange(21, dtype=np.float32).reshape(7, 3)
  done = []
  for batch_size in (1, 3, 7, 16):
    y = evaluate.in_batches(double, x, batch_size, done.append)
    np.testing.assert_array_equal(y, 2 * x)
  assert traced == [(1, 3), (3, 3), (7, 3), (16, 3)]
  assert sum(done) == 4 * 7


def test_every_set_is_reported():
  sets = {'id': (np.eye(5), np.arange(5)), 'ood': (np.ones((2, 5)), None)}
  found = evaluate.evaluate(
    lambda x: x, lambda logits, labels: (len(logits), labels), sets, 4
  )
  assert found['id'][0] == 5
  assert found['ood'] == (2, None)
