"""Fine-tuning: pretrained params -> anchor -> optimizer -> steps -> choice."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments import evaluate, optimizers
from experiments.tasks import classification


class Run(NamedTuple):
  """One fine-tuning run.

  Attributes:
    params: those of the step with the best validation AUROC.
    step: that step, counted from 1.
    history: `{name: array [num_steps]}`: the loss, |theta - theta_0|, and under
      SPD the shares of layers selected and decayed in that step.
  """

  params: Any
  step: int
  history: dict[str, np.ndarray]


def trainable_from(first_block):
  """NNX filter: a classifier's blocks from `first_block` on, norm and head."""

  def is_trained(path, _):
    if not first_block or path[0] == 'head':
      return True
    _, part, *rest = path
    return part == 'norm' or (part == 'blocks' and rest[0] >= first_block)

  return is_trained


@dataclasses.dataclass(frozen=True)
class FineTuning:
  """What all methods share: the model, its pretrained params, data, budget.

  Attributes:
    graphdef: of the classifier.
    pretrained: theta_0, the params to train.
    frozen: the other state.
    first_block: the block that the inputs enter.
    train: inputs [N, T, D] and labels [N].
    val: the same; the step is chosen on it.
    config: `learning_rate`, `num_steps`, `batch_size`, `warmup`,
      `eval_every`, `eval_batch_size`.
  """

  graphdef: Any
  pretrained: Any
  frozen: Any
  first_block: int
  train: tuple[np.ndarray, np.ndarray]
  val: tuple[np.ndarray, np.ndarray]
  config: Any

  def __post_init__(self):
    if self.config.batch_size > len(self.train[1]):
      raise ValueError(
        f'config.batch_size is {self.config.batch_size}, of '
        f'{len(self.train[1])} training examples; make it smaller.'
      )

  def logits(self, params, inputs):
    """Logits [B, C] of inputs [B, T, D]; compiled once a batch size."""
    return _logits(self.graphdef, params, self.frozen, inputs, self.first_block)

  def evaluate(self, params, sets):
    """`{name: metrics}` of `{name: (inputs, labels)}`."""
    return evaluate.evaluate(
      functools.partial(self.logits, params),
      classification.binary_metrics,
      sets,
      self.config.eval_batch_size,
    )

  def deviation(self, params):
    """|theta - theta_0| over all that is trained."""
    return float(_distance(params, self.pretrained))

  def run(self, optimizer, weight_decay, seed, progress=lambda loss: None):
    """Fine-tunes, and chooses a step by the AUROC on validation.

    Args:
      optimizer: a key of `optimizers.OPTIMIZERS`.
      weight_decay: its strength.
      seed: of the order of the data.
      progress: called with the loss of every step.

    Returns:
      A `Run`.

    Raises:
      FloatingPointError: if the loss is not finite.
    """
    config = self.config
    inputs, labels = self.train
    schedule = {'num_steps': config.num_steps, 'warmup': config.warmup}
    strength = {
      'learning_rate': config.learning_rate,
      'weight_decay': weight_decay,
    }
    step_fn = functools.partial(
      _train_step,
      self.graphdef,
      self.frozen,
      self.pretrained,
      first_block=self.first_block,
      optimizer=optimizer,
      **schedule,
      strength=strength,
      class_weights=classification.class_weights(
        labels, self.pretrained['head']['bias'].size
      ),
    )
    params = jax.tree.map(jnp.copy, self.pretrained)
    tx = optimizers.make(optimizer, **strength, **schedule)
    opt_state = tx.init(params)

    best, chosen, history = -np.inf, None, []
    order = _data_order(len(labels), config.batch_size, seed)
    for step, rows in zip(range(1, config.num_steps + 1), order, strict=False):
      params, opt_state, metrics = step_fn(
        params, opt_state, inputs[rows], labels[rows]
      )
      history.append(jax.device_get(metrics))
      loss = float(history[-1]['loss'])
      if not np.isfinite(loss):
        raise FloatingPointError(
          f'{optimizer}: the loss is {loss} at step {step}; lower '
          f'--config.learning_rate, now {config.learning_rate}.'
        )
      progress(loss)
      if step % config.eval_every == 0 or step == config.num_steps:
        auroc = self.evaluate(params, {'val': self.val})['val']['auroc']
        if auroc >= best:
          best, chosen = auroc, (step, jax.tree.map(jnp.copy, params))
    step, params = chosen
    columns = {
      name: np.array([metrics[name] for metrics in history])
      for name in history[0]
    }
    return Run(params, step, columns)


def wise_ft(pretrained, params, alpha):
  """WiSE-FT (Wortsman et al., 2022): (1 - alpha) theta_0 + alpha theta."""
  return jax.tree.map(lambda a, b: a + alpha * (b - a), pretrained, params)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _logits(graphdef, params, frozen, inputs, first_block):
  model = nnx.merge(graphdef, params, frozen)
  return model(inputs.astype(jnp.float32), first_block)


@jax.jit
def _distance(params, pretrained):
  return optax.tree.norm(optax.tree.sub(params, pretrained))


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames=('optimizer', 'num_steps', 'warmup', 'first_block'),
  donate_argnums=(3, 4),
)
def _train_step(
  graphdef,
  frozen,
  pretrained,
  params,
  opt_state,
  inputs,
  labels,
  *,
  first_block,
  optimizer,
  num_steps,
  warmup,
  strength,
  class_weights,
):
  """One step; strength and rate are traced: one program serves a method."""

  def loss_fn(params):
    logits = _logits(graphdef, params, frozen, inputs, first_block)
    return classification.loss(logits, labels, class_weights)

  tx = optimizers.make(
    optimizer, **strength, num_steps=num_steps, warmup=warmup
  )
  loss, grads = jax.value_and_grad(loss_fn)(params)
  updates, new_state = tx.update(grads, opt_state, params)
  params = optax.apply_updates(params, updates)
  metrics = {'loss': loss, 'deviation': _distance(params, pretrained)}
  if (spd := optax.tree.get(new_state, 'SPDState')) is not None:
    before = optax.tree.get(opt_state, 'SPDState')
    selected = spd.selected_count - before.selected_count
    decayed = spd.decayed_count - before.decayed_count
    metrics |= {'selected': selected.mean(), 'decayed': decayed.mean()}
  return params, new_state, metrics


def _data_order(num_examples, batch_size, seed):
  """Rows of one batch after another: shuffled epochs, short batches dropped."""
  rng = np.random.default_rng(seed)
  while True:
    rows = rng.permutation(num_examples)
    for start in range(0, num_examples - batch_size + 1, batch_size):
      yield rows[start : start + batch_size]
