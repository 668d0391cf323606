"""Questions about images: the loss, the answers, and how they are scored."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from experiments import evaluate
from experiments.models import vision_language
from experiments.tasks import answers

# Of questions whose answer is of a kind, by its name.
KINDS = ('yes/no', 'number', 'other', 'color', 'shape')
METRICS = ('accuracy', 'generated', 'outside', *KINDS)
_SUBSETS = (1, 2, 3, 4)  # sizes of the subsets of `answers.consensus`


@dataclasses.dataclass(frozen=True, eq=False)
class AnsweredSet(evaluate.EvalSet):
  """An `EvalSet` of questions; `info` has a `questions.Question` for each.

  Attributes:
    decode: ids -> the text of an answer.
    held_out: pictures that the validation set shows, which chose the step.
  """

  decode: Callable[[Any], str] | None = None
  held_out: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class VQA:
  """The task of a `vision_language.VisionLanguage`. Hashable.

  A batch is {'image': [B, H, W, 3] from 0 to 255, 'ids': [B, T], 'prefix': [B],
  'length': [B]}, as `vision_language.Prompts` has the last three; or, with what
  `see` makes of the images in their place, 'hidden': [B, P, F].

  Attributes:
    answer_length: A, the most tokens of an answer, its end among them.
    end: id of the token that ends an answer.
    options: ids of each answer to choose from, with the end; () for none.
    option_names: their texts.
    metric_names: of `METRICS`.
  """

  answer_length: int
  end: int
  options: tuple[tuple[int, ...], ...]
  option_names: tuple[str, ...]
  metric_names: tuple[str, ...]

  def loss(self, model, batch, key):
    """The mean over B of the mean cross-entropy of an answer's tokens.

    That over the parts of a batch is that of the whole.
    """
    del key
    prompts = self._prompts(model, batch)
    logits = model.answer_logits(prompts, self.answer_length)
    places = prompts.prefix[:, None] + jnp.arange(self.answer_length)
    is_answer = places < prompts.length[:, None]
    places = jnp.minimum(places, prompts.ids.shape[1] - 1)
    targets = jnp.take_along_axis(prompts.ids, places, 1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    total = jnp.sum(losses * is_answer, 1)
    return jnp.mean(total / jnp.maximum(is_answer.sum(1), 1))

  def outputs(self, model, batch):
    """{'said': [B, A] ids}; with options also {'scores': [B, K]}."""
    prompts = self._prompts(model, batch)
    said = vision_language.greedy(model, prompts, self.answer_length, self.end)
    if not self.options:
      return {'said': said}
    longest = max(map(len, self.options))
    ids = np.zeros((len(self.options), longest), np.int32)
    weights = np.zeros(ids.shape, np.float32)
    for k, option in enumerate(self.options):
      ids[k, : len(option)], weights[k, : len(option)] = option, 1
    scores = vision_language.option_scores(model, prompts, ids, weights)
    return {'said': said, 'scores': scores}

  def lower(self, model, batch):
    """The batch with what the vision tower makes of the images."""
    rest = {name: batch[name] for name in batch if name != 'image'}
    return {'hidden': model.see(batch['image']), **rest}

  def answer(self, outputs, eval_set):
    """N answers, and N that were generated: without options the same."""
    generated = [
      eval_set.decode(self._until_end(ids)) for ids in outputs['said']
    ]
    if not self.options:
      return generated, generated
    chosen = outputs['scores'].argmax(1)
    return [self.option_names[k] for k in chosen], generated

  def metrics(self, outputs, eval_set):
    """Metrics of a whole set: those of the study that its questions have.

    Where questions have groups, also `consensus K` of rephrasings, over all
    subsets of K of them, and `kept`, 1 - `answers.flips`, of edited images.

    Args:
      outputs: of every example, [N, ...].
      eval_set: the `AnsweredSet`.

    Returns:
      `{name: float in [0, 1]}`.
    """
    asked = eval_set.info
    chosen, generated = self.answer(outputs, eval_set)
    found = {'accuracy': accuracies(chosen, asked)}
    found['generated'] = accuracies(generated, asked)
    is_scored = np.array([question.is_scored for question in asked])
    rows = {'accuracy': is_scored, 'generated': is_scored}
    rows['outside'] = is_scored & np.array(
      [question.picture not in eval_set.held_out for question in asked]
    )
    for kind in KINDS:
      is_kind = np.array([question.kind == kind for question in asked])
      rows[kind] = is_scored & is_kind
    metrics = {
      name: float(found.get(name, found['accuracy'])[rows[name]].mean())
      for name in self.metric_names
      if rows[name].any()
    }
    if not is_scored.all():
      metrics |= _of_groups(chosen, found['accuracy'], asked, is_scored)
    return metrics

  def _prompts(self, model, batch):
    if 'hidden' in batch:
      features = batch['hidden'].astype(jnp.float32)
    else:
      features = model.see(batch['image'])
    return vision_language.Prompts(
      features, batch['ids'], batch['prefix'], batch['length']
    )

  def _until_end(self, ids):
    ids = ids.tolist()
    return ids[: ids.index(self.end)] if self.end in ids else ids


# Draws of the examples ask for the same again and again.
_accuracy = functools.lru_cache(1 << 16)(answers.accuracy)


def accuracies(predictions, asked):
  """[N], `answers.accuracy` of N strings to N questions."""
  return np.array(
    [
      _accuracy(said, question.answers)
      for said, question in zip(predictions, asked, strict=True)
    ]
  )


def _of_groups(predictions, accuracies, asked, is_scored):
  groups = [question.group for question in asked]
  originals = {q.number for q in asked if not q.is_scored}
  # A question about an edited image has the number of its original.
  if {question.number for question in asked} == originals:
    truths = [question.answer for question in asked]
    flips = answers.flips(predictions, truths, groups, is_scored)
    return {'kept': 1 - flips}
  shares = {
    size: answers.consensus(accuracies, groups, size) for size in _SUBSETS
  }
  return {
    f'consensus {size}': share
    for size, share in shares.items()
    if not np.isnan(share)
  }
