"""Rows -> the table, the JSON, and the pictures."""

import json
import os
import pathlib

import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind readers too.
_COLORS = (
  '#000000',
  '#E69F00',
  '#56B4E9',
  '#009E73',
  '#0072B2',
  '#D55E00',
  '#CC79A7',
)
_MARKERS = 'os^vDPX'
_COLUMNS = (
  ('method', lambda r: r['label']),
  ('ID AUROC', lambda r: r['id']['auroc']),
  ('ID AP', lambda r: r['id']['ap']),
  ('OOD AUROC', lambda r: r['ood']['auroc']),
  ('OOD AP', lambda r: r['ood']['ap']),
  ('‖θ-θ₀‖', lambda r: r['deviation']),
  ('selected', lambda r: r['selected']),
  ('decayed', lambda r: r['decayed']),
  ('step', lambda r: r['step']),
  ('seconds', lambda r: r['seconds']),
)


def write(path, text):
  """Writes a text file whole or not at all."""
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(text)
  os.replace(temporary, path)


def write_json(path, value):
  """As `write`; NumPy arrays become lists."""
  write(path, json.dumps(value, indent=1, default=lambda x: x.tolist()) + '\n')


def group(rows):
  """`{label: its rows}`, in order; the rows of a group differ by seed."""
  groups = {}
  for row in rows:
    groups.setdefault(row['label'], []).append(row)
  return groups


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


def table(rows):
  """A Markdown table, a line a method: means over seeds, ± one deviation."""
  lines = [[name for name, _ in _COLUMNS]]
  for group_rows in group(rows).values():
    lines.append(
      [_cell(name, [get(row) for row in group_rows]) for name, get in _COLUMNS]
    )
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


def plot_plane(rows, path, title):
  """ID against OOD: a point a method, its seeds in faint."""
  figure = Figure(figsize=(9.6, 5.6), layout='constrained')
  axes = figure.subplots()
  for i, (label, group_rows) in enumerate(group(rows).items()):
    points = np.array(
      [(row['id']['auroc'], row['ood']['auroc']) for row in group_rows]
    )
    style = {'color': _COLORS[i % 7], 'marker': _MARKERS[i % 7]}
    if len(points) > 1:
      axes.scatter(*points.T, s=30, alpha=0.3, linewidths=0, **style)
    axes.scatter(*points.mean(0), s=130, label=label, zorder=3, **style)
  axes.set_xlabel('ID AUROC, mono-crystalline cells (higher is better)')
  axes.set_ylabel('OOD AUROC, poly-crystalline cells (higher is better)')
  axes.set_title(title)
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=100)


def plot_steps(rows, path, title, window=10):
  """Deviation, and the share of layers that SPD decays, over the steps."""
  figure = Figure(figsize=(9.6, 4.6), layout='constrained')
  left, right = figure.subplots(1, 2)
  for i, (label, group_rows) in enumerate(group(rows).items()):
    histories = [row['history'] for row in group_rows if row['history']]
    if not histories:
      continue

    def mean(name, histories=histories):
      return np.mean([history[name] for history in histories], axis=0)

    steps = np.arange(1, len(mean('deviation')) + 1)
    window = min(window, len(steps))
    style = {'color': _COLORS[i % 7], 'label': label, 'linewidth': 2}
    left.plot(steps, mean('deviation'), **style)
    if 'decayed' in histories[0]:
      kernel = np.ones(window) / window
      share = np.convolve(100 * mean('decayed'), kernel, mode='valid')
      right.plot(steps[window - 1 :], share, **style)
  left.set_ylabel('distance to the pretrained weights |θ-θ₀|')
  right.set_ylabel(f'layers decayed [%], mean of the last {window} steps')
  for axes in (left, right):
    axes.set_xlabel('step')
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.lines:
      axes.legend()
  figure.suptitle(title)
  figure.savefig(path, dpi=100)
