"""SPD inside and around Optax's combinators, against the work of hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_spd import adam_spd, spd, with_spd
from tests.optax_spd import oracle
from tests.optax_spd.problems import Quadratic, as_arrays


def spd_state(state):
  return optax.tree.get(state, 'SPDState')


def trajectory(tx, num_steps=40, transform=lambda g: g, **extra):
  """Params after every step, and the last state."""
  problem = Quadratic(num_layers=4, size=(8, 8))
  params = as_arrays(problem.params)
  state = tx.init(params)
  update = jax.jit(tx.update)
  seen = []
  for _ in range(num_steps):
    grads = transform(problem.grads(params, problem.noise()))
    updates, state = update(grads, state, params, **extra)
    params = optax.apply_updates(params, updates)
    seen.append(params)
  return seen, state


def by_hand(tx, num_steps=40, transform=lambda g: g, weight_decay=1.0):
  """Any base optimizer, with SPD of the oracle after its step."""
  problem = Quadratic(num_layers=4, size=(8, 8))
  theta_0 = problem.params
  params = as_arrays(problem.params)
  state = tx.init(params)
  update = jax.jit(tx.update)
  seen, decays = [], 0
  for t in range(num_steps):
    grads = transform(problem.grads(params, problem.noise()))
    steps, state = update(grads, state, params)
    now = weight_decay(t) if callable(weight_decay) else weight_decay
    new = {}
    for n, p in params.items():
      theta, start, g, u = (
        np.asarray(x, np.float64) for x in (p, theta_0[n], grads[n], steps[n])
      )
      new[n], found = oracle.spd_step(theta, start, g, u, now)
      decays += found['s'] > 0
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), new)
    seen.append(params)
  return seen, decays


def assert_same(ours, theirs):
  # float32 against the oracle's float64, over tens of steps of 1e-3.
  for a, b in zip(ours, theirs, strict=True):
    chex.assert_trees_all_close(a, b, rtol=1e-4, atol=3e-6)


BASES = {
  'momentum': optax.sgd(1e-3, momentum=0.9),
  'adamw': optax.adamw(1e-3, weight_decay=0.1),
  'nadam': optax.nadam(1e-3),
  'lion': optax.lion(1e-3),
  'adafactor': optax.adafactor(1e-3, multiply_by_parameter_scale=False),
  'muon': optax.contrib.muon(1e-3),
  'lamb': optax.lamb(1e-2),
}


@pytest.mark.parametrize('name', BASES)
def test_any_base_optimizer_gets_the_paper_s_decay(name):
  ours, state = trajectory(with_spd(BASES[name]))
  theirs, decays = by_hand(BASES[name])
  assert_same(ours, theirs)
  assert decays > 20
  assert spd_state(state).decayed_count.sum() == decays


def test_clipping_before():
  clip = optax.clip_by_global_norm(0.5)
  ours, state = trajectory(optax.chain(clip, adam_spd(1e-3)))
  theirs, _ = by_hand(
    optax.adam(1e-3), transform=lambda g: clip.update(g, clip.init(g))[0]
  )
  assert_same(ours, theirs)
  assert spd_state(state).decayed_count.sum() > 20


def test_named_chain():
  tx = optax.named_chain(
    ('adam', optax.scale_by_adam()), ('spd', spd(learning_rate=1e-3))
  )
  plain = optax.chain(optax.scale_by_adam(), spd(learning_rate=1e-3))
  ours, state = trajectory(tx)
  theirs, _ = trajectory(plain)
  chex.assert_trees_all_equal(ours, theirs)
  assert state['spd'].decayed_count.sum() > 20


def half(params):
  return {n: n < 'layer_02' for n in params}


def test_masked_and_partition_and_freeze_act_on_a_part():
  spd_part, _ = trajectory(adam_spd(1e-3))
  adam_part, _ = trajectory(optax.adam(1e-3))
  masked = optax.masked(adam_spd(1e-3), half)
  ours, state = trajectory(masked)
  for n in ('layer_00', 'layer_01'):
    np.testing.assert_array_equal(ours[-1][n], spd_part[-1][n])
  assert spd_state(state).ratio.shape == (2,)
  assert (spd_state(state).decayed_count > 0).all()

  partition = optax.partition(
    {'spd': adam_spd(1e-3), 'adam': optax.adam(1e-3)},
    {n: 'spd' if n < 'layer_02' else 'adam' for n in spd_part[-1]},
  )
  ours, state = trajectory(partition)
  for n in ours[-1]:
    expected = spd_part if n < 'layer_02' else adam_part
    np.testing.assert_array_equal(ours[-1][n], expected[-1][n])
  assert spd_state(state).ratio.shape == (2,)

  frozen = optax.chain(adam_spd(1e-3), optax.freeze(half(spd_part[-1])))
  ours, _ = trajectory(frozen)
  start = Quadratic(num_layers=4, size=(8, 8)).params
  np.testing.assert_array_equal(ours[-1]['layer_00'], start['layer_00'])
  assert (ours[-1]['layer_03'] != start['layer_03']).all()


@pytest.mark.parametrize('wrap', ['masked', 'partition'])
def test_a_gradient_passed_along_may_hold_more_than_the_masked_params(wrap):
  """Optax masks updates and params, not extra arguments."""
  chained = optax.chain(optax.scale_by_adam(), spd(learning_rate=1e-3))
  if wrap == 'masked':
    tx = optax.masked(chained, half)
  else:
    tx = optax.partition(
      {'a': chained, 'b': optax.sgd(1e-3)},
      lambda p: {n: 'a' if n < 'layer_02' else 'b' for n in p},
    )
  problem = Quadratic(num_layers=4, size=(8, 8))
  params = as_arrays(problem.params)
  state, whole_state = tx.init(params), adam_spd(1e-3).init(params)
  for _ in range(30):
    grads = problem.grads(params, problem.noise())
    updates, state = tx.update(grads, state, params, grad=grads)
    whole, whole_state = adam_spd(1e-3).update(grads, whole_state, params)
    for n in ('layer_00', 'layer_01'):
      np.testing.assert_allclose(updates[n], whole[n], rtol=1e-4, atol=1e-7)
    params = optax.apply_updates(params, whole)
  assert (spd_state(state).decayed_count > 0).all()


def test_multi_steps_acts_once_for_an_accumulated_gradient():
  problem = Quadratic(num_layers=4, size=(8, 8))
  noises = [problem.noise() for _ in range(80)]

  def run(tx, every):
    params = as_arrays(problem.params)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for t in range(0, 80, every):
      grads = [problem.grads(params, noise) for noise in noises[t : t + every]]
      if every == 2 and not isinstance(tx, optax.MultiSteps):
        grads = [jax.tree.map(lambda a, b: (a + b) / 2, *grads)]
      for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state

  ours, state = run(optax.MultiSteps(adam_spd(1e-3), 2), 2)
  theirs, expected = run(adam_spd(1e-3), 2)
  chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)
  assert spd_state(state).count == 40
  np.testing.assert_array_equal(
    spd_state(state).decayed_count, spd_state(expected).decayed_count
  )
  assert spd_state(state).decayed_count.sum() > 20


def test_apply_if_finite_recovers():
  tx = optax.apply_if_finite(adam_spd(1e-3), max_consecutive_errors=3)
  problem = Quadratic(num_layers=4, size=(8, 8))
  params = as_arrays(problem.params)
  state, clean = tx.init(params), adam_spd(1e-3).init(params)
  for t in range(30):
    grads = problem.grads(params, problem.noise())
    if t % 10 == 5:
      bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads)
      updates, state = tx.update(bad, state, params)
      chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    updates, state = tx.update(grads, state, params)
    expected, clean = adam_spd(1e-3).update(grads, clean, params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6, atol=1e-9)
    params = optax.apply_updates(params, updates)
  chex.assert_trees_all_close(spd_state(state), clean[1], rtol=1e-5)
  assert clean[1].decayed_count.sum() > 20


def test_inject_hyperparams_changes_lambda_in_one_program():
  factory = optax.inject_hyperparams(
    adam_spd, static_args=('anchor', 'mask', 'layer_axes', 'anchor_dtype')
  )
  anchor = Quadratic(num_layers=4, size=(8, 8)).params
  tx = factory(1e-3, anchor, 0.0, mask=lambda p: True, layer_axes=0)
  problem = Quadratic(num_layers=4, size=(8, 8))
  params = as_arrays(problem.params)
  state = tx.init(params)
  update = jax.jit(tx.update)
  for t in range(40):
    state.hyperparams['weight_decay'] = jnp.float32(0.0 if t < 20 else 1.0)
    grads = problem.grads(params, problem.noise())
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    if t == 19:
      assert spd_state(state).decayed_count.sum() == 0
  assert spd_state(state).decayed_count.sum() > 10
  assert update._cache_size() == 1

  ours, _ = trajectory(factory(1e-3, weight_decay=lambda t: 0.05 * t))
  theirs, decays = by_hand(optax.adam(1e-3), weight_decay=lambda t: 0.05 * t)
  assert_same(ours, theirs)
  assert decays > 20


def test_lambda_may_be_a_schedule():
  ours, _ = trajectory(adam_spd(1e-3, weight_decay=lambda t: 0.05 * t))
  theirs, decays = by_hand(optax.adam(1e-3), weight_decay=lambda t: 0.05 * t)
  assert_same(ours, theirs)
  assert decays > 20


def test_an_extra_argument_reaches_the_inner_optimizer():
  seen = []

  def update(updates, state, params=None, **extra):
    seen.append(extra)
    return optax.adam(1e-3).update(updates, state, params)

  inner = optax.GradientTransformationExtraArgs(optax.adam(1e-3).init, update)
  params = {'w': jnp.ones(3)}
  tx = with_spd(inner)
  tx.update(params, tx.init(params), params, grad=params, value=2.0)
  assert set(seen[0]) == {'grad', 'value'}


@pytest.mark.parametrize('mask', [None, {'a': True, 'b': False}])
@pytest.mark.parametrize('anchor', [None, 'origin', 'tree'])
def test_map_params_takes_the_anchor_for_params_and_nothing_else(mask, anchor):
  params = {'a': jnp.ones((2, 3)), 'b': jnp.ones(4)}
  if anchor == 'tree':
    anchor = params
  for tx in (
    adam_spd(1e-3, anchor, mask=mask),
    optax.chain(
      optax.scale_by_adam(), spd(anchor, learning_rate=1e-3, mask=mask)
    ),
  ):
    state = tx.init(params)
    mapped = optax.tree.map_params(
      tx,
      lambda x, name: name,
      state,
      {'a': 'A', 'b': 'B'},
      transform_non_params=lambda x: None,
      is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    found = spd_state(mapped)
    assert found[1:] == (None,) * 7
    if anchor == 'origin':
      assert found.anchor == optax.MaskedNode()
    else:
      assert found.anchor == {'a': 'A', 'b': 'B'}


def test_shapes_alone_suffice():
  params = {'a': jnp.ones((2, 3)), 'b': jnp.ones(4)}
  shapes = jax.eval_shape(lambda: params)
  concrete = adam_spd(1e-3, params).init(params)
  for anchor in (None, params, shapes, 'origin'):
    abstract = jax.eval_shape(adam_spd(1e-3, anchor).init, shapes)
    if anchor != 'origin':
      chex.assert_trees_all_equal_shapes_and_dtypes(abstract, concrete)
  tx = adam_spd(1e-3, shapes)
  with pytest.raises(ValueError, match=r"anchor\['a'\] is abstract"):
    tx.init(params)
  with pytest.raises(Exception, match='spd_anchor_is_abstract'):
    jax.jit(tx.init)(params)
