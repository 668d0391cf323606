"""Selective Projection Decay (SPD) as Optax gradient transformations."""

import dataclasses
import enum
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_spd import _anchor, _layers


class SPDState(NamedTuple):
  """State of SPD.

  Only `anchor` is shaped like the params. The vectors have one entry a layer,
  in the order of `layer_names`, and describe the layer's last finite step, as
  it was before `optax.apply_updates` rounded it to the dtype of the params.
  Steps that are lost in this rounding, as most are in bfloat16 params, count
  like others: keep params in float32, and compute in bfloat16.
  """

  anchor: optax.Params  # theta_0
  count: jax.Array  # type: ignore[assignment]  # updates so far, int32 []
  alignment: jax.Array  # <g_t, theta_{t-1} - theta_0>; q_t where `spd`
  # applies the rate, [layers]
  deviation: jax.Array  # |theta_t - theta_0| after the decay, [layers]
  ratio: jax.Array  # r_t, selected or not, [layers]
  decay: jax.Array  # s_t = lambda r_t where selected, else 0, [layers]
  selected_count: jax.Array  # steps with c_t < 0, int32 [layers]
  decayed_count: jax.Array  # steps with s_t > 0, int32 [layers]


class Projection(NamedTuple):
  """What `project` finds for each layer."""

  selected: jax.Array
  ratio: jax.Array
  decay: jax.Array
  deviation: jax.Array


def project(
  alignment: jax.Array,
  delta_sq: jax.Array,
  delta_u: jax.Array,
  u_sq: jax.Array,
  weight_decay: jax.Array,
) -> Projection:
  """The method: s_t in theta_t = theta~_t - s_t (theta~_t - theta_0).

  Here theta~_t = theta_{t-1} + u_t is where the base optimizer's finished step
  leads, delta = theta_{t-1} - theta_0, and g_t is the gradient at theta_{t-1}.

  Args:
    alignment: <g_t, delta>, up to a positive factor.
    delta_sq: <delta, delta>.
    delta_u: <delta, u_t>.
    u_sq: <u_t, u_t>.
    weight_decay: lambda.

  Returns:
    Whether c_t < 0, r_t, s_t and |theta_t - theta_0|, in the shape of the
    arguments: scalars for one layer, or arrays of one entry a layer.
  """
  # gamma_t^2 - gamma_{t-1}^2 = |delta + u_t|^2 - |delta|^2
  growth = 2 * delta_u + u_sq
  # gamma_{t-1} = |theta_{t-1} - theta_0|,  gamma_t = |theta~_t - theta_0|
  before = _sqrt(delta_sq)
  after = _sqrt(jnp.maximum(delta_sq + growth, 0))
  # r_t = max(0, gamma_t - gamma_{t-1}) / gamma_t, taking no difference of
  # norms; 0 where gamma_t is 0
  gamma = jnp.where(after > 0, after, jnp.inf)
  ratio = jnp.maximum(growth, 0) / gamma / (gamma + before)
  # c_t = -<g_t, theta_{t-1} - theta_0> < 0
  selected = alignment > 0
  # s_t = lambda r_t where selected, never clamped
  decay = jnp.where(selected, weight_decay * ratio, 0)
  # |theta_t - theta_0| = |1 - s_t| gamma_t
  return Projection(selected, ratio, decay, jnp.abs(1 - decay) * after)


def _sqrt(x: jax.Array) -> jax.Array:
  """The square root; its derivative at 0 is 0 instead of infinite.

  At the anchor the distance has no derivative. What is multiplied with it there
  is 0, and has to stay 0 for those who differentiate through a step.
  """
  is_zero = x == 0
  return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, x)))


class _Default(enum.Enum):
  """A rate left out, as against one given."""

  LEARNING_RATE = 2e-5

  def __repr__(self) -> str:
    return str(self.value)


def spd(
  anchor: Any = None,
  weight_decay: Any = 1.0,
  *,
  learning_rate: optax.ScalarOrSchedule | None = _Default.LEARNING_RATE,
  b1: Any = 0.9,
  mask: Any = None,
  layer_axes: Any = None,
  anchor_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Selective Projection Decay as the last link of a chain.

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

  The decay needs the finished step, so this link applies the learning rate
  and comes last: ``optax.chain(optax.scale_by_adam(), spd(learning_rate=r))``
  is a whole optimizer. A link sees the direction, not the gradient; it
  recovers the sign of :math:`c_t` from two successive directions, at one float
  a layer.

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
    weight_decay: The strength lambda, 0 or more, not multiplied by the learning
      rate. At 1, the paper's default, a decayed layer lands on its previous
      distance from the anchor; above 1 it contracts. Where lambda r_t exceeds
      1 the layer is reflected through the anchor, as in the paper. A number, a
      schedule (of the count of updates), or a tree or prefix of such, whose
      entries may be arrays of one lambda a layer, of shape
      ``leaf.shape[:layer_axes]``.
    learning_rate: A number or a schedule, read at the count before it is
      incremented. Left out it is the paper's 2e-5, with a warning. None says
      that a finished step arrives; then ``update`` needs ``grad=``.
    b1: The decay of the first moment in the link before, in [0, 1); 0.9 is the
      default of Adam. Not used where ``grad=`` is passed.
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
    _layers.check_numbers('spd', 'learning_rate', learning_rate)
  _layers.check_numbers('spd', 'b1', b1, below=1, schedule=False)
  method = _Method('spd', anchor, weight_decay, mask, layer_axes, anchor_dtype)

  def update_fn(
    updates: Any,
    state: SPDState,
    params: Any = None,
    *,
    grad: Any = None,
    **extra_args: Any,
  ) -> tuple[Any, SPDState]:
    del extra_args
    layers = method.layers(params, state)
    directions = layers.match('updates', updates)
    grads = None if grad is None else layers.match('grad', grad)
    if learning_rate is None:
      if grads is None:
        raise ValueError(
          'spd: learning_rate=None says that a finished step reaches it, and '
          'then the condition needs the raw gradient: call '
          'tx.update(grads, state, params, grad=grads), or use with_spd.'
        )
      return method.apply(layers, state, _EXACT, directions, grads)

    rate = learning_rate
    if callable(rate):
      rate = rate(state.count)
    # b1^{t-1} and b1^t
    before = b1 ** state.count.astype(jnp.float32)
    after = b1 * before

    def measure(sums: Sequence[jax.Array], rate: Any, kept: Any) -> _Measured:
      delta_sq, d_delta, d_sq, *exact = sums
      rate = rate.astype(d_sq.dtype)
      if exact:
        (alignment,) = exact
      else:
        # (1-b1^t) d_t - b1 (1-b1^{t-1}) d_{t-1} is (1-b1) g_t / sqrt(v), up to
        # the drift of v; this along delta
        q = kept  # <d_{t-1}, delta>
        alignment = (1 - after) * d_delta - b1 * (1 - before) * q
      return _Measured(
        delta_sq=delta_sq,
        delta_u=rate * d_delta,
        u_sq=rate * rate * d_sq,
        alignment=alignment,
        direction=d_delta + rate * d_sq,
      )

    rule = _Rule(-1 * rate, measure)
    return method.apply(layers, state, rule, directions, grads)

  return optax.GradientTransformationExtraArgs(method.init, update_fn)


def with_spd(
  inner: optax.GradientTransformation,
  anchor: Any = None,
  weight_decay: Any = 1.0,
  *,
  mask: Any = None,
  layer_axes: Any = None,
  anchor_dtype: Any = None,
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
  method = _Method(
    'with_spd', anchor, weight_decay, mask, layer_axes, anchor_dtype
  )

  def init_fn(params: Any) -> tuple[Any, SPDState]:
    return inner.init(params), method.init(params)

  def update_fn(
    updates: Any,
    state: tuple[Any, SPDState],
    params: Any = None,
    **extra_args: Any,
  ) -> tuple[Any, tuple[Any, SPDState]]:
    _layers.require_state('with_spd', state, tuple)
    inner_state, spd_state = state
    layers = method.layers(params, spd_state)
    grads = layers.match('updates', updates)
    updates, inner_state = inner.update(
      updates, inner_state, params, **extra_args
    )
    steps = layers.match("inner's step", updates)
    updates, spd_state = method.apply(layers, spd_state, _EXACT, steps, grads)
    return updates, (inner_state, spd_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adam_spd(
  learning_rate: optax.ScalarOrSchedule,
  anchor: Any = None,
  weight_decay: Any = 1.0,
  *,
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  eps_root: Any = 0.0,
  mu_dtype: Any = None,
  nesterov: bool = False,
  mask: Any = None,
  layer_axes: Any = None,
  anchor_dtype: Any = None,
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


class _Measured(NamedTuple):
  """What the steps of a leaf's layers, or of all layers, tell `project`."""

  delta_sq: jax.Array
  delta_u: jax.Array
  u_sq: jax.Array
  alignment: jax.Array
  # <d_t, theta~_t - theta_0>, for the next step's estimate
  direction: jax.Array | None = None

  def finite(self) -> jax.Array:
    return jnp.isfinite(
      self.delta_sq + self.delta_u + self.u_sq + self.alignment
    )

  def project(self, weight_decay: jax.Array) -> Projection:
    """`project`, which selects no step that is not finite."""
    alignment = jnp.where(self.finite(), self.alignment, 0)
    return project(
      alignment, self.delta_sq, self.delta_u, self.u_sq, weight_decay
    )


class _Rule(NamedTuple):
  """What a step is of the incoming direction, and how it is measured.

  `measure` takes the inner products <delta, delta>, <d_t, delta>, <d_t, d_t>
  and, where the gradient is known, <g_t, delta>, d_t being the direction; the
  rate, a number or one a layer; and the state's `alignment`, which it looks at
  where the gradient is not known. They are of a leaf's layers, or of all.
  """

  rate: Any  # u_t = rate d_t; None where d_t is the finished step
  measure: Callable[[Sequence[jax.Array], Any, Any], _Measured]

  def rate_of(self, d: jax.Array) -> Any:
    """The rate, rounded to the dtype of the step as Optax does."""
    if self.rate is None:
      return None
    return jnp.asarray(self.rate, d.dtype).reshape(())

  def step(self, d: jax.Array) -> jax.Array:
    return d if self.rate is None else self.rate_of(d) * d


# The finished step, and the paper's condition on the gradient.
_EXACT = _Rule(None, lambda sums, rate, kept: _Measured(*sums))


def _record(
  state: SPDState, measured: _Measured, weight_decay: jax.Array
) -> SPDState:
  """Writes a step's [layers] vectors.

  The decision is computed again, for all layers at once: to join what every
  leaf decided would compile the scalars of every leaf into every vector.
  """
  selected, ratio, s, deviation = measured.project(weight_decay)
  alignment = measured.alignment
  if measured.direction is not None:  # q_t = <d_t, theta_t - theta_0>
    alignment = (1 - s) * measured.direction
  finite = measured.finite()

  def keep(new: jax.Array, old: jax.Array) -> jax.Array:
    """`old` where the step was not finite."""
    return jnp.where(finite, new.astype(old.dtype), old)

  return state._replace(
    alignment=keep(alignment, state.alignment),
    deviation=keep(deviation, state.deviation),
    ratio=keep(ratio, state.ratio),
    decay=keep(s, state.decay),
    selected_count=state.selected_count + selected.astype(jnp.int32),
    decayed_count=state.decayed_count + (s > 0).astype(jnp.int32),
  )


@dataclasses.dataclass(frozen=True)
class _Method:
  """What the link and the wrapper share: their arguments, init and decay."""

  caller: str
  anchor: Any
  weight_decay: Any
  mask: Any
  layer_axes: Any
  anchor_dtype: Any

  def __post_init__(self) -> None:
    _anchor.check(self.caller, self.anchor, self.anchor_dtype)
    _layers.check_numbers(
      self.caller, 'weight_decay', self.weight_decay, is_tree=True
    )
    _layers.warn_if_called(self.caller, self.mask, self.weight_decay)

  def init(self, params: Any) -> SPDState:
    layers = _layers.Layers.of(self.caller, params, self.mask, self.layer_axes)
    layers.warn_if_none()
    count = layers.zeros((), jnp.int32)
    self._strengths(layers, count)
    anchor = _anchor.init(layers, params, self.anchor, self.anchor_dtype)
    shape, dtype = (layers.num_layers,), layers.dtype
    return SPDState(
      anchor=anchor,
      count=count,
      alignment=layers.zeros(shape, dtype),
      deviation=layers.zeros(shape, dtype),
      ratio=layers.zeros(shape, dtype),
      decay=layers.zeros(shape, dtype),
      selected_count=layers.zeros(shape, jnp.int32),
      decayed_count=layers.zeros(shape, jnp.int32),
    )

  def layers(self, params: Any, state: SPDState) -> _layers.Layers:
    """The layers of the params in an update, checked against the state."""
    _layers.require_params(self.caller, params)
    _layers.require_state(self.caller, state, SPDState)
    layers = _layers.Layers.of(self.caller, params, self.mask, self.layer_axes)
    if layers.num_layers != state.alignment.shape[0]:
      raise ValueError(
        f'{self.caller}: the state is of {state.alignment.shape[0]} layers, '
        f'the params have {layers.num_layers}; update needs the params, mask '
        'and layer_axes that init was given.'
      )
    return layers

  def apply(
    self,
    layers: _layers.Layers,
    state: SPDState,
    rule: _Rule,
    directions: list[Any],
    grads: list[Any] | None,
  ) -> tuple[Any, SPDState]:
    """Decays the finished steps of the layers that SPD selects.

    Args:
      layers: The layers of the params.
      state: SPD's state.
      rule: What makes steps of directions, and measures them.
      directions: d_t, leaf by leaf, or the finished steps.
      grads: g_t, leaf by leaf; None where the rule does without.

    Returns:
      The tree of updates, and the next state.
    """
    anchors = _anchor.match(layers, state.anchor, self.anchor)
    strengths = self._strengths(layers, state.count)
    evidence = layers.unflatten(state.alignment) if grads is None else grads
    updates = [
      rule.step(d) if leaf.shape is None and not _layers.is_hole(d) else d
      for leaf, d in zip(layers.leaves, directions, strict=True)
    ]
    lists = (anchors, strengths, directions, evidence)
    groups = layers.groups(*lists)
    found: list[list[jax.Array]] = []
    for group in groups:
      leaf = _layers.Leaf.stack([layers.leaves[i] for i in group])
      anchor, strength, direction, known = (
        _layers.stack([entries[i] for i in group]) for entries in lists
      )
      delta = _anchor.delta(leaf, anchor)
      d = direction.astype(delta.dtype)
      pairs = [(delta, delta), (d, delta), (d, d)]
      if grads is not None:
        pairs.append((known.astype(delta.dtype), delta))
      sums = leaf.inner(*pairs)
      found.append(sums)
      measured = rule.measure(sums, rule.rate_of(direction), known)
      s = measured.project(strength).decay
      # theta_t - theta_{t-1} = u_t - s_t (theta~_t - theta_0); where nothing
      # decays u_t itself, to the bit
      u = rule.step(direction)
      step = u.astype(delta.dtype)
      decayed = (step - leaf.expand(s) * (delta + step)).astype(u.dtype)
      update = jnp.where(leaf.expand(s == 0), u, decayed)
      for i, x in zip(group, _layers.unstack(update, len(group)), strict=True):
        updates[i] = x

    new_state = state._replace(count=optax.safe_increment(state.count))
    if found:
      back = np.argsort(layers.regroup(groups))
      sums = [
        layers.flatten(column)[back] for column in zip(*found, strict=True)
      ]
      rates = None
      if rule.rate is not None:
        rates = layers.flatten(
          jnp.broadcast_to(rule.rate_of(d), leaf.shape)
          for leaf, d in zip(layers.leaves, directions, strict=True)
          if leaf.shape is not None
        )
      measured = rule.measure(sums, rates, state.alignment)
      weight_decay = layers.flatten(x for x in strengths if x is not None)
      new_state = _record(new_state, measured, weight_decay)
    return jax.tree.unflatten(layers.treedef, updates), new_state

  def _strengths(self, layers: _layers.Layers, count: jax.Array) -> list[Any]:
    """lambda of each leaf's layers, in their shape."""
    entries = layers.match_prefix('weight_decay', self.weight_decay)
    schedules = {id(entry): entry for entry in entries if callable(entry)}
    values = {key: schedule(count) for key, schedule in schedules.items()}
    strengths: list[Any] = []
    for leaf, entry in zip(layers.leaves, entries, strict=True):
      value = values.get(id(entry), entry)
      if leaf.shape is None:
        strengths.append(None)
        continue
      if np.shape(value) not in ((), leaf.shape):
        raise ValueError(
          f'{self.caller}: weight_decay has shape {np.shape(value)} for '
          f'params{leaf.where}, whose layers have shape {leaf.shape}; pass a '
          'scalar or an array of that shape, or set layer_axes.'
        )
      value = jnp.asarray(value, _layers.accumulator(leaf))
      strengths.append(jnp.broadcast_to(value, leaf.shape))
    return strengths
