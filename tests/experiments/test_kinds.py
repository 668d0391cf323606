"""Every kind of study, in every way of running it."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import (
  benchmark,
  cli,
  compare,
  examples,
  export,
  main,
  optimizers,
  parallel,
  resume,
  runs,
  study,
  topology,
  train,
)
from experiments.data import sources
from experiments.models import lora
from tests.experiments import kinds, toy

# A study on eight devices, but for accumulation; and whether params are split.
WAYS = {
  'jit': ({}, False),
  'fsdp': ({'layout': 'fsdp'}, True),
  'fsdp:4': ({'layout': 'fsdp:4', 'accumulate': 2}, True),
  'pmap': ({'layout': 'pmap'}, False),
  'pmap in parts': ({'layout': 'pmap', 'accumulate': 2}, False),
  'parts': ({'accumulate': 4}, False),
}


@pytest.fixture(autouse=True)
def installed(monkeypatch):
  monkeypatch.setattr(parallel, '_SMALL', 0)
  monkeypatch.setitem(study.KINDS, 'regression', toy)


@pytest.fixture(params=kinds.KINDS)
def config(request, noise, tiny_clip, tmp_path):
  config = kinds.tiny(request.param, noise)
  config.update(output_dir=str(tmp_path), num_steps=12, eval_every=6)
  return config


def load(config, name):
  fine_tuning = study.load(config, study.check(config), cli.progress)
  return runs.adapt(fine_tuning, config.methods[name], 0)


_alone = {}  # the run of each kind and method on one device


def run(config, name):
  return runs.run(config, load(config, name), name, 0)


@pytest.mark.parametrize('cached', [False, True])
@pytest.mark.parametrize(
  'config', ['classification', 'segmentation', 'vqa'], indirect=True
)
def test_a_set_knows_which_of_its_examples_belong_together(
  config, request, cached
):
  if cached:
    name = request.node.callspec.params['config']
    config.first_block = kinds.KINDS[name].first_block
  opened = study.check(config)
  name = next(iter(config.eval_sets))
  opened[name] = sources.Mapped(opened[name], lambda image, index: image)
  opened[name].groups = np.arange(len(opened[name])) // 2
  found = study.load(config, opened, cli.progress).sets[name].groups
  np.testing.assert_array_equal(found, opened[name].groups)


# What LoRA adds to a way is the same for all kinds: of most of them two do.
_OF_LORA = ('jit', 'fsdp:4')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('config', 'name', 'way'),
  [
    (kind, name, way)
    for kind in kinds.KINDS
    for name in ('spd_1', 'lora_spd')
    for way in WAYS
    if name == 'spd_1' or kind == 'classification' or way in _OF_LORA
  ],
  indirect=['config'],
)
def test_every_way_takes_the_same_steps(config, way, name, monkeypatch):
  config.update(batch_size=32, eval_batch_size=32)
  key = config.task, name
  if key not in _alone:
    _alone[key] = run(config, name)
  alone = _alone[key]
  changes, is_split = WAYS[way]
  if way != 'parts':
    monkeypatch.setattr(parallel, 'all_devices', jax.devices)
  config.update(changes)
  found = run(config, name)
  # Sums in another order.
  np.testing.assert_allclose(
    found.history['loss'],
    alone.history['loss'],
    rtol=kinds.KINDS[config.task].rtol,
    atol=2e-5,
  )
  np.testing.assert_allclose(
    found.history['deviation'], alone.history['deviation'], rtol=2e-3
  )
  assert found.history['decayed'].mean() > 0.05
  assert abs(found.history['decayed'] - alone.history['decayed']).max() < 0.3
  leaves = jax.tree.leaves(found.params)
  devices = 1 if way == 'parts' else 8
  assert {len(leaf.sharding.device_set) for leaf in leaves} == {devices}
  whole = all(leaf.sharding.is_fully_replicated for leaf in leaves)
  assert whole == (not is_split)


def test_a_study_and_its_runs_have_the_same_rows(config, capsys):
  """`compare`, and `main` method by method."""
  config.update(num_steps=4, eval_every=2)
  sources = compare.configure(config, seeds=1)
  saved = resume.Saved(config, {})
  compare.run(config, study.load(config, sources, cli.progress), saved)
  table = {row['method']: row for row in saved.rows}
  assert set(table) == set(config.methods)
  drawn = {
    row['method']: examples.read_draws(config.output_dir, row)
    for row in saved.rows
  }
  assert set(drawn['zero_shot']) == set(config.eval_sets)
  rows = []
  for name in ('zero_shot', 'adamw', 'lora', 'lora_after'):
    rows += main.run(config, name, 0)
  capsys.readouterr()
  names = {row['method'] for row in rows}
  assert names >= {'zero_shot', 'adamw', 'lora', 'lora_after', 'lora_wise_ft'}
  for row in rows:
    theirs = table[row['method']]
    for key in ('metrics', 'step', 'label', 'selected'):
      assert row[key] == theirs[key], (row['method'], key)
    assert row['deviation'] == pytest.approx(theirs['deviation'], rel=1e-6)
    again = examples.read_draws(config.output_dir, row)
    for name, metrics in again.items():
      for metric, values in metrics.items():
        assert values.shape == (examples.DRAWS,)
        np.testing.assert_array_equal(
          values, drawn[row['method']][name][metric]
        )
        # Some metrics of draws are biased a little.
        score = row['metrics'][name][metric]
        assert abs(np.nanmean(values) - score) < np.nanstd(values) + 0.05
  # Of the product of the factors, which is not linear in them.
  wise, whole = table['lora_wise_ft'], table['lora']
  assert wise['deviation'] == pytest.approx(whole['deviation'] / 4, rel=0.2)
  # It goes on from both factors.
  after = table['lora_after']['history']['deviation']
  np.testing.assert_allclose(after, whole['deviation'], rtol=1e-3)


def test_lora_of_nothing_is_refused_before_anything_is_trained(config):
  config.methods.lora_spd.lora_modules = 'nothing'
  fine_tuning = study.load(config, study.check(config), cli.progress)
  saved = resume.Saved(config, {})
  with pytest.raises(ValueError, match="'nothing' matches no whole path of th"):
    compare.run(config, fine_tuning, saved)
  assert not saved.rows


def test_an_adapted_model_is_its_merged_one(config):
  """And SPD has no anchor for its factors, but for a new head."""
  tuning = load(config, 'lora_spd')
  method = optimizers.from_config(config, config.methods.lora_spd)
  state = tuning.init(*method, tuning.pretrained)
  anchor = optax.tree.get(state.opt_state, 'SPDState').anchor
  assert {
    str(path[0].key) for path, _ in jax.tree_util.tree_leaves_with_path(anchor)
  } == {'head'} & set(nnx.to_pure_dict(tuning.pretrained))
  found = runs.run(config, tuning, 'lora_spd', 0)
  model = nnx.merge(tuning.graphdef, found.params, tuning.frozen)
  merged = lora.merge(model)
  start = nnx.merge(tuning.graphdef, tuning.pretrained, tuning.frozen)
  batch = next(tuning.sets['val'].batches(8))
  outputs, expected, before = (
    jax.device_get(tuning.task.outputs(one, batch))
    for one in (merged, model, start)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    outputs,
    expected,
  )
  apart = optax.tree.sub(*(nnx.state(m) for m in (merged, lora.merge(start))))
  assert tuning.deviation(found.params) == pytest.approx(
    float(optax.tree.norm(apart)), rel=1e-4
  )
  moved = jax.tree.map(lambda a, b: abs(a - b).max(), outputs, before)
  assert max(jax.tree.leaves(moved)) > 1e-3
  assert not any(
    isinstance(node, lora.LoRALinear) for _, node in nnx.iter_graph(merged)
  )


@pytest.mark.parametrize(('dropout', 'losses'), [(0.0, 1), (0.5, 2)])
def test_lora_misses_its_input_in_training_alone(config, dropout, losses):
  config.methods.lora.lora_dropout = dropout
  tuning = load(config, 'lora')
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda p: p + 0.1 * rng.normal(size=p.shape).astype(p.dtype),
    tuning.pretrained,
  )
  batch = next(tuning.sets['val'].batches(8))
  program = tuning.program(None)
  assert losses == len(
    {float(program.loss(params, tuning.frozen, batch, 0, i)) for i in (1, 2)}
  )
  first, again = (tuning.evaluate(params, tuning.sets) for _ in range(2))
  assert first == again


def test_a_study_starts_from_what_a_run_made(config, tmp_path):
  config.update(num_steps=4, eval_every=2)
  config.methods.lora.rate *= 10  # for other metrics than at the start
  if config.task == 'vqa':
    config.head = 'tied'  # an untied one is no PaliGemma's
  ended = main.run(config, 'lora', 0)[0]
  run = tmp_path / 'lora_0'
  if not hasattr(study.kind(config), 'exported'):
    with pytest.raises(ValueError, match='whose models are not exported'):
      export.export(run, 'safetensors')
    return
  start = main.run(config, 'zero_shot', 0)[0]
  assert start['metrics'] != ended['metrics']
  folder, _, _ = export.export(run, 'safetensors')
  if config.task == 'classification':
    config.head = 'pretrained'
  config.model.pretrained = str(folder)
  config.output_dir = str(tmp_path / 'next')
  again = main.run(config, 'zero_shot', 0)[0]
  for name, metrics in ended['metrics'].items():
    assert again['metrics'][name] == pytest.approx(metrics, abs=1e-6)
  folder, files, _ = export.export(run, 'peft', tmp_path / 'adapters')
  assert 'adapter_model.safetensors' in files


def test_an_anchor_that_is_elsewhere_is_told(config):
  tuning = load(config, 'spd_1')
  method = optimizers.from_config(config, config.methods.spd_1)
  state = tuning.init(*method, tuning.pretrained)
  assert train.is_anchored(state.opt_state, tuning.pretrained)
  moved = jax.tree.map(lambda x: x + 1, tuning.pretrained)
  assert not train.is_anchored(state.opt_state, moved)


def test_the_study_s_own_step_is_timed(config):
  """By `experiments.benchmark`, of methods that train other params."""
  topology.check(config, ['adamw', 'lora_spd'], 0)
  layout = parallel.layout(devices=jax.devices()[:1])
  adamw, spd = benchmark.bench_study(config, ['adamw', 'lora_spd'], layout, 2)
  assert (adamw['case'], adamw['method']) == (config.title, 'adamw')
  assert spd['params'] < adamw['params']
  assert spd['ms'] > 0
  assert adamw['ratio'] == 1
  assert 'lora_spd' in benchmark.table([adamw, spd])


def test_lower_blocks_are_run_once(config):
  kind = kinds.KINDS[config.task]
  count = len(kind.lower)

  def are_lower(params):
    return {path[:count] == kind.lower for path, _ in nnx.to_flat_state(params)}

  assert are_lower(load(config, 'adamw').pretrained) == {True, False}
  config.update(first_block=kind.first_block)
  tuning = load(config, 'lora')
  batch = next(tuning.sets['val'].batches(8))
  assert batch['hidden'].dtype == np.float16
  assert {v.dtype for k, v in batch.items() if k != 'hidden'} <= {
    np.dtype('int32'),
    np.dtype('float32'),
  }
  assert are_lower(load(config, 'adamw').pretrained) == {False}
  assert runs.run(config, tuning, 'lora', 0).history['deviation'][-1] > 0


def test_an_unknown_kind_is_refused(config):
  config.task = 'poetry'
  with pytest.raises(
    ValueError, match=r"config\.task is 'poetry'; it must be one of classif"
  ):
    study.check(config)
