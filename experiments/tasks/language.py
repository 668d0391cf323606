"""Questions to a language model: the loss, scores of options, generation.

Letters: B rows of T tokens, A places of a row that are scored, E examples of K
options. What a row has stands in `data.rows`.
"""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments import evaluate
from experiments.models import generate


@dataclasses.dataclass(frozen=True, eq=False)
class AnsweredSet(evaluate.EvalSet):
  """An `EvalSet` whose questions are answered in text.

  Its `info` are the names of each question's options.

  Attributes:
    decode: token ids -> text.
  """

  decode: Callable[[list[int]], str] | None = None


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
  """The task of a decoder that scores options. Hashable: of the program.

  Attributes:
    num_options: K, the most that a question has.
    first_block: see `lower`.
    metric_names: keys of `METRICS`.
  """

  num_options: int
  first_block: int
  metric_names: tuple[str, ...]

  def loss(self, model, batch, key):
    """Cross-entropy of the targets, a scalar.

      loss = mean over B of the sum over A of weight * -log p(target)

    `data.rows.training` sets the weights so that the mean over all rows is the
    mean over all targets.

    Args:
      model: a `llama.Llama`, or another decoder with its methods.
      batch: [B, ...] of `data.rows`.
      key: of this step; nothing here is drawn.
    """
    del key
    log_probs = self._log_probs(model, batch)
    return -jnp.mean(jnp.sum(batch['weight'] * log_probs, -1))

  def outputs(self, model, batch):
    """{'scores': [B, E, K], 'answer': [B, E]} of the E examples of a row.

    A score is the mean log-probability of an option's tokens; the lowest number
    where there is no such option.
    """
    answer = batch['answer']
    shape = (*answer.shape, self.num_options)
    log_probs = self._log_probs(model, batch) * batch['weight']
    number = 1 + jnp.arange(shape[1] * shape[2])
    choice = batch['choice'][..., None] == number
    scores = jnp.sum(jnp.where(choice, log_probs[..., None], 0), 1)
    scores = jnp.where(choice.any(1), scores, jnp.finfo(scores.dtype).min)
    return {'scores': scores.reshape(shape), 'answer': answer}

  def lower(self, model, batch):
    """The batch with the states that enter `first_block` beside its ids."""
    hidden = model.encode(
      model.embed(batch['ids']),
      batch['positions'],
      segment_mask(batch['example'], batch['option']),
      stop=self.first_block,
    )
    return {**batch, 'hidden': hidden}

  def metrics(self, outputs, eval_set):
    """Metrics of a whole set.

    Args:
      outputs: of every example, [N, ...].
      eval_set: the `EvalSet`.

    Returns:
      `{name: float in [0, 1]}`.
    """
    del eval_set
    there = outputs['answer'] >= 0
    found = outputs['scores'][there].argmax(-1)
    return _metrics(self.metric_names, found, outputs['answer'][there])

  def _log_probs(self, model, batch):
    """Of every place's target, float32 [B, A]."""
    states = jnp.take_along_axis(
      self._states(model, batch), batch['source'][..., None], 1
    )
    logits = model.logits(states)
    chosen = jnp.take_along_axis(logits, batch['target'][..., None], -1)
    return chosen[..., 0] - jax.nn.logsumexp(logits, -1)

  def _states(self, model, batch):
    """What leaves the last block, [B, T, D]."""
    mask = segment_mask(batch['example'], batch['option'])
    embedded = model.embed(batch['ids'])
    if 'hidden' not in batch:
      return model.encode(embedded, batch['positions'], mask)
    hidden = batch['hidden'].astype(embedded.dtype)
    return model.encode(
      hidden, batch['positions'], mask, start=self.first_block
    )


@dataclasses.dataclass(frozen=True)
class Generation:
  """The task of a decoder that answers in text. Hashable: of the program.

  The answer is the first name of an option that its text has, as the benchmark
  of LLM-Adapters takes it: `extract`.

  Attributes:
    max_new_tokens: of an answer.
    num_beams: 1 for greedy decoding.
    end: the id that ends an answer.
    metric_names: keys of `METRICS`.
  """

  max_new_tokens: int
  num_beams: int
  end: int
  metric_names: tuple[str, ...]

  def outputs(self, model, batch):
    """{'ids': [B, max_new_tokens], 'answer': [B]}."""
    args = model, batch['ids'], batch['length'], self.max_new_tokens, self.end
    if self.num_beams > 1:
      ids = generate.beam(*args, self.num_beams)
    else:
      ids = generate.greedy(*args)
    return {'ids': ids, 'answer': batch['answer']}

  def metrics(self, outputs, eval_set):
    """Metrics of a whole set; see `MultipleChoice.metrics`.

    Args:
      outputs: of every example, [N, ...].
      eval_set: the `AnsweredSet`.
    """
    texts = [eval_set.decode(_until(ids, self.end)) for ids in outputs['ids']]
    found = [
      extract(text, names)
      for text, names in zip(texts, eval_set.info, strict=True)
    ]
    return _metrics(self.metric_names, np.array(found), outputs['answer'])


# Names that the benchmark looks for in all questions of a kind.
_NAMES = {
  'answer': tuple(f'answer{i}' for i in range(1, 6)),
  'ending': tuple(f'ending{i}' for i in range(1, 5)),
  'solution': ('solution1', 'solution2'),
  'option': ('option1', 'option2'),
}


def extract(text, names):
  """The option that a text names first, from 0; -1 for none of the question's.

  Case counts. As in the benchmark 'answer5' is an answer to a question of
  four options, a wrong one.

  Args:
    text: what was generated.
    names: of the question's options.
  """
  kind = names[0].rstrip('0123456789')
  known = _NAMES.get(kind, names)
  found = re.search('|'.join(map(re.escape, known)), text)
  if not found or found[0] not in names:
    return -1
  return names.index(found[0])


def segment_mask(example_BxT, option_BxT):
  """What each token sees: bool [B, 1, T, T], of queries and keys.

  Itself and, of its own example, what stands before it in the prompt and in its
  own option. Padding sees itself alone, and nothing else sees it.
  """
  T = example_BxT.shape[1]
  same = example_BxT[:, :, None] == example_BxT[:, None]
  prompt = option_BxT[:, None] == 0
  seen = same & (prompt | (option_BxT[:, :, None] == option_BxT[:, None]))
  seen &= np.tri(T, dtype=bool) & (example_BxT[:, None] > 0)
  return (seen | np.eye(T, dtype=bool))[:, None]


def _until(ids, end):
  """The ids before the end."""
  stops = np.flatnonzero(ids == end)
  return ids[: stops[0] if stops.size else None].tolist()


def _metrics(names, found_N, answers_N):
  return {name: float(METRICS[name](found_N, answers_N)) for name in names}


def _accuracy(found_N, answers_N):
  return np.mean(found_N == answers_N)


def _balanced_accuracy(found_N, answers_N):
  """The mean of the accuracies in each class that the set has."""
  right = found_N == answers_N
  return np.mean([right[answers_N == c].mean() for c in np.unique(answers_N)])


def _macro_f1(found_N, answers_N):
  """The mean over the classes that the set has of 2 TP / (2 TP + FP + FN)."""
  scores = []
  for c in np.unique(answers_N):
    found, right = found_N == c, answers_N == c
    scores.append(2 * np.sum(found & right) / (found.sum() + right.sum()))
  return np.mean(scores)


# The last two are of classes: where option 0 means the same in every question.
METRICS = {
  'accuracy': _accuracy,
  'balanced_accuracy': _balanced_accuracy,
  'macro_f1': _macro_f1,
}
