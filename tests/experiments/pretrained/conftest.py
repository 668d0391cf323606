"""Tiny checkpoints of three libraries, and what those make of them."""

import dataclasses
import pathlib

import pytest
from safetensors.numpy import load_file

from experiments.models import clip, vit

# It imports torch, which the tests do without.
collect_ignore = [
  'make_llama.py',
  'make_reference.py',
  'make_paligemma.py',
  'time_paligemma.py',
]

_SIZES = {
  'patch_size': 4,
  'width': 16,
  'depth': 2,
  'num_heads': 2,
  'mlp_dim': 24,
  'grid': 5,
}
_CHANGES = {
  'clip': ('clip_b16', {'projection': 8}),
  'vit': ('vit_b16', {}),
  'deit': ('deit_b16_distilled', {}),
  'dinov2': ('dinov2_s14', {'mlp_dim': 32}),
  'timm_vit': ('augreg_b16', {}),
  'timm_deit': ('deit_b16_distilled', {'eps': 1e-6}),
  'timm_dinov2': ('dinov2_s14', {}),
  'open_clip': ('clip_b16', {'projection': 8, 'activation': 'gelu'}),
}


@pytest.fixture
def reference():
  """The folder of the checkpoints."""
  return pathlib.Path(__file__).parent / 'reference'


@pytest.fixture
def configs():
  """Of their ViTs, by folder."""
  return {
    folder: dataclasses.replace(vit.CONFIGS[name], **_SIZES | changes)
    for folder, (name, changes) in _CHANGES.items()
  }


@pytest.fixture
def text_config():
  return clip.TextConfig(
    width=8, depth=2, num_heads=2, mlp_dim=24, projection=8, vocab_size=518
  )


@pytest.fixture
def text_configs(text_config):
  """Of their text towers, by folder."""
  gelu = dataclasses.replace(text_config, mlp_dim=12, activation='gelu')
  return {'clip': text_config, 'open_clip': gelu}


@pytest.fixture
def tensors(reference):
  """The ViT of `reference`, under AugReg's names and in its layout."""
  theirs = load_file(reference / 'vit' / 'model.safetensors')
  D, H, K = 16, 2, 8
  patches = theirs['vit.embeddings.patch_embeddings.projection.weight']
  ours = {
    'cls': theirs['vit.embeddings.cls_token'],
    'embedding/kernel': patches.transpose(2, 3, 1, 0),
    'embedding/bias': theirs['vit.embeddings.patch_embeddings.projection.bias'],
    'Transformer/posembed_input/pos_embedding': theirs[
      'vit.embeddings.position_embeddings'
    ],
    'Transformer/encoder_norm/scale': theirs['vit.layernorm.weight'],
    'Transformer/encoder_norm/bias': theirs['vit.layernorm.bias'],
  }
  for i in range(2):
    layer = f'vit.encoder.layer.{i}'
    block = f'Transformer/encoderblock_{i}'
    for ln, name in (
      ('LayerNorm_0', 'layernorm_before'),
      ('LayerNorm_2', 'layernorm_after'),
    ):
      ours[f'{block}/{ln}/scale'] = theirs[f'{layer}.{name}.weight']
      ours[f'{block}/{ln}/bias'] = theirs[f'{layer}.{name}.bias']
    attention = f'{block}/MultiHeadDotProductAttention_1'
    for name in ('query', 'key', 'value'):
      linear = f'{layer}.attention.attention.{name}'
      kernel = theirs[f'{linear}.weight'].T.reshape(D, H, K)
      ours[f'{attention}/{name}/kernel'] = kernel
      ours[f'{attention}/{name}/bias'] = theirs[f'{linear}.bias'].reshape(H, K)
    linear = f'{layer}.attention.output.dense'
    kernel = theirs[f'{linear}.weight'].T.reshape(H, K, D)
    ours[f'{attention}/out/kernel'] = kernel
    ours[f'{attention}/out/bias'] = theirs[f'{linear}.bias']
    for dense, name in (
      ('Dense_0', 'intermediate.dense'),
      ('Dense_1', 'output.dense'),
    ):
      mlp = f'{block}/MlpBlock_3/{dense}'
      ours[f'{mlp}/kernel'] = theirs[f'{layer}.{name}.weight'].T
      ours[f'{mlp}/bias'] = theirs[f'{layer}.{name}.bias']
  return ours
