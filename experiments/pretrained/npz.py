"""AugReg's ViTs, out of the .npz files that they were published as.

References:
  Steiner et al., "How to train your ViT? Data, Augmentation, and Regularization
  in Vision Transformers", 2021; https://github.com/google-research/vision_transformer
"""

import pathlib
import zipfile
import zlib

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
_DAMAGED = (zipfile.BadZipFile, zlib.error)
_IGNORED = r'(head|pre_logits)/(kernel|bias)'


def check(config, path):
  """Refuses a file that `load_vit_params` would, by its headers alone.

  Args:
    config: as there.
    path: so too.

  Raises:
    As there.
  """
  _assemble(config, path, is_read=False)


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
  return _assemble(config, path, is_read=True)


def read(path, is_read):
  """The arrays of a file by their names.

  Args:
    path: of the .npz.
    is_read: whether they are read; else each is one zero, seen as an array of
      that shape.

  Raises:
    As `load_vit_params`, but for what the tensors are of.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(f'{path}: no such file.')
  try:
    with path.open('rb') as file:
      return _arrays(file) if is_read else _headers(file)
  except (ValueError, EOFError, TypeError, *_DAMAGED) as error:
    raise ValueError(
      f'{path} ({path.stat().st_size} bytes) is not an .npz of plain arrays '
      f'({error}): download it again.'
    ) from error


def _arrays(file):
  # No pickle is ever loaded: that would run the file's code.
  with np.load(file, allow_pickle=False) as arrays:
    return dict(arrays)


def _headers(file):
  with zipfile.ZipFile(file) as members:
    return {
      name.removesuffix('.npy'): _header(members, name)
      for name in members.namelist()
    }


def _header(members, name):
  read = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }
  with members.open(name) as member:
    version = np.lib.format.read_magic(member)
    if version not in read:
      raise ValueError(f'{name} is of version {version} of the format')
    shape, _, dtype = read[version](member)
  if dtype.hasobject:
    raise ValueError(f'{name} is a pickle')
  return np.broadcast_to(np.zeros((), dtype), shape)


def _assemble(config, path, is_read):
  tensors = read(path, is_read)

  def read_one(leaf, name):
    tensor = tensors[name]
    if tensor.dtype.kind != 'f':
      raise ValueError(
        f'{path}: {name} is {tensor.dtype}; what is read is floating point.'
      )
    return _layout(leaf, tensor)

  wanted = params.shapes(lambda: vit.ViT(config, rngs=nnx.Rngs(0)))
  tree = params.assemble(path, wanted, tensors, _name, read_one, _IGNORED)
  heads = tensors[_name(('blocks', 0, 'attn', 'query', 'bias'))].shape[0]
  if heads != config.num_heads:
    raise ValueError(
      f'{path}: the model has {heads} heads, its ViTConfig num_heads='
      f'{config.num_heads}; set --config.model.name to the model that it is of.'
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
