"""A model's depth, by one convention: repeated layers are under `blocks`.

They are a list there, `blocks/3/mlp/fc1/kernel` being of block 3, or stacked on
axis 0, `blocks/mlp/fc1/kernel` being [L, ...] of all L blocks. All functions go
by the paths of the parameters alone, whatever the model. Its blocks are one
stack: indices count through.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np

# Names of what follows the blocks.
_ABOVE = {'norm', 'projection', 'unembed', 'head'}
# blocks/3/... or, stacked, blocks/...[3].
_IN_BLOCK = re.compile(r'(?:^|/)blocks/(?:(\d+)(?:/|$)|.*\[(\d+))')


def layer_axes(params):
  """How many leading axes of each parameter enumerate blocks, for SPD.

  Pass this function as the `layer_axes` of `spd`, `with_spd` or `adam_spd`, and
  each of the stacked blocks decays on its own, as it does in a list.

  Args:
    params: any pytree whose paths name the parameters.

  Returns:
    The same tree of ints: 1 for stacked blocks, else 0.
  """

  def axes(path, _):
    block = _block(_names(path))
    return int(block is not None and not block.isdigit())

  return jax.tree_util.tree_map_with_path(axes, params)


def depths(params):
  """How deep each parameter lies below the model's output.

  Args:
    params: as for `layer_axes`, of arrays.

  Returns:
    The same tree of ints: 0 for the head and what follows the blocks, 1 for the
    last block, L for block 0, L + 1 for what comes before the blocks. For
    stacked blocks an array [L, 1, ...] of the parameter's rank.
  """

  def count(path, leaf):
    block = _block(_names(path))
    if block is None:
      return 0
    return int(block) + 1 if block.isdigit() else leaf.shape[0]

  leaves = jax.tree_util.tree_leaves_with_path(params)
  L = max((count(*path_and_leaf) for path_and_leaf in leaves), default=0)

  def depth(path, leaf):
    names = _names(path)
    block = _block(names)
    if block is None:
      return 0 if _ABOVE.intersection(names) else L + 1
    if block.isdigit():
      return L - int(block)
    return np.arange(L, 0, -1).reshape(-1, *[1] * (leaf.ndim - 1))

  return jax.tree_util.tree_map_with_path(depth, params)


def from_block(first):
  """NNX filter: the blocks from `first` on and what follows them.

  Args:
    first: a block; 0 is the whole model, what comes before the blocks too.

  Returns:
    A function of a path and a value. It raises a ValueError where `first` is
    not 0 and the blocks are stacked.
  """

  def is_above(path, _):
    if not first:
      return True
    names = list(map(str, path))
    block = _block(names)
    if block is None:
      return bool(_ABOVE.intersection(names))
    if not block.isdigit():
      raise ValueError(
        f'from_block: {"/".join(names)} is of all blocks, stacked, from which '
        f'block {first} cannot be told apart; keep the blocks as a list, or '
        'take all from block 0.'
      )
    return int(block) >= first

  return is_above


def stack(params):
  """The blocks of a model as a list -> stacked.

  Args:
    params: nested dicts of arrays, block i being `[...]['blocks'][i]`.

  Returns:
    The same, with NumPy arrays [L, ...] under `blocks`.
  """

  def stacked(blocks):
    blocks = [blocks[i] for i in range(len(blocks))]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)

  return _map_blocks(stacked, params)


def unstack(params):
  """The inverse of `stack`; blocks that are a list stay."""

  def unstacked(blocks):
    if any(isinstance(name, int) for name in blocks):
      return blocks
    leaves, treedef = jax.tree.flatten(blocks)
    # Arrays are iterated over on axis 0.
    return dict(enumerate(map(treedef.unflatten, zip(*leaves, strict=True))))

  return _map_blocks(unstacked, params)


def _map_blocks(function, params):
  """`function` of all that is under the name `blocks`; the rest stays."""
  if not isinstance(params, Mapping):
    return params
  return {
    name: function(value) if name == 'blocks' else _map_blocks(function, value)
    for name, value in params.items()
  }


def _block(names):
  """What follows `blocks` in a path: an index, or a name where it is stacked.

  None outside of the blocks.
  """
  if 'blocks' not in names:
    return None
  return names[names.index('blocks') + 1]


def _names(path):
  return [jax.tree_util.keystr((key,), simple=True) for key in path]


def part(name):
  """Where a layer of `optax_spd.layer_names` lies.

  Returns:
    A number to sort by, from the input on, and 'input', 'block 3' or 'output'.
  """
  match = _IN_BLOCK.search(name)
  if match:
    block = int(match[1] or match[2])
    return block, f'block {block}'
  if _ABOVE.intersection(re.split(r'[/\[]', name)):
    return np.inf, 'output'
  return -1, 'input'
