"""What transformers and timm write of a Swin, as values of its config."""

import re

_TRANSFORMERS = {
  'width': 'embed_dim',
  'depths': 'depths',
  'num_heads': 'num_heads',
  'window': 'window_size',
  'patch_size': 'patch_size',
  'mlp_ratio': 'mlp_ratio',
  'eps': 'layer_norm_eps',
}
# What is meant where config.json leaves a key out.
_DEFAULTS = {
  'embed_dim': 96,
  'depths': [2, 2, 6, 2],
  'num_heads': [3, 6, 12, 24],
  'window_size': 7,
  'patch_size': 4,
  'mlp_ratio': 4.0,
  'layer_norm_eps': 1e-5,
}
# Of the authors' sizes in timm: width, depths and heads.
_SIZES = {
  'tiny': (96, (2, 2, 6, 2), (3, 6, 12, 24)),
  'small': (96, (2, 2, 18, 2), (3, 6, 12, 24)),
  'base': (128, (2, 2, 18, 2), (4, 8, 16, 32)),
  'large': (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
_ARCHITECTURE = re.compile(
  rf'swin_({"|".join(_SIZES)})_patch(\d+)_window(\d+)_\d+'
)
NAME = 'swin_tiny_patch4_window7_224'  # one that is read, for errors


def of_transformers(path, given):
  """`{field: (value, its key)}` out of a config.json of transformers.

  Raises:
    ValueError: a key says what is not computed here.
  """
  for key, needed in (
    ('num_channels', 3),
    ('qkv_bias', True),
    ('hidden_act', 'gelu'),
    ('use_absolute_embeddings', False),
    ('layer_norm_eps', 1e-5),  # of some of its LayerNorms it is anyway
  ):
    if given.get(key, needed) != needed:
      raise ValueError(
        f'{path}: {key} is {given[key]!r}; only {needed!r} is read.'
      )
  given = _DEFAULTS | given
  return {field: (given[key], key) for field, key in _TRANSFORMERS.items()}


def of_timm(architecture, args):
  """`{field: value}` of a Swin of timm; None of another model.

  Args:
    architecture: its name.
    args: `{key: value}`, that the model was made with besides.
  """
  if not (match := _ARCHITECTURE.fullmatch(architecture)):
    return None
  size, patch_size, window = match.groups()
  width, depths, num_heads = _SIZES[size]
  return {
    'family': 'swin',
    'width': args.get('embed_dim', width),
    'depths': tuple(args.get('depths', depths)),
    'num_heads': tuple(args.get('num_heads', num_heads)),
    'window': args.get('window_size', int(window)),
    'patch_size': args.get('patch_size', int(patch_size)),
    'mlp_ratio': args.get('mlp_ratio', 4),
    'eps': 1e-5,
  }
