"""Image classification: the loss, what is scored of it, and the metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import evaluate
from experiments.data import mixing


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledSet(evaluate.EvalSet):
  """An `EvalSet` that may have some of the classes only.

  Attributes:
    classes: bools [C], the classes that it has, the logits of the others being
      left out; None for all.
  """

  classes: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Classification:
  """The task of a `heads.Classifier`. Hashable: it is part of the program.

  A batch is {'image': [B, H, W, 1 or 3] from 0 to 255, 'label': [B]}; or, with
  the tokens that enter `first_block` in the place of the images, {'hidden':
  [B, T, D], 'label': [B]}.

  Attributes:
    num_classes: C.
    first_block: see `lower`.
    class_weights: C floats; each example counts as its class does, see `loss`.
    label_smoothing: what a target shares out among all classes.
    mixup: as `mixing.mix` takes it; so the next three.
    cutmix: see there.
    mix_probability: see there.
    mix_switch: see there.
    metric_names: keys of `METRICS`.
  """

  num_classes: int
  first_block: int
  class_weights: tuple[float, ...]
  label_smoothing: float
  mixup: float
  cutmix: float
  mix_probability: float
  mix_switch: float
  metric_names: tuple[str, ...]

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
      batch: see the class.
      key: of this step.
    """
    mix_key, drop_key = jax.random.split(key)
    targets = jax.nn.one_hot(batch['label'], self.num_classes)
    if self.mixup or self.cutmix:
      images, targets = mixing.mix(
        mix_key,
        batch['image'],
        targets,
        mixup=self.mixup,
        cutmix=self.cutmix,
        probability=self.mix_probability,
        switch=self.mix_switch,
      )
      batch = {**batch, 'image': images}
    # A sum of products: a TPU's matmul would round the weights to bfloat16.
    class_weights = jnp.array(self.class_weights, targets.dtype)
    weights = jnp.sum(targets * class_weights, -1)
    targets = optax.smooth_labels(targets, self.label_smoothing)
    logits = self._logits(model, batch, drop_key)
    return jnp.mean(weights * optax.softmax_cross_entropy(logits, targets))

  def outputs(self, model, batch):
    """{'logits': [B, C], 'label': [B]}."""
    return {'logits': self._logits(model, batch), 'label': batch['label']}

  def lower(self, model, batch):
    """The batch with the tokens that enter `first_block` for its images."""
    tokens = self._tokens(model, batch)
    tokens = model.backbone.encode(tokens, stop=self.first_block)
    return {'hidden': tokens, 'label': batch['label']}

  def features(self, model, batch):
    """What the head sees, {'features': [B, F], 'label': [B]}."""
    features = model.features(self._tokens(model, batch), self._entry(batch))
    return {'features': features, 'label': batch['label']}

  def metrics(self, outputs, eval_set):
    """Metrics of a whole set.

    Args:
      outputs: of every example, [N, ...].
      eval_set: the `LabelledSet`.

    Returns:
      `{name: float in [0, 1]}`.
    """
    logits, labels = outputs['logits'], outputs['label']
    if eval_set.classes is not None:
      logits = np.where(eval_set.classes, logits, -np.inf)
    return {
      name: float(METRICS[name](logits, labels)) for name in self.metric_names
    }

  def _logits(self, model, batch, key=None):
    """`key` is drop path's, in training."""
    return model(self._tokens(model, batch), self._entry(batch), key=key)

  def _tokens(self, model, batch):
    if 'hidden' in batch:
      return batch['hidden'].astype(jnp.float32)
    backbone = model.backbone
    return backbone.embed(backbone.config.normalize(batch['image']))

  def _entry(self, batch):
    """The block that `_tokens` enter."""
    return self.first_block if 'hidden' in batch else 0


def balanced_weights(labels, num_classes):
  """Weights [C] under which every class counts the same; their mean is 1."""
  counts = np.bincount(labels, minlength=num_classes)
  return len(labels) / (num_classes * counts)


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
