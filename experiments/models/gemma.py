"""Gemma's decoder in Flax NNX, as PaliGemma has it.

Letters in names: B sequences, T tokens that ask, S tokens that are asked, N =
B T rows, D the width, H heads that share G heads of keys and values, K features
of a head, V the vocabulary, L blocks.

References:
  Gemma Team, "Gemma: Open Models Based on Gemini Research and Technology", 2024
  Beyer et al., "PaliGemma: A versatile 3B VLM for transfer", 2024
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from experiments.models import transformer


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
  """Sizes and constants of a decoder, and how to run it.

  Attributes:
    vocab_size: V, rows of the table of embeddings, which is the head too.
    width: D, features of a token.
    depth: number of blocks.
    num_heads: H, attention heads of a block.
    num_kv_heads: G, heads of keys and values, which divides H.
    head_dim: K, features of a head; even.
    mlp_dim: hidden features of a block's MLP.
    eps: added to the mean square in every RMSNorm.
    rope_theta: base of the wavelengths of the position embedding.
    dtype: that activations are computed in. Parameters, RMSNorm, softmax and
      the logits are float32.
    remat: recompute a block's activations in the backward pass, for memory.
    scan: stack the blocks' parameters on a leading axis, as `vit.ViTConfig`.

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
  eps: float = 1e-6
  rope_theta: float = 10_000.0
  dtype: jax.typing.DTypeLike = 'float32'
  remat: bool = False
  scan: bool = False

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads or self.head_dim % 2:
      raise ValueError(
        f'GemmaConfig: {self.num_heads} heads of {self.head_dim} features '
        f'cannot share {self.num_kv_heads} heads of keys and values; make them '
        'a multiple of those, with an even number of features.'
      )


class Gemma(nnx.Module):
  """A decoder of embeddings, of text or of images."""

  def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
    init = nnx.initializers.truncated_normal(0.02)
    self.config = config
    self.token_embed = nnx.Param(
      init(rngs.params(), (config.vocab_size, config.width))
    )
    blocks = [GemmaBlock(config, rngs=rngs) for _ in range(config.depth)]
    if config.scan:
      self.blocks = jax.tree.map(lambda *params: jnp.stack(params), *blocks)
    else:
      self.blocks = nnx.List(blocks)
    self.norm = RMSNorm(config.width, eps=config.eps)

  def embed(self, ids):
    """Ids [...] -> [..., D], times sqrt(D) as Gemma has it."""
    rows = self.token_embed[...][ids].astype(self.config.dtype)
    return rows * jnp.asarray(math.sqrt(self.config.width), rows.dtype)

  def encode(self, x_BxTxD, positions_BxT, mask_BxTxS):
    """Runs the blocks.

    Args:
      x_BxTxD: embeddings, as `embed` or a projector of images returns them.
      positions_BxT: int, of the tokens in their sequences.
      mask_BxTxS: bool, which tokens each token sees; S = T.

    Returns:
      [B, T, D], before `logits`.
    """
    return self._run(x_BxTxD, positions_BxT, mask_BxTxS)[0]

  def prefill(self, x_BxTxD, positions_BxT, mask_BxTxS, more):
    """As `encode`, and the keys and values for `extend`.

    Args:
      x_BxTxD: as there; so the next two.
      positions_BxT: see there.
      mask_BxTxS: see there.
      more: room for tokens to come, behind these.

    Returns:
      [B, T, D], and a cache of T + `more` tokens.
    """
    x, cache = self._run(x_BxTxD, positions_BxT, mask_BxTxS, keep=True)
    axis = 2 if self.config.scan else 1  # stacked blocks come first

    def room(leaf):
      return jnp.pad(
        leaf, [(0, more if i == axis else 0) for i in range(leaf.ndim)]
      )

    return x, jax.tree.map(room, cache)

  def extend(self, x_BxTxD, positions_BxT, mask_BxTxS, cache, slot):
    """Runs the blocks on tokens behind those of a cache.

    Args:
      x_BxTxD: embeddings of the new tokens.
      positions_BxT: as `encode` takes them.
      mask_BxTxS: what they see of the whole cache.
      cache: as `prefill` or this returned it.
      slot: int, where in it the first of them goes.

    Returns:
      [B, T, D], and the cache with them.
    """
    return self._run(x_BxTxD, positions_BxT, mask_BxTxS, cache, slot, True)

  def features(self, x):
    """[..., D] of `encode` -> what the head sees, float32."""
    with jax.named_scope('norm'):
      return self.norm(x.astype(jnp.float32))

  def logits(self, x):
    """[..., D] of `encode` -> [..., V], float32."""
    features = self.features(x)
    with jax.named_scope('unembed'):
      return jnp.matmul(
        features.astype(self.config.dtype),
        self.token_embed[...].astype(self.config.dtype).T,
        preferred_element_type=jnp.float32,
      )

  def _run(self, x_BxTxD, positions_BxT, mask, cache=None, slot=0, keep=False):
    B, T, D = x_BxTxD.shape
    config = self.config
    rotation = rotations(positions_BxT, config.head_dim, config.rope_theta)

    def step(x_NxD, block_and_cache):
      block, own = block_and_cache
      x_NxD, own = block(x_NxD, rotation, mask, own, slot)
      return x_NxD, own if keep else None

    if config.remat:
      # A scan keeps the two computations apart by itself.
      step = jax.checkpoint(step, prevent_cse=not config.scan)
    x_NxD = x_BxTxD.reshape(B * T, D).astype(config.dtype)
    if config.scan:
      with jax.named_scope('blocks'):
        x_NxD, cache = lax.scan(step, x_NxD, (self.blocks, cache))
    else:
      caches = cache or [None] * config.depth
      cache = []
      for i, own in enumerate(caches):
        with jax.named_scope(f'blocks.{i}'):
          x_NxD, own = step(x_NxD, (self.blocks[i], own))
        cache.append(own)
    return x_NxD.reshape(B, T, D), cache


class GemmaBlock(nnx.Module):
  """x + attn(norm1(x)), then x + mlp(norm2(x))."""

  def __init__(self, config, *, rngs: nnx.Rngs):
    self.norm1 = RMSNorm(config.width, eps=config.eps)
    self.attn = GroupedAttention(config, rngs=rngs)
    self.norm2 = RMSNorm(config.width, eps=config.eps)
    self.mlp = GatedMLP(config, rngs=rngs)

  def __call__(self, x_NxD, rotation, mask_BxTxS, cache=None, slot=0):
    """Rows -> rows, and the keys and values that they were asked of."""
    with jax.named_scope('norm1'):
      y_NxD = self.norm1(x_NxD)
    with jax.named_scope('attn'):
      y_NxD, cache = self.attn(y_NxD, rotation, mask_BxTxS, cache, slot)
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

  def __call__(self, x_NxD, rotation, mask_BxTxS, cache, slot):
    B, T, _ = mask_BxTxS.shape
    heads = (B, T, -1, self.head_dim)
    q = rotate(self.query(x_NxD).reshape(heads), rotation)
    k = rotate(self.key(x_NxD).reshape(heads), rotation)
    v = self.value(x_NxD).reshape(heads)
    if cache is not None:
      k, v = (
        lax.dynamic_update_slice(old, new, (0, slot, 0, 0))
        for old, new in zip(cache, (k, v), strict=True)
      )
    mixed = grouped_attention(q, k, v, mask_BxTxS)
    return self.out(mixed.reshape(len(x_NxD), -1)), (k, v)


def grouped_attention(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask_BxTxS):
  """softmax(q k^T / sqrt(K)) v, [B, T, H, K]; head h asks the h G / H-th one.

  Args:
    q_BxTxHxK: queries.
    k_BxSxGxK: keys.
    v_BxSxGxK: values.
    mask_BxTxS: bool, what each token sees. What sees nothing gets the mean.
  """
  B, T, H, K = q_BxTxHxK.shape
  G = k_BxSxGxK.shape[2]
  logits = jnp.einsum(
    'btgrk,bsgk->bgrts',
    q_BxTxHxK.reshape(B, T, G, H // G, K) / math.sqrt(K),
    k_BxSxGxK,
    preferred_element_type=jnp.float32,
  )
  unseen = jnp.finfo(jnp.float32).min
  logits = jnp.where(mask_BxTxS[:, None, None], logits, unseen)
  weights = jax.nn.softmax(logits).astype(v_BxSxGxK.dtype)
  mixed = jnp.einsum('bgrts,bsgk->btgrk', weights, v_BxSxGxK)
  return mixed.reshape(B, T, H, K)


def rotations(positions_BxT, features, theta):
  """cos and sin of the angles p theta^(-2i / K), each [B, T, 1, K / 2]."""
  i = jnp.arange(0, features, 2, dtype=jnp.float32)
  angles = positions_BxT[..., None, None] * theta ** (-i / features)
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BxTxHxK, rotation):
  """Rotates features i and i + K / 2 of each head (RoPE; Su et al., 2021)."""
  cos, sin = rotation
  first, second = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, -1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(turned, -1).astype(x_BxTxHxK.dtype)


class GatedMLP(nnx.Module):
  """down(gelu(gate(x)) * up(x)), the GELU with tanh."""

  def __init__(self, config, *, rngs: nnx.Rngs):
    self.gate = _linear(config.width, config.mlp_dim, config, rngs)
    self.up = _linear(config.width, config.mlp_dim, config, rngs)
    self.down = _linear(config.mlp_dim, config.width, config, rngs)

  def __call__(self, x):
    return self.down(jax.nn.gelu(self.gate(x)) * self.up(x))


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + eps) * (1 + scale), over the last axis."""

  def __init__(self, width, *, eps):
    self.eps = eps
    self.scale = nnx.Param(jnp.zeros(width))

  def __call__(self, x):
    """Computed in float32, returned in the dtype of x."""
    y = x.astype(jnp.float32)
    y *= lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    return (y * (1 + self.scale[...])).astype(x.dtype)


def _linear(features_in, features_out, config, rngs):
  return transformer.linear(
    features_in, features_out, use_bias=False, dtype=config.dtype, rngs=rngs
  )
