"""Swin Transformer in Flax NNX: attention in windows that shift.

Letters in names: B images, h x w tokens of a stage's grid, T = window^2 tokens
of a window, n windows of an image, N rows, H heads, K features of a head, D the
width of a stage.

A grid that the windows do not divide is padded, and shifted then, as
transformers does and the authors for dense prediction; timm shifts it first.

References:
  Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted
  Windows", 2021.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models import transformer, vit
from experiments.models.transformer import MLP, LayerNorm, linear, weigh


@dataclasses.dataclass(frozen=True)
class SwinConfig:
  """Sizes and constants of one pretrained Swin, and how to run it.

  Attributes:
    width: D of the first stage; each of the next ones has twice as many.
    depths: number of blocks of each stage.
    num_heads: attention heads of a block, in each stage.
    window: side of a window, in tokens.
    patch_size: side of a square patch, in pixels.
    mlp_ratio: hidden features of a block's MLP, in widths of its stage.
    eps: added to the variance in every LayerNorm.
    mean: of the RGB images in [0, 1] that the model was pretrained on.
    std: their standard deviation.
    dtype: that activations are computed in. Parameters, LayerNorm, softmax and
      the features are float32.
    drop_path: as `vit.ViTConfig` has it; so is the next one.
    remat: see there.

  Raises:
    ValueError: a stage's width is not a multiple of its heads, or `drop_path`
      is not in [0, 1).
  """

  width: int
  depths: tuple[int, ...]
  num_heads: tuple[int, ...]
  window: int = 7
  patch_size: int = 4
  mlp_ratio: float = 4
  eps: float = 1e-5
  mean: tuple[float, float, float] = vit.IMAGENET['mean']
  std: tuple[float, float, float] = vit.IMAGENET['std']
  dtype: jax.typing.DTypeLike = 'float32'
  drop_path: float = 0.0
  remat: bool = False

  def __post_init__(self):
    heads = zip(self.widths, self.num_heads, strict=True)
    if any(width % number for width, number in heads):
      raise ValueError(
        f'SwinConfig: widths {self.widths} cannot be shared out among '
        f'{self.num_heads} heads; make them multiples.'
      )
    transformer.check_drop_path(self.drop_path)

  @property
  def depth(self):
    """Number of blocks."""
    return sum(self.depths)

  @property
  def widths(self):
    """D of each stage."""
    return tuple(self.width * 2**i for i in range(len(self.depths)))

  def normalize(self, images):
    """As `vit.ViTConfig.normalize`."""
    return vit.normalize(images, self.mean, self.std)


CONFIGS = {
  'swin_t': SwinConfig(width=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
}


class Swin(nnx.Module):
  """A Swin. Separate q, k, v: SPD's unit is the parameter tensor.

  The blocks of all stages are one list, `blocks`; the first block of a stage
  has the patch merging before it. Any image is taken: what its patches, the
  merging or the windows do not divide is filled up with zeros, as the authors
  do it.
  """

  def __init__(self, config: SwinConfig, *, rngs: nnx.Rngs):
    self.config = config
    dtype = config.dtype
    self.patch_embed = linear(
      config.patch_size**2 * 3, config.width, dtype=dtype, rngs=rngs
    )
    self.patch_norm = LayerNorm(config.width, eps=config.eps)
    self.blocks = nnx.List(
      [
        SwinBlock(config, stage, shifted=i % 2 == 1, first=i == 0, rngs=rngs)
        for stage, depth in enumerate(config.depths)
        for i in range(depth)
      ]
    )
    self.norm = LayerNorm(config.widths[-1], eps=config.eps)

  def __call__(self, images_BxHxWx3):
    """Normalised images -> [B, h, w, D] float32 of the last stage's tokens."""
    _, H, W, _ = images_BxHxWx3.shape
    sides = tuple(-(-n // self.config.patch_size) for n in (H, W))
    return self.pyramid(self.embed(images_BxHxWx3), sides)[-1]

  def embed(self, images_BxHxWx3):
    """Images, as `SwinConfig.normalize` returns them -> tokens [B, h w, D]."""
    p = self.config.patch_size
    images = _fill_up(images_BxHxWx3, p)
    B, H, W, _ = images.shape
    patches = images.reshape(B, H // p, p, W // p, p, 3)
    patches = patches.transpose(0, 1, 3, 2, 4, 5)
    tokens = self.patch_embed(patches.reshape(-1, p * p * 3))
    return self.patch_norm(tokens).reshape(B, -1, self.config.width)

  def pyramid(self, tokens_BxTxD, grid, *, key=None):
    """What leaves each stage, a list of [B, h, w, D] float32, the finest first.

    The last is after the final LayerNorm.

    Args:
      tokens_BxTxD: as `embed` returns them.
      grid: rows and columns of the patches.
      key: of drop path, in training; None in evaluation.
    """
    config = self.config
    B, _, D = tokens_BxTxD.shape
    keep = transformer.keep_paths(key, config.drop_path, config.depth, B)
    x = tokens_BxTxD.reshape(B, *grid, D).astype(config.dtype)
    stages, ends = [], np.cumsum(config.depths) - 1
    for i, block in enumerate(self.blocks):
      step = jax.checkpoint(_call) if config.remat else _call
      with jax.named_scope(f'blocks.{i}'):
        x = step(block, x, None if keep is None else keep[i])
      if i in ends:
        stages.append(x.astype(jnp.float32))
    with jax.named_scope('norm'):
      stages[-1] = self.norm(stages[-1])
    return stages


def _call(block, x, keep):
  return block(x, keep)


class SwinBlock(nnx.Module):
  """x + attn(norm1(x)), then x + mlp(norm2(x)); before it, perhaps, merging."""

  def __init__(self, config, stage, *, shifted, first, rngs: nnx.Rngs):
    D = config.widths[stage]
    self.shifted = shifted
    if first and stage:
      self.merge = PatchMerging(D // 2, config, rngs=rngs)
    self.norm1 = LayerNorm(D, eps=config.eps)
    self.attn = WindowAttention(
      D, config.num_heads[stage], config.window, dtype=config.dtype, rngs=rngs
    )
    self.norm2 = LayerNorm(D, eps=config.eps)
    self.mlp = MLP(
      D,
      int(D * config.mlp_ratio),
      activation='gelu',
      dtype=config.dtype,
      rngs=rngs,
    )

  def __call__(self, x_BxhxwxD, keep_2xB=None):
    """`keep_2xB` multiplies each image's two residual branches."""
    keep_attn_B, keep_mlp_B = (None, None) if keep_2xB is None else keep_2xB
    if hasattr(self, 'merge'):
      with jax.named_scope('merge'):
        x_BxhxwxD = self.merge(x_BxhxwxD)
    shape = x_BxhxwxD.shape
    x_NxD = x_BxhxwxD.reshape(-1, shape[-1])
    with jax.named_scope('norm1'):
      y = self.norm1(x_NxD).reshape(shape)
    with jax.named_scope('attn'):
      y = self.attn(y, self.shifted).reshape(x_NxD.shape)
    x_NxD = x_NxD + weigh(y, keep_attn_B)
    with jax.named_scope('norm2'):
      y = self.norm2(x_NxD)
    with jax.named_scope('mlp'):
      y = self.mlp(y)
    return (x_NxD + weigh(y, keep_mlp_B)).reshape(shape)


class PatchMerging(nnx.Module):
  """Four neighbours -> one token: a LayerNorm, and a Linear from 4 D to 2 D."""

  def __init__(self, width, config, *, rngs: nnx.Rngs):
    self.norm = LayerNorm(4 * width, eps=config.eps)
    self.reduction = linear(
      4 * width, 2 * width, use_bias=False, dtype=config.dtype, rngs=rngs
    )

  def __call__(self, x_BxhxwxD):
    x = _fill_up(x_BxhxwxD, 2)
    B, h, w, D = x.shape
    # The upper left, the lower left, the upper right, the lower right.
    x = x.reshape(B, h // 2, 2, w // 2, 2, D).transpose(0, 1, 3, 4, 2, 5)
    x = self.reduction(self.norm(x.reshape(-1, 4 * D)))
    return x.reshape(B, h // 2, w // 2, 2 * D)


class WindowAttention(nnx.Module):
  """Attention in each window, with a learnt bias for each relative position."""

  def __init__(self, width, num_heads, window, *, dtype, rngs: nnx.Rngs):
    self.num_heads = num_heads
    self.window = window
    self.query = linear(width, width, dtype=dtype, rngs=rngs)
    self.key = linear(width, width, dtype=dtype, rngs=rngs)
    self.value = linear(width, width, dtype=dtype, rngs=rngs)
    self.out = linear(width, width, dtype=dtype, rngs=rngs)
    init = nnx.initializers.truncated_normal(0.02)
    positions = (2 * window - 1) ** 2
    self.position_bias = nnx.Param(init(rngs.params(), (positions, num_heads)))

  def __call__(self, x_BxhxwxD, shifted):
    """`shifted` windows are cut half a window on, round the edges."""
    _, h, w, D = x_BxhxwxD.shape
    s = self.window
    x = _fill_up(x_BxhxwxD, s)
    B, rows, columns, _ = x.shape
    # Where one window holds a whole side, a shifted one would see the same.
    shift = s // 2 if shifted and min(h, w) > s else 0
    if shift:
      x = jnp.roll(x, (-shift, -shift), (1, 2))
    windows = (B, rows // s, s, columns // s, s, D)
    x = x.reshape(windows).transpose(0, 1, 3, 2, 4, 5).reshape(-1, D)
    x = self.out(self._mix(x, B, _regions(rows, columns, s, shift)))
    x = x.reshape([windows[i] for i in (0, 1, 3, 2, 4, 5)])
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(B, rows, columns, D)
    if shift:
      x = jnp.roll(x, (shift, shift), (1, 2))
    return x[:, :h, :w]

  def _mix(self, x_NxD, batch_size, apart_nxTxT):
    """Rows of windows -> the same, mixed by attention within each of them."""
    D = x_NxD.shape[-1]
    H, T = self.num_heads, self.window**2
    heads = (batch_size, -1, T, H, D // H)
    q, k, v = (
      module(x_NxD).reshape(heads)
      for module in (self.query, self.key, self.value)
    )
    logits = jnp.einsum(
      'bnthk,bnshk->bnhts',
      q * (D // H) ** -0.5,
      k,
      preferred_element_type=jnp.float32,
    )
    bias_TxTxH = self.position_bias[...][_relative(self.window)]
    logits += bias_TxTxH.transpose(2, 0, 1)
    if apart_nxTxT is not None:
      logits += jnp.where(apart_nxTxT[:, None], -jnp.inf, 0.0)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum('bnhts,bnshk->bnthk', weights, v).reshape(-1, D)


@functools.cache
def _relative(window):
  """The row of the bias for each pair of tokens of a window, [T, T]."""
  tokens = np.stack(np.divmod(np.arange(window**2), window))
  down, right = tokens[:, :, None] - tokens[:, None] + window - 1
  return down * (2 * window - 1) + right


@functools.cache
def _regions(rows, columns, window, shift):
  """Which pairs of tokens in a window were no neighbours before the shift.

  Returns:
    bools [n, T, T]; None where nothing is shifted.
  """
  if not shift:
    return None
  parts = [
    np.searchsorted([side - window, side - shift], np.arange(side), 'right')
    for side in (rows, columns)
  ]
  regions = 3 * parts[0][:, None] + parts[1]
  regions = regions.reshape(rows // window, window, columns // window, window)
  regions = regions.transpose(0, 2, 1, 3).reshape(-1, window**2)
  return regions[:, :, None] != regions[:, None]


def _fill_up(x_BxhxwxD, multiple):
  """Zeros below and on the right, up to a multiple of rows and columns."""
  _, h, w, _ = x_BxhxwxD.shape
  below, right = (math.ceil(n / multiple) * multiple - n for n in (h, w))
  if not (below or right):
    return x_BxhxwxD
  return jnp.pad(x_BxhxwxD, ((0, 0), (0, below), (0, right), (0, 0)))
