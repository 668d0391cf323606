"""The loss and the metrics, against their definitions."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.data import mixing
from experiments.tasks import classification

TASK = classification.Classification(
  num_classes=2,
  first_block=1,
  class_weights=(1.0, 1.0),
  label_smoothing=0.0,
  mixup=0.0,
  cutmix=0.0,
  mix_probability=1.0,
  mix_switch=0.5,
)
LOGITS = np.array([[1.0, -1], [0.5, 2], [0, 0], [3, 1]], np.float32)
LABELS = np.array([0, 0, 0, 1])
KEY = jax.random.key(0)


class Model:
  """Its tokens are its logits; of images, their mean colour is."""

  def __init__(self):
    self.backbone = self.config = self

  def normalize(self, images):
    return images / 255

  def embed(self, images):
    return images.mean((1, 2))[:, :2]

  def __call__(self, tokens, start, *, key):
    self.seen = start, key
    return tokens


def log_probabilities(logits):
  return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_classes_count_the_same():
  weights = classification.balanced_weights(LABELS, 2)
  np.testing.assert_allclose(weights, [4 / 6, 2])
  losses = -log_probabilities(LOGITS)[np.arange(4), LABELS]
  expected = (losses[:3].mean() + losses[3]) / 2
  task = dataclasses.replace(TASK, class_weights=tuple(weights))
  loss = task.loss(Model(), {'image': LOGITS, 'label': LABELS}, KEY)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_label_smoothing():
  task = dataclasses.replace(TASK, label_smoothing=0.2)
  loss = task.loss(Model(), {'image': LOGITS, 'label': LABELS}, KEY)
  # A fifth of a target is shared out: .9 stays with the class of two.
  targets = np.where(np.eye(2)[LABELS] == 1, 0.9, 0.1)
  expected = -(targets * log_probabilities(LOGITS)).sum(1).mean()
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_images_and_targets_are_mixed_alike():
  task = dataclasses.replace(TASK, first_block=0, mixup=1.0)
  images = np.zeros((2, 4, 4, 3), np.uint8)
  images[0, ..., 0] = images[1, ..., 1] = 255
  model = Model()
  loss = task.loss(model, {'image': images, 'label': np.array([0, 1])}, KEY)
  # The mean colours, and so the logits, are the mixed targets themselves.
  mix_key, _ = jax.random.split(KEY)
  _, targets = mixing.mix(
    mix_key,
    images,
    np.eye(2, dtype=np.float32),
    mixup=1.0,
    cutmix=0.0,
    probability=1.0,
    switch=0.5,
  )
  expected = -(targets * log_probabilities(targets)).sum(1).mean()
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  unmixed = -(np.eye(2) * log_probabilities(np.eye(2))).sum(1).mean()
  assert loss > unmixed + 0.05
  assert model.seen[0] == 0
  assert model.seen[1] is not None


def test_prediction_drops_no_path():
  model = Model()
  np.testing.assert_array_equal(TASK.predict(model, LOGITS), LOGITS)
  assert model.seen == (1, None)


def test_metrics_of_two_classes():
  labels = np.array([1, 0, 1, 0, 0])
  scores = np.array([3.0, 2.5, 2.0, 1.0, -1.0])
  logits = np.stack([-scores, scores], 1)
  found = classification.metrics(('auroc', 'ap'), logits, labels)
  # Pairs ranked right: 3 of 3, and 2 of 3.
  assert found['auroc'] == pytest.approx(5 / 6)
  # Precision where a positive is found: 1 of 1, 2 of 3.
  assert found['ap'] == pytest.approx((1 + 2 / 3) / 2)


def test_accuracy_and_its_mean_over_the_classes_present():
  logits = np.eye(4)[[0, 0, 0, 1, 2]]
  labels = np.array([0, 0, 0, 0, 2])
  found = classification.metrics(
    ('accuracy', 'balanced_accuracy'), logits, labels
  )
  assert found['accuracy'] == pytest.approx(4 / 5)
  assert found['balanced_accuracy'] == pytest.approx((3 / 4 + 1) / 2)


def test_a_set_is_scored_on_its_own_classes():
  logits = np.array([[1.0, 2, 9], [3, 1, 2]])
  labels = np.array([1, 0])
  names = ('accuracy',)
  assert classification.metrics(names, logits, labels) == {'accuracy': 0.5}
  own = np.array([True, True, False])
  assert classification.metrics(names, logits, labels, own) == {'accuracy': 1}
