"""FTP, DiGraP and SPD's controls against their formulas, in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import baselines
from experiments.models import blocks
from optax_spd import adam_spd, layer_names, spd
from tests.experiments import test_optimizers
from tests.optax_spd import oracle

SCHEDULE = test_optimizers.SCHEDULE
RATES = np.array([SCHEDULE(t) for t in range(40)])


def draw(seed=0):
  """Params whose rows differ: a kernel, a bias, stacked kernels, a head."""
  rng = np.random.default_rng(seed)
  shapes = {
    'fc': {'kernel': (4, 3), 'bias': (3,)},
    'blocks': {'kernel': (2, 4, 3), 'scale': (2, 3)},
    'head': {'kernel': (3, 2)},
  }
  return jax.tree.map(
    lambda s: rng.normal(size=s), shapes, is_leaf=lambda s: isinstance(s, tuple)
  )


def run(tx, params, num_steps=40, noise=0.02, **extra):
  """Params and states of every step, and the gradients: a noisy slope."""
  params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
  target = jax.tree.map(lambda p: p + 0.05, params)
  state = tx.init(params)

  @jax.jit
  def step(params, state, drawn):
    grads = jax.tree.map(
      lambda p, x, n: p - x + noise * n, params, target, drawn
    )
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state, grads

  seen = []
  for seed in range(1, num_steps + 1):
    before = params
    params, state, grads = step(params, state, draw(seed))
    seen.append((before, grads, params, state))
  return seen


def slices(tree):
  """The layers, `{name: array}` in float64, in the order of SPD."""
  names = layer_names(tree, layer_axes=blocks.layer_axes)
  arrays = []
  for leaf, axes in zip(
    jax.tree.leaves(tree),
    jax.tree.leaves(blocks.layer_axes(tree)),
    strict=True,
  ):
    leaf = np.asarray(leaf, np.float64)
    arrays += list(leaf) if axes else [leaf]
  return dict(zip(names, arrays, strict=True))


class Ftp:
  """FTP of one layer, whose rows are its columns where it is a kernel."""

  def __init__(self, theta_0, is_kernel, rates):
    self.adam = oracle.Adam(rates)
    self.theta_0, self.axis = theta_0, 0 if is_kernel else None
    self.gamma, self.d = 1e-8, 0 * theta_0
    self.t, self.m, self.v = 0, 0.0, 0.0

  def step(self, theta, g):
    self.t += 1
    h = np.sum(np.sum(g * self.d, self.axis) / self.norm())
    self.m = 0.9 * self.m + 0.1 * h
    self.v = 0.999 * self.v + 0.001 * h**2
    m_hat, v_hat = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
    self.gamma -= 1e-2 * m_hat / (np.sqrt(v_hat) + 1e-8)
    self.d = theta + self.adam.step(g) - self.theta_0
    self.gamma = np.clip(self.gamma, 1e-8, self.norm().max())
    return self.theta_0 + np.minimum(1, self.gamma / self.norm()) * self.d

  def norm(self):
    return np.sum(np.abs(self.d), self.axis) + 1e-8


@pytest.mark.parametrize('share', [1.0, 0.1])
def test_ftp_is_the_authors_formula(share):
  """At a rate that leads out of the radius, and one that it outruns."""
  start = draw()
  seen = run(baselines.ftp(lambda count: share * SCHEDULE(count)), start)
  ours = {
    name: Ftp(x, 'kernel' in name, share * RATES)
    for name, x in slices(jax.tree.map(np.float32, start)).items()
    if not name.startswith('head')
  }
  head = oracle.Adam(share * RATES)
  inside = largest = total = 0
  for before, grads, after, state in seen:
    g, theta, found = map(slices, (grads, before, after))
    radii = slices(optax.tree.get(state, 'FTPState').radius)
    for name, layer in ours.items():
      # The float32 params that are there: no error adds up.
      wanted = layer.step(theta[name], g[name])
      np.testing.assert_allclose(found[name], wanted, atol=1e-6)
      np.testing.assert_allclose(radii[name].max(), layer.gamma, atol=1e-5)
      inside += np.sum(layer.gamma >= layer.norm())
      largest += layer.gamma == layer.norm().max()
      total += layer.norm().size
    wanted = theta['head/kernel'] + head.step(g['head/kernel'])
    np.testing.assert_allclose(found['head/kernel'], wanted, atol=1e-6)
  # All of it happened.
  assert 0.02 * total < inside < 0.98 * total
  assert share == 1 or largest > 10


def test_ftp_stays_within_its_radius():
  start = jax.tree.map(np.float32, draw())
  seen = run(baselines.ftp(SCHEDULE), start)
  bounds = []
  for _, _, after, state in seen:
    found = slices(jax.tree.map(lambda a, b: a - b, after, start))
    radii = slices(optax.tree.get(state, 'FTPState').radius)
    for name, radius in radii.items():
      norm = np.sum(np.abs(found[name]), 0 if 'kernel' in name else None)
      # Four numbers a row, each rounded as a float32 about 1 is.
      assert np.all(norm <= radius.max() + 4 * 2.4e-7)
      bounds.append(radius.max())
  assert max(bounds) > 0.01
  assert not any(name.startswith('head') for name in radii)


class DiGraP:
  def __init__(self, theta_0, omega=None):
    self.adam = oracle.Adam(RATES)
    self.theta_0, self.fixed, self.omega = theta_0, omega, omega or 0.0
    self.p, self.t, self.m, self.v = 0 * theta_0, 0, 0.0, 0.0

  def step(self, theta, g):
    if self.fixed is None:
      self.t += 1
      norms = np.linalg.norm(g) * np.linalg.norm(self.p)
      h = np.sum(g * self.p) / norms if norms else 0.0
      self.m = 0.9 * self.m + 0.1 * h
      self.v = 0.999 * self.v + 0.001 * h**2
      m_hat, v_hat = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
      self.omega -= 1e-2 * m_hat / (np.sqrt(v_hat) + 1e-8)
      self.omega = np.clip(self.omega, 0, 1)
    delta = theta - self.theta_0
    along = np.sum(g * delta)
    self.p = along / np.sum(delta**2) * delta if along < 0 else 0 * delta
    return theta + self.adam.step(g - self.omega * self.p)


@pytest.mark.parametrize('omega', [None, 1.0, 0.4])
def test_digrap_is_its_formula(omega):
  start = jax.tree.map(np.float32, draw())
  # Noise turns gradients, and omega follows.
  seen = run(baselines.digrap(SCHEDULE, omega), start, noise=0.2)
  ours = {name: DiGraP(x, omega) for name, x in slices(start).items()}
  projected = total = 0
  for before, grads, after, _ in seen:
    g, theta, found = map(slices, (grads, before, after))
    for name, layer in ours.items():
      wanted = layer.step(theta[name], g[name])
      # Near the anchor delta is a difference of float32s.
      np.testing.assert_allclose(found[name], wanted, atol=2e-5)
      projected += layer.p.any()
      total += 1
  assert 0.1 * total < projected < total
  if omega is None:
    state = optax.tree.get(seen[-1][-1], 'DiGraPState')
    omegas = jax.tree.leaves(state.omega)
    omegas = np.concatenate([np.ravel(x) for x in omegas])
    assert ((omegas >= 0) & (omegas <= 1)).all()
    assert omegas.max() > 0.05


def test_digrap_without_projection_is_adam():
  found = run(baselines.digrap(SCHEDULE, 0.0), draw())[-1][2]
  adam = run(optax.adam(SCHEDULE), draw())[-1][2]
  jax.tree.map(np.testing.assert_array_equal, found, adam)
  whole = run(baselines.digrap(SCHEDULE, 1.0), draw())[-1][2]
  assert (whole['fc']['kernel'] != adam['fc']['kernel']).all()


@pytest.mark.parametrize('make', [baselines.ftp, baselines.digrap])
def test_the_anchor_is_no_buffer_of_the_params(make):
  params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), draw())
  tx = make(SCHEDULE)
  for init in (tx.init, jax.jit(tx.init)):
    state = init(params)
    known = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)}
    own = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}
    assert not known & own


def spd_states(seen):
  return [optax.tree.get(state, 'SPDState') for *_, state in seen]


def check_spd(seen, start, selects, strength):
  """Adam, and the layers that `selects(step, name)` pulled back."""
  start = slices(jax.tree.map(np.float32, start))
  adams = {name: oracle.Adam(RATES) for name in start}
  pulled = 0
  for t, (before, grads, after, state) in enumerate(seen):
    g, theta, found = map(slices, (grads, before, after))
    ratios = optax.tree.get(state, 'SPDState').ratio
    for i, (name, x) in enumerate(start.items()):
      u = adams[name].step(g[name])
      delta = theta[name] - x
      # A condition that holds, or does not; never at the anchor itself.
      sign = 1 if selects(t, i) else -1
      wanted, about = oracle.spd_step(theta[name], x, sign * delta, u, strength)
      np.testing.assert_allclose(found[name], wanted, atol=2e-6)
      np.testing.assert_allclose(ratios[i], about['r'], atol=1e-3)
      pulled += about['s'] > 0
  return pulled / (len(seen) * len(start))


def test_spd_without_its_condition():
  keys = {'weight_decay': 0.3, 'layer_axes': blocks.layer_axes}
  seen = run(baselines.always_spd(optax.adam(SCHEDULE), **keys), draw())
  share = check_spd(seen, draw(), lambda t, i: True, 0.3)
  exact = run(adam_spd(SCHEDULE, **keys), draw())
  total = seen[-1][0] and len(seen) * len(slices(draw()))
  assert spd_states(seen)[-1].decayed_count.sum() == share * total
  assert spd_states(exact)[-1].decayed_count.sum() < share * total
  # The first step has a rate of zero, and the second is free.
  assert spd_states(seen)[1].selected_count.sum() == 0
  last = spd_states(seen)[-1]
  assert (last.selected_count == len(seen) - 2).all()


def random_spd(fire, **keys):
  return baselines.random_spd(
    optax.adam(SCHEDULE),
    weight_decay=1.0,
    fire=np.array(fire, np.float32),
    layer_axes=blocks.layer_axes,
    **keys,
  )


def drawn(seen):
  counts = np.array([state.selected_count for state in spd_states(seen)])
  return np.diff(counts, axis=0, prepend=0).astype(bool)


def test_layers_are_drawn():
  seen = run(random_spd([0.5]), draw(), seed=3)
  selected = drawn(seen)
  assert check_spd(seen, draw(), lambda t, i: selected[t, i], 1.0) > 0.2
  again = run(random_spd([0.5]), draw(), seed=3)
  np.testing.assert_array_equal(selected, drawn(again))
  other = drawn(run(random_spd([0.5]), draw(), seed=4))
  assert (selected[2:] != other[2:]).mean() == pytest.approx(0.5, abs=0.1)
  # Each layer by itself, those of a stack too.
  same = (selected[2:, :, None] == selected[2:, None, :]).mean(0)
  assert (same[~np.eye(len(same), dtype=bool)] < 0.85).all()


def test_the_probability_of_each_layer():
  def no_head(params):
    return {name: name != 'head' for name in params}

  names = layer_names(draw(), mask=None, layer_axes=blocks.layer_axes)
  fire = [float(name.endswith('[1]')) for name in names]
  selected = drawn(run(random_spd(fire), draw()))
  np.testing.assert_array_equal(selected[2:].mean(0), fire)
  assert sum(fire) == 2

  def mask(params):
    return jax.tree.map(
      lambda flag, tree: jax.tree.map(lambda _: flag, tree),
      no_head(params),
      params,
    )

  fire = [0.1, 0.9, 0.1, 0.9, 0.5, 0.5]
  selected = drawn(run(random_spd(fire, mask=mask), draw(), num_steps=200))
  np.testing.assert_allclose(selected[2:].mean(0), fire, atol=0.12)
  for wrong in ([0.5] * 3, [0.5] * 7):
    with pytest.raises(
      ValueError, match=rf'fire has {len(wrong)} prob.*SPD 6 la'
    ):
      random_spd(wrong, mask=mask).init(draw())


@pytest.mark.parametrize('tx', [baselines.always_spd, random_spd])
def test_controls_pull_to_the_origin_too(tx):
  """Where the state has no anchor to subtract."""
  params = jax.tree.map(np.float32, draw())
  anchor = {**params, 'blocks': {'kernel': 'origin', 'scale': 'origin'}}
  zero = {**params, 'blocks': jax.tree.map(np.zeros_like, params['blocks'])}
  if tx is random_spd:
    make = functools.partial(random_spd, [0.5])
  else:
    make = functools.partial(
      tx, optax.adam(SCHEDULE), layer_axes=blocks.layer_axes
    )
  seen, wanted = (run(make(anchor=x), params) for x in (anchor, zero))
  jax.tree.map(np.testing.assert_array_equal, seen[-1][2], wanted[-1][2])
  state = spd_states(seen)[-1]
  assert not jax.tree.leaves(state.anchor['blocks'])
  assert (state.decayed_count[:4] > 0).all()


def test_the_estimate_decides_as_the_gradient_does():
  keys = {'weight_decay': 0.7, 'layer_axes': blocks.layer_axes}
  estimated = baselines.estimated_spd(
    optax.scale_by_adam(), learning_rate=SCHEDULE, **keys
  )
  link = optax.chain(optax.scale_by_adam(), spd(learning_rate=SCHEDULE, **keys))
  found, wanted, exact = (
    run(tx, draw()) for tx in (estimated, link, adam_spd(SCHEDULE, **keys))
  )
  jax.tree.map(np.testing.assert_array_equal, found[-1][2], wanted[-1][2])
  assert spd_states(found)[-1].decayed_count.sum() > 20
  agrees = drawn(found) == drawn(exact)
  assert agrees.mean() > 0.8
