"""AugReg's ViTs, out of the .npz files that they were published as.

References:
  Steiner et al., "How to train your ViT? Data, Augmentation, and Regularization
  in Vision Transformers", 2021; https://github.com/google-research/vision_transformer
"""

import pathlib
import zipfile

import numpy as np
from flax import nnx

from experiments.models import vit
from experiments.pretrained import params

_NAMES = {
  'patch_embed': 'embedding',
  'cls_token': 'cls',
  'pos_embed': 'Transformer/posembed_input/pos_embedding',
  'norm1': 'LayerNorm_0',
  'attn/query': 'MultiHeadDotProductAttention_1/query',
  'attn/key': 'MultiHeadDotProductAttention_1/key',
  'attn/value': 'MultiHeadDotProductAttention_1/value',
  'attn/out': 'MultiHeadDotProductAttention_1/out',
  'norm2': 'LayerNorm_2',
  'mlp/fc1': 'MlpBlock_3/Dense_0',
  'mlp/fc2': 'MlpBlock_3/Dense_1',
  'norm': 'Transformer/encoder_norm',
}
_IGNORED = r'(head|pre_logits)/(kernel|bias)'


def load_vit_params(config, path):
  """Reads a ViT.

  Args:
    config: its `vit.ViTConfig`, such as `vit.CONFIGS['augreg_b16']`.
    path: of the .npz.

  Returns:
    The params of the unrolled `vit.ViT(config)`, nested dicts of arrays.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged or has pickles in it, or a tensor is missing,
      surplus, or of another shape.
  """
  path = pathlib.Path(path)
  try:
    # No pickle is ever loaded: that would run the file's code.
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
      tensors = dict(arrays)
  except (ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
    raise ValueError(
      f'{path} ({path.stat().st_size} bytes) is not an .npz of plain arrays '
      f'({error}): download it again.'
    ) from error

  def read(path, name):
    return _layout(path, tensors[name])

  wanted = params.shapes(lambda: vit.ViT(config, rngs=nnx.Rngs(0)))
  tree = params.assemble(path, wanted, tensors, _name, read, _IGNORED)
  heads = tensors[_name(('blocks', 0, 'attn', 'query', 'bias'))].shape[0]
  if heads != config.num_heads:
    raise ValueError(
      f'{path}: the model has {heads} heads, its ViTConfig num_heads='
      f'{config.num_heads}; correct the ViTConfig.'
    )
  return tree


def _name(path):
  """('blocks', 3, 'attn', 'query', 'bias') -> the name of its tensor."""
  block = ''
  if path[0] == 'blocks':
    block, path = f'Transformer/encoderblock_{path[1]}/', path[2:]
  if len(path) == 1:
    return block + _NAMES[path[0]]
  *module, leaf = path
  return f'{block}{_NAMES["/".join(module)]}/{leaf}'


def _layout(path, tensor):
  """Joins heads and patch axes, and drops leading ones.

  Of H heads of K features: query, key and value have kernels [D, H, K] and
  biases [H, K], out has a kernel [H, K, D]; the patch embedding's is
  [patch_size, patch_size, 3, D].
  """
  if path[-1] == 'kernel' and path[-2] in ('query', 'key', 'value'):
    return tensor.reshape(tensor.shape[0], -1)
  if path[-1] in ('kernel', 'pos_embed'):
    return tensor.reshape(-1, tensor.shape[-1])
  return tensor.reshape(-1)
