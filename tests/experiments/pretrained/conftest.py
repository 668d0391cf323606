"""Tiny checkpoints that transformers wrote, and what it makes of them."""

import dataclasses
import pathlib

import pytest

from experiments.models import clip, vit

# It imports torch, which the tests do without.
collect_ignore = ['make_reference.py']

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
