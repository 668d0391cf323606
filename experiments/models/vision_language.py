"""A vision tower, a projector and a decoder: answers to questions on images.

PaliGemma is SigLIP So400m and Gemma.

Letters in names: B examples, P patches of an image, T tokens of text, S = P +
T, D the decoder's width, V its vocabulary, K options, A tokens of an answer.

References:
  Beyer et al., "PaliGemma: A versatile 3B VLM for transfer", 2024
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models import generate, llama, vit


@dataclasses.dataclass(frozen=True)
class VisionLanguageConfig:
  """The two towers.

  Attributes:
    vision: its class token is left out.
    decoder: of images and text.
    is_prefix_lm: whether image and prompt see all of one another, as PaliGemma
      was pretrained; else no token sees those behind it.
  """

  vision: vit.ViTConfig
  decoder: llama.LlamaConfig
  is_prefix_lm: bool


CONFIGS = {
  # 224 pixels, 256 image tokens; as big_vision and config.json have it.
  'paligemma_3b': VisionLanguageConfig(
    vit.ViTConfig(
      patch_size=14,
      width=1152,
      depth=27,
      num_heads=16,
      mlp_dim=4304,
      grid=16,
      eps=1e-6,
      mean=(0.5, 0.5, 0.5),
      std=(0.5, 0.5, 0.5),
      activation='gelu_tanh',
      class_token=False,
    ),
    llama.LlamaConfig(
      vocab_size=257_216,
      width=2048,
      depth=18,
      num_heads=8,
      num_kv_heads=1,
      head_dim=256,
      mlp_dim=16_384,
      eps=1e-6,
      rope_theta=10_000.0,
      context_length=8192,
      tied=True,
      activation='gelu_tanh',
      unit_offset=True,
      scaled_embeddings=True,
    ),
    is_prefix_lm=True,
  ),
  # Its first blocks; the projector between the two is new.
  'dinov2_smollm2': VisionLanguageConfig(
    vit.CONFIGS['dinov2_s14'],
    dataclasses.replace(llama.CONFIGS['smollm2_135m'], depth=8),
    is_prefix_lm=False,
  ),
}


class Prompts(NamedTuple):
  """What is asked.

  Attributes:
    features: [B, P, F] of the images, as `VisionLanguage.see` returns them.
    ids: [B, T] int, the tokens of the prompts, and what follows them.
    prefix: [B] int, how many of the tokens are the prompt.
    length: [B] int, how many there are; the others are padding.
  """

  features: jax.Array
  ids: jax.Array
  prefix: jax.Array
  length: jax.Array


class VisionLanguage(nnx.Module):
  """Image tokens, then text.

  Attributes:
    vision: a `vit.ViT`.
    projector: Linear, from its width to the decoder's.
    decoder: a `llama.Llama`.
    head: Linear, an untied copy of the decoder's head, where that is trained.
  """

  def __init__(self, config, *, untied=False, rngs: nnx.Rngs):
    self.config = config
    self.vision = vit.ViT(config.vision, rngs=rngs)
    self.decoder = llama.Llama(config.decoder, rngs=rngs)
    width = config.decoder.width
    self.projector = nnx.Linear(
      config.vision.width, width, dtype=config.decoder.dtype, rngs=rngs
    )
    if untied:
      self.head = nnx.Linear(
        width, config.decoder.vocab_size, use_bias=False, rngs=rngs
      )

  def see(self, images_BxHxWx3):
    """Images from 0 to 255 -> [B, P, F] float32, before the projector."""
    config = self.vision.config
    tokens = self.vision(config.normalize(images_BxHxWx3))
    return tokens[:, config.num_prefix_tokens :]

  def embed(self, ids):
    """Ids of text [...] -> [..., D]."""
    return self.decoder.embed(ids)

  def extend(self, x_BxTxD, positions_BxT, mask, cache, slot):
    """As `llama.Llama.extend`."""
    return self.decoder.extend(x_BxTxD, positions_BxT, mask, cache, slot)

  def logits(self, x):
    """What leaves the decoder's blocks, [..., D] -> float32 [..., V]."""
    if not hasattr(self, 'head'):
      return self.decoder.logits(x)
    with jax.named_scope('head'):
      return self.head(self.decoder.norm(x).astype(jnp.float32))

  def answer_logits(self, prompts, length):
    """Logits of the tokens behind each prompt, [B, A, V].

    Args:
      prompts: the `Prompts`, with the answers behind them.
      length: A.
    """
    x_BxSxD, positions = self._join(prompts)
    x_BxSxD = self.decoder.encode(x_BxSxD, positions, self._mask(prompts))
    before = prompts.features.shape[1] + prompts.prefix[:, None] - 1
    places = jnp.minimum(before + jnp.arange(length), x_BxSxD.shape[1] - 1)
    return self.logits(jnp.take_along_axis(x_BxSxD, places[..., None], 1))

  def read(self, prompts, more):
    """The `generate.Prompt` of the prompts; what follows them is not seen.

    Args:
      prompts: the `Prompts`.
      more: room for tokens to come, behind all S.
    """
    prompts = prompts._replace(length=prompts.prefix)
    x_BxSxD, positions = self._join(prompts)
    x_BxSxD, cache = self.decoder.prefill(
      x_BxSxD, positions, self._mask(prompts), more
    )
    first = prompts.features.shape[1] + prompts.prefix
    last = jnp.take_along_axis(x_BxSxD, first[:, None, None] - 1, 1)[:, 0]
    slots = jnp.arange(positions.shape[1] + more)
    seen = slots < first[:, None]
    return generate.Prompt(self.logits(last), cache, seen, first)

  def _join(self, prompts):
    """[B, S, D] of images and text, and the positions [B, S]."""
    image_BxPxD = self.projector(prompts.features)
    text_BxTxD = self.embed(prompts.ids)
    x_BxSxD = jnp.concatenate(
      [image_BxPxD.astype(text_BxTxD.dtype), text_BxTxD], 1
    )
    positions = jnp.arange(x_BxSxD.shape[1])
    return x_BxSxD, jnp.broadcast_to(positions, x_BxSxD.shape[:2])

  def _mask(self, prompts):
    """[B, 1, S, S], what each token sees."""
    P, T = prompts.features.shape[1], prompts.ids.shape[1]
    place = jnp.arange(P + T)
    seen = place <= place[:, None]
    if self.config.is_prefix_lm:
      prefix = place < P + prompts.prefix[:, None]
      seen = seen | prefix[:, None]
    is_text = place < P + prompts.length[:, None]
    return (seen & is_text[:, None])[:, None]


def greedy(model, prompts, length, end):
  """The most probable token, again and again.

  Args:
    model: a `VisionLanguage`.
    prompts: the `Prompts`.
    length: A, of the answers.
    end: id of the token that ends an answer; it fills up what is behind it.

  Returns:
    int32 [B, A].
  """
  prompt = model.read(prompts, length - 1)
  return generate.greedy_from(model, prompt, length, end)


def option_scores(model, prompts, options_KxA, weights_KxA):
  """Log-probability of every option as the whole answer, [B, K] float32.

  Args:
    model: a `VisionLanguage`.
    prompts: the `Prompts`; what follows them is not looked at.
    options_KxA: int, ids of the options.
    weights_KxA: 1 for a token, 0 for padding behind it.
  """
  (B, T), (K, A) = prompts.ids.shape, options_KxA.shape
  prompt = model.read(prompts, K * A)
  option, token = jnp.divmod(jnp.arange(K * A), A)
  # An option sees the prompt and itself.
  own = (option == option[:, None]) & (token <= token[:, None])
  S = prompts.features.shape[1] + T
  own = jnp.pad(own, [(0, 0), (S, 0)])
  x_BxNxD = model.embed(options_KxA.reshape(-1))
  x_BxNxD = jnp.broadcast_to(x_BxNxD, (B, *x_BxNxD.shape))
  x_BxNxD, _ = model.extend(
    x_BxNxD,
    prompt.positions[:, None] + token,
    (prompt.seen[:, None] | own)[:, None],
    prompt.cache,
    S,
  )
  x_BxKxAxD = x_BxNxD.reshape(B, K, A, -1)
  behind = jax.nn.log_softmax(model.logits(x_BxKxAxD[:, :, :-1]))
  start = jax.nn.log_softmax(prompt.logits)[:, options_KxA[:, 0]]
  picked = jnp.take_along_axis(behind, options_KxA[None, :, 1:, None], -1)
  return start + (picked[..., 0] * weights_KxA[:, 1:]).sum(-1)
