"""The loss and the metrics, against their definitions."""

import numpy as np
import pytest

from experiments.tasks import classification


def test_classes_count_the_same():
  labels = np.array([0, 0, 0, 1])
  weights = classification.class_weights(labels, 2)
  np.testing.assert_allclose(weights, [4 / 6, 2])
  logits = np.array([[1.0, -1], [0.5, 2], [0, 0], [3, 1]])
  shifted = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  losses = -shifted[np.arange(4), labels]
  expected = (losses[:3].mean() + losses[3]) / 2
  loss = classification.loss(logits.astype(np.float32), labels, weights)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_binary_metrics():
  labels = np.array([1, 0, 1, 0, 0])
  scores = np.array([3.0, 2.5, 2.0, 1.0, -1.0])
  logits = np.stack([-scores, scores], 1)
  found = classification.binary_metrics(logits, labels)
  # Pairs ranked right: 3 of 3, and 2 of 3.
  assert found['auroc'] == pytest.approx(5 / 6)
  # Precision where a positive is found: 1 of 1, 2 of 3.
  assert found['ap'] == pytest.approx((1 + 2 / 3) / 2)
