"""A Vision Transformer in Flax NNX: today DINOv2's, with its class token.

Letters in names: B images, H x W pixels, T = 1 + H W / patch_size^2 tokens (the
class token is token 0), N = B T rows, D the width.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """Sizes and constants of one pretrained ViT.

  Attributes:
    patch_size: side of a square patch, in pixels.
    width: D, features of a token; a multiple of `num_heads`.
    depth: number of blocks.
    num_heads: attention heads of a block.
    mlp_dim: hidden features of a block's MLP.
    grid: side of the square grid of patches that `pos_embed` was trained on.
    eps: added to the variance in every LayerNorm.
    mean: of the RGB images in [0, 1] that the model was pretrained on.
    std: their standard deviation. Both belong to the model, never to the data.

  Raises:
    ValueError: `width` is not a multiple of `num_heads`.
  """

  patch_size: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  grid: int
  eps: float
  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  def __post_init__(self):
    if self.width % self.num_heads:
      raise ValueError(
        f'ViTConfig: width {self.width} cannot be shared out among '
        f'{self.num_heads} heads; make it a multiple.'
      )

  def normalize(self, images):
    """(images / 255 - mean) / std, as the model saw its images.

    Args:
      images: [..., 3] colour or [..., 1] grey, 0 to 255, integers or floats.

    Returns:
      [..., 3] float32.
    """
    mean, std = (np.asarray(c, np.float32) for c in (self.mean, self.std))
    return (jnp.asarray(images, jnp.float32) / 255 - mean) / std


DINOV2_S14 = ViTConfig(
  patch_size=14,
  width=384,
  depth=12,
  num_heads=6,
  mlp_dim=1536,
  grid=37,
  eps=1e-6,
  mean=(0.485, 0.456, 0.406),
  std=(0.229, 0.224, 0.225),
)


class ViT(nnx.Module):
  """A pre-norm ViT. Separate q, k, v: SPD's unit is the parameter tensor."""

  def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
    init = nnx.initializers.truncated_normal(0.02)
    patch_dim = config.patch_size**2 * 3
    positions = 1 + config.grid**2
    self.config = config
    self.patch_embed = _linear(patch_dim, config.width, rngs=rngs)
    self.cls_token = nnx.Param(init(rngs.params(), (config.width,)))
    self.pos_embed = nnx.Param(init(rngs.params(), (positions, config.width)))
    self.blocks = nnx.List(
      Block(config, rngs=rngs) for _ in range(config.depth)
    )
    self.norm = LayerNorm(config.width, eps=config.eps)

  def __call__(self, images_BxHxWx3):
    """Normalised images -> [B, T, D], after the final LayerNorm."""
    return self.norm(self.encode(self.embed(images_BxHxWx3)))

  def embed(self, images_BxHxWx3):
    """Images -> the tokens that enter block 0.

    Args:
      images_BxHxWx3: float, as `ViTConfig.normalize` returns them.

    Returns:
      tokens_BxTxD.

    Raises:
      ValueError: a side of the images is not a multiple of the patch size.
    """
    B, H, W, _ = images_BxHxWx3.shape
    p = self.config.patch_size
    if H % p or W % p:
      raise ValueError(
        f'ViT: images of {H} x {W} pixels do not divide into patches of '
        f'{p} x {p}; resize them to multiples of {p}.'
      )
    rows, columns = H // p, W // p
    patches = images_BxHxWx3.reshape(B, rows, p, columns, p, 3)
    patches = patches.transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(B, rows * columns, p * p * 3)
    cls_position, positions = self.pos_embed[0], self.pos_embed[1:]
    positions = resize_positions(positions, rows, columns)
    tokens = self.patch_embed(patches) + positions
    cls = jnp.broadcast_to(
      self.cls_token + cls_position, (B, 1, tokens.shape[-1])
    )
    return jnp.concatenate([cls, tokens], axis=1)

  def encode(self, tokens_BxTxD, start=0, stop=None):
    """Runs `blocks[start:stop]`; `norm` is still to come.

    What enters block k can be stored once, `encode(tokens, stop=k)`, and the
    upper blocks run alone on it, `encode(stored, start=k)`.
    """
    B, T, D = tokens_BxTxD.shape
    # Rows: on CPU the backward pass of a Linear is faster over one leading axis
    # than over [B, T].
    x_NxD = tokens_BxTxD.reshape(B * T, D)
    for block in self.blocks[start:stop]:
      x_NxD = block(x_NxD, B)
    return x_NxD.reshape(B, T, D)

  def class_token(self, tokens_BxTxD, start=0):
    """Tokens that enter block `start` -> the final class token, [B, D].

    It is `norm(encode(tokens, start))[:, 0]`, without what the last block makes
    of the other tokens: five sixths of its work.
    """
    B, T, D = tokens_BxTxD.shape
    last = self.config.depth - 1
    x_BxTxD = self.encode(tokens_BxTxD, start, last)
    block = self.blocks[last]
    return self.norm(block(x_BxTxD.reshape(B * T, D), B, class_token=True))


class Block(nnx.Module):
  """x + scale1 * attn(norm1(x)), then x + scale2 * mlp(norm2(x))."""

  def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
    self.norm1 = LayerNorm(config.width, eps=config.eps)
    self.attn = Attention(config.width, config.num_heads, rngs=rngs)
    self.scale1 = nnx.Param(jnp.ones(config.width))
    self.norm2 = LayerNorm(config.width, eps=config.eps)
    self.mlp = MLP(config.width, config.mlp_dim, rngs=rngs)
    self.scale2 = nnx.Param(jnp.ones(config.width))

  def __call__(self, x_NxD, batch_size, class_token=False):
    """Rows of all tokens -> the same, or [B, D] of the class tokens alone."""
    keys_NxD = queries = self.norm1(x_NxD)
    if class_token:
      tokens = x_NxD.shape[0] // batch_size
      x_NxD, queries = x_NxD[::tokens], queries[::tokens]
    x_NxD = x_NxD + self.scale1 * self.attn(queries, keys_NxD, batch_size)
    return x_NxD + self.scale2 * self.mlp(self.norm2(x_NxD))


class Attention(nnx.Module):
  """softmax(q k^T / sqrt(K)) v in every image and head, K = D / num_heads."""

  def __init__(self, width, num_heads, *, rngs: nnx.Rngs):
    self.num_heads = num_heads
    self.query = _linear(width, width, rngs=rngs)
    self.key = _linear(width, width, rngs=rngs)
    self.value = _linear(width, width, rngs=rngs)
    self.out = _linear(width, width, rngs=rngs)

  def __call__(self, queries_MxD, keys_NxD, batch_size):
    """Rows that ask, and rows that are asked, image by image -> [M, D]."""
    D = queries_MxD.shape[1]
    K = D // self.num_heads
    heads = (batch_size, -1, self.num_heads, K)
    q = self.query(queries_MxD).reshape(heads)
    k = self.key(keys_NxD).reshape(heads)
    v = self.value(keys_NxD).reshape(heads)
    logits = jnp.einsum('bthk,bshk->bhts', q / math.sqrt(K), k)
    mixed = jnp.einsum('bhts,bshk->bthk', jax.nn.softmax(logits), v)
    return self.out(mixed.reshape(-1, D))


class MLP(nnx.Module):
  """fc2(gelu(fc1(x)))."""

  def __init__(self, width, hidden, *, rngs: nnx.Rngs):
    self.fc1 = _linear(width, hidden, rngs=rngs)
    self.fc2 = _linear(hidden, width, rngs=rngs)

  def __call__(self, x_NxD):
    return self.fc2(gelu(self.fc1(x_NxD)))


class LayerNorm(nnx.Module):
  """`layer_norm` over the last axis, with its parameters."""

  def __init__(self, width, *, eps):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones(width))
    self.bias = nnx.Param(jnp.zeros(width))

  def __call__(self, x):
    return layer_norm(x, self.scale[...], self.bias[...], self.eps)


def gelu(x):
  """x Phi(x) with the exact erf, as ViT, DeiT and DINOv2 were trained.

  `jax.nn.gelu(approximate=False)` calls erfc, which costs twice an erf on CPU.
  """
  return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


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


def resize_positions(positions, rows, columns):
  """Position embeddings of a square grid -> those of `rows` x `columns`.

  Bicubic with a = -0.75, half-pixel centres, no antialiasing, the edge
  repeated: `torch.nn.functional.interpolate(size=..., mode='bicubic')`, and
  the ONNX `Resize` by sizes that DINOv2 exports. `jax.image.resize` has
  a = -0.5 and antialiases.

  Args:
    positions: [side * side, D], row by row.
    rows: of patches in the images.
    columns: of patches in the images.

  Returns:
    [rows * columns, D].
  """
  side = math.isqrt(positions.shape[0])
  grid = positions.reshape(side, side, -1)
  grid = jnp.einsum('rs,std->rtd', _bicubic(side, rows), grid)
  grid = jnp.einsum('ct,rtd->rcd', _bicubic(side, columns), grid)
  return grid.reshape(rows * columns, -1)


def _bicubic(size, new_size):
  """The interpolation as a matrix, [new_size, size] float32.

  Keys' kernel, "Cubic convolution interpolation", 1981, with a = -0.75.
  """
  a = -0.75
  centres = (np.arange(new_size) + 0.5) * size / new_size - 0.5
  taps = np.floor(centres)[:, None] + np.arange(-1, 3)
  t = np.abs(centres[:, None] - taps)
  near = (a + 2) * t**3 - (a + 3) * t**2 + 1
  far = a * (t**3 - 5 * t**2 + 8 * t - 4)
  matrix = np.zeros((new_size, size))
  target = np.arange(new_size)[:, None]
  source = np.clip(taps, 0, size - 1).astype(int)
  np.add.at(matrix, (target, source), np.where(t <= 1, near, far))
  return matrix.astype(np.float32)


def _linear(features_in, features_out, *, rngs):
  init = nnx.initializers.truncated_normal(0.02)
  return nnx.Linear(features_in, features_out, kernel_init=init, rngs=rngs)
