import copy

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.models import vit
from experiments.pretrained import params as pretrained

TINY = vit.ViTConfig(4, 16, 2, 2, 24, 5, 1e-6, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope='module')
def params():
  rng = np.random.default_rng(0)
  values = {
    path: rng.normal(size=shape).astype(np.float32)
    for path, shape in pretrained.shapes(_build).items()
  }
  return nnx.traversals.unflatten_mapping(values)


def test_the_params_are_in_the_model(params):
  model = pretrained.with_params(_build, params)
  found = nnx.to_pure_dict(nnx.state(model))
  jax.tree.map(np.testing.assert_array_equal, found, params)
  kernel = params['blocks'][0]['attn']['query']['kernel']
  mine = model.blocks[0].attn.query.kernel[...]
  assert not np.shares_memory(np.asarray(mine), kernel)


def test_half_precision_becomes_float32(params):
  half = jax.tree.map(lambda p: p.astype(np.float16), params)
  model = pretrained.with_params(_build, half)
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))}
  assert dtypes == {np.dtype('float32')}


def test_missing_tensor(params):
  params = copy.deepcopy(params)
  del params['blocks'][1]['attn']['key']['bias']
  with pytest.raises(ValueError, match=r'no tensor for blocks\.1\.attn\.key'):
    pretrained.with_params(_build, params)


def test_surplus_tensor(params):
  params = {**params, 'mask_token': np.zeros(384)}
  with pytest.raises(ValueError, match='the model has no mask_token'):
    pretrained.with_params(_build, params)


def test_tensor_of_another_shape(params):
  params = {**params, 'pos_embed': np.zeros((17, 16))}
  with pytest.raises(
    ValueError, match=r'pos_embed has shape \(17, 16\), .*\(26, 16\)'
  ):
    pretrained.with_params(_build, params)


def _build():
  return vit.ViT(TINY, rngs=nnx.Rngs(0))
