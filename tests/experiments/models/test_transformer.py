import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


GPU = types.SimpleNamespace(compute_capability='9.0')


@pytest.fixture
def asked(monkeypatch):
  """As on a machine with a GPU: what cuDNN is asked for there, XLA computes."""
  calls = []
  own = jax.nn.dot_product_attention

  def spy(*args, implementation, **options):
    calls.append((implementation, args[0].shape[1]))
    return own(*args, **options)

  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(jax, 'local_devices', lambda: [GPU])
  monkeypatch.setattr(jax.nn, 'dot_product_attention', spy)
  return calls


def qkv(dtype='bfloat16', T=5, S=None, K=8):
  keys = jax.random.split(jax.random.key(0), 3)
  return [
    jax.random.normal(key, (2, length, 3, K)).astype(dtype)
    for key, length in zip(keys, (T, S or T, S or T), strict=True)
  ]


@pytest.mark.parametrize(
  ('lengths', 'causal'),
  [({}, False), ({}, True), ({'T': 1, 'S': 5}, False)],
)
def test_attention(lengths, causal):
  """Against float64, head by head."""
  q, k, v = qkv('float32', **lengths)
  found = transformer.attention(q, k, v, causal=causal)
  for b, h in np.ndindex(2, 3):
    logits = np.float64(q[b, :, h]) @ np.float64(k[b, :, h]).T / np.sqrt(8)
    if causal:
      logits[np.triu_indices(5, 1)] = -np.inf
    weights = np.exp(logits)
    weights /= weights.sum(1, keepdims=True)
    # Float32 rounding, of values up to 2.
    np.testing.assert_allclose(found[b, :, h], weights @ v[b, :, h], atol=1e-6)


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize(('T', 'padded'), [(4, 4), (5, 6)])
def test_half_precision_attention_is_cudnns_on_a_gpu(asked, T, padded, causal):
  """The same values and gradients; of odd lengths, with one more token."""

  @functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0}
  )
  def run(args):
    def loss(args):
      found = transformer.attention(*args, causal=causal)
      return jnp.sin(found.astype('float32')).sum(), found

    (_, found), grads = jax.value_and_grad(loss, has_aux=True)(args)
    return [x.astype('float32') for x in (found, *grads)]

  args = qkv(T=T)
  found = run(args)
  assert asked == [('cudnn', padded)]
  expected = run([x.astype('float32') for x in args])
  assert len(asked) == 1
  for ours, theirs in zip(found, expected, strict=True):
    assert ours.shape == (2, T, 3, 8)
    # bfloat16 has 8 bits: sums of five roundings of values up to 3.
    np.testing.assert_allclose(ours, theirs, atol=2**-5)


@pytest.mark.parametrize(
  'changes', [{'dtype': 'float32'}, {'T': 1, 'S': 5}, {'K': 12}, {'K': 136}]
)
def test_what_cudnn_does_not_take(asked, changes):
  transformer.attention(*qkv(**changes))
  assert asked == []


@pytest.mark.parametrize('capability', ['7.5', 'gfx90a'])
def test_gpus_without_fused_attention(asked, monkeypatch, capability):
  monkeypatch.setattr(GPU, 'compute_capability', capability)
  transformer.attention(*qkv())
  assert asked == []
