"""One study: every method side by side, on the same data and budget.

python -m experiments.compare [--config=STUDY[:ARG]] [--seeds=N] [--full]
                              [--methods=A,B] [--config.KEY=VALUE]

STUDY is a file of experiments/configs: elpv (the default), pacs, domainnet or
imagenet. Prints a table; writes it, the rows, their histories and two pictures
to config.output_dir.
"""

import importlib
import pathlib
import sys
import time

import jax
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from experiments import optimizers, report, study, train

_CONFIGS = pathlib.Path(__file__).parent / 'configs'


def configure(config, *, seeds=None, methods=None, full=False):
  """Makes a config what the flags ask for, and checks it.

  Args:
    config: a study; it is changed.
    seeds: number of seeds, or None for the config's own.
    methods: keys of `config.methods` to run, or None for all.
    full: whether to train the whole network, whatever the config's first block.

  Returns:
    The sources of its sets, as `study.check`.

  Raises:
    ValueError, OSError, ModuleNotFoundError: of a study that could not end, as
    `study.check` and `check_output`.
  """
  if seeds is not None:
    config.num_seeds = seeds
  if methods is not None:
    unknown = [name for name in methods if name not in config.methods]
    if unknown:
      raise ValueError(
        f'--methods has no {", ".join(unknown)}; it knows '
        f'{", ".join(config.methods)}.'
      )
    with config.unlocked():
      for name in set(config.methods) - set(methods):
        del config.methods[name]
  if full:
    config.first_block = 0
  opened = study.check(config)
  check_output(config)
  return opened


def check_output(config):
  """Makes the output folder; an OSError where nothing can be written to it."""
  folder = pathlib.Path(config.output_dir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / '.writable'
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise OSError(
      f'config.output_dir {str(folder)!r} cannot be written: '
      f'{error.strerror}; set --config.output_dir to a folder that can.'
    ) from error


def run(config, fine_tuning, sets, save=lambda rows: None):
  """Runs every method of the config with every seed.

  Args:
    config: the study.
    fine_tuning: as `study.load` returns it.
    sets: as `study.load` returns them.
    save: called with all rows so far, whenever there is a new one.

  Returns:
    The rows: dicts of method, label, seed, metrics of 'val' and of every set,
    deviation, shares of decisions selected and decayed, step, seconds, the
    share of them that the step waited for data, history.
  """
  rows = []
  methods = _in_order(config.methods)
  wanted = {m.starts_from for m in methods.values()}
  wanted |= {m.average_of for m in methods.values()}
  trained = sum(bool(method.optimizer) for method in methods.values())
  total = config.num_seeds * trained * config.num_steps
  with progress(total, 'training', 'step') as bar:

    def count(loss):
      bar.set_postfix(loss=f'{loss:.3f}', refresh=False)
      bar.update()

    for seed in range(config.num_seeds):
      runs = {}
      for name, method in methods.items():
        label = _label(method)
        bar.set_description(f'{label}, seed {seed}')
        start = time.perf_counter()
        result = train.Run(fine_tuning.pretrained, None, {}, None)
        if method.optimizer:
          origin = (
            runs[method.starts_from].params if method.starts_from else None
          )
          result = fine_tuning.run(
            *optimizers.from_config(config, method), seed, origin, count
          )
          if name in wanted:
            runs[name] = result
          seconds = time.perf_counter() - start
        elif method.average_of:
          averaged = runs[method.average_of]
          result = result._replace(
            params=train.wise_ft(
              fine_tuning.pretrained, averaged.params, method.alpha
            ),
            step=averaged.step,
          )
        bar.set_description(f'{label}, seed {seed}: evaluation')
        shares = {
          key: float(result.history[key].mean())
          if key in result.history
          else None
          for key in ('selected', 'decayed')
        }
        rows.append(
          {
            'method': name,
            'label': label,
            'seed': seed,
            'metrics': fine_tuning.evaluate(
              result.params, {'val': fine_tuning.val, **sets}
            ),
            'deviation': fine_tuning.deviation(result.params),
            **shares,
            'step': result.step,
            'seconds': seconds if method.optimizer else None,
            'waiting': result.waiting,
            'history': result.history,
          }
        )
        save(rows)
  return rows


def _label(method):
  if method.average_of:
    return f'{method.label} {method.alpha:g}'
  return method.label + ('' if method.spd is None else f' {method.spd:g}')


def _in_order(methods):
  """theta_0, what starts from it, what starts from those, what averages."""

  def rank(item):
    _, method = item
    if method.average_of:
      return 3
    return 2 if method.starts_from else bool(method.optimizer)

  return dict(sorted(methods.items(), key=rank))


def progress(total, description, unit='image'):
  return tqdm(
    total=total,
    desc=description,
    unit=unit,
    smoothing=0.1,
    dynamic_ncols=True,
    mininterval=0.5,
  )


def _title(config):
  if config.num_seeds > 1:
    return f'{config.title}: {config.num_seeds} seeds'
  return f'{config.title}: 1 seed, a demonstration, not evidence'


def compare(config, opened, model):
  """Runs a study, prints and writes its report.

  Args:
    config: the study, checked.
    opened: as `configure` returned it.
    model: as `study.load_model` returned it.
  """
  title = _title(config)
  print(title, flush=True)
  folder = pathlib.Path(config.output_dir)
  about = {
    'title': title,
    **report.provenance(),
    'means': config.means.to_dict(),
  }

  def save(rows):
    report.write_jsonl(folder / 'rows.jsonl', [{**about, **r} for r in rows])
    everything = {**about, 'config': config.to_dict(), 'rows': rows}
    report.write_json(folder / 'results.json', everything)

  rows = run(config, *study.load(config, opened, model, progress), save)
  table = report.table(rows, config.means)
  report.write(folder / 'table.md', table + '\n')
  report.plot_plane(rows, config.means, folder / 'plane.png', title)
  report.plot_steps(rows, folder / 'steps.png', title)
  print(f'\n{table}\n')
  print(
    'selected, decayed: share of the decisions, one a layer and step, in which '
    'SPD\nselected the layer and pulled it back. step: the best on ID '
    'validation. seconds:\ntraining and validation; the first run of a method '
    'compiles it.\n'
  )
  files = ('table.md', 'rows.jsonl', 'results.json', 'plane.png', 'steps.png')
  print(f'{folder}/: {", ".join(files)}')


def keep_programs(folder):
  """Lets the next run of a study start without compiling it again.

  `JAX_COMPILATION_CACHE_DIR` in the environment goes before `folder`.
  """
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update(
      'jax_compilation_cache_dir', str(pathlib.Path(folder).expanduser())
    )


def main(argv):
  try:
    if argv[1:]:
      raise ValueError(f'{argv[1]!r} is no flag; see --help.')
    values = flags.FLAGS
    keep_programs(values.config.cache_dir)
    opened = configure(
      values.config,
      seeds=values.seeds,
      methods=values.methods,
      full=values.full,
    )
    model = study.load_model(values.config, opened['train'].class_names)
  except (ValueError, OSError, ModuleNotFoundError) as error:
    sys.exit(f'compare: {error}')
  try:
    compare(values.config, opened, model)
  except FloatingPointError as error:
    sys.exit(f'\ncompare: {error} The rows before it are written.')


def _with_path(argument):
  """--config=NAME[:ARG] names a study; the flag wants the path of its file."""
  flag, equals, value = argument.partition('=')
  if flag.lstrip('-') != 'config':
    return argument
  name, colon, arg = value.partition(':')
  file = _CONFIGS / f'{name}.py'
  if not file.exists():
    if pathlib.Path(name).exists():
      return argument
    studies = [f.stem for f in _CONFIGS.glob('[!_]*.py') if f.stem != 'base']
    sys.exit(
      f'compare: --config={value} is no study: neither one of '
      f'{", ".join(sorted(studies))} nor the path of a file.'
    )
  if colon:  # else the flag shows a traceback of what it refuses
    try:
      importlib.import_module(f'experiments.configs.{name}').get_config(arg)
    except ValueError as error:
      sys.exit(f'compare: {error}')
  return f'{flag}{equals}{file}{colon}{arg}'


def _define_flags():
  flags.DEFINE_integer('seeds', None, 'Seeds to run; config.num_seeds.')
  flags.DEFINE_list('methods', None, 'Of config.methods; all.')
  flags.DEFINE_bool('full', False, 'Train the whole network.')
  if '--config' in sys.argv[:-1]:  # --config NAME
    i = sys.argv.index('--config')
    sys.argv[i : i + 2] = [f'--config={sys.argv[i + 1]}']
  sys.argv[1:] = [_with_path(argument) for argument in sys.argv[1:]]
  try:
    config_flags.DEFINE_config_file(
      'config',
      str(_CONFIGS / 'elpv.py'),
      'The study; --config.KEY=VALUE changes it.',
    )
  except (AttributeError, KeyError) as error:  # it has read sys.argv already
    while isinstance(error.args[0], Exception):
      error = error.args[0]
    message = ' '.join(error.args[0].split())
    sys.exit(f'compare: no key of the config is {message} See --help.')
  except (OSError, ValueError) as error:
    sys.exit(f'compare: {error}')


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  _define_flags()
  __doc__ += f'\nThe study:\n\n{flags.FLAGS["config"].value}'
  app.run(main)
