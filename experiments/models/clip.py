"""CLIP's text tower, and the zero-shot head that it makes.

Letters in names: B texts, T tokens of a text, N = B T rows, D the width.

References:
  Radford et al., "Learning Transferable Visual Models From Natural Language
  Supervision", 2021
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import files
from experiments.models.transformer import Block, LayerNorm

START = '<|startoftext|>'
END = '<|endoftext|>'  # the token of the highest id; the one to pad with, too


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """Sizes and constants of one pretrained text tower.

  Attributes:
    width: D, features of a token; a multiple of `num_heads`.
    depth: number of blocks.
    num_heads: attention heads of a block.
    mlp_dim: hidden features of a block's MLP.
    projection: features of a text, as many as of an image.
    eps: added to the variance in every LayerNorm.
    activation: of the MLPs, a key of `transformer.ACTIVATIONS`.
    vocab_size: number of tokens; the last one ends a text.
    context_length: T, to which every text is padded or cut.
  """

  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  projection: int
  eps: float = 1e-5
  activation: str = 'quick_gelu'
  vocab_size: int = 49408
  context_length: int = 77


_BASE = TextConfig(
  width=512, depth=12, num_heads=8, mlp_dim=2048, projection=512
)
_LARGE = TextConfig(
  width=768, depth=12, num_heads=12, mlp_dim=3072, projection=768
)
CONFIGS = {
  'clip_b32': _BASE,
  'clip_b16': _BASE,
  'clip_l14': _LARGE,
  'clip_l14_336': _LARGE,
  'clip_b32_laion': dataclasses.replace(_BASE, activation='gelu'),
  'clip_b16_laion': dataclasses.replace(_BASE, activation='gelu'),
  'clip_l14_laion': dataclasses.replace(_LARGE, activation='gelu'),
}


class TextTower(nnx.Module):
  """A causal transformer; a text's features are those of its end token."""

  def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
    init = nnx.initializers.truncated_normal(0.02)
    D = config.width
    self.config = config
    self.token_embed = nnx.Param(init(rngs.params(), (config.vocab_size, D)))
    self.pos_embed = nnx.Param(init(rngs.params(), (config.context_length, D)))
    self.blocks = nnx.List(
      Block(
        D,
        config.num_heads,
        config.mlp_dim,
        eps=config.eps,
        activation=config.activation,
        causal=True,
        rngs=rngs,
      )
      for _ in range(config.depth)
    )
    self.norm = LayerNorm(D, eps=config.eps)
    self.projection = nnx.Linear(
      D, config.projection, use_bias=False, rngs=rngs
    )

  def __call__(self, ids_BxT):
    """Token ids -> [B, projection], not normalised.

    What follows the first token of the highest id is padding, and not seen.
    """
    B, T = ids_BxT.shape
    x_BxTxD = self.token_embed[...][ids_BxT] + self.pos_embed[...]
    x_NxD = x_BxTxD.reshape(B * T, -1)
    for block in self.blocks:
      x_NxD = block(x_NxD, B)
    end = jnp.arange(B) * T + ids_BxT.argmax(1)
    return self.projection(self.norm(x_NxD[end]))


def zero_shot_head(text, tokenizer, class_names, prompts, scale):
  """The kernel of a linear head that classifies without any training.

  A class's column is the mean direction of its prompts: each is encoded and
  scaled to length 1, their mean is scaled to length 1, and that times `scale`.
  Multiply it by image features of length 1; there is no bias.

  Args:
    text: a `TextTower`.
    tokenizer: that pads and cuts to its context length.
    class_names: C strings, in the order of the labels.
    prompts: strings in which `{}` stands for the class, as `read_prompts`.
    scale: exp(logit_scale) of the checkpoint.

  Returns:
    [features, C] float32.
  """

  @nnx.jit
  def column(text, ids_PxT):
    return scale * _unit(_unit(text(ids_PxT)).mean(0))

  def ids(name):
    texts = [prompt.replace('{}', name) for prompt in prompts]
    return np.array([e.ids for e in tokenizer.encode_batch(texts)])

  return jnp.stack([column(text, ids(name)) for name in class_names], axis=1)


def read_prompts(path):
  """Prompts out of a text file, one a line, with `{}` for the class.

  `experiments/prompts/photo.txt` has a few. For CLIP's published accuracy take
  OpenAI's 80, and for ImageNet OpenAI's class names too (not WordNet's), which
  the package open-clip-torch ships:

    pip download --no-deps open-clip-torch==3.3.0
    unzip -j open_clip_torch-3.3.0-*.whl open_clip/zero_shot_metadata.py
    python -c "from zero_shot_metadata import *; print(*[
      t('{}') for t in OPENAI_IMAGENET_TEMPLATES], sep='\\n')" > openai.txt
    python -c "from zero_shot_metadata import *; print(
      *IMAGENET_CLASSNAMES, sep='\\n')" > imagenet.txt

  Returns:
    A list of strings.

  Raises:
    OSError, ValueError: as `files.read_lines` does, or a line repeats another
      or has not one `{}`. It names the line.
  """
  lines = files.read_lines(files.expand(path))
  for number, line in enumerate(lines, 1):
    if line.count('{}') != 1:
      raise ValueError(
        f'{path}:{number}: {line!r} needs one {{}}, where the class goes.'
      )
    if (first := lines.index(line) + 1) < number:
      raise ValueError(
        f'{path}:{number}: {line!r} repeats line {first}; drop one.'
      )
  return lines


def read_class_names(path):
  """Names of classes out of a text file, one a line, in the labels' order.

  Two classes may share a name: OpenAI's 1,000 for ImageNet do so twice.

  Returns:
    A list of strings.

  Raises:
    OSError, ValueError: as `files.read_lines` does.
  """
  return files.read_lines(files.expand(path))


def _unit(x):
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
