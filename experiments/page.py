"""A study's rows -> its figures, its comparisons, and one page of all of it."""

import base64
import html
import pathlib

from experiments import evidence, figures, log, report

_MOST_METHODS = 25  # of a figure with a mark each
_MOST_PICTURES = 12

_WORDS = {
  'selected': "the share of SPD's decisions, one a layer and step, in which "
  'the loss falls towards the pretrained weights: the gradient says that the '
  'layer has gone too far.',
  'decayed': 'the share of the decisions in which a selected layer was pulled '
  'back, because the step led it farther away all the same. Under 1 % a method '
  'is said not to have acted.',
  'step': 'the training step whose weights were the best on ID validation; '
  'all scores are of these.',
  'seconds': 'of training; the first run of a method compiles it.',
  '‖θ-θ₀‖': 'how far the chosen weights are from the pretrained ones.',
  'ID, OOD': 'test data like the training data, and unlike it. OOD data '
  'choose nothing.',
  'Δ': "the mean over shared seeds of a method's score minus that of the "
  'method compared with.',
  '95 % interval': 'of Δ, by the bootstrap over the seeds and, where they were '
  'kept, over the test examples. No method is called better where it holds 0.',
  'p': "of the paired t-test over the seeds, after Holm's correction for all "
  'methods of the column.',
  'detectable': 'the smallest Δ that so many seeds, spread as they are, can '
  'tell from 0. Where it is large, “no difference shown” says little.',
}

_STYLE = """
:root { color-scheme: light dark }
body { font: 1rem/1.55 system-ui, sans-serif; max-width: 64rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; line-height: 1.25 }
h2 { font-size: 1.2rem; margin-top: 2.5rem }
h3 { font-size: 1rem; margin-top: 1.75rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .875rem;
  font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #8886 }
th { vertical-align: bottom; border-bottom-width: 2px; white-space: normal;
  min-width: 3rem }
th:first-child, td:first-child { text-align: left }
figure { margin: 1.5rem 0 }
img { max-width: 100%; height: auto; background: #fff }
figcaption { max-width: 46rem; margin-top: .4rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.25rem }
dt { font-weight: 600 }
dd { margin: 0; max-width: 46rem; overflow-wrap: anywhere }
"""


def write(folder, rows, reference=evidence.REFERENCE):
  """Writes the figures of a study, comparisons.md, and report.html with both.

  Args:
    folder: to write to.
    rows: of one study, with what they share, as rows.jsonl has them; with
      `history` they have a figure of the steps, and with `folder` the files of
      runs are looked for there, not in the one to write to.
    reference: the family that the others are compared with.

  Returns:
    The names of the files.
  """
  folder = pathlib.Path(folder)
  rows = [{'folder': str(folder), **row} for row in rows]
  means = rows[0]['means']
  shown = evidence.of_reading(rows, 'id') or rows
  title = _title(shown)
  tables = evidence.readings(rows, means, reference)
  names = []
  if tables:
    text = [f'## {t}\n\n{report.markdown(x)}\n' for t, x in tables.items()]
    report.write(folder / 'comparisons.md', '\n'.join(text))
    names.append('comparisons.md')
  drawn = _draw(folder, rows, shown, means)
  parts = [
    _section('What was run', _description(_about(rows))),
    _section('Results', _table(report.lines(shown, means))),
    *(_section(name, _table(table)) for name, table in tables.items()),
    _section(
      'Figures',
      ''.join(_figure(folder / name, text) for name, text in drawn.items()),
    ),
  ]
  if found := _pictures(shown):
    parts.append(_section('Examples', found))
  parts.append(_section('Words', _description(_WORDS)))
  page = _page(title, ''.join(parts))
  report.write(folder / 'report.html', page)
  return [*names, *drawn, 'report.html']


def _title(rows):
  return report.heading(rows[0]['title'], len({row['seed'] for row in rows}))


def _draw(folder, rows, shown, means):
  """Draws what there is to draw, `{file: caption}`."""
  swept = evidence.sweep(rows)
  plots = {}
  if len(report.group(shown)) <= _MOST_METHODS:
    plots['plane.png'] = figures.plot_plane, shown, means
    plots['steps.png'] = figures.plot_steps, shown
  if swept:
    plots['frontier.png'] = figures.plot_frontier, swept, means
    plots['lambda.png'] = figures.plot_lambda, swept, means
  if swept or len(report.group(shown)) <= _MOST_METHODS:
    plots['distance.png'] = figures.plot_distance, swept or shown, means
  for method, runs in _layers(rows).items():
    plots[f'layers_{method}.png'] = figures.plot_layers, runs
  drawn = {}
  for name, (plot, *args) in plots.items():
    label = ''
    title = _title(swept if args[0] is swept else shown)
    if plot is figures.plot_layers:
      method = name.removeprefix('layers_').removesuffix('.png')
      label = next(r['label'] for r in rows if r['method'] == method) + ': '
    text = plot(*args, folder / name, label + title)
    if text is not None:
      drawn[name] = text
  return drawn


def _layers(rows):
  """The `log.Layers` of final rows, `{method: [runs]}`."""
  found = {}
  for row in rows:
    if row.get('phase') in (None, 'final'):
      file = log.Layers.path(row['folder'], row['method'], row['seed'])
      if file.exists():
        found.setdefault(row['method'], []).append(log.Layers.read(file))
  return found


def _about(rows):
  """What the rows say of how they came to be, `{word: text}`."""

  def every(key, text=str):
    values = dict.fromkeys(text(row[key]) for row in rows if key in row)
    return '; '.join(values) or 'not written'

  seeds = sorted({row['seed'] for row in rows})
  return {
    'command': every('command'),
    'commit': every('commit'),
    'device': every('device'),
    'versions': f'Python {every("python")}; '
    + every('versions', lambda x: ', '.join(f'{k} {v}' for k, v in x.items())),
    'seeds': f'{len(seeds)}: {", ".join(map(str, seeds))}',
    'runs': str(len(rows)),
  }


def _pictures(rows):
  """Of the first seed of each method, where the study draws some."""
  found = []
  for group in report.group(rows):
    row = min(group, key=lambda row: row['seed'])
    folder = pathlib.Path(row['folder'], 'pictures')
    file = folder / f'{row["method"]}_{row["seed"]}.png'
    if file.exists():
      text = f'{row["label"]}, seed {row["seed"]}: the same examples as before.'
      if not found:
        text = (
          f'What {row["label"]}, seed {row["seed"]}, makes of a few examples, '
          'beside the truth. They stand at fixed places of their sets and were '
          'not chosen.'
        )
      found.append(_figure(file, text))
  if len(found) > _MOST_PICTURES:
    left = len(found) - _MOST_PICTURES
    found[_MOST_PICTURES:] = [f'<p>And {left} more, in pictures/.</p>\n']
  return ''.join(found)


def _page(title, body):
  title = html.escape(title)
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n'
    f'<h1>{title}</h1>\n{body}</body>\n</html>\n'
  )


def _section(title, body):
  return f'<section>\n<h2>{html.escape(title)}</h2>\n{body}</section>\n'


def _description(words):
  lines = [
    f'<dt>{html.escape(word)}</dt><dd>{html.escape(text)}</dd>\n'
    for word, text in words.items()
  ]
  return f'<dl>\n{"".join(lines)}</dl>\n'


def _table(lines):
  """Of lists of strings, the first of them the titles."""

  def line(cells, tag):
    cells = (f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)
    return f'<tr>{"".join(cells)}</tr>\n'

  body = ''.join(line(cells, 'td') for cells in lines[1:])
  return (
    f'<div class="wide"><table>\n<thead>\n{line(lines[0], "th")}</thead>\n'
    f'<tbody>\n{body}</tbody>\n</table></div>\n'
  )


def _figure(file, text):
  data = base64.b64encode(file.read_bytes()).decode()
  text = html.escape(text)
  return (
    f'<figure>\n<img alt="{text}" src="data:image/png;base64,{data}">\n'
    f'<figcaption>{text}</figcaption>\n</figure>\n'
  )
