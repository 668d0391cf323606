"""The loss and the metrics, against their definitions."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import parallel, train
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
  metric_names=('accuracy',),
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
  loss = task.loss(Model(), {'hidden': LOGITS, 'label': LABELS}, KEY)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_label_smoothing():
  task = dataclasses.replace(TASK, label_smoothing=0.2)
  loss = task.loss(Model(), {'hidden': LOGITS, 'label': LABELS}, KEY)
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


class Linear(nnx.Module):
  """A classifier whose gradient can be written down: logits = x W."""

  def __init__(self, size, num_classes):
    kernel = np.random.default_rng(1).normal(size=(size, num_classes))
    self.kernel = nnx.Param(jnp.asarray(0.1 * kernel, jnp.float32))

  @property
  def backbone(self):
    return self

  config = backbone

  def normalize(self, inputs):
    return inputs / 255

  def embed(self, images):
    return images.reshape(len(images), -1)

  def __call__(self, tokens, start=0, *, key=None):
    return tokens @ self.kernel[...]


@dataclasses.dataclass(frozen=True)
class Descent:
  """A method whose one step is the gradient: rate 1."""

  def make(self):
    return optax.sgd(1.0)


def step(task, batch, accumulate=1, seed=0):
  """The loss of a step of `train`, its gradient, and the kernel before it."""
  layout = parallel.layout(devices=jax.devices()[:1])
  size = batch['image'][0].size
  graphdef, params = nnx.split(Linear(size, task.num_classes))
  kernel = np.asarray(params['kernel'][...])
  state = train.State(
    params, optax.sgd(1.0).init(params), None, jnp.array(True)
  )
  frozen = nnx.State({})
  program = train.Program(
    graphdef, task, Descent(), layout, accumulate=accumulate
  )
  state, metrics = train.jit_step(
    program,
    frozen,
    jax.tree.map(jnp.copy, params),
    state,
    batch,
    seed,
    1,
    {},
  )
  return metrics['loss'], kernel - state.params['kernel'][...], kernel


def draw_mixing(task, key, size):
  """What each pixel keeps, [H, W], and lambda: out of the same draws."""
  lam, box, on, switch = jax.random.split(key, 4)
  cut = task.cutmix > 0
  if task.mixup and task.cutmix:
    cut = bool(jax.random.bernoulli(switch, task.mix_switch))
  alpha = task.cutmix if cut else task.mixup
  if not alpha or not jax.random.bernoulli(on, task.mix_probability):
    return np.ones((size, size)), 1.0
  lam = float(jax.random.beta(lam, alpha, alpha))
  if not cut:
    return np.full((size, size), lam), lam
  kept = np.ones((size, size))
  length = int(np.sqrt(1 - lam) * size)
  start = [
    int(jax.random.randint(k, (), 0, size)) - length // 2
    for k in jax.random.split(box)
  ]
  rows, columns = (slice(max(at, 0), max(at + length, 0)) for at in start)
  kept[rows, columns] = 0
  return kept, kept.mean()


def expected_step(task, batch, accumulate, kernel):
  """The loss and its gradient in float64, example by example."""
  kernel = kernel.astype(np.float64)
  losses, gradient = [], np.zeros_like(kernel)
  for part in range(accumulate):
    images = batch['image'][part::accumulate].astype(np.float64)
    labels = batch['label'][part::accumulate]
    key = jax.random.fold_in(jax.random.key(0), 1)
    if accumulate > 1:
      key = jax.random.fold_in(key, part)
    mix_key, _ = jax.random.split(key)
    kept, lam = draw_mixing(task, mix_key, images.shape[1])
    for i in range(len(labels)):
      own, other = labels[i], labels[len(labels) - 1 - i]
      image = kept[..., None] * images[i] + (1 - kept[..., None]) * images[~i]
      weight = lam * task.class_weights[own]
      weight += (1 - lam) * task.class_weights[other]
      target = np.full(task.num_classes, task.label_smoothing / 3)
      target[own] += (1 - task.label_smoothing) * lam
      target[other] += (1 - task.label_smoothing) * (1 - lam)
      x = image.ravel() / 255
      p = np.exp(x @ kernel) / np.exp(x @ kernel).sum()
      losses.append(-weight * target @ np.log(p))
      gradient += weight * np.outer(x, p - target) / len(batch['label'])
  return np.mean(losses), gradient


MIXING = [
  {},
  *(
    {'mixup': mixup, 'cutmix': cutmix, 'mix_probability': probability}
    for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0))
    for probability in (0.5, 1.0)
  ),
]


def recipe(mixing, balanced, smoothing):
  """A task of three classes, and a batch: 5, 2 and 1 of them."""
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (8, 6, 6, 1), np.uint8),
    'label': np.array([0, 1, 0, 2, 0, 0, 1, 0], np.int32),
  }
  weights = np.ones(3)
  if balanced:
    weights = classification.balanced_weights(batch['label'], 3)
  task = dataclasses.replace(
    TASK,
    num_classes=3,
    first_block=0,
    class_weights=tuple(weights.tolist()),
    label_smoothing=smoothing,
    **mixing,
  )
  return task, batch


def mean_of_parts(task, batch, accumulate):
  """What `step` returns, but for its one program: a second to compile each."""
  graphdef, params = nnx.split(Linear(batch['image'][0].size, task.num_classes))
  found = []
  for part in range(accumulate):
    rows = jax.tree.map(lambda x, part=part: x[part::accumulate], batch)
    loss_fn = train.Program(graphdef, task, None, None).loss
    number = part if accumulate > 1 else None
    args = params, nnx.State({}), rows, 0, 1, number
    loss, gradient = jax.value_and_grad(loss_fn)(*args)
    found.append((loss, gradient['kernel'][...]))
  columns = zip(*found, strict=True)
  loss, gradient = (np.mean(column, axis=0) for column in columns)
  return loss, gradient, np.asarray(params['kernel'][...])


def check_step(how, task, batch, accumulate):
  loss, gradient, kernel = how(task, batch, accumulate)
  wanted, wanted_gradient = expected_step(task, batch, accumulate, kernel)
  # float32 sums of 8 x 36 terms.
  np.testing.assert_allclose(loss, wanted, rtol=2e-6)
  np.testing.assert_allclose(gradient, wanted_gradient, atol=2e-7)


@pytest.mark.parametrize('mixing', MIXING)
def test_every_pair_of_recipe_keys(mixing):
  for balanced, smoothing, accumulate in itertools.product(
    (False, True), (0.0, 0.1), (1, 2)
  ):
    task, batch = recipe(mixing, balanced, smoothing)
    check_step(mean_of_parts, task, batch, accumulate)


@pytest.mark.parametrize('mixing', [MIXING[0], MIXING[-1]])
def test_the_step_takes_the_mean_of_its_parts(mixing):
  check_step(step, *recipe(mixing, True, 0.1), 2)


def test_weights_of_the_parts_are_those_of_the_batch():
  """However unevenly the classes fall into parts; nothing is drawn here."""
  batch = {
    'image': np.random.default_rng(0).integers(0, 256, (8, 2, 2, 1), np.uint8),
    'label': np.array([0, 1, 0, 1, 0, 1, 0, 0], np.int32),
  }
  task = dataclasses.replace(
    TASK, first_block=0, class_weights=(0.2, 5.0), label_smoothing=0.1
  )
  whole = step(task, batch)
  for accumulate in (2, 4, 8):
    for ours, theirs in zip(step(task, batch, accumulate), whole, strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_a_rare_class_is_learned(smoothing):
  """990 : 10, separable."""
  rng = np.random.default_rng(0)
  labels = np.repeat([0, 1], [990, 10])
  inputs = rng.normal(0, 0.3, (1000, 4)) + np.outer(
    2 * labels - 1, [1, 1, 0, 0]
  )
  weights = classification.balanced_weights(labels, 2)
  task = dataclasses.replace(
    TASK, class_weights=tuple(weights.tolist()), label_smoothing=smoothing
  )
  batch = {'hidden': jnp.asarray(inputs, jnp.float32), 'label': labels}
  graphdef, params = nnx.split(Linear(4, 2))
  tx = optax.adam(0.05)

  @jax.jit
  def learn(params, opt_state):
    def loss_fn(params):
      return task.loss(nnx.merge(graphdef, params), batch, KEY)

    updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state)
    return optax.apply_updates(params, updates), opt_state

  opt_state = tx.init(params)
  for _ in range(100):
    params, opt_state = learn(params, opt_state)
  outputs = task.outputs(nnx.merge(graphdef, params), batch)
  found = metrics(('balanced_accuracy',), **jax.device_get(outputs))
  assert found['balanced_accuracy'] > 0.99


def metrics(names, logits, label, classes=None):
  task = dataclasses.replace(TASK, metric_names=names)
  eval_set = classification.LabelledSet(None, classes=classes)
  return task.metrics({'logits': logits, 'label': label}, eval_set)


def test_prediction_drops_no_path():
  model = Model()
  outputs = TASK.outputs(model, {'hidden': LOGITS, 'label': LABELS})
  np.testing.assert_array_equal(outputs['logits'], LOGITS)
  np.testing.assert_array_equal(outputs['label'], LABELS)
  assert model.seen == (1, None)


def test_metrics_of_two_classes():
  labels = np.array([1, 0, 1, 0, 0])
  scores = np.array([3.0, 2.5, 2.0, 1.0, -1.0])
  logits = np.stack([-scores, scores], 1)
  found = metrics(('auroc', 'ap'), logits, labels)
  # Pairs ranked right: 3 of 3, and 2 of 3.
  assert found['auroc'] == pytest.approx(5 / 6)
  # Precision where a positive is found: 1 of 1, 2 of 3.
  assert found['ap'] == pytest.approx((1 + 2 / 3) / 2)


def test_accuracy_and_its_mean_over_the_classes_present():
  logits = np.eye(4)[[0, 0, 0, 1, 2]]
  labels = np.array([0, 0, 0, 0, 2])
  found = metrics(('accuracy', 'balanced_accuracy'), logits, labels)
  assert found['accuracy'] == pytest.approx(4 / 5)
  assert found['balanced_accuracy'] == pytest.approx((3 / 4 + 1) / 2)


def test_a_set_is_scored_on_its_own_classes():
  logits = np.array([[1.0, 2, 9], [3, 1, 2]])
  labels = np.array([1, 0])
  names = ('accuracy',)
  assert metrics(names, logits, labels) == {'accuracy': 0.5}
  own = np.array([True, True, False])
  assert metrics(names, logits, labels, own) == {'accuracy': 1}
