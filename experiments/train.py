"""Fine-tuning: pretrained params -> anchor -> optimizer -> steps -> choice."""

import contextlib
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
from jax import lax

from experiments import averages, checkpoint, diagnosis, evaluate
from experiments.models import lora

# What SPD tells of each layer, as `optax_spd.SPDState` has it.
LAYERS = ('deviation', 'ratio', 'decay', 'selected_count', 'decayed_count')

# The share of decisions under which SPD did not act.
_ACTS = 0.01

# Folded into the key of a step, which the task has, for what LoRA drops.
_DROPOUT = 2**31 - 1


class State(NamedTuple):
  """What a step takes, donated, and returns; what a checkpoint holds.

  Attributes:
    params: theta_t.
    opt_state: with the anchor.
    average: the running average of the params; None where there is none.
    finite: whether every loss so far was; from the first one that was not, the
      params stay what they were.
  """

  params: Any
  opt_state: Any
  average: Any
  finite: Any

  @property
  def eval_params(self):
    """The params that are evaluated."""
    return self.params if self.average is None else self.average


@dataclasses.dataclass(frozen=True)
class Program:
  """What is compiled into a train step; hashable, and equal ones share it.

  Attributes:
    graphdef: of the model.
    task: hashable, with `loss(model, batch, key)`, a scalar.
    method: an `optimizers.Method`.
    layout: a `parallel.Layout`.
    ema: decay of the running average of the params; 0 for none.
    accumulate: parts of a batch whose gradients are averaged.
    scale: of LoRA, see `models.lora.deviation`; 1 where there is none.
  """

  graphdef: Any
  task: Any
  method: Any
  layout: Any
  ema: float = 0.0
  accumulate: int = 1
  scale: float = 1.0

  def loss(self, params, frozen, batch, seed, step, part=None):
    """The training loss; `part` is which part of the batch this one is."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    if part is not None:
      key = jax.random.fold_in(key, part)
    model = nnx.merge(self.graphdef, params, frozen)
    model = lora.with_dropout(model, jax.random.fold_in(key, _DROPOUT))
    return self.task.loss(model, batch, key)

  def step(
    self,
    frozen,
    pretrained,
    state,
    batch,
    seed,
    step,
    hyperparams,
    axis=None,
  ):
    """One step; rates and lambda are traced: one program serves a method.

    Args:
      frozen: the state of the model that is not trained.
      pretrained: theta_0.
      state: a `State`.
      batch: a tree of [B, ...].
      seed: of the run.
      step: counted from 1.
      hyperparams: the arguments of `method.make`.
      axis: the name of the devices under `jax.pmap`, whose part of the batch
        this one is; None under `jax.jit`.

    Returns:
      The next `State`, and a dict of scalars, in which 'layers' are `LAYERS`.
    """
    number = len(jax.tree.leaves(batch)[0])
    params = state.params
    if not axis:
      # Left to itself the partitioner would split activations as it finds
      # params split; they are to be split as the batch is.
      params, frozen = self.layout.constrain_whole((params, frozen))

    def loss_fn(params, batch, rows):
      part = rows[0] if self.accumulate > 1 else None
      if axis:
        part = lax.axis_index(axis) * number + rows[0]
      return self.loss(params, frozen, batch, seed, step, part)

    loss_and_grads = jax.value_and_grad(loss_fn)
    if self.accumulate > 1:
      loss_and_grads = optax.microbatching.microbatch(
        loss_and_grads,
        argnums=(1, 2),
        microbatch_size=number // self.accumulate,
        accumulator=optax.microbatching.AccumulationType.MEAN,
      )
    loss, grads = loss_and_grads(params, batch, jnp.arange(number))
    if axis:
      loss, grads = lax.pmean((loss, grads), axis)
    else:
      grads = self.layout.constrain(grads)
    finite = state.finite & jnp.isfinite(loss)
    # The seed is for those that draw: `baselines.random_spd`.
    tx = optax.with_extra_args_support(self.method.make(**hyperparams))
    updates, opt_state = tx.update(
      grads, state.opt_state, state.params, seed=seed
    )
    params = optax.apply_updates(state.params, updates)
    params = jax.tree.map(
      functools.partial(jnp.where, finite), params, state.params
    )
    average = state.average
    if self.ema:
      average = optax.incremental_update(params, average, 1 - self.ema)
    metrics = {
      'loss': loss,
      'deviation': lora.deviation(pretrained, params, self.scale),
      'path': optax.tree.norm(updates),
    }
    layers = {}
    if (spd := optax.tree.get(opt_state, 'SPDState')) is not None:
      before = optax.tree.get(state.opt_state, 'SPDState')
      layers = {key: getattr(spd, key) for key in LAYERS}
      selected = spd.selected_count - before.selected_count
      decayed = spd.decayed_count - before.decayed_count
      metrics |= {'selected': selected.mean(), 'decayed': decayed.mean()}
      metrics |= _pull(spd, before, selected, metrics['path'])
    metrics['layers'] = layers
    state = State(params, opt_state, average, finite)
    if axis:
      return state, metrics
    return self.layout.constrain(state), self.layout.constrain_whole(metrics)


def _pull(spd, before, selected, path):
  """How hard SPD pulled in a step, by the [layers] vectors of its state.

  A layer is taken back by s_t (theta~_t - theta_0), of length s_t gamma_t. The
  state has |theta_t - theta_0| = |1 - s_t| gamma_t, which tells gamma_t; where
  s_t is 1, and it is 0, gamma_t is gamma_{t-1} / (1 - r_t).

  Args:
    spd: the `SPDState` after the step.
    before: the one before it.
    selected: whether the layer was, in this step.
    path: |theta_t - theta_{t-1}| of all params.

  Returns:
    'mean_decay', of lambda r_t over the layers that were selected, and
    'decay_share', what they were taken back by, as a share of the path.
  """
  s = jnp.where(selected, spd.decay, 0)
  left = jnp.abs(1 - s)
  gamma = jnp.where(
    left > 1e-3,
    spd.deviation / jnp.maximum(left, 1e-3),
    before.deviation / jnp.maximum(1 - spd.ratio, 1e-3),
  )
  pulled = jnp.linalg.norm(s * gamma)
  return {
    'mean_decay': s.sum() / jnp.maximum(selected.sum(), 1),
    'decay_share': pulled / jnp.where(path > 0, path, 1),
  }


jit_step = jax.jit(Program.step, static_argnums=0, donate_argnums=3)


@functools.partial(
  jax.pmap,
  axis_name='devices',
  static_broadcasted_argnums=0,
  in_axes=(None, *[0] * 4, *[None] * 3),
  donate_argnums=3,
)
def _pmap_step(program, *args):
  return program.step(*args, axis='devices')


class Run(NamedTuple):
  """One fine-tuning run.

  Attributes:
    params: those of the step with the best metric on validation.
    step: that step, counted from 1.
    history: `{name: array [num_steps]}`: the loss, |theta - theta_0|, the path
      |theta_t - theta_{t-1}|, and under SPD the shares of layers selected and
      decayed in that step, and what `_pull` tells of it.
    seconds: of training, without the evaluations; of all processes that went on
      with it, one after the other.
    waiting: the share of them in which the step waited for data, but for the
      first batch, which starts the readers.
  """

  params: Any
  step: int
  history: dict[str, np.ndarray]
  seconds: float | None
  waiting: float | None


class Stopped(Exception):  # noqa: N818
  """A run was asked to stop, and has saved where it is."""


@dataclasses.dataclass(frozen=True)
class FineTuning:
  """What all methods share: the task, the model, theta_0, data, budget.

  Attributes:
    task: hashable, with
        `loss(model, batch, key)`, a float32 scalar, the mean over the examples,
        `outputs(model, batch)`, a tree of [B, ...], a small row an example,
        `metrics(outputs, eval_set)` of all rows, `{name: float}`, larger being
          better, of which the first one chooses the step;
      as `tasks.classification.Classification`.
    graphdef: of the model.
    pretrained: theta_0, the params to train, where the layout puts them.
    frozen: the other state, there too.
    train: (seed, start=0) -> an endless iterator of this process' rows of the
      batches, the first `start` of them left out.
    sets: `{name: EvalSet}` to report; the step is chosen on 'val'.
    config: `num_steps`, `eval_batch_size`, `eval_every`, `save_every`, `ema`
      and `accumulate`.
    layout: a `parallel.Layout`.
    interpolate: (theta_0, theta, alpha) -> params between the two.
    scale: see `Program`.
  """

  task: Any
  graphdef: Any
  pretrained: Any
  frozen: Any
  train: Callable[[int, int], Iterator[dict[str, np.ndarray]]]
  sets: dict[str, evaluate.EvalSet]
  config: Any
  layout: Any
  interpolate: Callable[..., Any] = averages.wise_ft
  scale: float = 1.0

  def evaluate(self, params, sets, keep=None):
    """`{name: metrics}` of `{name: EvalSet}`; `keep` as there."""

    def outputs(task, batch):
      return _outputs(self.graphdef, task, params, self.frozen, batch)

    return evaluate.evaluate(
      outputs,
      self.task,
      sets,
      self.config.eval_batch_size,
      self.layout,
      keep,
    )

  def deviation(self, params):
    """|theta - theta_0| over all that is trained; that of LoRA is |B A|."""
    return float(_deviation(self.pretrained, params, self.scale))

  def describe(self, run, keep=None):
    """What a row says of a `Run`: its metrics on every set, and its history.

    Of SPD: the shares of the decisions that selected and that decayed a layer,
    the mean of lambda r_t where it was selected, the length that layers were
    taken back by as a share of the path, and whether SPD `acted`: it decayed in
    1 % of the decisions or more.

    Args:
      run: a `Run`.
      keep: as `evaluate.evaluate` takes it.
    """
    shares = {
      key: _mean(run.history, key, weights)
      for key, weights in (
        ('selected', None),
        ('decayed', None),
        ('mean_decay', 'selected'),
        ('decay_share', 'path'),
      )
    }
    decayed = shares['decayed']
    shares['acted'] = None if decayed is None else decayed >= _ACTS
    return {
      'metrics': self.evaluate(run.params, self.sets, keep),
      'deviation': self.deviation(run.params),
      **shares,
      'step': run.step,
      'seconds': run.seconds,
      'waiting': run.waiting,
      'history': run.history,
    }

  def program(self, method):
    """The `Program` of a method's step."""
    return Program(
      self.graphdef,
      self.task,
      method,
      self.layout,
      self.config.ema,
      self.config.accumulate,
      self.scale,
    )

  def init(self, method, hyperparams, start):
    """The `State` of a run before its first step.

    Raises:
      RuntimeError: SPD's anchor is not `start`.
    """
    params = self.layout.put(start)
    opt_state = _init(method, self.layout, params, hyperparams)
    if not is_anchored(opt_state, params):
      raise RuntimeError(
        f"{method.optimizer}: SPD's anchor is not where the params start; "
        'load the pretrained params before the optimizer is initialised.'
      )
    average = self.layout.put(start) if self.config.ema else None
    return State(params, opt_state, average, self.layout.put(jnp.array(True)))

  def run(
    self,
    method,
    hyperparams,
    seed,
    start=None,
    callback=None,
    checkpoints=None,
  ):
    """Fine-tunes, and chooses a step by the first metric on validation.

    Args:
      method: an `optimizers.Method`.
      hyperparams: the arguments of its `make`, as a dict of numbers.
      seed: of the order of the data, of augmentation, mixing and drop path.
      start: params to start from, and to anchor to; None for theta_0.
      callback: called after every step, one step late, with the list of the
        metrics of every step so far (each a row of `Run.history`) and, under
        SPD, the `LAYERS`, `{name: array [layers]}` on the device, else {}.
      checkpoints: a `checkpoint.Checkpoints` to go on from and to save to; None
        for none.

    Returns:
      A `Run`.

    Raises:
      FloatingPointError: if a loss is not finite.
      Stopped: if `checkpoints` were told to stop.
      OSError, ValueError: of a checkpoint that cannot be written or read, as
        `Checkpoints` raises it.
    """
    config, layout = self.config, self.layout
    start = self.pretrained if start is None else start
    state = self.init(method, hyperparams, start)
    about = checkpoint.About(0, -np.inf, None, 0.0, 0.0)
    history, chosen, running = [], None, None
    if checkpoints:
      like, last = checkpoint.abstract(state), checkpoints.last_step
      if last is not None:
        state = None  # two have no room
        state, history, about = checkpoints.restore(like, last)
      if about.step < config.num_steps:
        checkpoints.check_space(like)
      checkpoints.begin(about.step)
    first = about.step + 1

    program = self.program(method)
    step_fn = functools.partial(
      _pmap_step if layout.pmap else jit_step,
      program,
      *layout.enter((self.frozen, self.pretrained)),
    )
    state = layout.enter(state)

    def fetch():
      step, rows, metrics = running
      metrics = layout.leave(metrics)
      layers = metrics.pop('layers')
      history.append({k: float(v) for k, v in jax.device_get(metrics).items()})
      if not np.isfinite(history[-1]['loss']):
        if checkpoints:
          checkpoints.close()
        reason = self._diagnose(
          program, layout.leave(state).params, rows, seed, step
        )
        raise FloatingPointError(
          f'{method.optimizer}: the loss is {history[-1]["loss"]} at step '
          f'{step}, where the learning rate is '
          f'{method.rate(step, hyperparams):.3g}; {reason} Lower the learning '
          f'rate, whose peak is {hyperparams["learning_rate"]:g}.'
        )
      if callback:
        callback(history, layers)

    since = time.perf_counter()
    with contextlib.closing(self.train(seed, first - 1)) as batches:
      for step in range(first, config.num_steps + 1):
        waiting_since = time.perf_counter()
        rows = next(batches)
        if step > first:
          about.waited += time.perf_counter() - waiting_since
        batch = layout.put_batch(rows, stacked=True)
        state, metrics = step_fn(state, batch, seed, step, hyperparams)
        # A step behind, so that the device has work while the host looks.
        if running:
          fetch()
        running = step, rows, metrics
        ends = step == config.num_steps
        evaluates = ends or step % config.eval_every == 0
        stops = checkpoints and checkpoints.stop_wanted(step)
        saves = checkpoints and (
          evaluates or stops or step % config.save_every == 0
        )
        if not (evaluates or saves):
          continue
        fetch()
        running, about.step = None, step
        about.seconds += time.perf_counter() - since
        at_rest = layout.leave(state)
        if evaluates:
          metrics = self.evaluate(
            at_rest.eval_params, {'val': self.sets['val']}
          )
          quality = next(iter(metrics['val'].values()))
          if quality >= about.best:
            about.best, about.best_step = quality, step
            chosen = jax.tree.map(jnp.copy, at_rest.eval_params)
        if saves:
          checkpoints.save(at_rest, history, about)
        at_rest = None
        since = time.perf_counter()
        if stops and not ends:
          checkpoints.close()
          raise Stopped(f'stopped after step {step} of {config.num_steps}')
    if chosen is None:  # before this process started
      chosen = checkpoints.restore(like, about.best_step)[0].eval_params
    if checkpoints:
      checkpoints.close()
    columns = {
      name: np.array([metrics[name] for metrics in history])
      for name in history[0]
    }
    waiting = about.waited / about.seconds
    return Run(chosen, about.best_step, columns, about.seconds, waiting)

  def _diagnose(self, program, params, rows, seed, step):
    """Why the loss of a step is not finite, a sentence."""
    try:
      return diagnosis.first_not_finite(
        program.loss,
        params,
        self.frozen,
        self.layout.put_batch(rows),
        seed,
        step,
      )
    except jax.errors.JaxRuntimeError as error:
      return f'where it comes from cannot be found out: {str(error)[:100]}.'


def _mean(history, key, weights):
  """Of a column, weighted by another one; None where there is none."""
  if key not in history:
    return None
  values = history[key]
  by = history[weights] if weights else np.ones_like(values)
  return float(np.sum(values * by) / by.sum()) if by.any() else 0.0


@functools.partial(jax.jit, static_argnums=(0, 1))
def _outputs(graphdef, task, params, frozen, batch):
  return task.outputs(nnx.merge(graphdef, params, frozen), batch)


_deviation = jax.jit(lora.deviation)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(method, layout, params, hyperparams):
  return layout.constrain(method.make(**hyperparams).init(params))


@jax.jit
def is_anchored(opt_state, params):
  """Whether SPD's anchor, where it has one, equals the params."""
  if (spd := optax.tree.get(opt_state, 'SPDState')) is None:
    return True

  def is_masked(node):
    return isinstance(node, optax.MaskedNode)

  def equal(anchor, param):
    return is_masked(anchor) or jnp.array_equal(anchor, param)

  equals = jax.tree.map(equal, spd.anchor, params, is_leaf=is_masked)
  return jnp.all(jnp.array(jax.tree.leaves(equals)))
