"""The page of a study: whole, readable, and in need of nothing else."""

import base64
import html.parser
import io

import pytest
from PIL import Image

from experiments import figures, page, report
from tests.experiments import test_evidence, test_figures

_VOID = {'meta', 'img', 'br', 'hr'}


class Page(html.parser.HTMLParser):
  """Texts by tag and attributes of a page; refuses what is not closed."""

  def __init__(self, text):
    super().__init__()
    self.open, self.attributes, self.texts = [], [], {}
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.attributes += [(tag, *pair) for pair in attrs]
    self.texts.setdefault(tag, []).append('')
    if tag not in _VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open:
      self.texts[self.open[-1]][-1] += data


def about(rows):
  return [
    {
      'title': 'A study of <b> & "c"',
      'commit': 'abc',
      'device': 'cpu, 2 cores',
      'python': '3.11',
      'versions': {'jax': '1.2'},
      'command': 'python -m experiments.compare --config=a&b',
      'means': test_evidence.MEANS,
      **row,
    }
    for row in rows
  ]


def check(folder, names):
  """Reads a page, which has all its figures and refers to nothing else."""
  assert {file.name for file in folder.iterdir() if file.is_file()} == set(
    names
  )
  text = (folder / 'report.html').read_text('utf-8')
  found = Page(text)
  assert not {'script', 'link', 'iframe', 'object'} & set(found.texts)
  assert 'url(' not in text
  assert '@import' not in text
  for tag, name, value in found.attributes:
    assert not name.startswith('on')
    if name in ('src', 'href', 'srcset', 'action', 'data', 'poster'):
      assert tag == 'img'
      kind, _, data = value.partition(',')
      assert kind == 'data:image/png;base64'
      with Image.open(
        io.BytesIO(base64.b64decode(data, validate=True))
      ) as image:
        image.verify()
  alts = [value for tag, name, value in found.attributes if name == 'alt']
  assert alts == found.texts['figcaption']
  assert len(alts) == len(found.texts['img'])
  return found


def test_a_study_in_full(tmp_path):
  (tmp_path / 'pictures').mkdir()
  for name in ('adamw_0', 'adamw_1', 'gone_0'):
    Image.new('RGB', (8, 8)).save(tmp_path / 'pictures' / f'{name}.png')
  test_figures.layers(3, test_figures.NAMES, 'head/k').write(
    page.log.Layers.path(tmp_path, 'spd', 0)
  )
  rows = about(test_figures.several())
  for row in rows[:3]:
    row['label'] = '<i>probe</i> &amp;'
  names = page.write(tmp_path, rows)
  found = check(tmp_path, names)
  assert names == [
    'comparisons.md',
    'plane.png',
    'steps.png',
    'distance.png',
    'layers_spd.png',
    'report.html',
  ]
  title = 'A study of <b> & "c": 3 seeds'
  assert found.texts['h1'] == found.texts['title'] == [title]
  assert found.texts['h2'] == [
    'What was run',
    'Results',
    'Compared with adamw',
    'Figures',
    'Examples',
    'Words',
  ]
  assert found.texts['dd'][:6] == [
    'python -m experiments.compare --config=a&b',
    'abc',
    'cpu, 2 cores',
    'Python 3.11; jax 1.2',
    '3: 0, 1, 2',
    '9',
  ]
  assert {'selected', 'decayed', 'step'} <= set(found.texts['dt'])
  # Four figures, and the picture of the first seed of what has a row.
  assert len(found.texts['img']) == 5
  cells = found.texts['td']
  table = report.lines(rows, test_evidence.MEANS)
  assert cells[: 3 * len(table[0])] == [c for line in table[1:] for c in line]
  comparisons = (tmp_path / 'comparisons.md').read_text()
  assert comparisons.startswith('## Compared with adamw\n\n| method')
  assert 'no difference shown' in cells
  assert 'color-scheme: light dark' in found.texts['style'][0]


def test_one_run_of_one_set(tmp_path):
  rows = about(test_figures.single())
  names = page.write(tmp_path, [{**row, 'means': {}} for row in rows])
  found = check(tmp_path, names)
  assert names == ['plane.png', 'steps.png', 'report.html']
  assert found.texts['h2'] == ['What was run', 'Results', 'Figures', 'Words']


def test_a_sweep(tmp_path):
  rows = about(test_evidence.study())
  rows = [{**row, 'history': {}} for row in rows]
  names = page.write(tmp_path, rows)
  found = check(tmp_path, names)
  assert names == [
    'comparisons.md',
    'plane.png',
    'frontier.png',
    'lambda.png',
    'distance.png',
    'report.html',
  ]
  assert 'At the same ID score' in found.texts['h2']
  # What is final by the first reading, and no more, is in the first table.
  lines = report.lines(
    test_evidence.evidence.of_reading(rows, 'id'), test_evidence.MEANS
  )
  assert len(lines) == 4
  cells = [cell for line in lines[1:] for cell in line]
  assert found.texts['td'][: len(cells) + 1] == [*cells, lines[1][0]]
  assert 'not reached, 0.956 to 0.965' in found.texts['td']


def test_a_figure_says_how_many_seeds_it_has(tmp_path, monkeypatch):
  titles = {}

  def keep(rows, means, file, title):
    del rows, means
    titles[file.name] = title.partition(': ')[2]

  for name in ('plane', 'frontier', 'lambda', 'distance'):
    monkeypatch.setattr(figures, f'plot_{name}', keep)
  rows = about(test_evidence.study())  # two seeds of each, and now of some one
  page.write(tmp_path, [{**r, 'history': {}} for r in rows if r['seed'] != 1])
  assert titles.pop('plane.png') == '1 seed, a demonstration, not evidence'
  assert titles == dict.fromkeys(
    ('frontier.png', 'lambda.png', 'distance.png'), '2 seeds'
  )


def test_a_sweep_that_has_not_come_to_its_end(tmp_path):
  rows = [row for row in about(test_evidence.study()) if 'reading' not in row]
  rows = [{**row, 'history': {}} for row in rows]
  names = page.write(tmp_path, rows)
  check(tmp_path, names)
  assert {'comparisons.md', 'frontier.png', 'lambda.png'} <= set(names)


def test_a_page_from_files_of_rows(tmp_path, capsys):
  file = tmp_path / 'rows.jsonl'
  report.write_jsonl(file, about(test_evidence.study()))
  folder = tmp_path / 'new' / 'folder'
  report.main([str(file), f'--output={folder}', '--reference=spd'])
  printed = capsys.readouterr().out
  names = printed.splitlines()[-1].removeprefix(f'{folder}/: ').split(', ')
  check(folder, names)
  assert 'At the same ID score\n\n| method' in printed
  assert 'Δ to SPD' in printed


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--reference=sgd'], "sgd is no method of 'A study.*one of adamw, spd"),
    (['--output'], 'see --help'),
    (['--outptu=x'], 'see --help'),
    (
      ['more.jsonl', '--output=x'],
      'the files have 2: A study.*; another; give',
    ),
    (['more.jsonl', '--draws=x.npz'], '--draws=x.npz is of one study'),
    (['--draws=x.npz'], 'x.npz: no row has draws; give the rows.jsonl'),
    (['--draws=x.json'], 'x.json is to end in .npz'),
  ],
)
def test_mistakes_of_the_command(tmp_path, monkeypatch, arguments, message):
  monkeypatch.chdir(tmp_path)
  rows = about(test_evidence.study())
  report.write_jsonl('rows.jsonl', rows)
  report.write_jsonl('more.jsonl', [{**rows[0], 'title': 'another'}])
  with pytest.raises(SystemExit, match=f'^report: .*{message}'):
    report.main(['rows.jsonl', *arguments])
