"""What a layer is: a parameter tensor, or one slice of a stacked one.

Whatever is indexed by layer follows one order, that of `layer_names`: the
leaves as `jax.tree.leaves` gives them and, within a stacked leaf, its leading
axes in row-major order.
"""

import dataclasses
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_spd import _checks, _tree, _xla

# Bools, and numbers of leading axes: a tree of the params' structure, one that
# begins it, or a function from the params to one.
Mask: TypeAlias = bool | optax.Params | Callable[[optax.Params], Any] | None
LayerAxes: TypeAlias = int | optax.Params | Callable[[optax.Params], Any] | None


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One parameter tensor as SPD sees it."""

  name: _tree.Name  # its path, a string a level
  where: str  # its path as error messages show it
  param: Any  # the parameter, or what stands for it where masked
  shape: tuple[int, ...] | None = ()  # of its layers; None: left alone

  @property
  def num_layers(self) -> int:
    return 0 if self.shape is None else int(np.prod(self.shape, dtype=int))

  @property
  def accumulator(self) -> Any:
    """The dtype that sums over the parameter accumulate in."""
    return _tree.promote(_tree.dtype_of(self.param), jnp.float32)

  def inner(self, *pairs: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
    """The inner product <a, b> of each pair, of shape `self.shape`."""
    axes = tuple(range(len(self.shape or ()), np.ndim(self.param)))
    return _xla.sums([a * b for a, b in pairs], axes)

  def expand(self, per_layer: jax.Array) -> jax.Array:
    """`per_layer` with the trailing axes to broadcast it over the parameter."""
    return jnp.expand_dims(
      per_layer, tuple(range(per_layer.ndim, np.ndim(self.param)))
    )


@dataclasses.dataclass(frozen=True)
class Layers:
  """The params of one model, cut into layers.

  Lists that the methods take or return run parallel to `leaves`; they hold
  None, or whatever the tree holds there, for leaves that are left alone.
  """

  caller: str  # the public function that errors name
  leaves: Sequence[Leaf]
  treedef: Any

  @classmethod
  def of(
    cls, caller: str, params: Any, mask: Any = None, layer_axes: Any = None
  ) -> 'Layers':
    """Cuts `params` into layers.

    Args:
      caller: Public function that errors name.
      params: Arrays, tracers or `jax.ShapeDtypeStruct`s. Nodes that
        `optax.masked` took out are leaves that are left alone.
      mask: Tree of bools, a prefix of one, or a function of the params; False
        leaves a parameter alone.
      layer_axes: Tree of ints, a prefix of one, or a function of the params:
        how many leading axes of a parameter enumerate layers.

    Raises:
      TypeError, ValueError: If one of them does not fit; the message names
        the parameter.
    """
    leaves = [
      Leaf(name, where, param, None if _tree.is_masked(param) else ())
      for name, where, param in _tree.named_leaves(params)
    ]
    treedef = jax.tree.structure(params, is_leaf=_tree.is_masked)
    self = cls(caller, leaves, treedef)
    if not leaves:  # optax probes `init` with such a tree
      return self
    if mask is not None:
      flags = self.match_prefix('mask', _call(mask, params))
      self = self._with_shapes(_masked_shape, flags)
    for leaf in self.leaves:
      _check_dtype(caller, leaf)
    if layer_axes is not None:
      axes = self.match_prefix('layer_axes', _call(layer_axes, params))
      self = self._with_shapes(_stacked_shape, axes)
    return self

  def _with_shapes(
    self, shape: Callable[..., tuple[int, ...] | None], entries: list[Any]
  ) -> 'Layers':
    leaves = [
      leaf
      if leaf.shape is None
      else dataclasses.replace(leaf, shape=shape(self.caller, leaf, entry))
      for leaf, entry in zip(self.leaves, entries, strict=True)
    ]
    return dataclasses.replace(self, leaves=leaves)

  @property
  def num_layers(self) -> int:
    return sum(leaf.num_layers for leaf in self.leaves)

  def names(self) -> list[str]:
    return [
      '/'.join(leaf.name) + (f'[{", ".join(map(str, index))}]' if index else '')
      for leaf in self.leaves
      if leaf.shape is not None
      for index in np.ndindex(leaf.shape)
    ]

  def match(
    self, argument: str, tree: Any, *, masked: bool = False
  ) -> list[Any]:
    """The leaves of a tree of the params' structure and shapes.

    With `masked`, leaves may be masked that the params' are not.
    """
    try:
      matched = self.treedef.flatten_up_to(tree)
    except ValueError as error:
      names = {leaf.name: leaf.where for leaf in self.leaves}
      given = {name: where for name, where, _ in _tree.named_leaves(tree)}
      missing = [where for name, where in names.items() if name not in given]
      surplus = [where for name, where in given.items() if name not in names]
      detail = f'missing {missing[:3]}, surplus {surplus[:3]}'
      if not missing and not surplus:
        detail = f'the containers differ: {" ".join(str(error).split())[:70]}'
      raise ValueError(
        f'{self.caller}: {argument} must have the structure of the params: '
        f'{detail}.'
      ) from None
    for leaf, x in zip(self.leaves, matched, strict=True):
      if leaf.shape is None or (masked and _tree.is_masked(x)):
        continue
      if x is None or _tree.is_masked(x):
        raise ValueError(
          f'{self.caller}: {argument}{leaf.where} is {x}, its parameter is '
          'not; leave both out or neither.'
        )
      if np.shape(x) != np.shape(leaf.param):
        raise ValueError(
          f'{self.caller}: {argument}{leaf.where} has shape {np.shape(x)}, '
          f'its parameter {np.shape(leaf.param)}; it must be of the same shape.'
        )
      if not jnp.issubdtype(_tree.dtype_of(x), jnp.floating):
        raise TypeError(
          f'{self.caller}: {argument}{leaf.where} has dtype '
          f'{_tree.dtype_of(x)}, but its parameter is real floating point; '
          'leave it out with `mask`.'
        )
    return matched

  def match_prefix(
    self,
    argument: str,
    prefix: Any,
    covers: Callable[[Any], bool] = lambda entry: True,
  ) -> list[Any]:
    """The entry of `prefix` that each leaf falls under, by its path.

    By path, so that the containers may differ: a dict, a FrozenDict, an
    `nnx.State`, a list that a checkpoint gave back as a dict.

    Args:
      argument: Name of the argument that holds `prefix`.
      prefix: One entry for all, or a tree whose paths are those of the leaves
        or begin them. What lies under a path that is left alone is ignored.
      covers: Whether an entry may stand for all that lies under its path.

    Raises:
      ValueError: If a leaf falls under no entry, or an entry over no leaf.
    """
    entries = {
      name: (where, entry)
      for name, where, entry in _tree.named_leaves(prefix)
      if not _tree.is_masked(entry)
    }
    matched, used = [], set()
    for leaf in self.leaves:
      above = [leaf.name[:n] for n in range(len(leaf.name))]
      name = next(
        (n for n in above if n in entries and covers(entries[n][1])), leaf.name
      )
      used.add(name)
      if name in entries:
        matched.append(entries[name][1])
      elif leaf.shape is None:
        matched.append(None)
      else:
        raise ValueError(
          f'{self.caller}: {argument} has nothing for the parameter '
          f'params{leaf.where}; give it an entry, or leave the parameter out '
          'with `mask`.'
        )
    for name, (where, _) in entries.items():
      if name not in used and not self._is_left_alone(name):
        raise ValueError(
          f'{self.caller}: {argument}{where} belongs to no parameter; pass a '
          "tree of the params' structure, or drop this entry."
        )
    return matched

  def _is_left_alone(self, name: _tree.Name) -> bool:
    """Whether the part of the params that `name` leads to is masked out."""
    for n in range(len(name), -1, -1):
      under = [leaf for leaf in self.leaves if leaf.name[:n] == name[:n]]
      if under:
        return all(leaf.shape is None for leaf in under)
    return True

  def warn_if_none(self) -> None:
    """Warns where a mask leaves out all params that there are."""
    masked = [leaf for leaf in self.leaves if not _tree.is_masked(leaf.param)]
    if masked and all(leaf.shape is None for leaf in masked):
      warnings.warn(
        f'{self.caller}: mask leaves out every parameter, from params'
        f'{masked[0].where} on, so nothing is pulled back. '
        f'{_checks.INJECTED_MASK} Inside optax.partition, give a group that is '
        'left out the plain optimizer.',
        stacklevel=2,
      )

  def zeros(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros, replicated over the devices that hold the params."""
    return jnp.zeros(shape, dtype, device=self._replicated())

  def _replicated(self) -> jax.sharding.Sharding | None:
    for leaf in self.leaves:
      x = leaf.param
      if isinstance(x, jax.core.Tracer) or not getattr(x, 'committed', False):
        continue
      if isinstance(x.sharding, jax.sharding.NamedSharding):
        mesh = x.sharding.mesh
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
      if len(x.sharding.device_set) == 1:
        return jax.sharding.SingleDeviceSharding(*x.sharding.device_set)
    return None

  @property
  def dtype(self) -> Any:
    """The dtype of the [layers] vectors."""
    dtypes = [leaf.accumulator for leaf in self.leaves if leaf.num_layers]
    return _tree.promote(jnp.float32, *dtypes)

  def flatten(self, per_leaf: Iterable[jax.Array]) -> jax.Array:
    """Joins arrays of the leaves' layer shapes to a [layers] vector."""
    flat = [jnp.ravel(_xla.replicate(x)) for x in per_leaf]
    dtype = _tree.promote(*(x.dtype for x in flat))
    return jnp.concatenate([x.astype(dtype) for x in flat])

  def unflatten(self, flat: jax.Array) -> list[Any]:
    """Cuts a [layers] vector into arrays of the leaves' layer shapes."""
    used = [leaf for leaf in self.leaves if leaf.shape is not None]
    if any(leaf.shape for leaf in used):  # few leaves, and maybe many layers
      starts = np.cumsum([0, *[leaf.num_layers for leaf in used]])
      pieces = [
        flat[start : start + leaf.num_layers].reshape(leaf.shape)
        for leaf, start in zip(used, starts, strict=False)
      ]
    else:
      pieces = _xla.slices(flat)
    cut = iter(pieces)
    return [None if leaf.shape is None else next(cut) for leaf in self.leaves]


def layer_names(
  params: optax.Params, *, mask: Mask = None, layer_axes: LayerAxes = None
) -> list[str]:
  """Names the entries of the [layers] vectors in `SPDState`.

  Args:
    params: The params that the optimizer was initialised with, or their shapes
      as `jax.eval_shape` gives them.
    mask: As given to the optimizer.
    layer_axes: As given to the optimizer.

  Returns:
    One name a layer, in the order of the vectors: the parameter's path joined
    by slashes, then its indices along the layer axes where it holds several.

  Raises:
    TypeError, ValueError: If `mask` or `layer_axes` does not fit `params`.

  Example:
    >>> import jax.numpy as jnp
    >>> from optax_spd import layer_names
    >>> params = {'head': jnp.ones((2, 3)), 'blocks': {'w': jnp.ones((2, 4))}}
    >>> layer_names(params, layer_axes={'head': 0, 'blocks': 1})
    ['blocks/w[0]', 'blocks/w[1]', 'head']
  """
  return Layers.of('layer_names', params, mask, layer_axes).names()


def _call(tree: Any, params: Any) -> Any:
  """`tree`, or what it returns for `params` where it is a function."""
  is_function = callable(tree) and jax.tree_util.all_leaves([tree])
  return tree(params) if is_function else tree


def _masked_shape(caller: str, leaf: Leaf, flag: Any) -> tuple[int, ...] | None:
  if not isinstance(flag, (bool, np.bool_)):
    raise TypeError(
      f'{caller}: mask is {flag!r} for params{leaf.where}; it must be True '
      '(SPD acts) or False (the plain step). Under optax.inject_hyperparams '
      "name 'mask' in static_args."
    )
  return () if flag else None


def _stacked_shape(caller: str, leaf: Leaf, axes: Any) -> tuple[int, ...]:
  shape = np.shape(leaf.param)
  try:
    if isinstance(axes, bool):
      raise TypeError
    n = operator.index(axes)
  except TypeError:  # a tracer's too
    raise TypeError(
      f'{caller}: layer_axes is {axes!r} for params{leaf.where}; it must be an '
      'int, the number of leading axes that enumerate layers. Under '
      "optax.inject_hyperparams name 'layer_axes' in static_args."
    ) from None
  if not 0 <= n <= len(shape):
    raise ValueError(
      f'{caller}: layer_axes is {n} for params{leaf.where} of shape {shape}; '
      f'it must lie in 0..{len(shape)}.'
    )
  return shape[:n]


def _check_dtype(caller: str, leaf: Leaf) -> None:
  if leaf.shape is None:
    return
  dtype = _tree.dtype_of(leaf.param)
  if jnp.issubdtype(dtype, jnp.floating):
    return
  remedy = 'mask it out'
  if jnp.issubdtype(dtype, jnp.complexfloating):
    remedy += ', or wrap with optax.contrib.split_real_and_imaginary'
  raise TypeError(
    f'{caller}: params{leaf.where} has dtype {dtype}, but SPD is defined for '
    f'real floating point parameters; {remedy}.'
  )
