import dataclasses
import pathlib

import jax
import pytest

from experiments import parallel
from experiments.models import clip, vit


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """What a study runs on, unless a test says otherwise."""
  devices = jax.devices()[:1]
  monkeypatch.setattr(parallel, 'all_devices', lambda: devices)


@pytest.fixture
def tiny_clip(monkeypatch):
  """The checkpoint of `make_reference`, in the place of CLIP ViT-B/16."""
  sizes = {'depth': 2, 'num_heads': 2, 'mlp_dim': 24, 'projection': 8}
  config = dataclasses.replace(
    vit.CONFIGS['clip_b16'], patch_size=4, width=16, grid=5, **sizes
  )
  text = dataclasses.replace(
    clip.CONFIGS['clip_b16'], width=8, vocab_size=518, **sizes
  )
  monkeypatch.setitem(vit.CONFIGS, 'clip_b16', config)
  monkeypatch.setitem(clip.CONFIGS, 'clip_b16', text)
  return pathlib.Path(__file__).parent / 'pretrained/reference/clip'
