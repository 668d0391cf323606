"""Heads: a linear classifier on a backbone's pooled features."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Classifier(nnx.Module):
  """A backbone, and a linear head on its features.

  Attributes:
    backbone: a `vit.ViT`.
    head: Linear, F features to C classes; zeros at first.
    unit_features: whether the head sees features of length 1, as the head of
      a CLIP model does, before fine-tuning and in it.
  """

  def __init__(self, backbone, num_classes, *, unit_features=False):
    self.backbone = backbone
    self.unit_features = unit_features
    self.head = nnx.Linear(
      backbone.config.features,
      num_classes,
      kernel_init=nnx.initializers.zeros,
      rngs=nnx.Rngs(0),
    )

  def features(self, tokens_BxTxD, start=0, *, key=None):
    """Tokens that enter block `start` -> what the head sees, [B, F] float32.

    Args:
      tokens_BxTxD: as `vit.ViT.embed` or `encode` returns them.
      start: the block that they enter.
      key: of drop path, in training; None in evaluation.
    """
    features = self.backbone.features(tokens_BxTxD, start, key=key)
    features = features.astype(jnp.float32)
    if self.unit_features:
      # CLIP divides by the plain norm, which is far from 0.
      features /= jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features

  def __call__(self, tokens_BxTxD, start=0, *, key=None):
    """Tokens that enter block `start` -> logits [B, C]; see `features`."""
    features = self.features(tokens_BxTxD, start, key=key)
    with jax.named_scope('head'):
      return self.head(features)


def linear_probe(
  train, val, score, *, balanced=False, strengths=(1e-4, 1e-3, 1e-2, 1e-1, 1.0)
):
  """Fits a linear head on frozen features.

  Logistic regression on standardised features; the strength of its penalty is
  the one with the best score on validation.

  Args:
    train: features [N, F] and labels [N], of every class 0 to C - 1.
    val: the same, for validation.
    score: logits [N, C], labels [N] -> a float, larger being better.
    balanced: whether every class counts the same.
    strengths: scikit-learn's C to choose from, larger being a weaker penalty.

  Returns:
    kernel [F, C] and bias [C] of the head, float32.
  """
  # A second that most runs can save.
  from sklearn.linear_model import LogisticRegression
  from sklearn.pipeline import make_pipeline
  from sklearn.preprocessing import StandardScaler

  scaled = StandardScaler()

  def fit(strength):
    probe = make_pipeline(
      scaled,
      LogisticRegression(
        C=strength,
        class_weight='balanced' if balanced else None,
        max_iter=5000,
      ),
    )
    return _linear(*probe.fit(*train).named_steps.values())

  def quality(head):
    kernel, bias = head
    return score(val[0] @ kernel + bias, val[1])

  kernel, bias = max(map(fit, strengths), key=quality)
  return jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32)


def _linear(scaler, regression):
  """The logit w (x - mean) / std + b as x W + B; of two classes, half each."""
  w, b = regression.coef_, regression.intercept_
  if len(w) == 1:
    w, b = np.concatenate([-w, w]) / 2, np.concatenate([-b, b]) / 2
  kernel_FxC = (w / scaler.scale_).T
  return kernel_FxC, b - scaler.mean_ @ kernel_FxC
