"""Evaluation is exact on ragged last batches, and one program."""

import jax
import numpy as np
import pytest

from experiments import evaluate, parallel, study


def a_set(inputs, labels=None, **changes):
  labels = np.arange(len(inputs)) if labels is None else labels
  return evaluate.EvalSet(study.Arrays(inputs, labels), **changes)


@pytest.mark.parametrize('batch_size', [1, 3, 7, 16])
def test_ragged_batches_are_exact(batch_size):
  traced, done = [], []

  @jax.jit
  def double(x):
    traced.append(x.shape)
    return 2 * x

  x = np.arange(21, dtype=np.float32).reshape(7, 3)
  layout = parallel.layout(devices=jax.devices()[:1])
  y, labels = evaluate.predictions(
    double, a_set(x), batch_size, layout, done.append
  )
  np.testing.assert_array_equal(y, 2 * x)
  np.testing.assert_array_equal(labels, np.arange(7))
  assert traced == [(batch_size, 3)]
  assert sum(done) == 7


def test_every_set_is_reported():
  sets = {
    'id': a_set(np.eye(5)),
    'ood': a_set(np.ones((2, 5)), classes=np.array([True, False])),
  }
  layout = parallel.layout(devices=jax.devices()[:2])
  found = evaluate.evaluate(lambda x: x, lambda *given: given, sets, 4, layout)
  for name, (outputs, labels, classes) in found.items():
    np.testing.assert_array_equal(outputs, sets[name].source.inputs)
    np.testing.assert_array_equal(labels, sets[name].source.labels)
    assert classes is sets[name].classes


def test_processes_read_large_sets_only(monkeypatch):
  """They take seconds to start, for every evaluation."""
  asked = []
  monkeypatch.setattr(
    evaluate.pipeline,
    'eval_batches',
    lambda *_, num_workers, **kwargs: asked.append(num_workers),
  )
  for n in (20, 20_000):
    a_set(np.zeros(n), num_workers=2).batches(4)
  assert asked == [0, 2]
