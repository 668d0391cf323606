"""Selective Projection Decay (SPD) as Optax gradient transformations."""

import enum
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_spd import _checks, _projection, _tree
from optax_spd._anchor import Anchor
from optax_spd._layers import LayerAxes, Mask
from optax_spd._projection import SPDState, WeightDecay


class _Default(enum.Enum):
  """A rate left out, as against one given."""

  LEARNING_RATE = 2e-5

  def __repr__(self) -> str:
    return str(self.value)


def spd(
  anchor: Anchor = None,
  weight_decay: WeightDecay = 1.0,
  *,
  learning_rate: optax.ScalarOrSchedule | None = _Default.LEARNING_RATE,
  b1: float | jax.Array = 0.9,
  mask: Mask = None,
  layer_axes: LayerAxes = None,
  anchor_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Selective Projection Decay, the last transformation of a chain.

  With :math:`u_t` the finished step of the optimizer before it,
  :math:`\tilde\theta_t = \theta_{t-1} + u_t`, and for each layer on its own,

  .. math::

    \begin{align*}
      c_t &= -\langle g_t, \theta_{t-1} - \theta_0 \rangle \\
      r_t &= \max(0, |\tilde\theta_t - \theta_0| - |\theta_{t-1} - \theta_0|)
             \, / \, |\tilde\theta_t - \theta_0| \\
      \theta_t &= \tilde\theta_t - \lambda r_t (\tilde\theta_t - \theta_0)
                  \text{ if } c_t < 0, \text{ else } \tilde\theta_t
    \end{align*}

  The decay needs the finished step, so `spd` applies the learning rate itself
  and comes last: ``optax.chain(optax.scale_by_adam(), spd(learning_rate=r))``
  is a whole optimizer. In a chain it sees the updates of the transformation
  before it, not the gradient; from two successive updates it recovers the sign
  of :math:`c_t`, at one float a layer.

  Do not use it without ``grad=`` after anything but a bias-corrected first
  moment of decay ``b1`` without Nesterov (``scale_by_adam``, its amsgrad,
  ``scale_by_belief``): after Lion, Nadam, plain momentum or a weight decay in
  the chain the estimate decays layers that should go free. `with_spd` is right
  around any optimizer. Do not use SPD to train from scratch, nor with plain SGD
  at small steps, where it never acts.

  Args:
    anchor: The pretrained weights theta_0. None takes the params given to
      ``init``, so initialise the optimizer after loading them. A tree of arrays
      is matched to the params by path; each must have its parameter's shape.
      ``'origin'`` is zero, for LoRA and adapters, and takes no memory; it may
      stand for all or for a subtree of the tree. The state keeps a copy.
    weight_decay: The paper's lambda, 0 or more, not multiplied by the learning
      rate. At 1, the paper's default, a decayed layer lands on its previous
      distance from the anchor; above 1 it contracts. Where lambda r_t exceeds
      1 the layer is reflected through the anchor, as in the paper. A number, a
      schedule (of the count of updates), or a tree or prefix of such, whose
      entries may be arrays of one lambda a layer, of shape
      ``leaf.shape[:layer_axes]``.
    learning_rate: A number or a schedule, read at the count before it is
      incremented. Left out it is the paper's 2e-5, with a warning. None says
      that a finished step arrives; then ``update`` needs ``grad=``.
    b1: The decay of the first moment in the transformation before, in [0, 1);
      0.9 is the default of Adam. Not used where ``grad=`` is passed.
    mask: A tree of bools, a prefix of one, or a function from params to one.
      False gives a parameter the plain step and no anchor: a new head, norms,
      biases. A state belongs to the mask that it was initialised with; one that
      leaves out all params is warned of. Name ``mask``, and ``layer_axes`` too,
      in the ``static_args`` of ``optax.inject_hyperparams``, which takes a
      function for a schedule and calls it with the count.
    layer_axes: A tree of ints, a prefix of one, or a function from params to
      one: how many leading axes of a parameter enumerate layers, as in scanned
      blocks. None is 0: a tensor is a layer.
    anchor_dtype: Dtype to keep the anchor in; None is each parameter's own.
      ``jnp.bfloat16`` halves the memory, but puts float32 params at a distance
      from their anchor before the first step, of about one Adam step at 2e-5.

  Returns:
    A transformation with an `SPDState`. Its ``update`` takes ``params``, and
    optionally ``grad``, the gradient at them averaged over devices: with it
    the condition is the paper's.

  Raises:
    TypeError, ValueError: If an argument is of the wrong kind, when called; if
      it does not fit the params, in ``init`` or ``update``, by the parameter's
      name. ``update`` without ``params``, or without ``grad`` where
      ``learning_rate`` is None, is a ValueError.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from optax_spd import spd
    >>> params = {'w': jnp.ones((3, 2)), 'b': jnp.zeros(2)}
    >>> tx = optax.chain(optax.scale_by_adam(), spd(learning_rate=2e-5))
    >>> state = tx.init(params)
    >>> grads = jax.tree.map(jnp.ones_like, params)
    >>> updates, state = tx.update(grads, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> optax.tree.get(state, 'SPDState').selected_count
    Array([0, 0], dtype=int32)

  References:
    Tian, Huang and Kira, `Rethinking Weight Decay for Robust Fine-Tuning of
    Foundation Models <https://arxiv.org/abs/2411.01713>`_, NeurIPS 2024.

  .. warning::
    What cannot be seen is not refused: gradients that were not averaged over
    devices before ``update``, params inside ``shard_map`` (the inner products
    would be local), params changed from outside between two updates (the
    estimate is stale for one step), and ``optax.contrib.schedule_free`` (it
    applies updates to other params than it shows). A layer whose squares leave
    the range of float32 counts as not finite.
  """
  if learning_rate is _Default.LEARNING_RATE:
    learning_rate = learning_rate.value
    warnings.warn(
      f"spd: learning_rate left out, so it is the paper's {learning_rate}. spd "
      'comes last in the chain and applies the rate itself: pass '
      'learning_rate=... here, and drop scale_by_learning_rate.',
      stacklevel=2,
    )
  if learning_rate is not None:
    _checks.check_numbers('spd', 'learning_rate', learning_rate)
  _checks.check_numbers('spd', 'b1', b1, below=1, schedule=False)
  method = _projection.Method(
    'spd', anchor, weight_decay, mask, layer_axes, anchor_dtype
  )

  def update_fn(
    updates: optax.Updates,
    state: SPDState,
    params: optax.Params | None = None,
    *,
    grad: optax.Updates | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, SPDState]:
    del extra_args
    layers = method.layers(params, state)
    leaves = layers.match('updates', updates)
    grads = None if grad is None else layers.match('grad', grad)
    if learning_rate is None:
      if grads is None:
        raise ValueError(
          'spd: learning_rate=None says that a finished step reaches it, and '
          'then the condition needs the raw gradient: call '
          'tx.update(grads, state, params, grad=grads), or use with_spd.'
        )
      return method.apply(layers, state, leaves, grads)

    rate = learning_rate
    if callable(rate):
      rate = rate(state.count)
    rate = -1 * rate
    # b1^{t-1} and b1^t
    before = b1 ** state.count.astype(jnp.float32)
    after = b1 * before

    def estimate(d_delta: jax.Array, q: jax.Array) -> jax.Array:
      # (1-b1^t) d_t - b1 (1-b1^{t-1}) d_{t-1} is (1-b1) g_t / sqrt(v), up to
      # the drift of v; this along delta, where q is <d_{t-1}, delta>
      return (1 - after) * d_delta - b1 * (1 - before) * q

    leaves = [
      _projection.scale(rate, d)
      if leaf.shape is None and not _tree.is_masked(d)
      else d
      for leaf, d in zip(layers.leaves, leaves, strict=True)
    ]
    return method.apply(
      layers, state, leaves, grads, rate=rate, estimate=estimate
    )

  return optax.GradientTransformationExtraArgs(method.init, update_fn)


def with_spd(
  inner: optax.GradientTransformation,
  anchor: Anchor = None,
  weight_decay: WeightDecay = 1.0,
  *,
  mask: Mask = None,
  layer_axes: LayerAxes = None,
  anchor_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Selective Projection Decay around any optimizer.

  Takes the step of ``inner`` and decays it as `spd` does, with the paper's
  condition on the raw gradient: the updates that it receives. Clipping by
  norm before it leaves the sign of the condition alone; under
  ``optax.MultiSteps`` and ``optax.apply_if_finite`` SPD is the inner one.

  Args:
    inner: A whole optimizer, learning rate included. A weight decay of its own
      is part of its step, and SPD comes on top.
    anchor: As for `spd`.
    weight_decay: As for `spd`.
    mask: As for `spd`.
    layer_axes: As for `spd`.
    anchor_dtype: As for `spd`.

  Returns:
    A transformation with the state ``(inner_state, SPDState)``. Its ``update``
    takes ``params`` and passes every further argument to ``inner``, ``grad``
    too.

  Raises:
    TypeError, ValueError: As for `spd`.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from optax_spd import with_spd
    >>> params = {'w': jnp.ones((3, 2)), 'b': jnp.zeros(2)}
    >>> tx = with_spd(optax.sgd(1e-3, momentum=0.9), weight_decay=0.5)
    >>> state = tx.init(params)
    >>> grads = jax.tree.map(jnp.ones_like, params)
    >>> updates, state = tx.update(grads, state, params)

  References:
    Tian, Huang and Kira, `Rethinking Weight Decay for Robust Fine-Tuning of
    Foundation Models <https://arxiv.org/abs/2411.01713>`_, NeurIPS 2024.
  """
  is_made = hasattr(inner, 'init') and hasattr(inner, 'update')
  if not is_made or isinstance(inner, type):
    raise TypeError(
      f'with_spd: inner is {inner!r}; pass the optax optimizer to wrap, with '
      'its learning rate, such as optax.adam(2e-5).'
    )
  inner = optax.with_extra_args_support(inner)
  method = _projection.Method(
    'with_spd', anchor, weight_decay, mask, layer_axes, anchor_dtype
  )

  def init_fn(params: optax.Params) -> tuple[optax.OptState, SPDState]:
    return inner.init(params), method.init(params)

  def update_fn(
    updates: optax.Updates,
    state: tuple[optax.OptState, SPDState],
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, tuple[optax.OptState, SPDState]]:
    _checks.require_state('with_spd', state, tuple)
    inner_state, spd_state = state
    layers = method.layers(params, spd_state)
    grads = layers.match('updates', updates)
    updates, inner_state = inner.update(
      updates, inner_state, params, **extra_args
    )
    steps = layers.match("inner's step", updates)
    updates, spd_state = method.apply(layers, spd_state, steps, grads)
    return updates, (inner_state, spd_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adam_spd(
  learning_rate: optax.ScalarOrSchedule,
  anchor: Anchor = None,
  weight_decay: WeightDecay = 1.0,
  *,
  b1: float | jax.Array = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  eps_root: jax.typing.ArrayLike = 0.0,
  mu_dtype: jax.typing.DTypeLike | None = None,
  nesterov: bool = False,
  mask: Mask = None,
  layer_axes: LayerAxes = None,
  anchor_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adam with Selective Projection Decay, as the paper evaluates it.

  It is ``with_spd(optax.adam(learning_rate, ...), anchor, weight_decay, ...)``
  and has no other weight decay.

  Args:
    learning_rate: As for `optax.adam`: a number or a schedule. The paper uses
      2e-5.
    anchor: As for `spd`.
    weight_decay: As for `spd`.
    b1: As for `optax.adam`.
    b2: As for `optax.adam`.
    eps: As for `optax.adam`.
    eps_root: As for `optax.adam`.
    mu_dtype: As for `optax.adam`.
    nesterov: As for `optax.adam`.
    mask: As for `spd`.
    layer_axes: As for `spd`.
    anchor_dtype: As for `spd`.

  Returns:
    As `with_spd`.

  Raises:
    TypeError, ValueError: As for `spd`.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> from optax_spd import adam_spd
    >>> tx = adam_spd(2e-5)
    >>> params = {'w': jnp.ones((3, 2))}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({'w': jnp.ones((3, 2))}, state, params)

  References:
    Tian, Huang and Kira, `Rethinking Weight Decay for Robust Fine-Tuning of
    Foundation Models <https://arxiv.org/abs/2411.01713>`_, NeurIPS 2024.
  """
  return with_spd(
    optax.adam(
      learning_rate,
      b1=b1,
      b2=b2,
      eps=eps,
      eps_root=eps_root,
      mu_dtype=mu_dtype,
      nesterov=nesterov,
    ),
    anchor,
    weight_decay,
    mask=mask,
    layer_axes=layer_axes,
    anchor_dtype=anchor_dtype,
  )
