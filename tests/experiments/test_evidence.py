"""Comparisons with a reference, and the three readings of a sweep."""

import numpy as np
import pytest

from experiments import evaluate, evidence, examples, report


def row(method, seed, id_score, ood, **changes):
  scores = {'val': id_score, 'ID': id_score, 'a': ood, 'b': ood + 0.1}
  return {
    'method': method,
    'label': method,
    'seed': seed,
    'metrics': {name: {'accuracy': value} for name, value in scores.items()},
    'deviation': 0.5,
    'selected': None,
    'decayed': None,
    'step': 10,
    'seconds': 1.0,
    'history': {'loss': np.zeros(2)},
    **changes,
  }


MEANS = {'OOD mean': ('a', 'b')}
OOD = report.Score('OOD mean acc', ('a', 'b'), 'accuracy')


def paired(method, differences, start=0, **changes):
  return [
    row(method, seed, 0.8, 0.5 + 0.01 * seed + x, **changes)
    for seed, x in enumerate(differences, start)
  ]


def named(table):
  """The cells of a table by method and title; of equal titles the last."""
  return {line[0]: dict(zip(table[0], line, strict=True)) for line in table[1:]}


def test_comparisons_are_paired_by_seed():
  rows = paired('adamw', [0.0] * 4) + paired('l2sp', [0.1, 0.2, 0.3], start=1)
  found = evidence.compare(rows, 'adamw', OOD)
  assert list(found) == ['l2sp']
  assert found['l2sp'].n == 3
  assert found['l2sp'].mean == pytest.approx(0.2)
  # t = .2 / (.1 / sqrt(3)) with two degrees of freedom: 1 - t / sqrt(2 + t^2)
  t = 0.2 / (0.1 / np.sqrt(3))
  assert found['l2sp'].p == pytest.approx(1 - t / np.sqrt(2 + t**2))


def test_p_is_that_after_holm():
  rows = paired('adamw', [0.0] * 3) + paired('l2sp', [0.1, 0.2, 0.3])
  alone = evidence.compare(rows, 'adamw', OOD)['l2sp'].p
  rows += paired('spd', [0.1, -0.1, 0.02])
  found = evidence.compare(rows, 'adamw', OOD)
  assert found['l2sp'].p == pytest.approx(2 * alone)


def test_what_may_be_said():
  spd = {'selected': 0.5, 'decayed': 0.5}
  rows = [
    *paired('adamw', [0.0] * 5),
    *paired('up', [0.1, 0.11, 0.1, 0.12, 0.1], **spd),
    *paired('down', [-0.1, -0.11, -0.1, -0.12, -0.1]),
    *paired('open', [0.1, -0.1, 0.05, 0.0, 0.01]),
    *paired('idle', [0.1, 0.11, 0.1, 0.12, 0.1], selected=0.4, decayed=0.009),
    *paired('same', [0.1, 0.1]),
    *paired('once', [0.3]),
    *paired('no seed of ours', [0.3], start=9),
  ]
  table = named(evidence.comparisons(rows, MEANS, 'adamw'))
  assert {name: line['OOD mean acc is'] for name, line in table.items()} == {
    'up': 'better',
    'down': 'worse',
    'open': 'no difference shown',
    'idle': 'did not act',
    'same': 'no spread over seeds',
    'once': 'one seed',
  }
  assert table['once']['95 % interval'] == '-'
  assert table['up']['Δ OOD mean acc'] == '+0.106'
  assert table['up']['Δ ID acc'] == '+0.000'
  assert evidence.comparisons(rows, MEANS, 'none of them') == []


class Mean:
  def metrics(self, outputs, eval_set):
    del eval_set
    return {'accuracy': float(outputs['x'].mean())}


def test_the_interval_is_of_the_examples_that_were_kept(tmp_path):
  """Two methods that every seed agrees on, scored on few examples."""
  x = np.random.default_rng(0).random(40)
  for method, scores in (('adamw', x), ('l2sp', x[::-1])):
    for seed in range(3):
      kept = examples.Kept()
      for name in 'ab':
        a_set = evaluate.EvalSet(range(40))
        kept(name, Mean(), {'x': scores + 0.001 * seed}, a_set)
      kept.write(examples.path(tmp_path, method, seed))
  rows = paired('adamw', [0, 0, 0]) + paired('l2sp', [0.01, 0.011, 0.012])
  few = evidence.compare(rows, 'adamw', OOD)['l2sp']
  rows = [{**one, 'folder': str(tmp_path)} for one in rows]
  wide = evidence.compare(rows, 'adamw', OOD)['l2sp']
  assert few.high - few.low < 0.01
  # SD of the difference of two draws of a set, of the mean of two sets.
  spread = np.std(x - x[::-1]) / np.sqrt(40) / np.sqrt(2)
  half = 1.96 * spread
  assert (wide.high - wide.low) / 2 == pytest.approx(half, rel=0.25)
  assert wide.p == few.p


def swept(method, name, settings, points, reading, phase='tuning'):
  id_score, ood, deviation = points
  label = name.upper() + (f' {settings["spd"]:g}' if 'spd' in settings else '')
  if settings:
    label += f', lr {settings["learning_rate"]:g}'
  return [
    row(
      method,
      seed + 1000 * (phase == 'tuning'),
      id_score + 0.01 * seed,
      ood,
      family=name,
      label=label,
      settings=settings,
      phase=phase,
      deviation=deviation,
      **({} if phase == 'tuning' else {'reading': reading}),
    )
    for seed in range(2)
  ]


def study():
  """AdamW at two rates; SPD at three lambdas and two rates; L2-SP too weak."""
  rows = []
  for rate, points in ((1e-4, (0.90, 0.5, 1.0)), (1e-5, (0.85, 0.6, 0.4))):
    settings = {'learning_rate': rate, 'weight_decay': 0.1}
    rows += swept(f'adamw_{rate}', 'adamw', settings, points, None)
  for rate, shift in ((1e-4, 0.0), (1e-5, -0.2)):
    for spd, points in (
      (0.3, (0.93, 0.5, 1.0)),
      (3.0, (0.83, 0.8, 0.3)),
      (1.0, (0.91, 0.6, 0.7)),
    ):
      settings = {'learning_rate': rate, 'spd': spd}
      points = (points[0] + shift, *points[1:])
      rows += swept(f'spd_{rate}_{spd}', 'spd', settings, points, None)
  for wd in (0.1, 1.0):
    settings = {'learning_rate': 1e-4, 'weight_decay': wd}
    points = (0.95 + 0.01 * wd, 0.4, 1.0)
    rows += swept(f'l2sp_{wd}', 'l2sp', settings, points, None)
  for method, name, reading, points in (
    ('adamw_0.0001', 'adamw', ['id', 'one_se'], (0.9, 0.5, 1.0)),
    ('spd_0.0001_0.3', 'spd', ['id'], (0.93, 0.5, 1.0)),
    ('spd_0.0001_1.0', 'spd', ['one_se'], (0.91, 0.6, 0.7)),
    ('probe', 'probe', [], (0.7, 0.7, 0.0)),
  ):
    settings = {} if name == 'probe' else {'learning_rate': 1e-4}
    rows += swept(method, name, settings, points, reading, 'final')
  settings = {'learning_rate': 1e-4, 'stopped': 3}
  controls = swept(
    'stopped', 'adamw', settings, (0.88, 0.7, 0.7), ['id'], 'control'
  )
  # Of its own family, too, and of one seed of two.
  controls += swept(
    'drawn', 'spd', settings, (0.88, 0.4, 0.7), ['id'], 'control'
  )[:1]
  return rows + [{**row, 'matched_to': 'spd_0.0001_0.3'} for row in controls]


def test_a_reading_has_its_own_settings_and_what_is_not_tuned():
  found = {
    reading: {r['method'] for r in evidence.of_reading(study(), reading)}
    for reading in ('id', 'one_se')
  }
  assert found['id'] == {'adamw_0.0001', 'spd_0.0001_0.3', 'probe'}
  assert found['one_se'] == {'adamw_0.0001', 'spd_0.0001_1.0', 'probe'}
  plain = paired('adamw', [0.0]) + paired('spd', [0.1])
  assert evidence.of_reading(plain, 'one_se') == plain


def test_lines_go_through_one_setting_from_the_weakest_pull_on():
  found = {}
  for line in evidence.lines(evidence.sweep(study())):
    found.setdefault(line.family, []).append((line.key, line.settings))
  assert found == {
    'adamw': [('learning_rate', [1e-4, 1e-5])],
    'spd': [('spd', [0.3, 1.0, 3.0])] * 2,
    'l2sp': [('weight_decay', [0.1, 1.0])],
  }


def test_lambda_moves_along_a_line_where_it_can():
  rows = []
  for rate in (1e-5, 3e-5, 1e-4):
    for spd in (1.0, 3.0):
      settings = {'learning_rate': rate, 'spd': spd}
      rows += swept('spd', 'spd', settings, (0.9, 0.5, 1.0), None)
  assert [line.key for line in evidence.lines(rows)] == ['spd'] * 3


def test_ood_at_the_reference_s_id_score():
  table = named(evidence.matched(evidence.sweep(study()), MEANS, 'adamw'))
  assert {'seeds', 'at ID acc 0.905', 'OOD mean acc'} <= set(table['SPD'])
  spd = table['SPD']
  # ID .905 is at 7/8 from .835 (lambda 3) to .915 (1); OOD .8 to .6, and .05
  # of the second set on top.
  assert spd['at ID acc 0.905'] == 'λ 3 to 1'
  assert float(spd['OOD mean acc']) == pytest.approx(
    0.85 - 0.2 * 7 / 8, abs=1e-3
  )
  assert float(spd['‖θ-θ₀‖']) == pytest.approx(0.3 + 0.4 * 7 / 8, abs=1e-3)
  assert float(spd['Δ to ADAMW']) == pytest.approx(0.3 - 0.2 * 7 / 8, abs=1e-3)
  assert table['L2SP']['at ID acc 0.905'] == 'not reached, 0.956 to 0.965'
  assert table['L2SP']['OOD mean acc'] == '-'
  assert table['ADAMW']['Δ to ADAMW'] == '+0.000'
  assert table['ADAMW']['at ID acc 0.905'] == 'learning rate 0.0001'


def test_the_readings_of_a_sweep_and_of_another_study():
  found = evidence.readings(study(), MEANS, 'adamw')
  assert list(found) == [
    'Settings chosen on ID validation',
    'Settings chosen on ID validation. Compared with ADAMW, lr 0.0001',
    'Strongest pull within one standard error on ID validation',
    'Strongest pull within one standard error on ID validation. Compared with '
    'ADAMW, lr 0.0001',
    'Controls of SPD, lr 0.0001',
    'Controls of SPD, lr 0.0001. Compared with SPD, lr 0.0001',
    'At the same ID score',
  ]
  first = named(found['Settings chosen on ID validation'])
  assert set(first) == {'ADAMW, lr 0.0001', 'SPD, lr 0.0001', 'PROBE'}
  control = named(list(found.values())[5])
  assert control['ADAMW, lr 0.0001']['Δ OOD mean acc'] == '+0.200'
  assert control['SPD, lr 0.0001']['Δ OOD mean acc'] == '-0.100'
  # SPD's own line is of the seeds that its controls have.
  rows = [r for r in study() if (r['phase'], r['seed']) != ('control', 1)]
  found = evidence.readings(rows, MEANS, 'adamw')
  spd = evidence.finals(rows)[2]
  assert (spd['method'], spd['seed']) == ('spd_0.0001_0.3', 0)
  line = found['Controls of SPD, lr 0.0001'][1]
  assert line[1] == f'{spd["metrics"]["ID"]["accuracy"]:.3f}'
  controls = [row for row in study() if row['phase'] == 'control']
  found = evidence.readings(controls, MEANS, 'adamw')
  assert 'Controls of spd_0.0001_0.3' in found  # of rows that are not there
  plain = paired('adamw', [0.0, 0.0]) + paired('spd', [0.1, 0.2])
  assert list(evidence.readings(plain, MEANS, 'adamw')) == [
    'Compared with adamw'
  ]
  for part in (plain[:2], plain[::2]):  # one method, and one seed
    assert evidence.readings(part, MEANS, 'adamw') == {}
