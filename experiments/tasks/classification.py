"""Image classification: the loss, what a model predicts, and the metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import mixing


@dataclasses.dataclass(frozen=True)
class Classification:
  """The task of a `heads.Classifier`. Hashable: it is part of the program.

  Attributes:
    num_classes: C.
    first_block: 0 for inputs that are images, [B, H, W, 1 or 3] from 0 to 255;
      otherwise they are tokens that enter this block, [B, T, D].
    class_weights: C floats; each example counts as its class does, see `loss`.
    label_smoothing: what a target shares out among all classes.
    mixup: as `mixing.mix` takes it; so the next three.
    cutmix: see there.
    mix_probability: see there.
    mix_switch: see there.
  """

  num_classes: int
  first_block: int
  class_weights: tuple[float, ...]
  label_smoothing: float
  mixup: float
  cutmix: float
  mix_probability: float
  mix_switch: float

  def tokens(self, model, inputs):
    """Inputs -> the tokens that enter `first_block`, [B, T, D]."""
    if self.first_block:
      return inputs.astype(jnp.float32)
    backbone = model.backbone
    return backbone.embed(backbone.config.normalize(inputs))

  def predict(self, model, inputs, key=None):
    """Logits [B, C]; `key` is drop path's, in training."""
    return model(self.tokens(model, inputs), self.first_block, key=key)

  def loss(self, model, batch, key):
    """The training loss, a scalar: mixed, smoothed, weighted cross-entropy.

    With lambda what an image keeps of itself, i its class, j that of the image
    mixed into it, w the class weights and a the smoothing, an example counts by
    the weights of its own classes, and what smoothing shares out counts as it
    does:

      t = lambda onehot(i) + (1 - lambda) onehot(j)
      loss = mean over B of (t . w) CE(softmax(logits), (1 - a) t + a / C)

    The mean is of B, not of the weights in the batch: so that of the parts of a
    batch is that of the whole.

    Args:
      model: the classifier.
      batch: 'image' as `predict` takes its inputs, 'label' [B].
      key: of this step.
    """
    mix_key, drop_key = jax.random.split(key)
    inputs = batch['image']
    targets = jax.nn.one_hot(batch['label'], self.num_classes)
    inputs, targets = mixing.mix(
      mix_key,
      inputs,
      targets,
      mixup=self.mixup,
      cutmix=self.cutmix,
      probability=self.mix_probability,
      switch=self.mix_switch,
    )
    # A sum of products: a TPU's matmul would round the weights to bfloat16.
    class_weights = jnp.array(self.class_weights, targets.dtype)
    weights = jnp.sum(targets * class_weights, -1)
    targets = optax.smooth_labels(targets, self.label_smoothing)
    logits = self.predict(model, inputs, drop_key)
    return jnp.mean(weights * optax.softmax_cross_entropy(logits, targets))


def balanced_weights(labels, num_classes):
  """Weights [C] under which every class counts the same; their mean is 1."""
  counts = np.bincount(labels, minlength=num_classes)
  return len(labels) / (num_classes * counts)


def metrics(names, logits_NxC, labels_N, classes=None):
  """Metrics of a whole set.

  Args:
    names: keys of `METRICS`.
    logits_NxC: of every example.
    labels_N: its class.
    classes: bools [C]: the classes of this set, where it has not all of them;
      the logits of the others are left out.

  Returns:
    `{name: float in [0, 1]}`.
  """
  if classes is not None:
    logits_NxC = np.where(classes, logits_NxC, -np.inf)
  return {name: float(METRICS[name](logits_NxC, labels_N)) for name in names}


def _accuracy(logits_NxC, labels_N):
  return np.mean(logits_NxC.argmax(1) == labels_N)


def _balanced_accuracy(logits_NxC, labels_N):
  """The mean of the accuracies in each class that the set has."""
  right = logits_NxC.argmax(1) == labels_N
  return np.mean([right[labels_N == c].mean() for c in np.unique(labels_N)])


def _auroc(logits_NxC, labels_N):
  """Area under the ROC curve, of two classes."""
  from sklearn import metrics  # a second that most runs can save

  return metrics.roc_auc_score(labels_N, _scores(logits_NxC))


def _average_precision(logits_NxC, labels_N):
  """Average precision of class 1, of two."""
  from sklearn import metrics

  return metrics.average_precision_score(labels_N, _scores(logits_NxC))


def _scores(logits_NxC):
  return logits_NxC[:, 1] - logits_NxC[:, 0]


# The last two depend on no threshold: where a shift moves all logits one way,
# what a fixed threshold measures is that.
METRICS = {
  'accuracy': _accuracy,
  'balanced_accuracy': _balanced_accuracy,
  'auroc': _auroc,
  'ap': _average_precision,
}
