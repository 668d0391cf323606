"""Tuning on ID validation: what is run, what is chosen, what it is held to.

A family is a method whose keys are varied; a setting is a method with values.
Everything here is a function of the config and of the rows so far, so that a
study that was stopped comes to the same choice.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments import checks, evidence, log, optimizers, report
from experiments.configs import base

KEYS = ('rate', 'weight_decay', 'spd', 'alpha')
FIRST_SEED = 1000  # of tuning; the final seeds lie below
# Optimizers whose weight decay pulls to the anchor, and is a strength then.
_PULLS = ('l2sp', 'l2sp_origin', 'l2sp_decoupled')
# Means of validation that differ by less are one.
_TIE = 1e-9


class Pass(NamedTuple):
  """Runs that can be planned together.

  Attributes:
    config: the study, with the settings for methods.
    seeds: of every method.
    about: `{method: what its rows have beside the runs'}`.
    keep: methods whose params a later pass starts from, or averages.
    stops: `{method: the step after which it is stopped}`.
    notes: what could not be planned.
  """

  config: ConfigDict
  seeds: tuple[int, ...]
  about: dict[str, dict]
  keep: frozenset[str] = frozenset()
  stops: dict[str, int] = {}  # noqa: RUF012
  notes: tuple[str, ...] = ()


class Choice(NamedTuple):
  """The settings that a family is represented by.

  Attributes:
    best: the best mean of validation; of equals the smallest strength.
    one_se: the largest strength within a standard error of the best, of equals
      the best one; `best` where the family has no strength.
  """

  best: str
  one_se: str


def parent(method):
  """The method that another one averages or starts from; '' for none."""
  return method.average_of or method.starts_from


def check(config):
  """Refuses a sweep that could not end, or that varies what has no effect.

  Raises:
    ValueError: saying what to change.
  """
  if config.tuning_seeds < 0:
    raise ValueError(
      f'config.tuning_seeds is {config.tuning_seeds}; it is 0 or more.'
    )
  if config.tuning_seeds and not config.sweep:
    raise ValueError(
      f'config.tuning_seeds is {config.tuning_seeds}, which has no effect: '
      'there is nothing to tune; set config.sweep, or this to 0.'
    )
  if config.tuning_seeds and config.num_seeds > FIRST_SEED:
    raise ValueError(
      f'config.num_seeds is {config.num_seeds}; the seeds from {FIRST_SEED} on '
      'are those of tuning.'
    )
  for family, grid in config.sweep.items():
    checks.one_of('sweep', family, config.methods)
    for key in grid:
      _check_values(config, family, key)
    if not grid:
      raise ValueError(
        f'config.sweep.{family} is empty; name a key of {", ".join(KEYS)}, or '
        'remove it.'
      )
  for family, other in config.controls.items():
    _check_control(config, family, other)


def _check_values(config, family, key):
  where, values = f'sweep.{family}.{key}', config.sweep[family][key]
  checks.one_of(f'sweep.{family}', key, KEYS)
  numbers = isinstance(values, tuple) and all(
    isinstance(value, int | float) for value in values
  )
  if not numbers or not values:
    raise ValueError(
      f'config.{where} is {values!r}; it is a tuple of the numbers to run.'
    )
  if len({f'{value:g}' for value in values}) < len(values):
    raise ValueError(f'config.{where} is {values}; name each value once.')
  method = config.methods[family]
  for keys, acts, why, _ in checks.METHOD_RULES:
    if key in keys and not acts(method):
      raise ValueError(
        f'config.{where} has no effect: {why}; remove it, or sweep another '
        'family.'
      )


def _check_control(config, family, others):
  key = f'controls.{family}'
  checks.one_of('controls', family, config.sweep)
  if not isinstance(others, tuple) or not others:
    raise ValueError(f'config.{key} is {others!r}; it is a tuple of families.')
  if config.methods[family].spd is None:
    raise ValueError(
      f'config.{key} has no effect: {family} has no SPD; name a family that '
      'has.'
    )
  for other in others:
    checks.one_of(key, other, config.sweep)
    method = config.methods[other]
    varied = _matched_key(method)
    values = config.sweep[other].get(varied, ())
    if not method.optimizer or parent(method) or len(values) < 2:
      raise ValueError(
        f'config.{key} has {other!r}, which cannot be brought as far as SPD '
        f'came: name a family that trains from theta_0, with two values of '
        f'{varied} or more in config.sweep.'
      )


def settings_of(config, family):
  """`{name: method}` of every combination of a family's values, in order."""
  method, grid = config.methods[family], dict(config.sweep.get(family, {}))
  found = {}
  for values in itertools.product(*grid.values()):
    changes = dict(zip(grid, values, strict=True))
    name = '_'.join([family, *(f'{k}_{v:g}' for k, v in changes.items())])
    name = name.replace('.', 'p')  # a ConfigDict takes no dot in a key
    found[name] = _changed(method, **changes)
  return found


def absolute(config, methods, method):
  """What a method sets, in numbers that stand without the config.

  Args:
    config: the study.
    methods: `{name: method}`, the one that is averaged among them.
    method: one of them.

  Returns:
    `{'learning_rate', 'weight_decay', 'spd', 'alpha'}`, those that it has. An
    average has those of the run that it averages.
  """
  if method.average_of:
    averaged = absolute(config, methods, methods[method.average_of])
    return averaged | {'alpha': method.alpha}
  if not method.optimizer:
    return {}
  found = {'learning_rate': method.rate * config.learning_rate}
  if method.optimizer not in optimizers.WITHOUT_DECAY:
    found['weight_decay'] = method.weight_decay
  if method.spd is not None:
    found['spd'] = method.spd
  return found


def strength(method):
  """How much a method holds its params back; None where it has no such key."""
  if method.average_of:
    return 1 - method.alpha
  if method.spd is not None:
    return method.spd
  return method.weight_decay if method.optimizer in _PULLS else None


def choose(settings, rows, num_val):
  r"""The settings of a family that its tuning rows choose, by validation alone.

  The standard error of the best mean is the larger one of

    SD of its runs / sqrt(runs)         and    sqrt(p (1 - p) / num_val),

  p being that mean: few seeds can agree by chance, and all of them share their
  validation set. The second one is exact for an accuracy alone.

  Args:
    settings: `{name: method}`.
    rows: of tuning, one or more of every setting.
    num_val: examples of the validation set.

  Returns:
    A `Choice`.
  """
  scores = {
    name: [validation(row) for row in rows if row['method'] == name]
    for name in settings
  }
  means = {name: float(np.mean(values)) for name, values in scores.items()}
  top = max(means.values())
  best = min(
    (name for name in means if means[name] >= top - _TIE),
    key=lambda name: strength(settings[name]) or 0.0,
  )
  error = standard_error(scores[best], num_val)
  within = [
    name
    for name in means
    if strength(settings[name]) is not None
    and means[name] >= top - error - _TIE
  ]
  if not within:
    return Choice(best, best)
  return Choice(
    best,
    max(
      within,
      key=lambda name: (
        strength(settings[name]),
        round(means[name] / _TIE),
      ),
    ),
  )


def standard_error(scores, num_val):
  """See `choose`."""
  mean = float(np.mean(scores))
  of_set = math.sqrt(max(mean * (1 - mean), 0.0) / num_val)
  if len(scores) < 2:
    return of_set
  return max(of_set, float(np.std(scores, ddof=1)) / math.sqrt(len(scores)))


def validation(row):
  """The first metric of the validation set."""
  return next(iter(row['metrics']['val'].values()))


def passes(config, rows, num_val) -> Iterator[Pass]:
  """What a study runs, one pass after the other.

  Without tuning seeds, that is every method with every seed. With them: all
  settings of every family with the seeds from `FIRST_SEED` on, those that start
  from others or average them after these, from their best setting; then what
  each family is represented by, and the other methods, with the final seeds;
  then the controls.

  Args:
    config: the study, checked.
    rows: those so far; what a pass ran is in them before the next one is asked
      for.
    num_val: examples of the validation set.
  """
  if not config.tuning_seeds:
    yield Pass(config, tuple(range(config.num_seeds)), {})
    return
  families = _families(config)
  parents = {parent(config.methods[family]) for family in families}
  methods, chosen, about = {}, {}, {}
  seeds = tuple(range(FIRST_SEED, FIRST_SEED + config.tuning_seeds))
  for _, group in itertools.groupby(
    families, lambda family: rank(config.methods[family])
  ):
    own = {}
    for family in group:
      own[family] = {
        name: _with_parent(method, chosen)
        for name, method in settings_of(config, family).items()
      }
      methods |= own[family]
      about |= {
        name: _about(config, methods, 'tuning', family, method)
        for name, method in own[family].items()
      }
    names = [name for settings in own.values() for name in settings]
    keep = {chosen[family].best for family in parents & chosen.keys()}
    for family in parents & own.keys():
      keep |= own[family].keys()
    yield Pass(_planned(config, methods, names), seeds, about, frozenset(keep))
    tuned = [row for row in rows if row['seed'] in seeds]
    for family, settings in own.items():
      chosen[family] = choose(settings, tuned, num_val)
  yield _final(config, methods, chosen)
  yield from _controls(config, rows, methods, chosen)


def table(tuned, final):
  """A Markdown table of the tuning, a line a setting.

  Validation, which chose, stands first; the test scores are shown, and chose
  nothing.

  Args:
    tuned: rows of tuning, one or more.
    final: rows of what was chosen.
  """
  chosen = {row['method']: row['reading'] for row in final}
  means = tuned[0]['means']
  lines = report.lines(tuned, means, evidence.in_short(tuned, means))
  lines[0] = [lines[0][0], 'validation', 'chosen', *lines[0][1:]]
  for i, rows in enumerate(report.group(tuned), 1):
    scores = [validation(row) for row in rows]
    spread = f' ± {np.std(scores, ddof=1):.3f}' if len(scores) > 1 else ''
    reading = ', '.join(chosen.get(rows[0]['method'], ()))
    name, *others = lines[i]
    lines[i] = [
      name,
      f'{np.mean(scores):.3f}{spread}',
      {'id': 'ID', 'one_se': '1 SE'}.get(reading, reading and 'ID, 1 SE'),
      *others,
    ]
  return report.markdown(lines)


def rank(method):
  """0 for theta_0, 1 for what starts from it, 2 from those, 3 for averages."""
  if method.average_of:
    return 3
  return 2 if method.starts_from else int(bool(method.optimizer))


def matched_value(deviations, target):
  """The value of a deviation, both as powers of each other between two values.

  Args:
    deviations: `{value: deviation}`, such as of learning rates; all above 0.
    target: the deviation that is wanted.

  Returns:
    The value, between the lowest two whose deviations have the target between
    them; None where there are none.
  """
  for (low, at_low), (high, at_high) in itertools.pairwise(
    sorted(deviations.items())
  ):
    if min(at_low, at_high) <= target <= max(at_low, at_high):
      whole = math.log(at_high / at_low)
      share = math.log(target / at_low) / whole if whole else 0.0
      return low * (high / low) ** share
  return None


def _families(config):
  """The swept ones and what they need, in the order in which they are run."""
  found = set(config.sweep)
  for _ in range(2):  # an average may be of a run that starts from another
    found |= {parent(config.methods[family]) for family in found} - {''}
  ordered = [name for name in config.methods if name in found]
  return sorted(ordered, key=lambda name: rank(config.methods[name]))


def _final(config, methods, chosen):
  """What each family is represented by, and all other methods."""
  own, about = {}, {}
  for family, method in config.methods.items():
    if family not in chosen:
      own[family] = _with_parent(method, chosen)
    for name in dict.fromkeys(chosen.get(family, ())):
      own[name] = methods[name]
  for family in config.methods:
    for name in dict.fromkeys(chosen.get(family, [family])):
      readings = _readings(chosen.get(family), name)
      about[name] = _about(config, own, 'final', family, own[name], readings)
  seeds = tuple(range(config.num_seeds))
  keep = _averaged(config, chosen)
  return Pass(_planned(config, own, own), seeds, about, keep)


def _averaged(config, chosen):
  """The settings whose runs controls average."""
  return frozenset(
    chosen[other].best
    for others in config.controls.values()
    for other in others
    if _matched_key(config.methods[other]) == 'rate'
  )


def _controls(config, rows, methods, chosen):
  """Passes of controls of each setting that a family with SPD came to.

  For each seed: other families, brought as far from theta_0 as SPD came, and
  SPD with as many selections of every layer, at random steps.
  """
  keep = _averaged(config, chosen)
  for family, others in config.controls.items():
    for name in dict.fromkeys(chosen[family]):
      of_spd = _by_seed(rows, name)
      values = {
        other: _matching(methods, rows, chosen[other].best, of_spd)
        for other in others
      }
      for seed in range(config.num_seeds):
        spd = of_spd[seed]
        for other in others:
          best = chosen[other].best
          row = _by_seed(rows, best)[seed]
          made = _matched(methods[best], row, spd['deviation'], values[other])
          plan = _control(config, other, best, methods[best], spd, made)
          yield plan._replace(keep=keep)
        plan = _drawn(config, family, methods[name], spd)
        yield plan._replace(keep=keep)


# What is done to a run of which step, alpha or setting is chosen, in labels.
_KINDS = {
  'averaged': 'averaged',
  'stopped': 'stopped early',
  'rate': 'at another rate',
  'weight_decay': 'at another decay',
  'spd': 'at another strength',
}


def _matched_key(method):
  """What is changed to bring it nearer: its strength, else its rate."""
  if method.spd is not None:
    return 'spd'
  return 'weight_decay' if method.optimizer in _PULLS else 'rate'


def _matching(methods, rows, best, of_spd):
  """The value of `_matched_key` whose deviation is SPD's in the mean, or None.

  By the deviations of tuning, of the settings that differ from the best one in
  that key alone.
  """
  key = _matched_key(methods[best])
  deviations = {
    method[key]: np.mean(
      [row['deviation'] for row in rows if _is_of(row, name, 'tuning')]
    )
    for name, method in methods.items()
    if _changed(method, **{key: methods[best][key]}) == methods[best]
  }
  # A value of 0 has no logarithm.
  deviations.pop(0.0, None)
  mean = np.mean([row['deviation'] for row in of_spd.values()])
  return matched_value(deviations, mean)


def _matched(method, row, deviation, value):
  """`{kind: (method, step to stop at)}` of controls; None that cannot be.

  Of a method that pulls towards theta_0 with another strength; of another one
  with another rate, its average with theta_0, whose deviation is linear in
  alpha, and its run up to the first step that is so far, with the same
  schedule.
  """
  key = _matched_key(method)
  made = {
    key: None if value is None else (_changed(method, **{key: value}), None)
  }
  if key == 'rate':
    made |= {'averaged': None, 'stopped': None}
    if 0 < deviation <= row['deviation']:
      alpha = deviation / row['deviation']
      average = base.method(method.label, average_of=row['method'], alpha=alpha)
      made['averaged'] = average, None
    history = np.asarray(row['history']['deviation'])
    reached = np.flatnonzero(history >= deviation)
    if reached.size:
      made['stopped'] = method, int(reached[0]) + 1
  return made


def _control(config, family, best, method, spd, made):
  """The pass of what `_matched` made, for a row of SPD."""
  own, about, stops, notes = {best: method}, {}, {}, []
  for kind, control in made.items():
    if control is None:
      notes.append(
        f'{method.label} {_KINDS[kind]} comes nowhere as far as '
        f'{spd["label"]}, seed {spd["seed"]}.'
      )
      continue
    name = f'{family}_{kind}_as_{spd["method"]}'
    own[name], stop = control
    about[name] = {
      **_about(config, own, 'control', family, own[name], spd['reading']),
      'label': f'{method.label} {_KINDS[kind]}, as far as {spd["label"]}',
      'matched_to': spd['method'],
    }
    if stop:
      stops[name] = stop
      about[name]['settings']['stopped'] = stop
  return Pass(
    _planned(config, own, own),
    (spd['seed'],),
    about,
    stops=stops,
    notes=tuple(notes),
  )


def _drawn(config, family, method, spd):
  """The pass of SPD that selects a layer as often as a run did, by chance."""
  path = log.Layers.path(config.output_dir, spd['method'], spd['seed'])
  if not path.exists():
    note = f'{path} is not there: no layer is drawn as often as in that run.'
    return Pass(_planned(config, {}, ()), (), {}, notes=(note,))
  shares = log.Layers.read(path).selected.mean(0)
  drawn = _changed(
    method, condition='random', fire=tuple(float(share) for share in shares)
  )
  name = f'{family}_drawn_as_{spd["method"]}'
  about = {
    **_about(config, {name: drawn}, 'control', family, drawn, spd['reading']),
    'label': f'{spd["label"]}, drawn as often',
    'matched_to': spd['method'],
  }
  own = {name: drawn}
  return Pass(_planned(config, own, own), (spd['seed'],), {name: about})


def _by_seed(rows, name):
  """The final rows of a method."""
  return {row['seed']: row for row in rows if _is_of(row, name, 'final')}


def _is_of(row, name, phase):
  return row['method'] == name and row['phase'] == phase


def _about(config, methods, phase, family, method, readings=None):
  """What a row of a pass has beside what it has anyway."""
  swept = config.sweep.get(family, {})
  settings = absolute(config, methods, method)
  label = report.label(method)
  if 'rate' in swept:
    label += f', lr {settings["learning_rate"]:g}'
  if 'weight_decay' in swept:
    label += f', decay {settings["weight_decay"]:g}'
  if readings == ['one_se']:
    label += ' (1 SE)'
  about = {'label': label, 'phase': phase, 'family': family}
  about['settings'] = settings
  return about if readings is None else about | {'reading': readings}


def _readings(choice, name):
  """'id' and 'one_se', where that is the setting; none of what is not tuned."""
  readings = zip(('id', 'one_se'), choice or (), strict=False)
  return [reading for reading, chosen in readings if chosen == name]


def _with_parent(method, chosen):
  """The method, of the best setting of what it averages or starts from."""
  changes = {
    key: chosen[method[key]].best
    for key in ('average_of', 'starts_from')
    if method[key] in chosen
  }
  return _changed(method, **changes)


def _changed(method, **changes):
  changed = method.copy_and_resolve_references()
  changed.update(changes)
  return changed


def _planned(config, methods, names):
  """The study with some of the methods, and those that they need."""
  own = config.copy_and_resolve_references()
  own.methods = base.ordered()
  names = list(names)
  for name in names:
    if parent(methods[name]) and parent(methods[name]) not in names:
      names.append(parent(methods[name]))
  own.methods.update({name: methods[name] for name in names})
  for key in ('eval_sets', 'means'):  # a copy has lost their order
    own[key] = config[key]
  return own
