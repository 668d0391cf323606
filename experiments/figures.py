"""Rows -> figures.

Each function draws one figure and says what it shows: it returns the sentences
that stand below it, or None where the rows have nothing of that.
"""

import functools
import itertools

import numpy as np

from experiments import evidence, report
from experiments.models import blocks

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
# Legible at half the size.
_TEXT = {
  'font.size': 14,
  'figure.titlesize': 15,
  'legend.fontsize': 13,
  'axes.axisbelow': True,
}
_DISTANCE = 'distance to θ₀, ‖θ-θ₀‖'
_DASHES = ('-', '--', ':', '-.')
_CELLS = 120  # of a heat map along the steps


def empty_figure(width, height):
  """A Matplotlib figure of so many inches."""
  from matplotlib.figure import Figure  # half a second that most runs can save

  return Figure(figsize=(width, height), layout='constrained')


def _legible(draw):
  @functools.wraps(draw)
  def drawn(*args, **kwargs):
    import matplotlib

    with matplotlib.rc_context(_TEXT):
      return draw(*args, **kwargs)

  return drawn


def _style(i):
  """Colour and marker of the i-th method; the first 49 differ."""
  return {'color': _COLORS[i % 7], 'marker': _MARKERS[(i + i // 7) % 7]}


def _of_seeds(rows):
  number = len({row['seed'] for row in rows})
  return 'of one seed' if number == 1 else f'the mean over {number} seeds'


@_legible
def plot_plane(rows, means, path, title):
  """ID against OOD: a point a method, its seeds in faint.

  Where no set is OOD, ID against the distance.

  Args:
    rows: of a study.
    means: as `report.scores` takes them.
    path: of the picture.
    title: above it.

  Returns:
    What is below it.
  """
  x, y = report.scores(rows, means)
  if y is None:
    y_label, goal = _DISTANCE, 'to the right'
  else:
    y_label, goal = f'{y.title} (higher is better)', 'to the upper right'
  x_label = f'{x.title} (higher is better)'
  best = _plot_points(rows, x, y or _deviation, (x_label, y_label), path, title)
  text = f'Each large mark is a method, {_of_seeds(rows)}'
  if len({row['seed'] for row in rows}) > 1:
    text += '; small faint ones are its seeds'
  text += f'. What is better lies {goal}. '
  if y is None:
    return text
  return text + (
    f'The highest mean of {y.title} is that of {best[0]}, {best[2]:.3f}, where '
    f'its {x.title} is {best[1]:.3f}.{_caution(rows)}'
  )


@_legible
def plot_distance(rows, means, path, title):
  """OOD against the distance to theta_0, of methods or along their settings.

  Args:
    rows: of a study.
    means: as `report.scores` takes them.
    path: of the picture.
    title: above it.

  Returns:
    What is below it; None where no set is OOD.
  """
  _, y = report.scores(rows, means)
  if y is None:
    return None
  labels = _DISTANCE, f'{y.title} (higher is better)'
  if swept := evidence.sweep(rows):
    _plot_lines(swept, _deviation, y, labels, path, title)
  else:
    _plot_points(rows, _deviation, y, labels, path, title)
  return (
    'The same by how far the weights of the chosen step are from the '
    'pretrained ones. If keeping near were all that a method does, all would '
    'lie on one curve: a mark above the others at its distance keeps more than '
    f'its distance explains.{_caution(rows)}'
  )


def _deviation(row):
  return row['deviation']


def _caution(rows):
  if len({row['seed'] for row in rows}) > 1:
    return ''
  return ' With one seed the order of neighbours may be chance.'


def _plot_points(rows, x, y, labels, path, title):
  """Returns (label, x, y) of the point with the highest y."""
  figure = empty_figure(9.6, 5.6)
  axes = figure.subplots()
  best = None
  for i, group_rows in enumerate(report.group(rows)):
    label = group_rows[0]['label']
    points = np.array([(x(row), y(row)) for row in group_rows])
    style = _style(i)
    if len(points) > 1:
      axes.scatter(*points.T, s=45, alpha=0.45, linewidths=0, **style)
    middle = points.mean(0)
    axes.scatter(*middle, s=130, label=label, zorder=3, **style)
    if best is None or middle[1] > best[2]:
      best = label, *middle
  axes.set(xlabel=labels[0], ylabel=labels[1])
  axes.grid(alpha=0.3)
  figure.suptitle(title, wrap=True)
  figure.legend(loc='outside right center')
  figure.savefig(path, dpi=100)
  return best


@_legible
def plot_steps(rows, path, title, window=10):
  """Deviation, and the share of layers that SPD decays, over the steps.

  Args:
    rows: of a study, with histories.
    path: of the picture.
    title: above it.
    window: steps that the share is a mean of.

  Returns:
    What is below it; None where nothing was trained.
  """
  trained = {}
  for i, group_rows in enumerate(report.group(rows)):
    histories = [row['history'] for row in group_rows if row.get('history')]
    if histories:
      trained[i] = group_rows[0]['label'], histories
  if not trained:
    return None
  has_spd = any('decayed' in found[0] for _, found in trained.values())
  lines = -(-len(trained) // 3)
  figure = empty_figure(9.6, 4.6 + 0.3 * lines)
  left, *right = figure.subplots(1, 1 + has_spd, squeeze=False)[0]
  ends = []
  for i, (label, histories) in trained.items():
    # A run that was stopped sooner ends there.
    number = min(len(history['deviation']) for history in histories)

    def mean(name, histories=histories, number=number):
      return np.mean([history[name][:number] for history in histories], axis=0)

    steps = np.arange(1, number + 1)
    width = min(window, number)
    style = {**_style(i), 'label': label, 'linewidth': 2}
    style |= {'markevery': max(1, number // 8), 'markersize': 6}
    left.plot(steps, mean('deviation'), **style)
    ends.append((mean('deviation')[-1], label))
    if 'decayed' in histories[0]:
      kernel = np.ones(width) / width
      share = np.convolve(100 * mean('decayed'), kernel, mode='valid')
      right[0].plot(steps[width - 1 :], share, **style)
  left.set_ylabel(_DISTANCE)
  for axes in right:
    axes.set_ylabel(f'layers decayed [%], over {window} steps')
  for axes in (left, *right):
    axes.set_xlabel('step')
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
  below = {'loc': 'outside lower center', 'ncols': 3}
  figure.legend(*left.get_legend_handles_labels(), **below)
  figure.suptitle(title, wrap=True)
  figure.savefig(path, dpi=100)
  (near, nearest), (far, farthest) = min(ends), max(ends)
  text = (
    'How far the weights are from the pretrained ones after each step, '
    f'{_of_seeds(rows)}; at the end from {near:.2f} of {nearest} to {far:.2f} '
    f'of {farthest}.'
  )
  if has_spd:
    text = f'Left: {text[0].lower()}{text[1:]} Right: ' + (
      'the share of layers that SPD pulled back, a mean of the last '
      f'{window} steps; methods without SPD have no line.'
    )
  return text


@_legible
def plot_frontier(rows, means, path, title):
  """ID against OOD along the settings of each family: `evidence.lines`.

  Args:
    rows: of a sweep, see `evidence.sweep`.
    means: as `report.scores` takes them.
    path: of the picture.
    title: above it.

  Returns:
    What is below it; None where no set is OOD.
  """
  x, y = report.scores(rows, means)
  if y is None:
    return None
  labels = f'{x.title} (higher is better)', f'{y.title} (higher is better)'
  _plot_lines(rows, x, y, labels, path, title)
  return (
    f'Each mark is one setting, {_of_seeds(rows)}; a line goes '
    'through the settings that differ in what the legend names last, and '
    'its large mark is the strongest pull to the pretrained weights. '
    f'Compare the heights of two lines at the same {x.title}: the upper one '
    'keeps more for the same gain.'
  )


@_legible
def plot_lambda(rows, means, path, title):
  """ID, OOD and the distance against lambda, for the families that vary it.

  Args:
    rows: of a sweep, see `evidence.sweep`.
    means: as `report.scores` takes them.
    path: of the picture.
    title: above it.

  Returns:
    What is below it; None where lambda does not differ.
  """
  lines = [
    line
    for line in evidence.lines(rows)
    if line.key == 'spd' and len(line.settings) > 1
  ]
  if not lines:
    return None
  kinds = [score for score in report.scores(rows, means) if score]
  values = sorted({x for line in lines for x in line.settings})
  figure = empty_figure(9.6, 4.6)
  panels = figure.subplots(1, len(kinds) + 1)
  scores = [*((s.title, s) for s in kinds), (_DISTANCE, _deviation)]
  for axes, (name, score) in zip(panels, scores, strict=True):
    for i, line in enumerate(lines):
      at = [values.index(x) for x in line.settings]
      y = [[score(row) for row in group] for group in line.groups]
      spread = [np.std(one, ddof=1) if len(one) > 1 else 0.0 for one in y]
      axes.errorbar(
        at,
        [np.mean(one) for one in y],
        spread,
        label=_label(line, [x for x in lines if x.family == line.family]),
        linewidth=2,
        markersize=7,
        capsize=4,
        **_style(i),
      )
    axes.set_xticks(range(len(values)), [f'{x:g}' for x in values])
    axes.set(xlabel='λ', ylabel=name)
    axes.grid(alpha=0.3)
  panels[-1].set_ylim(bottom=0)
  below = {'loc': 'outside lower center', 'ncols': 2}
  figure.legend(*panels[0].get_legend_handles_labels(), **below)
  figure.suptitle(title, wrap=True)
  figure.savefig(path, dpi=100)
  return (
    f'The same run at every λ of SPD, {_of_seeds(rows)}; bars are one standard '
    'deviation over seeds, and the axis is not to scale. The panel to the '
    'right says whether λ acts at all: where the distance does not '
    'fall, the scores cannot be its doing.'
  )


def _plot_lines(rows, x, y, labels, path, title):
  figure = empty_figure(9.6, 5.6)
  axes = figure.subplots()
  lines = evidence.lines(rows)
  families = {}
  for line in lines:
    families.setdefault(line.family, []).append(line)
  for i, own in enumerate(families.values()):
    for line, dashes in zip(own, itertools.cycle(_DASHES), strict=False):
      points = np.array(
        [[evidence.mean(g, x), evidence.mean(g, y)] for g in line.groups]
      )
      label = f'{_label(line, own)}: {evidence.SYMBOLS[line.key]}'
      style = _style(i) | {'linestyle': dashes, 'linewidth': 2}
      axes.plot(*points.T, markersize=7, label=label, **style)
      # The end of the strongest pull, so that a line has a direction.
      axes.scatter(*points[-1], s=150, zorder=3, **_style(i))
  axes.set(xlabel=labels[0], ylabel=labels[1])
  axes.grid(alpha=0.3)
  figure.suptitle(title, wrap=True)
  figure.legend(loc='outside lower center', ncols=2)
  figure.set_size_inches(9.6, 5.6 + 0.3 * -(-len(lines) // 2))
  figure.savefig(path, dpi=100)


def _label(line, lines):
  """That of a line, with the settings in which those of its family differ."""

  def rest(one):
    settings = one.groups[0][0]['settings']
    return {k: settings.get(k) for k in evidence.SYMBOLS if k != one.key}

  differ = [k for k in rest(line) if len({rest(one)[k] for one in lines}) > 1]
  values = (
    f'{evidence.SYMBOLS[k]} {rest(line)[k]:g}'
    for k in differ
    if rest(line)[k] is not None
  )
  return ', '.join([line.label, *values])


@_legible
def plot_layers(runs, path, title):
  """Per layer and step: the deviation, and the share of seeds that select it.

  Args:
    runs: `log.Layers` of one method, one a seed.
    path: of the picture.
    title: above it.

  Returns:
    What is below it.
  """
  number = min(len(run.deviation) for run in runs)
  # Stable: within a block as the tree has them.
  order = np.argsort(
    [blocks.part(name)[0] for name in runs[0].names], kind='stable'
  )
  names = [runs[0].names[i] for i in order]
  cells = np.array_split(np.arange(number), min(number, _CELLS))

  def mean(values):
    over_seeds = np.mean([one[:number] for one in values], axis=0)
    return np.stack([over_seeds[cell].mean(0) for cell in cells])[:, order].T

  deviation = mean([run.deviation for run in runs])
  selected = 100 * mean([run.selected for run in runs])
  figure = empty_figure(9.6, 6.4)
  left, right = figure.subplots(1, 2, sharey=True)
  extent = (0.5, number + 0.5, len(names) - 0.5, -0.5)
  for axes, values, label, limit in (
    (left, deviation, 'distance to θ₀ of the layer', None),
    (right, selected, 'seeds that select the layer [%]', 100),
  ):
    image = axes.imshow(
      values,
      cmap='cividis',
      vmin=0,
      vmax=limit or max(values.max(), 1e-12),
      aspect='auto',
      interpolation='nearest',
      extent=extent,
    )
    figure.colorbar(image, ax=axes, label=label, location='top')
    axes.set_xlabel('step')
  parts = [blocks.part(name)[1] for name in names]
  starts = [i for i in range(len(parts)) if not i or parts[i] != parts[i - 1]]
  for axes in (left, right):
    for start in starts[1:]:
      axes.axhline(start - 0.5, color='white', linewidth=1)
  middles = [
    (start + end - 1) / 2
    for start, end in zip(starts, [*starts[1:], len(parts)], strict=True)
  ]
  left.set_yticks(middles, [parts[start] for start in starts])
  left.tick_params(axis='y', length=0)
  figure.suptitle(title, wrap=True)
  figure.savefig(path, dpi=100)
  most = int(selected.mean(1).argmax())
  far = int(deviation[:, -1].argmax())
  seeds = 'one seed' if len(runs) == 1 else f'{len(runs)} seeds'
  return (
    'A line is a layer, the input at the top and the head at the bottom, '
    f'ordered by depth; bright is more. Left: how far the layer is from where '
    f'it started; at the end {names[far]} is farthest, at '
    f'{deviation[far, -1]:.2f}. Right: in which steps SPD selected the layer, '
    f'the share of {seeds}; most often {names[most]}, in '
    f'{selected[most].mean():.0f} % of the steps.'
  )
