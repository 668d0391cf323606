"""The anchor theta_0: matched to the params, checked, copied, laid out."""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_spd import _layers, _tree, _xla

ORIGIN = 'origin'

# A tree of arrays, in which 'origin' may stand for a subtree; 'origin', zero;
# None, the params given to `init`.
Anchor: TypeAlias = optax.Params | Literal['origin'] | None


def check(caller: str, anchor: Any, dtype: Any = None) -> None:
  """Refuses what can be no anchor, before any array work.

  Raises:
    TypeError: If `anchor` or the dtype to keep it in is of the wrong kind.
  """
  try:
    # An array, such as inject_hyperparams makes, is no dtype.
    is_floating = not isinstance(dtype, jax.Array) and (
      dtype is None or jnp.issubdtype(np.dtype(dtype), jnp.floating)
    )
  except TypeError:
    is_floating = False
  if not is_floating:
    raise TypeError(
      f'{caller}: anchor_dtype is {dtype!r}; it must be a floating point '
      "dtype such as jnp.bfloat16, or None for each parameter's own. Under "
      "optax.inject_hyperparams name 'anchor_dtype' in static_args."
    )
  for _, where, entry in _tree.named_leaves(anchor):
    is_array = hasattr(entry, 'shape') and hasattr(entry, 'dtype')
    is_number = isinstance(entry, (int, float, complex, np.number, np.bool_))
    if is_number and not where:
      raise TypeError(
        f'{caller}: anchor is the number {entry!r}; pass the pretrained '
        "params, None for the params given to init, or 'origin' for zero."
      )
    if entry == ORIGIN if isinstance(entry, str) else is_array or is_number:
      continue
    if not _tree.is_masked(entry):
      raise TypeError(
        f'{caller}: anchor{where} is {entry!r}; an anchor is None (the params '
        "given to init), 'origin' (zero), or a tree of arrays, in which "
        "'origin' may stand for a subtree."
      )


def init(layers: _layers.Layers, params: Any, anchor: Any, dtype: Any) -> Any:
  """Makes the anchor that the state carries.

  Args:
    layers: The layers of `params`.
    params: The params given to `init`.
    anchor: As given to the public functions.
    dtype: What to keep it in; None for each parameter's own dtype.

  Returns:
    A tree of the structure of `params`: a copy of each parameter's anchor,
    laid out over the devices as the parameter is, or `optax.MaskedNode()`
    where the anchor is the origin or the parameter is left alone. One
    `optax.MaskedNode()` where all of it is the origin, and `params` itself
    where they have no leaves, as in optax's probes of a state's structure.

  Raises:
    TypeError, ValueError: If `anchor` does not fit `params`; the message names
      the parameter and both shapes.
  """
  if isinstance(anchor, str):
    return optax.MaskedNode()
  if not layers.leaves:
    return params
  if anchor is None:
    values = [leaf.param for leaf in layers.leaves]
  else:
    values = layers.match_prefix(
      'anchor', anchor, covers=lambda entry: isinstance(entry, str)
    )
  copies = [
    optax.MaskedNode()
    if leaf.shape is None or isinstance(value, str)
    else _copy(layers.caller, leaf, value, dtype)
    for leaf, value in zip(layers.leaves, values, strict=True)
  ]
  return jax.tree.unflatten(layers.treedef, copies)


def match(layers: _layers.Layers, anchor: Any, given: Any) -> list[Any]:
  """The leaves of the state's anchor, parallel to the params'.

  Raises:
    ValueError: If they do not fit, or one has no anchor and `given`, which
      the public function was called with, is not the origin there: it was
      masked out when the state was made.
  """
  if _tree.is_masked(anchor):
    anchors = [anchor] * len(layers.leaves)
  else:
    anchors = layers.match("the state's anchor", anchor, masked=True)
  origins = [n for n, _, x in _tree.named_leaves(given) if isinstance(x, str)]
  for leaf, x in zip(layers.leaves, anchors, strict=True):
    at_origin = any(leaf.name[: len(name)] == name for name in origins)
    if leaf.shape is not None and _tree.is_masked(x) and not at_origin:
      raise ValueError(
        f'{layers.caller}: the state has no anchor for params{leaf.where}; '
        "update needs the mask that init was given, and 'origin' for the "
        'anchor where init was given it.'
      )
  return anchors


def delta(leaf: _layers.Leaf, anchor: Any) -> jax.Array:
  """theta - theta_0 of a leaf, in the dtype that its sums accumulate in."""
  dtype = leaf.accumulator
  theta = jnp.asarray(leaf.param)
  if _tree.is_masked(anchor):
    return theta.astype(dtype)
  memory = jax.typeof(theta).memory_space
  if jax.typeof(anchor).memory_space != memory:  # kept on the host
    anchor = jax.device_put(anchor, memory)
  return theta.astype(dtype) - anchor.astype(dtype)


def _copy(caller: str, leaf: _layers.Leaf, value: Any, dtype: Any) -> jax.Array:
  """Copies `value`, so that neither donation nor its owner can change it."""
  where, param = leaf.where, leaf.param
  if np.shape(value) != np.shape(param):
    raise ValueError(
      f'{caller}: anchor{where} has shape {np.shape(value)}, its parameter '
      f'{np.shape(param)}; pass the pretrained tree of the same model, or '
      'leave this parameter out with `mask`.'
    )
  given = _tree.dtype_of(value)
  if not jnp.issubdtype(given, jnp.floating):
    raise TypeError(
      f'{caller}: anchor{where} has dtype {given}; an anchor holds real '
      'floating point numbers.'
    )
  if dtype is None:
    dtype = _tree.dtype_of(param)
  if isinstance(value, jax.ShapeDtypeStruct):
    if not isinstance(param, jax.core.Tracer):
      raise ValueError(
        f'{caller}: anchor{where} is abstract, {value}; that serves '
        'jax.eval_shape(tx.init, params) alone. Pass an anchor with values.'
      )
    # A shape without an implementation: compiling it fails, by this name.
    value = jax.ffi.ffi_call('spd_anchor_is_abstract', value)()
  if isinstance(param, jax.core.Tracer):
    # A new value as it is: what lays it out hands no input back.
    return _xla.lay_out_like(param, jnp.asarray(value, dtype))
  if getattr(param, 'committed', False) or getattr(value, 'committed', False):
    # device_put first and alone: a sharded parameter's anchor may be too large
    # for one device.
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    layout = param.sharding if isinstance(param, jax.Array) else value.sharding
    # may_alias=False would not do: of a layout over several devices, the one
    # that has `value` goes on using it.
    return jnp.copy(jax.device_put(value.astype(dtype), layout))
  return jnp.array(value, dtype, copy=True)
