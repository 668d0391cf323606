"""What the transformers of this project are made of: blocks and their parts.

Letters in names: B sequences, T tokens of one, N = B T rows, D the width.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax


def gelu(x):
  """x Phi(x) with the exact erf, as ViT, DeiT and DINOv2 were trained.

  `jax.nn.gelu(approximate=False)` calls erfc, which costs twice an erf on CPU.
  """
  return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


def quick_gelu(x):
  """x sigmoid(1.702 x), as OpenAI's CLIP was trained."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
  'gelu': gelu,
  'quick_gelu': quick_gelu,
  'gelu_tanh': jax.nn.gelu,  # with tanh for erf, as SigLIP and Gemma have it
}


class Block(nnx.Module):
  """x + scale1 * attn(norm1(x)), then x + scale2 * mlp(norm2(x))."""

  def __init__(
    self,
    width,
    num_heads,
    mlp_dim,
    *,
    eps,
    activation,
    layer_scale=False,
    causal=False,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.layer_scale = layer_scale
    self.norm1 = LayerNorm(width, eps=eps)
    self.attn = Attention(
      width, num_heads, causal=causal, dtype=dtype, rngs=rngs
    )
    self.norm2 = LayerNorm(width, eps=eps)
    self.mlp = MLP(
      width, mlp_dim, activation=activation, dtype=dtype, rngs=rngs
    )
    if layer_scale:
      self.scale1 = nnx.Param(jnp.ones(width))
      self.scale2 = nnx.Param(jnp.ones(width))

  def __call__(self, x_NxD, batch_size, keep_2xB=None, class_token=False):
    """Rows of all tokens -> the same, or [B, D] of the class tokens alone.

    `keep_2xB` multiplies each sequence's two residual branches.
    """
    keep_attn_B, keep_mlp_B = (None, None) if keep_2xB is None else keep_2xB
    with jax.named_scope('norm1'):
      keys_NxD = queries = self.norm1(x_NxD)
    if class_token:
      # Not [::tokens], whose gradient breaks the TPU compiler (libtpu 0.0.42).
      rows = (batch_size, -1, x_NxD.shape[-1])
      x_NxD, queries = (x.reshape(rows)[:, 0] for x in (x_NxD, queries))
    with jax.named_scope('attn'):
      y_NxD = self.attn(queries, keys_NxD, batch_size)
    if self.layer_scale:
      y_NxD = y_NxD * self.scale1.astype(y_NxD.dtype)
    x_NxD = x_NxD + weigh(y_NxD, keep_attn_B)
    with jax.named_scope('norm2'):
      y_NxD = self.norm2(x_NxD)
    with jax.named_scope('mlp'):
      y_NxD = self.mlp(y_NxD)
    if self.layer_scale:
      y_NxD = y_NxD * self.scale2.astype(y_NxD.dtype)
    return x_NxD + weigh(y_NxD, keep_mlp_B)


class Attention(nnx.Module):
  """`attention` of `num_heads` heads between four Linear modules."""

  def __init__(self, width, num_heads, *, causal=False, dtype, rngs: nnx.Rngs):
    self.num_heads = num_heads
    self.causal = causal
    self.query = linear(width, width, dtype=dtype, rngs=rngs)
    self.key = linear(width, width, dtype=dtype, rngs=rngs)
    self.value = linear(width, width, dtype=dtype, rngs=rngs)
    self.out = linear(width, width, dtype=dtype, rngs=rngs)

  def __call__(self, queries_MxD, keys_NxD, batch_size):
    """Rows that ask, and rows that are asked, by sequence -> [M, D]."""
    D = queries_MxD.shape[1]
    K = D // self.num_heads
    heads = (batch_size, -1, self.num_heads, K)
    q = self.query(queries_MxD).reshape(heads)
    k = self.key(keys_NxD).reshape(heads)
    v = self.value(keys_NxD).reshape(heads)
    mixed = attention(q, k, v, causal=self.causal)
    return self.out(mixed.reshape(-1, D))


def attention(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, *, causal=False):
  """softmax(q k^T / sqrt(K)) v in every sequence and head, [B, T, H, K].

  Self-attention in half precision is cuDNN's fused kernel on an NVIDIA GPU: no
  [T, S] goes through memory. `jax.nn.dot_product_attention` takes that only
  when told to. Its other implementation is not used: on CPU, forward and
  backward of 257 tokens take it up to 1.35 times as long.

  Args:
    q_BxTxHxK: queries of B sequences and H heads.
    k_BxSxHxK: keys.
    v_BxSxHxK: values.
    causal: whether no token sees those behind it; then T = S.
  """
  K = q_BxTxHxK.shape[-1]
  if _suits_cudnn(q_BxTxHxK, k_BxSxHxK.shape[1]):
    return _cudnn_attention(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, causal)
  logits = jnp.einsum(
    'bthk,bshk->bhts',
    q_BxTxHxK / math.sqrt(K),
    k_BxSxHxK,
    preferred_element_type=jnp.float32,
  )
  if causal:
    seen = np.tri(*logits.shape[-2:], dtype=bool)
    logits = jnp.where(seen, logits, -jnp.inf)
  weights = jax.nn.softmax(logits).astype(v_BxSxHxK.dtype)
  return jnp.einsum('bhts,bshk->bthk', weights, v_BxSxHxK)


def grouped_attention(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask=None):
  """`attention` of H heads that share G of keys and values, [B, T, H, K].

  Query head h asks head h G // H; every token sees one at least.

  Args:
    q_BxTxHxK: queries.
    k_BxSxGxK: keys.
    v_BxSxGxK: values.
    mask: bool, broadcast to [B, 1, T, S]: what each token sees; None for itself
      and what is before it, and then T = S.
  """
  B, T, H, K = q_BxTxHxK.shape
  S, G = k_BxSxGxK.shape[1:3]
  if _suits_cudnn(q_BxTxHxK, S) and T % 2 == 0:
    return jax.nn.dot_product_attention(
      q_BxTxHxK,
      k_BxSxGxK,
      v_BxSxGxK,
      mask=mask,
      is_causal=mask is None,
      implementation='cudnn',
    )
  if mask is None:
    mask = np.tri(T, dtype=bool)
  logits = jnp.einsum(
    'btgrk,bsgk->bgrts',
    q_BxTxHxK.reshape(B, T, G, H // G, K) / math.sqrt(K),
    k_BxSxGxK,
    preferred_element_type=jnp.float32,
  )
  mask = jnp.broadcast_to(mask, (B, 1, T, S))[:, :, None]
  weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf))
  mixed = jnp.einsum(
    'bgrts,bsgk->btgrk', weights.astype(v_BxSxGxK.dtype), v_BxSxGxK
  )
  return mixed.reshape(B, T, H, K)


def _cudnn_attention(q, k, v, causal):
  B, T, *_ = q.shape
  lengths = None
  if T % 2:
    # A backward pass is of even lengths alone, as jax checks them, and a ViT's
    # are odd: one more token, which nothing looks at.
    q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = jnp.full(B, T, jnp.int32)
  mixed = jax.nn.dot_product_attention(
    q,
    k,
    v,
    is_causal=causal,
    key_value_seq_lengths=lengths,
    implementation='cudnn',
  )
  return mixed[:, :T]


def _suits_cudnn(q_BxTxHxK, S):
  """Whether cuDNN's fused attention is of such queries, of S keys."""
  *_, T, _, K = q_BxTxHxK.shape
  return (
    q_BxTxHxK.dtype in (jnp.bfloat16, jnp.float16)
    and S == T
    and K % 8 == 0
    and K <= 128
    and _has_cudnn()
  )


def _has_cudnn():
  """Whether programs are for NVIDIA GPUs whose cuDNN has fused attention."""
  if jax.default_backend() != 'gpu':
    return False
  capability = jax.local_devices()[0].compute_capability
  # '8.0' is Ampere's; an AMD GPU has a name there, 'gfx90a'.
  return capability[0].isdigit() and float(capability) >= 8


class MLP(nnx.Module):
  """fc2(activation(fc1(x)))."""

  def __init__(self, width, hidden, *, activation, dtype, rngs: nnx.Rngs):
    self.activation = activation
    self.fc1 = linear(width, hidden, dtype=dtype, rngs=rngs)
    self.fc2 = linear(hidden, width, dtype=dtype, rngs=rngs)

  def __call__(self, x_NxD):
    return self.fc2(ACTIVATIONS[self.activation](self.fc1(x_NxD)))


class LayerNorm(nnx.Module):
  """`layer_norm` over the last axis, with its parameters."""

  def __init__(self, width, *, eps):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones(width))
    self.bias = nnx.Param(jnp.zeros(width))

  def __call__(self, x):
    """Computed in float32, returned in the dtype of x."""
    y = layer_norm(
      x.astype(jnp.float32), self.scale[...], self.bias[...], self.eps
    )
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x, scale, bias, eps):
  """y = scale * z + bias, z = (x - mean(x)) / sqrt(var(x) + eps).

  Its gradient is written out, because XLA's CPU compiler makes of the derived
  one a backward pass that is several times slower to run and to compile.
  Reverse mode only.

  Args:
    x: [..., D]; mean and variance are over the last axis.
    scale: [D].
    bias: [D].
    eps: a number.

  Returns:
    [..., D].
  """
  return _layer_norm_fwd(x, scale, bias, eps)[0]


def _layer_norm_fwd(x, scale, bias, eps):
  centred = x - x.mean(-1, keepdims=True)
  rstd = lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
  z = centred * rstd
  return scale * z + bias, (z, rstd, scale)


def _layer_norm_bwd(eps, residuals, dy):
  del eps
  z, rstd, scale = residuals
  # dx = (dz - mean(dz) - z mean(dz z)) / sqrt(var + eps)
  dz = dy * scale
  dx = dz - dz.mean(-1, keepdims=True) - z * (dz * z).mean(-1, keepdims=True)
  rows = tuple(range(dy.ndim - 1))
  return rstd * dx, (dy * z).sum(rows), dy.sum(rows)


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


def weigh(x_NxD, weights_B):
  """Rows of each sequence, multiplied by its weight; None is 1."""
  if weights_B is None:
    return x_NxD
  x_BxTxD = x_NxD.reshape(weights_B.size, -1, x_NxD.shape[-1])
  weights = weights_B[:, None, None].astype(x_NxD.dtype)
  return (x_BxTxD * weights).reshape(x_NxD.shape)


def keep_paths(key, drop_path, depth, batch_size):
  """What stochastic depth multiplies the two branches of each block by.

  Args:
    key: of the step; None in evaluation.
    drop_path: the rate in the last block; it rises linearly from 0 in block 0.
    depth: number of blocks.
    batch_size: B.

  Returns:
    [depth, 2, B], 0 or 1 / (1 - rate); None where nothing is dropped.
  """
  if key is None or not drop_path:
    return None
  rates = np.linspace(0, drop_path, depth, dtype=np.float32)
  keep = 1 - rates[:, None, None]
  return jax.random.bernoulli(key, keep, (depth, 2, batch_size)) / keep


def check_drop_path(drop_path):
  """Refuses what is no rate of `keep_paths`."""
  if not 0 <= drop_path < 1:
    raise ValueError(f'drop_path is {drop_path}; a rate is in [0, 1).')


def linear(
  features_in, features_out, *, use_bias=True, dtype=jnp.float32, rngs
):
  """An `nnx.Linear` that starts from a normal of 0.02, cut at two sigma."""
  return nnx.Linear(
    features_in,
    features_out,
    use_bias=use_bias,
    dtype=dtype,
    kernel_init=nnx.initializers.truncated_normal(0.02),
    rngs=rngs,
  )
