"""Every method is the Optax transformation that its name says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import optimizers
from optax_spd import adam_spd

PARAMS = {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)}
SCHEDULE = {'num_steps': 20, 'warmup': 0.1}


def run(tx, num_steps=20):
  params, state = PARAMS, tx.init(PARAMS)
  for key in jax.random.split(jax.random.key(0), num_steps):
    grads = jax.tree.map(lambda p, k=key: jax.random.normal(k, p.shape), params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


def test_the_schedule_rises_and_falls():
  schedule = optimizers.warmup_cosine(3e-4, 100, 0.1)
  rates = np.array([schedule(t) for t in range(101)])
  assert rates[0] == 0
  np.testing.assert_allclose(rates[5], 1.5e-4, rtol=1e-5)
  np.testing.assert_allclose(rates[10], 3e-4, rtol=1e-5)
  np.testing.assert_allclose(rates[55], 1.5e-4, rtol=1e-5)
  np.testing.assert_allclose(rates[100], 0, atol=1e-10)


@pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
def test_methods(name):
  schedule = optimizers.warmup_cosine(1e-2, 20, 0.1)
  # The penalty of L2-SP is mu / 2 |theta - theta_0|^2: its gradient by hand.
  l2sp = optax.chain(
    optax.stateless(
      lambda g, p: jax.tree.map(lambda g, p, a: g + 0.5 * (p - a), g, p, PARAMS)
    ),
    optax.adam(schedule),
  )
  expected = {
    'adamw': optax.adamw(
      schedule, weight_decay=0.5, mask={'kernel': True, 'bias': False}
    ),
    'l2sp': l2sp,
    'adam_spd': adam_spd(schedule, PARAMS, 0.5),
  }[name]
  tx = optimizers.make(name, learning_rate=1e-2, weight_decay=0.5, **SCHEDULE)
  ours, theirs, plain = map(run, (tx, expected, optax.adam(schedule)))
  for key in PARAMS:
    np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-6)
  assert not np.allclose(ours['kernel'], plain['kernel'], rtol=1e-4)
