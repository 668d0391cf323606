"""The table, the JSON and the pictures."""

import json

import numpy as np
import pytest

from experiments import report


def row(label, seed, auroc, **changes):
  metrics = {'auroc': auroc, 'ap': 0.5}
  return {
    'method': label,
    'label': label,
    'seed': seed,
    'metrics': {'val': {'auroc': 0, 'ap': 0}, 'ID': metrics, 'OOD': metrics},
    'deviation': 0.25,
    'selected': None,
    'decayed': None,
    'step': None,
    'seconds': None,
    'history': {},
    **changes,
  }


def rows():
  steps = np.linspace(0, 1, 30)
  spd = {'selected': 0.5, 'decayed': 0.25, 'step': 20, 'seconds': 12.4}
  history = {'loss': steps, 'deviation': steps, 'decayed': steps / 2}
  return [
    row('probe', 0, 0.9),
    row('spd', 0, 0.8, history=history, **spd),
    row('probe', 1, 0.9),
    row('spd', 1, 0.9, history=history, **spd),
  ]


def cells(table):
  lines = table.splitlines()
  assert len({len(line) for line in lines}) == 1
  return [[c.strip() for c in line.split('|')[1:-1]] for line in lines]


def test_table():
  found = cells(report.table(rows(), {}))
  assert found[0][:5] == ['method', 'ID AUROC', 'ID AP', 'OOD AUROC', 'OOD AP']
  assert {len(line) for line in found} == {10}
  assert len(found) == 4
  assert found[2][:4] == [
    'probe',
    '0.900 ± 0.000',
    '0.500 ± 0.000',
    '0.900 ± 0.000',
  ]
  assert found[2][6:] == ['-', '-', '-', '-']
  assert found[3][1] == '0.850 ± 0.071'
  assert found[3][6:] == ['50.0%', '25.0%', '20', '12']
  assert '±' not in report.table(rows()[:2], {})


def several():
  metrics = {
    name: {'accuracy': accuracy, 'balanced_accuracy': accuracy / 2}
    for name, accuracy in [('val', 0), ('photo', 0.8), ('a', 0.2), ('b', 0.6)]
  }
  return [row('probe', 0, 0, metrics=metrics)]


def test_the_mean_of_several_sets():
  found = cells(report.table(several(), {'mean': ('a', 'b')}))
  assert dict(zip(found[0][1:8], found[2][1:8], strict=True)) == {
    'photo acc': '0.800',
    'photo balanced acc': '0.400',
    'a acc': '0.200',
    'b acc': '0.600',
    'mean acc': '0.400',
    'mean balanced acc': '0.200',
    '‖θ-θ₀‖': '0.250',
  }


def test_json_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'results.json'
  report.write_json(path, {'rows': rows()})
  assert json.loads(path.read_text())['rows'][1]['history']['loss'][-1] == 1
  before = path.read_text()
  with pytest.raises(AttributeError):
    report.write_json(path, {'rows': object()})
  assert path.read_text() == before
  assert [p.name for p in tmp_path.iterdir()] == ['results.json']


def test_rows_are_lines_without_histories(tmp_path):
  report.write_jsonl(tmp_path / 'rows.jsonl', rows())
  found = report.read_jsonl(tmp_path / 'rows.jsonl')
  assert [{**row, 'history': {}} for row in found] == [
    {**row, 'history': {}} for row in rows()
  ]
  assert not any('history' in row for row in found)
  assert report.table(found, {}) == report.table(rows(), {})


def test_files_that_make_no_table(tmp_path, capsys):
  file = tmp_path / 'rows.jsonl'
  about = {'title': 'a study', 'means': {}}
  good = [{**about, **one} for one in rows()]
  report.write_jsonl(file, good)
  report.main([str(file), str(file)])
  assert capsys.readouterr().out.startswith('a study: 2 seeds\n\n| method')
  other = {**good[0], 'metrics': {'val': {}, 'ID': {'accuracy': 1.0}}}
  for bad, message in (
    ([1], 'line 1 has no decayed; give rows.jsonl of compare or main'),
    ([good[0], {'title': 'a study'}], 'line 2 has no decayed'),
    ([good[0], other], "line 2 has other sets, .* first row of 'a study'"),
  ):
    file.write_text('\n'.join(map(json.dumps, bad)))
    with pytest.raises(SystemExit, match=message):
      report.main([str(file)])
