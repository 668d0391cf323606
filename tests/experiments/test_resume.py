"""A study that is stopped goes on where it was."""

import json
import pathlib

import pytest

from experiments import compare, study
from experiments.configs import base
from tests.experiments import kinds, toy


@pytest.fixture(autouse=True)
def installed(monkeypatch):
  monkeypatch.setitem(study.KINDS, 'regression', toy)


@pytest.fixture
def config(tmp_path):
  config = kinds.tiny('regression', tmp_path)
  config.update(
    output_dir=str(tmp_path / 'runs'), num_steps=4, eval_every=2, num_seeds=2
  )
  return config


def finish(config):
  compare.compare(config, compare.configure(config))
  results = json.loads(
    (pathlib.Path(config.output_dir) / 'results.json').read_text()
  )
  return {(row['method'], row['seed']): row for row in results['rows']}


def same(row):
  return {k: row[k] for k in row if k not in ('seconds', 'waiting', 'command')}


def test_no_row_is_run_twice_wherever_it_stops(config, started, tmp_path):
  whole = finish(config)
  everything = list(started)
  assert len(whole) == 2 * len(config.methods)
  assert len(everything) == len(set(everything)) < len(whole)
  config.output_dir = str(tmp_path / 'again')
  del started[:]
  for stop_at in range(1, len(everything) + 1):
    started.lives = 1
    try:
      found = finish(config)
    except kinds.Stop:
      assert list(started) == everything[:stop_at]
  assert list(started) == everything
  assert found.keys() == whole.keys()
  assert [*map(same, found.values())] == [*map(same, whole.values())]
  names = {path.name for path in (tmp_path / 'again').iterdir()}
  assert names == {path.name for path in (tmp_path / 'runs').iterdir()}
  assert 'params' not in names


def test_spd_that_did_not_act_is_told(config, capsys):
  for name in set(config.methods) - {'spd_1'}:
    del config.methods[name]
  idle = config.methods.spd_1.copy_and_resolve_references()
  idle.update(label='SPD of none', condition='random', fire=(0.0,))
  config.methods.idle = idle
  rows = finish(config)
  assert rows['spd_1', 0]['decayed'] > 0.05
  printed = capsys.readouterr().out
  told = [line for line in printed.splitlines() if 'did not act' in line]
  assert told == [
    'SPD of none 1 pulled back in under 1% of its decisions: it did not act,'
  ]


def test_more_methods_and_seeds_go_on(config, started, tmp_path, monkeypatch):
  methods = config.methods.to_dict()
  for name in set(methods) - {'zero_shot', 'lora'}:
    del config.methods[name]
  config.num_seeds = 1
  first = finish(config)
  config.methods = base.ordered()
  config.methods.update(methods)
  config.num_seeds = 2
  config.update(title='another', num_workers=3)
  config.eval_batch_size = 8
  del started[:]
  rows = finish(config)
  assert len(rows) == 2 * len(methods)
  assert first.items() <= rows.items()
  assert ('zero_shot', 0) not in started
  # Its row stays, but others start from it.
  assert started.count(('lora', 0)) == 1
  # Nothing is left to run: nothing is loaded.
  monkeypatch.setattr(study, 'load', None)
  assert finish(config) == rows
  # Nor is what is not asked for lost.
  del config.methods['adamw']
  assert finish(config) == rows


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'learning_rate': 0.5},
      r'config\.learning_rate is 0\.01; here it is 0\.5',
    ),
    ({'width': 4}, r'config\.width is 8; here it is 4: set --config\.output_d'),
    ({'methods.spd_1.spd': 2.0}, r'methods\.spd_1\.spd is 1\.0; here it is 2'),
  ],
)
def test_another_study_in_the_folder_is_refused(config, changes, message):
  rows = finish(config)
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    finish(config)
  (written,) = pathlib.Path(config.output_dir).glob('results.json')
  assert len(json.loads(written.read_text())['rows']) == len(rows)


@pytest.mark.parametrize('text', ['{', '[]', '{"rows": [], "config": 1}'])
def test_a_damaged_file_is_told(config, text, tmp_path):
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs/results.json').write_text(text)
  with pytest.raises(ValueError, match=r'results\.json cannot be gone on with'):
    finish(config)
