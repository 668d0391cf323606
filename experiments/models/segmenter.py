"""Backbones with a decoder: a class for every pixel.

Letters in names: B images, h x w cells of a grid, C classes, D the width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from experiments.models.transformer import LayerNorm, linear
from experiments.models.vit import ViT


class Segmenter(nnx.Module):
  """A backbone, and a decoder of its features.

  Attributes:
    backbone: a `vit.ViT` or a `swin.Swin`.
    head: the decoder: list of [B, h, w, D], the finest first -> logits [B, h,
      w, C] of the finest grid.
  """

  def __init__(self, backbone, head):
    self.backbone = backbone
    self.head = head

  @property
  def stride(self):
    """Side of a cell of the logits, in pixels of the image."""
    return self.backbone.config.patch_size

  def embed(self, images_BxHxWx3):
    """Images from 0 to 255 -> the tokens that enter block 0, and their grid."""
    backbone = self.backbone
    images = backbone.config.normalize(images_BxHxWx3)
    sides = images.shape[1:3]
    return backbone.embed(images), tuple(-(-n // self.stride) for n in sides)

  def features(self, tokens_BxTxD, grid, start=0, *, key=None):
    """What the decoder sees, a list of [B, h, w, D] float32, the finest first.

    Args:
      tokens_BxTxD: that enter block `start`.
      grid: rows and columns of the patches.
      start: a block.
      key: of drop path, in training; None in evaluation.
    """
    backbone = self.backbone
    if not isinstance(backbone, ViT):
      return backbone.pyramid(tokens_BxTxD, grid, key=key)
    tokens = backbone.encode(tokens_BxTxD, start, key=key)
    with jax.named_scope('norm'):
      patches = tokens[:, backbone.config.num_prefix_tokens :]
      patches = backbone.norm(patches.astype(jnp.float32))
    return [patches.reshape(len(patches), *grid, -1)]


class LinearDecoder(nnx.Module):
  """A Linear on the coarsest features; zeros at first."""

  def __init__(self, width, num_classes):
    self.linear = nnx.Linear(
      width,
      num_classes,
      kernel_init=nnx.initializers.zeros,
      rngs=nnx.Rngs(0),
    )

  def __call__(self, features):
    with jax.named_scope('head'):
      return self.linear(features[-1])


class MLPDecoder(nnx.Module):
  """SegFormer's all-MLP decoder: features of all grids, brought to the finest.

    logits = classify(relu(norm(sum_i resize(fuse_i(project_i(norm_i(x_i)))))))

  It is theirs, which concatenates resized features and fuses them by one
  Linear: a Linear without bias may as well go before the resizing, on fewer
  cells. A LayerNorm stands for their BatchNorm, which would keep statistics
  beside the parameters. The norms of all features but the last are new, since
  Swin has one of the last alone, which is in its backbone.

  References:
    Xie et al., "SegFormer: Simple and Efficient Design for Semantic
    Segmentation with Transformers", 2021.
  """

  def __init__(self, widths, num_classes, *, eps, hidden=256, rngs: nnx.Rngs):
    """`hidden` is SegFormer's of its sizes B0 and B1."""
    self.norms = nnx.List([LayerNorm(width, eps=eps) for width in widths[:-1]])
    self.project = nnx.List(
      [linear(width, hidden, rngs=rngs) for width in widths]
    )
    self.fuse = nnx.List(
      [linear(hidden, hidden, use_bias=False, rngs=rngs) for _ in widths]
    )
    self.norm = LayerNorm(hidden, eps=eps)
    self.classify = linear(hidden, num_classes, rngs=rngs)

  def __call__(self, features):
    with jax.named_scope('head'):
      fused = 0
      for i, x in enumerate(features):
        if i < len(self.norms):
          x = self.norms[i](x)
        x = self.fuse[i](self.project[i](x))
        if i:
          # Each grid has cells of twice the side of the one before.
          scale = jnp.full((len(x), 2), 0.5**i)
          x = resize(x, features[0].shape[1:3], scale)
        fused = fused + x
      return self.classify(jax.nn.relu(self.norm(fused)))


def resize(x_BxhxwxC, size, scale_Bx2):
  """Bilinear interpolation, each image by a factor of its own.

  Centres are half-way; beyond the outermost ones the value stays.

  Args:
    x_BxhxwxC: values in the cells of a grid.
    size: rows and columns of the result.
    scale_Bx2: rows and columns of the grid for one of the result.

  Returns:
    [B, *size, C].
  """
  rows, columns = _weights(x_BxhxwxC.shape[1:3], size, scale_Bx2)
  return _apply('boh,bhwc->bowc', 'bow,bhwc->bhoc', rows, columns, x_BxhxwxC)


def gather(x_BxHxWxC, grid, scale_Bx2):
  """The transpose of `resize`: what each cell of a grid gives, given back."""
  rows, columns = _weights(grid, x_BxHxWxC.shape[1:3], scale_Bx2)
  return _apply('boh,bowc->bhwc', 'bow,bhoc->bhwc', rows, columns, x_BxHxWxC)


def _apply(over_rows, over_columns, rows, columns, x):
  # A TPU would round float32 to bfloat16.
  x = jnp.einsum(over_rows, rows, x, precision=lax.Precision.HIGHEST)
  return jnp.einsum(over_columns, columns, x, precision=lax.Precision.HIGHEST)


def _weights(grid, size, scale_Bx2):
  """Matrices [B, rows, h] and [B, columns, w] of the interpolation."""
  matrices = []
  for axis in range(2):
    centres = (jnp.arange(size[axis]) + 0.5) * scale_Bx2[:, axis, None] - 0.5
    centres = jnp.clip(centres, 0, grid[axis] - 1)
    apart = jnp.abs(centres[:, :, None] - jnp.arange(grid[axis]))
    matrices.append(jnp.maximum(1 - apart, 0))
  return matrices
