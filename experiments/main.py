"""One run of a study: a method, a seed, and checkpoints to go on from.

python -m experiments.main [--config=STUDY[:ARG]] --method=NAME [--seed=N]
                           [--distributed=auto] [--config.KEY=VALUE]

The same command goes on where a run was stopped or killed. On several machines
start it in one process on each, with --distributed. Writes checkpoints, the
metrics of the steps, and at the end the rows of the method and of its averages
to config.output_dir/METHOD_SEED; `python -m experiments.report` prints the
table of the rows of several runs.
"""

import json
import os
import sys

import jax
from absl import flags, logging

from experiments import (
  cli,
  log,
  optimizers,
  parallel,
  report,
  runs,
  study,
  train,
)

CLASSES = 'classes.json'  # in a run's folder: the names, a list
_AGAIN = (
  'Start all of them again with the same commands: they go on from the last '
  'checkpoint.'
)


def run(config, name, seed):
  """Runs a method of a study, or goes on with it.

  Args:
    config: the study; it is checked, and changed as `study.check` does.
    name: key of `config.methods`.
    seed: of the run.

  Returns:
    The rows: the method's, and those of the averages of it.

  Raises:
    ValueError, OSError, ModuleNotFoundError: saying what to change.
    FloatingPointError, train.Stopped: as `train.FineTuning.run`.
  """
  if name not in config.methods or config.methods[name].average_of:
    known = [k for k, m in config.methods.items() if not m.average_of]
    raise ValueError(
      f'--method={name} is none of the study; it is one of {", ".join(known)}.'
    )
  sources = study.check(config)
  log.check(config)
  method = config.methods[name]
  folder = runs.folder(config, name, seed)
  cli.check_output(folder)
  class_names = getattr(sources['train'], 'class_names', None)
  if class_names and jax.process_index() == 0:
    (folder / runs.CLASSES).write_text(json.dumps(class_names), 'utf-8')
  saved = runs.checkpoints(config, name, seed) if method.optimizer else None
  if method.starts_from:
    runs.chosen_step(config, method.starts_from, seed)
  fine_tuning = study.load(config, sources, cli.progress)
  tuning = runs.adapt(fine_tuning, method, seed)
  results = {name: _train(config, tuning, name, seed, saved)}
  for other, average in config.methods.items():
    if average.average_of == name:
      results[other] = runs.average(config, tuning, other, results[name])
  about = runs.provenance(config)
  rows = [
    about | runs.row(config, tuning, key, seed, result)
    for key, result in results.items()
  ]
  if jax.process_index() == 0:
    report.write_jsonl(folder / 'rows.jsonl', rows)
  return rows


def _train(config, tuning, name, seed, saved):
  method = config.methods[name]
  if not method.optimizer:
    return runs.run(config, tuning, name, seed)
  start = None
  if method.starts_from:
    start = runs.chosen_params(config, tuning, method.starts_from, seed)
  transform, hyperparams = optimizers.from_config(config, method)
  with cli.progress(config.num_steps, report.label(method), 'step') as bar:
    callback = log.Log(
      runs.folder(config, name, seed),
      config,
      lambda step: transform.rate(step, hyperparams),
      transform.layer_names(tuning.pretrained),
      bar,
    )
    return runs.run(config, tuning, name, seed, start, callback, saved)


def main(argv):
  values = flags.FLAGS
  try:
    if argv[1:]:
      raise ValueError(f'{argv[1]!r} is no flag; see --help.')
    if values.distributed:
      parallel.start(values.distributed)
      parallel.say_if_lost(
        f'\nmain: process {jax.process_index()} was killed, or lost touch with '
        f'another one, whose own message says why. {_AGAIN}'
      )
    study.normalise(values.config)
    cli.keep_programs(values.config.cache_dir)
    rows = run(values.config, values.method, values.seed)
  except train.Stopped as stopped:
    print(f'main: {stopped}; the same command goes on.')
    return
  except FloatingPointError as error:
    _fail(f'{error} The checkpoints before it are kept.')
  except (ValueError, OSError, ModuleNotFoundError) as error:
    _fail(error)
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    line = ' '.join(str(error).split())[:200]
    if 'RESOURCE_EXHAUSTED' in line:
      _fail(line)
    _fail(
      f'process {jax.process_index()} lost touch with another one, which has '
      f'probably ended; its own message says why. {_AGAIN} ({line})'
    )
  if jax.process_index() == 0:
    print(f'\n{report.table(rows, rows[0]["means"])}\n')
    folder = runs.folder(values.config, values.method, values.seed)
    print(f'{folder}/: {", ".join(sorted(p.name for p in folder.iterdir()))}')


def _fail(message):
  """Ends with a line, and at once.

  So that other processes of the run notice it, and no thread of a checkpoint
  that failed speaks after it.
  """
  sys.stdout.flush()
  print(f'\nmain: {message}', file=sys.stderr, flush=True)
  parallel.good_bye()
  os._exit(1)


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  flags.DEFINE_string('method', '', 'Of config.methods.')
  flags.DEFINE_integer('seed', 0, 'Of data order, augmentation, drop path.')
  flags.DEFINE_string(
    'distributed',
    '',
    "'auto' on a TPU pod or under SLURM; else HOST:PORT,PROCESSES,INDEX, the "
    'address of the first process.',
  )
  of_compare = ('num_seeds', 'tuning_seeds', 'sweep', 'controls')
  cli.define_config('main', unread=of_compare)
  __doc__ += f'\nThe study:\n\n{flags.FLAGS["config"].value}'
  cli.run('main', main)
