"""Evaluation is exact on ragged last batches, and one program."""

import jax
import numpy as np
import pytest

from experiments import evaluate, parallel
from experiments.data import sources


def a_set(inputs, **changes):
  columns = {'x': inputs, 'label': np.arange(len(inputs))}
  return evaluate.EvalSet(sources.Arrays(columns), **changes)


class Echo:
  """Its outputs are its batch, its metrics all that it is given."""

  def metrics(self, outputs, eval_set):
    return {'task': self, 'outputs': outputs, 'info': eval_set.info}


@pytest.mark.parametrize('batch_size', [1, 3, 7, 16])
def test_ragged_batches_are_exact(batch_size):
  traced, done = [], []

  @jax.jit
  def double(batch):
    traced.append(batch['x'].shape)
    return {'y': 2 * batch['x'], 'label': batch['label']}

  x = np.arange(21, dtype=np.float32).reshape(7, 3)
  layout = parallel.layout(devices=jax.devices()[:1])
  outputs = evaluate.apply(double, a_set(x), batch_size, layout, done.append)
  np.testing.assert_array_equal(outputs['y'], 2 * x)
  np.testing.assert_array_equal(outputs['label'], np.arange(7))
  assert traced == [(batch_size, 3)]
  assert sum(done) == 7


def test_every_set_is_reported_by_its_own_task():
  task, other = Echo(), Echo()
  sets = {
    'id': a_set(np.eye(5)),
    'ood': a_set(np.ones((2, 5)), info=('a', 'b'), task=other),
  }
  layout = parallel.layout(devices=jax.devices()[:2])

  def outputs(task, batch):
    return {**batch, 'theirs': batch['label'] + (task is other)}

  metrics = evaluate.evaluate(outputs, task, sets, 4, layout)
  for name, own in (('id', task), ('ood', other)):
    found, columns = metrics[name], sets[name].source.columns
    assert found['task'] is own
    assert found['info'] is sets[name].info
    np.testing.assert_array_equal(found['outputs']['x'], columns['x'])
    np.testing.assert_array_equal(
      found['outputs']['theirs'], columns['label'] + (own is other)
    )


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
