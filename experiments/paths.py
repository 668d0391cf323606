"""Params by the names that lead to them."""

import jax

LORA = {'lora_a', 'lora_b'}  # names of its factors


def map_named(function, tree, *others):
  """`jax.tree.map` of a function that is given the names, a tuple, too."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: function(_names(path), *leaves), tree, *others
  )


def is_kernel(path):
  """Whether a parameter multiplies: no bias, norm, scale, embedding or token.

  By name: a bias of scanned blocks has two axes. Both factors of LoRA do.
  """
  return path[-1] in {'kernel', *LORA}


def _names(path):
  return tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
