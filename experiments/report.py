"""Rows -> tables and JSON.

python -m experiments.report ROWS.jsonl ... [--reference=METHOD] [--output=DIR]
                             [--draws=NAME.npz]

Prints the table of each study's rows, and where there are several seeds that of
every method against the reference, adamw if it is left out. Of one study
--output writes the page and the figures that compare does, but for histories;
--draws writes what the intervals need of outputs/, to go with a copy of the
rows: beside NAME.jsonl lies NAME.npz.
"""

import functools
import importlib.metadata
import json
import operator
import os
import pathlib
import platform
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np

_TITLES = {
  'accuracy': 'acc',
  'balanced_accuracy': 'balanced acc',
  'auroc': 'AUROC',
  'ap': 'AP',
  'miou': 'mIoU',
  'pixel_accuracy': 'pixel acc',
}


def _value(set_name, metric):
  return lambda row: row['metrics'][set_name][metric]


def _mean(set_names, metric):
  """Of the sets that have the metric."""
  return lambda row: np.mean(
    [
      row['metrics'][name][metric]
      for name in set_names
      if metric in row['metrics'][name]
    ]
  )


class Score(NamedTuple):
  """The mean of a metric over sets: row -> float.

  Attributes:
    title: of the sets and the metric, as in tables.
    sets: names of those that have the metric.
    metric: its name.
  """

  title: str
  sets: tuple[str, ...]
  metric: str

  def __call__(self, row):
    return np.mean([row['metrics'][name][self.metric] for name in self.sets])


def scores(rows, means):
  """What a study is judged by: its first metric, ID and OOD.

  Args:
    rows: of a study.
    means: as `columns` takes them; the first one is OOD, or else all sets but
      the first.

  Returns:
    A `Score` of the ID set, and one of OOD sets or None where there are none.
  """
  by_set = rows[0]['metrics']
  first, *others = [name for name in by_set if name != 'val']
  metric = next(iter(by_set[first]))
  ood, names = next(iter(means.items()), (', '.join(others), others))
  names = tuple(name for name in names if metric in by_set[name])
  title = _TITLES.get(metric, metric)
  return (
    Score(f'{first} {title}', (first,), metric),
    Score(f'{ood} {title}', names, metric) if names else None,
  )


def columns(rows, means):
  """What the table shows of a row.

  Every metric of the first set (ID), of the means, and of a single OOD set; the
  first metric of the other sets.

  Args:
    rows: of a study, as `compare.run` describes them.
    means: `{name: the sets to average}`.

  Returns:
    `{column: row -> value}`.
  """
  by_set = rows[0]['metrics']
  first, *others = [name for name in by_set if name != 'val']
  every = list(by_set[first])
  table = {'method': lambda row: row['label']}

  def add(title, value, metrics):
    for metric in metrics:
      table[f'{title} {_TITLES.get(metric, metric)}'] = value(metric)

  add(first, functools.partial(_value, first), every)
  for name in others:
    metrics = every if len(others) == 1 else every[:1]
    metrics = [metric for metric in metrics if metric in by_set[name]]
    add(name, functools.partial(_value, name), metrics)
  for name, set_names in means.items():
    metrics = [m for m in every if any(m in by_set[s] for s in set_names)]
    add(name, functools.partial(_mean, set_names), metrics)
  table['‖θ-θ₀‖'] = lambda row: row['deviation']
  for name in ('selected', 'decayed', 'step', 'seconds'):
    table[name] = operator.itemgetter(name)
  return table


def write(path, text):
  """Writes a text file whole or not at all."""
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(text, encoding='utf-8')
  os.replace(temporary, path)


def write_json(path, value):
  """As `write`; NumPy arrays become lists."""
  write(path, json.dumps(value, indent=1, default=lambda x: x.tolist()) + '\n')


def write_jsonl(path, rows):
  """As `write`, a line a row; without the histories."""
  lines = [
    json.dumps({key: row[key] for key in row if key != 'history'})
    for row in rows
  ]
  write(path, '\n'.join(lines) + '\n')


def read_jsonl(path):
  """The rows of a file that `write_jsonl` wrote.

  Raises:
    OSError: there is no such file.
    ValueError: a line is no row.
  """
  rows = []
  text = pathlib.Path(path).read_text(encoding='utf-8')
  for number, line in enumerate(text.splitlines(), start=1):
    try:
      rows.append(json.loads(line))
    except ValueError as error:
      raise ValueError(f'{path}, line {number} is no JSON: {error}.') from error
  return rows


def heading(title, num_seeds):
  """A study's title, with how much its numbers can say."""
  if num_seeds > 1:
    return f'{title}: {num_seeds} seeds'
  return f'{title}: 1 seed, a demonstration, not evidence'


def label(method):
  """What tables call a method of a config."""
  if method.average_of:
    return f'{method.label} {method.alpha:g}'
  return method.label + ('' if method.spd is None else f' {method.spd:g}')


def provenance():
  """What a number depends on beside its config."""
  done = subprocess.run(
    ['git', 'describe', '--always', '--dirty', '--abbrev=12'],
    cwd=pathlib.Path(__file__).parent,
    capture_output=True,
    text=True,
    check=False,
  )
  return {
    'commit': done.stdout.strip() or 'unknown',
    'device': f'{jax.devices()[0].device_kind}, {os.cpu_count()} cores',
    'python': platform.python_version(),
    'versions': {
      name: importlib.metadata.version(name)
      for name in ('jax', 'optax', 'flax', 'grain')
    },
    'command': ' '.join(['python', *sys.orig_argv[1:]]),
  }


def group(rows):
  """The rows of each method, in order; those of a method differ by seed.

  What a method was tuned with is apart from its final rows.
  """
  groups = {}
  for row in rows:
    groups.setdefault((row['method'], row.get('phase')), []).append(row)
  return list(groups.values())


def _cell(name, values):
  if values[0] is None:
    return '-'
  if isinstance(values[0], str):
    return values[0]
  mean = np.mean(values)
  if name in ('selected', 'decayed'):
    return f'{mean:.1%}'
  if name in ('step', 'seconds'):
    return f'{mean:.0f}'
  spread = f' ± {np.std(values, ddof=1):.3f}' if len(values) > 1 else ''
  return f'{mean:.3f}{spread}'


def table(rows, means, titles=None):
  """`lines` as a Markdown table."""
  return markdown(lines(rows, means, titles))


def lines(rows, means, titles=None):
  """A table, a line a method: means over seeds, ± one standard deviation.

  Args:
    rows: of a study.
    means: as `columns` takes them.
    titles: of the columns; None for all.

  Returns:
    Lists of strings, the first of them the titles.
  """
  values = columns(rows, means)
  titles = titles or list(values)
  return [titles] + [
    [
      _cell(title, [values[title](row) for row in group_rows])
      for title in titles
    ]
    for group_rows in group(rows)
  ]


def markdown(lines):
  """A Markdown table of rows of strings, the first of them its titles."""
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  text = [
    '| '
    + ' | '.join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    + ' |'
    for line in lines
  ]
  rule = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
  text.insert(1, '| ' + ' | '.join(rule) + ' |')
  return '\n'.join(text)


def gb_s(row):
  """GB/s of a row of `card`, in the kernels' time where that is known."""
  return row['bytes_accessed'] / row.get('kernel_ms', row['ms']) / 1e6


def speeds(rows):
  """A Markdown table of rows of `card` and of `benchmark`; ratios to AdamW's.

  Args:
    rows: each of their cases with AdamW before the others.
  """
  lines = []
  for row in rows:
    if row['method'] == 'adamw':
      adamw = row
    cells = ['-'] * 5
    if 'ratio' in row:
      cells[0] = f'{row["ratio"]:.2f}'
    if 'ratio_quartiles' in row:
      low, high = row['ratio_quartiles']
      cells[0] += f' ({low:.2f} to {high:.2f})'
    if 'kernel_ms' in row:
      cells[1] = f'{row["kernel_ms"]:.2f}'
      cells[2] = f'{row["kernel_ms"] / adamw["kernel_ms"]:.2f}'
    if 'copy_gb_s' in row:
      cells[3] = f'{gb_s(row):.0f}'
      cells[4] = f'{gb_s(row) / row["copy_gb_s"]:.0%}'
    on = row['device'].rpartition(',')[0]
    lines.append([row['case'], on, row['method'], f'{row["ms"]:.2f}', *cells])
  titles = ['step', 'on', 'method', 'ms', 'ratio', 'kernel ms', 'ratio']
  return markdown([[*titles, 'GB/s', 'of a copy'], *lines])


# What a table needs of a row.
_OF_ROWS = {
  'title',
  'means',
  'method',
  'label',
  'metrics',
  'deviation',
  'selected',
  'decayed',
  'step',
  'seconds',
}


def read_studies(paths):
  """The rows of files, `{title: rows}`, with the `folder` of their file.

  Raises:
    OSError, ValueError: as `read_jsonl`; and of rows that are no study's, or
      that make no table together.
  """
  studies = {}
  for path in paths:
    for number, row in enumerate(read_jsonl(path), start=1):
      missing = _OF_ROWS - set(row) if isinstance(row, dict) else _OF_ROWS
      if missing:
        raise ValueError(
          f'{path}, line {number} has no {sorted(missing)[0]}; give rows.jsonl '
          'of compare or main.'
        )
      rows = studies.setdefault(row['title'], [])
      rows.append({'folder': _folder(path), **row})
      if _shown(row) != _shown(rows[0]):
        raise ValueError(
          f'{path}, line {number} has other sets, metrics or means than the '
          f'first row of {row["title"]!r}; give the files one by one.'
        )
  return studies


def _folder(path):
  """Where the draws of a file of rows are: packed beside it, or its folder."""
  packed = pathlib.Path(path).with_suffix('.npz')
  return str(packed if packed.exists() else packed.parent)


def _shown(row):
  sets = {name: list(metrics) for name, metrics in row['metrics'].items()}
  return sets, row['means']


def main(arguments):
  """Prints the tables of files of rows, and writes their page."""
  from experiments import evidence, examples, page  # which need this module

  options, paths = {'--reference': '', '--output': '', '--draws': ''}, []
  if arguments == ['--help']:
    print(__doc__)
    return
  for argument in arguments:
    key, is_set, value = argument.partition('=')
    if key in options and is_set:
      options[key] = value
    else:
      paths.append(argument)
  if not paths or any(path.startswith('-') for path in paths):
    sys.exit('report: python -m experiments.report ROWS.jsonl ...; see --help.')
  reference, output, draws = options.values()
  try:
    studies = read_studies(paths)
    for title, rows in studies.items():
      known = list(dict.fromkeys(map(evidence.family, rows)))
      if reference and reference not in known:
        raise ValueError(
          f'--reference={reference} is no method of {title!r}; name one of '
          f'{", ".join(known)}.'
        )
    for key in ('--output', '--draws'):
      if options[key] and len(studies) > 1:
        raise ValueError(
          f'{key}={options[key]} is of one study, the files have '
          f'{len(studies)}: {"; ".join(studies)}; give the files of one.'
        )
    for title, rows in studies.items():
      means = rows[0]['means']
      number = len({row['seed'] for row in evidence.finals(rows) or rows})
      print(f'{heading(title, number)}\n\n{table(rows, means)}\n')
      tables = evidence.readings(rows, means, reference or evidence.REFERENCE)
      for name, one in tables.items():
        print(f'{name}\n\n{markdown(one)}\n')
    if draws:
      print(f'{draws}: of {examples.pack(rows, draws)} rows')
    if output:
      pathlib.Path(output).mkdir(parents=True, exist_ok=True)
      files = page.write(output, rows, reference or evidence.REFERENCE)
      print(f'{output}/: {", ".join(files)}')
  except (OSError, ValueError) as error:
    sys.exit(f'report: {error}')


if __name__ == '__main__':
  main(sys.argv[1:])
