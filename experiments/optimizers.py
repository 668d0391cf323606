"""Config -> Optax: the methods of the tables as gradient transformations.

A method is an optimizer, what it trains, its rate in each layer, and whether
SPD goes round it: four choices that combine freely.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import baselines, paths
from experiments.models import blocks
from optax_spd import decay_to_anchor, layer_names, with_spd

# (steps) -> a schedule from 1 to 0.
DECAYS = {
  'cosine': lambda steps: optax.cosine_decay_schedule(1.0, steps),
  'linear': lambda steps: optax.linear_schedule(1.0, 0.0, steps),
}


def warmup_decay(
  learning_rate, num_steps, warmup, start=0.0, end=0.0, decay='cosine'
):
  """From `start` up to `learning_rate`, linearly, and then down to `end`.

  Args:
    learning_rate: the peak; it may be traced.
    num_steps: of the whole run.
    warmup: the share of it that rises.
    start: the rate of the first step, where there is a warm-up.
    end: the rate after the last step.
    decay: a key of `DECAYS`.

  Returns:
    A schedule of the count of updates.
  """
  rise = round(warmup * num_steps)
  share = DECAYS[decay](num_steps - rise)

  def schedule(count):
    rising = start + (learning_rate - start) * count / max(rise, 1)
    falling = end + (learning_rate - end) * share(count - rise)
    return jnp.where(count < rise, rising, falling)

  return schedule


def _adam(schedule, _):
  return optax.adam(schedule)


def _adamw(schedule, weight_decay):
  return optax.adamw(schedule, weight_decay=weight_decay, mask=_is_kernel)


def _l2sp(schedule, weight_decay):
  return optax.chain(decay_to_anchor(weight_decay), optax.adam(schedule))


def _l2sp_origin(schedule, weight_decay):
  to_zero = _origin(functools.partial(decay_to_anchor, weight_decay))
  return optax.chain(to_zero, optax.adam(schedule))


def _l2sp_decoupled(schedule, weight_decay):
  return optax.chain(
    optax.scale_by_adam(),
    decay_to_anchor(weight_decay),
    optax.scale_by_learning_rate(schedule),
  )


def _lion(schedule, weight_decay):
  return optax.lion(schedule, weight_decay=weight_decay, mask=_is_kernel)


def _sgd(schedule, weight_decay):
  return optax.chain(
    optax.add_decayed_weights(weight_decay, _is_kernel),
    optax.sgd(schedule, momentum=0.9),
  )


def _muon(schedule, weight_decay):
  """Muon on the kernels, but the head's; Adam on the rest (Jordan, 2024).

  Its steps are scaled to the size of AdamW's (Liu et al., 2025), so that they
  serve at a study's rate. Weight decay is of what Muon steps.
  """

  def matrices(params):
    def numbers(path, leaf, stacked):
      if path[0] == 'head' or not paths.is_kernel(path):
        return None
      if leaf.ndim - stacked != 2:
        return None
      return optax.contrib.MuonDimensionNumbers(stacked, stacked + 1)

    return paths.map_named(numbers, params, blocks.layer_axes(params))

  return optax.contrib.muon(
    schedule,
    weight_decay=weight_decay,
    muon_weight_dimension_numbers=matrices,
    consistent_rms=0.2,
  )


# (schedule, weight_decay) -> an Optax transformation. The anchor of L2-SP is
# the params that it is initialised with; of l2sp_origin, zero for LoRA's
# factors. Those of FTP and DiGraP are where they start, LoRA or not.
OPTIMIZERS = {
  'adam': _adam,
  'adamw': _adamw,
  'l2sp': _l2sp,
  'l2sp_origin': _l2sp_origin,
  'l2sp_decoupled': _l2sp_decoupled,
  'lion': _lion,
  'sgd': _sgd,
  'muon': _muon,
  'ftp': lambda schedule, _: baselines.ftp(schedule),
  'digrap': lambda schedule, _: baselines.digrap(schedule),
  'digrap_1': lambda schedule, _: baselines.digrap(schedule, omega=1.0),
}

# Those that take no weight_decay.
WITHOUT_DECAY = ('adam', 'ftp', 'digrap', 'digrap_1')

# What is trained: (path of a parameter) -> bool.
TRAINED = {
  'all': lambda path: True,
  'head': lambda path: path[0] == 'head',
  # BitFit (Zaken et al., 2022): the biases, and the new head.
  'biases': lambda path: path[0] == 'head' or path[-1] == 'bias',
}


def _origin(make):
  """A pull to zero for LoRA's factors, else to the start.

  Args:
    make: anchor -> a transformation.
  """

  def anchored(params):
    return make(
      paths.map_named(
        lambda path, x: 'origin' if paths.LORA & {*path} else x, params
      )
    )

  def init(params):
    return anchored(params).init(params)

  def update(updates, state, params=None, **extra):
    # The anchor is in the state: of this one only what is zero is looked at.
    return anchored(params).update(updates, state, params, **extra)

  return optax.GradientTransformationExtraArgs(init, update)


# (anchor -> SPD) -> SPD with an anchor. Of the last one A has none at all.
ANCHORS = {
  'start': lambda make: make(None),
  'origin': _origin,
  'origin_b': _origin,
}

# (optimizer, schedule, fire) -> SPD round it, with the anchor and the other
# arguments of `with_spd` to come. For 'estimated' it is Adam without its rate.
CONDITIONS = {
  'exact': lambda tx, *_: functools.partial(with_spd, tx),
  'estimated': lambda tx, schedule, _: functools.partial(
    baselines.estimated_spd, tx, learning_rate=schedule
  ),
  'always': lambda tx, *_: functools.partial(baselines.always_spd, tx),
  'random': lambda tx, _, fire: functools.partial(
    baselines.random_spd, tx, fire=fire
  ),
}


@dataclasses.dataclass(frozen=True)
class Method:
  """What fixes the program of a method's step; hashable.

  Attributes:
    optimizer: a key of `OPTIMIZERS`.
    train: a key of `TRAINED`; the other params keep their values.
    layer_decay: a block's rate as a share of the next block's; 1 for one rate.
    spd: whether SPD goes round it.
    num_steps: of the whole run.
    warmup: the share of it in which the rate rises.
    start: the rate of the first step.
    end: the rate after the last.
    anchor_head: whether SPD pulls the head back too.
    clip_norm: of the gradient of all that is trained; 0 for no clipping.
    anchor: a key of `ANCHORS`, where SPD pulls to.
    decay: a key of `DECAYS`, of the rate.
    condition: a key of `CONDITIONS`; 'estimated' goes with 'adam' alone.
  """

  optimizer: str
  train: str
  layer_decay: float
  spd: bool
  num_steps: int
  warmup: float
  start: float
  end: float
  anchor_head: bool
  clip_norm: float = 0.0
  anchor: str = 'start'
  decay: str = 'cosine'
  condition: str = 'exact'

  def layer_names(self, params):
    """Names the layers in the vectors of the `SPDState`; none without SPD."""
    is_trained = TRAINED[self.train]

    def mask(params):
      return paths.map_named(
        lambda path, _: is_trained(path) and self._is_anchored(path), params
      )

    if not self.spd:
      return []
    return layer_names(params, mask=mask, layer_axes=blocks.layer_axes)

  def _anchored(self, params):
    return paths.map_named(lambda path, _: self._is_anchored(path), params)

  def _is_anchored(self, path):
    if self.anchor == 'origin_b' and 'lora_a' in path:
      return False
    return self.anchor_head or path[0] != 'head'

  def rate(self, step, hyperparams):
    """The learning rate of a step, counted from 1, by the args of `make`."""
    return float(self._schedule(hyperparams['learning_rate'])(step - 1))

  def _schedule(self, learning_rate):
    return warmup_decay(
      learning_rate,
      self.num_steps,
      self.warmup,
      self.start,
      self.end,
      self.decay,
    )

  def make(self, learning_rate, weight_decay, spd, fire=None):
    """The Optax transformation.

    Args:
      learning_rate: the peak of a `warmup_decay`; it may be traced.
      weight_decay: the optimizer's own; it may be traced.
      spd: lambda, where `self.spd`; it may be traced.
      fire: as `baselines.random_spd` takes it, where the condition is 'random'.
        Then `update` takes `seed` too.
    """
    schedule = self._schedule(learning_rate)
    if self.condition == 'estimated':
      tx = optax.scale_by_adam()
    else:
      tx = OPTIMIZERS[self.optimizer](schedule, weight_decay)
    if self.clip_norm:
      tx = optax.chain(optax.clip_by_global_norm(self.clip_norm), tx)
    if self.layer_decay != 1:
      tx = optax.chain(tx, _scale_by_depth(self.layer_decay))
    if self.spd:
      whole = self.anchor_head and self.anchor != 'origin_b'
      tx = ANCHORS[self.anchor](
        functools.partial(
          CONDITIONS[self.condition](tx, schedule, fire),
          weight_decay=spd,
          mask=None if whole else self._anchored,
          layer_axes=blocks.layer_axes,
        )
      )
    if self.train != 'all':
      is_trained = TRAINED[self.train]

      def labels(params):
        return paths.map_named(lambda path, _: str(is_trained(path)), params)

      tx = optax.partition({'True': tx, 'False': optax.set_to_zero()}, labels)
    return tx


def from_config(config, method):
  """What `train.FineTuning.run` takes of a study and of one of its methods.

  Returns:
    A `Method`, and the arguments of its `make`.
  """
  is_random = method.condition == 'random'
  return Method(
    method.optimizer,
    method.train,
    method.layer_decay,
    method.spd is not None,
    config.num_steps,
    config.warmup,
    method.rate * config.warmup_learning_rate,
    method.rate * config.min_learning_rate,
    method.anchor_head,
    config.clip_norm,
    method.anchor,
    config.decay,
    method.condition,
  ), {
    'learning_rate': method.rate * config.learning_rate,
    'weight_decay': method.weight_decay,
    'spd': method.spd or 0.0,
    **({'fire': np.array(method.fire, np.float32)} if is_random else {}),
  }


def _is_kernel(params):
  """No decay on biases, norms, layer scales, position embedding, class token.

  As in PEFT, both factors of LoRA decay.
  """
  return paths.map_named(lambda path, _: paths.is_kernel(path), params)


def _scale_by_depth(decay):
  """Layer-wise rate decay (Clark et al., 2020; Bao et al., 2022).

  Multiplies a finished step by decay^d, d of `blocks.depths`.
  """

  def update(updates, _):
    return jax.tree.map(
      lambda update, depth: update * jnp.asarray(decay**depth, update.dtype),
      updates,
      blocks.depths(updates),
    )

  return optax.stateless(update)
