"""All that wants a GPU, in one run of at most ten minutes.

pip install '.[demo,test]' 'jax[cuda13]'     # torch too, for its fused AdamW
python -m experiments.gpu_check [--parts=A,B] [--minutes=10] [--small]
    [--output_dir=DIR] [--results=FILE]

Measures the card's copy bandwidth and the optimizers of a ViT-B/16 beside it,
its train steps with and without LoRA, runs the study ELPV, and the library's
tests. Every part is a command of its own, so that none takes memory or time
from another; what it prints lies in --output_dir. Rows, with the card's name,
are appended to --results, experiments/results/gpu.jsonl, and the table of costs
is printed. --small shrinks all of it, as it does by itself where there is no
GPU; the rows then go to --output_dir.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from absl import flags

from experiments import cli, report

_ROOT = pathlib.Path(__file__).parents[1]
_RESULTS = _ROOT / 'experiments/results/gpu.jsonl'


def commands(folder, small):
  """What is run, the most wanted first.

  Args:
    folder: a subfolder of it for every part.
    small: whether it is to take minutes on a CPU.

  Returns:
    `{part: arguments of Python}`.
  """
  steps = ['--steps=2'] if small else ['--steps=10', '--in_flight=10']
  optimizer = ['--model=dinov2_s14' if small else '--model=vit_b16']
  train = ['--model=vit_b16', '--image_size=224', '--batch_size=128']
  if small:
    train = ['--model=dinov2_s14', '--image_size=28', '--batch_size=2']
  found = {}

  def add(part, module, *arguments):
    output = 'config.output_dir' if module == 'compare' else 'output_dir'
    found[part] = ['-m', f'experiments.{module}', f'--{output}={folder / part}']
    found[part] += arguments

  for dtype in ('float32', 'bfloat16'):
    add(f'card_{dtype}', 'card', f'--dtype={dtype}', *optimizer, *steps)
  for case in ('train', 'lora'):
    for dtype in ('float32', 'bfloat16'):
      flag = [f'--case={case}', f'--dtype={dtype}', *train, *steps]
      add(f'{case}_{dtype}', 'benchmark', *flag)
  tests = ['-n', '8', 'tests/optax_spd', 'optax_spd']
  if small:
    tests = ['-n', '0', 'tests/optax_spd/test_decay.py']
  # Eight devices are forced on CPUs alone.
  found['tests'] = ['-m', 'pytest', '-q', '-m', 'not eight_devices', *tests]
  study = ['--methods=linear_probe,adamw,spd_03,spd_1']
  if small:
    study += ['--config.num_steps=2', '--config.eval_every=2']
  add('elpv', 'compare', *study)
  return found


def environment(part, backend):
  """Variables of a part, beside those of this process."""
  if part != 'tests':
    return {}
  return {
    'JAX_PLATFORMS': 'cuda' if backend == 'gpu' else backend,
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '0',  # the programs that users run
    'JAX_DEFAULT_MATMUL_PRECISION': 'highest',  # no TF32
    'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',  # several workers on one card
  }


def run(parts, folder, minutes, backend):
  """Runs commands one after the other, as far as the time goes.

  Args:
    parts: of `commands`.
    folder: of their logs, and of the folders with their rows.
    minutes: for all of them.
    backend: 'gpu' or 'cpu', for the tests.

  Yields:
    Of each part its name, whether it succeeded, its time and last line, and its
    rows.
  """
  end = time.monotonic() + 60 * minutes
  folder.mkdir(parents=True, exist_ok=True)
  for part, arguments in parts.items():
    since = time.monotonic()
    log, path = folder / f'{part}.log', folder / part / 'rows.jsonl'
    path.unlink(missing_ok=True)
    with log.open('w') as file:
      child = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=_ROOT,
        env={**os.environ, **environment(part, backend)},
        stdout=file,
        stderr=subprocess.STDOUT,
        start_new_session=True,
      )
      try:
        child.wait(max(end - since, 0))
      except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # its workers too
        child.wait()
        file.write(f'\nended: {minutes:g} minutes for all parts are over')
    last = log.read_text().rstrip().rpartition('\n')[2]
    rows = report.read_jsonl(path) if path.exists() else []
    if part == 'tests':
      counts = re.findall(r'(\d+) (passed|failed|skipped|errors?)', last)
      rows = [{'case': part, **{name: int(count) for count, name in counts}}]
    seconds = time.monotonic() - since
    rows = [{'part': part, **row} for row in rows]
    yield part, child.returncode == 0, f'{seconds:.0f} s: {last}', rows


def _backend():
  """JAX's, asked for in a process that gives the card back."""
  code = 'import jax; print(jax.default_backend())'
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  return done.stdout.strip()


def _main(argv):
  if argv[1:]:
    sys.exit(f'gpu_check: {argv[1]!r} is no flag; see --help.')
  values = flags.FLAGS
  folder = pathlib.Path(values.output_dir).expanduser().resolve()
  known = list(commands(folder, small=True))
  unknown = [part for part in values.parts or () if part not in known]
  if unknown:
    sys.exit(
      f'gpu_check: --parts has no {", ".join(unknown)}; it knows '
      f'{", ".join(known)}.'
    )
  backend = _backend()
  parts = commands(folder, values.small or backend == 'cpu')
  parts = {part: parts[part] for part in values.parts or known}
  results = _RESULTS if backend == 'gpu' else folder / 'rows.jsonl'
  if values.results:
    results = pathlib.Path(values.results).expanduser()
  rows, failed, about = [], [], {}
  for part, succeeded, line, found in run(
    parts, folder, values.minutes, backend
  ):
    print(f'{part}{"" if succeeded else " failed"}, {line}', flush=True)
    failed += [] if succeeded else [part]
    for row in found:  # those of the tests do not say where they ran
      about = about or {k: row[k] for k in ('commit', 'device') if k in row}
      rows.append(about | row)
    # At once: the machine may be gone before the end.
    with open(results, 'a') as file:
      file.writelines(json.dumps(about | row) + '\n' for row in found)
  costs = [row for row in rows if 'ms' in row]
  print(f'\n{report.speeds(costs)}\n' if costs else '')
  if failed:
    sys.exit(f'gpu_check: {", ".join(failed)} failed; see {folder}/*.log.')


if __name__ == '__main__':
  flags.DEFINE_list('parts', None, 'Of the parts; all.')
  flags.DEFINE_float('minutes', 10, 'For all of them.', lower_bound=0)
  flags.DEFINE_bool('small', False, 'As where there is no GPU.')
  flags.DEFINE_string('output_dir', 'runs/gpu', 'For what the parts write.')
  flags.DEFINE_string('results', None, 'The file to append rows to.')
  cli.run('gpu_check', _main)
