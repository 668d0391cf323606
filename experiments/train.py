"""Fine-tuning: pretrained params -> anchor -> optimizer -> steps -> choice."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments import evaluate


class Run(NamedTuple):
  """One fine-tuning run.

  Attributes:
    params: those of the step with the best metric on validation.
    step: that step, counted from 1.
    history: `{name: array [num_steps]}`: the loss, |theta - theta_0|, and under
      SPD the shares of layers selected and decayed in that step.
    waiting: the share of the training time in which the step waited for data,
      but for the first batch, which starts the readers.
  """

  params: Any
  step: int
  history: dict[str, np.ndarray]
  waiting: float


def trainable_from(first_block):
  """NNX filter: a classifier's blocks from `first_block` on, norm and head."""

  def is_trained(path, _):
    if not first_block or path[0] == 'head':
      return True
    _, part, *rest = path
    return part in ('norm', 'projection') or (
      part == 'blocks' and rest[0] >= first_block
    )

  return is_trained


@dataclasses.dataclass(frozen=True)
class FineTuning:
  """What all methods share: the task, the model, theta_0, data, budget.

  Attributes:
    task: hashable, with `loss(model, batch, key)`, a scalar, and
      `predict(model, inputs)`, an array [B, ...]; as `Classification`.
    metrics: outputs [N, ...], labels [N], classes -> `{name: float}`; the first
      one chooses the step.
    graphdef: of the model.
    pretrained: theta_0, the params to train.
    frozen: the other state.
    train: seed -> an endless iterator of batches.
    val: the `EvalSet` that the step is chosen on.
    config: `num_steps`, `eval_batch_size`, `eval_every` and `ema`.
  """

  task: Any
  metrics: Callable[..., dict[str, float]]
  graphdef: Any
  pretrained: Any
  frozen: Any
  train: Callable[[int], Iterator[dict[str, np.ndarray]]]
  val: evaluate.EvalSet
  config: Any

  def evaluate(self, params, sets):
    """`{name: metrics}` of `{name: EvalSet}`."""
    return evaluate.evaluate(
      functools.partial(
        _predict, self.graphdef, self.task, params, self.frozen
      ),
      self.metrics,
      sets,
      self.config.eval_batch_size,
    )

  def deviation(self, params):
    """|theta - theta_0| over all that is trained."""
    return float(_distance(params, self.pretrained))

  def run(self, method, strength, seed, start=None, progress=lambda loss: None):
    """Fine-tunes, and chooses a step by the first metric on validation.

    Args:
      method: an `optimizers.Method`.
      strength: the arguments of its `make`, as a dict of numbers.
      seed: of the order of the data, of augmentation, mixing and drop path.
      start: params to start from, and to anchor to; None for theta_0.
      progress: called with the loss of every step.

    Returns:
      A `Run`.

    Raises:
      FloatingPointError: if the loss is not finite.
    """
    config = self.config
    step_fn = functools.partial(
      _train_step, self.graphdef, self.task, method, config.ema
    )
    start = self.pretrained if start is None else start
    params = jax.tree.map(jnp.copy, start)
    opt_state = method.make(**strength).init(params)
    average = jax.tree.map(jnp.copy, params) if config.ema else None

    best, chosen, history, running, waited = -np.inf, None, [], None, 0.0

    def fetch():
      history.append(jax.device_get(running))
      loss = float(history[-1]['loss'])
      if not np.isfinite(loss):
        raise FloatingPointError(
          f'{method.optimizer}: the loss is {loss} at step {len(history)}; '
          f'lower the learning rate, now {strength["learning_rate"]}.'
        )
      progress(loss)

    batches = self.train(seed)
    start_time, evaluating = time.perf_counter(), 0.0
    for step in range(1, config.num_steps + 1):
      waiting_since = time.perf_counter()
      batch = next(batches)
      if step > 1:
        waited += time.perf_counter() - waiting_since
      params, opt_state, average, metrics = step_fn(
        self.frozen,
        self.pretrained,
        params,
        opt_state,
        average,
        batch,
        seed,
        step,
        strength,
      )
      # A step behind, so that the device has work while the host looks.
      if running:
        fetch()
      running = metrics
      if step % config.eval_every == 0 or step == config.num_steps:
        fetch()
        running, since = None, time.perf_counter()
        shown = params if average is None else average
        found = self.evaluate(shown, {'val': self.val})['val']
        quality = next(iter(found.values()))
        if quality >= best:
          best, chosen = quality, (step, jax.tree.map(jnp.copy, shown))
        evaluating += time.perf_counter() - since
    seconds = time.perf_counter() - start_time - evaluating
    step, params = chosen
    columns = {
      name: np.array([metrics[name] for metrics in history])
      for name in history[0]
    }
    return Run(params, step, columns, waited / seconds)


def wise_ft(pretrained, params, alpha):
  """WiSE-FT (Wortsman et al., 2022): (1 - alpha) theta_0 + alpha theta."""
  return jax.tree.map(lambda a, b: a + alpha * (b - a), pretrained, params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predict(graphdef, task, params, frozen, inputs):
  return task.predict(nnx.merge(graphdef, params, frozen), inputs)


@jax.jit
def _distance(params, pretrained):
  return optax.tree.norm(optax.tree.sub(params, pretrained))


@functools.partial(
  jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(6, 7, 8)
)
def _train_step(
  graphdef,
  task,
  method,
  ema,
  frozen,
  pretrained,
  params,
  opt_state,
  average,
  batch,
  seed,
  step,
  strength,
):
  """One step; rate and strengths are traced: one program serves a method."""
  key = jax.random.fold_in(jax.random.key(seed), step)

  def loss_fn(params):
    return task.loss(nnx.merge(graphdef, params, frozen), batch, key)

  tx = method.make(**strength)
  loss, grads = jax.value_and_grad(loss_fn)(params)
  updates, new_state = tx.update(grads, opt_state, params)
  params = optax.apply_updates(params, updates)
  if ema:
    average = optax.incremental_update(params, average, 1 - ema)
  metrics = {'loss': loss, 'deviation': _distance(params, pretrained)}
  if (spd := optax.tree.get(new_state, 'SPDState')) is not None:
    before = optax.tree.get(opt_state, 'SPDState')
    selected = spd.selected_count - before.selected_count
    decayed = spd.decayed_count - before.decayed_count
    metrics |= {'selected': selected.mean(), 'decayed': decayed.mean()}
  return params, new_state, average, metrics
