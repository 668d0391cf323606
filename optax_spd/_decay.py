"""L2-SP: the decay towards the anchor that SPD makes selective."""

from typing import Any, NamedTuple

import jax
import optax

from optax_spd import _anchor, _checks, _layers


class DecayToAnchorState(NamedTuple):
  """State of `decay_to_anchor`."""

  anchor: optax.Params  # theta_0


def decay_to_anchor(
  weight_decay: jax.typing.ArrayLike,
  anchor: _anchor.Anchor = None,
  *,
  mask: _layers.Mask = None,
) -> optax.GradientTransformationExtraArgs:
  r"""L2-SP: pulls every step towards the anchor.

  .. math:: u' = u + \mu (\theta - \theta_0)

  Before `scale_by_adam` it is the gradient of the penalty
  :math:`\tfrac{\mu}{2} |\theta - \theta_0|^2` (L2-SP, coupled); between
  `scale_by_adam` and the learning rate it is decoupled, as AdamW's decay is.

  Args:
    weight_decay: mu, 0 or more: a number. It is multiplied by the
      learning rate that follows, unlike SPD's. The SPD paper writes the penalty
      lambda |theta - theta_0|^2, which is mu = 2 lambda.
    anchor: theta_0, as for `spd`: None (the params given to `init`), a tree, or
      'origin' (zero; then this is `optax.add_decayed_weights`).
    mask: As for `spd`: a tree of bools, a prefix of one, or a function of the
      params; False leaves a parameter alone.

  Returns:
    A transformation whose state holds the anchor.

  Raises:
    TypeError, ValueError: If an argument does not fit; the message names the
      parameter. `update` without `params` is a ValueError.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> from optax_spd import decay_to_anchor
    >>> tx = optax.chain(decay_to_anchor(1e-2), optax.adam(1e-3))
    >>> params = {'w': jnp.ones(3)}
    >>> state = tx.init(params)
    >>> grads = {'w': jnp.zeros(3)}
    >>> _, state = tx.update(grads, state, params)

  References:
    Li et al., `Explicit Inductive Bias for Transfer Learning with Convolutional
    Networks <https://arxiv.org/abs/1802.01483>`_, 2018. Algorithm 1 of the SPD
    paper.
  """
  caller = 'decay_to_anchor'
  _anchor.check(caller, anchor)
  _checks.check_numbers(caller, 'weight_decay', weight_decay, schedule=False)
  _checks.warn_if_called(caller, mask, weight_decay)

  def init_fn(params: optax.Params) -> DecayToAnchorState:
    layers = _layers.Layers.of(caller, params, mask)
    layers.warn_if_none()
    return DecayToAnchorState(_anchor.init(layers, params, anchor, None))

  def update_fn(
    updates: optax.Updates,
    state: DecayToAnchorState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, DecayToAnchorState]:
    del extra_args
    _checks.require_params(caller, params)
    _checks.require_state(caller, state, DecayToAnchorState)
    layers = _layers.Layers.of(caller, params, mask)
    new_updates = [
      u
      if leaf.shape is None
      else u + (weight_decay * _anchor.delta(leaf, theta_0)).astype(u.dtype)
      for leaf, u, theta_0 in zip(
        layers.leaves,
        layers.match('updates', updates),
        _anchor.match(layers, state.anchor, anchor),
        strict=True,
      )
    ]
    return jax.tree.unflatten(layers.treedef, new_updates), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
