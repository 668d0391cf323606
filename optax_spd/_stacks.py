"""A function of every leaf, with small leaves treated together.

A model has twice as many biases and scales as matrices. They cost little to
copy, and much to trace, compile and start operations for one by one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_spd import _layers, _tree, _xla


def map_leaves(
  function: Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]],
  layers: _layers.Layers,
  *columns: list[Any],
) -> tuple[list[jax.Array | None], list[jax.Array]]:
  """Applies a function to every leaf that is not masked.

  Args:
    function: Takes a leaf and its entry of each column; returns an array of the
      parameter's shape, and some of the shape of its layers. Small leaves of
      one kind reach it as one leaf, stacked on a new first axis, as their
      entries do; it must not matter that their layers have one axis more.
    layers: The layers of the params.
    *columns: Lists that run parallel to `layers.leaves`.

  Returns:
    The arrays of the parameters' shapes, None for masked leaves; and a [layers]
    vector of each of the others.
  """
  arrays: list[jax.Array | None] = [None] * len(layers.leaves)
  groups = group(layers, *columns)
  rows = []
  for indices in groups:
    leaf = _stack_leaves([layers.leaves[i] for i in indices])
    entries = [_stack([column[i] for i in indices]) for column in columns]
    array, per_layer = function(leaf, *entries)
    rows.append(per_layer)
    parts = [array] if len(indices) == 1 else _xla.slices(array)
    for i, part in zip(indices, parts, strict=True):
      arrays[i] = part
  order = _order(layers, groups)
  return arrays, [
    layers.flatten(column)[order] for column in zip(*rows, strict=True)
  ]


def group(layers: _layers.Layers, *columns: list[Any]) -> list[list[int]]:
  """The leaves that go together, by their index; large ones each alone."""
  groups: dict[Any, list[int]] = {}
  for i, leaf in enumerate(layers.leaves):
    if leaf.shape is None:
      continue
    entries = [leaf.param, *(column[i] for column in columns)]
    present = [x for x in entries if not _tree.is_masked(x)]
    kind: Any = tuple(
      None if _tree.is_masked(x) else (np.shape(x), _tree.dtype_of(x))
      for x in entries
    )
    if np.size(leaf.param) > _xla.SMALL or any(map(_xla.is_placed, present)):
      kind = i
    groups.setdefault((leaf.shape, kind), []).append(i)
  return list(groups.values())


def _order(layers: _layers.Layers, groups: list[list[int]]) -> np.ndarray:
  """Where the layers stand in the groups, one after another."""
  sizes = [leaf.num_layers for leaf in layers.leaves]
  starts = np.cumsum([0, *sizes])
  there = [
    np.arange(starts[i], starts[i] + sizes[i])
    for indices in groups
    for i in indices
  ]
  return np.argsort(np.concatenate(there)) if there else np.arange(0)


def _stack_leaves(leaves: list[_layers.Leaf]) -> _layers.Leaf:
  first = leaves[0]
  if len(leaves) == 1:
    return first
  return dataclasses.replace(
    first,
    param=_stack([leaf.param for leaf in leaves]),
    shape=(len(leaves), *(first.shape or ())),
  )


def _stack(arrays: list[Any]) -> Any:
  """Arrays of one kind on a new first axis; one is left as it is."""
  if len(arrays) == 1 or _tree.is_masked(arrays[0]):
    return arrays[0]
  return jnp.stack(arrays)
