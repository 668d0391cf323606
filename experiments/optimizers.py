"""Config -> Optax: the methods of the tables as gradient transformations."""

import jax
import optax

from optax_spd import adam_spd, decay_to_anchor


def warmup_cosine(learning_rate, num_steps, warmup):
  """From 0 to `learning_rate`, linearly, and back to 0 as a cosine.

  Args:
    learning_rate: the peak; it may be traced.
    num_steps: of the whole run.
    warmup: the share of it that rises.

  Returns:
    A schedule of the count of updates.
  """
  shape = optax.warmup_cosine_decay_schedule(
    0.0, 1.0, round(warmup * num_steps), num_steps
  )
  return lambda count: learning_rate * shape(count)


def _adamw(schedule, weight_decay):
  def kernels(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)

  return optax.adamw(schedule, weight_decay=weight_decay, mask=kernels)


def _l2sp(schedule, weight_decay):
  return optax.chain(decay_to_anchor(weight_decay), optax.adam(schedule))


def _adam_spd(schedule, weight_decay):
  return adam_spd(schedule, weight_decay=weight_decay)


OPTIMIZERS = {'adamw': _adamw, 'l2sp': _l2sp, 'adam_spd': _adam_spd}


def make(name, *, learning_rate, weight_decay, num_steps, warmup):
  """One of `OPTIMIZERS`, on the `warmup_cosine` schedule.

  Args:
    name: a key of `OPTIMIZERS`. All but AdamW anchor to the params that they
      are initialised with.
    learning_rate: the peak; it may be traced.
    weight_decay: the method's own strength; it may be traced.
    num_steps: of the whole run.
    warmup: the share of it that rises.

  Returns:
    An Optax transformation.
  """
  schedule = warmup_cosine(learning_rate, num_steps, warmup)
  return OPTIMIZERS[name](schedule, weight_decay)
