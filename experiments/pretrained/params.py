"""Pretrained tensors as the parameters of a model."""

import re

import jax.numpy as jnp
from flax import nnx


def with_params(build, params):
  """The model that `build` describes, with `params` in it: no random init.

  Args:
    build: makes the model; it is traced, never run.
    params: nested dicts of arrays, one for each parameter. They are copied.

  Returns:
    The `nnx.Module`.

  Raises:
    ValueError: a parameter is missing, surplus, or has another shape.
  """
  graphdef, state = nnx.split(nnx.eval_shape(build))
  wanted = _flat(nnx.to_pure_dict(state))
  given = _flat(params)
  if missing := wanted.keys() - given.keys():
    raise ValueError(f'with_params: no tensor for {_names(missing)}.')
  if surplus := given.keys() - wanted.keys():
    raise ValueError(f'with_params: the model has no {_names(surplus)}.')
  for path, leaf in wanted.items():
    if given[path].shape != leaf.shape:
      raise ValueError(
        f'with_params: {_names([path])} has shape {given[path].shape}, its '
        f'parameter {leaf.shape}.'
      )
  copies = {
    path: jnp.array(given[path], leaf.dtype) for path, leaf in wanted.items()
  }
  nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(copies))
  return nnx.merge(graphdef, state)


def shapes(build):
  """The shape of each parameter of the model that `build` describes.

  Returns:
    `{path: shape}`, a path like `('blocks', 0, 'attn', 'query', 'kernel')`.
  """
  state = nnx.state(nnx.eval_shape(build))
  return {
    path: leaf.shape for path, leaf in _flat(nnx.to_pure_dict(state)).items()
  }


def assemble(where, wanted, names, name_of, read, ignored):
  """Brings the tensors of a checkpoint into the layout of a model.

  Args:
    where: the checkpoint, for errors.
    wanted: `{path: shape}`, as `shapes` returns it.
    names: of all tensors in the checkpoint.
    name_of: a path -> the name of its tensor.
    read: a path and a name -> the tensor as the model has it.
    ignored: regular expression of the names that a checkpoint may have besides.

  Returns:
    Nested dicts of arrays.

  Raises:
    ValueError: a tensor is missing, surplus, or has another shape.
  """
  sources = {path: name_of(path) for path in wanted}
  missing = set(sources.values()) - set(names)
  surplus = set(names) - set(sources.values())
  surplus = {name for name in surplus if not re.fullmatch(ignored, name)}
  if missing or surplus:
    raise ValueError(
      f'{where}: not a checkpoint of this model: missing {_some(missing)}, '
      f'surplus {_some(surplus)}; set --config.model.name to the model that it '
      'is of.'
    )
  tensors = {}
  for path, shape in wanted.items():
    tensor = read(path, sources[path])
    if tensor.shape != shape:
      raise ValueError(
        f'{where}: {sources[path]} has shape {tensor.shape} in the layout of '
        f'the model, its parameter {_names([path])} {shape}; set '
        '--config.model.name to the model that it is of.'
      )
    tensors[path] = tensor
  return nnx.traversals.unflatten_mapping(tensors)


_flat = nnx.traversals.flatten_mapping


def _names(paths):
  return ', '.join(sorted('.'.join(map(str, path)) for path in paths))


def _some(names, count=3):
  more = f' and {len(names) - count} more' if len(names) > count else ''
  return (', '.join(sorted(names)[:count]) or 'nothing') + more
