"""LLaMA's decoder in Flax NNX, and what has its architecture.

LLaMA 1, 2 and 3, SmolLM2, and with other options of `LlamaConfig` Gemma: token
embedding, blocks of grouped-query attention with rotary positions and a gated
MLP, RMSNorm.

Letters in names: B sequences, T tokens that ask, S tokens that are asked, N =
B T rows, D the width, H heads that share G heads of keys and values, K features
of a head, V the vocabulary.

References:
  Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023
  Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding",
    2021
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from experiments.models import transformer


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary positions were stretched for a longer context.

  With kind 'linear' all angles are divided by `factor`. With 'llama3' those
  whose wavelength is above original / low are, those below original / high are
  not, and between the two it goes over smoothly.

  Attributes:
    kind: which one.
    factor: at least 1.
    low: of 'llama3', as is what follows; low_freq_factor in its config.json.
    high: high_freq_factor.
    original: original_max_position_embeddings, tokens.
  """

  kind: Literal['linear', 'llama3']
  factor: float
  low: float = 1.0
  high: float = 4.0
  original: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Sizes and constants of a decoder, and how to run it.

  Attributes:
    vocab_size: V, rows of the table of embeddings.
    width: D, features of a token.
    depth: number of blocks.
    num_heads: H, attention heads of a block.
    num_kv_heads: G, heads of keys and values, which divides H.
    head_dim: K, features of a head; even.
    mlp_dim: hidden features of a block's MLP.
    eps: added to the mean square in every RMSNorm.
    rope_theta: base of the wavelengths of rotary positions.
    context_length: the most tokens that it was trained on.
    tied: whether the table of embeddings is the head too.
    rope_scaling: None for none.
    activation: of the MLP's gate, a key of `ACTIVATIONS`.
    unit_offset: whether RMSNorm multiplies by 1 + scale, as Gemma's does.
    scaled_embeddings: whether embeddings are multiplied by sqrt(D), so too.
    dtype: that activations are computed in. Parameters, RMSNorm, softmax and
      logits are float32.
    remat: recompute a block's activations in the backward pass, for memory.
    scan: stack the blocks' parameters on a leading axis and run them in a loop,
      so that one block is compiled. Then all of them are run, or none.

  Raises:
    ValueError: the heads cannot be shared out.
  """

  vocab_size: int
  width: int
  depth: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  eps: float
  rope_theta: float
  context_length: int
  tied: bool
  rope_scaling: RopeScaling | None = None
  activation: Literal['silu', 'gelu_tanh'] = 'silu'
  unit_offset: bool = False
  scaled_embeddings: bool = False
  dtype: jax.typing.DTypeLike = 'float32'
  remat: bool = False
  scan: bool = False

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads or self.head_dim % 2:
      raise ValueError(
        f'LlamaConfig: {self.num_heads} heads of {self.head_dim} features '
        f'cannot share {self.num_kv_heads} heads of keys and values; make them '
        'a multiple of those, with an even number of features.'
      )


_LLAMA_7B = LlamaConfig(
  vocab_size=32000,
  width=4096,
  depth=32,
  num_heads=32,
  num_kv_heads=32,
  head_dim=128,
  mlp_dim=11008,
  eps=1e-6,
  rope_theta=10_000.0,
  context_length=2048,
  tied=False,
)
_13B = {'width': 5120, 'depth': 40, 'mlp_dim': 13824}
_LLAMA2_7B = dataclasses.replace(_LLAMA_7B, eps=1e-5, context_length=4096)
_LLAMA3_8B = dataclasses.replace(
  _LLAMA2_7B,
  vocab_size=128_256,
  num_kv_heads=8,
  mlp_dim=14336,
  rope_theta=500_000.0,
  context_length=8192,
)

CONFIGS = {
  'llama_7b': _LLAMA_7B,
  'llama_13b': dataclasses.replace(
    _LLAMA_7B, num_heads=40, num_kv_heads=40, **_13B
  ),
  'llama2_7b': _LLAMA2_7B,
  'llama2_13b': dataclasses.replace(
    _LLAMA2_7B, num_heads=40, num_kv_heads=40, **_13B
  ),
  'llama3_8b': _LLAMA3_8B,
  'llama31_8b': dataclasses.replace(
    _LLAMA3_8B,
    context_length=131_072,
    rope_scaling=RopeScaling('llama3', factor=8.0),
  ),
  'smollm2_135m': LlamaConfig(
    vocab_size=49152,
    width=576,
    depth=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    eps=1e-5,
    rope_theta=100_000.0,
    context_length=8192,
    tied=True,
  ),
}

ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu_tanh': jax.nn.gelu,  # with tanh in the place of erf
}


class Llama(nnx.Module):
  """A decoder of token ids, or of embeddings. It holds no random state."""

  def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
    self.config = config
    init = nnx.initializers.truncated_normal(0.02)
    self.token_embed = nnx.Param(
      init(rngs.params(), (config.vocab_size, config.width))
    )
    blocks = [LlamaBlock(config, rngs=rngs) for _ in range(config.depth)]
    if config.scan:
      self.blocks = jax.tree.map(lambda *params: jnp.stack(params), *blocks)
    else:
      self.blocks = nnx.List(blocks)
    self.norm = _norm(config)
    if not config.tied:
      self.unembed = nnx.Linear(
        config.width,
        config.vocab_size,
        use_bias=False,
        dtype=config.dtype,
        preferred_element_type=jnp.float32,
        kernel_init=init,
        rngs=rngs,
      )

  def __call__(self, ids_BxT, positions_BxT=None, mask=None):
    """Token ids -> the logits of the next token, float32 [B, T, V]."""
    if positions_BxT is None:
      positions_BxT = _from_zero(ids_BxT)
    x_BxTxD = self.encode(self.embed(ids_BxT), positions_BxT, mask)
    return self.logits(x_BxTxD)

  def embed(self, ids):
    """Ids [...] -> what enters block 0, [..., D]."""
    x = self.token_embed[...][ids].astype(self.config.dtype)
    if self.config.scaled_embeddings:
      x *= jnp.asarray(math.sqrt(self.config.width), x.dtype)
    return x

  def encode(self, x_BxTxD, positions_BxT, mask=None, start=0, stop=None):
    """Runs `blocks[start:stop]`; `logits` are still to come.

    Args:
      x_BxTxD: embeddings, or what left block start - 1.
      positions_BxT: int, of the tokens in their sequences.
      mask: bool, broadcast to [B, 1, T, S]: what each token sees; None for
        itself and what is before it.
      start: a block.
      stop: the one after the last; None for all.

    Returns:
      [B, T, D].

    Raises:
      ValueError: a part of the blocks is asked for, and they are stacked.
    """
    blocks = range(self.config.depth)[start:stop]
    if self.config.scan and len(blocks) < self.config.depth:
      raise ValueError(
        'Llama: stacked blocks (scan=True) are run all or none; this was a '
        'part of them.'
      )
    return self._run(x_BxTxD, positions_BxT, mask, blocks)[0]

  def logits(self, x):
    """What leaves the last block, [..., D] -> float32 [..., V]."""
    with jax.named_scope('norm'):
      x = self.norm(x)
    with jax.named_scope('unembed'):
      if not self.config.tied:
        return self.unembed(x)
      table = self.token_embed[...].astype(x.dtype)
      return jnp.matmul(x, table.T, preferred_element_type=jnp.float32)

  def prefill(self, x_BxTxD, positions_BxT, mask, more):
    """As `encode` of all blocks, and a cache for `extend`.

    Args:
      x_BxTxD: embeddings.
      positions_BxT: as `encode` takes them.
      mask: so too.
      more: room for tokens to come, behind these.

    Returns:
      [B, T, D], and the keys and values of T + `more` tokens.
    """
    blocks = range(self.config.depth)
    x_BxTxD, cache = self._run(x_BxTxD, positions_BxT, mask, blocks, keep=True)
    axis = self._rows + 1

    def with_room(leaf):
      room = [(0, more if i == axis else 0) for i in range(leaf.ndim)]
      return jnp.pad(leaf, room)

    return x_BxTxD, jax.tree.map(with_room, cache)

  def extend(self, x_BxTxD, positions_BxT, mask, cache, slot):
    """Runs all blocks on tokens behind those of a cache.

    Args:
      x_BxTxD: embeddings of the new tokens.
      positions_BxT: as `encode` takes them.
      mask: bool, broadcast to [B, 1, T, S]: what they see of the whole cache.
      cache: as `prefill` or this returned it.
      slot: int, where in it the first of them goes.

    Returns:
      [B, T, D], and the cache with them.
    """
    blocks = range(self.config.depth)
    return self._run(
      x_BxTxD, positions_BxT, mask, blocks, cache, slot, keep=True
    )

  def cache_rows(self, cache, rows):
    """The cache of some of its sequences, by index, one as often as named."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, self._rows), cache)

  @property
  def _rows(self):
    """The axis of a cache that enumerates sequences; stacks come before it."""
    return 1 if self.config.scan else 0

  def _run(
    self, x_BxTxD, positions_BxT, mask, blocks, cache=None, slot=0, keep=False
  ):
    B, T, D = x_BxTxD.shape
    config = self.config
    rotation = rotations(positions_BxT, config)

    def step(x_NxD, block_and_cache):
      block, own = block_and_cache
      x_NxD, own = block(x_NxD, rotation, mask, own, slot)
      return x_NxD, own if keep else None

    if config.remat:
      # A scan keeps the two computations apart by itself.
      step = jax.checkpoint(step, prevent_cse=not config.scan)
    x_NxD = x_BxTxD.reshape(B * T, D).astype(config.dtype)
    if config.scan:
      if blocks:
        with jax.named_scope('blocks'):
          x_NxD, cache = lax.scan(step, x_NxD, (self.blocks, cache))
    else:
      caches = cache or [None] * config.depth
      cache = []
      for i in blocks:
        with jax.named_scope(f'blocks.{i}'):
          x_NxD, own = step(x_NxD, (self.blocks[i], caches[i]))
        cache.append(own)
    return x_NxD.reshape(B, T, D), cache


class LlamaBlock(nnx.Module):
  """x + attn(norm1(x)), then x + mlp(norm2(x))."""

  def __init__(self, config, *, rngs: nnx.Rngs):
    self.norm1 = _norm(config)
    self.attn = GroupedAttention(config, rngs=rngs)
    self.norm2 = _norm(config)
    self.mlp = GatedMLP(config, rngs=rngs)

  def __call__(self, x_NxD, rotation, mask=None, cache=None, slot=0):
    """Rows -> rows, and the keys and values that were asked."""
    with jax.named_scope('norm1'):
      y_NxD = self.norm1(x_NxD)
    with jax.named_scope('attn'):
      y_NxD, cache = self.attn(y_NxD, rotation, mask, cache, slot)
    x_NxD = x_NxD + y_NxD
    with jax.named_scope('norm2'):
      y_NxD = self.norm2(x_NxD)
    with jax.named_scope('mlp'):
      return x_NxD + self.mlp(y_NxD), cache


class GroupedAttention(nnx.Module):
  """Attention of H heads that share G heads of keys and values."""

  def __init__(self, config, *, rngs: nnx.Rngs):
    self.head_dim = config.head_dim
    asking = config.num_heads * config.head_dim
    asked = config.num_kv_heads * config.head_dim
    self.query = _linear(config.width, asking, config, rngs)
    self.key = _linear(config.width, asked, config, rngs)
    self.value = _linear(config.width, asked, config, rngs)
    self.out = _linear(asking, config.width, config, rngs)

  def __call__(self, x_NxD, rotation, mask=None, cache=None, slot=0):
    """As `LlamaBlock`."""
    B, T = rotation[0].shape[:2]
    heads = (B, T, -1, self.head_dim)
    q = rotate(self.query(x_NxD).reshape(heads), rotation)
    k = rotate(self.key(x_NxD).reshape(heads), rotation)
    v = self.value(x_NxD).reshape(heads)
    if cache is not None:
      k, v = (
        lax.dynamic_update_slice(old, new, (0, slot, 0, 0))
        for old, new in zip(cache, (k, v), strict=True)
      )
    mixed = transformer.grouped_attention(q, k, v, mask)
    return self.out(mixed.reshape(B * T, -1)), (k, v)


class GatedMLP(nnx.Module):
  """down(activation(gate(x)) * up(x))."""

  def __init__(self, config, *, rngs: nnx.Rngs):
    self.activation = config.activation
    self.gate = _linear(config.width, config.mlp_dim, config, rngs)
    self.up = _linear(config.width, config.mlp_dim, config, rngs)
    self.down = _linear(config.mlp_dim, config.width, config, rngs)

  def __call__(self, x):
    return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + eps) * scale, over the last axis.

  With a unit offset the factor is 1 + scale.
  """

  def __init__(self, width, *, eps, unit_offset=False):
    self.eps = eps
    self.unit_offset = unit_offset
    self.scale = nnx.Param((jnp.zeros if unit_offset else jnp.ones)(width))

  def __call__(self, x):
    """Computed in float32, returned in the dtype of x."""
    scale = self.scale[...] + 1 if self.unit_offset else self.scale[...]
    y = x.astype(jnp.float32)
    y *= lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    return (y * scale).astype(x.dtype)


def rotations(positions_BxT, config):
  """cos and sin of the angles of rotary positions, each [B, T, 1, K / 2].

  The i-th angle of position p is p theta^(-2i / K), as `RopeScaling` changes
  it.
  """
  frequencies = _frequencies(config)
  angles = positions_BxT[..., None, None] * jnp.asarray(frequencies)
  return jnp.cos(angles), jnp.sin(angles)


def _frequencies(config):
  """Radians a position, float32 [K / 2]."""
  i = np.arange(0, config.head_dim, 2)
  frequencies = config.rope_theta ** (-i / config.head_dim)
  if scaling := config.rope_scaling:
    slower = frequencies / scaling.factor
    if scaling.kind == 'linear':
      frequencies = slower
    else:
      turns = scaling.original * frequencies / (2 * math.pi)
      kept = (turns - scaling.low) / (scaling.high - scaling.low)
      kept = np.clip(kept, 0, 1)
      frequencies = kept * frequencies + (1 - kept) * slower
  return frequencies.astype(np.float32)


def rotate(x_BxTxHxK, rotation):
  """Rotates features i and i + K / 2 of every head by the i-th angle."""
  cos, sin = rotation
  first, second = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, -1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(turned, -1).astype(x_BxTxHxK.dtype)


def _from_zero(ids_BxT):
  return jnp.broadcast_to(jnp.arange(ids_BxT.shape[1]), ids_BxT.shape)


def _norm(config):
  return RMSNorm(config.width, eps=config.eps, unit_offset=config.unit_offset)


def _linear(features_in, features_out, config, rngs):
  return transformer.linear(
    features_in, features_out, use_bias=False, dtype=config.dtype, rngs=rngs
  )
