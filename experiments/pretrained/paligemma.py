"""PaliGemma's checkpoints: Hugging Face's folders and big_vision's .npz files.

References:
  https://huggingface.co/google/paligemma-3b-pt-224
  https://github.com/google-research/big_vision
"""

import dataclasses
import functools
import math
import os
import pathlib
import re

import ml_dtypes
import numpy as np
from flax import nnx

from experiments.models import blocks, vision_language
from experiments.pretrained import (
  config_files,
  npz,
  params,
  safetensors,
  tokenizer,
)

# Our path, from the tower on and in a block from there -> the tensor's name.
_HUGGING_FACE = {
  ('vision', 'patch_embed'): 'embeddings.patch_embedding',
  ('vision', 'pos_embed'): 'embeddings.position_embedding.weight',
  ('vision', 'norm'): 'post_layernorm',
  ('vision', 'norm1'): 'layer_norm1',
  ('vision', 'norm2'): 'layer_norm2',
  ('vision', 'attn', 'query'): 'self_attn.q_proj',
  ('vision', 'attn', 'key'): 'self_attn.k_proj',
  ('vision', 'attn', 'value'): 'self_attn.v_proj',
  ('vision', 'attn', 'out'): 'self_attn.out_proj',
  ('vision', 'mlp', 'fc1'): 'mlp.fc1',
  ('vision', 'mlp', 'fc2'): 'mlp.fc2',
  ('projector',): 'multi_modal_projector.linear',
  ('decoder', 'token_embed'): 'embed_tokens.weight',
  ('decoder', 'norm'): 'norm',
  ('decoder', 'norm1'): 'input_layernorm',
  ('decoder', 'norm2'): 'post_attention_layernorm',
  ('decoder', 'attn', 'query'): 'self_attn.q_proj',
  ('decoder', 'attn', 'key'): 'self_attn.k_proj',
  ('decoder', 'attn', 'value'): 'self_attn.v_proj',
  ('decoder', 'attn', 'out'): 'self_attn.o_proj',
  ('decoder', 'mlp', 'gate'): 'mlp.gate_proj',
  ('decoder', 'mlp', 'up'): 'mlp.up_proj',
  ('decoder', 'mlp', 'down'): 'mlp.down_proj',
}
# What stands before the names of a tower; in blocks {} is the number.
_TOWERS = {
  'vision': ('vision_tower.', 'vision_tower.encoder.layers.{}.'),
  'decoder': ('language_model.model.', 'language_model.model.layers.{}.'),
  'projector': ('', ''),
}
_BIG_VISION = {
  ('vision', 'patch_embed'): 'embedding',
  ('vision', 'pos_embed'): 'pos_embedding',
  ('vision', 'norm'): 'Transformer/encoder_norm',
  ('vision', 'norm1'): 'LayerNorm_0',
  ('vision', 'norm2'): 'LayerNorm_1',
  ('vision', 'attn', 'query'): 'MultiHeadDotProductAttention_0/query',
  ('vision', 'attn', 'key'): 'MultiHeadDotProductAttention_0/key',
  ('vision', 'attn', 'value'): 'MultiHeadDotProductAttention_0/value',
  ('vision', 'attn', 'out'): 'MultiHeadDotProductAttention_0/out',
  ('vision', 'mlp', 'fc1'): 'MlpBlock_0/Dense_0',
  ('vision', 'mlp', 'fc2'): 'MlpBlock_0/Dense_1',
  ('projector',): 'head',
  ('decoder', 'token_embed'): 'embedder/input_embedding',
  ('decoder', 'norm'): 'final_norm',
  ('decoder', 'norm1'): 'pre_attention_norm',
  ('decoder', 'norm2'): 'pre_ffw_norm',
  ('decoder', 'attn', 'query', 'kernel'): 'attn/q_einsum/w',
  ('decoder', 'attn', 'key', 'kernel'): 'attn/kv_einsum/w',
  ('decoder', 'attn', 'value', 'kernel'): 'attn/kv_einsum/w',
  ('decoder', 'attn', 'out', 'kernel'): 'attn/attn_vec_einsum/w',
  ('decoder', 'mlp', 'gate', 'kernel'): 'mlp/gating_einsum',
  ('decoder', 'mlp', 'up', 'kernel'): 'mlp/gating_einsum',
  ('decoder', 'mlp', 'down', 'kernel'): 'mlp/linear',
}
# transformers adds rows for the image's token and more; big_vision does not.
_EXTRA_ROWS = 64
_IGNORED = r'language_model\.lm_head\.weight|lm_head\.weight'


def model_config(name, source):
  """The `vision_language.VisionLanguageConfig` of a study.

  Args:
    name: a key of `vision_language.CONFIGS`.
    source: as for `load`; big_vision's files have a smaller vocabulary.
  """
  config = vision_language.CONFIGS[name]
  if not _is_npz(source):
    return config
  rows = config.decoder.vocab_size - _EXTRA_ROWS
  return dataclasses.replace(
    config, decoder=dataclasses.replace(config.decoder, vocab_size=rows)
  )


def check(config, source):
  """Refuses a checkpoint that is not the model's, by its headers alone.

  Args:
    config: as for `load`.
    source: so too.

  Raises:
    As `load`, and `load_tokenizer`.
  """
  _assemble(_unrolled(config), source, is_read=False)
  load_tokenizer(config, source)


def load(config, source, *, untied=False):
  """A PaliGemma with pretrained weights in it.

  Args:
    config: its `vision_language.VisionLanguageConfig`; `dtype`, `remat` and
      `scan` of both towers are free.
    source: a folder, a file or an id of the hub, as
      `safetensors.load_vit_params` takes it, or an .npz file of big_vision's,
      which has a tokenizer.json beside it.
    untied: as `vision_language.VisionLanguage` takes it.

  Returns:
    A `vision_language.VisionLanguage`.

  Raises:
    FileNotFoundError: there is no such checkpoint, or the hub is out of reach.
    ValueError: a file is damaged; the model is of another size of images, or of
      another vocabulary; a tensor is missing, surplus, or of another shape.
  """
  tree = _assemble(_unrolled(config), source, is_read=True)
  for tower in ('vision', 'decoder'):
    if getattr(config, tower).scan:
      tree[tower] = blocks.stack(tree[tower])
  if untied:
    tree['head'] = {'kernel': tree['decoder']['token_embed'].T}
  return params.with_params(
    lambda: vision_language.VisionLanguage(
      config, untied=untied, rngs=nnx.Rngs(0)
    ),
    tree,
  )


def load_tokenizer(config, source):
  """The `tokenizer.Tokenizer` of a checkpoint.

  Args:
    config: the model's.
    source: as for `load`.

  Raises:
    FileNotFoundError: there is no tokenizer.json.
    ValueError: it is damaged, or of another vocabulary.
  """
  source = os.path.expanduser(source)
  if _is_npz(source):
    folder = pathlib.Path(source).parent
  else:
    folder, _ = safetensors.read_tensors(source, is_read=False)
  file = folder / tokenizer.FILE
  model = tokenizer.read(file)
  start, end = (model.token_to_id(token) for token in ('<bos>', '<eos>'))
  rows = config.decoder.vocab_size
  # The last of the text, before what transformers adds.
  largest = max(
    i for token, i in model.get_vocab().items() if token != '<image>'
  )
  is_of_it = largest + 1 in (rows, rows - _EXTRA_ROWS)
  if start is None or end is None or not is_of_it:
    raise ValueError(
      f'{file}: its {model.get_vocab_size():,} tokens, <bos> {start} and <eos> '
      f'{end}, are not those of a PaliGemma of {rows:,}; take the file of '
      'google/paligemma-3b-pt-224.'
    )
  return tokenizer.Tokenizer(model, start, end)


def to_config(config):
  """The contents of its config.json, a dict."""
  vision, decoder = config.vision, config.decoder
  return {
    'architectures': ['PaliGemmaForConditionalGeneration'],
    'model_type': 'paligemma',
    'image_token_index': decoder.vocab_size - _EXTRA_ROWS,
    'projection_dim': decoder.width,
    'hidden_size': decoder.width,
    'tie_word_embeddings': True,
    'dtype': 'float32',
    'vision_config': {
      'model_type': 'siglip_vision_model',
      'image_size': vision.image_size,
      'patch_size': vision.patch_size,
      'hidden_size': vision.width,
      'intermediate_size': vision.mlp_dim,
      'num_hidden_layers': vision.depth,
      'num_attention_heads': vision.num_heads,
      'layer_norm_eps': vision.eps,
      'vision_use_head': False,
    },
    'text_config': {
      'model_type': 'gemma',
      'vocab_size': decoder.vocab_size,
      'hidden_size': decoder.width,
      'intermediate_size': decoder.mlp_dim,
      'num_hidden_layers': decoder.depth,
      'num_attention_heads': decoder.num_heads,
      'num_key_value_heads': decoder.num_kv_heads,
      'head_dim': decoder.head_dim,
      'rms_norm_eps': decoder.eps,
      'max_position_embeddings': decoder.context_length,
      'rope_theta': decoder.rope_theta,
    },
  }


def processor_files(config):
  """What transformers makes inputs by, `{name of a file: a dict}`."""
  vision = config.vision
  sides = {'height': vision.image_size, 'width': vision.image_size}
  pixels = {
    'processor_class': 'PaliGemmaProcessor',
    'image_processor_type': 'SiglipImageProcessor',
    'image_seq_length': vision.grid**2,
    'do_convert_rgb': True,
    'do_resize': True,
    'size': sides,
    'resample': 3,  # bicubic
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': vision.mean,
    'image_std': vision.std,
  }
  return {config_files.PREPROCESSOR: pixels}


def with_all_rows(config, table):
  """The table of embeddings with the rows that transformers adds, zeros.

  Args:
    config: the model's.
    table: [rows, width], without them where the model is big_vision's.

  Returns:
    The model's `VisionLanguageConfig` in transformers, and the table.
  """
  whole = vision_language.CONFIGS['paligemma_3b'].decoder.vocab_size
  missing = whole - config.decoder.vocab_size
  decoder = dataclasses.replace(config.decoder, vocab_size=whole)
  config = dataclasses.replace(config, decoder=decoder)
  return config, np.pad(np.asarray(table), ((0, missing), (0, 0)))


def tensor_of(path, array, patch_size):
  """Our param -> its name in the hub's files, and the tensor."""
  if path[-1] == 'kernel':
    if path[-2] == 'patch_embed':
      patches = array.reshape(patch_size, patch_size, 3, -1)
      array = patches.transpose(3, 2, 0, 1)
    else:
      array = array.T
  name = _hugging_face_name(path)
  return name.replace('vision_tower.', 'vision_tower.vision_model.', 1), array


def module_of(path):
  """Our module -> its name in transformers 5, where PEFT looks for it."""
  name = _hugging_face_name((*path, 'kernel')).removesuffix('.weight')
  return 'model.' + name.replace('language_model.model.', 'language_model.', 1)


def _assemble(config, source, is_read):
  """The params; of what the hub has not sent yet, nothing."""
  source = os.path.expanduser(source)
  if _is_npz(source):
    arrays = npz.read(source, is_read)
    readers = {name: functools.partial(arrays.get, name) for name in arrays}
    name_of, layout = _big_vision_name, _big_vision_layout
  else:
    folder, readers = safetensors.read_tensors(source, is_read)
    _check_files(folder / config_files.CONFIG, config)
    if readers is None:
      return None
    readers = {_as_published(name): read for name, read in readers.items()}
    name_of, layout = _hugging_face_name, _torch_layout
  _check_size(source, config, readers, name_of)

  def read(path, name):
    tensor = readers[name]()
    if tensor.dtype.itemsize == 2 and tensor.dtype.kind == 'V':
      tensor = tensor.view(ml_dtypes.bfloat16)  # as .npz files keep it
    return layout(path, tensor)

  return params.assemble(
    source, _shapes(config), readers, name_of, read, _IGNORED
  )


@functools.cache
def _shapes(config):
  return params.shapes(
    lambda: vision_language.VisionLanguage(config, rngs=nnx.Rngs(0))
  )


def _unrolled(config):
  return dataclasses.replace(
    config,
    vision=dataclasses.replace(config.vision, scan=False),
    decoder=dataclasses.replace(config.decoder, scan=False),
  )


def _is_npz(source):
  return pathlib.Path(source).suffix == '.npz'


def _as_published(name):
  """Names of transformers 5, as those of the hub's files."""
  name = name.removeprefix('model.').replace('.vision_model.', '.')
  return re.sub(r'^language_model\.(?!model\.)', 'language_model.model.', name)


def _split(path):
  """('vision', 'blocks', 3, 'attn', 'out', 'bias') -> without blocks, and 3."""
  if 'blocks' not in path:
    return path, None
  return (path[0], *path[3:]), path[2]


def _hugging_face_name(path):
  short, block = _split(path)
  before = _TOWERS[path[0]][block is not None].format(block)
  if short in _HUGGING_FACE:
    return before + _HUGGING_FACE[short]
  leaf = 'bias' if short[-1] == 'bias' else 'weight'
  return f'{before}{_HUGGING_FACE[short[:-1]]}.{leaf}'


def _torch_layout(path, tensor):
  """[out, in] -> [in, out], [D, 3, H, W] -> [H W 3, D]."""
  if path[-1] != 'kernel':
    return tensor
  if tensor.ndim == 4:
    return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
  return tensor.T


def _big_vision_name(path):
  short, block = _split(path)
  before = 'params/llm/' if path[0] == 'decoder' else 'params/img/'
  if block is not None:
    inside = 'layers/' if path[0] == 'decoder' else 'Transformer/encoderblock/'
    before += inside
  if short in _BIG_VISION:
    return before + _BIG_VISION[short]
  return f'{before}{_BIG_VISION[short[:-1]]}/{short[-1]}'


def _big_vision_layout(path, tensor):
  """One of stacked blocks, one of what is in one tensor, and heads joined.

  Of H heads of K features Gemma's q is [H, D, K], k and v are one tensor [2, G,
  D, K], out is [H, K, D], gate and up are one tensor [2, D, F]. Of SigLIP q, k
  and v have kernels [D, H, K] and biases [H, K], out has a kernel [H, K, D].
  """
  short, block = _split(path)
  if block is not None:
    tensor = tensor[block]
  if short[0] == 'decoder' and short[-1] == 'kernel':
    name = short[-2]
    if name in ('key', 'value', 'gate', 'up'):
      tensor = tensor[int(name in ('value', 'up'))]
    if name in ('query', 'key', 'value'):
      tensor = tensor.transpose(1, 0, 2)
      return tensor.reshape(len(tensor), -1)
  if short[-1] == 'kernel' and short[-2] in ('query', 'key', 'value'):
    return tensor.reshape(len(tensor), -1)
  if short[-1] in ('kernel', 'pos_embed', 'token_embed'):
    return tensor.reshape(-1, tensor.shape[-1])
  return tensor.reshape(-1)


def _check_size(source, config, readers, name_of):
  """By the tensors: the size of images and the vocabulary."""

  def rows_of(*path):
    name = name_of(path)
    return name, readers[name]().shape[-2] if name in readers else None

  name, rows = rows_of('vision', 'pos_embed')
  if rows not in (None, config.vision.grid**2):
    side = math.isqrt(rows) * config.vision.patch_size
    raise ValueError(
      f'{source}: it is of images of {side} pixels ({name} has {rows:,} rows), '
      f'config.model.name of {config.vision.image_size}; set '
      'config.model.pretrained to the checkpoint of that size.'
    )
  name, rows = rows_of('decoder', 'token_embed')
  if rows not in (None, config.decoder.vocab_size):
    raise ValueError(
      f'{source}: its vocabulary has {rows:,} entries ({name}), that of '
      f'config.model.name {config.decoder.vocab_size:,}; set '
      'config.model.pretrained to a PaliGemma of that vocabulary.'
    )


def _check_files(file, config):
  """What config.json says, as far as it is there."""
  if not file.exists():
    return
  given = config_files.read_json(file)
  if given.get('model_type') != 'paligemma':
    raise ValueError(
      f'{file}: model_type is {given.get("model_type")!r}; only a paligemma is '
      'read here.'
    )
  vision, decoder = config.vision, config.decoder
  for part, known in (
    (
      'vision_config',
      {
        'image_size': vision.image_size,
        'patch_size': vision.patch_size,
        'num_attention_heads': vision.num_heads,
        'layer_norm_eps': vision.eps,
      },
    ),
    (
      'text_config',
      {
        'model_type': 'gemma',
        'vocab_size': decoder.vocab_size,
        'num_attention_heads': decoder.num_heads,
        'num_key_value_heads': decoder.num_kv_heads,
        'head_dim': decoder.head_dim,
        'rms_norm_eps': decoder.eps,
      },
    ),
  ):
    section = given.get(part, {})
    for key, value in known.items():
      if section.get(key, value) != value:
        raise ValueError(
          f'{file}: {part}.{key} is {section[key]!r}, that of '
          f'config.model.name {value!r}; set config.model.pretrained to a '
          'checkpoint of that model.'
        )
