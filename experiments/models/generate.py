"""Text out of a decoder: greedy decoding and beam search, with its KV cache.

Letters in names: B sequences, T tokens of a prompt, M new ones, S = T + M slots
of the cache, J beams, V the vocabulary. All functions are traced: one program
serves all prompts of a shape.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_NEVER = -1e9  # the score of what is not to be chosen


class Prompt(NamedTuple):
  """What a decoder has read, and goes on from.

  Attributes:
    logits: [B, V] of the first new token.
    cache: of `llama.Llama.prefill`, with room for M - 1 more.
    seen: bool [B, S], the slots of the prompt that new tokens see.
    positions: int [B], of the first new token.
  """

  logits: Any
  cache: Any
  seen: Any
  positions: Any


def read(model, ids_BxT, lengths_B, max_new_tokens):
  """The `Prompt` of token ids, padded on the right.

  Args:
    model: a `llama.Llama`.
    ids_BxT: any id follows the prompts.
    lengths_B: of the prompts, at least 1.
    max_new_tokens: M.
  """
  B, T = ids_BxT.shape
  slots = jnp.arange(T)
  positions = jnp.broadcast_to(slots, (B, T))
  more = max_new_tokens - 1
  # Padding comes after the prompt, so that the causal mask hides it.
  x_BxTxD, cache = model.prefill(model.embed(ids_BxT), positions, None, more)
  last = jnp.take_along_axis(x_BxTxD, lengths_B[:, None, None] - 1, 1)[:, 0]
  seen = jnp.pad(slots < lengths_B[:, None], [(0, 0), (0, more)])
  return Prompt(model.logits(last), cache, seen, lengths_B)


def greedy(model, ids_BxT, lengths_B, max_new_tokens, end):
  """The likeliest token, one after the other.

  Args:
    model: as `read` takes it, and so the next three.
    ids_BxT: see there.
    lengths_B: see there.
    max_new_tokens: see there.
    end: the id that ends a text; it fills what follows.

  Returns:
    int32 [B, M].
  """
  prompt = read(model, ids_BxT, lengths_B, max_new_tokens)
  return greedy_from(model, prompt, max_new_tokens, end)


def greedy_from(model, prompt, max_new_tokens, end):
  """`greedy` after a `Prompt`."""
  B = len(prompt.logits)
  tokens = jnp.full((B, max_new_tokens), end, jnp.int32)

  def choose(tokens, logits, ended, i):
    chosen = jnp.where(ended, end, logits.argmax(-1).astype(jnp.int32))
    return tokens.at[:, i].set(chosen), ended | (chosen == end)

  def goes_on(carry):
    _, ended, _, i = carry
    return (i < max_new_tokens) & ~ended.all()

  def body(carry):
    tokens, ended, cache, i = carry
    logits, cache = _next(
      model, prompt, cache, tokens[:, i - 1], i, max_new_tokens
    )
    tokens, ended = choose(tokens, logits, ended, i)
    return tokens, ended, cache, i + 1

  tokens, ended = choose(tokens, prompt.logits, jnp.zeros(B, bool), 0)
  carry = tokens, ended, prompt.cache, jnp.array(1)
  return lax.while_loop(goes_on, body, carry)[0]


def beam(model, ids_BxT, lengths_B, max_new_tokens, end, num_beams):
  """The text that a beam search finds, of the largest mean log-probability.

  As transformers 5 searches with its defaults, length_penalty=1 and
  early_stopping=False: the best J texts that go on and the best J that have
  ended are kept, and the search stops where no text that goes on, at its
  length, is better than the worst that has ended.

  Args:
    model: as for `greedy`, and so the next four.
    ids_BxT: see there.
    lengths_B: see there.
    max_new_tokens: see there.
    end: see there.
    num_beams: J.

  Returns:
    int32 [B, M].
  """
  B, J, M = len(ids_BxT), num_beams, max_new_tokens
  prompt = read(model, ids_BxT, lengths_B, max_new_tokens)
  # Each prompt J times.
  rows = jnp.repeat(jnp.arange(B), J)
  prompt = prompt._replace(
    logits=prompt.logits[rows],
    cache=model.cache_rows(prompt.cache, rows),
    seen=prompt.seen[rows],
    positions=prompt.positions[rows],
  )
  none = jnp.full((B, J, M), end, jnp.int32)
  # Of J equal beams the first alone counts.
  first = jnp.where(jnp.arange(J) == 0, 0.0, _NEVER)
  search = _Search(
    tokens=none,
    scores=jnp.broadcast_to(first, (B, J)),
    ended_tokens=none,
    ended_scores=jnp.full((B, J), _NEVER),
    ended=jnp.zeros((B, J), bool),
    open=jnp.ones(B, bool),
  )

  def goes_on(carry):
    search, _, i = carry
    return (i < M) & search.open.any()

  def body(carry):
    search, cache, i = carry
    last = search.tokens[..., i - 1].reshape(-1)
    logits, cache = _next(model, prompt, cache, last, i, M)
    search, rows = _advance(search, logits, i, end)
    return search, model.cache_rows(cache, rows), i + 1

  search, _ = _advance(search, prompt.logits, 0, end)  # all beams are equal
  carry = search, prompt.cache, jnp.array(1)
  return lax.while_loop(goes_on, body, carry)[0].ended_tokens[:, 0]


class _Search(NamedTuple):
  """Of each prompt J texts that go on, and J that have ended, the best first.

  Attributes:
    tokens: [B, J, M], of those that go on.
    scores: [B, J], their log-probabilities.
    ended_tokens: [B, J, M].
    ended_scores: [B, J], their mean log-probabilities.
    ended: bool [B, J], whether there is such a text.
    open: bool [B], whether a better one may still end.
  """

  tokens: Any
  scores: Any
  ended_tokens: Any
  ended_scores: Any
  ended: Any
  open: Any


def _advance(search, logits, i, end):
  """The search with token i, and the row that each beam comes from."""
  B, J, M = search.tokens.shape
  V = logits.shape[-1]
  log_probs = jax.nn.log_softmax(logits).reshape(B, J, V)
  scores = (search.scores[..., None] + log_probs).reshape(B, J * V)
  # Twice as many: J of them go on even where J end.
  scores, index = lax.top_k(scores, 2 * J)
  parent, token = index // V, (index % V).astype(jnp.int32)
  tokens = jnp.take_along_axis(search.tokens, parent[..., None], 1)
  tokens = tokens.at[..., i].set(token)
  ends = (token == end) | (i + 1 == M)

  # Only the best J may end.
  may_end = ends & (jnp.arange(2 * J) < J) & search.open[:, None]
  ended_scores = jnp.where(may_end, scores / (i + 1), _NEVER)
  ended_scores, best = lax.top_k(
    jnp.concatenate([search.ended_scores, ended_scores], 1), J
  )

  def of_best(before, new):
    both = jnp.concatenate([before, new], 1)
    return jnp.take_along_axis(
      both, best.reshape(B, J, *[1] * (both.ndim - 2)), 1
    )

  ended_tokens = of_best(search.ended_tokens, tokens)
  ended = of_best(search.ended, may_end)

  scores, on = lax.top_k(jnp.where(ends, _NEVER, scores), J)
  tokens = jnp.take_along_axis(tokens, on[..., None], 1)
  parent = jnp.take_along_axis(parent, on, 1)
  worst = jnp.where(ended.all(1), ended_scores.min(1), _NEVER)
  is_open = search.open & (scores[:, 0] / (i + 1) > worst)
  rows = (jnp.arange(B)[:, None] * J + parent).reshape(-1)
  return (
    _Search(tokens, scores, ended_tokens, ended_scores, ended, is_open),
    rows,
  )


def _next(model, prompt, cache, ids_B, i, max_new_tokens):
  """Logits [B, V] after new token i - 1, and the cache with it."""
  S = prompt.seen.shape[1]
  first = S - (max_new_tokens - 1)  # the slot of new token 0
  slots, slot = jnp.arange(S), first + i - 1
  seen = prompt.seen | ((slots >= first) & (slots <= slot))
  positions = prompt.positions + i - 1
  x_Bx1xD, cache = model.extend(
    model.embed(ids_B[:, None]),
    positions[:, None],
    seen[:, None, None],
    cache,
    slot,
  )
  return model.logits(x_Bx1xD[:, 0]), cache
