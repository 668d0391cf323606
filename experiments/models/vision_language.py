"""A vision tower, a projector and a decoder: answers to questions on images.

Letters in names: B examples, P patches of an image, T tokens of text, S = P +
T, D the decoder's width, V its vocabulary, K options, A tokens of an answer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


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
    vision: a `vit.ViT`; its class token is left out.
    projector: Linear, from its width to the decoder's.
    decoder: such as a `gemma.Gemma`.
    is_prefix_lm: whether image and prompt see all of one another, as PaliGemma
      was pretrained; else no token sees those behind it.
    head: Linear, an untied copy of the decoder's head, where that is trained.
  """

  def __init__(
    self, vision, decoder, *, is_prefix_lm, untied=False, rngs: nnx.Rngs
  ):
    self.is_prefix_lm = is_prefix_lm
    self.vision = vision
    self.decoder = decoder
    width = decoder.config.width
    self.projector = nnx.Linear(
      vision.config.width, width, dtype=decoder.config.dtype, rngs=rngs
    )
    if untied:
      self.head = nnx.Linear(
        width, decoder.config.vocab_size, use_bias=False, rngs=rngs
      )

  def see(self, images_BxHxWx3):
    """Images from 0 to 255 -> [B, P, F] float32, before the projector."""
    config = self.vision.config
    tokens = self.vision(config.normalize(images_BxHxWx3))
    return tokens[:, config.num_prefix_tokens :]

  def embed(self, prompts):
    """[B, S, D] of images and text, and the positions [B, S]."""
    image_BxPxD = self.projector(prompts.features)
    text_BxTxD = self.decoder.embed(prompts.ids)
    x = jnp.concatenate([image_BxPxD.astype(text_BxTxD.dtype), text_BxTxD], 1)
    positions = jnp.arange(x.shape[1])
    return x, jnp.broadcast_to(positions, x.shape[:2])

  def mask(self, prompts):
    """[B, S, S], what each token sees."""
    P, T = prompts.features.shape[1], prompts.ids.shape[1]
    place = jnp.arange(P + T)
    seen = place <= place[:, None]
    if self.is_prefix_lm:
      prefix = place < P + prompts.prefix[:, None]
      seen = seen | prefix[:, None]
    return seen & (place < P + prompts.length[:, None])[:, None]

  def logits(self, x):
    """[..., D] of the decoder's blocks -> [..., V] float32."""
    if hasattr(self, 'head'):
      with jax.named_scope('head'):
        return self.head(self.decoder.features(x))
    return self.decoder.logits(x)

  def answer_logits(self, prompts, length):
    """Logits of the tokens behind each prompt, [B, A, V].

    Args:
      prompts: the `Prompts`, with the answers behind them.
      length: A.
    """
    x, positions = self.embed(prompts)
    x = self.decoder.encode(x, positions, self.mask(prompts))
    before = prompts.features.shape[1] + prompts.prefix[:, None] - 1
    places = jnp.minimum(before + jnp.arange(length), x.shape[1] - 1)
    return self.logits(jnp.take_along_axis(x, places[..., None], 1))

  def prefill(self, prompts, more):
    """Logits of the first token behind each prompt [B, V], and the cache."""
    asked = prompts._replace(length=prompts.prefix)
    x, positions = self.embed(asked)
    x, cache = self.decoder.prefill(x, positions, self.mask(asked), more)
    last = prompts.features.shape[1] + prompts.prefix - 1
    x = jnp.take_along_axis(x, last[:, None, None], 1)[:, 0]
    return self.logits(x), cache


def greedy(model, prompts, length, end):
  """The most probable token, again and again.

  Args:
    model: a `VisionLanguage`.
    prompts: the `Prompts`; what follows them is not looked at.
    length: A, of the answers.
    end: id of the token that ends an answer; it fills up what is behind it.

  Returns:
    int32 [B, A].
  """
  S = prompts.features.shape[1] + prompts.ids.shape[1]
  first = prompts.features.shape[1] + prompts.prefix  # position of token 0
  logits, cache = model.prefill(prompts, length)
  place = jnp.arange(S + length)

  def step(carry, i):
    token_B, is_done_B, cache = carry
    x = model.decoder.embed(token_B[:, None])
    # The prompt, and what was said so far.
    seen = (place < first[:, None]) | ((place >= S) & (place <= S + i))
    x, cache = model.decoder.extend(
      x, (first + i)[:, None], seen[:, None], cache, S + i
    )
    token_B, is_done_B = choose(model.logits(x[:, 0]), is_done_B)
    return (token_B, is_done_B, cache), token_B

  def choose(logits, is_done_B):
    token_B = jnp.where(is_done_B, end, logits.argmax(-1)).astype(jnp.int32)
    return token_B, is_done_B | (token_B == end)

  token_B, is_done_B = choose(logits, jnp.zeros(len(first), bool))
  _, tokens = lax.scan(
    step, (token_B, is_done_B, cache), jnp.arange(length - 1)
  )
  return jnp.concatenate([token_B[:, None], tokens.T], 1)


def option_scores(model, prompts, options_KxA, weights_KxA):
  """Log-probability of every option as the whole answer, [B, K] float32.

  Args:
    model: a `VisionLanguage`.
    prompts: the `Prompts`; what follows them is not looked at.
    options_KxA: int, ids of the options.
    weights_KxA: 1 for a token, 0 for padding behind it.
  """
  K, A = options_KxA.shape
  B = len(prompts.ids)
  S = prompts.features.shape[1] + prompts.ids.shape[1]
  first = prompts.features.shape[1] + prompts.prefix
  logits_BxV, cache = model.prefill(prompts, K * A)
  x_BxNxD = jnp.broadcast_to(
    model.decoder.embed(options_KxA.reshape(-1)),
    (B, K * A, model.decoder.config.width),
  )
  option, token = jnp.divmod(jnp.arange(K * A), A)
  # An option sees the prompt and itself.
  own = (option == option[:, None]) & (token <= token[:, None])
  prompt = jnp.arange(S) < first[:, None]
  mask = jnp.concatenate(
    [
      jnp.broadcast_to(prompt[:, None], (B, K * A, S)),
      jnp.broadcast_to(own, (B, K * A, K * A)),
    ],
    -1,
  )
  x_BxNxD, _ = model.decoder.extend(
    x_BxNxD, first[:, None] + token, mask, cache, S
  )
  rows_BxKxAxD = x_BxNxD.reshape(B, K, A, -1)
  behind = jax.nn.log_softmax(model.logits(rows_BxKxAxD[:, :, :-1]))
  start = jax.nn.log_softmax(logits_BxV)[:, options_KxA[:, 0]]
  picked = jnp.take_along_axis(behind, options_KxA[None, :, 1:, None], -1)
  return start + (picked[..., 0] * weights_KxA[:, 1:]).sum(-1)
