"""What a layer is: a parameter tensor, or one slice of a stacked one.

Whatever is indexed by layer follows one order, that of `layer_names`: the
leaves as `jax.tree.leaves` gives them and, within a stacked leaf, its leading
axes in row-major order.
"""

import collections
import dataclasses
import functools
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

Name = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One parameter tensor as SPD sees it."""

  name: Name  # its path, a string a level
  where: str  # its path as error messages show it
  param: Any  # the parameter, or the hole that stands for it
  shape: tuple[int, ...] | None = ()  # of its layers; None: left alone

  @property
  def num_layers(self) -> int:
    return 0 if self.shape is None else int(np.prod(self.shape, dtype=int))

  @classmethod
  def stack(cls, leaves: list['Leaf']) -> 'Leaf':
    """Leaves of one shape as one, which holds the layers of all of them."""
    first = leaves[0]
    if len(leaves) == 1:
      return first
    return dataclasses.replace(
      first,
      param=stack([leaf.param for leaf in leaves]),
      shape=(len(leaves), *(first.shape or ())),
    )

  def inner(self, *pairs: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
    """The inner product <a, b> of each pair, of shape `self.shape`."""
    axes = tuple(range(len(self.shape or ()), np.ndim(self.param)))
    return _sums([a * b for a, b in pairs], axes)

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
      Leaf(name, where, param, None if is_hole(param) else ())
      for name, where, param in named_leaves(params)
    ]
    treedef = jax.tree.structure(params, is_leaf=is_hole)
    self = cls(caller, leaves, treedef)
    if not leaves:  # optax probes `init` with such a tree
      return self
    if mask is not None:
      mask = _call(mask, params)
      self = self._with_shapes(_masked_shape, self.match_prefix('mask', mask))
    for leaf in self.leaves:
      _check_dtype(caller, leaf)
    if layer_axes is not None:
      layer_axes = _call(layer_axes, params)
      axes = self.match_prefix('layer_axes', layer_axes)
      self = self._with_shapes(_stacked_shape, axes)
    return self

  def groups(self, *columns: list[Any]) -> list[list[int]]:
    """Leaves that can be stacked, as indices; the others each on its own.

    A model has twice as many biases and scales as matrices, which cost little
    to copy, and much to trace, compile and start one by one.

    Args:
      *columns: Lists that run parallel to `leaves`, to be stacked too.
    """
    found: dict[Any, list[int]] = {}
    for i, leaf in enumerate(self.leaves):
      if leaf.shape is None:
        continue
      arrays = [leaf.param, *(column[i] for column in columns)]
      kind: Any = tuple(None if is_hole(x) else _kind(x) for x in arrays)
      if np.size(leaf.param) > _SMALL or any(map(_is_placed, arrays)):
        kind = i
      found.setdefault((leaf.shape, kind), []).append(i)
    return list(found.values())

  def regroup(self, groups: list[list[int]]) -> np.ndarray:
    """Where in a [layers] vector each layer of the groups stands, in turn."""
    sizes = [leaf.num_layers for leaf in self.leaves]
    starts = np.cumsum([0, *sizes])
    return np.concatenate(
      [
        np.arange(starts[i], starts[i] + sizes[i])
        for group in groups
        for i in group
      ]
    )

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
    self, argument: str, tree: Any, *, holes: bool = False
  ) -> list[Any]:
    """The leaves of a tree of the params' structure and shapes.

    With `holes`, it may have holes where the params have none.
    """
    try:
      found = self.treedef.flatten_up_to(tree)
    except ValueError as error:
      names = {leaf.name: leaf.where for leaf in self.leaves}
      given = {name: where for name, where, _ in named_leaves(tree)}
      missing = [where for name, where in names.items() if name not in given]
      surplus = [where for name, where in given.items() if name not in names]
      if not missing and not surplus:
        detail = f'the containers differ: {" ".join(str(error).split())[:70]}'
      else:
        detail = f'missing {missing[:3]}, surplus {surplus[:3]}'
      raise ValueError(
        f'{self.caller}: {argument} must have the structure of the params: '
        f'{detail}.'
      ) from None
    for leaf, x in zip(self.leaves, found, strict=True):
      if leaf.shape is None or (is_hole(x) and holes):
        continue
      if x is None or is_hole(x):
        raise ValueError(
          f'{self.caller}: {argument}{leaf.where} is {x}, its parameter is '
          'not; leave both out or neither.'
        )
      if np.shape(x) != np.shape(leaf.param):
        raise ValueError(
          f'{self.caller}: {argument}{leaf.where} has shape {np.shape(x)}, '
          f'its parameter {np.shape(leaf.param)}; it must be of the same shape.'
        )
      if not jnp.issubdtype(dtype_of(x), jnp.floating):
        raise TypeError(
          f'{self.caller}: {argument}{leaf.where} has dtype {dtype_of(x)}, but '
          'its parameter is real floating point; leave it out with `mask`.'
        )
    return found

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
      for name, where, entry in named_leaves(prefix)
      if not is_hole(entry)
    }
    found, used = [], set()
    for leaf in self.leaves:
      above = [leaf.name[:n] for n in range(len(leaf.name))]
      name = next(
        (n for n in above if n in entries and covers(entries[n][1])), leaf.name
      )
      used.add(name)
      if name in entries:
        found.append(entries[name][1])
      elif leaf.shape is None:
        found.append(None)
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
    return found

  def _is_left_alone(self, name: Name) -> bool:
    """Whether the part of the params that `name` leads to is masked out."""
    for n in range(len(name), -1, -1):
      under = [leaf for leaf in self.leaves if leaf.name[:n] == name[:n]]
      if under:
        return all(leaf.shape is None for leaf in under)
    return True

  def warn_if_none(self) -> None:
    """Warns where a mask leaves out all params that there are."""
    masked = [leaf for leaf in self.leaves if not is_hole(leaf.param)]
    if masked and all(leaf.shape is None for leaf in masked):
      warnings.warn(
        f'{self.caller}: mask leaves out every parameter, from params'
        f'{masked[0].where} on, so nothing is pulled back. {_INJECTED} Inside '
        'optax.partition, give a group that is left out the plain optimizer.',
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
        (device,) = x.sharding.device_set
        return jax.sharding.SingleDeviceSharding(device)
    return None

  @property
  def dtype(self) -> Any:
    """The dtype of the [layers] vectors."""
    dtypes = [accumulator(leaf) for leaf in self.leaves if leaf.num_layers]
    return _promote(jnp.float32, *dtypes)

  def flatten(self, per_leaf: Iterable[jax.Array]) -> jax.Array:
    """Joins arrays of the leaves' layer shapes to a [layers] vector."""
    flat = [jnp.ravel(_replicate(x)) for x in per_leaf]
    dtype = _promote(*(x.dtype for x in flat))
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
      pieces = _split(flat)
    found = iter(pieces)
    return [None if leaf.shape is None else next(found) for leaf in self.leaves]


def _sums(terms: list[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
  """Sums terms of one shape over `axes`, in one pass over memory."""
  if not axes or _is_sharded(terms[0]):
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sums_together(
  terms: list[jax.Array], axes: tuple[int, ...]
) -> list[jax.Array]:
  """Reductions of all terms at once, which XLA would not make on CPU.

  In stages, for short sums lose fewer digits: slices on each other, then
  along rows, which two cores share, then what is left in ever fewer parts. On
  TPU it is three times slower than `_sums_apart`.
  """
  first, last = axes[0], axes[-1]
  is_large = math.prod(terms[0].shape[first:]) > _SMALL
  sums = _add_slices(tuple(terms), axes)
  if last > first:
    sums = _reduce(sums, (last,))
  for parts in _PARTS if is_large else ():
    if sums[0].shape[first] % parts == 0:
      sums = tuple(_cut(x, first, parts) for x in sums)
      sums = _reduce(sums, range(first + 1, sums[0].ndim))
  return list(_reduce(sums, range(first, sums[0].ndim)))


# The sums of a large tensor are brought down to so many, and then to one.
#
# Without its concurrency-optimized scheduler XLA first computes what has most
# bytes behind it, and counts them again for every path that leads there: four
# times as many after each stage of four sums. By then they are most behind each
# tensor's new value, and its step is freed; after two stages they would be most
# behind the state of all layers, and the steps of all tensors be kept. They
# are kept still where the params are returned before the state, and where a
# tensor is too small a part of the model, or of odd shape, to go first.
_PARTS = (8, 4, 2)

# Slices that are added at once, which shortens a sum as much: LLVM does not
# reorder additions, so along an axis each waits for the one before. With eight
# XLA writes the terms to memory.
_SLICES = 4


def _add_slices(
  terms: tuple[jax.Array, ...], axes: tuple[int, ...]
) -> tuple[jax.Array, ...]:
  """Slices of each term on each other.

  Cut is the shortest axis of several slices, which is the least likely to be
  sharded.
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


def _cut(x: jax.Array, axis: int, parts: int) -> jax.Array:
  """`x` with an axis of `parts` before the one that is cut."""
  size = x.shape[axis] // parts  # not -1, which a layer axis of 0 forbids
  return x.reshape(*x.shape[:axis], parts, size, *x.shape[axis + 1 :])


def _reduce(
  terms: tuple[jax.Array, ...], axes: Iterable[int]
) -> tuple[jax.Array, ...]:
  return lax.reduce(terms, tuple(map(_zero, terms)), _add, tuple(axes))


@_sums_together.defjvp
def _sums_together_jvp(
  axes: tuple[int, ...], primals: Any, tangents: Any
) -> tuple[list[jax.Array], list[jax.Array]]:
  """A reduction of several terms has no transpose."""
  (terms,), (dots,) = primals, tangents
  return _sums_together(terms, axes), _sums_apart(dots, axes)


def _zero(x: jax.Array) -> np.ndarray:
  return np.zeros((), x.dtype)


def _add(
  a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
  return tuple(x + y for x, y in zip(a, b, strict=True))


def _is_sharded(x: jax.Array) -> bool:
  """Whether an axis of `x` is sharded over an explicit mesh."""
  return any(axis is not None for axis in jax.typeof(x).sharding.spec)


# Numbers in a parameter that is cheaper to copy than to treat on its own.
_SMALL = 2**14


def stack(arrays: list[Any]) -> Any:
  """Arrays of one kind on a new leading axis; one is left as it is."""
  if len(arrays) == 1 or is_hole(arrays[0]):
    return arrays[0]
  return jnp.stack(arrays)


def unstack(array: jax.Array, n: int) -> list[jax.Array]:
  """What `stack` made one of `n` arrays of."""
  return [array] if n == 1 else _split(array)


def _split(array: jax.Array) -> list[jax.Array]:
  """The slices of an array along its first axis."""
  if len(array) < 2 or _is_sharded(array):
    return _slices(array)
  return lax.platform_dependent(array, cpu=_slices_together, default=_slices)


def _slices(array: jax.Array) -> list[jax.Array]:
  return [lax.index_in_dim(array, i, keepdims=False) for i in range(len(array))]


# How many slices one operation makes.
_AT_ONCE = 64


@jax.custom_jvp
def _slices_together(array: jax.Array) -> list[jax.Array]:
  """`_slices` in few operations.

  XLA on CPU compiles each operation once for all arrays of a shape, but what
  it fuses with a slice anew for each, as each begins elsewhere; with a
  reduction it fuses nothing that comes after.
  """
  # As bits, of which none is lost: x | x is x.
  bits = lax.bitcast_convert_type(array, f'uint{array.dtype.itemsize * 8}')
  twice = [lax.broadcast(x, (2,)) for x in _slices(bits)]
  found: list[jax.Array] = []
  for i in range(0, len(twice), _AT_ONCE):
    some = tuple(twice[i : i + _AT_ONCE])
    found += lax.reduce(some, (_zero(bits),) * len(some), _or, (0,))
  return [lax.bitcast_convert_type(x, array.dtype) for x in found]


def _or(
  a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
  return tuple(x | y for x, y in zip(a, b, strict=True))


@_slices_together.defjvp
def _slices_together_jvp(
  primals: Any, tangents: Any
) -> tuple[list[jax.Array], list[jax.Array]]:
  """A reduction of several terms has no transpose."""
  return _slices_together(*primals), _slices(*tangents)


def _kind(x: Any) -> Any:
  return np.shape(x), dtype_of(x)


def _is_placed(x: Any) -> bool:
  """Whether it matters where `x` lies: sharded by its type, or on the host."""
  if is_hole(x):
    return False
  memory = jax.typeof(x).memory_space
  return _is_sharded(x) or memory == jax.memory.Space.Host


def is_hole(x: Any) -> bool:
  """Whether `x` stands where `optax.masked` took something out."""
  return isinstance(x, optax.MaskedNode)


def dtype_of(x: Any) -> Any:
  """The dtype that jax gives an array, a `jax.ShapeDtypeStruct` or a number."""
  dtype = x.dtype if hasattr(x, 'dtype') else jnp.result_type(x)
  return jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)


def accumulator(leaf: Leaf) -> Any:
  """The dtype that sums over `leaf` accumulate in."""
  return _promote(dtype_of(leaf.param), jnp.float32)


def _promote(*dtypes: Any) -> Any:
  with jax.numpy_dtype_promotion('standard'):  # the user's may be strict
    return jnp.result_type(*dtypes)


def named_leaves(tree: Any) -> list[tuple[Name, str, Any]]:
  """The leaves of `tree`, holes among them, with their paths in two forms."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_hole)
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


def layer_names(
  params: Any, *, mask: Any = None, layer_axes: Any = None
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


_INJECTED = (
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
      f'an array. {_INJECTED} If all are meant, leave mask out.',
      stacklevel=4,
    )


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
  dtype = dtype_of(leaf.param)
  if jnp.issubdtype(dtype, jnp.floating):
    return
  remedy = 'mask it out'
  if jnp.issubdtype(dtype, jnp.complexfloating):
    remedy += ', or wrap with optax.contrib.split_real_and_imaginary'
  raise TypeError(
    f'{caller}: params{leaf.where} has dtype {dtype}, but SPD is defined for '
    f'real floating point parameters; {remedy}.'
  )


def _replicate(x: jax.Array) -> jax.Array:
  """Gathers an array whose layer axes are sharded over an explicit mesh."""
  if _is_sharded(x):
    whole = jax.sharding.PartitionSpec()
    mesh = jax.typeof(x).sharding.mesh
    x = jax.sharding.reshard(x, jax.NamedSharding(mesh, whole))
  return x


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
  for _, where, x in named_leaves(tree):
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
