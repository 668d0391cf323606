"""The classifier and the head that it starts from."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.metrics import roc_auc_score

from experiments.models import heads, vit

TINY = vit.ViTConfig(14, 16, 2, 2, 32, 2, 1e-6, (0.5,) * 3, (0.5,) * 3)


def test_the_classifier_reads_the_normalised_class_token():
  backbone = vit.ViT(TINY, rngs=nnx.Rngs(0))
  model = heads.Classifier(backbone, 3, rngs=nnx.Rngs(1))
  images = np.random.default_rng(0).normal(size=(2, 28, 28, 3))
  images = images.astype(np.float32)
  token = backbone(images)[:, 0]
  expected = token @ model.head.kernel[...] + model.head.bias[...]
  tokens = backbone.embed(images)
  np.testing.assert_allclose(model(tokens), expected, rtol=1e-4, atol=1e-5)
  stored = backbone.encode(tokens, stop=1)
  np.testing.assert_allclose(model(stored, 1), expected, rtol=1e-4, atol=1e-5)


def test_the_linear_probe_separates():
  rng = np.random.default_rng(0)
  # Features of very different scale, one of them telling, 1 in 5 positive.
  labels = (np.arange(400) % 5 == 0).astype(int)
  features = rng.normal(size=(400, 8)) * 10.0 ** np.arange(-3, 5)
  features[:, 0] += 2e-3 * labels
  train, val = (features[:300], labels[:300]), (features[300:], labels[300:])
  kernel, bias = heads.linear_probe(train, val)
  assert kernel.dtype == bias.dtype == jnp.float32
  logits = val[0] @ np.asarray(kernel, np.float64) + np.asarray(bias)
  scores = logits[:, 1] - logits[:, 0]
  assert roc_auc_score(val[1], scores) > 0.85
  # Balanced: about as many positives as negatives are found.
  found = scores > 0
  assert abs(found[val[1] == 1].mean() - (~found)[val[1] == 0].mean()) < 0.25
