"""What a layer is, and its name."""

import jax
import jax.numpy as jnp

from optax_spd import adam_spd, layer_names


def test_names_follow_the_order_of_the_vectors():
  params = {
    'b': {'w': jnp.full((2, 3), 2.0), 'v': jnp.full(4, 3.0)},
    'a': [jnp.full(9, 1.0), jnp.full(1, 5.0)],
  }
  names = layer_names(params)
  assert names == ['a/0', 'a/1', 'b/v', 'b/w']
  # A step of the size of the params from a zero anchor: deviation tells which.
  tx = adam_spd(0.0, 'origin')
  _, state = tx.update(params, tx.init(params), params)
  deviation = dict(zip(names, state[1].deviation.tolist(), strict=True))
  assert deviation == {
    'a/0': 3.0,
    'a/1': 5.0,
    'b/v': 6.0,
    'b/w': float(jnp.sqrt(24.0)),
  }


def test_names_of_shapes_and_of_masked_params():
  params = {'a': jnp.ones(3), 'b': {'w': jnp.ones((2, 2)), 'v': jnp.ones(2)}}
  shapes = jax.eval_shape(lambda: params)
  mask = {'a': True, 'b': {'w': True, 'v': False}}
  assert layer_names(shapes, mask=mask) == ['a', 'b/w']
