"""LLaMA's decoder, against one in NumPy, and its cache against itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models import blocks, llama, lora

TINY = llama.LlamaConfig(
  vocab_size=40,
  width=16,
  depth=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_dim=24,
  eps=1e-5,
  rope_theta=1e3,
  context_length=64,
  tied=False,
)
LLAMA3 = llama.RopeScaling('llama3', factor=4.0, original=32)
IDS = np.random.default_rng(0).integers(0, 40, (2, 9))


def make(**changes):
  """A model whose params are all far from their start, norms too."""
  model = llama.Llama(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(0))
  rng = np.random.default_rng(1)
  state = jax.tree.map(
    lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32),
    nnx.state(model),
  )
  nnx.update(model, state)
  return model


def frequencies(config):
  """As transformers writes llama3's: by wavelength, in three cases."""
  scaling, found = config.rope_scaling, []
  for i in range(config.head_dim // 2):
    frequency = config.rope_theta ** (-2 * i / config.head_dim)
    wavelength = 2 * np.pi / frequency
    if scaling is None or (
      scaling.kind == 'llama3' and wavelength < scaling.original / scaling.high
    ):
      found.append(frequency)
    elif (
      scaling.kind == 'linear' or wavelength > scaling.original / scaling.low
    ):
      found.append(frequency / scaling.factor)
    else:
      smooth = (scaling.original / wavelength - scaling.low) / (
        scaling.high - scaling.low
      )
      found.append(
        (1 - smooth) * frequency / scaling.factor + smooth * frequency
      )
  return np.array(found)


def oracle(model, ids_T):
  """Logits [T, V] of one sequence, in float64, head by head."""
  config = model.config
  p = jax.tree.map(
    lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model))
  )
  if config.scan:
    p = blocks.unstack(p)
  offset = float(config.unit_offset)

  def norm(x, scale):
    return (
      x
      / np.sqrt((x**2).mean(-1, keepdims=True) + config.eps)
      * (scale + offset)
    )

  def activation(x):
    if config.activation == 'silu':
      return x / (1 + np.exp(-x))
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  def rotated(x):
    angles = np.arange(len(x))[:, None] * frequencies(config)
    pairs = x[:, : config.head_dim // 2] + 1j * x[:, config.head_dim // 2 :]
    pairs = pairs * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], 1)

  T, K = len(ids_T), config.head_dim
  x = p['token_embed'][ids_T]
  if config.scaled_embeddings:
    x = x * np.sqrt(config.width)
  for i in range(config.depth):
    block = p['blocks'][i]
    y = norm(x, block['norm1']['scale'])
    q, k, v = (
      y @ block['attn'][n]['kernel'] for n in ('query', 'key', 'value')
    )
    heads = []
    for h in range(config.num_heads):
      g = h * config.num_kv_heads // config.num_heads
      at, of = slice(h * K, (h + 1) * K), slice(g * K, (g + 1) * K)
      scores = rotated(q[:, at]) @ rotated(k[:, of]).T / np.sqrt(K)
      weights = np.exp(scores) * np.tri(T)
      heads.append(weights / weights.sum(1, keepdims=True) @ v[:, of])
    x = x + np.concatenate(heads, 1) @ block['attn']['out']['kernel']
    y = norm(x, block['norm2']['scale'])
    gate, up = (y @ block['mlp'][n]['kernel'] for n in ('gate', 'up'))
    x = x + activation(gate) * up @ block['mlp']['down']['kernel']
  table = p['token_embed'].T if config.tied else p['unembed']['kernel']
  return norm(x, p['norm']['scale']) @ table


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'tied': True, 'num_kv_heads': 4},
    {'scan': True, 'num_kv_heads': 1},
    {'rope_scaling': llama.RopeScaling('linear', factor=2.0)},
    {'rope_scaling': LLAMA3, 'rope_theta': 50.0},
    {
      'activation': 'gelu_tanh',
      'unit_offset': True,
      'scaled_embeddings': True,
      'tied': True,
    },
  ],
)
def test_logits(changes):
  model = make(**changes)
  found = model(jnp.array(IDS))
  assert found.dtype == jnp.float32
  for row, ids in zip(found, IDS, strict=True):
    np.testing.assert_allclose(row, oracle(model, ids), rtol=1e-4, atol=1e-4)


def test_rotary_positions_are_in_all_three_ranges_of_llama3():
  config = dataclasses.replace(TINY, rope_theta=50.0, rope_scaling=LLAMA3)
  plain = frequencies(dataclasses.replace(config, rope_scaling=None))
  shares = frequencies(config) / plain
  assert shares[0] == 1
  assert 0.25 < shares[1] < 1
  assert shares[2] == 0.25
  cos, sin = llama.rotations(jnp.array([[3]]), config)
  np.testing.assert_allclose(
    np.arctan2(sin, cos)[0, 0, 0], 3 * frequencies(config), rtol=1e-5
  )


@pytest.mark.parametrize('scan', [False, True])
def test_the_cache_gives_what_a_whole_pass_gives(scan):
  model = make(scan=scan)
  whole = model(jnp.array(IDS))
  T = IDS.shape[1]
  positions = jnp.broadcast_to(jnp.arange(T), IDS.shape)
  # The first four tokens, one, then the rest at once; the cache has room left.
  x, cache = model.prefill(
    model.embed(IDS[:, :4]), positions[:, :4], None, more=T
  )
  parts = [model.logits(x)]
  slots = np.arange(4 + T)
  for first, last in ((4, 5), (5, T)):
    own = np.arange(first, last)
    x, cache = model.extend(
      model.embed(IDS[:, own]),
      positions[:, own],
      (slots <= own[:, None])[None, None],
      cache,
      first,
    )
    parts.append(model.logits(x))
  np.testing.assert_allclose(
    jnp.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5
  )
  # The second sequence twice, in the place of both.
  again, _ = model.extend(
    model.embed(IDS[[1, 1], :1]),
    jnp.full((2, 1), T),
    (slots <= T)[None, None, None],
    model.cache_rows(cache, jnp.array([1, 1])),
    T,
  )
  np.testing.assert_array_equal(again[0], again[1])


def test_blocks_may_be_run_one_after_the_other():
  model = make()
  positions = jnp.broadcast_to(jnp.arange(9), IDS.shape)
  x = model.encode(model.embed(IDS), positions, stop=2)
  x = model.encode(x, positions, start=2)
  np.testing.assert_allclose(model.logits(x), model(IDS), rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match=r'scan=True\) are run all or none'):
    make(scan=True).encode(x, positions, start=1)


def loss(graphdef, params):
  return jnp.sin(nnx.merge(graphdef, params)(jnp.array(IDS))).sum()


def test_other_ways_of_running_have_the_same_gradients():
  grads = {}
  for name, changes in {
    'plain': {},
    'remat': {'remat': True},
    'scan': {'scan': True, 'remat': True},
  }.items():
    model = make()
    params = nnx.to_pure_dict(nnx.state(model))
    if changes.get('scan'):
      params = blocks.stack(params)
    other = llama.Llama(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(other)
    nnx.replace_by_pure_dict(state, params)
    grad = jax.grad(loss, argnums=1)(graphdef, state)
    grad = nnx.to_pure_dict(grad)
    grads[name] = blocks.unstack(grad) if changes.get('scan') else grad
  for name in ('remat', 'scan'):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
      grads[name],
      grads['plain'],
    )


def test_half_precision_is_near():
  model, half = make(), make(dtype='bfloat16')
  found = half(jnp.array(IDS))
  assert found.dtype == jnp.float32
  assert (
    half.encode(half.embed(IDS), jnp.zeros(IDS.shape)).dtype == jnp.bfloat16
  )
  spread = float(jnp.std(model(jnp.array(IDS))))
  assert 0 < float(jnp.abs(found - model(jnp.array(IDS))).mean()) < 0.1 * spread


def test_the_depth_of_its_parameters():
  model = make()
  params = nnx.to_pure_dict(nnx.state(model))
  depths = blocks.depths(params)
  assert depths['token_embed'] == 4
  assert depths['unembed']['kernel'] == depths['norm']['scale'] == 0
  assert depths['blocks'][2]['mlp']['up']['kernel'] == 1
  above = blocks.from_block(2)
  assert above(('unembed', 'kernel'), None)
  assert not above(('token_embed',), None)
  axes = blocks.layer_axes(blocks.stack(params))
  assert axes['blocks']['attn']['key']['kernel'] == 1
  assert axes['unembed']['kernel'] == 0


def test_lora_of_every_linear_module_of_it():
  model = make()
  adapted = lora.add(model, 2, 4, modules=r'.*', rngs=nnx.Rngs(0))
  np.testing.assert_allclose(adapted(IDS), model(IDS), rtol=1e-6, atol=1e-6)
  paths = [
    path
    for path, _ in nnx.to_flat_state(nnx.state(adapted, nnx.LoRAParam))
    if path[-1] == 'lora_a'
  ]
  assert len(paths) == 3 * 7 + 1


def test_heads_that_cannot_be_shared_out_are_refused():
  with pytest.raises(ValueError, match='4 heads of 6 features cannot share 3'):
    dataclasses.replace(TINY, num_kv_heads=3)
  with pytest.raises(ValueError, match='with an even number of features'):
    dataclasses.replace(TINY, head_dim=5)
