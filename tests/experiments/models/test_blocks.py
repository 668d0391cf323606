"""Of ViTs, in a list and stacked, and of a language model's names."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.models import blocks, heads, vit

TINY = dataclasses.replace(
  vit.CONFIGS['clip_b16'],
  width=8,
  depth=3,
  num_heads=2,
  mlp_dim=12,
  grid=2,
  projection=6,
)
BOTH = pytest.mark.parametrize('scan', [False, True])


def shapes(scan, **changes):
  """The params of a classifier, in shapes."""
  config = dataclasses.replace(TINY, scan=scan, **changes)
  return nnx.state(
    nnx.eval_shape(
      lambda: heads.Classifier(vit.ViT(config, rngs=nnx.Rngs(0)), 3)
    )
  )


def by_name(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@BOTH
def test_layer_axes(scan):
  params = shapes(scan)
  for tree in (params, nnx.to_pure_dict(params)):
    axes = blocks.layer_axes(tree)
    assert jax.tree.structure(axes) == jax.tree.structure(tree)
    in_blocks = jax.tree.leaves(axes['backbone'].pop('blocks'))
    assert set(in_blocks) == {int(scan)}
    assert set(jax.tree.leaves(axes)) == {0}


@BOTH
def test_depths(scan):
  params = shapes(scan)
  for tree in (params, nnx.to_pure_dict(params)):
    depths = blocks.depths(tree)
    assert jax.tree.structure(depths) == jax.tree.structure(tree)
    backbone = depths['backbone']
    in_blocks = backbone.pop('blocks')
    if scan:
      for depth, leaf in zip(
        jax.tree.leaves(in_blocks),
        jax.tree.leaves(tree['backbone']['blocks']),
        strict=True,
      ):
        assert depth.ndim == leaf.ndim
        assert np.squeeze(depth).tolist() == [3, 2, 1]
    else:
      found = [set(jax.tree.leaves(in_blocks[i])) for i in range(3)]
      assert found == [{3}, {2}, {1}]
    for above in (backbone.pop('norm'), backbone.pop('projection')):
      assert set(jax.tree.leaves(above)) == {0}
    assert set(jax.tree.leaves(depths['head'])) == {0}
    # Class token, positions, patch embedding and the norm before block 0.
    assert jax.tree.leaves(backbone) == [4] * 5


def test_depths_of_a_part_of_the_blocks():
  """As where the lower ones are not trained, or their leaves are masked."""
  params = {'blocks': {2: {'bias': np.ones(2)}, 3: {'bias': None}}}
  assert by_name(blocks.depths(params)) == {'blocks.2.bias': 1}
  params['blocks'][3]['bias'] = np.ones(2)
  assert by_name(blocks.depths(params)) == {
    'blocks.2.bias': 2,
    'blocks.3.bias': 1,
  }
  assert by_name(blocks.depths({'head': {'bias': np.ones(2)}})) == {
    'head.bias': 0
  }


def test_a_tower_inside_a_model():
  """Indices of two digits, and as strings, as checkpoints have them."""
  kernel = np.ones((2, 2))
  params = {
    'language': {
      'embed': kernel,
      'blocks': {str(i): {'mlp': {'up': kernel}} for i in range(11)},
      'norm': {'scale': kernel[0]},
    }
  }
  assert set(jax.tree.leaves(blocks.layer_axes(params))) == {0}
  depths = by_name(blocks.depths(params))
  assert depths['language.blocks.10.mlp.up'] == 1
  assert depths['language.blocks.2.mlp.up'] == 9
  assert depths['language.embed'] == 12
  assert depths['language.norm.scale'] == 0


def test_from_block():
  def trained(first):
    state = nnx.filter_state(shapes(scan=False), blocks.from_block(first))
    return nnx.to_pure_dict(state)

  found = trained(1)
  assert set(found) == {'backbone', 'head'}
  assert set(found['backbone']) == {'blocks', 'norm', 'projection'}
  assert set(found['backbone']['blocks']) == {1, 2}
  assert set(trained(2)['backbone']['blocks']) == {2}
  everything = nnx.to_pure_dict(shapes(scan=False))
  assert by_name(trained(0)).keys() == by_name(everything).keys()


def test_stacked_blocks_are_trained_from_block_0_only():
  params = shapes(scan=True)
  state = nnx.filter_state(params, blocks.from_block(0))
  assert by_name(state).keys() == by_name(params).keys()
  with pytest.raises(ValueError, match=r'backbone/blocks/.* block 1 cannot'):
    nnx.filter_state(params, blocks.from_block(1))


def test_stack_and_unstack():
  listed, stacked = (nnx.to_pure_dict(shapes(scan)) for scan in (False, True))
  rng = np.random.default_rng(0)
  listed = jax.tree.map(lambda x: rng.normal(size=x.shape), listed)
  found = blocks.stack(listed)
  assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, stacked)
  kernel = found['backbone']['blocks']['mlp']['fc1']['kernel']
  for i, block in listed['backbone']['blocks'].items():
    np.testing.assert_array_equal(kernel[i], block['mlp']['fc1']['kernel'])
  again = blocks.unstack(found)
  assert jax.tree.structure(again) == jax.tree.structure(listed)
  jax.tree.map(np.testing.assert_array_equal, again, listed)


def test_parts_of_layer_names():
  names = {
    'embed/kernel': (-1, 'input'),
    'backbone/blocks/11/attn/query/kernel': (11, 'block 11'),
    'blocks/attn/query/kernel[3]': (3, 'block 3'),
    'backbone/blocks/2': (2, 'block 2'),
    'backbone/norm/scale': (np.inf, 'output'),
    'head/kernel[2]': (np.inf, 'output'),
  }
  assert {name: blocks.part(name) for name in names} == names
