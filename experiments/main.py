"""One run of a study: a method, a seed, and checkpoints to go on from.

python -m experiments.main [--config=STUDY[:ARG]] --method=NAME [--seed=N]
                           [--distributed=auto] [--config.KEY=VALUE]

The same command goes on where a run was stopped or killed. On several machines
start it in one process on each, with --distributed. Writes checkpoints, the
metrics of the steps, and at the end the rows of the method and of its averages
to config.output_dir/METHOD_SEED; `python -m experiments.report` prints the
table of the rows of several runs.
"""

import hashlib
import json
import os
import pathlib
import sys

import jax
from absl import flags, logging

from experiments import (
  checkpoint,
  checks,
  cli,
  files,
  log,
  optimizers,
  parallel,
  report,
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
  opened = study.check(config)
  log.check(config)
  method = config.methods[name]
  folder = run_folder(config, name, seed)
  cli.check_output(folder)
  class_names = opened['train'].class_names
  if jax.process_index() == 0:
    (folder / CLASSES).write_text(json.dumps(class_names), 'utf-8')
  checkpoints = _checkpoints(config, name, seed) if method.optimizer else None
  if method.starts_from:
    best_step_of(config, method.starts_from, seed)
  model = study.load_model(config, class_names)
  fine_tuning, sets = study.load(config, opened, model, cli.progress)
  result = train.Run(fine_tuning.pretrained, None, {}, None, None)
  if method.optimizer:
    origin = None
    if method.starts_from:
      origin = best_of(config, fine_tuning, method.starts_from, seed)
    result = _train(config, fine_tuning, name, seed, origin, checkpoints)
  found = {name: result}
  for other, average in config.methods.items():
    if average.average_of == name:
      params = train.wise_ft(
        fine_tuning.pretrained, result.params, average.alpha
      )
      found[other] = train.Run(params, result.step, {}, None, None)
  about = {
    'title': config.title,
    **report.provenance(),
    'means': config.means.to_dict(),
  }
  rows = [
    {
      **about,
      'method': key,
      'label': report.label(config.methods[key]),
      'seed': seed,
      **fine_tuning.describe(one, sets),
    }
    for key, one in found.items()
  ]
  if jax.process_index() == 0:
    report.write_jsonl(folder / 'rows.jsonl', rows)
  return rows


def run_folder(config, name, seed):
  """Where a run of a study writes to."""
  return pathlib.Path(config.output_dir, f'{name}_{seed}')


def best_step_of(config, name, seed):
  """The step that another run of the study chose.

  Raises:
    FileNotFoundError: it has not ended.
    ValueError: its checkpoints are not of this study.
  """
  if (run_folder(config, name, seed) / 'checkpoints').exists():
    checkpoints = _checkpoints(config, name, seed, read_only=True)
    last = checkpoints.last_step
    if last == config.num_steps:
      return checkpoints.about(last).best_step
  raise FileNotFoundError(
    f'The run of {name!r} with seed {seed} has not ended, which this one '
    f'starts from; run --method={name} --seed={seed} first.'
  )


def best_of(config, fine_tuning, name, seed):
  """The params that another run of the study chose; see `best_step_of`."""
  like = fine_tuning.init(
    *optimizers.from_config(config, config.methods[name]),
    fine_tuning.pretrained,
  )
  like = checkpoint.abstract(like)
  step = best_step_of(config, name, seed)
  checkpoints = _checkpoints(config, name, seed, read_only=True)
  return checkpoints.restore(like, step)[0].shown


def _checkpoints(config, name, seed, read_only=False):
  about = config.to_dict()
  about['methods'] = {name: config.methods[name].to_dict()}
  # What is in the files: a clone elsewhere has them at another path.
  for key in ('prompts', 'class_names'):
    about[key] = ''
    if config[key] and config.head == 'zero_shot':
      text = files.expand(config[key]).read_bytes()
      about[key] = hashlib.sha256(text).hexdigest()
  # Its devices draw other random numbers.
  about |= {'seed': seed, 'pmap': config.layout == 'pmap'}
  folder = run_folder(config, name, seed) / 'checkpoints'
  return checkpoint.Checkpoints(folder, about, config.keep, read_only)


def _train(config, fine_tuning, name, seed, origin, checkpoints):
  method = config.methods[name]
  transform, strength = optimizers.from_config(config, method)
  with cli.progress(config.num_steps, report.label(method), 'step') as bar:
    watch = log.Log(
      run_folder(config, name, seed),
      config,
      lambda step: transform.rate(step, strength),
      transform.layer_names(fine_tuning.pretrained),
      bar,
    )
    return fine_tuning.run(
      transform, strength, seed, origin, watch, checkpoints
    )


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
    checks.normalise(values.config)
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
    folder = run_folder(values.config, values.method, values.seed)
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
  cli.define_config('main', unread=['num_seeds'])
  __doc__ += f'\nThe study:\n\n{flags.FLAGS["config"].value}'
  cli.run('main', main)
