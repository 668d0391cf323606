"""The main job, from its flags to its pictures."""

import json
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from experiments import compare, log
from experiments.configs import elpv
from tests.experiments import tiny_study

FILES = {'table.md', 'rows.jsonl', 'results.json', 'plane.png', 'steps.png'}
FILES |= {'outputs', 'layers', 'distance.png', 'report.html'}


@pytest.mark.parametrize('full', [False, True])
def test_the_study_end_to_end(tmp_path, capsys, full):
  config = elpv.get_config()
  # Real weights, real images; small ones, not all of them, and few steps.
  config.eval_sets.OOD = {
    **config.eval_sets.OOD,
    'part': {'shares': (0.1, 0.9), 'take': 0},
  }
  config.update(
    image_size=28,
    num_steps=6,
    eval_every=3,
    first_block=10,
    batch_size=8,
    output_dir=str(tmp_path / 'new' / 'folder'),
  )
  config.model.scan = full  # compiles one block, not twelve
  num_seeds = 1 if full else 2
  methods = ['adamw', 'spd_1', 'wise_ft'] if full else None
  opened = compare.configure(
    config, seeds=num_seeds, methods=methods, full=full
  )
  compare.compare(config, opened)
  printed = capsys.readouterr().out
  assert ('a demonstration, not evidence' in printed) == full
  folder = tmp_path / 'new' / 'folder'
  assert (folder / 'table.md').read_text().strip() in printed
  expected = FILES | {f'layers_{m}.png' for m in config.methods if 'spd' in m}
  if num_seeds > 1:
    expected |= {'comparisons.md'}
  assert {p.name for p in folder.iterdir()} == expected
  last = printed.splitlines()[-1]
  assert last.startswith(f'{folder}/: table.md, rows.jsonl, results.json, ')
  assert last.endswith(', report.html')
  results = json.loads((folder / 'results.json').read_text())
  assert results['config']['num_steps'] == 6
  assert results['config']['first_block'] == (0 if full else 10)
  rows = {(row['method'], row['seed']): row for row in results['rows']}
  assert list(rows) == [
    (method, seed) for seed in range(num_seeds) for method in config.methods
  ]
  lines = (folder / 'rows.jsonl').read_text().splitlines()
  assert len(lines) == len(rows)
  for line, row in zip(map(json.loads, lines), results['rows'], strict=True):
    assert line.items() >= {k: row[k] for k in row if k != 'history'}.items()
    assert {'commit', 'device', 'command', 'versions', 'means'} <= line.keys()
  # What SPD did in each layer is what its history says of all of them.
  layers = log.Layers.read(log.Layers.path(folder, 'spd_1', 0))
  of_all = rows['spd_1', 0]['history']
  assert layers.deviation.shape == (6, len(layers.names))
  np.testing.assert_allclose(layers.selected.mean(1), of_all['selected'])
  np.testing.assert_allclose(layers.decayed.mean(1), of_all['decayed'])
  norms = np.sqrt(np.sum(layers.deviation.astype(float) ** 2, 1))
  np.testing.assert_allclose(norms, of_all['deviation'], rtol=1e-3)
  assert 'head/kernel' in layers.names
  for seed in range(num_seeds):
    adamw, spd = rows['adamw', seed], rows['spd_1', seed]
    assert spd['decayed'] > 0.05
    assert spd['deviation'] < adamw['deviation']
    assert rows['wise_ft', seed]['deviation'] == pytest.approx(
      0.5 * adamw['deviation'], rel=1e-4
    )
    if not full:
      probe = rows['linear_probe', seed]
      assert probe['deviation'] == 0
      # The probe is fitted to the mono cells, whose features tell already.
      assert probe['metrics']['ID']['auroc'] > 0.7
  if not full:
    assert rows['adamw', 0]['deviation'] != rows['adamw', 1]['deviation']


@pytest.mark.parametrize(
  ('changes', 'flags', 'message'),
  [
    ({}, {'methods': ['adam']}, 'has no adam; it knows linear_probe, adamw'),
    ({}, {'methods': ['wise_ft']}, '--methods=adamw,wise_ft'),
    ({}, {'seeds': 0}, 'num_seeds is 0'),
    ({'num_steps': 0}, {}, 'num_steps is 0'),
    ({'eval_every': 0}, {}, 'eval_every is 0'),
    ({'warmup': 1.0}, {}, 'warmup is 1.0'),
    ({'image_size': 80}, {}, 'must be a multiple of 14'),
    ({'first_block': 12}, {}, 'blocks 0 to 11'),
    ({'methods.l2sp.optimizer': 'x'}, {}, 'must be one of adam, adamw, l2sp'),
    ({'methods.adamw.train': 'x'}, {}, 'must be one of all, head, biases'),
    ({'methods.wise_ft.spd': 1.0}, {}, r'set config\.methods\.wise_ft\.opt'),
    ({'methods.adamw.starts_from': 'probe'}, {}, "run of 'probe', which is no"),
    ({'batch_size': 645}, {}, 'is 645, of 644 training examples'),
    ({'model.name': 'resnet'}, {}, r"model\.name is 'resnet'; .*dinov2_s14"),
    ({'model.dtype': 'float16'}, {}, 'must be one of float32, bfloat16'),
    ({'model.scan': True}, {}, 'set config.first_block to 0'),
    ({'model.drop_path': 1.0}, {}, r'drop_path is 1\.0; a rate is in'),
    (
      {'head': 'random'},
      {},
      'must be one of linear_probe, zero_shot, pretrained, zeros',
    ),
    ({'head': 'zero_shot'}, {}, 'dinov2_s14 has no text tower'),
    ({'metrics': ('f1',)}, {}, "metrics is 'f1'; it must be one of accuracy"),
    ({'mixup': 0.8}, {}, r'mixup is 0\.8, but .*first_block = 8'),
    ({'augment': True}, {}, 'config.augment is True, but'),
    ({'label_smoothing': 1.1}, {}, 'it is from 0 to 1'),
    ({'eval_crop': 2.0}, {}, 'config.eval_crop is 2.0'),
    ({'mixup': -1.0, 'first_block': 0}, {}, 'neither is below 0'),
    ({'ema': 1.0}, {}, 'config.ema is 1.0'),
    ({'min_learning_rate': 1e-3}, {}, 'from 0 to config.learning_rate'),
    ({'num_epochs': 1.0}, {}, 'set one, and the other to 0'),
    ({'metrics': ()}, {}, 'at least one each'),
    ({}, {'methods': []}, 'at least one each'),
    ({'val.split': 'train'}, {}, 'train and val share 644 examples'),
    ({'eval_sets.ID.split': 'val'}, {}, 'val and ID share 162 examples'),
    ({'model.pretrained': ''}, {}, 'config.model.pretrained is empty'),
    ({'methods.adamw.average_of': 'l2sp'}, {}, 'it is one or the other'),
    ({'eval_sets.OOD.split': 'x'}, {}, "'x'"),
  ],
)
def test_mistakes_are_refused_at_once(tmp_path, changes, flags, message):
  config = elpv.get_config()
  config.output_dir = str(tmp_path)
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    compare.configure(config, **flags)


def test_weights_that_are_not_there(tmp_path):
  config = elpv.get_config()
  config.output_dir = str(tmp_path)
  config.model.pretrained = 'no/such/folder'
  with pytest.raises(FileNotFoundError, match='no/such/folder: no such file'):
    compare.configure(config)


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
      '--config=elpw',
      'neither one of camvid, commonsense, domainnet, easy_vqa, elpv',
    ),
    ('--config=elpv:mono', "takes no argument; it was 'mono'"),
    ('--config=pacs:phot', 'one of photo, art_painting, cartoon, sketch'),
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


def test_an_image_that_cannot_be_read_is_a_line(
  tmp_path, tiny_clip, monkeypatch
):
  tiny_study.write_images(tmp_path)
  file = tmp_path / 'noise' / 'a' / '7.png'
  file.write_bytes(b'P6 30000 10000 255\n')
  config = tiny_study.get_config(str(tmp_path))
  config.update(output_dir=str(tmp_path / 'run'), first_block=1)
  flags = types.SimpleNamespace(
    config=config, seeds=None, methods=None, full=False
  )
  monkeypatch.setattr(compare, 'flags', types.SimpleNamespace(FLAGS=flags))
  with pytest.raises(
    SystemExit, match=rf'^\ncompare: {file} .* is not readable: .*\.$'
  ):
    compare.main(['compare'])


def test_help_shows_the_defaults():
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.compare', '--help'],
    capture_output=True,
    text=True,
  )
  assert '--seeds' in done.stdout
  for line in str(elpv.get_config()).splitlines():
    assert line in done.stdout


def test_programs_are_kept_for_the_next_run(tmp_path, monkeypatch):
  flags = types.SimpleNamespace(
    config=elpv.get_config(), seeds=0, methods=None, full=False
  )
  monkeypatch.setattr(compare.flags, 'FLAGS', flags)
  monkeypatch.setenv('HOME', str(tmp_path))

  def folder():
    with pytest.raises(SystemExit, match='num_seeds is 0'):
      compare.main(['compare'])
    return jax.config.jax_compilation_cache_dir

  known = jax.config.jax_compilation_cache_dir
  assert known  # the tests' own goes before a config's
  assert folder() == known
  try:
    jax.config.update('jax_compilation_cache_dir', None)
    found = folder()
  finally:
    jax.config.update('jax_compilation_cache_dir', known)
  assert found == str(tmp_path / '.cache/optax_spd')
