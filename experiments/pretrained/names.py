"""How transformers, timm and open_clip name and lay out a model's tensors."""

import itertools
import math
import re
from typing import NamedTuple

import numpy as np


class Names(NamedTuple):
  """Of one kind of model in one library.

  Attributes:
    ours: our path -> their name. Within blocks without the block; of a module
      without its leaf, `.weight` or `.bias`, unless the name ends with `_`.
    ignored: regular expression: what a checkpoint may have besides.
    prefix: regular expression: before all names of the model, or before none.
    eps: of every LayerNorm; None where config.json says it.
    modules: what a module of transformers 5 is called that its files, and
      transformers 4, call otherwise: parts of names, the first ones first.
    depths: number of blocks of each stage, where they are numbered by stage.
    merging: the stage that has the patch merging before a stage, less that one.
  """

  ours: dict[str, str]
  ignored: str
  prefix: str = ''
  eps: float | None = None
  modules: tuple[tuple[str, str], ...] = ()
  depths: tuple[int, ...] = ()
  merging: int = 0


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
_CLIP_VISION = Names(
  ours={
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
)
_CLIP_TEXT = Names(
  ours={
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
_ATTENTION = (
  ('attention.attention.query', 'attention.q_proj'),
  ('attention.attention.key', 'attention.k_proj'),
  ('attention.attention.value', 'attention.v_proj'),
  ('attention.output.dense', 'attention.o_proj'),
)
_VIT = Names(  # and DeiT
  ours={
    'norm1': 'layernorm_before',
    'norm2': 'layernorm_after',
    'mlp.fc1': 'intermediate.dense',
    'mlp.fc2': 'output.dense',
    **_VIT_NAMES,
  },
  ignored=r'(cls_|distillation_)?classifier\.(weight|bias)'
  r'|((vit|deit)\.)?pooler\.dense\.(weight|bias)',
  prefix=r'(vit|deit)\.',
  modules=(
    *_ATTENTION,
    ('encoder.layer.', 'layers.'),
    ('intermediate.dense', 'mlp.fc1'),
    ('output.dense', 'mlp.fc2'),
  ),
)
_DINOV2 = Names(
  ours={
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
  modules=_ATTENTION,
)
_TIMM = Names(  # ViT, DeiT and DINOv2, as their authors name them too
  ours={
    'patch_embed': 'patch_embed.proj',
    'cls_token': 'cls_token',
    'dist_token': 'dist_token',
    'pos_embed': 'pos_embed',
    'blocks': 'blocks',
    'norm1': 'norm1',
    'attn.query': 'attn.qkv',
    'attn.key': 'attn.qkv',
    'attn.value': 'attn.qkv',
    'attn.out': 'attn.proj',
    'scale1': 'ls1.gamma',
    'norm2': 'norm2',
    'mlp.fc1': 'mlp.fc1',
    'mlp.fc2': 'mlp.fc2',
    'scale2': 'ls2.gamma',
    'norm': 'norm',
  },
  ignored=r'head(_dist)?\.(weight|bias)|pre_logits\.fc\.(weight|bias)'
  r'|mask_token',
  eps=1e-6,
)
_SWIN = Names(
  ours={
    'patch_embed': 'embeddings.patch_embeddings.projection',
    'patch_norm': 'embeddings.norm',
    'blocks': 'encoder.layers',
    'merge.norm': 'downsample.norm',
    'merge.reduction': 'downsample.reduction',
    'norm1': 'layernorm_before',
    'attn.query': 'attention.self.query',
    'attn.key': 'attention.self.key',
    'attn.value': 'attention.self.value',
    'attn.out': 'attention.output.dense',
    'attn.position_bias': 'attention.self.relative_position_bias_table',
    'norm2': 'layernorm_after',
    'mlp.fc1': 'intermediate.dense',
    'mlp.fc2': 'output.dense',
    'norm': 'layernorm',
  },
  ignored=r'classifier\.(weight|bias)|(swin\.)?embeddings\.mask_token'
  r'|.*\.relative_position_index',
  prefix=r'swin\.',
  merging=-1,
)
_TIMM_SWIN = Names(
  ours={
    'patch_embed': 'patch_embed.proj',
    'patch_norm': 'patch_embed.norm',
    'blocks': 'layers',
    'merge.norm': 'downsample.norm',
    'merge.reduction': 'downsample.reduction',
    'norm1': 'norm1',
    'attn.query': 'attn.qkv',
    'attn.key': 'attn.qkv',
    'attn.value': 'attn.qkv',
    'attn.out': 'attn.proj',
    'attn.position_bias': 'attn.relative_position_bias_table',
    'norm2': 'norm2',
    'mlp.fc1': 'mlp.fc1',
    'mlp.fc2': 'mlp.fc2',
    'norm': 'norm',
  },
  ignored=r'head\.(fc\.)?(weight|bias)|.*\.(relative_position_index|attn_mask)',
  eps=1e-5,
)
_RESBLOCK = {
  'norm1': 'ln_1',
  'attn.query': 'attn.in_proj_',
  'attn.key': 'attn.in_proj_',
  'attn.value': 'attn.in_proj_',
  'attn.out': 'attn.out_proj',
  'norm2': 'ln_2',
  'mlp.fc1': 'mlp.c_fc',
  'mlp.fc2': 'mlp.c_proj',
}
# What OpenAI's own files have besides.
_SIZES = r'input_resolution|context_length|vocab_size'
_OPEN_CLIP_VISION = Names(
  ours={
    'patch_embed': 'visual.conv1',
    'cls_token': 'visual.class_embedding',
    'pos_embed': 'visual.positional_embedding',
    'pre_norm': 'visual.ln_pre',
    'blocks': 'visual.transformer.resblocks',
    'norm': 'visual.ln_post',
    'projection.kernel': 'visual.proj',
    **_RESBLOCK,
  },
  ignored=r'(transformer|token_embedding|ln_final)\..*|positional_embedding'
  rf'|text_projection|logit_scale|attn_mask|{_SIZES}',
  eps=1e-5,
)
_OPEN_CLIP_TEXT = Names(
  ours={
    'token_embed': 'token_embedding.weight',
    'pos_embed': 'positional_embedding',
    'blocks': 'transformer.resblocks',
    'norm': 'ln_final',
    'projection.kernel': 'text_projection',
    'logit_scale': 'logit_scale',
    **_RESBLOCK,
  },
  ignored=rf'visual\..*|attn_mask|{_SIZES}',
  eps=1e-5,
)

_MODELS = {
  'transformers': {
    'clip': _CLIP_VISION,
    'text': _CLIP_TEXT,
    'vit': _VIT,
    'deit': _VIT,
    'dinov2': _DINOV2,
    'swin': _SWIN,
  },
  'timm': {
    'vit': _TIMM,
    'deit': _TIMM,
    'dinov2': _TIMM,
    'swin': _TIMM_SWIN,
  },
  'open_clip': {'clip': _OPEN_CLIP_VISION, 'text': _OPEN_CLIP_TEXT},
}
# Names that tell the libraries apart.
_SIGNS = {
  'transformers': re.compile(r'(\w+\.)?(embeddings|encoder)\.'),
  'timm': re.compile(r'patch_embed\.proj\.|blocks\.0\.'),
  'open_clip': re.compile(r'(visual\.)?(conv1|transformer\.resblocks)\.'),
}


def without_prefix(names):
  """Drops what all names share, such as `module.` or `model.`.

  Returns:
    `{the name that is left: the name}`.
  """
  modules = zip(*(name.split('.')[:-1] for name in names), strict=False)
  shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, modules)
  count = sum(len(parts[0]) + 1 for parts in shared)
  return {name[count:]: name for name in names}


def of(where, names, model, eps):
  """The `Names` of a checkpoint.

  Args:
    where: the checkpoint, for errors.
    names: of its tensors, as `without_prefix` leaves them.
    model: 'clip', 'vit', 'deit', 'dinov2', 'swin', or 'text' for CLIP's text
      tower.
    eps: of the model's LayerNorms.

  Raises:
    ValueError: no library names them so, or not those of this model, or has
      another eps.
  """
  signs = _SIGNS.items()
  signed = [name for name, sign in signs if any(map(sign.match, names))]
  if not signed:
    some = ', '.join(itertools.islice(sorted(names), 3)) or 'nothing'
    raise ValueError(
      f'{where}: no library that is read here names tensors so: {some}; '
      'transformers has embeddings.cls_token, timm blocks.0.attn.qkv.weight, '
      'open_clip visual.conv1.weight.'
    )
  library = signed[0]
  if model not in _MODELS[library]:
    raise ValueError(
      f'{where}: its names are those of {library}, of which '
      f'{", ".join(_MODELS[library])} are read, not {model}.'
    )
  found = _MODELS[library][model]
  if found.eps not in (None, eps):
    raise ValueError(
      f'{where}: its names are those of {library}, whose LayerNorms have an '
      f'eps of {found.eps}, not of {eps}; copy the .json files to its weights '
      "and set --config.model.name=''."
    )
  matches = (re.match(found.prefix, name) for name in names)
  prefix = next((match[0] for match in matches if match), '')
  if 'layers.0.downsample.norm.weight' in names:  # of timm before 0.9
    found = found._replace(merging=-1)
  return found._replace(prefix=prefix)


def to_write(family):
  """The `Names` under which transformers has a model with a head.

  Args:
    family: as `metadata.family` returns it.

  Raises:
    ValueError: transformers has no such family.
  """
  if family not in _MODELS['transformers']:
    raise ValueError(
      'transformers has no ViT of this kind; it has CLIP, ViT, DeiT and DINOv2.'
    )
  prefix = '' if family == 'clip' else f'{family}.'
  return _MODELS['transformers'][family]._replace(prefix=prefix)


def name_of(path, names):
  """('blocks', 3, 'norm1', 'bias') -> 'encoder.layer.3.norm1.bias'."""
  block = names.prefix
  if path[0] == 'blocks':
    block += f'{names.ours["blocks"]}.{_number(path, names)}.'
    path = path[2:]
  *module, leaf = path
  if (whole := '.'.join(path)) in names.ours:
    return block + names.ours[whole]
  theirs = names.ours['.'.join(module)]
  # torch calls the scale of a LayerNorm a weight too.
  leaf = 'bias' if leaf == 'bias' else 'weight'
  return f'{block}{theirs}{"" if theirs.endswith("_") else "."}{leaf}'


def _number(path, names):
  """That of a block: '3'; where stages have theirs, '1.blocks.1', or '1'."""
  _, block, *inside = path
  if not names.depths:
    return str(block)
  firsts = np.cumsum((0, *names.depths))
  stage = int(np.searchsorted(firsts, block, 'right')) - 1
  if inside[0] == 'merge':
    return str(stage + names.merging)
  return f'{stage}.blocks.{block - firsts[stage]}'


def module_of(path, names):
  """The module of a Linear, as PEFT on transformers 5 names it.

  ('blocks', 3, 'attn', 'out') -> 'vit.layers.3.attention.o_proj'.
  """
  module = name_of((*path, 'kernel'), names).removesuffix('.weight')
  for old, new in names.modules:
    module = module.replace(old, new)
  return module


def layout(path, name, tensor):
  """Their tensor as the model has it.

  [out, in] -> [in, out], [D, 3, H, W] -> [H W 3, D], [1, 1, D] -> [D], and one
  of query, key and value out of the three in one tensor, [3 D, ...].
  """
  if re.search(r'(qkv\.|in_proj_)\w+$', name) and len(tensor) % 3 == 0:
    part = ('query', 'key', 'value').index(path[-2])
    tensor = np.split(tensor, 3)[part]
  if path[-1] != 'kernel':
    return np.squeeze(tensor)
  if tensor.ndim == 4:
    return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
  # A bare parameter, open_clip's projections, is [in, out] already.
  return tensor.T if name.endswith('weight') else tensor


def torch_layout(path, name, tensor):
  """The inverse of `layout`, of one of the `Names` that `to_write` returns."""
  if path[-1] == 'kernel':
    if path[-2] == 'patch_embed':
      side = math.isqrt(len(tensor) // 3)
      return tensor.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)
    return tensor.T
  if re.search(r'_(token|embeddings)$', name):
    # A parameter of the model's own, which torch adds to a batch: [1, ..., D].
    return tensor.reshape(1, -1, tensor.shape[-1])
  return tensor
