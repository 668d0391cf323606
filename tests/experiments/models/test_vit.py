import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from flax import nnx
from jax import test_util
from onnx import TensorProto, helper

from experiments.models import vit

SMALL = dataclasses.replace(
  vit.DINOV2_S14, width=24, depth=2, num_heads=3, mlp_dim=40, grid=5
)


@pytest.fixture(scope='module')
def model():
  return vit.ViT(SMALL, rngs=nnx.Rngs(0))


@pytest.fixture(scope='module')
def images():
  return jax.random.normal(jax.random.key(1), (2, 42, 28, 3))


@pytest.mark.parametrize(
  ('side', 'rows', 'columns'),
  [(37, 6, 6), (37, 16, 16), (37, 6, 9), (5, 12, 7), (37, 37, 37)],
)
def test_positions_resize_as_onnx_does(side, rows, columns):
  """84 px is 6 x 6 patches, 224 px 16 x 16. The reference is onnxruntime's."""
  rng = np.random.default_rng(0)
  grid = rng.normal(size=(side, side, 8)).astype(np.float32)
  expected = _onnx_resize(grid.transpose(2, 0, 1)[None], rows, columns)
  expected = expected[0].transpose(1, 2, 0).reshape(rows * columns, 8)
  resized = vit.resize_positions(
    jnp.asarray(grid.reshape(side * side, 8)), rows, columns
  )
  # Values reach 4; onnxruntime takes its coordinates in float32, ours are
  # float64: 2e-6 is what that leaves.
  np.testing.assert_allclose(resized, expected, atol=1e-5)


def test_two_halves_make_the_whole(model, images):
  stored = model.encode(model.embed(images), stop=1)
  halves = model.norm(model.encode(stored, start=1))
  np.testing.assert_array_equal(halves, model(images))
  assert np.abs(stored - model.encode(stored, start=1)).max() > 1e-3


def test_images_do_not_see_each_other(model, images):
  # Other batch, other matmul blocking: the last bits of values near 3.
  np.testing.assert_allclose(model(images)[1:], model(images[1:]), atol=1e-5)


def test_embed_puts_patches_in_rows_behind_the_class_token(model):
  """Of 3 x 2 patches, row 1, column 0 is the one not black: token 3."""
  images = jnp.zeros((1, 42, 28, 3)).at[:, 14:28, :14].set(1.0)
  difference = model.embed(images) - model.embed(jnp.zeros_like(images))
  changed = np.abs(difference).max((0, 2)) > 0
  np.testing.assert_array_equal(changed, [0, 0, 0, 1, 0, 0, 0])


def test_layer_norm_gradient():
  x, scale, bias = (
    jax.random.normal(jax.random.key(i), shape)
    for i, shape in enumerate([(3, 5, 16), (16,), (16,)])
  )
  test_util.check_grads(
    lambda *args: vit.layer_norm(*args, 1e-6),
    (x, scale, bias),
    order=1,
    modes=['rev'],
    rtol=1e-2,  # central differences in float32
  )


def test_gelu_is_the_exact_one():
  x = jnp.linspace(-4, 4, 101)
  exact = jax.nn.gelu(x, approximate=False)
  # The tanh approximation is off by 5e-4.
  np.testing.assert_allclose(vit.gelu(x), exact, atol=1e-6)


def test_normalize_repeats_grey():
  grey = np.array([[[0]], [[255]]], np.uint8)
  rgb = SMALL.normalize(grey)
  assert rgb.shape == (2, 1, 3)
  assert rgb.dtype == jnp.float32
  np.testing.assert_allclose(
    rgb[1], [[(1 - m) / s for m, s in zip(SMALL.mean, SMALL.std, strict=True)]],
    rtol=1e-6,
  )  # fmt: skip
  np.testing.assert_array_equal(rgb, SMALL.normalize(grey.repeat(3, -1)))


def test_every_parameter_is_one_named_layer(model):
  names = {
    '.'.join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))
  }
  assert {
    'patch_embed.kernel',
    'cls_token',
    'pos_embed',
    'blocks.0.attn.query.kernel',
    'blocks.1.mlp.fc1.bias',
    'norm.scale',
  } <= names
  assert len(names) == 2 + 1 + 1 + SMALL.depth * 18 + 2


def test_every_parameter_has_a_gradient(model, images):
  @nnx.jit
  @nnx.grad
  def gradient(model):
    return jnp.sum(jnp.sin(model(images)))

  grads = nnx.to_flat_state(gradient(model))
  dead = [path for path, grad in grads if not np.abs(grad[...]).max() > 1e-6]
  # softmax does not see a constant added to all keys.
  assert all(path[-2:] == ('key', 'bias') for path in dead), dead


def test_images_that_do_not_divide_into_patches(model):
  with pytest.raises(ValueError, match=r'30 x 28 pixels .* multiples of 14'):
    model.embed(jnp.zeros((1, 30, 28, 3)))


def test_width_that_does_not_divide_into_heads():
  with pytest.raises(ValueError, match=r'width 24 .* 5 heads'):
    dataclasses.replace(SMALL, num_heads=5)


def _onnx_resize(images_BxCxHxW, rows, columns):
  """The node that DINOv2 exports, run by onnxruntime."""
  shape = images_BxCxHxW.shape
  sizes = np.array([*shape[:2], rows, columns])
  node = helper.make_node(
    'Resize',
    ['x', '', '', 'sizes'],
    ['y'],
    mode='cubic',
    cubic_coeff_a=-0.75,
    coordinate_transformation_mode='half_pixel',
  )
  graph = helper.make_graph(
    [node],
    'resize',
    [helper.make_tensor_value_info('x', TensorProto.FLOAT, shape)],
    [helper.make_tensor_value_info('y', TensorProto.FLOAT, None)],
    [helper.make_tensor('sizes', TensorProto.INT64, [4], sizes)],
  )
  model = helper.make_model(
    graph, opset_imports=[helper.make_opsetid('', 14)], ir_version=8
  )
  session = onnxruntime.InferenceSession(
    model.SerializeToString(), providers=['CPUExecutionProvider']
  )
  return session.run(None, {'x': images_BxCxHxW})[0]
