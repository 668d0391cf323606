"""The classifier and the head that it starts from."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from experiments.models import heads, vit
from experiments.tasks import classification

TINY = dataclasses.replace(
  vit.CONFIGS['dinov2_s14'], width=16, depth=2, num_heads=2, mlp_dim=32, grid=2
)


def classifier(config=TINY, **changes):
  model = heads.Classifier(vit.ViT(config, rngs=nnx.Rngs(0)), 3, **changes)
  rng = np.random.default_rng(0)
  shape = model.head.kernel.shape
  model.head.kernel[...] = jnp.asarray(rng.normal(size=shape), jnp.float32)
  return model, rng.normal(size=(2, 28, 28, 3)).astype(np.float32)


def test_the_classifier_reads_the_normalised_class_token():
  model, images = classifier()
  token = model.backbone(images)[:, 0]
  expected = token @ model.head.kernel[...] + model.head.bias[...]
  tokens = model.backbone.embed(images)
  np.testing.assert_allclose(model(tokens), expected, rtol=1e-4, atol=1e-5)
  stored = model.backbone.encode(tokens, stop=1)
  np.testing.assert_allclose(model(stored, 1), expected, rtol=1e-4, atol=1e-5)


def test_the_head_of_a_clip_model_sees_directions():
  config = dataclasses.replace(TINY, projection=8)
  model, images = classifier(config, unit_features=True)
  tokens = model.backbone.embed(images)
  features = model.features(tokens)
  assert features.shape == (2, 8)
  np.testing.assert_allclose(jnp.linalg.norm(features, axis=1), 1, rtol=1e-6)
  plain, _ = classifier(config)
  long = plain.features(tokens)
  np.testing.assert_allclose(
    features * jnp.linalg.norm(long, axis=1, keepdims=True), long, rtol=1e-5
  )


def test_a_new_head_is_zero():
  model = heads.Classifier(vit.ViT(TINY, rngs=nnx.Rngs(0)), 3)
  assert not model.head.kernel[...].any()
  assert not model.head.bias[...].any()


@pytest.mark.parametrize('num_classes', [2, 3])
def test_the_linear_probe_is_the_logistic_regression(num_classes):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, num_classes, 300)
  features = rng.normal(size=(300, 5)) + labels[:, None]
  score = classification.METRICS['accuracy']
  kernel, bias = heads.linear_probe(
    (features, labels), (features, labels), score, strengths=(1.0,)
  )
  scaled = (features - features.mean(0)) / features.std(0)
  reference = LogisticRegression(C=1.0, max_iter=5000).fit(scaled, labels)
  logits = features @ np.asarray(kernel, np.float64) + np.asarray(bias)
  found = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  np.testing.assert_allclose(
    found, reference.predict_proba(scaled), rtol=1e-3, atol=1e-5
  )


def test_the_linear_probe_separates():
  rng = np.random.default_rng(0)
  # Features of very different scale, one of them telling, 1 in 5 positive.
  labels = (np.arange(400) % 5 == 0).astype(int)
  features = rng.normal(size=(400, 8)) * 10.0 ** np.arange(-3, 5)
  features[:, 0] += 2e-3 * labels
  train, val = (features[:300], labels[:300]), (features[300:], labels[300:])
  kernel, bias = heads.linear_probe(
    train, val, classification.METRICS['auroc'], balanced=True
  )
  assert kernel.dtype == bias.dtype == jnp.float32
  logits = val[0] @ np.asarray(kernel, np.float64) + np.asarray(bias)
  scores = logits[:, 1] - logits[:, 0]
  assert roc_auc_score(val[1], scores) > 0.85
  # Balanced: about as many positives as negatives are found.
  found = scores > 0
  assert abs(found[val[1] == 1].mean() - (~found)[val[1] == 0].mean()) < 0.25


def test_the_strength_is_the_best_on_validation():
  rng = np.random.default_rng(0)
  features, labels = rng.normal(size=(60, 5)), rng.integers(0, 2, 60)
  seen = []

  def score(logits, _):
    seen.append(np.abs(logits).mean())
    return -seen[-1]

  data = features, labels
  kernel, bias = heads.linear_probe(data, data, score)
  assert len(seen) == 5
  best = np.abs(features @ np.asarray(kernel) + np.asarray(bias)).mean()
  assert best == pytest.approx(min(seen), rel=1e-4)
