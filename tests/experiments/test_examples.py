"""What is kept of every example, and its draws."""

import numpy as np
import pytest

from experiments import evaluate, examples, report
from experiments.tasks import classification


class Means:
  """The mean of x; where there is info, it is of the same examples."""

  def metrics(self, outputs, eval_set):
    if eval_set.info is not None:
      assert list(eval_set.info) == [f'{x:.6f}' for x in outputs['x']]
    return {'mean': float(outputs['x'].mean())}


def test_draws_spread_as_the_mean_of_as_many_examples_does():
  x = np.random.default_rng(0).normal(size=400)
  info = [f'{value:.6f}' for value in x]
  a_set = evaluate.EvalSet(range(400), info=info)
  found = examples.draws('a', Means(), {'x': x}, a_set, 2000)['mean']
  assert found.shape == (2000,)
  error = x.std() / 20
  assert found.mean() == pytest.approx(x.mean(), abs=4 * error / 2000**0.5)
  assert found.std() == pytest.approx(error, rel=0.07)


def test_a_draw_is_of_the_same_examples_in_every_run_and_of_others_per_set():
  x = np.arange(50.0)
  a_set = evaluate.EvalSet(range(50))
  found, twice, other = (
    examples.draws(name, Means(), {'x': values}, a_set)['mean']
    for name, values in (('a', x), ('a', 2 * x), ('b', x))
  )
  np.testing.assert_allclose(twice, 2 * found)
  assert abs(np.corrcoef(found, other)[0, 1]) < 0.3


def test_sets_of_the_same_examples_are_drawn_alike(tmp_path):
  kept = examples.Kept()
  x = np.arange(50.0)
  for name, like in (('ID', ''), ('fog', 'ID'), ('far', '')):
    kept(name, Means(), {'x': x}, evaluate.EvalSet(range(50), like=like))
  kept.write(examples.path(tmp_path, 'spd', 0))
  found = examples.read_draws(tmp_path, {'method': 'spd', 'seed': 0})
  np.testing.assert_array_equal(found['fog']['mean'], found['ID']['mean'])
  assert (found['far']['mean'] != found['ID']['mean']).any()


def test_groups_are_drawn_together():
  x = np.repeat(np.random.default_rng(0).normal(size=40), 10)
  a_set = evaluate.EvalSet(range(400), groups=np.arange(400) // 10)
  found = examples.draws('a', Means(), {'x': x}, a_set, 2000)
  error = x.std() / np.sqrt(40)
  assert found['mean'].std() == pytest.approx(error, rel=0.08)


def test_a_draw_of_one_class_has_no_auroc():
  task = classification.Classification(
    2, 0, (1.0, 1.0), 0.0, 0.0, 0.0, 0.0, 0.0, ('accuracy', 'auroc')
  )
  outputs = {'logits': np.eye(2, dtype=np.float32)[[0, 0, 1]]}
  outputs['label'] = np.array([0, 0, 1])
  a_set = classification.LabelledSet(range(3))
  found = examples.draws('a', task, outputs, a_set)
  assert set(found['accuracy']) == {1.0}
  assert set(found['auroc'][~np.isnan(found['auroc'])]) == {1.0}
  missing = (2**3 + 1) / 3**3  # a draw without the one, or without the others
  assert np.isnan(found['auroc']).mean() == pytest.approx(missing, abs=0.1)


@pytest.mark.parametrize('deeper', ['', 'spd_0'])
def test_what_is_written_is_read_by_set_and_metric(tmp_path, deeper):
  kept = examples.Kept()
  for name in ('val', 'ID', 'far away'):
    kept(name, Means(), {'x': np.arange(3.0)}, evaluate.EvalSet(range(3)))
  row = {'method': 'spd', 'seed': 0}
  assert examples.read_draws(tmp_path / deeper, row) == {}
  kept.write(examples.path(tmp_path, 'spd', 0))
  found = examples.read_draws(tmp_path / deeper, row)
  assert list(found) == ['ID', 'far away']
  assert found['ID']['mean'].shape == (examples.DRAWS,)
  with np.load(tmp_path / 'outputs' / 'spd_0.npz') as arrays:
    np.testing.assert_array_equal(arrays['ID/outputs/x'], [0, 1, 2])
  assert len(list((tmp_path / 'outputs').iterdir())) == 1


def test_draws_go_with_a_copy_of_the_rows(tmp_path):
  rows = []
  for i, (method, phase) in enumerate(
    [('spd', 'final'), ('adamw', 'control'), ('adam', 'tuning')]
  ):
    kept = examples.Kept()
    kept('ID', Means(), {'x': i + np.arange(3.0)}, evaluate.EvalSet(range(3)))
    kept.write(examples.path(tmp_path, method, 0))
    rows.append({'method': method, 'seed': 0, 'phase': phase})
  rows = [
    {'title': 'a study', 'means': {}, 'metrics': {'val': {'mean': 0}}, **row}
    for row in rows
  ]
  rows = [dict.fromkeys(report._OF_ROWS, 0) | row for row in rows]
  whole = [{'folder': str(tmp_path), **row} for row in rows]
  assert examples.pack(whole, tmp_path / 'copy' / 'mine.npz') == 2
  assert [file.name for file in (tmp_path / 'copy').iterdir()] == ['mine.npz']
  packed = str(tmp_path / 'copy' / 'mine.npz')
  for row in rows[:2]:
    found = examples.read_draws(packed, row)['ID']['mean']
    expected = examples.read_draws(tmp_path, row)['ID']['mean']
    np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert examples.read_draws(packed, rows[2]) == {}
  report.write_jsonl(tmp_path / 'copy' / 'mine.jsonl', rows)
  report.write_jsonl(tmp_path / 'copy' / 'other.jsonl', rows)
  for name, folder in (('mine', packed), ('other', str(tmp_path / 'copy'))):
    (found,) = report.read_studies([tmp_path / f'copy/{name}.jsonl']).values()
    assert {row['folder'] for row in found} == {folder}


def test_large_sets_are_not_drawn_from(tmp_path, monkeypatch):
  monkeypatch.setattr(examples, '_MOST', 3)
  kept = examples.Kept()
  for size in (3, 4):
    outputs = {'x': np.arange(float(size))}
    kept(f'of {size}', Means(), outputs, evaluate.EvalSet(range(size)))
  kept.write(examples.path(tmp_path, 'spd', 0))
  row = {'method': 'spd', 'seed': 0}
  assert list(examples.read_draws(tmp_path, row)) == ['of 3']
  with np.load(tmp_path / 'outputs' / 'spd_0.npz') as arrays:
    assert 'of 4/outputs/x' in arrays
