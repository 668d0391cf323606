"""What runs where a GPU can be had, as far as a CPU can show it."""

import itertools
from types import SimpleNamespace as Object

import jax
import pytest
from absl import flags

from experiments import benchmark, card, gpu_check, parallel, report


@pytest.fixture
def clock(monkeypatch):
  """Every look at it takes a second."""
  ticks = itertools.count()
  monkeypatch.setattr(card.time, 'perf_counter', lambda: next(ticks))


def test_the_rows_of_a_card():
  case = benchmark.growing_case(4 * 64 * 32, 4)
  rows = card.measure(case, 2, 3, 2**20)
  copy, adamw, *others = rows[:4]
  assert [row['method'] for row in rows[:4]] == ['copy', *benchmark.METHODS]
  assert copy['bytes_accessed'] == 2**21
  assert copy['ms'] > 0
  assert adamw['in_flight'] == 3
  # There are no kernels on a CPU, and no PyTorch where it is not installed.
  for row in rows:
    assert 'kernel_ms' not in row
    assert row['copy_gb_s'] == 2**21 / copy['ms'] / 1e6
  assert adamw['ratio'] == 1
  assert all(row['ratio'] > 0 for row in others)


def test_a_copy_is_timed_by_the_call(clock):
  assert card.time_copies(2**10, 3, 10).tolist() == [0.1] * 3


def test_pytorch_s_adamw(clock):
  pytest.importorskip(
    'torch', reason="PyTorch is large, and of the extra 'reference' alone"
  )
  case = benchmark.growing_case(2 * 64 * 64, 2)
  (row,) = card.torch_rows(case, 3, 10, adamw_ms=50)
  assert row['ms'] == 100
  assert row['ratio'] == 2
  assert row['bytes_accessed'] == 7 * 4 * 2 * 64 * 64


def test_a_profile_of_a_cpu_holds_no_kernels_of_a_gpu():
  layout = parallel.layout(devices=jax.devices()[:1])
  case = benchmark.growing_case(64, 1)
  assert card.kernel_ms(case, 'adamw', layout, 1) == 0


def test_kernels_are_counted_once():
  def line(name, *events):
    events = [Object(name=n, duration_ns=ns) for n, ns in events]
    return Object(name=name, events=events)

  on_card = [
    line('Stream #13(Compute)', ('fusion', 5), ('MemcpyD2D', 100)),
    line('Stream #14(Compute)', ('fusion', 7)),
    line('XLA Modules', ('jit_step', 1000)),
  ]
  planes = [
    Object(name='/device:GPU:0', lines=on_card),
    Object(name='/host:CPU', lines=[line('Stream', ('python', 10_000))]),
  ]
  assert card.kernel_ns(Object(planes=planes)) == 12


def test_the_table_of_speeds():
  about = {'device': 'NVIDIA X, 16 cores', 'case': 'optimizer'}
  on_card = {**about, 'copy_gb_s': 1000.0, 'bytes_accessed': 4e9}
  rows = [
    {**on_card, 'method': 'copy', 'ms': 4.0},
    {**on_card, 'method': 'adamw', 'ms': 9.0, 'kernel_ms': 5.0, 'ratio': 1.0},
    {**on_card, 'method': 'spd', 'ms': 18.0, 'kernel_ms': 8.0, 'ratio': 2.0},
    {**about, 'method': 'adamw', 'ms': 9.0, 'ratio': 1.0}
    | {'ratio_quartiles': [1.0, 1.0]},
  ]
  cells = [
    [cell.strip() for cell in line.split('|')[3:-1]]
    for line in report.speeds(rows).splitlines()[2:]
  ]
  assert cells == [
    ['copy', '4.00', '-', '-', '-', '1000', '100%'],
    ['adamw', '9.00', '1.00', '5.00', '1.00', '800', '80%'],
    ['spd', '18.00', '2.00', '8.00', '1.60', '500', '50%'],
    ['adamw', '9.00', '1.00 (1.00 to 1.00)', '-', '-', '-', '-'],
  ]
  assert ' NVIDIA X |' in report.speeds(rows)


@pytest.mark.parametrize('small', [False, True])
def test_flags_of_the_benchmark_are_known(tmp_path, small):
  found = gpu_check.commands(tmp_path, small)
  for part, (_, module, *arguments) in found.items():
    if module in ('experiments.card', 'experiments.benchmark'):
      assert f'--output_dir={tmp_path / part}' in arguments
      known = flags.FlagValues()
      known.append_flag_values(benchmark.FLAGS)
      assert known(['', *arguments]) == ['']
  first, *_, last = found
  assert (first, last) == ('card_float32', 'elpv')


def test_parts_run_one_after_the_other(tmp_path):
  write = (
    f"open({str(tmp_path / 'a/rows.jsonl')!r}, 'w').write('{{\"ms\": 1}}')"
  )
  (tmp_path / 'a').mkdir()
  parts = {
    'a': ['-c', write],
    'b': ['-c', 'raise SystemExit("no luck")'],
    'tests': ['-c', 'print("2 failed, 31 passed, 1 skipped in 4.0s")'],
  }
  a, b, tests = gpu_check.run(parts, tmp_path, 1, 'cpu')
  assert a[:2] == ('a', True)
  assert a[3] == [{'part': 'a', 'ms': 1}]
  assert b[:2] == ('b', False)
  assert b[2].endswith(' s: no luck')
  counts = {'failed': 2, 'passed': 31, 'skipped': 1}
  assert tests[3] == [{'part': 'tests', 'case': 'tests', **counts}]


def test_the_time_of_all_parts_is_bounded(tmp_path):
  sleep = {name: ['-c', 'import time; time.sleep(60)'] for name in 'ab'}
  a, b = gpu_check.run(sleep, tmp_path, 2 / 60, 'cpu')
  assert [a[1], b[1]] == [False, False]
  assert 'for all parts are over' in a[2]
