"""A Vision Transformer in Flax NNX, for the pretrained ones of `CONFIGS`.

CLIP's, ViT and DeiT, AugReg, DINOv2, SigLIP: their differences are options of
`ViTConfig`.

Letters in names: B images, H x W pixels, P prefix tokens (a class token is
token 0), T = P + H W / patch_size^2 tokens, N = B T rows, D the width.
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
from experiments.models.transformer import ACTIVATIONS, Block, LayerNorm, linear

IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
_HALF = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """Sizes and constants of one pretrained ViT, and how to run it.

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
    activation: of the MLPs, a key of `transformer.ACTIVATIONS`.
    patch_bias: whether the patch embedding has a bias.
    pre_norm: CLIP's LayerNorm before block 0.
    layer_scale: DINOv2's learnt factor per feature on each residual branch.
    class_token: whether there is one; SigLIP has none, and no `features`.
    distilled: DeiT's distillation token, behind the class token.
    projection: features of CLIP's projection of the class token, or None.
    dtype: that activations are computed in. Parameters, LayerNorm, softmax and
      the features are float32.
    drop_path: stochastic depth, the rate in the last block, in [0, 1); it
      rises linearly from 0 in block 0.
    remat: recompute a block's activations in the backward pass, for memory.
    scan: stack the blocks' parameters on a leading axis, [depth, ...], and
      run them by `lax.scan`: one block to compile. See `blocks`.

  Raises:
    ValueError: `width` is not a multiple of `num_heads`, the activation is not
      known, or `drop_path` is not in [0, 1).
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
  activation: Literal['gelu', 'quick_gelu', 'gelu_tanh'] = 'gelu'
  patch_bias: bool = True
  pre_norm: bool = False
  layer_scale: bool = False
  class_token: bool = True
  distilled: bool = False
  projection: int | None = None
  dtype: jax.typing.DTypeLike = 'float32'
  drop_path: float = 0.0
  remat: bool = False
  scan: bool = False

  def __post_init__(self):
    if self.width % self.num_heads:
      raise ValueError(
        f'ViTConfig: width {self.width} cannot be shared out among '
        f'{self.num_heads} heads; make it a multiple.'
      )
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f'ViTConfig: activation {self.activation!r} is not known; choose from '
        f'{", ".join(ACTIVATIONS)}.'
      )
    transformer.check_drop_path(self.drop_path)

  @property
  def features(self):
    """Length of the feature vector of an image."""
    return self.width if self.projection is None else self.projection

  @property
  def image_size(self):
    """Side of the images that `pos_embed` was trained on, in pixels."""
    return self.grid * self.patch_size

  @property
  def num_prefix_tokens(self):
    """P: the class token and the distillation token, where there are any."""
    return self.class_token + self.distilled

  def normalize(self, images):
    """(images / 255 - mean) / std, as the model saw its images.

    Args:
      images: [..., 3] colour or [..., 1] grey, 0 to 255, integers or floats.

    Returns:
      [..., 3] float32.
    """
    return normalize(images, self.mean, self.std)


_VIT_B16 = ViTConfig(
  patch_size=16,
  width=768,
  depth=12,
  num_heads=12,
  mlp_dim=3072,
  grid=14,
  eps=1e-12,
  **_HALF,
)
_DEIT_B16 = dataclasses.replace(_VIT_B16, **IMAGENET)
_CLIP_B16 = dataclasses.replace(
  _VIT_B16,
  eps=1e-5,
  mean=(0.48145466, 0.4578275, 0.40821073),
  std=(0.26862954, 0.26130258, 0.27577711),
  activation='quick_gelu',
  patch_bias=False,
  pre_norm=True,
  projection=512,
)

_CLIP_B32 = dataclasses.replace(_CLIP_B16, patch_size=32, grid=7)
_CLIP_L14 = dataclasses.replace(
  _CLIP_B16,
  patch_size=14,
  width=1024,
  depth=24,
  num_heads=16,
  mlp_dim=4096,
  grid=16,
  projection=768,
)

CONFIGS = {
  'clip_b32': _CLIP_B32,
  'clip_b16': _CLIP_B16,
  'clip_l14': _CLIP_L14,
  'clip_l14_336': dataclasses.replace(_CLIP_L14, grid=24),
  # LAION's, trained on LAION-2B with the exact GELU; L on pixels in [-1, 1].
  'clip_b32_laion': dataclasses.replace(_CLIP_B32, activation='gelu'),
  'clip_b16_laion': dataclasses.replace(_CLIP_B16, activation='gelu'),
  'clip_l14_laion': dataclasses.replace(_CLIP_L14, activation='gelu', **_HALF),
  'vit_b16': _VIT_B16,
  'deit_b16': _DEIT_B16,
  'deit_b16_distilled': dataclasses.replace(_DEIT_B16, distilled=True),
  'augreg_b16': dataclasses.replace(_VIT_B16, eps=1e-6),
  'dinov2_s14': ViTConfig(
    patch_size=14,
    width=384,
    depth=12,
    num_heads=6,
    mlp_dim=1536,
    grid=37,
    eps=1e-6,
    layer_scale=True,
    **IMAGENET,
  ),
}


class ViT(nnx.Module):
  """A pre-norm ViT. Separate q, k, v: SPD's unit is the parameter tensor.

  It holds no random state. Methods with a `key` drop residual branches at
  random where one is given, `ViTConfig.drop_path`, and evaluate without. The
  same key drops the same, whatever the block that a call starts at.
  """

  def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
    init = nnx.initializers.truncated_normal(0.02)
    D, dtype = config.width, config.dtype
    self.config = config
    self.patch_embed = linear(
      config.patch_size**2 * 3,
      D,
      use_bias=config.patch_bias,
      dtype=dtype,
      rngs=rngs,
    )
    if config.class_token:
      self.cls_token = nnx.Param(init(rngs.params(), (D,)))
    if config.distilled:
      self.dist_token = nnx.Param(init(rngs.params(), (D,)))
    positions = config.num_prefix_tokens + config.grid**2
    self.pos_embed = nnx.Param(init(rngs.params(), (positions, D)))
    if config.pre_norm:
      self.pre_norm = LayerNorm(D, eps=config.eps)
    blocks = [
      Block(
        D,
        config.num_heads,
        config.mlp_dim,
        eps=config.eps,
        activation=config.activation,
        layer_scale=config.layer_scale,
        dtype=dtype,
        rngs=rngs,
      )
      for _ in range(config.depth)
    ]
    if config.scan:
      self.blocks = jax.tree.map(lambda *params: jnp.stack(params), *blocks)
    else:
      self.blocks = nnx.List(blocks)
    self.norm = LayerNorm(D, eps=config.eps)
    if config.projection is not None:
      self.projection = linear(D, config.projection, use_bias=False, rngs=rngs)

  def __call__(self, images_BxHxWx3):
    """Normalised images -> [B, T, D] float32, after the final LayerNorm."""
    tokens = self.encode(self.embed(images_BxHxWx3))
    return self.norm(tokens.astype(jnp.float32))

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
    P = self.config.num_prefix_tokens
    positions = resize_positions(self.pos_embed[P:], rows, columns)
    tokens = self.patch_embed(patches) + positions
    prefix = [self.cls_token[...]] if self.config.class_token else []
    if self.config.distilled:
      prefix.append(self.dist_token[...])
    if prefix:
      prefix = jnp.stack(prefix) + self.pos_embed[:P]
      prefix = jnp.broadcast_to(prefix, (B, *prefix.shape))
      tokens = jnp.concatenate([prefix, tokens], axis=1)
    if self.config.pre_norm:
      tokens = self.pre_norm(tokens)
    return tokens.astype(self.config.dtype)

  def encode(self, tokens_BxTxD, start=0, stop=None, *, key=None):
    """Runs `blocks[start:stop]`; `norm` is still to come.

    What enters block k can be stored once, `encode(tokens, stop=k)`, and the
    upper blocks run alone on it, `encode(stored, start=k)`.

    Raises:
      ValueError: a part of the blocks is asked for, and they are stacked.
    """
    blocks = range(self.config.depth)[start:stop]
    self._check_whole(blocks)
    keep = self._keep(key, tokens_BxTxD.shape[0])
    return self._encode(tokens_BxTxD, blocks, keep)

  def class_token(self, tokens_BxTxD, start=0, *, key=None):
    """Tokens that enter block `start` -> the final class token, [B, D].

    It is `norm(encode(tokens, start))[:, 0]`, without what the last block makes
    of the other tokens: five sixths of its work.

    Raises:
      ValueError: as `encode`.
    """
    B, T, D = tokens_BxTxD.shape
    blocks = range(self.config.depth)[start:]
    self._check_whole(blocks)
    keep = self._keep(key, B)
    last = self.config.depth - 1
    x_BxTxD = self._encode(tokens_BxTxD, blocks[:-1], keep)
    block = _at(self.blocks, last) if self.config.scan else self.blocks[last]
    # Not rematerialised: its backward pass comes next, and needs it at once.
    with jax.named_scope(f'blocks.{last}'):
      x_BxD = block(x_BxTxD.reshape(B * T, D), B, _at(keep, last), True)
    with jax.named_scope('norm'):
      return self.norm(x_BxD.astype(jnp.float32))

  def features(self, tokens_BxTxD, start=0, *, key=None):
    """The class token, projected where the model does: [B, features] float32.

    Raises:
      ValueError: as `encode`.
    """
    token = self.class_token(tokens_BxTxD, start, key=key)
    return token if self.config.projection is None else self.projection(token)

  def _encode(self, tokens_BxTxD, blocks, keep_Lx2xB):
    B, T, D = tokens_BxTxD.shape

    def step(x_NxD, block_and_keep):
      block, keep = block_and_keep
      return block(x_NxD, B, keep), None

    if self.config.remat:
      # A scan keeps the two computations apart by itself.
      step = jax.checkpoint(step, prevent_cse=not self.config.scan)
    # Rows: on CPU the backward pass of a Linear is faster over one leading axis
    # than over [B, T].
    x_NxD = tokens_BxTxD.reshape(B * T, D).astype(self.config.dtype)
    if self.config.scan:
      stacked = (self.blocks, keep_Lx2xB)
      with jax.named_scope('blocks'):
        x_NxD, _ = lax.scan(step, x_NxD, _at(stacked, slice(len(blocks))))
    else:
      for i in blocks:
        with jax.named_scope(f'blocks.{i}'):
          x_NxD, _ = step(x_NxD, (self.blocks[i], _at(keep_Lx2xB, i)))
    return x_NxD.reshape(B, T, D)

  def _keep(self, key, batch_size):
    config = self.config
    return transformer.keep_paths(
      key, config.drop_path, config.depth, batch_size
    )

  def _check_whole(self, blocks):
    if self.config.scan and len(blocks) != self.config.depth:
      raise ValueError(
        f'ViT: {len(blocks)} of the {self.config.depth} blocks were asked for, '
        'but stacked blocks run as a whole; set scan=False.'
      )


def normalize(images, mean, std):
  """(images / 255 - mean) / std; see `ViTConfig.normalize`."""
  mean, std = (np.asarray(c, np.float32) for c in (mean, std))
  return (jnp.asarray(images, jnp.float32) / 255 - mean) / std


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


def _at(tree, index):
  """Every leaf, indexed."""
  return jax.tree.map(lambda leaf: leaf[index], tree)
