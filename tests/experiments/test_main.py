"""A run in processes of its own: stopped, killed, on several machines."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.configs import elpv
from tests.experiments import kinds, tiny_study

_TIMES = ('images_per_second', 'seconds_left', 'peak_bytes')
_OF_ROWS = ('seconds', 'waiting', 'command')


_started = []


@pytest.fixture(autouse=True)
def nothing_is_left_running():
  yield
  while _started:
    process = _started.pop()
    process.kill()
    process.wait()
    process.stdout.close()


class Runs:
  """Starts `tiny_main` on a study of `kinds`, and reads its files."""

  def __init__(self, noise, folder, kind='classification', **config):
    self.folder = folder / 'spd_1_0'
    self._command = [
      sys.executable,
      '-m',
      'tests.experiments.tiny_main',
      f'--config={kinds.KINDS[kind].module.__file__}:{noise}',
      '--method=spd_1',
      f'--config.output_dir={folder}',
      *[f'--config.{key}={value}' for key, value in config.items()],
    ]

  def start(self, *flags, delay=0.0, full_at=0, devices=1):
    process = subprocess.Popen(
      [*self._command, *flags],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env={
        **os.environ,
        'TINY_DELAY': str(delay),
        'TINY_FULL_AT': str(full_at),
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES': 'none',
      },
    )
    _started.append(process)
    return process

  def run(self, *flags, **options):
    process = self.start(*flags, **options)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed

  def lines(self, name='metrics.jsonl'):
    path = self.folder / name
    text = path.read_text() if path.exists() else ''
    return [
      json.loads(line)
      for line in text.splitlines(keepends=True)
      if line.endswith('\n')
    ]

  def step(self):
    """The last one that is written down."""
    return max((line.get('step', 0) for line in self.lines()), default=0)

  def wait_for_step(self, step, process):
    while self.step() < step and process.poll() is None:
      time.sleep(0.01)

  def result(self):
    """All that a run leaves behind, but for what time it took."""
    steps = self.folder / 'checkpoints'
    last = max(int(path.name) for path in steps.iterdir())
    with ocp.CheckpointManager(
      steps,
      item_handlers={
        'state': ocp.StandardCheckpointHandler(),
        'history': ocp.StandardCheckpointHandler(),
        'run': ocp.JsonCheckpointHandler(),
      },
    ) as manager:
      found = manager.restore(last)
    about = dict(found['run']['about'])
    del about['seconds'], about['waited']
    return {
      'kept': sorted(path.name for path in steps.iterdir()),
      'state': found['state'],
      'history': found['history'],
      'about': about,
      'metrics': [_without(line, _TIMES) for line in self.lines()],
      'layers': self.lines('layers.jsonl'),
      'rows': [_without(row, _OF_ROWS) for row in self.lines('rows.jsonl')],
    }


def _without(line, keys):
  return {key: value for key, value in line.items() if key not in keys}


def assert_same(result, wanted):
  """Bit by bit."""
  arrays = ('state', 'history')
  for name in arrays:
    flat, flat_wanted = (
      ocp.tree.to_flat_dict(one[name], keep_empty_nodes=False)
      for one in (result, wanted)
    )
    assert flat.keys() == flat_wanted.keys()
    for key, value in flat.items():
      np.testing.assert_array_equal(value, flat_wanted[key], str(key))
  for name in wanted.keys() - set(arrays):
    assert result[name] == wanted[name], name


@pytest.mark.slow
@pytest.mark.parametrize('kind', kinds.KINDS)
def test_killed_at_any_moment_it_ends_bit_equal(noise, tmp_path, kind):
  config = {'num_steps': 90, 'save_every': 3, 'log_every': 1}
  # All that is drawn at random, and all that a step hands on to the next.
  config |= {'ema': 0.9, 'accumulate': 2, **kinds.KINDS[kind].everything}
  whole = Runs(noise, tmp_path / 'whole', kind, **config)
  printed = whole.run()
  assert 'Adam-SPD 1' in printed
  assert np.mean([line['decayed'] for line in whole.lines()]) > 0.05

  killed = Runs(noise, tmp_path / 'killed', kind, **config)
  rng = random.Random(0)
  in_a_save = {3, 7, 11, 15, 19}
  for life in range(kinds.KINDS[kind].lives):
    process = killed.start(delay=0.05)
    killed.wait_for_step(killed.step() + rng.randint(0, 3), process)
    if life in in_a_save:
      steps = killed.folder / 'checkpoints'
      while not list(steps.glob('*.orbax-checkpoint-tmp*')):
        assert process.poll() is None
        time.sleep(0.001)
    else:
      time.sleep(rng.uniform(0, 0.3))
    assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
  assert 0 < killed.step() < 90
  killed.run()
  assert_same(killed.result(), whole.result())
  # Of a run that has ended: the same rows, and no step.
  before = killed.lines()
  killed.run()
  assert killed.lines() == before
  assert_same(killed.result(), whole.result())


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(noise, tmp_path):
  whole, stopped = (Runs(noise, tmp_path / name) for name in ('a', 'b'))
  whole.run()
  process = stopped.start(delay=0.1)
  stopped.wait_for_step(4, process)
  process.send_signal(signal.SIGTERM)
  printed, _ = process.communicate(timeout=60)
  assert process.returncode == 0, printed
  step = int(printed.split('stopped after step ')[1].split()[0])
  assert 4 <= step < 24
  assert (stopped.folder / f'checkpoints/{step}').is_dir()
  stopped.run()
  # Beside the last two and the best the first has the step of the signal.
  result, wanted = stopped.result(), whole.result()
  del result['kept'], wanted['kept']
  assert_same(result, wanted)


@pytest.mark.slow
def test_two_processes(noise, tmp_path):
  whole, shared = (Runs(noise, tmp_path / name) for name in ('a', 'b'))
  whole.run()

  def start(layout):
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    return [
      shared.start(
        f'--distributed=localhost:{port},2,{i}',
        f'--config.layout={layout}',
        delay=0.1,
        devices=4,
      )
      for i in range(2)
    ]

  # A notice to one of them stops both; no process has all params.
  first, second = start('fsdp')
  shared.wait_for_step(4, first)
  second.send_signal(signal.SIGTERM)
  for process in (first, second):
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert 'the same command goes on' in printed
  saved = next((shared.folder / 'checkpoints').glob('*/state/_sharding'))
  lie = map(json.loads, json.loads(saved.read_text()).values())
  assert any(one['partition_spec'] == ['fsdp'] for one in lie)
  # One that dies does not leave the other one waiting.
  first, second = start('replicated')
  shared.wait_for_step(shared.step() + 2, first)
  second.kill()
  since = time.monotonic()
  printed, _ = first.communicate(timeout=120)
  assert time.monotonic() - since < 60
  assert first.returncode != 0
  last = printed.rstrip().splitlines()[-1]
  assert last.startswith('main: process 0 '), printed
  assert 'Start all of them again' in last
  second.communicate()
  first, second = start('fsdp:4')
  for process in (first, second):
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
  for mine, alone in zip(shared.lines(), whole.lines(), strict=True):
    assert mine['step'] == alone['step']
    # Sums in another order.
    assert mine['loss'] == pytest.approx(alone['loss'], abs=1e-5)
    assert mine['decayed'] == pytest.approx(alone['decayed'], abs=0.05)
  (row,), (alone,) = shared.lines('rows.jsonl'), whole.lines('rows.jsonl')
  assert row['metrics'] == alone['metrics']
  assert row['step'] == alone['step']


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written(noise, tmp_path):
  runs = Runs(noise, tmp_path)
  process = runs.start(full_at=8)
  printed, _ = process.communicate(timeout=60)
  assert process.returncode == 1
  # Orbax's threads may still be printing why.
  told = re.search('main: A checkpoint cannot be written.*', printed)
  assert told, printed
  kept = sorted(path.name for path in (runs.folder / 'checkpoints').iterdir())
  kept = [name for name in kept if name.isdigit()]
  assert kept
  assert f'Those before it are untouched: {", ".join(kept)}.' in told[0]
  assert runs.step() < 24
  # What was there before it goes on.
  runs.run()
  assert runs.step() == 24


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--config.batch_size=1000', 'main: config.batch_size is 1000'),
    ('--method=', 'it is one of zero_shot, adamw, spd_1, after.'),
    ('--distributed=auto', 'knows of no cluster, give HOST:PORT,PROCESSES,IND'),
    ('adamw', "main: 'adamw' is no flag; see --help."),
  ],
)
def test_a_mistake_is_a_line(noise, tmp_path, flag, message):
  process = Runs(noise, tmp_path).start(flag)
  printed, _ = process.communicate(timeout=60)
  assert process.returncode == 1
  assert message in printed
  assert 'Traceback' not in printed


@pytest.mark.slow
def test_an_image_that_processes_cannot_read_is_the_last_line(tmp_path):
  tiny_study.write_images(tmp_path)
  for file in tmp_path.glob('noise/*/1*.png'):
    file.write_bytes(b'P6 30000 10000 255\n')
  run = Runs(tmp_path, tmp_path / 'runs', num_workers=1).start()
  printed, _ = run.communicate(timeout=300)
  assert run.returncode == 1
  last = printed.strip().splitlines()[-1]
  assert re.match(r'main: /.*/noise/[abc]/1\d?\.png \(19 bytes\) is not', last)
  assert 'Traceback' not in printed


def test_help_shows_the_study():
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.main', '--help'],
    capture_output=True,
    text=True,
    timeout=60,
  )
  for line in str(elpv.get_config()).splitlines():
    assert line in done.stdout
