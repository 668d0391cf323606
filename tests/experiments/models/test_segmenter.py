import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.models import blocks, segmenter, swin, vit
from tests.experiments import tiny_study

SWIN = swin.SwinConfig(
  width=8, depths=(2, 2), num_heads=(2, 4), window=3, mlp_ratio=2
)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (2, 20, 28, 3)).astype(np.uint8)


def of_vit():
  backbone = vit.ViT(tiny_study.CLIP, rngs=nnx.Rngs(0))
  return segmenter.Segmenter(backbone, segmenter.LinearDecoder(16, 3))


def of_swin(**changes):
  config = dataclasses.replace(SWIN, **changes)
  backbone = swin.Swin(config, rngs=nnx.Rngs(0))
  head = segmenter.MLPDecoder(
    config.widths, 3, eps=1e-5, hidden=12, rngs=nnx.Rngs(1)
  )
  return segmenter.Segmenter(backbone, head)


def test_a_linear_decoder_on_the_patches_of_a_vit():
  model = of_vit()
  tokens, grid = model.embed(IMAGES)
  assert grid == (5, 7)
  assert model.stride == 4
  assert not np.any(model.head(model.features(tokens, grid)))
  kernel = RNG.normal(size=(16, 3)).astype(np.float32)
  model.head.linear.kernel[...] = kernel
  features = model.features(tokens, grid)
  normalised = model.backbone.config.normalize(IMAGES)
  # Without the class token, row by row.
  expected = model.backbone(normalised)[:, 1:].reshape(2, 5, 7, 16)
  np.testing.assert_allclose(features[0], expected, atol=1e-5)
  np.testing.assert_allclose(model.head(features), expected @ kernel, atol=1e-5)


def test_upper_blocks_go_on_from_the_lower_ones():
  model = of_vit()
  tokens, grid = model.embed(IMAGES)
  lower = model.backbone.encode(tokens, stop=1)
  (upper,) = model.features(lower, grid, 1)
  np.testing.assert_allclose(upper, model.features(tokens, grid)[0], atol=1e-6)


@pytest.mark.parametrize('size', [(20, 28), (27, 35)])
def test_the_all_mlp_decoder(size):
  """It is SegFormer's: resized features, concatenated, and fused by one."""
  model = of_swin()
  images = RNG.integers(0, 256, (2, *size, 3)).astype(np.uint8)
  tokens, grid = model.embed(images)
  features = model.features(tokens, grid)
  sides = [feature.shape[1:3] for feature in features]
  assert sides == [grid, tuple(-(-side // 2) for side in grid)]
  head, projected = model.head, []
  for i, x in enumerate(features):
    x = head.norms[i](x) if i < 1 else x
    x = x @ head.project[i].kernel[...] + head.project[i].bias[...]
    projected.append(np.asarray(double(x, grid) if i else x))
  kernel = np.concatenate([fuse.kernel[...] for fuse in head.fuse])
  fused = np.concatenate(projected, -1) @ kernel
  fused = (fused - fused.mean(-1, keepdims=True)) / np.sqrt(
    fused.var(-1, keepdims=True) + 1e-5
  )
  expected = np.maximum(fused, 0) @ head.classify.kernel[...]
  found = head(features)
  assert found.shape == (2, *grid, 3)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def double(x, grid):
  """Cells of twice the side, by jax's bilinear interpolation."""
  B, h, w, D = x.shape
  return jax.image.resize(x, (B, 2 * h, 2 * w, D), 'linear')[
    :, : grid[0], : grid[1]
  ]


def test_drop_path_is_drawn_for_training_alone():
  model = of_swin(drop_path=0.5)
  tokens, grid = model.embed(IMAGES)
  plain, again = (model.features(tokens, grid)[-1] for _ in range(2))
  np.testing.assert_array_equal(plain, again)
  first, same, other = (
    model.features(tokens, grid, key=jax.random.key(seed))[-1]
    for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, same)
  assert np.abs(first - plain).max() > 1e-3
  assert np.abs(first - other).max() > 1e-3


def test_the_depth_of_every_parameter():
  """Blocks count through; the merging is of the block behind it."""
  params = nnx.to_pure_dict(nnx.state(of_swin(), nnx.Param))
  depths = blocks.depths(params)
  assert set(jax.tree.leaves(depths['head'])) == {0}
  backbone = depths['backbone']
  assert set(jax.tree.leaves(backbone['norm'])) == {0}
  for i in range(4):
    assert set(jax.tree.leaves(backbone['blocks'][i])) == {4 - i}
  assert 'merge' in backbone['blocks'][2]
  assert set(jax.tree.leaves(backbone['patch_embed'])) == {5}


@pytest.mark.parametrize('scale', [0.25, 0.4, 1.0])
def test_resizing_is_bilinear(scale):
  """As jax.image does it, where it enlarges."""
  x = RNG.normal(size=(2, 6, 8, 3)).astype(np.float32)
  size = tuple(round(side / scale) for side in (6, 8))
  scales = np.full((2, 2), scale, np.float32)
  found = segmenter.resize(x, size, scales)
  expected = jax.image.resize(x, (2, *size, 3), 'linear')
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_heads': (3, 4)}, r'widths \(8, 16\) cannot be shared out among \(3'),
    ({'drop_path': 1.0}, r'drop_path is 1\.0; a rate is in \[0, 1\)'),
  ],
)
def test_configs_that_make_no_model(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SWIN, **changes)
