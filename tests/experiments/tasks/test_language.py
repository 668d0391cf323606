"""The loss, scores and answers of a language model, against NumPy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import cache, cli, evaluate, parallel
from experiments.data import rows, sources
from experiments.models import generate
from experiments.tasks import language

V, D, L = 40, 16, 3
TASK = language.MultipleChoice(3, 2, ('accuracy',))


class Decoder(nnx.Module):
  """Blocks of one head of attention each, and positions that are added."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.token_embed = nnx.Param(rngs.normal((V, D)))
    self.positions = nnx.Param(rngs.normal((99, D)))
    self.blocks = nnx.List([nnx.Linear(D, 3 * D, rngs=rngs) for _ in range(L)])

  def embed(self, ids):
    return self.token_embed[...][ids]

  def encode(self, x, positions, mask, start=0, stop=None):
    for block in self.blocks[start:stop]:
      q, k, v = jnp.split(block(x + self.positions[...][positions]), 3, -1)
      logits = jnp.where(mask[:, 0], q @ k.mT, -jnp.inf)
      x = x + jax.nn.softmax(logits) @ v
    return x

  def logits(self, x):
    return x @ self.token_embed[...].T


@pytest.fixture(scope='module')
def model():
  return Decoder(rngs=nnx.Rngs(0))


def oracle(model, ids):
  """log p of every next token of one sequence, float64 [T - 1]."""
  embed, positions = (
    np.asarray(p[...], np.float64) for p in (model.token_embed, model.positions)
  )
  x = embed[ids]
  for block in model.blocks:
    kernel, bias = (
      np.asarray(p[...], np.float64) for p in (block.kernel, block.bias)
    )
    q, k, v = np.split((x + positions[: len(ids)]) @ kernel + bias, 3, -1)
    weights = np.exp(q @ k.T) * np.tri(len(ids))
    x = x + weights / weights.sum(1, keepdims=True) @ v
  logits = x @ embed.T
  log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  return log_probs[np.arange(len(ids) - 1), ids[1:]]


def draw(rng, low, high):
  return rng.integers(0, V, rng.integers(low, high)).tolist()


@pytest.fixture(scope='module')
def encoded():
  """Questions of one to three options."""
  rng = np.random.default_rng(0)
  return [
    (draw(rng, 2, 7), [draw(rng, 1, 4) for _ in range(rng.integers(1, 4))])
    for _ in range(9)
  ]


def batch_of(columns):
  return {name: jnp.asarray(column) for name, column in columns.items()}


@pytest.mark.parametrize('on_prompts', [True, False])
def test_the_loss_is_the_mean_over_all_targets(model, on_prompts):
  """Whatever shares a row with an example, and wherever it stands there."""
  rng = np.random.default_rng(1)
  sequences = [(draw(rng, 3, 12), 2) for _ in range(11)]
  columns = rows.training(sequences, 24, on_prompts)
  first = 0 if on_prompts else 1
  expected = -np.concatenate(
    [oracle(model, np.array(ids))[first:] for ids, _ in sequences]
  ).mean()
  assert TASK.loss(model, batch_of(columns), None) == pytest.approx(
    expected, rel=1e-5
  )
  # Of parts of the batch, as accumulation and several devices take it.
  alone = [
    TASK.loss(model, batch_of({k: v[i : i + 1] for k, v in columns.items()}), 0)
    for i in range(len(columns['ids']))
  ]
  assert np.mean(alone) == pytest.approx(expected, rel=1e-5)


def test_no_example_moves_another_s_gradient(model):
  """Padding and other examples have none, and it is finite."""
  rng = np.random.default_rng(2)
  sequences = [(draw(rng, 3, 9), 1) for _ in range(5)]
  graphdef, state = nnx.split(model)

  def gradient(sequences):
    batch = batch_of(rows.training(sequences, 16, True))
    return jax.grad(
      lambda state: TASK.loss(nnx.merge(graphdef, state), batch, None)
    )(state)

  whole = gradient(sequences)
  counts = [len(ids) - 1 for ids, _ in sequences]
  parts = [gradient([one]) for one in sequences]
  mean = jax.tree.map(
    lambda *leaves: np.average(np.stack(leaves), axis=0, weights=counts), *parts
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    whole,
    mean,
  )


def test_scores_are_those_of_each_option_alone(model, encoded):
  answers = [0] * len(encoded)
  columns = rows.scoring(encoded, answers, 40, 3)
  found = TASK.outputs(model, batch_of(columns))
  scores = np.asarray(found['scores'])[columns['answer'] >= 0]
  packed = rows.pack([rows.length(*one) for one in encoded], 40)
  assert max(map(len, packed)) > 1
  for example, row in zip(np.concatenate(packed), scores, strict=True):
    prompt, options = encoded[example]
    for k, ids in enumerate(options):
      expected = oracle(model, np.array(prompt + ids))[-len(ids) :].mean()
      assert row[k] == pytest.approx(expected, rel=1e-5)
    assert (row[len(options) :] < -1e30).all()


def test_cached_lower_blocks_give_the_same(model, encoded):
  columns = rows.scoring(encoded, [0] * len(encoded), 40, 3)
  sets = {'val': evaluate.EvalSet(sources.Arrays(columns))}
  generated = evaluate.EvalSet(None, task=language.Generation(3, 1, 0, ()))
  found = cache.run_lower_blocks(
    TASK,
    model,
    sets | {'generated': generated},
    4,
    parallel.layout(devices=jax.devices()[:1]),
    cli.progress,
  )
  # What is generated begins at the ids.
  assert found['generated'] is generated
  cached = found['val'].source.columns
  assert cached['hidden'].dtype == np.float16
  np.testing.assert_array_equal(cached['ids'], columns['ids'])
  whole, upper = (
    TASK.outputs(model, batch_of(one))['scores'] for one in (columns, cached)
  )
  # float16 of what enters block 2.
  np.testing.assert_allclose(upper, whole, rtol=5e-3)
  # And not because it is left out.
  cached['hidden'] = cached['hidden'] * 0
  zeroed = TASK.outputs(model, batch_of(cached))['scores']
  assert not np.allclose(zeroed, whole, rtol=0.1)


def test_what_a_token_sees():
  example = np.array([[1, 1, 1, 1, 2, 2, 0, 0]])
  option = np.array([[0, 1, 1, 2, 0, 1, 0, 0]])
  found = np.asarray(language.segment_mask(example, option))[0, 0].astype(int)
  assert found.tolist() == [
    [1, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0, 0],
    [1, 0, 0, 1, 0, 0, 0, 0],
    [0, 0, 0, 0, 1, 0, 0, 0],
    [0, 0, 0, 0, 1, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 1, 0],
    [0, 0, 0, 0, 0, 0, 0, 1],
  ]


def test_metrics_of_the_examples_that_there_are():
  scores = np.array(
    [[[-1, -2, -3], [-9, -8, -np.inf]], [[-3, -2, -1], [-np.inf] * 3]]
  )
  answer = np.array([[0, 0], [2, -1]])
  names = 'accuracy', 'balanced_accuracy', 'macro_f1'
  task = language.MultipleChoice(3, 0, names)
  found = task.metrics({'scores': scores, 'answer': answer}, None)
  # Of class 0 one of two, of class 2 the only one.
  assert found == {
    'accuracy': pytest.approx(2 / 3),
    'balanced_accuracy': pytest.approx(3 / 4),
    'macro_f1': pytest.approx((2 / 3 + 1) / 2),
  }


@pytest.mark.parametrize('seed', range(3))
def test_macro_f1_is_scikit_learn_s(seed):
  from sklearn import metrics

  rng = np.random.default_rng(seed)
  found, answers = rng.integers(0, 3, (2, 50))
  assert language.METRICS['macro_f1'](found, answers) == pytest.approx(
    metrics.f1_score(answers, found, average='macro')
  )
  assert language.METRICS['balanced_accuracy'](found, answers) == pytest.approx(
    metrics.balanced_accuracy_score(answers, found)
  )


FOUR = ('answer1', 'answer2', 'answer3', 'answer4')


@pytest.mark.parametrize(
  ('text', 'names', 'option'),
  [
    ('the correct answer is answer3', FOUR, 2),
    ('answer4 and not answer1', FOUR, 3),
    # One that the question has not; in the benchmark wrong, and first.
    ('answer5, or answer1', FOUR, -1),
    ('Answer1', FOUR, -1),
    ('solution1', FOUR, -1),
    ('', FOUR, -1),
    ('it is false, not true', ('true', 'false'), 1),
    ('ending4', ('ending1', 'ending2', 'ending3', 'ending4'), 3),
    ('xsolution2', ('solution1', 'solution2'), 1),
    ('option2.', ('option1', 'option2'), 1),
    ('positive', ('negative', 'positive'), 1),
  ],
)
def test_answers_are_extracted_as_in_the_benchmark(text, names, option):
  assert language.extract(text, names) == option


@pytest.mark.parametrize(('beams', 'name'), [(1, 'greedy'), (4, 'beam')])
def test_answers_in_text(monkeypatch, beams, name):
  """A model that says what its prompts tell it to."""
  words = ['', '<end>', 'answer', '1', '2', '3', ' or ']
  said = jnp.array([[2, 4, 1, 2], [2, 3, 6, 2], [6, 1, 2, 3]])

  def speak(model, ids, length, max_new_tokens, end, *num_beams):
    assert num_beams == (() if beams == 1 else (4,))
    assert (model, max_new_tokens, end) == ('model', 4, 1)
    np.testing.assert_array_equal(length, [3, 2, 1])
    return said

  monkeypatch.setattr(generate, name, speak)
  columns = rows.generation([[5, 5, 5], [5, 5], [5]], [1, 1, 0])
  task = language.Generation(4, beams, 1, ('accuracy',))
  found = task.outputs('model', columns)
  eval_set = language.AnsweredSet(
    types.SimpleNamespace(),
    info=[('answer1', 'answer2')] * 3,
    decode=lambda ids: ''.join(words[i] for i in ids),
  )
  # answer2; answer1 or answer; nothing before the end.
  assert task.metrics(jax.device_get(found), eval_set) == {
    'accuracy': pytest.approx(1 / 3)
  }
