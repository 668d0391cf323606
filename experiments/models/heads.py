"""Heads: a linear classifier on a backbone's pooled features."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


class Classifier(nnx.Module):
  """A backbone, and a linear head on its class token.

  Attributes:
    backbone: a `vit.ViT`.
    head: Linear, D features to C classes.
  """

  def __init__(self, backbone, num_classes, *, rngs: nnx.Rngs):
    self.backbone = backbone
    self.head = nnx.Linear(backbone.config.width, num_classes, rngs=rngs)

  def features(self, tokens_BxTxD, start=0):
    """Tokens that enter block `start` -> the normalised class token [B, D]."""
    return self.backbone.class_token(tokens_BxTxD, start)

  def __call__(self, tokens_BxTxD, start=0):
    """Tokens that enter block `start` -> logits [B, C]."""
    return self.head(self.features(tokens_BxTxD, start))


def linear_probe(train, val, *, strengths=(1e-4, 1e-3, 1e-2, 1e-1, 1.0)):
  """Fits a two-class linear head on frozen features.

  Class-balanced logistic regression on standardised features; the strength of
  its penalty is the one with the best AUROC on validation.

  Args:
    train: features [N, D] and labels [N] in {0, 1}.
    val: the same, for validation.
    strengths: scikit-learn's C to choose from, larger being a weaker penalty.

  Returns:
    kernel [D, 2] and bias [2] of the head, float32.
  """

  def fit(c):
    probe = make_pipeline(
      StandardScaler(),
      LogisticRegression(C=c, class_weight='balanced', max_iter=5000),
    )
    return probe.fit(*train)

  features, labels = val
  probe = max(
    map(fit, strengths),
    key=lambda p: roc_auc_score(labels, p.decision_function(features)),
  )
  scaler, regression = probe.named_steps.values()
  # The logit w (x - mean) / std + b, half of it to each class.
  w = regression.coef_[0] / scaler.scale_
  b = regression.intercept_[0] - w @ scaler.mean_
  kernel = np.stack([-w, w], axis=1) / 2
  bias = np.stack([-b, b]) / 2
  return jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32)
