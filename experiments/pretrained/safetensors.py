"""Checkpoints as Hugging Face transformers writes them, in safetensors files.

CLIP (both towers), ViT, DeiT and DINOv2, out of a folder, a file or the hub. A
pickle (`pytorch_model.bin`) is never loaded: that would run its code.
"""

import json
import math
import pathlib
import re
from typing import NamedTuple

import huggingface_hub
import numpy as np
import safetensors
import tokenizers
from flax import nnx
from huggingface_hub.errors import HFValidationError

from experiments.models import clip, vit
from experiments.pretrained import params

_HUB_ID = re.compile(r'(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?')
_WEIGHTS = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'
_CONVERT = (
  'a pickle such as pytorch_model.bin is never loaded; where torch and '
  'transformers are installed, convert it once: '
  "`AutoModel.from_pretrained('...').save_pretrained('folder')`, and pass the "
  'folder'
)


class _Family(NamedTuple):
  """How transformers names the tensors of one kind of model."""

  names: dict[str, str]  # ours -> theirs; within blocks, without the block
  ignored: str  # regular expression: what a checkpoint may have besides
  prefix: str = ''  # regular expression: before all names, or before none
  section: str = ''  # of config.json
  defaults: tuple = ()  # items that config.json may leave out


_CLIP_BLOCK = {
  'norm1': 'layer_norm1',
  'attn.query': 'self_attn.q_proj',
  'attn.key': 'self_attn.k_proj',
  'attn.value': 'self_attn.v_proj',
  'attn.out': 'self_attn.out_proj',
  'norm2': 'layer_norm2',
  'mlp.fc1': 'mlp.fc1',
  'mlp.fc2': 'mlp.fc2',
}
_CLIP_VISION = _Family(
  names={
    'patch_embed': 'vision_model.embeddings.patch_embedding',
    'cls_token': 'vision_model.embeddings.class_embedding',
    'pos_embed': 'vision_model.embeddings.position_embedding.weight',
    'pre_norm': 'vision_model.pre_layrnorm',
    'blocks': 'vision_model.encoder.layers',
    'norm': 'vision_model.post_layernorm',
    'projection': 'visual_projection',
    **_CLIP_BLOCK,
  },
  ignored=r'text_model\..*|text_projection\.weight|logit_scale'
  r'|vision_model\.embeddings\.position_ids',
  section='vision_config',
  # transformers wrote nested sections without what was its default.
  defaults=(
    ('num_attention_heads', 12),
    ('hidden_act', 'quick_gelu'),
    ('layer_norm_eps', 1e-5),
    ('patch_size', 32),
    ('image_size', 224),
  ),
)
_CLIP_TEXT = _Family(
  names={
    'token_embed': 'text_model.embeddings.token_embedding.weight',
    'pos_embed': 'text_model.embeddings.position_embedding.weight',
    'blocks': 'text_model.encoder.layers',
    'norm': 'text_model.final_layer_norm',
    'projection': 'text_projection',
    'logit_scale': 'logit_scale',
    **_CLIP_BLOCK,
  },
  ignored=r'vision_model\..*|visual_projection\.weight'
  r'|text_model\.embeddings\.position_ids',
  section='text_config',
  defaults=(
    ('num_attention_heads', 8),
    ('hidden_act', 'quick_gelu'),
    ('layer_norm_eps', 1e-5),
  ),
)
_VIT_NAMES = {
  'patch_embed': 'embeddings.patch_embeddings.projection',
  'cls_token': 'embeddings.cls_token',
  'dist_token': 'embeddings.distillation_token',
  'pos_embed': 'embeddings.position_embeddings',
  'blocks': 'encoder.layer',
  'attn.query': 'attention.attention.query',
  'attn.key': 'attention.attention.key',
  'attn.value': 'attention.attention.value',
  'attn.out': 'attention.output.dense',
  'norm': 'layernorm',
}
_VIT = _Family(  # and DeiT
  names={
    'norm1': 'layernorm_before',
    'norm2': 'layernorm_after',
    'mlp.fc1': 'intermediate.dense',
    'mlp.fc2': 'output.dense',
    **_VIT_NAMES,
  },
  ignored=r'(cls_|distillation_)?classifier\.(weight|bias)'
  r'|((vit|deit)\.)?pooler\.dense\.(weight|bias)',
  prefix=r'(vit|deit)\.',
)
_DINOV2 = _Family(
  names={
    'norm1': 'norm1',
    'scale1': 'layer_scale1.lambda1',
    'norm2': 'norm2',
    'mlp.fc1': 'mlp.fc1',
    'mlp.fc2': 'mlp.fc2',
    'scale2': 'layer_scale2.lambda1',
    **_VIT_NAMES,
  },
  ignored=r'classifier\.(weight|bias)|(dinov2\.)?embeddings\.mask_token',
  prefix=r'dinov2\.',
)


def find(source):
  """Checks that a checkpoint is there, as far as that takes no download.

  Raises:
    FileNotFoundError: a local one is not, or lacks a file.
    ValueError: it is a file of another kind.
  """
  path = pathlib.Path(source)
  if path.exists():
    _files(path)
  elif not _HUB_ID.fullmatch(str(source)):
    raise FileNotFoundError(
      f'{source}: no such file or folder, nor an id of the hub, org/name or '
      'org/name@revision.'
    )


def load_vit_params(config, source):
  """Reads a ViT, or the vision tower of a CLIP.

  Args:
    config: its `vit.ViTConfig`, unrolled (without `scan`); it also says which
      names to expect: `pre_norm` is CLIP, `layer_scale` DINOv2, else ViT and
      DeiT.
    source: a folder with model.safetensors, or its shards and
      model.safetensors.index.json; a .safetensors file; or an id of the hub,
      org/name or org/name@revision, which is downloaded. A config.json beside
      it is checked.

  Returns:
    The params of `vit.ViT(config)`, nested dicts of arrays.

  Raises:
    FileNotFoundError: there is no such checkpoint, or the hub is out of reach.
    ValueError: a file is damaged; config.json disagrees with `config`; a tensor
      is missing, surplus, or of another shape.
  """
  if config.pre_norm:
    family = _CLIP_VISION
  elif config.layer_scale:
    family = _DINOV2
  else:
    family = _VIT
  folder, tensors = _open(source)
  expected = {
    'num_attention_heads': config.num_heads,
    'hidden_act': config.activation,
    'layer_norm_eps': config.eps,
    'patch_size': config.patch_size,
    'image_size': config.grid * config.patch_size,
  }
  _check_config(folder, family, expected)
  wanted = params.shapes(lambda: vit.ViT(config, rngs=nnx.Rngs(0)))
  return _assemble(source, family, wanted, tensors)


def load_text(config, source):
  """Reads what a zero-shot head needs of a CLIP.

  Args:
    config: the `clip.TextConfig` of its text tower.
    source: as for `load_vit_params`; with a tokenizer.json.

  Returns:
    text: the `clip.TextTower`.
    tokenizer: a `tokenizers.Tokenizer` that pads and cuts to
      `config.context_length` tokens.
    scale: exp(logit_scale), a float.

  Raises:
    As `load_vit_params`.
  """
  folder, tensors = _open(source)
  end = config.vocab_size - 1
  expected = {
    'num_attention_heads': config.num_heads,
    'hidden_act': config.activation,
    'layer_norm_eps': config.eps,
    'eos_token_id': end,
  }
  _check_config(folder, _CLIP_TEXT, expected)

  def build():
    return clip.TextTower(config, rngs=nnx.Rngs(0))

  wanted = params.shapes(build) | {('logit_scale',): ()}
  tree = _assemble(source, _CLIP_TEXT, wanted, tensors)
  scale = math.exp(tree.pop('logit_scale'))
  text = params.with_params(build, tree)
  return text, _load_tokenizer(folder, config), scale


def _load_tokenizer(folder, config):
  path = folder / 'tokenizer.json'
  if not path.exists():
    raise FileNotFoundError(
      f'{path} is missing: copy it there from where the checkpoint is from.'
    )
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  end = tokenizer.token_to_id(clip.END)
  if end != config.vocab_size - 1:
    raise ValueError(
      f'{path}: {clip.END} has id {end}, not the highest below vocab_size='
      f'{config.vocab_size}; is it the tokenizer of this CLIP?'
    )
  length = config.context_length
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length, pad_id=end, pad_token=clip.END)
  return tokenizer


def _open(source):
  """The folder of a checkpoint, and for each tensor's name its open file."""
  path = pathlib.Path(source)
  if not path.exists():
    find(source)
    path = _download(source)
  tensors = {}
  for file in _files(path):
    try:
      opened = safetensors.safe_open(file, 'numpy')
    except safetensors.SafetensorError as error:
      raise ValueError(
        f'{file} ({file.stat().st_size} bytes) is cut short or damaged '
        f'({error}): delete it and download it again.'
      ) from error
    tensors |= dict.fromkeys(opened.keys(), opened)
  return (path if path.is_dir() else path.parent), tensors


def _files(path):
  """The .safetensors files of a checkpoint."""
  if path.is_file():
    if path.suffix != '.safetensors':
      raise ValueError(f'{path} is not a .safetensors file: {_CONVERT}.')
    return [path]
  if (path / _WEIGHTS).exists():
    return [path / _WEIGHTS]
  if not (path / _INDEX).exists():
    raise FileNotFoundError(f'{path} has no {_WEIGHTS}: {_CONVERT}.')
  shards = sorted(set(_read_json(path / _INDEX)['weight_map'].values()))
  for shard in shards:
    if not (path / shard).exists():
      raise FileNotFoundError(
        f'{path / shard} is missing, one of {len(shards)} files that {_INDEX} '
        'lists: download it too.'
      )
  return [path / shard for shard in shards]


def _download(hub_id):
  wanted = ['model*.safetensors', _INDEX, 'config.json', 'tokenizer.json']
  try:
    name, revision = _HUB_ID.fullmatch(hub_id).groups()
    folder = huggingface_hub.snapshot_download(
      name, revision=revision, allow_patterns=wanted
    )
  except (OSError, HFValidationError) as error:
    reason = ' '.join(str(error).split())
    raise FileNotFoundError(
      f'{hub_id} is no local folder, and the hub did not send it '
      f'({type(error).__name__}: {reason}): check the name and the network, or '
      f'pass a folder that holds its {_WEIGHTS} and .json files.'
    ) from error
  return pathlib.Path(folder)


def _check_config(folder, family, expected):
  """What the tensors' shapes cannot tell, against config.json."""
  path = folder / 'config.json'
  if not path.exists():
    return
  given = _read_json(path)
  given = dict(family.defaults) | given.get(family.section, given)
  if given.get('eos_token_id') == 2:
    # What transformers wrote for "the highest id" until 2023.
    given['eos_token_id'] = expected.get('eos_token_id')
  for key, value in expected.items():
    if key in given and given[key] != value:
      raise ValueError(
        f'{path}: {key} is {given[key]!r}, but the config that was passed says '
        f'{value!r}; correct it with dataclasses.replace.'
      )


def _read_json(path):
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(
      f'{path} is cut short or damaged ({error}): download it again.'
    ) from error


def _assemble(source, family, wanted, tensors):
  prefixes = (re.match(family.prefix, name) for name in tensors)
  prefix = next((match[0] for match in prefixes if match), '')

  def name_of(path):
    return prefix + _name(path, family.names)

  def read(path, name):
    return _layout(path, tensors[name].get_tensor(name))

  return params.assemble(source, wanted, tensors, name_of, read, family.ignored)


def _name(path, names):
  """('blocks', 3, 'norm1', 'bias') -> 'encoder.layer.3.norm1.bias'."""
  block = ''
  if path[0] == 'blocks':
    block, path = f'{names["blocks"]}.{path[1]}.', path[2:]
  *module, leaf = path
  if not module:
    return block + names[leaf]
  # torch calls the scale of a LayerNorm a weight too.
  leaf = 'bias' if leaf == 'bias' else 'weight'
  return f'{block}{names[".".join(module)]}.{leaf}'


def _layout(path, tensor):
  """[out, in] -> [in, out], [D, 3, H, W] -> [H W 3, D], [1, 1, D] -> [D]."""
  if path[-1] != 'kernel':
    return np.squeeze(tensor)
  if tensor.ndim == 4:
    return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
  return tensor.T
