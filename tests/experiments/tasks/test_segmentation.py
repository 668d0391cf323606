"""The loss and the metrics, against their definitions and scikit-learn's."""

import dataclasses

import jax
import numpy as np
import pytest
from sklearn import metrics

from experiments import evaluate, parallel
from experiments.data import sources
from experiments.models import segmenter
from experiments.tasks import segmentation

TASK = segmentation.Segmentation(
  num_classes=3,
  first_block=1,
  grid=(2, 3),
  metric_names=('miou', 'pixel_accuracy'),
)
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


class Model:
  """Its features are its tokens, and its logits those of them."""

  stride = 4

  def features(self, tokens, grid, start=0, *, key=None):
    self.seen = start, key
    return [tokens.reshape(len(tokens), *grid, -1)]

  def head(self, features):
    return features[-1]

  def embed(self, images):
    return images.reshape(len(images), 6, 16, 3).mean(2), (2, 3)


def batch(B=4, size=(8, 12)):
  """Masks as large as the image of 2 x 3 cells of 4 pixels; some is void."""
  return {
    'hidden': RNG.normal(size=(B, 6, 3)).astype(np.float16),
    'mask': RNG.integers(-1, 3, (B, *size)).astype(np.int32),
    'scale': np.ones((B, 2), np.float32),
  }


def logits_of(rows):
  """By interpolating two points at a time, pixel by pixel, in float64."""
  B, height, width = rows['mask'].shape
  cells = rows['hidden'].astype(np.float64).reshape(B, 2, 3, -1)
  out = np.zeros((B, height, width, cells.shape[-1]))
  for b, y, x in np.ndindex(B, height, width):
    down, right = rows['scale'][b] / 4
    v = np.clip((y + 0.5) * down - 0.5, 0, 1)
    u = np.clip((x + 0.5) * right - 0.5, 0, 2)
    i, j = min(int(v), 0), min(int(u), 1)
    v, u = v - i, u - j
    upper = (1 - u) * cells[b, i, j] + u * cells[b, i, j + 1]
    lower = (1 - u) * cells[b, i + 1, j] + u * cells[b, i + 1, j + 1]
    out[b, y, x] = (1 - v) * upper + v * lower
  return out


def oracle(rows):
  losses = []
  for logits, mask in zip(logits_of(rows), rows['mask'], strict=True):
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = [-log[c] for log, c in zip(logs[mask >= 0], mask[mask >= 0])]  # noqa: B905
    losses.append(np.mean(own) if own else 0.0)
  return losses


def test_the_loss_leaves_void_out():
  """Each image counts the same, however much of it is void."""
  rows = batch()
  rows['mask'][0, 1:] = -1
  rows['mask'][1] = -1
  model = Model()
  expected = oracle(rows)
  assert expected[1] == 0
  loss = TASK.loss(model, rows, KEY)
  assert loss.shape == ()
  np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)
  assert model.seen == (1, KEY)
  halves = [
    TASK.loss(model, {k: v[part] for k, v in rows.items()}, KEY)
    for part in (slice(2), slice(2, 4))
  ]
  np.testing.assert_allclose(np.mean(halves), loss, rtol=1e-6)


def test_what_is_void_has_no_gradient():
  rows = batch(1)
  rows['mask'][:] = -1

  def loss(hidden):
    return TASK.loss(Model(), {**rows, 'hidden': hidden}, KEY)

  grad = jax.grad(loss)(rows['hidden'].astype(np.float32))
  assert np.isfinite(grad).all()
  assert not np.any(grad)


def test_every_image_is_scored_at_its_own_size():
  """Scaled by factors of its own, and void around."""
  rows = batch(3, (16, 24))
  rows['scale'][:] = [[1, 1], [0.5, 0.5], [0.6, 0.4]]
  rows['mask'][0, 8:] = rows['mask'][0, :, 12:] = -1
  predicted = TASK.predict(Model(), rows)
  expected = logits_of(rows).argmax(-1)
  np.testing.assert_array_equal(predicted, expected)
  confusion = TASK.outputs(Model(), rows)['confusion']
  assert confusion.shape == (3, 3, 3)
  assert confusion.dtype == np.int32
  for found, truth, guess in zip(
    confusion, rows['mask'], expected, strict=True
  ):
    counts = metrics.confusion_matrix(
      truth[truth >= 0], guess[truth >= 0], labels=range(3)
    )
    np.testing.assert_array_equal(found, counts)


def test_images_are_embedded_where_nothing_is_kept():
  rows = batch()
  rows['image'] = RNG.random((4, 8, 12, 3)).astype(np.float32)
  tokens, _ = Model().embed(rows['image'])
  kept = {**rows, 'hidden': tokens}
  del rows['hidden'], kept['image']
  model = Model()
  np.testing.assert_allclose(
    TASK.loss(model, rows, KEY), TASK.loss(Model(), kept, KEY), rtol=1e-6
  )
  assert model.seen == (0, KEY)


def scores(truth, guess, num_classes=3):
  task = dataclasses.replace(TASK, num_classes=num_classes)
  confusion = [
    metrics.confusion_matrix(t[t >= 0], g[t >= 0], labels=range(num_classes))
    for t, g in zip(truth, guess, strict=True)
  ]
  return task.metrics({'confusion': np.array(confusion, np.int32)}, None)


def test_metrics_are_those_of_scikit_learn():
  truth = RNG.integers(-1, 3, (5, 100))
  guess = np.where(RNG.random((5, 100)) < 0.6, truth, RNG.integers(0, 3))
  guess = np.maximum(guess, 0)
  found = scores(truth, guess)
  kept = truth >= 0
  assert found['miou'] == pytest.approx(
    metrics.jaccard_score(truth[kept], guess[kept], average='macro'), abs=1e-12
  )
  assert found['pixel_accuracy'] == pytest.approx(
    metrics.accuracy_score(truth[kept], guess[kept]), abs=1e-12
  )
  # Not the mean of the images' own.
  own = [scores(truth[i : i + 1], guess[i : i + 1])['miou'] for i in range(5)]
  assert abs(np.mean(own) - found['miou']) > 1e-3


def test_absent_classes_do_not_count():
  """Neither unseen ones nor one that a single pixel is taken for."""
  truth = np.array([[0, 0, 0, 0, 1, 1, 1, 1]])
  guess = np.array([[0, 0, 0, 1, 1, 1, 1, 1]])
  expected = (3 / 4 + 4 / 5) / 2
  assert scores(truth, guess)['miou'] == pytest.approx(expected)
  assert scores(truth, guess, 30)['miou'] == pytest.approx(expected)
  guess[0, 0] = 7
  found = scores(truth, guess, 30)['miou']
  assert found == pytest.approx((2 / 4 + 4 / 5) / 2)
  assert found == pytest.approx(
    metrics.jaccard_score(truth[0], guess[0], labels=[0, 1], average='macro')
  )


def test_counts_do_not_wrap_round():
  confusion = np.full((3, 2, 2), 2**30, np.int32)
  task = dataclasses.replace(TASK, num_classes=2)
  found = task.metrics({'confusion': confusion}, None)
  assert found == {'miou': pytest.approx(1 / 3), 'pixel_accuracy': 0.5}


@pytest.mark.parametrize('num_devices', [1, 4])
@pytest.mark.parametrize('batch_size', [4, 8])
def test_one_matrix_whatever_the_batches(batch_size, num_devices):
  """The last batch is filled up, and what fills it does not count."""
  rows = batch(10)
  layout = parallel.layout(devices=jax.devices()[:num_devices])
  found = evaluate.evaluate(
    lambda task, part: jax.jit(task.outputs, static_argnums=0)(Model(), part),
    TASK,
    {'ID': evaluate.EvalSet(sources.Arrays(rows))},
    batch_size,
    layout,
  )
  expected = logits_of(rows).argmax(-1)
  kept = rows['mask'] >= 0
  assert found['ID']['miou'] == pytest.approx(
    metrics.jaccard_score(rows['mask'][kept], expected[kept], average='macro'),
    abs=1e-12,
  )


def test_the_classes_of_patches():
  """The most frequent one of the pixels that a patch is drawn to."""
  rows = batch(1)
  mask = rows['mask']
  mask[:] = 2
  mask[0, :4, :4] = 0
  mask[0, :4, 4:8] = -1
  mask[0, 4:, 8:] = -1
  mask[0, 3, 8:] = 1
  found = TASK.features(Model(), rows)
  assert found['features'].shape == (1, 2, 3, 3)
  assert found['label'][0, 0].tolist() == [0, 2, 2]
  assert found['label'][0, 1, :2].tolist() == [2, 2]
  mask[:] = -1
  assert (TASK.features(Model(), rows)['label'] == -1).all()


def test_patches_are_scored_as_pixels():
  logits = RNG.normal(size=(50, 3))
  labels = RNG.integers(0, 3, 50)
  assert segmentation.patch_miou(logits, labels) == pytest.approx(
    metrics.jaccard_score(labels, logits.argmax(1), average='macro')
  )


def test_gather_is_the_transpose_of_resize():
  scale = np.array([[0.25, 0.3], [0.2, 0.25]], np.float32)
  x, y = RNG.normal(size=(2, 2, 3, 4)), RNG.normal(size=(2, 8, 12, 4))
  there = segmenter.resize(x, (8, 12), scale)
  back = segmenter.gather(y, (2, 3), scale)
  np.testing.assert_allclose(np.vdot(there, y), np.vdot(x, back), rtol=1e-5)
