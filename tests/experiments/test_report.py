"""The table, the JSON and the pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import report


def row(label, seed, auroc, **changes):
  metrics = {'auroc': auroc, 'ap': 0.5}
  return {
    'label': label,
    'seed': seed,
    'id': metrics,
    'ood': metrics,
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


def test_table():
  lines = report.table(rows()).splitlines()
  cells = [[c.strip() for c in line.split('|')[1:-1]] for line in lines]
  assert len(lines) == 4
  assert len({len(line) for line in lines}) == 1
  assert {line.count('|') for line in lines} == {11}
  assert cells[2][:4] == [
    'probe',
    '0.900 ± 0.000',
    '0.500 ± 0.000',
    '0.900 ± 0.000',
  ]
  assert cells[2][6:] == ['-', '-', '-', '-']
  assert cells[3][1] == '0.850 ± 0.071'
  assert cells[3][6:] == ['50.0%', '25.0%', '20', '12']
  assert '±' not in report.table(rows()[:2])


def test_pictures(tmp_path):
  report.plot_plane(rows(), tmp_path / 'plane.png', 'title')
  report.plot_steps(rows(), tmp_path / 'steps.png', 'title')
  for name in ('plane.png', 'steps.png'):
    with Image.open(tmp_path / name) as image:
      assert image.width == 960
      assert len(image.getcolors(1 << 20)) > 50


def test_json_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'results.json'
  report.write_json(path, {'rows': rows()})
  assert json.loads(path.read_text())['rows'][1]['history']['loss'][-1] == 1
  before = path.read_text()
  with pytest.raises(AttributeError):
    report.write_json(path, {'rows': object()})
  assert path.read_text() == before
  assert [p.name for p in tmp_path.iterdir()] == ['results.json']
