import jax
import jax.numpy as jnp
import numpy as np
from jax import test_util

from experiments.models import transformer


def test_layer_norm_gradient():
  x, scale, bias = (
    jax.random.normal(jax.random.key(i), shape)
    for i, shape in enumerate([(3, 5, 16), (16,), (16,)])
  )
  test_util.check_grads(
    lambda *args: transformer.layer_norm(*args, 1e-6),
    (x, scale, bias),
    order=1,
    modes=['rev'],
    rtol=1e-2,  # central differences in float32
  )


def test_gelu_is_the_exact_one():
  x = jnp.linspace(-4, 4, 101)
  exact = jax.nn.gelu(x, approximate=False)
  # The tanh approximation is off by 5e-4.
  np.testing.assert_allclose(transformer.gelu(x), exact, atol=1e-6)


def test_layer_norm_is_float32_inside():
  x = (1000 + jax.random.normal(jax.random.key(0), (4, 64))).astype('bfloat16')
  norm = transformer.LayerNorm(64, eps=1e-6)
  y = norm(x)
  assert y.dtype == jnp.bfloat16
  # Half a unit in the last place of values up to 4.
  np.testing.assert_allclose(
    y.astype('float32'), norm(x.astype('float32')), atol=2**-7
  )
