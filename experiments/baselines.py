"""What SPD is held against: FTP, DiGraP, and SPD under other conditions.

All of them know a theta_0, which is what they are initialised with, and take
each layer by itself: a tensor, or one of the stacked blocks of a tensor.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import paths
from experiments.models import blocks
from optax_spd import spd

# The rate at which FTP's authors learn their radius.
_RATE = 1e-2
# Their least radius, which is also added to a norm.
_LEAST = 1e-8
# Folded into the key of a step, from which its data and dropout are drawn.
_FIRES = 2**31 - 2


class FTPState(NamedTuple):
  """State of `ftp`, of all params but the head."""

  adam: Any
  anchor: Any  # theta_0
  distance: Any  # d_{t-1} = theta~_{t-1} - theta_0, before the projection
  radius: Any  # gamma_{t-1}, one a layer
  radius_adam: Any


def ftp(schedule):
  r"""Fast Trainable Projection: Adam within a learned radius about theta_0.

  With d_t = theta_{t-1} + u_t - theta_0, u_t Adam's step, and |.| the sum of
  the absolute values of a row (the MARS norm), in every layer

    gamma_t = gamma_{t-1} - Adam(sum over rows <g_t, d_{t-1}> / |d_{t-1}|)
    theta_t = theta_0 + min(1, gamma_t / |d_t|) d_t, row by row

  with gamma_1 = 1e-8 and gamma_t from there to the largest |d_t|. A row is what
  makes one output of a kernel; of anything else it is the whole. The head is
  new, and takes Adam's step. The authors' k, a factor of steps that shrink the
  radius, is 1, their default; their weight decay is 0.

  Args:
    schedule: the learning rate, of the count of updates.

  References:
    Tian et al., "Fast Trainable Projection for Robust Fine-Tuning", NeurIPS
    2023, and the code of its authors, github.com/GT-RIPL/FTP.
  """
  return optax.partition(
    {'pretrained': _ftp(schedule), 'head': optax.adam(schedule)},
    lambda params: paths.map_named(
      lambda path, _: 'head' if path[0] == 'head' else 'pretrained', params
    ),
  )


def _ftp(schedule):
  adam, radius_adam = optax.adam(schedule), optax.adam(_RATE)

  def init(params):
    radius = jax.tree.map(lambda zero: zero + _LEAST, _zeros(params))
    return FTPState(
      adam.init(params),
      _copy(params),
      jax.tree.map(jnp.zeros_like, params),
      radius,
      radius_adam.init(radius),
    )

  def norm(d, row):
    return _sum(jnp.abs(d), row) + _LEAST

  def slope(d, axes, row, g):
    return _sum(_sum(g * d, row) / norm(d, row), axes)

  def clip(d, axes, row, radius, change):
    largest = jnp.max(norm(d, row), axes, keepdims=True)
    return jnp.clip(radius + change, _LEAST, largest)

  def project(d, _, row, radius, p, anchor, u):
    share = radius / norm(d, row)
    return jnp.where(share < 1, share * d - (p - anchor), u)

  def update(grads, state, params=None):
    steps, adam_state = adam.update(grads, state.adam, params)
    slopes = _map(slope, state.distance, grads)
    changes, radius_state = radius_adam.update(slopes, state.radius_adam)
    distance = jax.tree.map(
      lambda p, anchor, u: p - anchor + u, params, state.anchor, steps
    )
    radius = _map(clip, distance, state.radius, changes)
    steps = _map(project, distance, radius, params, state.anchor, steps)
    return steps, FTPState(
      adam_state, state.anchor, distance, radius, radius_state
    )

  return optax.GradientTransformation(init, update)


class DiGraPState(NamedTuple):
  """State of `digrap`."""

  anchor: Any  # theta_0
  component: Any  # p_{t-1}; None where omega is fixed
  omega: Any  # omega_{t-1}, one a layer; None where it is fixed
  omega_adam: Any


def digrap(schedule, omega=None):
  r"""DiGraP: Adam on gradients that lead away from theta_0 less freely.

  With delta = theta_{t-1} - theta_0, in every layer

    p_t = <g_t, delta> / |delta|^2 delta where <g_t, delta> < 0, else 0
    omega_t = omega_{t-1} - Adam(<g_t, p_{t-1}> / |g_t| |p_{t-1}|)
    Adam's step on g_t - omega_t p_t

  with omega_1 = 0 and omega_t in [0, 1]. It is exploratory: of the paper its
  figure and algorithm were at hand, and neither its code nor how it normalises
  what omega follows; the cosine, and Adam's rate of 1e-2, are FTP's in spirit.

  Args:
    schedule: the learning rate, of the count of updates.
    omega: fixed, in [0, 1]; None to learn it.

  References:
    Huang et al., "Directional Gradient Projection for Robust Fine-Tuning of
    Foundation Models", ICLR 2025.
  """
  return optax.chain(_remove_outward(omega), optax.adam(schedule))


def _remove_outward(fixed):
  omega_adam = optax.adam(_RATE)

  def init(params):
    anchor = _copy(params)
    if fixed is not None:
      return DiGraPState(anchor, None, None, None)
    omega = _zeros(params)
    component = jax.tree.map(jnp.zeros_like, params)
    return DiGraPState(anchor, component, omega, omega_adam.init(omega))

  def outward(g, axes, _, p, anchor):
    delta = p - anchor
    along = _sum(g * delta, axes)
    square = _sum(delta * delta, axes)
    leads_out = (along < 0) & (square > 0)
    share = jnp.where(leads_out, along / jnp.where(leads_out, square, 1), 0)
    return share * delta

  def cosine(g, axes, _, component):
    squares = _sum(g * g, axes), _sum(component * component, axes)
    norms = jnp.sqrt(squares[0]) * jnp.sqrt(squares[1])
    along = _sum(g * component, axes)
    return jnp.where(norms > 0, along / jnp.where(norms > 0, norms, 1), 0)

  def update(grads, state, params=None):
    component = _map(outward, grads, params, state.anchor)
    if fixed is not None:
      steps = jax.tree.map(lambda g, p: g - fixed * p, grads, component)
      return steps, state
    slopes = _map(cosine, grads, state.component)
    changes, adam_state = omega_adam.update(slopes, state.omega_adam)
    omega = jax.tree.map(
      lambda w, change: jnp.clip(w + change, 0, 1), state.omega, changes
    )
    steps = jax.tree.map(lambda g, w, p: g - w * p, grads, omega, component)
    return steps, DiGraPState(state.anchor, component, omega, adam_state)

  return optax.GradientTransformation(init, update)


def estimated_spd(adam, anchor=None, *, learning_rate, **keys):
  """SPD as the last link of a chain, which sees no gradient: `optax_spd.spd`.

  Args:
    adam: `optax.scale_by_adam`, alone or with what comes before and after it.
    anchor: as for `spd`; so are the rest.
    learning_rate: see there.
    **keys: see there.
  """
  return optax.chain(adam, spd(anchor, learning_rate=learning_rate, **keys))


def always_spd(inner, anchor=None, **keys):
  """`with_spd` without the condition: every step out is taken back in part.

  At lambda = 1 no layer gets further than its first step took it.

  Args:
    inner: a whole optimizer.
    anchor: as for `with_spd`, but no string; so are the rest.
    **keys: see there.
  """
  return _spd_on(
    lambda state, params, seed: jax.tree.map(lambda p: 1.0, params),
    inner,
    anchor,
    keys,
  )


def random_spd(inner, anchor=None, *, fire, mask=None, layer_axes, **keys):
  """`with_spd` with a condition that is drawn, layer by layer.

  Args:
    inner: a whole optimizer.
    anchor: as for `with_spd`, but no string; so are the rest.
    fire: the probability that a layer is selected, [1] for all, or [layers] in
      the order of `optax_spd.layer_names`; it may be traced.
    mask: None, or a function of the params.
    layer_axes: a function of the params.
    **keys: see there.

  Returns:
    A transformation whose `update` takes `seed`, an int of the run, too.

  Raises:
    ValueError: of another number of probabilities, in `init`.
  """

  def signs(state, params, seed):
    """1 for a layer that is drawn, else -1."""
    key = jax.random.fold_in(jax.random.key(seed), state.count)
    key = jax.random.fold_in(key, _FIRES)
    rest = jax.random.uniform(key, state.alignment.shape) < fire
    leaves, treedef = jax.tree.flatten(params)
    axes = jax.tree.leaves(layer_axes(params))
    masks = jax.tree.leaves(mask(params)) if mask else [True] * len(leaves)
    drawn = []
    for leaf, n, is_anchored in zip(leaves, axes, masks, strict=True):
      number = math.prod(leaf.shape[:n]) if is_anchored else 0
      own, rest = rest[:number], rest[number:]
      shape = leaf.shape[:n] + (1,) * (leaf.ndim - n)
      drawn.append(jnp.where(own, 1.0, -1.0).reshape(shape) if number else 0.0)
    return jax.tree.unflatten(treedef, drawn)

  tx = _spd_on(
    signs, inner, anchor, {'mask': mask, 'layer_axes': layer_axes, **keys}
  )

  def init(params):
    state = tx.init(params)
    number, layers = np.size(fire), state[1].alignment.size
    if number not in (1, layers):
      raise ValueError(
        f'fire has {number} probabilities, SPD {layers} layers; give one for '
        'all, or one each in the order of optax_spd.layer_names.'
      )
    return state

  return tx._replace(init=init)


def _spd_on(signs, inner, anchor, keys):
  """SPD that selects the layers whose sign is positive."""
  inner = optax.with_extra_args_support(inner)
  outer = spd(anchor, learning_rate=None, **keys)

  def init(params):
    return inner.init(params), outer.init(params)

  def update(grads, state, params=None, *, seed=0, **extra):
    inner_state, spd_state = state
    steps, inner_state = inner.update(grads, inner_state, params, **extra)
    # SPD selects where <grad, theta - theta_0> > 0. Where the anchor is the
    # origin, or there is none, the state has nothing to subtract.
    grad = jax.tree.map(
      lambda p, sign, x: sign * (p if _is_masked(x) else p - x),
      params,
      signs(spd_state, params, seed),
      spd_state.anchor,
    )
    steps, spd_state = outer.update(steps, spd_state, params, grad=grad)
    return steps, (inner_state, spd_state)

  return optax.GradientTransformationExtraArgs(init, update)


def _is_masked(node):
  return isinstance(node, optax.MaskedNode)


def _map(function, tree, *others):
  """`jax.tree.map` of a function of a leaf, its axes, those of a row, others.

  The axes are those of a layer: of stacked blocks all but the first.
  """

  def by_layer(path, leaf, number, *rest):
    axes = tuple(range(number, leaf.ndim))
    row = axes[:-1] if paths.is_kernel(path) else axes
    return function(leaf, axes, row, *rest)

  return paths.map_named(by_layer, tree, blocks.layer_axes(tree), *others)


def _zeros(params):
  """Zero a layer."""
  return _map(lambda p, axes, _: _sum(jnp.zeros_like(p), axes), params)


def _sum(x, axes):
  return jnp.sum(x, axes, keepdims=True)


def _copy(tree):
  return jax.tree.map(jnp.copy, tree)
