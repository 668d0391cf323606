"""One study: every method side by side, on the same data and budget.

python -m experiments.compare [--config=STUDY[:ARG]] [--seeds=N] [--full]
                              [--methods=A,B] [--config.KEY=VALUE]

STUDY is a file of experiments/configs, elpv if it is left out. Prints a table;
writes it, the rows, their histories, figures and report.html, a page with all
of that, to config.output_dir; of every run also what it made of the examples
(outputs/) and what SPD did in each layer (layers/). The same command goes on
with a study that was stopped: a row that is written there is not run again.
Where the config has tuning_seeds, its config.sweep is run and chosen from
first, by ID validation alone; sweep.md is the table of that, and controls.md
that of config.controls.
"""

import dataclasses
import pathlib
import sys

from absl import flags, logging

from experiments import (
  cli,
  evidence,
  log,
  page,
  report,
  resume,
  runs,
  study,
  sweep,
)


def configure(config, *, seeds=None, methods=None, full=False):
  """Makes a config what the flags ask for, and checks it.

  Args:
    config: a study; it is changed.
    seeds: number of seeds, or None for the config's own.
    methods: keys of `config.methods` to run, or None for all but the optional.
    full: whether to train the whole network, whatever the config's first block.

  Returns:
    The sources of its sets, as `study.check`.

  Raises:
    ValueError, OSError, ModuleNotFoundError: of a study that could not end, as
    `study.check` and `cli.check_output`.
  """
  if seeds is not None:
    config.num_seeds = seeds
  if methods is None:
    methods = [k for k, method in config.methods.items() if not method.optional]
  else:
    unknown = [name for name in methods if name not in config.methods]
    if unknown:
      raise ValueError(
        f'--methods has no {", ".join(unknown)}; it knows '
        f'{", ".join(config.methods)}.'
      )
  with config.unlocked():
    left = set(config.methods) - set(methods)
    for name in left:
      del config.methods[name]
    for name in left & set(config.sweep):
      del config.sweep[name]
    for name, others in config.controls.items():
      kept = [other for other in others if other not in left]
      if name in left or (others and not kept):
        del config.controls[name]
      elif len(kept) < len(others):
        config.controls[name] = tuple(kept)
  if full:
    config.first_block = 0
  sources = study.check(config)
  cli.check_output(config.output_dir)
  return sources


def run(config, fine_tuning, saved):
  """Runs what a study says, but for what is there.

  Args:
    config: the study.
    fine_tuning: as `study.load` returns it.
    saved: a `resume.Saved`, to which every new row is added: dicts of method,
      label, seed, metrics of 'val' and of every set, deviation, what SPD did as
      `train.FineTuning.describe` tells it, step, seconds, the share of them
      that the step waited for data, history. Where the study is tuned, they
      have phase ('tuning', 'final' or 'control'), family and settings too;
      final rows and controls also the reading of the tuning ('id', 'one_se')
      that they are of, a list, empty where a method is not tuned; controls what
      they are matched_to.
  """
  num_val = len(fine_tuning.sets['val'].source)
  for plan in sweep.passes(config, saved.rows, num_val):
    for note in plan.notes:
      print(note)
    if todo := missing(plan, saved):
      # What an earlier pass kept, the ones after this may need no more.
      saved.forget(but={*plan.keep, *plan.config.methods})
      _run_pass(plan, todo, fine_tuning, saved)
  saved.forget()


def _run_pass(plan, todo, fine_tuning, saved):
  """The runs of a `sweep.Pass` that are `missing`."""
  config, methods = plan.config, plan.config.methods
  for method in methods.values():
    runs.adapt(fine_tuning, method, 0)  # refuses one before others have run
  needed = {(sweep.parent(methods[name]), seed) for name, seed in todo}
  steps = sum(
    plan.stops.get(name, config.num_steps)
    for name, _ in todo
    if methods[name].optimizer
  )
  with cli.progress(steps, 'training', 'step') as bar:

    def count(history, layers):
      gathered.add(layers)
      if len(history) == 1:
        bar.set_description(f'{label}, seed {seed}')
      bar.set_postfix(loss=f'{history[-1]["loss"]:.3f}', refresh=False)
      bar.update()

    for name, seed in todo:
      method, about = methods[name], plan.about.get(name, {})
      label = about.get('label', report.label(method))
      if method.optimizer:
        bar.set_description(f'{label}, seed {seed}: compilation')
      tuning = _stopped(
        runs.adapt(fine_tuning, method, seed), plan.stops.get(name)
      )
      start = None
      if parent := sweep.parent(method):
        of_parent = runs.adapt(fine_tuning, methods[parent], seed)
        start = saved.restore(of_parent, parent, seed)
      if method.average_of:
        tuning = of_parent
        result = runs.average(config, tuning, name, start)
      else:
        start, gathered = start and start.params, log.LayerLog()
        result = runs.run(config, tuning, name, seed, start, count)
        runs.write_layers(config, tuning, name, seed, gathered)
      if (name, seed) in needed or name in plan.keep:
        saved.keep(name, seed, result)
      bar.set_description(f'{label}, seed {seed}: evaluation')
      if not saved.has(name, seed):
        saved.add(runs.row(config, tuning, name, seed, result) | about)


def _stopped(tuning, stop):
  """The same, but for runs that end after a step, under the same schedule."""
  if stop is None:
    return tuning
  config = tuning.config.copy_and_resolve_references()
  config.update(num_steps=stop, eval_every=stop)
  return dataclasses.replace(tuning, config=config)


def missing(plan, saved):
  """What is to be run, (method, seed): parents before what needs them.

  A run that others start from or average is repeated where neither they nor its
  params are there, but its row is.
  """
  methods = dict(
    sorted(plan.config.methods.items(), key=lambda item: sweep.rank(item[1]))
  )
  found = []
  for seed in plan.seeds:
    # Children first: what they need is known then.
    own = set()
    for name in reversed(methods):
      is_needed = any(sweep.parent(methods[child]) == name for child in own)
      if not saved.has(name, seed) or (
        is_needed and not saved.is_kept(name, seed)
      ):
        own.add(name)
    found += [(name, seed) for name in methods if name in own]
  return found


def compare(config, sources):
  """Runs a study, prints and writes its report.

  Args:
    config: the study, checked.
    sources: as `configure` returned it.
  """
  print(report.heading(config.title, config.num_seeds), flush=True)
  folder = pathlib.Path(config.output_dir)
  saved = resume.Saved(config, runs.provenance(config))
  if saved.rows:
    print(f'{folder}/ has {len(saved.rows)} rows, which are not run again.')
  plans = sweep.passes(config, saved.rows, len(sources['val']))
  if any(missing(plan, saved) for plan in plans):
    run(config, study.load(config, sources, cli.progress), saved)
  rows, files = saved.rows, ['table.md', 'rows.jsonl', 'results.json']
  if config.tuning_seeds:
    phases = ('tuning', 'final', 'control')
    tuned, rows, controls = (
      [row for row in saved.rows if row['phase'] == phase] for phase in phases
    )
    report.write(folder / 'sweep.md', sweep.table(tuned, rows) + '\n')
    files.append('sweep.md')
    if controls:
      table = report.table(controls, config.means)
      report.write(folder / 'controls.md', table + '\n')
      files.append('controls.md')
  table = report.table(rows, config.means)
  report.write(folder / 'table.md', table + '\n')
  files += page.write(folder, saved.rows)
  print(f'\n{table}\n')
  print(
    'selected, decayed: share of the decisions, one a layer and step, in which '
    'SPD\nselected the layer and pulled it back. step: the best on ID '
    'validation. seconds:\nof training; the first run of a method compiles '
    'it.\n'
  )
  for group in filter(evidence.is_idle, report.group(rows)):
    print(
      f'{group[0]["label"]} pulled back in under {evidence.ACTS:.0%} of its '
      'decisions: it did not act,\nand says nothing for or against SPD.\n'
    )
  if (folder / 'pictures').exists():
    files.append('pictures/')
  print(f'{folder}/: {", ".join(files)}')


def main(argv):
  try:
    if argv[1:]:
      raise ValueError(f'{argv[1]!r} is no flag; see --help.')
    values = flags.FLAGS
    study.normalise(values.config)
    cli.keep_programs(values.config.cache_dir)
    sources = configure(
      values.config,
      seeds=values.seeds,
      methods=values.methods,
      full=values.full,
    )
  except (ValueError, OSError, ModuleNotFoundError) as error:
    sys.exit(f'compare: {error}')
  try:
    compare(values.config, sources)
  except FloatingPointError as error:
    sys.exit(f'\ncompare: {error} The rows before it are written.')
  except (ValueError, OSError) as error:  # of an image, a label, a full disk
    sys.exit(f'\ncompare: {error}')


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  flags.DEFINE_integer('seeds', None, 'Seeds to run; config.num_seeds.')
  flags.DEFINE_list('methods', None, 'Of config.methods; all but the optional.')
  flags.DEFINE_bool('full', False, 'Train the whole network.')
  # That experiments.main reads.
  of_main = ('save_every', 'keep', 'log_every', 'tensorboard', 'profile')
  cli.define_config('compare', unread=of_main)
  __doc__ += f'\nThe study:\n\n{flags.FLAGS["config"].value}'
  cli.run('compare', main)
