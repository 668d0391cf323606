"""The method: against the formulas, and what must hold of every step."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from optax_spd import adam_spd, spd, with_spd
from tests.optax_spd import oracle
from tests.optax_spd.problems import Quadratic, as_arrays

COSINE = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 30, 300)
both_rates = pytest.mark.parametrize(
  'learning_rate', [1e-3, COSINE], ids=['fixed', 'cosine']
)


def spd_state(opt_state):
  return optax.tree.get(opt_state, 'SPDState')


def apart_from(tree, scale):
  """`tree` moved in every coordinate by noise of that standard deviation."""
  rng = np.random.default_rng(9)
  return {
    n: (p + scale * rng.normal(size=p.shape)).astype(np.float32)
    for n, p in tree.items()
  }


def rates(learning_rate, num_steps=300):
  if callable(learning_rate):
    return np.asarray(jax.vmap(learning_rate)(np.arange(num_steps)))
  return np.full(num_steps, learning_rate)


def trajectory(tx, problem, num_steps, *, pass_grad=False):
  """A list of params, grads, updates and SPDState, a tuple of arrays a step."""

  def step(carry, noise):
    params, state = carry
    grads = problem.grads(params, noise)
    extra = {'grad': grads} if pass_grad else {}
    updates, state = tx.update(grads, state, params, **extra)
    seen = params, grads, updates, spd_state(state)
    return (optax.apply_updates(params, updates), state), seen

  params = as_arrays(problem.params)
  noises = [problem.noise() for _ in range(num_steps)]
  noises = jax.tree.map(lambda *x: np.stack(x), *noises)
  seen = jax.jit(lambda c, x: jax.lax.scan(step, c, x)[1])(
    (params, tx.init(params)), noises
  )
  seen = jax.device_get(seen)
  return [jax.tree.map(lambda x, t=t: x[t], seen) for t in range(num_steps)]


@both_rates
@pytest.mark.parametrize(
  ('weight_decay', 'apart'),
  # At lambda 3 from the anchor itself s exceeds 1, and a step that reflects and
  # stretches a layer amplifies any rounding: one step at a time, below.
  [(0.5, 0.0), (1.0, 0.0), (0.5, 0.02), (1.0, 0.02), (3.0, 0.02)],
)
def test_follows_the_formulas(weight_decay, apart, learning_rate):
  problem = Quadratic(num_layers=12)
  theta_0 = apart_from(problem.params, apart)
  theta = {n: p.astype(np.float64) for n, p in problem.params.items()}
  adam = {n: oracle.Adam(rates(learning_rate)) for n in theta}
  wanted = []  # deviation, ratio, decay
  tx = adam_spd(learning_rate, theta_0, weight_decay)
  seen = trajectory(tx, problem, 300)
  for params, grads, updates, _ in seen:
    for n in theta:
      anchor, g = (
        theta_0[n].astype(np.float64),
        grads[n].astype(np.float64),
      )
      theta[n], found = oracle.spd_step(
        theta[n], anchor, g, adam[n].step(g), weight_decay
      )
      deviation = np.linalg.norm(theta[n] - anchor)
      wanted.append((deviation, found['r'], found['s']))
      ours = params[n] + updates[n]
      # Measured: 3e-5. float32 rounds each of 300 steps, the oracle none.
      assert np.linalg.norm(ours - theta[n]) <= 1e-4 * deviation
  states = [state for *_, state in seen]
  ours = {
    name: np.concatenate([getattr(state, name) for state in states])
    for name in ('deviation', 'ratio', 'decay')
  }
  deviation, ratio, decay = np.transpose(wanted)
  np.testing.assert_allclose(ours['deviation'], deviation, rtol=1e-4)
  np.testing.assert_allclose(ours['ratio'], ratio, atol=1e-4)
  np.testing.assert_allclose(ours['decay'], decay, atol=3e-4)
  np.testing.assert_array_equal(ours['decay'] > 0, decay > 0)
  assert np.sum(decay > 0) > 1000
  assert states[-1].decayed_count.sum() == np.sum(decay > 0)


@pytest.mark.parametrize('weight_decay', [1.0, 3.0])
def test_one_step_follows_the_formulas_where_it_reflects(weight_decay):
  problem = Quadratic()
  theta_0 = problem.params
  adam = {n: oracle.Adam(rates(1e-3)) for n in theta_0}
  tx = adam_spd(1e-3, weight_decay=weight_decay)
  reflections = 0
  for params, grads, updates, state in trajectory(tx, problem, 50):
    for i, n in enumerate(theta_0):
      g = grads[n].astype(np.float64)
      before, start = params[n].astype(np.float64), theta_0[n]
      after, found = oracle.spd_step(
        before, start, g, adam[n].step(g), weight_decay
      )
      reflections += found['s'] > 1
      # The update is as exact as float32 has it, however large s is.
      np.testing.assert_allclose(
        updates[n], after - before, rtol=1e-4, atol=1e-7
      )
      np.testing.assert_allclose(
        state.decay[i], found['s'], rtol=1e-4, atol=1e-4
      )
  assert reflections > 20 if weight_decay > 1 else reflections == 0


def test_ratio_keeps_its_digits_far_from_the_anchor():
  # r = 1e-7: a difference of float32 norms has no digit left of it.
  theta_0, theta = np.zeros(4), np.array([1e3, 0, 0, 0])
  u, g = np.array([1e-4, 0, 0, 0]), np.array([1.0, 0, 0, 0])
  _, found = oracle.spd_step(theta, theta_0, g, u, 1.0)
  tx = spd({'w': theta_0}, learning_rate=None)
  state = tx.init({'w': jnp.asarray(theta, jnp.float32)})
  _, state = tx.update(
    {'w': jnp.asarray(u, jnp.float32)},
    state,
    {'w': jnp.asarray(theta, jnp.float32)},
    grad={'w': jnp.asarray(g, jnp.float32)},
  )
  assert found['r'] == pytest.approx(1e-7, rel=1e-3)
  np.testing.assert_allclose(state.ratio, [found['r']], rtol=1e-5)


def test_condition_sees_the_raw_gradient():
  # Adam's direction is the gradient's sign here: <g, delta> > 0 > <d, delta>.
  params = {'w': jnp.array([1.0, -1.0, -1.0])}
  anchor = {'w': jnp.zeros(3)}
  grads = {'w': jnp.array([3.0, 1.0, 1.0])}
  for tx in (
    adam_spd(1e-3, anchor),
    optax.chain(optax.clip_by_global_norm(1.0), adam_spd(1e-3, anchor)),
  ):
    _, state = tx.update(grads, tx.init(params), params)
    assert spd_state(state).selected_count == 1
  against = {'w': -grads['w']}
  tx = adam_spd(1e-3, anchor)
  _, state = tx.update(against, tx.init(params), params)
  assert spd_state(state).selected_count == 0


@pytest.mark.parametrize('weight_decay', [0.5, 1.0, 3.0])
@both_rates
def test_estimate_applies_the_exact_decay(weight_decay, learning_rate):
  """`spd` without `grad=`, on the trajectory of the exact condition."""
  problem = Quadratic()
  adam = optax.scale_by_adam()
  chained = spd(weight_decay=weight_decay, learning_rate=learning_rate)
  params = as_arrays(problem.params)
  adam_state, state = adam.init(params), chained.init(params)

  @jax.jit
  def step(params, adam_state, state, noise):
    grads = problem.grads(params, noise)
    directions, adam_state = adam.update(grads, adam_state)
    _, estimated = chained.update(directions, state, params)
    updates, state = chained.update(directions, state, params, grad=grads)
    params = optax.apply_updates(params, updates)
    return params, adam_state, state, estimated.decay

  exact, estimate = [], []
  for _ in range(300):
    params, adam_state, state, estimated = step(
      params, adam_state, state, problem.noise()
    )
    exact.append(state.decay)
    estimate.append(estimated)
  exact, estimate = np.array(exact), np.array(estimate)
  applied = np.minimum(exact, estimate).sum() / exact.sum()
  extra = (estimate - np.minimum(exact, estimate)).sum() / exact.sum()
  assert (exact > 0).sum() > 800
  assert applied >= 0.9
  assert extra <= 0.2


def test_link_with_grad_is_the_wrapper():
  problem = Quadratic()
  chained = optax.chain(optax.scale_by_adam(), spd(learning_rate=1e-3))
  whole = trajectory(adam_spd(1e-3), Quadratic(), 100)
  linked = trajectory(chained, problem, 100, pass_grad=True)
  for (_, _, ours, _), (_, _, theirs, _) in zip(linked, whole, strict=True):
    # <d, delta> times -lr against <u, delta>: rounded elsewhere.
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-7)
  assert linked[-1][-1].decayed_count.sum() > 200


def test_link_without_grad_ends_where_the_wrapper_does():
  def deviation(tx):
    return trajectory(tx, Quadratic(), 300)[-1][-1].deviation.mean()

  chained = optax.chain(optax.scale_by_adam(), spd(learning_rate=1e-3))
  exact = deviation(adam_spd(1e-3))
  assert exact < 0.8 * deviation(adam_spd(1e-3, weight_decay=0.0))
  assert deviation(chained) == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize(
  'tx',
  [
    optax.adam(1e-3),
    optax.adamw(1e-3),
    optax.sgd(1e-2, momentum=0.9),
    optax.lion(1e-4),
  ],
  ids=['adam', 'adamw', 'momentum', 'lion'],
)
def test_lambda_zero_is_the_base_optimizer_to_the_bit(tx):
  problem = Quadratic()
  params = as_arrays(problem.params)
  # -0.0, NaN and an overflow pass as they are.
  odd = jnp.zeros(64).at[0].set(-0.0).at[1].set(jnp.nan).at[2].set(jnp.inf)
  wrapped = with_spd(tx, weight_decay=0.0)
  state, base_state = wrapped.init(params), tx.init(params)
  for t in range(20):
    grads = problem.grads(params, problem.noise())
    if t == 19:
      grads['layer_00'] = odd
    base, base_state = jax.jit(tx.update)(grads, base_state, params)
    ours, state = jax.jit(wrapped.update)(grads, state, params)
    for n in params:
      assert np.asarray(ours[n]).tobytes() == np.asarray(base[n]).tobytes()
    params = optax.apply_updates(params, base)
  assert state[1].selected_count.sum() > 10
  assert state[1].decayed_count.sum() == 0


def test_link_at_lambda_zero_is_adam_to_the_bit():
  for learning_rate in (1e-3, COSINE):
    problem = Quadratic()
    params = as_arrays(problem.params)
    base = optax.adam(learning_rate)
    chained = optax.chain(
      optax.scale_by_adam(), spd(weight_decay=0.0, learning_rate=learning_rate)
    )
    state, base_state = chained.init(params), base.init(params)
    for _ in range(5):
      grads = problem.grads(params, problem.noise())
      theirs, base_state = jax.jit(base.update)(grads, base_state, params)
      ours, state = jax.jit(chained.update)(grads, state, params)
      chex.assert_trees_all_equal(ours, theirs)
      params = optax.apply_updates(params, theirs)


def test_lambda_one_lands_on_the_previous_radius():
  problem = Quadratic()
  norm = np.linalg.norm
  fired = 0
  for params, _, updates, state in trajectory(adam_spd(1e-3), problem, 100):
    for i, (n, start) in enumerate(problem.params.items()):
      if state.decay[i] > 0:
        fired += 1
        before = norm(np.asarray(params[n], np.float64) - start)
        after = (
          np.asarray(params[n], np.float64) + np.asarray(updates[n]) - start
        )
        np.testing.assert_allclose(norm(after), before, rtol=1e-5)
  assert fired > 200


def test_a_constant_gradient_never_fires():
  params = as_arrays(Quadratic().params)
  grads = jax.tree.map(jnp.ones_like, params)
  for tx in (
    adam_spd(1e-3),
    optax.chain(optax.scale_by_adam(), spd(learning_rate=1e-3)),
  ):
    state, p = tx.init(params), params
    for _ in range(50):
      updates, state = tx.update(grads, state, p)
      p = optax.apply_updates(p, updates)
    assert spd_state(state).selected_count.sum() == 0


def test_nothing_fires_on_step_one():
  for tx in (
    adam_spd(1e-3),
    optax.chain(optax.scale_by_adam(), spd(learning_rate=1e-3)),
  ):
    ((_, _, _, state),) = trajectory(tx, Quadratic(), 1)
    assert state.count == 1
    assert state.selected_count.sum() == 0
    np.testing.assert_allclose(state.ratio, 1, rtol=1e-6)


def test_zero_deviation_gives_no_nan():
  params = {'w': jnp.ones(3)}
  zeros = {'w': jnp.zeros(3)}
  tx = adam_spd(1e-3)
  state = tx.init(params)
  for _ in range(2):
    updates, state = tx.update(zeros, state, params)
    chex.assert_trees_all_equal(updates, zeros)
    chex.assert_tree_all_finite(spd_state(state))
  assert spd_state(state).ratio == 0


def test_a_step_that_is_not_finite_changes_nothing_but_the_count():
  problem = Quadratic()
  for tx in (
    adam_spd(1e-3),
    optax.chain(optax.scale_by_adam(), spd(learning_rate=1e-3)),
  ):
    params, state = as_arrays(problem.params), None
    state = tx.init(params)
    for _ in range(20):
      grads = problem.grads(params, problem.noise())
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    before = spd_state(state)
    grads['layer_03'] = grads['layer_03'].at[5].set(jnp.nan)
    updates, state = tx.update(grads, state, params)
    after = spd_state(state)
    assert after.count == before.count + 1
    chex.assert_trees_all_equal(after.anchor, before.anchor)
    for field in ('alignment', 'deviation', 'ratio', 'decay'):
      new, old = getattr(after, field), getattr(before, field)
      assert new[3] == old[3]
      assert (new[:3] != old[:3]).any()
    assert after.selected_count[3] == before.selected_count[3]
    assert jnp.isnan(updates['layer_03'][5])
    assert not jnp.isnan(updates['layer_02']).any()


def fine_tuning(reach, seed=0):
  """A small network, and data of one like it whose weights are `reach` away.

  Outputs are measured in units of `reach`, so that learning rates of any size
  have the same way to go.
  """
  keys = jax.random.split(jax.random.key(seed), 6)
  shapes = {
    'hidden': {'kernel': (8, 16), 'bias': (16,)},
    'out': {'kernel': (16, 4), 'bias': (4,)},
  }
  leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: type(x) is tuple)
  pretrained = jax.tree.unflatten(
    treedef,
    [0.3 * jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=False)],
  )
  shifted = jax.tree.unflatten(
    treedef,
    [
      p + reach * jax.random.normal(k, p.shape)
      for k, p in zip(keys[::-1], jax.tree.leaves(pretrained), strict=False)
    ],
  )

  def apply_fn(variables, x):
    p = variables['params']
    h = jnp.tanh(x @ p['hidden']['kernel'] + p['hidden']['bias'][None])
    return (h @ p['out']['kernel'] + p['out']['bias'][None]) / reach

  def batch(key):
    x_key, noise_key = jax.random.split(key)
    x = jax.random.normal(x_key, (32, 8))
    y = apply_fn({'params': shifted}, x)
    return x, y + jax.random.normal(noise_key, y.shape)

  return pretrained, apply_fn, batch


@pytest.mark.parametrize(
  'learning_rate', [1e-3, None], ids=['given', 'default']
)
def test_chain_trains_and_decays_in_a_train_state(learning_rate):
  """As a user writes it: nothing but params and gradients is passed."""
  num_steps = 300
  pretrained, apply_fn, batch = fine_tuning(50 * (learning_rate or 2e-5))
  if learning_rate is None:
    with pytest.warns(UserWarning, match="paper's 2e-05. spd comes last"):
      tx = optax.chain(optax.scale_by_adam(), spd(pretrained))
  else:
    tx = optax.chain(
      optax.scale_by_adam(), spd(pretrained, learning_rate=learning_rate)
    )
  train_state = TrainState.create(apply_fn=apply_fn, params=pretrained, tx=tx)

  @jax.jit
  def train_step(train_state, x, y):
    def loss_fn(params):
      return jnp.mean((train_state.apply_fn({'params': params}, x) - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(train_state.params)
    return train_state.apply_gradients(grads=grads), loss

  losses = []
  for key in jax.random.split(jax.random.key(1), num_steps):
    train_state, loss = train_step(train_state, *batch(key))
    losses.append(loss)
  state = spd_state(train_state.opt_state)
  assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
  assert (state.decayed_count > 0).all()
  assert state.decayed_count.sum() >= 0.05 * num_steps * 4


def test_a_rate_that_is_given_warns_of_nothing():
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    spd(learning_rate=2e-5)
    spd(learning_rate=None)


def test_update_needs_params():
  params = {'w': jnp.ones(3)}
  for tx in (adam_spd(1e-3), spd(learning_rate=1e-3)):
    with pytest.raises(ValueError, match='needs the current params'):
      tx.update(params, tx.init(params))


def test_a_finished_step_needs_the_gradient():
  params = {'w': jnp.ones(3)}
  tx = optax.chain(optax.adam(1e-3), spd(learning_rate=None))
  state = tx.init(params)
  with pytest.raises(ValueError, match='grad=grads'):
    tx.update(params, state, params)
  tx.update(params, state, params, grad=params)


@pytest.mark.parametrize('name', ['adam_spd', 'chain'])
@pytest.mark.parametrize('anchored', ['given', 'params'])
@pytest.mark.parametrize('rate', [1e-3, 1e-12])
def test_derivatives_of_a_step_from_the_anchor_are_finite(name, anchored, rate):
  """Where the distance is 0, whose square root has no derivative."""
  anchor = {'w': jnp.zeros((2, 3))}
  grads = jax.tree.map(jnp.ones_like, anchor)

  def final(params, rate, weight_decay, make):
    given = anchor if anchored == 'given' else None
    tx = make(rate, given, weight_decay)
    state = tx.init(params)
    for _ in range(2):
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    spd_state = optax.tree.get(state, 'SPDState')
    return params, spd_state and spd_state[2:6]

  def chain(rate, anchor, weight_decay):
    chained = spd(anchor, weight_decay, learning_rate=rate)
    return optax.chain(optax.scale_by_adam(), chained)

  def adam(rate, *_):
    return optax.adam(rate)

  arguments = anchor, jnp.float32(rate), jnp.float32(1.0)
  found, of_state = jax.jacrev(final, (0, 1, 2))(
    *arguments, make=adam_spd if name == 'adam_spd' else chain
  )
  expected, _ = jax.jacrev(final, (0, 1, 2))(*arguments, make=adam)
  # Neither step is selected: the gradient has not turned.
  chex.assert_trees_all_close(found, expected, rtol=1e-6)
  chex.assert_tree_all_finite(of_state)


def test_params_that_rounding_keeps_still_are_taken_for_moved():
  """As the docs say: the state describes the step before it is rounded."""
  for dtype, moves in ((jnp.float32, True), (jnp.bfloat16, False)):
    params = {'w': jnp.ones(16, dtype)}
    tx = adam_spd(1e-3)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    assert bool(jnp.any(moved['w'] != params['w'])) == moves
    np.testing.assert_allclose(state[1].deviation, [4e-3], rtol=1e-2)
