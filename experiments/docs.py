"""The tables of the docs, out of the rows in experiments/results.

python -m experiments.docs [--check]

Behind a line `<!-- table: NAME -->` of a page stands the table of that name: a
key of `TABLES`; a file of rows, of a study or of its step on TPUs; or FILE:
TITLE, one of the tables that `evidence.readings` makes of a study's rows, or
its Tuning. This writes them anew; --check writes nothing, and fails where a
page is not what its rows say, or where its text has a number that none of its
tables has.
"""

import functools
import pathlib
import re
import sys

from experiments import benchmark, evidence, report, sweep, topology

_ROOT = pathlib.Path(__file__).parents[1]
_RESULTS = pathlib.Path(__file__).parent / 'results'
PAGES = (
  'README.md',
  'experiments/README.md',
  'experiments/COST.md',
  'experiments/PODS.md',
)
# Whose text has no numbers of its own: what was measured is in tables.
_OF_ROWS = PAGES[:2]
_MARK = re.compile(
  r'^<!-- table: (?P<name>.*) -->\n\n(?P<table>(?:\|.*\n)*)', re.MULTILINE
)
# What is no text of a page: tables, code, addresses, versions.
_NO_TEXT = re.compile(
  r'^\|.*$|^```[^`]*^```|`[^`]*`|\]\([^)]*\)|https?://\S+|[Pp]ython 3\.\d+'
  r'|on 3\.\d+',
  re.MULTILINE,
)
# Two decimals or more; 0.12.8 is a version.
_MEASURED = re.compile(r'(?<![\d.])(\d*\.\d{2,})(?![\d.]*\.\d|\d)')


def _rows(name):
  return report.read_jsonl(_RESULTS / f'{name}.jsonl')


def _whole(name):
  """Of a study, or of what the TPU compiler says of its step."""
  rows = _rows(name)
  if 'metrics' in rows[0]:
    return report.table(rows, rows[0]['means'])
  return topology.table(rows)


def _study_in_short(name):
  """The first metric of the ID set and of what is OOD, and the distance."""
  rows = _rows(name)
  means = rows[0]['means']
  columns = report.columns(rows, means)
  ood = next(iter(means), list(rows[0]['metrics'])[-1])
  first = next(title for title in columns if title.startswith(f'{ood} '))
  return report.table(
    rows, means, ['method', list(columns)[1], first, '‖θ-θ₀‖']
  )


def _reading(name):
  """Of FILE: TITLE."""
  file, title = name.split(': ')
  (rows,) = report.read_studies([_RESULTS / f'{file}.jsonl']).values()
  if title == 'Tuning':
    tuned = [row for row in rows if row['phase'] == 'tuning']
    return sweep.table(tuned, evidence.finals(rows))
  found = evidence.readings(rows, rows[0]['means'], evidence.REFERENCE)
  return report.markdown(found[title])


def _costs_in_short():
  """Times AdamW's: of steps here, without and with huge pages, and on a TPU."""

  def of(case, key, topology=None, tunables=''):
    found = {
      row['method']: row[key]
      for row in _rows('benchmark')
      if row['case'].startswith(case)
      and row.get('topology') == topology
      and bool(row['GLIBC_TUNABLES']) == bool(tunables)
    }
    return [f'{found[k] / found["adamw"]:.2f}' for k in ('adam_spd', 'chain')]

  def ratio(case, tunables=''):
    return of(case, 'ratio', tunables=tunables)

  lines = [
    ['times `optax.adamw`', '`adam_spd`', '`spd` in a chain'],
    ['a train step of ViT-S/14', *ratio('train')],
    ['the same with LoRA', *ratio('LoRA')],
    ["the optimizer's step alone, ViT-B/16", *ratio('optimizer')],
    [
      'the same with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`',
      *ratio('optimizer', 'glibc.malloc.hugetlb=1'),
    ],
    [
      'its bytes to and from HBM on a TPU v5e',
      *of('optimizer', 'hbm_bytes', 'v5e:2x2'),
    ],
  ]
  return report.markdown(lines)


TABLES = {
  'elpv, in short': functools.partial(_study_in_short, 'elpv'),
  'costs': lambda: benchmark.table(_rows('benchmark')),
  'costs, in short': _costs_in_short,
}


def write(text):
  """A page with its tables made anew.

  Raises:
    FileNotFoundError: of a table whose rows are not there.
    KeyError: they have no such table.
  """

  def anew(match):
    name = match['name']
    other = functools.partial(_reading if ': ' in name else _whole, name)
    table = TABLES.get(name, other)()
    return f'<!-- table: {name} -->\n\n{table.strip()}\n'

  return _MARK.sub(anew, text)


def unsupported(text):
  """The numbers in the text of a page that none of its tables has, a list."""
  tables = ' '.join(match['table'] for match in _MARK.finditer(text))
  known = {_plain(number) for number in _MEASURED.findall(tables)}
  found = _MEASURED.findall(_NO_TEXT.sub(' ', text))
  return [number for number in found if _plain(number) not in known]


def _plain(number):
  return number.lstrip('0')


def main(argv):
  if argv not in ([], ['--check']):
    sys.exit('docs: python -m experiments.docs [--check]')
  failed = False
  for page in PAGES:
    path = _ROOT / page
    text = path.read_text('utf-8')
    new = write(text)
    if new != text and argv:
      failed = True
      print(f'{page}: a table is not what its rows say; run without --check.')
    elif new != text:
      report.write(path, new)
      print(f'{page}: written')
    numbers = unsupported(new) if page in _OF_ROWS else []
    if numbers:
      failed = True
      print(f'{page}: no table of it has {", ".join(numbers)}.')
  if failed:
    sys.exit(1)


if __name__ == '__main__':
  main(sys.argv[1:])
