"""What the files beside a checkpoint say, and what contradicts them."""

import dataclasses
import itertools
import json
import shutil

import pytest

from experiments.models import clip, vit
from experiments.pretrained import load, safetensors

ALL = (
  *('clip', 'vit', 'deit', 'dinov2'),
  *('timm_vit', 'timm_deit', 'timm_dinov2', 'open_clip'),
)


@pytest.mark.parametrize('name', ALL)
def test_the_files_say_it_all(reference, configs, text_configs, name):
  assert load.vit_config('', reference / name) == configs[name]
  if text := text_configs.get(name):
    assert load.text_config('', reference / name) == text
  load.check(configs[name], reference / name, text)


CHANGES = (
  {'width': 32},
  {'depth': 3},
  {'num_heads': 4},
  {'mlp_dim': 12},
  {'grid': 4},
  {'patch_size': 5, 'grid': 4},
  {'eps': 3e-6},
  {'activation': None},
  {'mean': (0.4, 0.5, 0.5)},
  {'std': (0.4, 0.5, 0.5)},
  {'layer_scale': None},
  {'distilled': None},
  {'pre_norm': None},
)


@pytest.mark.parametrize(
  ('name', 'changes'),
  [
    *itertools.product(ALL, CHANGES),
    *itertools.product(('clip', 'open_clip'), [{'projection': 16}]),
  ],
)
def test_every_contradiction_is_refused(
  reference, configs, tmp_path, name, changes
):
  """By the files alone: the weights are not there yet."""
  for path in (reference / name).glob('*config.json'):
    shutil.copy(path, tmp_path)
  config = configs[name]
  others = {'gelu': 'quick_gelu', 'quick_gelu': 'gelu', True: False}
  others |= {False: True}
  changes = {
    key: others[getattr(config, key)] if value is None else value
    for key, value in changes.items()
  }
  with pytest.raises(
    ValueError, match=r"config\.json: .* is .*, but .*--config\.model\.name=''"
  ) as error:
    load.check(dataclasses.replace(config, **changes), tmp_path)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['clip', 'open_clip'])
@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('width', 16),
    ('depth', 3),
    ('num_heads', 4),
    ('mlp_dim', 13),
    ('projection', 9),
    ('eps', 1e-6),
    ('activation', 'other'),
    ('vocab_size', 519),
    ('context_length', 76),
  ],
)
def test_contradictions_of_the_text_tower(
  reference, configs, text_configs, name, key, value
):
  text = text_configs[name]
  if value == 'other':
    value = {'gelu': 'quick_gelu', 'quick_gelu': 'gelu'}[text.activation]
  text = dataclasses.replace(text, **{key: value})
  with pytest.raises(
    ValueError, match=r'config\.json: .*(text_c|projection|embed_dim)'
  ):
    load.check(configs[name], reference / name, text)


def edit(folder, file, **changes):
  path = folder / file
  given = json.loads(path.read_text()) if path.exists() else {}
  path.write_text(json.dumps(given | changes))


def published(folder, name, **changes):
  """config.json as the hub has it of one of `clip.CONFIGS`."""
  ours, text = vit.CONFIGS[name], clip.CONFIGS[name]
  sections = {
    'vision_config': {
      'hidden_size': ours.width,
      'intermediate_size': ours.mlp_dim,
      'num_attention_heads': ours.num_heads,
      'num_hidden_layers': ours.depth,
      'hidden_act': ours.activation,
      'image_size': ours.image_size,
      'patch_size': ours.patch_size,
    },
    'text_config': {
      'hidden_size': text.width,
      'intermediate_size': text.mlp_dim,
      'num_attention_heads': text.num_heads,
      'hidden_act': text.activation,
      'eos_token_id': 2,
    },
    'text_config_dict': None,
  }
  given = {'model_type': 'clip', 'projection_dim': ours.projection}
  edit(folder, 'config.json', **given, **sections, **changes)
  pixels = {'image_mean': ours.mean, 'image_std': ours.std}
  edit(folder, 'preprocessor_config.json', **pixels)


@pytest.mark.parametrize('name', clip.CONFIGS)
def test_the_remedy_is_the_name_of_the_model(tmp_path, name):
  published(tmp_path, name)
  assert load.vit_config('', tmp_path) == vit.CONFIGS[name]
  assert load.text_config('', tmp_path) == clip.CONFIGS[name]
  for other in clip.CONFIGS.keys() - {name}:
    with pytest.raises(ValueError, match=f'; set --config.model.name={name}.'):
      safetensors.check(vit.CONFIGS[other], tmp_path, clip.CONFIGS[other])


@pytest.mark.parametrize(
  ('mean', 'name', 'other'),
  [
    ((0.5,) * 3, 'vit_b16', 'deit_b16'),
    ((0.485, 0.456, 0.406), 'deit_b16', 'vit_b16'),
  ],
)
def test_mean_and_std_tell_vit_and_deit_apart(tmp_path, mean, name, other):
  edit(tmp_path, 'config.json', model_type='vit')
  pixels = {'image_mean': mean, 'image_std': vit.CONFIGS[name].std}
  edit(tmp_path, 'preprocessor_config.json', **pixels)
  assert load.vit_config('', tmp_path) == vit.CONFIGS[name]
  with pytest.raises(
    ValueError,
    match=rf'preprocessor_config\.json: image_mean is \({mean[0]}, .* has '
    rf'\({vit.CONFIGS[other].mean[0]}, .*name={name}',
  ):
    load.check(vit.CONFIGS[other], tmp_path)


def test_where_else_mean_and_std_are(tmp_path):
  edit(tmp_path, 'config.json', model_type='vit')
  pixels = {'image_mean': [0.5] * 3, 'image_std': [0.5] * 3}
  edit(tmp_path, 'processor_config.json', image_processor=pixels)
  assert load.vit_config('', tmp_path) == vit.CONFIGS['vit_b16']
  edit(tmp_path, 'preprocessor_config.json', **pixels, do_normalize=False)
  plain = load.vit_config('', tmp_path)
  assert (plain.mean, plain.std) == ((0, 0, 0), (1, 1, 1))


def test_what_no_file_says(tmp_path):
  with pytest.raises(ValueError, match=r'no file .* width, .*mean, std; copy'):
    load.vit_config('', tmp_path)
  edit(tmp_path, 'config.json', model_type='vit')
  with pytest.raises(ValueError, match=r'no file beside .* their mean, std; '):
    load.vit_config('', tmp_path)
  with pytest.raises(ValueError, match=r'no file beside .* vocab_size'):
    load.text_config('', tmp_path)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model_type': 'siglip'}, "model_type is 'siglip'; what is read is clip"),
    ({'model_type': None}, 'model_type is None'),
    ({'hidden_act': 'gelu_new'}, "hidden_act is 'gelu_new'; what is read is g"),
    ({'hidden_size': '768'}, "hidden_size is '768'; it has to be"),
    ({'patch_size': 0}, 'patch_size is 0; it has to be above 0'),
    ({'image_size': [224, 192]}, r'image_size is \[224, 192\]; it has'),
    ({'image_size': []}, r'image_size is \[\]; it has'),
    ({'num_channels': 1}, 'num_channels is 1; only 3'),
    ({'qkv_bias': False}, 'qkv_bias is False; only True'),
    ({'model_type': 'dinov2', 'use_swiglu_ffn': True}, 'use_swiglu_ffn is Tru'),
    ({'model_type': 'dinov2', 'mlp_ratio': None}, 'not as its library writes'),
    ({'model_type': 'clip', 'vision_config': 3}, 'not as its library writes'),
    ({'architecture': 'vit_base_patch16_clip_224'}, "'vit_base_patch16_clip_2"),
    ({'architecture': 'vit_base_patch16_224'}, "KeyError\\('input_size'\\)"),
  ],
)
def test_files_of_what_is_not_read(tmp_path, changes, message):
  edit(tmp_path, 'config.json', **{'model_type': 'vit', **changes})
  with pytest.raises(ValueError, match=rf'config\.json.*{message}') as error:
    load.check(vit.CONFIGS['vit_b16'], tmp_path)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (b'[]', 'holds no JSON object'),
    (b'{"a', 'is cut short or damaged'),
    (b'\xff\xfe{\x00}\x00', 'is cut short or damaged'),
  ],
)
def test_files_that_are_no_json(tmp_path, text, message):
  (tmp_path / 'config.json').write_bytes(text)
  with pytest.raises(ValueError, match=rf'config\.json {message}'):
    load.check(vit.CONFIGS['vit_b16'], tmp_path)


def test_a_byte_order_mark(reference, configs, tmp_path):
  shutil.copytree(reference / 'vit', tmp_path, dirs_exist_ok=True)
  for path in tmp_path.glob('*.json'):
    path.write_text(path.read_text(), 'utf-8-sig')
  assert load.vit_config('', tmp_path) == configs['vit']


@pytest.mark.parametrize(
  ('section', 'changes'),
  [
    ('vision_cfg', {'attentional_pool': True}),
    ('vision_cfg', {'pool_type': 'avg'}),
    ('vision_cfg', {'timm_model_name': 'vit_base_patch16_224'}),
    ('text_cfg', {'hf_model_name': 'roberta-base'}),
    ('text_cfg', {'norm_kwargs': {'eps': 1e-6}}),
    ('', {'init_logit_bias': -10}),
  ],
)
def test_keys_of_open_clip_that_are_not_read(
  reference, configs, tmp_path, section, changes
):
  path = tmp_path / 'open_clip_config.json'
  given = json.loads((reference / 'open_clip' / path.name).read_text())
  model = given['model_cfg']
  (model[section] if section else model).update(changes)
  path.write_text(json.dumps(given))
  with pytest.raises(ValueError, match=f'{next(iter(changes))} is .* not read'):
    load.check(configs['open_clip'], tmp_path)


def test_arguments_of_timm_that_are_not_read(reference, configs, tmp_path):
  path = tmp_path / 'config.json'
  given = json.loads((reference / 'timm_vit' / path.name).read_text())
  free = {'dynamic_img_size': True, 'drop_path_rate': 0.1}
  given['model_args'] |= free
  path.write_text(json.dumps(given))
  assert load.vit_config('', tmp_path) == configs['timm_vit']
  given['model_args'] |= {'qk_norm': True}
  path.write_text(json.dumps(given))
  with pytest.raises(ValueError, match=r'model_args\.qk_norm is True, which'):
    load.vit_config('', tmp_path)
  path.write_text(json.dumps(given | {'global_pool': 'avg', 'model_args': {}}))
  with pytest.raises(ValueError, match=r"global_pool is 'avg', which"):
    load.vit_config('', tmp_path)


def test_two_libraries_in_one_folder(reference, configs, tmp_path):
  """transformers' come first; timm's do not where open_clip's are."""
  shutil.copytree(reference / 'open_clip', tmp_path, dirs_exist_ok=True)
  shutil.copytree(reference / 'clip', tmp_path, dirs_exist_ok=True)
  theirs = tmp_path / 'open_clip_model.safetensors'
  assert load.vit_config('', tmp_path) == configs['clip']
  assert load.vit_config('', theirs) == configs['open_clip']
  load.check(configs['clip'], tmp_path)
  load.load_vit(configs['open_clip'], theirs)
  for name in ('config.json', 'model.safetensors'):
    shutil.copy(reference / 'timm_vit' / name, tmp_path)
  assert load.vit_config('', tmp_path) == configs['open_clip']
  load.load_vit(configs['open_clip'], tmp_path)
  vit_only = tmp_path / 'model.safetensors'
  assert load.vit_config('', vit_only).eps == 1e-6


@pytest.mark.parametrize(
  ('name', 'size', 'quick_gelu', 'mean'),
  [
    ('clip_b32', 'b32', True, (0.48145466, 0.4578275, 0.40821073)),
    ('clip_b16', 'b16', True, (0.48145466, 0.4578275, 0.40821073)),
    ('clip_l14', 'l14', True, (0.48145466, 0.4578275, 0.40821073)),
    ('clip_l14_336', 'l14_336', True, (0.48145466, 0.4578275, 0.40821073)),
    ('clip_b32_laion', 'b32', False, (0.48145466, 0.4578275, 0.40821073)),
    ('clip_b16_laion', 'b16', False, (0.48145466, 0.4578275, 0.40821073)),
    ('clip_l14_laion', 'l14', False, (0.5, 0.5, 0.5)),
  ],
)
def test_clips_as_open_clip_describes_them(
  tmp_path, name, size, quick_gelu, mean
):
  """Its model_configs, and the mean and the GELU in its pretrained.py."""
  base = {'width': 512, 'heads': 8, 'layers': 12}
  large = {'width': 768, 'heads': 12, 'layers': 12}
  embed_dim, text, vision = {
    'b32': (512, base, {'layers': 12, 'width': 768, 'patch_size': 32}),
    'b16': (512, base, {'layers': 12, 'width': 768, 'patch_size': 16}),
    'l14': (768, large, {'layers': 24, 'width': 1024, 'patch_size': 14}),
    'l14_336': (
      768,
      large,
      {'image_size': 336, 'layers': 24, 'width': 1024, 'patch_size': 14},
    ),
  }[size]
  model = {
    'embed_dim': embed_dim,
    'vision_cfg': {'image_size': 224, **vision},
    'text_cfg': {'context_length': 77, 'vocab_size': 49408, **text},
    'quick_gelu': quick_gelu,
  }
  pixels = {'mean': mean, 'std': vit.CONFIGS[name].std}
  edit(
    tmp_path, 'open_clip_config.json', model_cfg=model, preprocess_cfg=pixels
  )
  assert load.vit_config('', tmp_path) == vit.CONFIGS[name]
  assert load.text_config('', tmp_path) == clip.CONFIGS[name]


def test_the_second_copy_of_a_section_takes_precedence(tmp_path):
  published(tmp_path, 'clip_l14')
  given = json.loads((tmp_path / 'config.json').read_text())
  first = {'vision_config': {}, 'vision_config_dict': given['vision_config']}
  edit(tmp_path, 'config.json', **first)
  assert load.vit_config('', tmp_path) == vit.CONFIGS['clip_l14']
