import jax
import numpy as np
import pytest

from experiments.data import questions
from experiments.models import vision_language
from experiments.pretrained import paligemma as pretrained
from experiments.tasks import vqa
from tests.experiments import tiny_vqa

TASK = vqa.VQA(4, 1, (), (), ('accuracy', 'generated', 'outside'))
OPTIONS = vqa.VQA(
  4,
  1,
  ((60, 61, 1), (62, 1)),
  ('yes', 'no'),
  ('accuracy', 'generated', 'outside', 'yes/no', 'color'),
)


@pytest.fixture(scope='module')
def model():
  return pretrained.load(tiny_vqa.PALIGEMMA, str(tiny_vqa.CHECKPOINT))


@pytest.fixture
def batch():
  """Three prompts with answers of 3, 2 and 4 tokens, the last one cut."""
  rng = np.random.default_rng(0)
  ids = rng.integers(5, 300, (3, 12), np.int32)
  prefix = np.array([5, 8, 6], np.int32)
  ids[0, 5:8], ids[1, 8:10] = (60, 61, 1), (62, 1)
  return {
    'image': rng.integers(0, 256, (3, 12, 12, 3), np.uint8),
    'ids': ids,
    'prefix': prefix,
    'length': prefix + np.array([3, 2, 4], np.int32),
  }


def test_loss_is_the_mean_over_answers_of_their_mean(model, batch):
  """Against each example on its own, without padding, in NumPy."""
  expected = []
  for i in range(3):
    row = {name: column[i : i + 1] for name, column in batch.items()}
    n, end = row['prefix'][0], row['length'][0]
    prompts = vision_language.Prompts(
      model.see(row['image']),
      row['ids'][:, :end],
      row['prefix'],
      row['length'],
    )
    logits = np.asarray(model.answer_logits(prompts, 4)[0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    answer = row['ids'][0, n:end]
    expected.append(-np.mean([log_p[a, t] for a, t in enumerate(answer)]))
  found = TASK.loss(model, batch, jax.random.key(0))
  assert found == pytest.approx(np.mean(expected), rel=1e-5)


def test_what_lies_lower_takes_the_place_of_the_images(model, batch):
  lowered = TASK.lower(model, batch)
  assert lowered.keys() == {'hidden', 'ids', 'prefix', 'length'}
  assert lowered['hidden'].shape == (3, 9, 16)
  key = jax.random.key(0)
  assert TASK.loss(model, lowered, key) == TASK.loss(model, batch, key)


def test_outputs(model, batch):
  found = OPTIONS.outputs(model, batch)
  assert found['said'].shape == (3, 4)
  assert found['scores'].shape == (3, 2)
  assert found['scores'].max() < 0
  assert TASK.outputs(model, batch).keys() == {'said'}
  # Of the first answer: the sum over its tokens, where the loss has their mean.
  first = {name: column[:1] for name, column in batch.items()}
  loss = OPTIONS.loss(model, first, jax.random.key(0))
  assert found['scores'][0, 0] == pytest.approx(-3 * float(loss), rel=1e-4)


def ask(number, *, answer='yes', kind='yes/no', image='a.jpg', **keys):
  ten = (answer,) * 10
  return questions.Question(str(number), image, 'is it?', ten, kind, **keys)


def answered(asked, **keys):
  words = {60: 'yes', 62: 'no', 70: 'red', 1: '<end>', 5: ' '}
  return vqa.AnsweredSet(
    asked,
    info=asked,
    decode=lambda ids: ''.join(words[i] for i in ids),
    **keys,
  )


def test_metrics():
  asked = (
    ask(0),
    ask(1, answer='no', image='b.jpg'),
    ask(2, answer='red', kind='color'),
    ask(3, answer='no', image='b.jpg'),
  )
  outputs = {
    'said': np.array([[60, 1, 1], [62, 1, 70], [70, 70, 70], [1, 1, 1]]),
    'scores': np.log([[0.9, 0.1], [0.8, 0.2], [0.5, 0.4], [0.1, 0.2]]),
  }
  some = answered(asked, held_out=frozenset(['a.jpg']))
  assert OPTIONS.metrics(outputs, some) == {
    'accuracy': 0.5,
    'generated': 0.5,
    'outside': 0.5,
    'yes/no': pytest.approx(2 / 3),
    'color': 0.0,
  }
  everywhere = answered(asked, held_out=frozenset(['a.jpg', 'b.jpg']))
  del outputs['scores']
  assert TASK.metrics(outputs, everywhere) == {
    'accuracy': 0.5,
    'generated': 0.5,
  }


def test_rephrasings_are_scored_with_their_originals_beside():
  asked = (
    ask(10, group='10', is_scored=False),
    ask(101, group='10'),
    ask(102, group='10'),
  )
  outputs = {'said': np.array([[60, 1], [60, 1], [62, 1]])}
  assert TASK.metrics(outputs, answered(asked)) == {
    'accuracy': 0.5,
    'generated': 0.5,
    'outside': 0.5,
    'consensus 1': pytest.approx(2 / 3),
    'consensus 2': pytest.approx(1 / 3),
    'consensus 3': 0.0,
  }


def test_edited_images_keep_their_answer():
  asked = (
    ask(10, group='10', is_scored=False),
    ask(10, group='10', image='b.jpg'),
    ask(10, group='10', image='c.jpg'),
  )
  outputs = {'said': np.array([[60, 1], [60, 1], [62, 1]])}
  assert TASK.metrics(outputs, answered(asked)) == {
    'accuracy': 0.5,
    'generated': 0.5,
    'outside': 0.5,
    'kept': 0.5,
  }
