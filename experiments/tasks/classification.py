"""Classification: the loss, and the metrics of two classes."""

import jax.numpy as jnp
import numpy as np
import optax
from sklearn import metrics


def class_weights(labels, num_classes):
  """Weights [C] under which every class counts the same; their mean is 1."""
  counts = np.bincount(labels, minlength=num_classes)
  return (len(labels) / (num_classes * counts)).astype(np.float32)


def loss(logits_BxC, labels_B, weights_C):
  """Cross-entropy, each example weighted by its class. A scalar."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits_BxC, labels_B)
  return jnp.mean(losses * weights_C[labels_B])


def binary_metrics(logits_NxC, labels_N):
  """Area under the ROC curve and average precision, in [0, 1].

  Neither depends on a threshold: under this kind of shift all logits move one
  way, and what a fixed threshold measures is that.
  """
  scores = np.asarray(logits_NxC[:, 1] - logits_NxC[:, 0])
  return {
    'auroc': float(metrics.roc_auc_score(labels_N, scores)),
    'ap': float(metrics.average_precision_score(labels_N, scores)),
  }
