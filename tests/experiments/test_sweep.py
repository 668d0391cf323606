"""Tuning: what is run, what is chosen, what it is held to."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from experiments import compare, report, resume, study, sweep, train
from experiments.configs import base, evidence
from tests.experiments import kinds, tiny_study


def settings(**strengths):
  """Methods with SPD, by name; None for AdamW's."""
  return {
    name: base.method('', optimizer='adamw')
    if strength is None
    else base.method('', optimizer='adam', spd=strength)
    for name, strength in strengths.items()
  }


def rows_of(**scores):
  """Rows with a score a seed, and no other set that could be looked at."""
  return [
    {'method': name, 'seed': seed, 'metrics': {'val': {'acc': v, 'other': -v}}}
    for name, values in scores.items()
    for seed, v in enumerate(values, 1000)
  ]


@pytest.mark.parametrize(
  ('strengths', 'scores', 'best', 'one_se'),
  [
    # By the mean, not by the best run.
    ({'a': 1.0, 'b': 3.0}, {'a': (0.9, 0.5), 'b': (0.8, 0.7)}, 'b', 'b'),
    # A tie goes to the smaller strength, wherever it stands.
    ({'a': 3.0, 'b': 1.0}, {'a': (0.8, 0.8), 'b': (0.8, 0.8)}, 'b', 'a'),
    # To the last bit the sums of equal runs need not be equal.
    (
      {'a': 3.0, 'b': 1.0},
      {'a': (0.1, 0.2, 0.3), 'b': (0.3, 0.2, 0.1)},
      'b',
      'a',
    ),
    # N = 100: sqrt(.8 * .2 / 100) = .04, which .76 is within and .759 is not.
    ({'a': 1.0, 'b': 3.0}, {'a': (0.8, 0.8), 'b': (0.76, 0.76)}, 'a', 'b'),
    ({'a': 1.0, 'b': 3.0}, {'a': (0.8, 0.8), 'b': (0.759, 0.759)}, 'a', 'a'),
    # The SD of .7 and .9 is .1414, by sqrt(2): .1, more than .04.
    ({'a': 1.0, 'b': 3.0}, {'a': (0.7, 0.9), 'b': (0.701, 0.701)}, 'a', 'b'),
    ({'a': 1.0, 'b': 3.0}, {'a': (0.7, 0.9), 'b': (0.699, 0.699)}, 'a', 'a'),
    # The spread is the best one's, not that of what is compared with it.
    ({'a': 1.0, 'b': 3.0}, {'a': (0.8, 0.8), 'b': (0.5, 0.9)}, 'a', 'a'),
    # The largest of those within, at the edge of the grid or not.
    (
      {'a': 0.3, 'b': 1.0, 'c': 3.0, 'd': 6.0},
      {'a': (0.79,), 'b': (0.8,), 'c': (0.77,), 'd': (0.7,)},
      'b',
      'c',
    ),
    # A larger one that is the best has no other reading.
    ({'a': 1.0, 'b': 3.0}, {'a': (0.79,), 'b': (0.8,)}, 'b', 'b'),
    # Of one strength with several rates the better one.
    (
      {'a': 1.0, 'b': 3.0, 'c': 3.0},
      {'a': (0.8,), 'b': (0.77,), 'c': (0.78,)},
      'a',
      'c',
    ),
    ({'a': 3.0, 'b': 3.0}, {'a': (0.8,), 'b': (0.8,)}, 'a', 'a'),
    # Without a strength there is the best alone; of equals the first.
    ({'a': None, 'b': None}, {'a': (0.8,), 'b': (0.8,)}, 'a', 'a'),
    ({'a': None, 'b': None}, {'a': (0.79,), 'b': (0.8,)}, 'b', 'b'),
  ],
)
def test_the_choice(strengths, scores, best, one_se):
  chosen = sweep.choose(settings(**strengths), rows_of(**scores), 100)
  assert chosen == sweep.Choice(best, one_se)


def test_strengths():
  method = base.method
  assert sweep.strength(method('', average_of='x', alpha=0.25)) == 0.75
  assert sweep.strength(method('', optimizer='l2sp', weight_decay=0.1)) == 0.1
  assert sweep.strength(method('', optimizer='adamw', weight_decay=0.1)) is None
  assert (
    sweep.strength(method('', optimizer='adamw', weight_decay=0.1, spd=2.0))
    == 2.0
  )


def test_the_error_where_it_has_no_number():
  # Of r2, which is no share: there is no binomial.
  assert sweep.standard_error([-3.0], 10) == 0
  assert sweep.standard_error([-3.0, -1.0], 10) == pytest.approx(1.0)


def test_a_rate_by_its_deviation():
  def law(rate):
    return 3e3 * rate**0.8

  rates = (1e-5, 3e-5, 1e-4)
  deviations = {rate: law(rate) for rate in rates}
  for rate in (*rates, 2e-5, 7e-5):
    found = sweep.matched_value(deviations, law(rate))
    assert found == pytest.approx(rate, rel=1e-9)
  assert sweep.matched_value(deviations, law(9e-6)) is None
  assert sweep.matched_value(deviations, law(1.1e-4)) is None
  # Between the neighbours alone, and the lowest of two.
  bent = {1.0: 1.0, 4.0: 4.0, 16.0: 2.0}
  assert sweep.matched_value(bent, 2.0) == pytest.approx(2.0)
  assert sweep.matched_value({1.0: 2.0, 3.0: 2.0}, 2.0) == 1.0


@pytest.fixture
def config(tiny_clip, tmp_path):
  """What is more tuned learns more of it: noise, with a colour of the class."""
  rng = np.random.default_rng(0)
  for label, name in enumerate('abc'):
    (tmp_path / 'noise' / name).mkdir(parents=True)
    for i in range(40):
      pixels = rng.normal(128, 60, (20, 20, 3))
      pixels[..., label] += rng.normal(40, 30)
      pixels = pixels.clip(0, 255).astype(np.uint8)
      Image.fromarray(pixels).save(tmp_path / 'noise' / name / f'{i}.png')
  config = tiny_study.get_config(str(tmp_path))
  probe = {'optimizer': 'adamw', 'train': 'head'}
  config.methods.update(
    {
      'l2sp': base.method('L2-SP', optimizer='l2sp'),
      'probe': base.method('probe', **probe),
      'lp_ft': base.method('LP-FT', optimizer='adamw', starts_from='probe'),
    }
  )
  config.update(
    output_dir=str(tmp_path / 'runs'),
    num_steps=6,
    eval_every=2,
    num_seeds=2,
    tuning_seeds=2,
    sweep={
      'adamw': {'rate': (0.1, 1.0), 'weight_decay': (0.0, 0.1)},
      'spd_1': {'rate': (0.3, 1.0), 'spd': (0.3, 3.0)},
      'l2sp': {'weight_decay': (0.01, 1.0)},
      'wise_ft': {'alpha': (0.25, 0.75)},
    },
    controls={'spd_1': ('adamw', 'l2sp')},
  )
  return config


def test_the_settings(config):
  found = sweep.settings_of(config, 'adamw')
  assert {
    name: (method.rate, method.weight_decay) for name, method in found.items()
  } == {
    'adamw_rate_0p1_weight_decay_0': (0.1, 0.0),
    'adamw_rate_0p1_weight_decay_0p1': (0.1, 0.1),
    'adamw_rate_1_weight_decay_0': (1.0, 0.0),
    'adamw_rate_1_weight_decay_0p1': (1.0, 0.1),
  }
  assert sweep.absolute(
    config, found, found['adamw_rate_0p1_weight_decay_0p1']
  ) == {
    'learning_rate': pytest.approx(1e-3),
    'weight_decay': 0.1,
  }
  found = sweep.settings_of(config, 'wise_ft')
  methods = {**config.methods, **found}
  assert sweep.absolute(config, methods, found['wise_ft_alpha_0p25']) == {
    'learning_rate': 1e-2,
    'weight_decay': 0.1,
    'alpha': 0.25,
  }


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'sweep': {'adam': {'rate': (1.0,)}}}, "sweep is 'adam'; it must be one"),
    ({'sweep': {'adamw': {}}}, r'sweep\.adamw is empty; name a key'),
    (
      {'sweep': {'adamw': {'rate': ()}}},
      r'sweep\.adamw\.rate is \(\); it is a',
    ),
    ({'sweep': {'adamw': {'rate': 1.0}}}, r'sweep\.adamw\.rate is 1\.0; it is'),
    (
      {'sweep': {'adamw': {'rate': ('1',)}}},
      r"rate is \('1',\); it is a tuple",
    ),
    ({'sweep': {'adamw': {'rate': (1.0, 1)}}}, 'name each value once'),
    ({'sweep': {'adamw': {'rate': (-1.0,)}}}, r'rate is -1\.0; it is from 0'),
    ({'sweep': {'adamw': {'layer_decay': (0.5,)}}}, 'be one of rate, weight_'),
    (
      {'sweep': {'adamw': {'alpha': (0.5,)}}},
      'alpha has no effect: nothing is',
    ),
    (
      {'sweep': {'wise_ft': {'rate': (0.5,)}}},
      'rate has no effect: it is of a',
    ),
    (
      {'sweep': {'zero_shot': {'spd': (1.0,)}}},
      'spd has no effect: it is of a',
    ),
    (
      {'sweep': {'spd_1': {'weight_decay': (0.1,)}}},
      'weight_decay has no effect: the optimizer takes none',
    ),
    ({'sweep': {}}, 'tuning_seeds is 2, which has no effect'),
    ({'tuning_seeds': -1}, 'tuning_seeds is -1'),
    ({'num_seeds': 1001}, 'num_seeds is 1001; the seeds from 1000 on are'),
    ({'controls': {'spd': ('adamw',)}}, "controls is 'spd'; it must be one"),
    ({'controls': {'spd_1': 'adamw'}}, "'adamw'; it is a tuple of families"),
    ({'controls': {'spd_1': ()}}, r'\(\); it is a tuple of families'),
    ({'controls': {'spd_1': ('adam',)}}, r"spd_1 is 'adam'; it must be one"),
    ({'controls': {'adamw': ('spd_1',)}}, 'no effect: adamw has no SPD'),
    (
      {
        'sweep': {'spd_1': {'spd': (1.0,)}, 'l2sp': {'weight_decay': (1.0,)}},
        'controls': {'spd_1': ('l2sp',)},
      },
      "has 'l2sp', .* with two values of weight_decay or more",
    ),
    ({'controls': {'spd_1': ('wise_ft',)}}, 'trains from theta_0'),
  ],
)
def test_mistakes_are_refused_at_once(config, changes, message):
  for key, value in changes.items():
    if key in ('sweep', 'controls'):
      config[key] = base.ordered()
      config[key].update(value)
    else:
      config[key] = value
  if 'sweep' in changes and 'controls' not in changes:
    config.controls = base.ordered()
  with pytest.raises(ValueError, match=message):
    compare.configure(config)


def test_a_pass_has_the_order_of_the_study(config):
  for name in ('c', 'b', 'a'):
    config.eval_sets[name] = config.eval_sets.ID
  plan = next(sweep.passes(config, [], 24))
  assert list(plan.config.eval_sets) == ['ID', 'c', 'b', 'a']
  assert list(plan.config.methods)[-1] == 'l2sp_weight_decay_1'


@pytest.mark.parametrize(
  ('methods', 'controls'),
  [
    (['adamw', 'wise_ft'], {}),
    (['spd_1'], {}),
    (['spd_1', 'l2sp'], {'spd_1': ('l2sp',)}),
  ],
)
def test_what_is_not_run_is_not_tuned_and_no_control(config, methods, controls):
  compare.configure(config, methods=methods)
  assert list(config.sweep) == methods
  assert config.controls.to_dict() == controls


def test_an_average_is_of_the_best_setting(config):
  config.methods.wise_ft.average_of = 'spd_1'
  config.controls = base.ordered()
  rows = []
  plans = sweep.passes(config, rows, 100)
  plan = next(plans)
  best, strong = 'spd_1_rate_1_spd_0p3', 'spd_1_rate_1_spd_3'
  scores = {best: 0.8, strong: 0.78}
  of_spd = [name for name in plan.config.methods if name.startswith('spd')]
  assert len(of_spd) == 4
  assert plan.keep == {*of_spd}
  assert plan.seeds == (1000, 1001)
  for name in plan.config.methods:
    rows += rows_of(**{name: [scores.get(name, 0.5)] * 2})
  plan = next(plans)
  averages = [m for m in plan.config.methods.values() if m.average_of]
  assert [(m.average_of, m.alpha) for m in averages] == [
    (best, 0.25),
    (best, 0.75),
  ]
  assert set(plan.config.methods) - {best} == {
    'wise_ft_alpha_0p25',
    'wise_ft_alpha_0p75',
  }
  for name in plan.config.methods:
    rows += rows_of(**{name: [0.7] * 2})
  plan = next(plans)
  assert plan.seeds == (0, 1)
  assert plan.about[best]['reading'] == ['id']
  assert plan.about[strong]['reading'] == ['one_se']
  # Equal averages: the weaker one is the best, the stronger one within.
  assert plan.about['wise_ft_alpha_0p75']['reading'] == ['id']
  assert plan.about['wise_ft_alpha_0p25']['reading'] == ['one_se']
  assert plan.config.methods.wise_ft_alpha_0p25.average_of == best
  assert next(plans, None) is None


def finish(config):
  compare.compare(config, compare.configure(config))
  results = json.loads(
    (pathlib.Path(config.output_dir) / 'results.json').read_text()
  )
  return results['rows']


def of(rows, **values):
  return [row for row in rows if values.items() <= row.items()]


def same(row):
  return {k: row[k] for k in row if k not in ('seconds', 'waiting', 'command')}


def test_a_study_is_tuned_chosen_and_controlled(
  config, started, tmp_path, capsys, monkeypatch
):
  programs = train.jit_step._cache_size()
  rows = finish(config)
  # AdamW, SPD, L2-SP, the probe, drawn SPD: one each, whatever the rate, the
  # strength and the shares.
  assert train.jit_step._cache_size() - programs == 5
  everything = list(started)
  assert len(everything) == len(set(everything))

  tuned = of(rows, phase='tuning')
  assert {row['seed'] for row in tuned} == {1000, 1001}
  numbers = {family: len(of(tuned, family=family)) for family in config.sweep}
  assert numbers == {'adamw': 8, 'spd_1': 8, 'l2sp': 4, 'wise_ft': 4}
  num_val = 24
  final = of(rows, phase='final')
  assert {row['seed'] for row in final} == {0, 1}
  chosen = {}
  for family in config.sweep:
    own = sweep.settings_of(config, family)
    choice = sweep.choose(own, tuned, num_val)
    chosen[family] = choice
    for name in own:
      readings = [
        reading
        for reading, setting in zip(('id', 'one_se'), choice, strict=True)
        if setting == name
      ]
      for seed in (0, 1):
        found = of(final, method=name, seed=seed)
        assert len(found) == bool(readings)
        for row in found:
          assert row['reading'] == readings
          assert row['family'] == family
  for seed in (0, 1):
    (row,) = of(final, method='zero_shot', seed=seed)
    assert (row['reading'], row['settings']) == ([], {})
    assert len(of(final, method='lp_ft', seed=seed)) == 1
    # What starts from a family starts from its best setting.
    (after,) = of(final, method='after', seed=seed)
    (adamw,) = of(final, method=chosen['adamw'].best, seed=seed)
    assert after['history']['loss'][0] < adamw['history']['loss'][0] - 0.05
  # SPD acted, and was told apart from what it was tuned among.
  assert all(row['decayed'] > 0 for row in of(final, family='spd_1'))
  assert (
    len({json.dumps(r['settings']) for r in of(tuned, family='spd_1')}) == 4
  )
  # The average is of the best setting's runs.
  for row in of(rows, family='wise_ft'):
    (trained,) = of(
      rows, method=chosen['adamw'].best, seed=row['seed'], phase=row['phase']
    )
    assert row['deviation'] == pytest.approx(
      row['settings']['alpha'] * trained['deviation'], rel=1e-4
    )
    assert row['settings'] == trained['settings'] | {
      'alpha': row['settings']['alpha']
    }

  ways = set()
  for row in of(rows, phase='control'):
    (spd,) = of(final, method=row['matched_to'], seed=row['seed'])
    (adamw,) = of(final, method=chosen['adamw'].best, seed=row['seed'])
    assert row['reading'] == spd['reading']
    kind = row['method'].removeprefix(f'{row["family"]}_').split('_as_')[0]
    ways.add((row['family'], kind))
    far = spd['deviation']
    if kind == 'averaged':
      assert row['deviation'] == pytest.approx(far, rel=1e-4)
    elif kind == 'stopped':
      step = row['settings']['stopped']
      history = adamw['history']['deviation']
      assert row['step'] == step == len(row['history']['loss'])
      assert row['deviation'] == pytest.approx(history[step - 1], rel=1e-5)
      assert row['history']['loss'] == adamw['history']['loss'][:step]
      assert history[step - 1] >= far > max([0, *history[: step - 1]])
    elif kind == 'drawn':
      # As often, by chance: the shares are of 6 steps of every layer.
      assert row['settings'] == spd['settings']
      assert row['selected'] == pytest.approx(spd['selected'], abs=0.2)
      assert row['selected'] != spd['selected']
    else:
      key = {'rate': 'learning_rate'}.get(kind, kind)
      values = [one['settings'][key] for one in of(tuned, family=row['family'])]
      assert min(values) < row['settings'][key] < max(values)
  assert ways == {
    ('adamw', 'averaged'),
    ('adamw', 'stopped'),
    ('adamw', 'rate'),
    ('l2sp', 'weight_decay'),
    ('spd_1', 'drawn'),
  }

  folder = pathlib.Path(config.output_dir)
  table = (folder / 'table.md').read_text()
  assert table.count('\n') == 2 + len({row['method'] for row in final})
  tuning = (folder / 'sweep.md').read_text()
  assert tuning.count('\n') == 2 + len({row['method'] for row in tuned})
  assert '1 SE' in tuning
  assert (folder / 'controls.md').exists()
  assert not (folder / 'params').exists()

  # Wherever it is killed, only the run in flight is lost.
  config.output_dir = str(tmp_path / 'again')
  del started[:]
  lives = 0
  while True:
    started.lives, lives = 5, lives + 1
    try:
      again = finish(config)
      break
    except kinds.Stop:
      pass
  assert lives > 4
  assert list(started) == everything
  assert [*map(same, again)] == [*map(same, rows)]
  # Nothing is left to run: nothing is loaded.
  monkeypatch.setattr(study, 'load', None)
  assert finish(config) == again
  capsys.readouterr()


def test_without_tuning_seeds_the_methods_are_as_they_are(config, started):
  config.update(tuning_seeds=0, num_seeds=1)
  rows = finish(config)
  assert {row['method'] for row in rows} == set(config.methods)
  assert not any('phase' in row for row in rows)


def test_another_sweep_in_the_folder_is_refused(config):
  config.update(tuning_seeds=1, num_seeds=1, num_steps=2)
  sources = compare.configure(config, methods=['adamw'])
  config.sweep.adamw = {'rate': (1.0,)}
  compare.compare(config, sources)
  config.sweep.adamw = {'rate': (0.5, 1.0)}
  with pytest.raises(
    ValueError, match=r'config\.sweep\.adamw\.rate is \[1\.0\]'
  ):
    resume.Saved(config, {})


def test_more_families_and_final_seeds_go_on(config, started):
  methods, swept = config.methods.to_dict(), config.sweep.to_dict()
  config.update(tuning_seeds=1, num_seeds=1, num_steps=2)
  compare.configure(config, methods=['adamw'])
  first = finish(config)
  del started[:]
  config.methods, config.sweep = base.ordered(), base.ordered()
  config.methods.update({name: methods[name] for name in ('adamw', 'wise_ft')})
  config.sweep.update({name: swept[name] for name in ('adamw', 'wise_ft')})
  config.num_seeds = 2
  rows = finish(config)
  assert rows[: len(first)] == first
  # What is averaged is run again, whose params were not kept.
  (best,) = {row['method'] for row in first if row['phase'] == 'final'}
  assert started == [(best, 1000), (best, 0), (best, 1)]


def test_tables_tell_the_phases_apart():
  phases = ('tuning', 'final', 'final')
  rows = [{'method': 'a', 'phase': phase} for phase in phases]
  assert [len(group) for group in report.group(rows)] == [1, 2]


def test_the_table_of_the_tuning_has_what_chose_first():
  shared = dict.fromkeys(('selected', 'decayed', 'step', 'seconds'))
  shared |= {'means': {}, 'phase': 'tuning', 'deviation': 2.0}
  rows = [
    {'method': name, 'label': name.upper(), 'seed': seed, **shared}
    | {'metrics': {'val': {'accuracy': val}, 'ID': {'accuracy': 0.25}}}
    for name, scores in (('weak', (0.5, 0.7)), ('mid', (0.8, 0.8)))
    for seed, val in enumerate(scores)
  ]
  final = [{'method': 'mid', 'reading': ['id', 'one_se']}]
  lines = [
    [cell.strip() for cell in line.split('|')[1:-1]]
    for line in sweep.table(rows, final).splitlines()
  ]
  assert lines[0][:4] == ['method', 'validation', 'chosen', 'ID acc']
  assert lines[2][:4] == ['WEAK', '0.600 ± 0.141', '', '0.250 ± 0.000']
  assert lines[3][:4] == ['MID', '0.800 ± 0.000', 'ID, 1 SE', '0.250 ± 0.000']
  for reading, mark in (('id', 'ID'), ('one_se', '1 SE')):
    table = sweep.table(rows, [{'method': 'weak', 'reading': [reading]}])
    assert f'| {mark} |' in ' '.join(table.splitlines()[2].split())


@pytest.mark.parametrize('arg', evidence.STUDIES)
def test_the_evidence_has_one_budget(arg, tmp_path):
  config = evidence.get_config(arg)
  config.output_dir = str(tmp_path)
  sizes = {
    family: len(sweep.settings_of(config, family)) for family in config.sweep
  }
  trained = dict.fromkeys(('adamw', 'l2sp', 'spd', 'spd_always'), 6)
  assert sizes == trained | {'wise_ft': 3}
  sweep.check(config)
  if arg == 'elpv':
    compare.configure(config)
  else:
    assert config.first_stage.num_steps == 300
  with pytest.raises(ValueError, match='evidence:pacs is no study'):
    evidence.get_config('pacs')
