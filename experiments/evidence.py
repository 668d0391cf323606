"""What the rows of a study say: comparisons with a reference, three readings.

Rows of a sweep have `phase`, 'tuning', 'final' or 'control'; `family`, of the
methods that differ in their settings alone; `settings`, a dict of numbers; and
the final ones `reading`, a list of the rules that chose the settings: 'id', the
best mean on ID validation, 'one_se', the strongest pull within a standard error
of it; [] of methods that are not tuned.
Rows without a phase are final.
"""

import re
from typing import Any, NamedTuple

import numpy as np

from experiments import examples, report, statistics

REFERENCE = 'adamw'  # that methods are compared with
# SPD that pulled back in a smaller share of its decisions did not act.
ACTS = 0.01
_ALPHA = 0.05
# Settings that say how far a method goes from theta_0: what is larger, is
# nearer (1) or farther (-1).
_PULLS = {'spd': 1, 'alpha': -1, 'weight_decay': 1, 'learning_rate': -1}
# What labels end with: ' 0.3, lr 1e-05, decay 0 (1 SE)'.
_SETTINGS = re.compile(r'( [\d.e-]+)?(, (lr|decay) [\d.e-]+)*( \(1 SE\))?$')
SYMBOLS = {
  'spd': 'λ',
  'alpha': 'alpha',
  'weight_decay': 'weight decay',
  'learning_rate': 'learning rate',
}


def family(row):
  """Of a row: that of the sweep, else its method."""
  return row.get('family') or row['method']


def finals(rows):
  """The rows of the final phase."""
  return [row for row in rows if row.get('phase') in (None, 'final')]


def of_reading(rows, reading):
  """The final rows of a reading; of a family that has none, all final ones."""
  final = finals(rows)
  families = {family(r) for r in final if reading in (r.get('reading') or ())}
  return [
    row
    for row in final
    if reading in (row.get('reading') or ()) or family(row) not in families
  ]


def compare(rows, reference, score):
  """Every method against one, over the seeds that both have.

  Args:
    rows: of a study; where their `folder` has the draws of both methods'
      examples, the interval is of these too.
    reference: the family to compare with.
    score: row -> float, a `report.Score`.

  Returns:
    `{method: statistics.Difference}`, p after Holm; without the reference, and
    without methods that share no seed with it.
  """
  groups = report.group(rows)
  own = next((g for g in groups if family(g[0]) == reference), [])
  theirs = {row['seed']: row for row in own}
  found = {}
  for group in groups:
    pairs = [
      (row, theirs[row['seed']])
      for row in group
      if group is not own and row['seed'] in theirs
    ]
    if not pairs:
      continue
    differences = [score(row) - score(other) for row, other in pairs]
    draws = [[_draws(row, score) for row in pair] for pair in pairs]
    drawn = None
    if all(one is not None for pair in draws for one in pair):
      drawn = np.array([one - other for one, other in draws]).T
      # A draw of which a metric is not defined tells nothing.
      drawn = drawn[np.isfinite(drawn).all(1)]
      drawn = drawn if len(drawn) else None
    found[group[0]['method']] = statistics.paired(differences, drawn)
  adjusted = statistics.holm([one.p for one in found.values()])
  return {
    name: one._replace(p=float(p))
    for (name, one), p in zip(found.items(), adjusted, strict=True)
  }


def _draws(row, score):
  """[R] of a score, or None."""
  kept = examples.read_draws(row['folder'], row) if 'folder' in row else {}
  sets = [kept.get(name, {}).get(score.metric) for name in score.sets]
  return None if any(one is None for one in sets) else np.mean(sets, 0)


def is_idle(group):
  """Whether a method has SPD and it did not act, in the mean of its rows."""
  decayed = [row['decayed'] for row in group if row['decayed'] is not None]
  return bool(decayed) and float(np.mean(decayed)) < ACTS


def verdict(group, difference):
  """What may be said of a method: 'better' only where nothing else fits."""
  if is_idle(group):
    return 'did not act'
  if difference.n < 2:
    return 'one seed'
  if np.isnan(difference.p):
    return 'no spread over seeds'
  if difference.p < _ALPHA and difference.low > 0:
    return 'better'
  if difference.p < _ALPHA and difference.high < 0:
    return 'worse'
  return 'no difference shown'


def comparisons(rows, means, reference):
  """A table of `compare`, ID and OOD.

  Args:
    rows: of a study.
    means: as `report.columns` takes them.
    reference: the family to compare with.

  Returns:
    Lists of strings, the first of them the titles; [] where no two methods
    share two seeds.
  """
  groups = {group[0]['method']: group for group in report.group(rows)}
  kinds = [score for score in report.scores(rows, means) if score]
  found = {score: compare(rows, reference, score) for score in kinds}
  if not any(one.n > 1 for one in found[kinds[0]].values()):
    return []
  lines = [['method', f'{kinds[-1].title} is', 'seeds']]
  for score in kinds:
    lines[0] += [f'Δ {score.title}', '95 % interval', 'p', 'detectable']
  for name in found[kinds[0]]:
    last = found[kinds[-1]][name]
    said = verdict(groups[name], last)
    line = [groups[name][0]['label'], said, str(last.n)]
    for score in kinds:
      one = found[score][name]
      line += [f'{one.mean:+.3f}', _interval(one), _p(one.p)]
      line.append(_number(one.detectable))
    lines.append(line)
  return lines


def _interval(one):
  return '-' if np.isnan(one.low) else f'{one.low:+.3f} to {one.high:+.3f}'


def _p(p):
  if np.isnan(p):
    return '-'
  return '<.001' if p < 0.001 else f'{p:.3f}'.removeprefix('0')


def _number(value):
  return '-' if np.isnan(value) else f'{value:.3f}'


class Line(NamedTuple):
  """Settings of a family that differ in one, from the weakest pull on.

  Attributes:
    family: of the rows.
    label: without the setting.
    key: of the setting that differs.
    settings: what it is.
    groups: the rows of each.
  """

  family: str
  label: str
  key: str
  settings: list[float]
  groups: list[list[dict[str, Any]]]


def sweep(rows):
  """The rows that `lines` takes: those of tuning, or else all with settings."""
  settled = [row for row in rows if row.get('settings')]
  return [row for row in settled if row.get('phase') == 'tuning'] or settled


def lines(rows):
  """The `Line`s of the rows of a sweep; a family has several, or points alone.

  What differs along them is lambda or alpha, where those do; else of weight
  decay and learning rate that with more values.
  """
  families = {}
  for row in rows:
    families.setdefault(family(row), []).append(row)
  found = []
  for name, own in families.items():
    key = _moving(own)
    label = _SETTINGS.sub('', own[0]['label'])
    others = {}
    for row in own:
      rest = {k: v for k, v in row['settings'].items() if k != key}
      others.setdefault(tuple(sorted(rest.items(), key=str)), []).append(row)
    for line_rows in others.values():
      points = {}
      for row in line_rows:
        points.setdefault(row['settings'].get(key), []).append(row)
      settings = sorted(
        points,
        key=lambda x, sign=_PULLS[key]: -np.inf if x is None else sign * x,
      )
      found.append(
        Line(name, label, key, settings, [points[x] for x in settings])
      )
  return found


def _moving(rows):
  """The setting that differs along the lines of a family."""
  values = {
    key: {row['settings'].get(key) for row in rows} - {None} for key in _PULLS
  }
  for key in ('spd', 'alpha'):
    if len(values[key]) > 1:
      return key
  return max(_PULLS, key=lambda key: len(values[key]))


def mean(group, score):
  return float(np.mean([score(row) for row in group]))


def matched(rows, means, reference):
  """A table of the OOD score of every family at the reference's ID score.

  Of each family the line of the settings that are best on ID validation is
  followed from the strongest pull on, up to where its ID score is the
  reference's; between two settings OOD is on a straight line.

  Args:
    rows: of a sweep, see `sweep`.
    means: as `report.columns` takes them.
    reference: the family whose best settings on ID validation set the score.

  Returns:
    As `comparisons`.
  """
  id_score, ood_score = report.scores(rows, means)
  val = id_score._replace(sets=('val',))
  chosen = {}
  for line in lines(rows):
    for group in line.groups:
      quality = mean(group, val)
      if line.family not in chosen or quality > chosen[line.family][0]:
        chosen[line.family] = quality, line, group
  if reference not in chosen or ood_score is None:
    return []
  own = chosen[reference][2]
  goal, base = mean(own, id_score), mean(own, ood_score)
  table = [
    ['method', 'seeds', f'at {id_score.title} {goal:.3f}', ood_score.title],
  ]
  table[0] += [f'Δ to {chosen[reference][1].label}', '‖θ-θ₀‖']
  for name, (_, line, group) in chosen.items():
    seeds = str(len(group))
    if name == reference:
      point = _between(line, group, group, 0.0, ood_score)
    else:
      point = _crossing(line, id_score, ood_score, goal)
    if point is None:
      reached = [mean(group, id_score) for group in line.groups]
      where = f'not reached, {min(reached):.3f} to {max(reached):.3f}'
      table.append([line.label, seeds, where, '-', '-', '-'])
      continue
    where, ood, deviation = point
    cells = [f'{ood:.3f}', f'{ood - base:+.3f}', f'{deviation:.3f}']
    table.append([line.label, seeds, where, *cells])
  return table


def _crossing(line, id_score, ood_score, goal):
  """Where a line has an ID score: the setting, OOD, the distance; or None."""
  strongest = line.groups[::-1]
  for group, weaker in zip(strongest, strongest[1:] or strongest, strict=False):
    a, b = mean(group, id_score), mean(weaker, id_score)
    if min(a, b) <= goal <= max(a, b):
      share = (goal - a) / (b - a) if a != b else 0.0
      return _between(line, group, weaker, share, ood_score)
  return None


def _between(line, group, weaker, share, ood_score):
  pair = (group, weaker)
  values = [one[0]['settings'].get(line.key) for one in pair]
  where = ' to '.join(dict.fromkeys(f'{x:g}' for x in values if x is not None))
  numbers = [
    np.interp(share, [0, 1], [mean(one, score) for one in pair])
    for score in (ood_score, lambda row: row['deviation'])
  ]
  return f'{SYMBOLS[line.key]} {where}', *numbers


def readings(rows, means, reference):
  """The tables of a study's rows, `{title: lines}`.

  Of a sweep: of the settings that ID validation chose, of those within a
  standard error, of the controls of each setting with SPD, compared with it,
  and at the reference's ID score. Of another study, its comparisons.
  """
  found = {}
  own = [r for r in of_reading(rows, 'id') if family(r) == reference]

  def add(title, rows, own):
    if title:
      found[title] = report.lines(rows, means, in_short(rows, means))
      title += '. '
    if own:
      title += f'Compared with {own[0]["label"]}'
      found[title] = comparisons(rows, means, family(own[0]))

  if any(row.get('reading') for row in finals(rows)):
    add('Settings chosen on ID validation', of_reading(rows, 'id'), own)
    add(
      'Strongest pull within one standard error on ID validation',
      of_reading(rows, 'one_se'),
      own,
    )
  elif own:
    add('', of_reading(rows, 'id'), own)
  controls = [row for row in rows if row.get('phase') == 'control']
  for name in dict.fromkeys(row['matched_to'] for row in controls):
    matching = [row for row in controls if row['matched_to'] == name]
    seeds = {row['seed'] for row in matching}
    spd = [
      row
      for row in finals(rows)
      if row['method'] == name and row['seed'] in seeds
    ]
    label = spd[0]['label'] if spd else name
    add(f'Controls of {label}', spd + matching, spd)
  if swept := sweep(rows):
    found['At the same ID score'] = matched(swept, means, reference)
  return {title: table for title, table in found.items() if table}


def in_short(rows, means):
  """The columns of `report.columns` that a study is judged by."""
  scores = [score.title for score in report.scores(rows, means) if score]
  return [
    title
    for title in report.columns(rows, means)
    if title in ('method', '‖θ-θ₀‖', 'selected', 'decayed', *scores)
  ]
