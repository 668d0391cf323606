"""The files beside weights: of transformers, timm and open_clip -> facts.

And back, of transformers alone.

config.json and preprocessor_config.json of transformers, config.json of timm,
open_clip_config.json of open_clip.
"""

import json
import re
from typing import Any, NamedTuple

from experiments.pretrained import swin_files

CONFIG = 'config.json'
_OPEN_CLIP = 'open_clip_config.json'
PREPROCESSOR = 'preprocessor_config.json'
_PROCESSOR = 'processor_config.json'
NAMES = (CONFIG, _OPEN_CLIP, PREPROCESSOR, _PROCESSOR)
HEAD = 'head.safetensors'  # the file, where transformers has no such head
UNIT_FEATURES = 'unit_features'  # the key of our own: what that head sees

# Of transformers: attributes of our configs, and what they are called.
_BOTH = {
  'width': 'hidden_size',
  'depth': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'mlp_dim': 'intermediate_size',
  'activation': 'hidden_act',
  'eps': 'layer_norm_eps',
}
_VISION = {**_BOTH, 'patch_size': 'patch_size', 'image_size': 'image_size'}
_TEXT = {
  **_BOTH,
  'vocab_size': 'vocab_size',
  'context_length': 'max_position_embeddings',
}
# What is meant where config.json leaves a key out.
_VIT_DEFAULTS = {
  'hidden_size': 768,
  'num_hidden_layers': 12,
  'num_attention_heads': 12,
  'intermediate_size': 3072,
  'hidden_act': 'gelu',
  'layer_norm_eps': 1e-12,
  'patch_size': 16,
  'image_size': 224,
}
_CLIP_DEFAULTS = {
  **_VIT_DEFAULTS,
  'hidden_act': 'quick_gelu',
  'layer_norm_eps': 1e-5,
  'patch_size': 32,
}
_TEXT_DEFAULTS = {
  **_CLIP_DEFAULTS,
  'hidden_size': 512,
  'num_attention_heads': 8,
  'intermediate_size': 2048,
  'vocab_size': 49408,
  'max_position_embeddings': 77,
}
_DINOV2_DEFAULTS = {**_VIT_DEFAULTS, 'layer_norm_eps': 1e-6, 'patch_size': 14}
_MODEL_TYPES = ('clip', 'clip_vision_model', 'vit', 'deit', 'dinov2', 'swin')
# What a model with a head is called, or, of CLIP, its vision tower.
_ARCHITECTURES = {
  'clip': 'CLIPVisionModelWithProjection',
  'vit': 'ViTForImageClassification',
  'deit': 'DeiTForImageClassification',
  'dinov2': 'Dinov2ForImageClassification',
}
_PROJECTION = 512
_MLP_RATIO = 4  # in all three libraries

# Of timm: width, depth and heads.
_SIZES = {
  'tiny': (192, 12, 3),
  'small': (384, 12, 6),
  'base': (768, 12, 12),
  'large': (1024, 24, 16),
  'huge': (1280, 32, 16),
}
_ARCHITECTURE = re.compile(
  rf'(?:vit|deit)_({"|".join(_SIZES)})(_distilled)?_patch(\d+)_(\d+|dinov2)'
)
# Keys of timm and open_clip that are read,
_READ = (
  *('embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'patch_size', 'img_size'),
  *('depths', 'window_size'),
  *('vision_cfg', 'text_cfg', 'quick_gelu'),
  *('width', 'layers', 'head_width', 'heads', 'image_size'),
  *('vocab_size', 'context_length'),
)
# those that change nothing here,
_FREE = re.compile(
  r'num_classes|dynamic_img_(size|pad)|init_values|\w*drop\w*_rate'
  r'|patch_dropout|output_tokens|attn_pooler_\w+|timm_(?!model_name)\w+'
  r'|hf_(?!model_name)\w+|tokenizer_\w+|pad_id|eos_id'
)
# and those that say what is done anyway.
_USUAL = (
  ('in_chans', 3),
  ('global_pool', 'token'),
  ('pos_embed_type', 'learnable'),
  ('pool_type', 'tok'),
  ('pool_type', 'argmax'),
  ('proj_type', 'linear'),
)


class Fact(NamedTuple):
  """A value, and where it stands, for errors: the file and the key."""

  value: Any
  where: str


def of_open_clip(path):
  """Whether a checkpoint is described by open_clip's file.

  Where transformers' is there too, it is not: those weights come first.

  Args:
    path: a pathlib.Path, its folder or its .safetensors file.
  """
  folder = path if path.is_dir() else path.parent
  if not (folder / _OPEN_CLIP).exists():
    return False
  if not (folder / CONFIG).exists() or path.name.startswith('open_clip'):
    return True
  return path.is_dir() and 'model_type' not in read_json(folder / CONFIG)


def read(path):
  """What the files beside a checkpoint say, as they say it.

  Args:
    path: a pathlib.Path, its folder or its .safetensors file.

  Returns:
    vision: a `Fact` of each of the things that `metadata.Metadata` names.
    text: the same of the text tower, if there is one.

  Raises:
    ValueError: a file is damaged, or of a model that is not read here.
  """
  folder = path if path.is_dir() else path.parent
  file = folder / (_OPEN_CLIP if of_open_clip(path) else CONFIG)
  vision, text = {}, {}
  if file.exists():
    try:
      vision, text = _describe(file, read_json(file))
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
      raise ValueError(
        f'{file} is not as its library writes it ({error!r}): download it '
        'again.'
      ) from error
  if 'mean' not in vision:
    vision |= _preprocessing(folder)
  return vision, text


def read_json(path):
  """A dict out of a .json file.

  Raises:
    ValueError: it is damaged. It names the file.
  """
  try:
    value = json.loads(path.read_text('utf-8-sig'))
  except ValueError as error:
    raise ValueError(
      f'{path} is cut short or damaged ({error}): download it again.'
    ) from error
  if not isinstance(value, dict):
    raise ValueError(f'{path} holds no JSON object: download it again.')
  return value


def of_transformers(family, config, class_names, image_size, crop):
  """What transformers writes beside the weights of a model with a head.

  Args:
    family: as `metadata.family` returns it, but 'other'.
    config: the `vit.ViTConfig`.
    class_names: C strings.
    image_size: of the images that the head was trained on, in pixels.
    crop: their share of the shorter side, as `augment.evaluation` takes it.

  Returns:
    `{name of the file: a dict}`.
  """
  labels = dict(enumerate(class_names))
  given = {
    'architectures': [_ARCHITECTURES[family]],
    'model_type': 'clip_vision_model' if family == 'clip' else family,
    **{key: getattr(config, field) for field, key in _VISION.items()},
    'dtype': 'float32',
    'id2label': labels,
    'label2id': {name: label for label, name in labels.items()},
  }
  if family == 'clip':
    given['projection_dim'] = config.projection
  if family == 'dinov2':
    ratio = given.pop('intermediate_size') / config.width
    # transformers takes no 4.0.
    given['mlp_ratio'] = int(ratio) if ratio == int(ratio) else ratio
    given['use_mask_token'] = False
  pixels = {
    # It does what `augment.CentreCrop` does.
    'image_processor_type': 'CLIPImageProcessor',
    'do_convert_rgb': True,
    'do_resize': True,
    'size': {'shortest_edge': int(image_size / crop)},
    'resample': 3,  # bicubic
    'do_center_crop': True,
    'crop_size': {'height': image_size, 'width': image_size},
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': config.mean,
    'image_std': config.std,
  }
  return {CONFIG: given, PREPROCESSOR: pixels}


def _describe(path, given):
  if path.name == _OPEN_CLIP:
    return _open_clip(path, given)
  if 'architecture' in given:
    return _timm(path, given), {}
  return _transformers(path, given)


def _transformers(path, given):
  model_type = given.get('model_type')
  if model_type not in _MODEL_TYPES:
    raise ValueError(
      f'{path}: model_type is {model_type!r}; what is read is '
      f'{", ".join(_MODEL_TYPES)}.'
    )
  family = model_type.removesuffix('_vision_model')
  facts = {'family': Fact(family, f'{path}: model_type')}
  if model_type == 'clip':
    # Early versions wrote a second copy, which takes precedence.
    vision, text = (
      (given.get(name) or {}) | (given.get(f'{name}_dict') or {})
      for name in ('vision_config', 'text_config')
    )
    # The sections have one of their own, which is not looked at.
    projection = given.get('projection_dim', _PROJECTION)
    projection = Fact(projection, f'{path}: projection_dim')
    where = f'{path}: vision_config.'
    facts |= _section(where, _VISION, _CLIP_DEFAULTS, vision)
    where = f'{path}: text_config.'
    text_facts = _section(where, _TEXT, _TEXT_DEFAULTS, text)
    # 2 is what transformers wrote for "the highest id" until 2023.
    if (end := text.get('eos_token_id')) not in (None, 2):
      text_facts['end'] = Fact(end, f'{where}eos_token_id')
    facts['projection'] = text_facts['projection'] = projection
    return facts, text_facts
  where = f'{path}: '
  if model_type == 'swin':
    values = swin_files.of_transformers(path, given)
    return facts | {
      field: Fact(value, where + key) for field, (value, key) in values.items()
    }, {}
  if model_type == 'clip_vision_model':
    keys = {**_VISION, 'projection': 'projection_dim'}
    defaults = {**_CLIP_DEFAULTS, 'projection_dim': _PROJECTION}
    return facts | _section(where, keys, defaults, given), {}
  if model_type == 'dinov2':
    facts |= _section(where, _VISION, _DINOV2_DEFAULTS, given)
    ratio = given.get('mlp_ratio', _MLP_RATIO)
    mlp_dim = int(facts['width'].value * ratio)
    facts['mlp_dim'] = Fact(mlp_dim, f'{where}hidden_size * mlp_ratio')
    return facts, {}
  return facts | _section(where, _VISION, _VIT_DEFAULTS, given), {}


def _section(where, keys, defaults, given):
  """The facts of one section of transformers' file."""
  for key, needed in (
    ('num_channels', 3),
    ('qkv_bias', True),
    ('use_swiglu_ffn', False),
  ):
    if given.get(key, needed) != needed:
      raise ValueError(
        f'{where}{key} is {given[key]!r}; only {needed!r} is read.'
      )
  given = defaults | given
  return {field: Fact(given[key], where + key) for field, key in keys.items()}


def _preprocessing(folder):
  """Mean and standard deviation out of transformers' other files.

  The crop in them is no matter of the weights: DINOv2's is of 224 pixels, and
  its positions are of 518.
  """
  where, given = folder / PREPROCESSOR, {}
  if where.exists():
    given = read_json(where)
  elif (folder / _PROCESSOR).exists():
    where = folder / _PROCESSOR
    given = read_json(where).get('image_processor') or {}
  if not given.get('do_normalize', True):
    given = {'image_mean': (0, 0, 0), 'image_std': (1, 1, 1)}
    where = f'{where}: do_normalize is False, so that'
  return {
    field: Fact(given[key], f'{where}: {key}')
    for field, key in (('mean', 'image_mean'), ('std', 'image_std'))
    if key in given
  }


def _timm(path, given):
  name = given['architecture']
  # Until 2023 what is in pretrained_cfg stood at the top.
  pixels = given.get('pretrained_cfg') or given
  args = given.get('model_args') or {}
  if values := swin_files.of_timm(name, args):
    # Of the head, which is not read.
    own = {key: value for key, value in args.items() if key != 'global_pool'}
    _check_usual(f'{path}: model_args.', own)
    values |= {'mean': pixels['mean'], 'std': pixels['std']}
    return _facts(f'{path}: the ', values, f' of {name}')
  match = _ARCHITECTURE.fullmatch(name)
  if not match:
    raise ValueError(
      f'{path}: architecture is {name!r}; what is read of timm is vit and deit '
      'in the sizes tiny to huge, such as vit_base_patch16_224, '
      'deit_base_distilled_patch16_224 and vit_small_patch14_dinov2, and '
      f'swin in the sizes tiny to large, such as {swin_files.NAME}.'
    )
  size, distilled, patch_size, kind = match.groups()
  width, depth, num_heads = _SIZES[size]
  pooled = {'global_pool': given.get('global_pool')}
  _check_usual(f'{path}: ', pooled)
  _check_usual(f'{path}: model_args.', args)
  width = args.get('embed_dim', width)
  values = {
    'family': kind if kind == 'dinov2' else 'deit' if distilled else 'vit',
    'width': width,
    'depth': args.get('depth', depth),
    'num_heads': args.get('num_heads', num_heads),
    'mlp_dim': int(width * args.get('mlp_ratio', _MLP_RATIO)),
    'activation': 'gelu',
    'eps': 1e-6,
    'patch_size': args.get('patch_size', int(patch_size)),
    'image_size': args.get('img_size') or pixels['input_size'][1:],
    'mean': pixels['mean'],
    'std': pixels['std'],
  }
  return _facts(f'{path}: the ', values, f' of {name}')


def _open_clip(path, given):
  model, pixels = given['model_cfg'], given.get('preprocess_cfg') or {}
  vision = {'width': 768, 'patch_size': 16, **model['vision_cfg']}
  text = {'width': 512, 'heads': 8, **model['text_cfg']}
  where = f'{path}: model_cfg.'
  _check_usual(where, model)
  _check_usual(f'{where}vision_cfg.', vision)
  _check_usual(f'{where}text_cfg.', text)

  def both(section):
    return {
      'width': section['width'],
      'depth': section.get('layers', 12),
      'mlp_dim': int(section['width'] * section.get('mlp_ratio', _MLP_RATIO)),
      'activation': 'quick_gelu' if model.get('quick_gelu') else 'gelu',
      'eps': 1e-5,
      'projection': model['embed_dim'],
    }

  vision = {
    **both(vision),
    'family': 'clip',
    'num_heads': vision['width'] // vision.get('head_width', 64),
    'patch_size': vision['patch_size'],
    'image_size': vision.get('image_size', 224),
  }
  pixels = {key: pixels[key] for key in ('mean', 'std') if key in pixels}
  text = {
    **both(text),
    'num_heads': text['heads'],
    'vocab_size': text.get('vocab_size', 49408),
    'context_length': text.get('context_length', 77),
  }
  return (
    _facts(f'{where}vision_cfg: the ', vision)
    | _facts(f'{path}: preprocess_cfg.', pixels),
    _facts(f'{where}text_cfg: the ', text),
  )


def _facts(before, values, behind=''):
  return {
    field: Fact(value, f'{before}{field}{behind}')
    for field, value in values.items()
  }


def _check_usual(where, given):
  """Refuses keys that are not read and may change what is computed."""
  for key, value in given.items():
    free = key in _READ or _FREE.fullmatch(key)
    if value and not free and (key, value) not in _USUAL:
      raise ValueError(f'{where}{key} is {value!r}, which is not read here.')
