"""L2-SP: coupled before Adam, decoupled after it."""

import jax
import numpy as np
import optax
import pytest

from optax_spd import decay_to_anchor
from tests.optax_spd import oracle
from tests.optax_spd.problems import Quadratic, as_arrays

RATE = 1e-3


def trajectory(tx, num_steps=100):
  problem = Quadratic(num_layers=2)
  params = as_arrays(problem.params)
  state = tx.init(params)
  update = jax.jit(tx.update)
  for _ in range(num_steps):
    grads = problem.grads(params, problem.noise())
    updates, state = update(grads, state, params)
    yield params, grads, updates
    params = optax.apply_updates(params, updates)


def test_before_adam_it_is_the_gradient_of_the_penalty():
  """Algorithm 1: Adam on loss + lambda |theta - theta_0|^2."""
  lam = 0.3
  penalty = 2 * lam  # of a squared norm without the half
  anchor = {n: p + 0.1 for n, p in Quadratic(num_layers=2).params.items()}
  tx = optax.chain(decay_to_anchor(penalty, anchor), optax.adam(RATE))
  adam = {n: oracle.Adam(np.full(100, RATE)) for n in anchor}
  for params, grads, updates in trajectory(tx):
    for n, theta_0 in anchor.items():
      theta = np.asarray(params[n], np.float64)
      gradient = np.asarray(grads[n], np.float64)
      gradient = gradient + 2 * lam * (theta - theta_0)
      expected = adam[n].step(gradient)
      # A sign-like step: relative rounding of the gradient shows in it.
      np.testing.assert_allclose(updates[n], expected, rtol=1e-3, atol=1e-8)


def test_after_adam_it_is_decoupled():
  anchor = {n: p + 0.1 for n, p in Quadratic(num_layers=2).params.items()}
  tx = optax.chain(
    optax.scale_by_adam(),
    decay_to_anchor(0.5, anchor),
    optax.scale_by_learning_rate(RATE),
  )
  adam = {n: oracle.Adam(np.full(100, RATE)) for n in anchor}
  for params, grads, updates in trajectory(tx):
    for n, theta_0 in anchor.items():
      u = adam[n].step(np.asarray(grads[n], np.float64))
      expected = u - RATE * 0.5 * (np.asarray(params[n]) - theta_0)
      np.testing.assert_allclose(updates[n], expected, rtol=1e-3, atol=1e-8)


def test_at_the_origin_it_is_weight_decay():
  params = as_arrays(Quadratic().params)
  ours, theirs = decay_to_anchor(0.1, 'origin'), optax.add_decayed_weights(0.1)
  updates, state = ours.update(params, ours.init(params), params)
  expected, _ = theirs.update(params, theirs.init(params), params)
  jax.tree.map(np.testing.assert_array_equal, updates, expected)
  assert jax.tree.leaves(state) == []


def test_mask_leaves_parameters_alone():
  params = {'body': np.ones(3, np.float32), 'head': np.ones(2, np.float32)}
  anchor = {'body': np.zeros(3, np.float32)}
  tx = decay_to_anchor(0.5, anchor, mask={'body': True, 'head': False})
  updates, _ = tx.update(params, tx.init(params), params)
  np.testing.assert_array_equal(updates['body'], 1.5)
  np.testing.assert_array_equal(updates['head'], 1.0)


def test_bad_arguments_are_refused():
  params = {'w': np.ones(3, np.float32)}
  tx = decay_to_anchor(0.1)
  with pytest.raises(ValueError, match='decay_to_anchor: update needs'):
    tx.update(params, tx.init(params))
  with pytest.raises(ValueError, match='weight_decay is -1'):
    decay_to_anchor(-1.0)
  with pytest.raises(ValueError, match=r"anchor\['w'\] has shape \(4,\)"):
    decay_to_anchor(0.1, {'w': np.ones(4)}).init(params)
