"""What XLA has to be told: how to sum, slice, and lay out.

Everywhere else the library is written as if the compiler did this by itself.
What each of these buys was measured by `experiments.benchmark`.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Numbers in a parameter up to which it is cheaper to copy it than to compile
# and start operations of its own for it.
SMALL = 2**14


def is_sharded(x: jax.Array) -> bool:
  """Whether an axis of `x` is sharded over an explicit mesh."""
  return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def is_placed(x: jax.Array) -> bool:
  """Whether it matters where `x` lies: sharded by its type, or on the host."""
  memory = jax.typeof(x).memory_space
  return is_sharded(x) or memory == jax.memory.Space.Host


def replicate(x: jax.Array) -> jax.Array:
  """Gathers what is sharded over an explicit mesh."""
  if is_sharded(x):
    whole = jax.sharding.PartitionSpec()
    mesh = jax.typeof(x).sharding.mesh
    x = jax.sharding.reshard(x, jax.NamedSharding(mesh, whole))
  return x


def lay_out_like(param: jax.Array, value: jax.Array) -> jax.Array:
  """Lays `value` out over the devices as `param` is, both being traced."""
  sharding = jax.typeof(param).sharding
  if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
    return jax.sharding.reshard(value, sharding)
  # On an automatic mesh the layout is known only to the partitioner, which lays
  # out alike the arrays that meet in one elementwise operation. No number is
  # less than itself, but the partitioner does not know that.
  return jnp.where(param < param, param.astype(value.dtype), value)


def sums(terms: list[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
  """Sums terms of one shape over `axes`, in one pass over memory."""
  if not axes or is_sharded(terms[0]):
    return _sums_apart(terms, axes)
  return lax.platform_dependent(
    terms,
    cpu=lambda terms: _sums_together(terms, axes),
    default=lambda terms: _sums_apart(terms, axes),
  )


def _sums_apart(
  terms: list[jax.Array], axes: tuple[int, ...]
) -> list[jax.Array]:
  """One reduction a term.

  XLA merges them on GPU and TPU: into one pass and, where the terms are
  sharded, one all-reduce for up to 256 scalars, of all parameters.
  """
  # Not vdot, ravel or reshape, which refuse sharded axes.
  return [jnp.sum(x, axis=axes) for x in terms]


# Slices that are added at once, which shortens a sum as much: LLVM does not
# reorder additions, so along an axis each waits for the one before. With eight
# XLA writes the terms to memory first.
_SLICES = 4
# Rows that a long vector is summed in, so that fewer digits are lost.
_ROWS = 256


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sums_together(
  terms: list[jax.Array], axes: tuple[int, ...]
) -> list[jax.Array]:
  """One reduction of all terms, for CPU, where XLA would make one for each.

  Short sums lose fewer digits than long ones, so first slices are added, then
  rows are summed, which the cores share, and then the sums of the rows.
  """
  partial = _add_slices(tuple(terms), axes)
  if len(axes) == 1 and partial[0].shape[axes[0]] > SMALL:
    partial = tuple(_cut_into_rows(x, axes[0]) for x in partial)
  end = partial[0].ndim - 1
  if end > axes[0]:
    partial = _reduce(partial, (end,))
  return list(_reduce(partial, range(axes[0], partial[0].ndim)))


def _add_slices(
  terms: tuple[jax.Array, ...], axes: tuple[int, ...]
) -> tuple[jax.Array, ...]:
  """Cuts each term into slices and adds them to each other.

  The shortest axis that has several in a slice is cut: it is the least likely
  to be sharded.
  """
  shape = terms[0].shape
  fitting = [
    axis
    for axis in reversed(axes)
    if shape[axis] > _SLICES and shape[axis] % _SLICES == 0
  ]
  if not fitting:
    return terms
  axis = min(fitting, key=lambda axis: shape[axis])
  slices = [jnp.split(x, _SLICES, axis) for x in terms]
  return tuple((a + b) + (c + d) for a, b, c, d in slices)


def _cut_into_rows(x: jax.Array, axis: int) -> jax.Array:
  """`x` with its last axis cut into rows, where they come out even."""
  size = x.shape[axis] // _ROWS
  if size * _ROWS != x.shape[axis]:
    return x
  return x.reshape(*x.shape[:axis], _ROWS, size)


def _reduce(
  terms: tuple[jax.Array, ...], axes: Iterable[int]
) -> tuple[jax.Array, ...]:
  return lax.reduce(terms, tuple(map(_zero, terms)), _add, tuple(axes))


@_sums_together.defjvp
def _sums_together_jvp(
  axes: tuple[int, ...], primals: Any, tangents: Any
) -> tuple[list[jax.Array], list[jax.Array]]:
  """JAX cannot transpose a reduction of several terms."""
  (terms,), (dots,) = primals, tangents
  return _sums_together(terms, axes), _sums_apart(dots, axes)


def _zero(x: jax.Array) -> np.ndarray:
  return np.zeros((), x.dtype)


def _add(
  a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
  return tuple(x + y for x, y in zip(a, b, strict=True))


def slices(array: jax.Array) -> list[jax.Array]:
  """The slices of an array along its first axis."""
  if len(array) < 2 or is_sharded(array):
    return _slices_apart(array)
  return lax.platform_dependent(
    array, cpu=_slices_together, default=_slices_apart
  )


def _slices_apart(array: jax.Array) -> list[jax.Array]:
  return [lax.index_in_dim(array, i, keepdims=False) for i in range(len(array))]


# Slices that one operation makes.
_AT_ONCE = 64


@jax.custom_jvp
def _slices_together(array: jax.Array) -> list[jax.Array]:
  """`_slices_apart` in few operations, for CPU.

  XLA compiles an operation once for all arrays of a shape, but what it fuses
  with a slice once for each slice, since each begins elsewhere. It fuses
  nothing with the result of a reduction, so the slices are passed through one:
  of each slice's bits with themselves, which changes none.
  """
  bits = lax.bitcast_convert_type(array, f'uint{array.dtype.itemsize * 8}')
  twice = [lax.broadcast(x, (2,)) for x in _slices_apart(bits)]
  passed: list[jax.Array] = []
  for i in range(0, len(twice), _AT_ONCE):
    some = tuple(twice[i : i + _AT_ONCE])
    passed += lax.reduce(some, (_zero(bits),) * len(some), _or, (0,))
  return [lax.bitcast_convert_type(x, array.dtype) for x in passed]


def _or(
  a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
  return tuple(x | y for x, y in zip(a, b, strict=True))


@_slices_together.defjvp
def _slices_together_jvp(
  primals: Any, tangents: Any
) -> tuple[list[jax.Array], list[jax.Array]]:
  """JAX cannot transpose a reduction of several terms."""
  return _slices_together(*primals), _slices_apart(*tangents)
