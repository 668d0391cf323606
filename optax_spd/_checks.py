"""Checks of what every public function is given."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_spd import _tree


def require_params(caller: str, params: Any) -> None:
  if params is None:
    raise ValueError(
      f'{caller}: update needs the current params; call tx.update(grads, '
      'state, params).'
    )


def require_state(caller: str, state: Any, kind: type) -> None:
  if type(state) is not kind:
    raise TypeError(
      f'{caller}: the state is a {type(state).__name__}, not a '
      f'{kind.__name__}; update needs the state that init of the same '
      'optimizer made.'
    )


INJECTED_MASK = (
  "Under optax.inject_hyperparams name 'mask' in static_args: a function that "
  'is not named there is called as a schedule, with the count of updates.'
)


def warn_if_called(caller: str, mask: Any, weight_decay: Any) -> None:
  """Warns of a mask that `optax.inject_hyperparams` has called.

  It makes arrays of numbers, and of a function of the params the one bool that
  the function returns for the count of updates. False is warned of in `init`.
  """
  if mask is True and isinstance(weight_decay, jax.Array):
    warnings.warn(
      f'{caller}: mask is True for all params, beside a weight_decay that is '
      f'an array. {INJECTED_MASK} If all are meant, leave mask out.',
      stacklevel=4,
    )


def check_numbers(
  caller: str,
  argument: str,
  tree: Any,
  *,
  below: float = np.inf,
  schedule: bool = True,
  is_tree: bool = False,
) -> None:
  """Refuses entries that are no number in [0, below).

  Tracers pass, and arrays that are spread over other processes.

  Args:
    caller: Public function that errors name.
    argument: Name of the argument that holds `tree`.
    tree: A number, or a tree of numbers where `is_tree`.
    below: What they have to stay below.
    schedule: Whether functions pass too.
    is_tree: Whether trees and arrays are numbers too.

  Raises:
    TypeError, ValueError: Naming the entry's path and value.
  """
  expected = f'a number in [0, {below:g})'
  expected += ', or a schedule that returns one' if schedule else ''
  if tree is None or not (is_tree or jax.tree_util.all_leaves([tree])):
    raise TypeError(f'{caller}: {argument} is {tree!r}, not {expected}.')
  for _, where, x in _tree.named_leaves(tree):
    if (callable(x) and schedule) or isinstance(x, jax.core.Tracer):
      continue
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      continue
    value = np.asarray(x)
    if not any(
      jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer)
    ):
      raise TypeError(f'{caller}: {argument}{where} is {x!r}, not {expected}.')
    if not is_tree and (where or value.ndim):
      raise TypeError(f'{caller}: {argument} is {tree!r}, not {expected}.')
    if not np.all((value >= 0) & (value < below)):
      raise ValueError(f'{caller}: {argument}{where} is {x}, not {expected}.')
