"""A mistake in a command line is told in one line, by every command."""

import json
import subprocess
import sys

import pytest

# A fork for each command line, of a process that has imported everything.
_FORKS = """
import json, os, runpy, sys, tempfile, traceback
from experiments import benchmark, compare, main, report
def run(program, arguments):
  with tempfile.TemporaryFile('w+') as printed:
    if not (child := os.fork()):
      os.dup2(printed.fileno(), 1)
      os.dup2(printed.fileno(), 2)
      sys.argv[1:] = arguments
      for flag in ('case', 'model', 'dtype', 'layout', 'steps', 'topology',
                   'growth', 'output_dir', 'batch_size', 'image_size',
                   'in_flight', 'methods'):
        delattr(benchmark.FLAGS, flag)  # of the import
      try:
        runpy.run_module(f'experiments.{program}', run_name='__main__',
                         alter_sys=True)
      except SystemExit as end:  # Python itself takes longer to end
        print(end.code, flush=True)
        os._exit(1)
      except BaseException:
        traceback.print_exc()
      os._exit(0)
    _, status = os.waitpid(child, 0)
    printed.seek(0)
    return os.waitstatus_to_exitcode(status), printed.read()
json.dump([run(*line) for line in json.load(sys.stdin)], sys.stdout)
"""

_STUDIES = {
  'type.py': "def get_config():\n  c = base()\n  c.batch_size = 'x'\n",
  'syntax.py': 'def get_config(:\n',
  'unknown.py': 'def get_config():\n  c = base()\n  c.learning_rat = 1.0\n'
  '  return c\n',
  'none.py': 'def get_config():\n  return None\n',
}

LINES = [
  # (program, arguments, what the line says)
  *(
    (program, [*config, f'--config.{key}'], message)
    for program, config in (
      ('compare', []),
      ('compare', ['--config=elpv']),
      ('main', ['--config', 'elpv']),
    )
    for key, message in (
      ('nosuch=1', "--config.nosuch: no key of the config is 'nosuch'"),
      ('batch_size=abc', 'batch_size=abc: invalid literal for int()'),
    )
  ),
  ('compare', ['--config.train.nosuch=5'], "is 'nosuch'"),
  ('compare', ['--config.eval_sets.x.limit=5'], "no key of the config is 'x'"),
  ('compare', ['--config.train.limit=x'], 'limit=x: invalid literal for int()'),
  ('compare', ['--config.eval_sets.ID.limit=0'], 'limit is 0'),
  ('compare', ['--config.train.only=imagenet_a'], 'only'),
  ('compare', ['--config.train.corruption.name=fog'], "'severity'"),
  ('compare', ['--config.methods.adamw.spd=x'], 'spd=x: could not convert'),
  ('compare', ['--config.methods.foo.spd=1'], "is 'foo'"),
  ('compare', ['--config.model=3'], 'is not a dict'),
  ('compare', ["--config.model={'name': 'x'}"], 'model.drop_path is missing'),
  ('compare', ['--config.model.name.x=3'], '--config.model.name.x'),
  ('compare', ['--config.crop_scale=(0.5,)'], 'crop_scale is (0.5,)'),
  ('compare', ['--config'], 'is no study'),
  ('compare', ['--config=type.py'], 'line 5: TypeError: Could not override'),
  ('compare', ['--config=syntax.py'], 'syntax.py, line 3: SyntaxError'),
  ('compare', ['--config=none.py'], 'get_config returned NoneType'),
  (
    'compare',
    ['--config=unknown.py'],
    'config.learning_rat is no key of a study; did you mean learning_rate?',
  ),
  ('compare', ['--config=syntax'], 'nor the path of a .py file'),
  ('compare', ['--seeds=x'], '--seeds=x: invalid literal for int()'),
  ('compare', ['--flagfile=none'], 'Unable to open flagfile'),
  ('compare', ['--config.profile=3'], 'compare does not read it'),
  ('main', ['--config.num_seeds=3'], 'main does not read it'),
  ('main', ['--seed=x'], '--seed=x: invalid literal for int()'),
  ('main', ['--method=adamw', '--config.profile=101'], 'has 100 steps'),
  ('benchmark', ['--nosuch'], "Unknown command line flag 'nosuch'"),
  ('benchmark', ['--config.x=1'], "Unknown command line flag 'config.x'"),
  ('benchmark', ['--config=elpv', '--config.x=1'], "is 'x'"),
  ('benchmark', ['--config=elpv', '--config.train.limit=1'], 'not read it'),
  ('benchmark', ['--config=elpv', '--config.eval_every=8'], 'not read it'),
  ('benchmark', ['--methods=adamw'], '--methods has no effect with no --co'),
  ('benchmark', ['--batch_size=8'], 'effect with --case=optimizer'),
  ('benchmark', ['--growth', '--image_size=8'], 'effect with --growth'),
  ('gpu_check', ['--nosuch'], "Unknown command line flag 'nosuch'"),
  ('gpu_check', ['--parts=x'], '--parts has no x; it knows card_float32'),
  ('report', [], 'ROWS.jsonl'),
  ('report', ['--nosuch'], 'ROWS.jsonl'),
  ('report', ['none.jsonl'], "No such file or directory: 'none.jsonl'"),
  ('report', ['none.py'], 'none.py, line 1 is no JSON'),
]


@pytest.fixture(scope='module')
def told(tmp_path_factory):
  """What each of `LINES` ends with: the exit status, and what it prints."""
  folder = tmp_path_factory.mktemp('studies')
  for name, text in _STUDIES.items():
    head = 'from experiments.configs.images import base\n\n'
    (folder / name).write_text(head + text)
  lines = [(program, arguments) for program, arguments, _ in LINES]
  done = subprocess.run(
    [sys.executable, '-W', 'ignore', '-c', _FORKS],
    cwd=folder,
    input=json.dumps(lines),
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout)


@pytest.mark.parametrize('i', range(len(LINES)))
def test_a_mistake_is_a_line(told, i):
  (program, _, message), (status, printed) = LINES[i], told[i]
  assert status == 1, printed
  assert message in printed
  (line,) = printed.strip().splitlines()
  assert line.startswith(f'{program}: ')
