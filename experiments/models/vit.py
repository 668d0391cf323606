"""A Vision Transformer in Flax NNX, for the pretrained ones of `CONFIGS`.

CLIP's, ViT and DeiT, AugReg, DINOv2: their differences are options of
`ViTConfig`.

Letters in names: B images, H x W pixels, P prefix tokens (the class token is
token 0), T = P + H W / patch_size^2 tokens, N = B T rows, D the width.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

_IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
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
    activation: of the MLPs, a key of `ACTIVATIONS`.
    patch_bias: whether the patch embedding has a bias.
    pre_norm: CLIP's LayerNorm before block 0.
    layer_scale: DINOv2's learnt factor per feature on each residual branch.
    distilled: DeiT's distillation token, behind the class token.
    projection: features of CLIP's projection of the class token, or None.
    dtype: that activations are computed in. Parameters, LayerNorm, softmax and
      the features are float32.
    drop_path: stochastic depth, the rate in the last block, in [0, 1); it
      rises linearly from 0 in block 0.
    remat: recompute a block's activations in the backward pass, for memory.
    scan: stack the blocks' parameters on a leading axis, [depth, ...], and
      run them by `lax.scan`: one block to compile. See `layer_axes`.

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
  activation: Literal['gelu', 'quick_gelu'] = 'gelu'
  patch_bias: bool = True
  pre_norm: bool = False
  layer_scale: bool = False
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
    if not 0 <= self.drop_path < 1:
      raise ValueError(
        f'ViTConfig: drop_path is {self.drop_path}; a rate is in [0, 1).'
      )

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
    """P: the class token and, where there is one, the distillation token."""
    return 2 if self.distilled else 1

  def normalize(self, images):
    """(images / 255 - mean) / std, as the model saw its images.

    Args:
      images: [..., 3] colour or [..., 1] grey, 0 to 255, integers or floats.

    Returns:
      [..., 3] float32.
    """
    mean, std = (np.asarray(c, np.float32) for c in (self.mean, self.std))
    return (jnp.asarray(images, jnp.float32) / 255 - mean) / std


def gelu(x):
  """x Phi(x) with the exact erf, as ViT, DeiT and DINOv2 were trained.

  `jax.nn.gelu(approximate=False)` calls erfc, which costs twice an erf on CPU.
  """
  return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


def quick_gelu(x):
  """x sigmoid(1.702 x), as OpenAI's CLIP was trained."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {'gelu': gelu, 'quick_gelu': quick_gelu}

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
_DEIT_B16 = dataclasses.replace(_VIT_B16, **_IMAGENET)
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
    **_IMAGENET,
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
    self.patch_embed = _linear(
      config.patch_size**2 * 3,
      D,
      use_bias=config.patch_bias,
      dtype=dtype,
      rngs=rngs,
    )
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
      self.projection = _linear(D, config.projection, use_bias=False, rngs=rngs)

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
    patches = self.patch_embed(patches) + positions
    prefix = [self.cls_token[...]]
    if self.config.distilled:
      prefix.append(self.dist_token[...])
    prefix = jnp.stack(prefix) + self.pos_embed[:P]
    prefix = jnp.broadcast_to(prefix, (B, *prefix.shape))
    tokens = jnp.concatenate([prefix, patches], axis=1)
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
    """What stochastic depth multiplies the two branches of each block by.

    Returns:
      [depth, 2, B], 0 or 1 / (1 - rate); None where nothing is dropped.
    """
    depth, drop_path = self.config.depth, self.config.drop_path
    if key is None or not drop_path:
      return None
    rates = np.linspace(0, drop_path, depth, dtype=np.float32)
    keep = 1 - rates[:, None, None]
    return jax.random.bernoulli(key, keep, (depth, 2, batch_size)) / keep

  def _check_whole(self, blocks):
    if self.config.scan and len(blocks) != self.config.depth:
      raise ValueError(
        f'ViT: {len(blocks)} of the {self.config.depth} blocks were asked for, '
        'but stacked blocks run as a whole; set scan=False.'
      )


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

    `keep_2xB` multiplies each image's two residual branches.
    """
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
    x_NxD = x_NxD + _weigh(y_NxD, _at(keep_2xB, 0))
    with jax.named_scope('norm2'):
      y_NxD = self.norm2(x_NxD)
    with jax.named_scope('mlp'):
      y_NxD = self.mlp(y_NxD)
    if self.layer_scale:
      y_NxD = y_NxD * self.scale2.astype(y_NxD.dtype)
    return x_NxD + _weigh(y_NxD, _at(keep_2xB, 1))


class Attention(nnx.Module):
  """softmax(q k^T / sqrt(K)) v in every sequence and head, K = D / num_heads.

  Causal: no token sees those behind it.
  """

  def __init__(self, width, num_heads, *, causal=False, dtype, rngs: nnx.Rngs):
    self.num_heads = num_heads
    self.causal = causal
    self.query = _linear(width, width, dtype=dtype, rngs=rngs)
    self.key = _linear(width, width, dtype=dtype, rngs=rngs)
    self.value = _linear(width, width, dtype=dtype, rngs=rngs)
    self.out = _linear(width, width, dtype=dtype, rngs=rngs)

  def __call__(self, queries_MxD, keys_NxD, batch_size):
    """Rows that ask, and rows that are asked, image by image -> [M, D]."""
    D = queries_MxD.shape[1]
    K = D // self.num_heads
    heads = (batch_size, -1, self.num_heads, K)
    q = self.query(queries_MxD).reshape(heads)
    k = self.key(keys_NxD).reshape(heads)
    v = self.value(keys_NxD).reshape(heads)
    logits = jnp.einsum(
      'bthk,bshk->bhts',
      q / math.sqrt(K),
      k,
      preferred_element_type=jnp.float32,
    )
    if self.causal:
      seen = np.tri(*logits.shape[-2:], dtype=bool)
      logits = jnp.where(seen, logits, -jnp.inf)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    mixed = jnp.einsum('bhts,bshk->bthk', weights, v)
    return self.out(mixed.reshape(-1, D))


class MLP(nnx.Module):
  """fc2(activation(fc1(x)))."""

  def __init__(self, width, hidden, *, activation, dtype, rngs: nnx.Rngs):
    self.activation = activation
    self.fc1 = _linear(width, hidden, dtype=dtype, rngs=rngs)
    self.fc2 = _linear(hidden, width, dtype=dtype, rngs=rngs)

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


def layer_axes(params):
  """How many leading axes of each parameter enumerate blocks, for SPD.

  With `ViTConfig.scan` a tensor under `blocks` holds all blocks' parameters:
  pass this function as the `layer_axes` of `spd`, `with_spd` or `adam_spd`, and
  each block decays on its own, as it does unstacked.

  Args:
    params: of a `ViT`, or of a model that has one; any pytree whose paths name
      the parameters.

  Returns:
    The same tree of ints: 1 for stacked blocks, else 0.
  """

  def axes(path, _):
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if 'blocks' not in names:
      return 0
    return int(not names[names.index('blocks') + 1].isdigit())

  return jax.tree_util.tree_map_with_path(axes, params)


def stack_blocks(params):
  """The params of an unrolled ViT -> those of `ViTConfig.scan`.

  Args:
    params: nested dicts of arrays, with `params['blocks'][i]` for block i.

  Returns:
    The same, with NumPy arrays [depth, ...] in `params['blocks']`.
  """
  blocks = params['blocks']
  blocks = [blocks[i] for i in range(len(blocks))]
  return {**params, 'blocks': jax.tree.map(lambda *b: np.stack(b), *blocks)}


def _at(tree, index):
  """Every leaf, indexed."""
  return jax.tree.map(lambda leaf: leaf[index], tree)


def _weigh(x_NxD, weights_B):
  """Rows of each image, multiplied by its weight; None is 1."""
  if weights_B is None:
    return x_NxD
  x_BxTxD = x_NxD.reshape(weights_B.size, -1, x_NxD.shape[-1])
  weights = weights_B[:, None, None].astype(x_NxD.dtype)
  return (x_BxTxD * weights).reshape(x_NxD.shape)


def _linear(
  features_in, features_out, *, use_bias=True, dtype=jnp.float32, rngs
):
  return nnx.Linear(
    features_in,
    features_out,
    use_bias=use_bias,
    dtype=dtype,
    kernel_init=nnx.initializers.truncated_normal(0.02),
    rngs=rngs,
  )
