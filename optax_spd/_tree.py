"""Leaves of a tree: their paths, their dtypes, and which of them are masked."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import optax

Name = tuple[str, ...]


def named_leaves(tree: Any) -> list[tuple[Name, str, Any]]:
  """The leaves of `tree`, masked ones among them.

  Returns:
    For each its path, a string a level; the same as errors show it; the leaf.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)
  # Flax NNX keeps an array as the only `value` of a Variable: no level of ours.
  value = jax.tree_util.GetAttrKey('value')
  siblings = collections.Counter(path[:-1] for path, _ in flat)
  named = []
  for path, leaf in flat:
    if path[-1:] == (value,) and siblings[path[:-1]] == 1:
      path = path[:-1]
    name = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    named.append((name, jax.tree_util.keystr(path), leaf))
  return named


def is_masked(x: Any) -> bool:
  """Whether `x` stands where `optax.masked` took something out."""
  return isinstance(x, optax.MaskedNode)


def dtype_of(x: Any) -> Any:
  """The dtype that jax gives an array, a `jax.ShapeDtypeStruct` or a number."""
  dtype = x.dtype if hasattr(x, 'dtype') else jnp.result_type(x)
  return jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)


def promote(*dtypes: Any) -> Any:
  """The dtype that numbers of several dtypes are computed in."""
  with jax.numpy_dtype_promotion('standard'):  # the user's may be strict
    return jnp.result_type(*dtypes)
