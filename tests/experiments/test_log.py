"""What a run writes while it goes on, and drops where it begins again."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import log


class Bar:
  """A progress bar that remembers."""

  def __init__(self):
    self.n = 0

  def update(self, n=1):
    self.n += n

  def set_postfix(self, loss, refresh):
    self.loss = loss


@pytest.fixture
def config():
  return ConfigDict(
    {
      'num_steps': 10,
      'batch_size': 16,
      'log_every': 4,
      'tensorboard': False,
      'profile': 0,
    }
  )


def run(folder, config, steps, layers=('a', 'b')):
  """Tells a log of the steps; the loss of step i is i."""
  bar = Bar()
  watch = log.Log(folder, config, lambda step: step / 100, layers, bar)
  for step in steps:
    history = [
      {'loss': float(i), 'deviation': 10.0 * i, 'selected': 0.5, 'decayed': 0.0}
      for i in range(1, step + 1)
    ]
    watch(history, {'ratio': np.full(2, step)} if layers else {})
  return bar


def lines(folder, name='metrics.jsonl'):
  return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_lines_are_means_since_the_line_before(tmp_path, config):
  bar = run(tmp_path, config, range(1, 11))
  assert bar.n == 10
  assert bar.loss == '10.000'
  found = lines(tmp_path)
  assert [line['step'] for line in found] == [4, 8, 10]
  assert [line['loss'] for line in found] == [2.5, 6.5, 9.5]
  assert [line['deviation'] for line in found] == [40, 80, 100]
  assert [line['learning_rate'] for line in found] == [0.04, 0.08, 0.1]
  for line in found:
    assert (line['selected'], line['decayed']) == (0.5, 0)
    assert line['images_per_second'] > 0
    assert line['peak_bytes'] > 10_000_000
  assert found[-1]['seconds_left'] == 0
  names, *ratios = lines(tmp_path, 'layers.jsonl')
  assert names == {'layers': ['a', 'b']}
  assert ratios == [{'step': i, 'ratio': [i, i]} for i in (4, 8, 10)]


@pytest.mark.parametrize('last', [5, 6, 8])
def test_a_run_that_goes_on_writes_the_same(tmp_path, config, last):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  whole.mkdir()
  parts.mkdir()
  run(whole, config, range(1, 11))
  run(parts, config, range(1, 10))
  with (parts / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 9, "lo')  # it was killed
  bar = run(parts, config, range(last, 11))
  assert bar.n == 10
  for mine, wanted in zip(lines(parts), lines(whole), strict=True):
    for key in ('step', 'loss', 'deviation', 'learning_rate'):
      assert mine[key] == wanted[key]
  assert lines(parts, 'layers.jsonl') == lines(whole, 'layers.jsonl')


def test_without_spd_there_are_no_layers(tmp_path, config):
  run(tmp_path, config, range(1, 5), layers=())
  assert not (tmp_path / 'layers.jsonl').exists()
  assert len(lines(tmp_path)) == 1


def test_tensorboard_has_what_the_lines_have(tmp_path, config):
  config.tensorboard = True
  run(tmp_path, config, range(1, 11))
  (file,) = (tmp_path / 'tensorboard').iterdir()
  text = file.read_bytes()
  for name in ('loss', 'learning_rate', 'images_per_second', 'ratio/b'):
    assert name.encode() in text


def test_tensorboard_that_is_not_installed(config, monkeypatch):
  monkeypatch.setattr(log.importlib.util, 'find_spec', lambda name: None)
  log.check(config)
  config.tensorboard = True
  with pytest.raises(ModuleNotFoundError, match=r'extra `\.\[tensorboard\]`'):
    log.check(config)


def test_a_step_that_is_not_there_to_profile(config):
  config.profile = 10
  log.check(config)
  config.profile = 11
  with pytest.raises(ValueError, match=r'profile is 11, .* has 10 steps'):
    log.check(config)
