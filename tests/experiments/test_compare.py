"""The main job, from its flags to its pictures."""

import json
import subprocess
import sys

import pytest

from experiments import compare
from experiments.configs import elpv


def test_the_study_end_to_end(tmp_path, capsys):
  config = elpv.get_config()
  # Real weights, real images; small ones, and few steps.
  config.update(
    image_size=28,
    num_steps=6,
    eval_every=3,
    first_block=10,
    output_dir=str(tmp_path / 'new' / 'folder'),
  )
  config = compare.configure(config, seeds=2)
  compare.compare(config)
  printed = capsys.readouterr().out
  assert 'a demonstration, not evidence' in printed
  folder = tmp_path / 'new' / 'folder'
  assert (folder / 'table.md').read_text().strip() in printed
  assert {p.name for p in folder.iterdir()} == {
    'table.md',
    'results.json',
    'plane.png',
    'steps.png',
  }
  results = json.loads((folder / 'results.json').read_text())
  assert results['config'] == config.to_dict()
  rows = {(row['method'], row['seed']): row for row in results['rows']}
  assert list(rows) == [
    (method, seed)
    for seed in (0, 1)
    for method in (
      'linear_probe',
      'adamw',
      'l2sp',
      'spd_03',
      'spd_1',
      'wise_ft',
    )
  ]
  for seed in (0, 1):
    probe, adamw = rows['linear_probe', seed], rows['adamw', seed]
    assert probe['deviation'] == 0
    # The probe is fitted to the mono cells, whose features tell already.
    assert probe['id']['auroc'] > 0.7
    assert rows['spd_1', seed]['decayed'] > 0.05
    assert rows['spd_1', seed]['deviation'] < adamw['deviation']
    assert rows['wise_ft', seed]['deviation'] == pytest.approx(
      0.5 * adamw['deviation'], rel=1e-4
    )
  assert rows['adamw', 0]['deviation'] != rows['adamw', 1]['deviation']


@pytest.mark.parametrize(
  ('changes', 'flags', 'message'),
  [
    ({}, {'methods': ['adam']}, 'has no adam; it knows adamw, l2sp'),
    ({}, {'methods': ['wise_ft']}, '--methods=adamw,wise_ft'),
    ({}, {'seeds': 0}, 'num_seeds is 0'),
    ({'num_steps': 0}, {}, 'num_steps is 0'),
    ({'eval_every': 0}, {}, 'eval_every is 0'),
    ({'warmup': 1.0}, {}, 'warmup is 1.0'),
    ({'image_size': 80}, {}, 'must be a multiple of 14'),
    ({'first_block': 12}, {}, 'blocks 0 to 11'),
    ({'methods.l2sp.optimizer': 'x'}, {}, 'must be one of adamw, l2sp'),
  ],
)
def test_mistakes_are_refused_at_once(tmp_path, changes, flags, message):
  config = elpv.get_config()
  config.output_dir = str(tmp_path)
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    compare.configure(config, **flags)


def test_an_output_folder_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').touch()
  config = elpv.get_config()
  config.output_dir = str(tmp_path / 'file' / 'folder')
  with pytest.raises(OSError, match=r'output_dir .* set --config.output_dir'):
    compare.configure(config)


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    (
      '--config.learning_rat=1',
      'is \'learning_rat\' Did you mean "learning_rate"',
    ),
    ('--method=adamw', "Unknown command line flag 'method'"),
    ('adamw', "'adamw' is no flag"),
  ],
)
def test_the_command_line_says_in_a_line_what_is_wrong(flag, message):
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.compare', flag],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert message in done.stderr
  assert 'Traceback' not in done.stderr
  assert len(done.stderr.strip().splitlines()) <= 2


def test_help_shows_the_defaults():
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.compare', '--help'],
    capture_output=True,
    text=True,
  )
  assert '--seeds' in done.stdout
  for line in str(elpv.get_config()).splitlines():
    assert line in done.stdout
