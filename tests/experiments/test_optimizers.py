"""Every method is the Optax transformation that its name says."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from experiments import baselines, compare, optimizers
from experiments.configs import base
from experiments.models import blocks
from optax_spd import adam_spd, layer_names, spd, with_spd
from tests.experiments import tiny_study


def _params():
  block = {'mlp': {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)}}
  return {
    'backbone': {
      'pos_embed': jnp.ones((5, 3)),
      'pre_norm': {'scale': jnp.ones(3)},
      'blocks': {0: block, 1: block},
      'norm': {'scale': jnp.ones(3), 'bias': jnp.ones(3)},
    },
    'head': {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)},
  }


PARAMS = _params()
PLAIN = optimizers.Method('adam', 'all', 1.0, False, 20, 0.1, 0.0, 0.0, True)
SCHEDULE = optimizers.warmup_decay(1e-2, 20, 0.1)
KERNELS = jax.tree.map(lambda p: p.shape == (3, 2), PARAMS)


def make(strength=None, weight_decay=0.0, **changes):
  method = dataclasses.replace(PLAIN, spd=strength is not None, **changes)
  return method.make(1e-2, weight_decay, strength)


def run(tx, params=PARAMS, num_steps=20):
  state = tx.init(params)

  @jax.jit
  def step(params, state, key):
    # Noise about a slope: SPD finds something to do. Of stacked params as of
    # their slices.
    noise = jax.random.normal(key)
    grads = jax.tree.map(lambda p: noise + 0.3 * p, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for key in jax.random.split(jax.random.key(0), num_steps):
    params, state = step(params, state, key)
  return params, state


def assert_close(ours, theirs):
  # Float32 of differently fused programs.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs
  )


def test_the_schedule_rises_and_falls():
  schedule = optimizers.warmup_decay(3e-4, 100, 0.1, 1e-6, 1e-5)
  rates = np.array([schedule(t) for t in range(101)])
  np.testing.assert_allclose(rates[0], 1e-6, rtol=1e-5)
  np.testing.assert_allclose(rates[5], (1e-6 + 3e-4) / 2, rtol=1e-5)
  np.testing.assert_allclose(rates[10], 3e-4, rtol=1e-5)
  np.testing.assert_allclose(rates[55], (1e-5 + 3e-4) / 2, rtol=1e-5)
  np.testing.assert_allclose(rates[100], 1e-5, rtol=1e-4)
  assert float(optimizers.warmup_decay(1.0, 10, 0.0)(0)) == 1
  line = optimizers.warmup_decay(3e-4, 100, 0.1, 1e-6, 1e-5, 'linear')
  np.testing.assert_allclose(line(10), 3e-4, rtol=1e-6)
  np.testing.assert_allclose(line(28), (4 * 3e-4 + 1e-5) / 5, rtol=1e-6)
  np.testing.assert_allclose(line(100), 1e-5, rtol=1e-4)


def pull(strength):
  """mu (theta - theta_0), added by hand."""
  return optax.stateless(
    lambda u, p: jax.tree.map(
      lambda u, p, a: u + strength * (p - a), u, p, PARAMS
    )
  )


OPTIMIZERS = {
  'adam': optax.adam(SCHEDULE),
  'adamw': optax.adamw(SCHEDULE, weight_decay=2.0, mask=KERNELS),
  # The penalty of L2-SP is mu / 2 |theta - theta_0|^2.
  'l2sp': optax.chain(pull(2.0), optax.adam(SCHEDULE)),
  # There is no LoRA here.
  'l2sp_origin': optax.chain(pull(2.0), optax.adam(SCHEDULE)),
  'l2sp_decoupled': optax.chain(
    optax.scale_by_adam(),
    pull(2.0),
    optax.scale_by_learning_rate(SCHEDULE),
  ),
  'lion': optax.lion(SCHEDULE, weight_decay=2.0, mask=KERNELS),
  'sgd': optax.chain(
    optax.add_decayed_weights(2.0, KERNELS),
    optax.trace(0.9),
    optax.scale_by_learning_rate(SCHEDULE),
  ),
  'muon': optax.partition(
    {
      True: optax.chain(
        optax.contrib.scale_by_muon(
          weight_dimension_numbers=lambda tree: jax.tree.map(
            lambda _: optax.contrib.MuonDimensionNumbers(), tree
          )
        ),
        # To the size of AdamW's steps: sqrt(largest side) * 0.2.
        optax.scale(3**0.5 * 0.2),
        optax.add_decayed_weights(2.0),
        optax.scale_by_learning_rate(SCHEDULE),
      ),
      False: optax.nadam(SCHEDULE),
    },
    jax.tree.map(bool, {**KERNELS, 'head': {'kernel': False, 'bias': False}}),
  ),
  # Against their formulas in test_baselines.py.
  'ftp': baselines.ftp(SCHEDULE),
  'digrap': baselines.digrap(SCHEDULE),
  'digrap_1': baselines.digrap(SCHEDULE, omega=1.0),
}


@pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
def test_optimizers(name):
  ours, _ = run(make(optimizer=name, weight_decay=2.0))
  theirs, _ = run(OPTIMIZERS[name])
  assert_close(ours, theirs)
  if name not in ('adam', 'digrap'):  # whose omega has to grow first
    plain, _ = run(optax.adam(SCHEDULE))
    block, other = (x['backbone']['blocks'][0]['mlp'] for x in (ours, plain))
    assert not np.allclose(block['kernel'], other['kernel'], rtol=1e-4)


@pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
def test_spd_goes_round_any_of_them(name):
  ours, state = run(make(0.7, optimizer=name, weight_decay=2.0))
  inner = {'adam': adam_spd(SCHEDULE, weight_decay=0.7)}
  theirs, _ = run(inner.get(name, with_spd(OPTIMIZERS[name], PARAMS, 0.7)))
  assert optax.tree.get(state, 'SPDState').decayed_count.sum() > 0
  assert_close(ours, theirs)


@pytest.mark.parametrize(
  ('train', 'moved'),
  [
    ('head', {'head.kernel', 'head.bias'}),
    (
      'biases',
      {
        'head.kernel',
        'head.bias',
        'backbone.norm.bias',
        'backbone.blocks.0.mlp.bias',
        'backbone.blocks.1.mlp.bias',
      },
    ),
  ],
)
@pytest.mark.parametrize('spd', [None, 1.0])
def test_what_is_trained(train, moved, spd):
  tx = make(spd, train=train, layer_decay=0.5)
  params, _ = run(tx)
  changed = {
    jax.tree_util.keystr(path, simple=True, separator='.')
    for (path, new), old in zip(
      jax.tree_util.tree_leaves_with_path(params),
      jax.tree.leaves(PARAMS),
      strict=True,
    )
    if (new != old).any()
  }
  assert changed == moved


def test_layer_decay():
  tx, plain = make(layer_decay=0.5), make()
  state, plain_state = tx.init(PARAMS), plain.init(PARAMS)
  for _ in range(3):
    ours, state = tx.update(PARAMS, state, PARAMS)
    theirs, plain_state = plain.update(PARAMS, plain_state, PARAMS)
  ratio = jax.tree.map(lambda a, b: float((a / b).mean()), ours, theirs)
  assert ratio['head'] == pytest.approx({'kernel': 1, 'bias': 1})
  backbone = ratio['backbone']
  assert backbone['norm'] == pytest.approx({'scale': 1, 'bias': 1})
  assert backbone['blocks'][1]['mlp']['kernel'] == pytest.approx(1 / 2)
  assert backbone['blocks'][0]['mlp']['kernel'] == pytest.approx(1 / 4)
  assert backbone['pos_embed'] == pytest.approx(1 / 8)
  assert backbone['pre_norm']['scale'] == pytest.approx(1 / 8)


def _adapted():
  """Two linear maps and a head; the factors of one are adapters."""
  adapter = {'lora_a': jnp.ones((3, 2)), 'lora_b': jnp.zeros((2, 3))}
  return {'query': adapter, 'head': PARAMS['head']}


def test_the_factors_of_lora_decay_as_kernels_do():
  params = jax.tree.map(lambda p: p + 1, _adapted())
  ours, _ = run(make(optimizer='adamw', weight_decay=2.0), params)
  plain, _ = run(make(optimizer='adamw'), params)
  moved = jax.tree.map(lambda a, b: bool((a < b).all()), ours, plain)
  assert moved == {
    'query': {'lora_a': True, 'lora_b': True},
    'head': {'kernel': True, 'bias': False},
  }


@pytest.mark.parametrize('anchor_head', [True, False])
def test_the_origin_is_the_anchor_of_the_factors(anchor_head):
  params = _adapted()
  anchor = {**params, 'query': jax.tree.map(jnp.zeros_like, params['query'])}
  mask = {'query': True, 'head': anchor_head}
  theirs, their_state = run(
    adam_spd(SCHEDULE, anchor, mask=mask if not anchor_head else None), params
  )
  ours, state = run(make(1.0, anchor='origin', anchor_head=anchor_head), params)
  assert_close(ours, theirs)
  spd, theirs = (optax.tree.get(s, 'SPDState') for s in (state, their_state))
  np.testing.assert_array_equal(spd.decayed_count, theirs.decayed_count)
  assert spd.decayed_count.sum() > 0
  assert not jax.tree.leaves(spd.anchor['query'])
  started, _ = run(make(1.0, anchor_head=anchor_head), params)
  assert (started['query']['lora_a'] != ours['query']['lora_a']).any()


@pytest.mark.parametrize(
  'changes',
  [
    {'optimizer': 'adamw', 'layer_decay': 0.5},
    {'optimizer': 'muon', 'layer_decay': 0.5},
    {'optimizer': 'ftp'},
    {'optimizer': 'digrap'},
    {'condition': 'always'},
    {'condition': 'estimated', 'layer_decay': 0.5},
  ],
  ids=str,
)
def test_stacked_blocks_take_the_same_steps(changes):
  def stack(params):
    blocks = params['backbone']['blocks']
    stacked = jax.tree.map(lambda *b: jnp.stack(b), *blocks.values())
    return {**params, 'backbone': {**params['backbone'], 'blocks': stacked}}

  tx = make(0.5, weight_decay=2.0, **changes)
  unrolled, state = run(tx)
  stacked, stacked_state = run(tx, stack(PARAMS))
  assert_close(stack(unrolled), stacked)
  counts = [
    sorted(optax.tree.get(s, 'SPDState').decayed_count.tolist())
    for s in (state, stacked_state)
  ]
  assert counts[0] == counts[1]
  assert sum(counts[0]) > 0


def test_from_config():
  config = base.base()
  config.update(num_steps=20, learning_rate=3e-4)
  config.update(warmup_learning_rate=1e-6, min_learning_rate=1e-5)
  spd = base.method('', optimizer='adam', spd=1.0)
  method, strength = optimizers.from_config(config, spd)
  assert method == optimizers.Method(
    'adam', 'all', 1.0, True, 20, 0.1, 1e-6, 1e-5, True
  )
  assert strength == {'learning_rate': 3e-4, 'weight_decay': 0.0, 'spd': 1.0}
  lion = base.method('', optimizer='lion', rate=0.2, weight_decay=0.1)
  method, strength = optimizers.from_config(config, ConfigDict(lion))
  assert not method.spd
  # The whole schedule is a fifth.
  assert (method.start, method.end) == pytest.approx((2e-7, 2e-6))
  assert strength == pytest.approx(
    {'learning_rate': 6e-5, 'weight_decay': 0.1, 'spd': 0.0}
  )


def test_a_head_that_spd_leaves_alone():
  held, state = run(make(1.0))
  left, left_state = run(make(1.0, anchor_head=False))
  plain, _ = run(make())
  assert_close(left['head'], plain['head'])
  assert_close(left['backbone'], held['backbone'])
  assert (held['head']['kernel'] != plain['head']['kernel']).any()
  layers = [
    optax.tree.get(s, 'SPDState').ratio.size for s in (state, left_state)
  ]
  assert layers[0] - layers[1] == len(PARAMS['head'])


@pytest.mark.parametrize('strength', [None, 1.0])
def test_the_gradient_is_clipped_before_the_optimizer(strength):
  tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(SCHEDULE))
  if strength:
    tx = with_spd(tx, weight_decay=strength)
  params, state = run(make(strength, clip_norm=0.5))
  wanted, _ = run(tx)
  assert_close(params, wanted)
  if strength:
    spd = optax.tree.get(state, 'SPDState')
    assert spd.decayed_count.sum() > 0
  # Steps of other lengths than without it.
  plain, _ = run(make(strength))
  assert abs(params['head']['bias'] - plain['head']['bias']).max() > 1e-4


def test_the_rate_of_a_step_and_the_names_of_the_layers():
  method = dataclasses.replace(PLAIN, spd=True)
  assert method.rate(3, {'learning_rate': 1e-2}) == float(SCHEDULE(2))
  _, state = run(make(1.0), num_steps=1)
  spd = optax.tree.get(state, 'SPDState')
  names = method.layer_names(PARAMS)
  assert len(names) == spd.ratio.size
  assert 'head/kernel' in names
  for changes in ({'anchor_head': False}, {'train': 'biases'}):
    _, state = run(make(1.0, **changes), num_steps=1)
    spd = optax.tree.get(state, 'SPDState')
    found = dataclasses.replace(method, **changes).layer_names(PARAMS)
    assert len(found) == spd.ratio.size
    assert set(found) < set(names)
  assert PLAIN.layer_names(PARAMS) == []


def _factors():
  """Params of one module with LoRA, whose A does not start at zero."""
  rng = np.random.default_rng(0)
  a, b = (rng.normal(size=s).astype(np.float32) for s in ((3, 2), (2, 3)))
  return {'query': {'lora_a': jnp.asarray(a), 'lora_b': jnp.asarray(b) * 0}}


def test_l2sp_pulls_both_factors_to_zero():
  params = _factors()
  tx = make(optimizer='l2sp_origin', weight_decay=0.3)
  theirs = optax.chain(optax.add_decayed_weights(0.3), optax.adam(SCHEDULE))
  assert_close(run(tx, params)[0], run(theirs, params)[0])
  start = run(make(optimizer='l2sp', weight_decay=0.3), params)[0]
  found = run(tx, params)[0]
  assert not np.allclose(start['query']['lora_a'], found['query']['lora_a'])


def test_spd_on_b_alone():
  """A takes Adam's own steps, and has no anchor and no decision."""
  params = _factors()
  method = dataclasses.replace(PLAIN, spd=True, anchor='origin_b')
  assert method.layer_names(params) == ['query/lora_b']
  found, state = run(make(1.0, anchor='origin_b'), params)
  plain, _ = run(make(), params)
  both, _ = run(make(1.0, anchor='origin'), params)
  np.testing.assert_allclose(
    found['query']['lora_a'], plain['query']['lora_a'], rtol=1e-6
  )
  np.testing.assert_allclose(
    found['query']['lora_b'], both['query']['lora_b'], rtol=1e-6
  )
  spd = optax.tree.get(state, 'SPDState')
  assert spd.decayed_count.shape == (1,)
  assert spd.decayed_count[0] > 0
  assert not np.allclose(found['query']['lora_b'], plain['query']['lora_b'])


CONDITIONS = {
  'exact': with_spd(
    optax.chain(optax.clip_by_global_norm(0.5), optax.adam(SCHEDULE)),
    weight_decay=0.5,
  ),
  'estimated': optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.scale_by_adam(),
    spd(weight_decay=0.5, learning_rate=SCHEDULE),
  ),
  'always': baselines.always_spd(
    optax.chain(optax.clip_by_global_norm(0.5), optax.adam(SCHEDULE)),
    weight_decay=0.5,
  ),
  'random': baselines.random_spd(
    optax.chain(optax.clip_by_global_norm(0.5), optax.adam(SCHEDULE)),
    weight_decay=0.5,
    fire=np.array([0.5], np.float32),
    layer_axes=blocks.layer_axes,
  ),
}


@pytest.mark.parametrize('name', optimizers.CONDITIONS)
def test_conditions(name):
  config = base.base()
  config.update(num_steps=20, learning_rate=1e-2, clip_norm=0.5)
  method, hyperparams = optimizers.from_config(
    config, base.method('', optimizer='adam', spd=0.5, condition=name)
  )
  assert ('fire' in hyperparams) == (name == 'random')
  ours, state = run(method.make(**hyperparams))
  theirs, their_state = run(CONDITIONS[name])
  assert_close(ours, theirs)
  found, wanted = (
    optax.tree.get(s, 'SPDState').decayed_count for s in (state, their_state)
  )
  np.testing.assert_array_equal(found, wanted)
  assert found.sum() > 0
  assert method.layer_names(PARAMS) == layer_names(PARAMS)


@pytest.mark.parametrize('name', ['estimated', 'always', 'random'])
def test_conditions_of_what_is_trained_and_anchored(name):
  """Biases are trained, the head's are free, LoRA's are pulled to zero."""
  fire = {'fire': np.array([0.5], np.float32)} if name == 'random' else {}

  def states(params, **changes):
    method = dataclasses.replace(PLAIN, spd=True, condition=name, **changes)
    found, state = run(method.make(1e-2, 0.0, 0.5, **fire), params)
    spd = optax.tree.get(state, 'SPDState')
    assert spd.decayed_count.shape == (len(method.layer_names(params)),)
    assert spd.decayed_count.sum() > 0
    return found, spd

  found, _ = states(PARAMS, train='biases', anchor_head=False)
  plain, _ = run(make(train='biases'))
  assert_close(found['head'], plain['head'])
  assert (found['backbone']['pos_embed'] == 1).all()
  moved = found['backbone']['norm']['bias']
  assert (moved != plain['backbone']['norm']['bias']).all()
  _, spd = states(_adapted(), anchor='origin')
  assert not jax.tree.leaves(spd.anchor['query'])


def test_the_controls_of_the_tables_are_optional():
  methods = base.methods()
  controls = {name for name in methods if methods[name].optional}
  assert controls == {
    *('spd_estimated', 'spd_always', 'spd_random', 'sgd', 'sgd_spd', 'muon'),
    *('muon_spd', 'ftp', 'digrap', 'digrap_1', 'wise_spd_50'),
  }
  config = base.base()
  config.update(num_steps=20, learning_rate=1e-3)
  for name in controls - {'wise_spd_50'}:
    method, hyperparams = optimizers.from_config(config, methods[name])
    params, state = run(method.make(**hyperparams), num_steps=8)
    assert (params['head']['kernel'] != 1).all()
    if method.spd:
      assert optax.tree.get(state, 'SPDState').selected_count.sum() > 0, name


@pytest.mark.slow
def test_the_controls_of_a_study(tmp_path, noise, tiny_clip, capsys):
  """All that are optional, in one table; stacked blocks, but for LoRA."""
  config = tiny_study.get_config(str(noise))
  controls = {k: m for k, m in base.methods().items() if m.optional}
  config.methods.update(controls)
  config.methods.update(
    {
      f'lora_{condition}': base.method(
        f'LoRA, {condition}',
        optimizer='adam',
        spd=1.0,
        condition=condition,
        anchor='origin',
        lora=2,
      )
      for condition in optimizers.CONDITIONS
    }
  )
  lora = [f'lora_{condition}' for condition in optimizers.CONDITIONS]
  config.update(output_dir=str(tmp_path), num_steps=8, eval_every=4)
  config.model.scan = True
  opened = compare.configure(config, methods=['spd_1', *controls, *lora])
  compare.compare(config, opened)
  capsys.readouterr()
  rows = json.loads((tmp_path / 'results.json').read_text())['rows']
  rows = {row['method']: row for row in rows}
  assert set(rows) == {'spd_1', *controls, *lora}
  for name, row in rows.items():
    assert row['deviation'] > 0
    if config.methods[name].spd is None:
      assert row['acted'] is row['decay_share'] is None
    else:
      assert row['acted'] == (row['decayed'] >= 0.01), name
      assert row['selected'] > 0.05
  for name in ('spd_1', 'spd_always', 'spd_random', 'spd_estimated', *lora):
    assert rows[name]['acted'], name
    assert 0 < rows[name]['mean_decay'] <= 1
    assert rows[name]['decay_share'] > 0
  assert rows['spd_always']['selected'] > rows['spd_random']['selected']
  assert rows['wise_spd_50']['deviation'] == pytest.approx(
    rows['spd_1']['deviation'] / 2, rel=1e-3
  )
