import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import optax
import pytest
from flax import nnx
from jax import ad_checkpoint, test_util
from onnx import TensorProto, helper

import optax_spd
from experiments.models import clip, heads, vit
from experiments.pretrained import params as pretrained

SMALL = dataclasses.replace(
  vit.CONFIGS['dinov2_s14'], width=24, depth=2, num_heads=3, mlp_dim=40, grid=5
)
# Every option of the architecture.
FULL = dataclasses.replace(
  SMALL,
  activation='quick_gelu',
  patch_bias=False,
  pre_norm=True,
  distilled=True,
  projection=10,
)

DROPPED = dataclasses.replace(FULL, drop_path=0.4)
KEY = jax.random.key(0)
# Tiny models spend their time in the compiler: half of it without this.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


@pytest.fixture(scope='module')
def model():
  return build(SMALL, random_params(SMALL))


@pytest.fixture(scope='module')
def params():
  return random_params(FULL)


@pytest.fixture(scope='module')
def images():
  return jax.random.normal(jax.random.key(1), (4, 42, 28, 3))


@pytest.fixture(scope='module')
def dropped(params, images):
  """Features and gradients where branches are dropped: what to compare with."""
  return run(DROPPED, params, images, KEY)


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


def test_stored_tokens_may_be_halves(model, images):
  """They are computed with in the model's own precision."""
  stored = model.encode(model.embed(images), stop=1).astype(jnp.float16)
  found = model.features(stored, 1)
  expected = model.features(stored.astype(jnp.float32), 1)
  np.testing.assert_array_equal(found, expected)


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


def test_every_parameter_has_a_gradient(dropped):
  grads = nnx.traversals.flatten_mapping(dropped[1]).items()
  dead = [path for path, grad in grads if not np.abs(grad).max() > 1e-5]
  # softmax does not see a constant added to all keys.
  assert all(path[-2:] == ('key', 'bias') for path in dead), dead


def test_images_that_do_not_divide_into_patches(model):
  with pytest.raises(ValueError, match=r'30 x 28 pixels .* multiples of 14'):
    model.embed(jnp.zeros((1, 30, 28, 3)))


def test_width_that_does_not_divide_into_heads():
  with pytest.raises(ValueError, match=r'width 24 .* 5 heads'):
    dataclasses.replace(SMALL, num_heads=5)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'activation': 'relu'}, "'relu' is not known; choose from gelu, quick_"),
    ({'drop_path': 1.0}, r'drop_path is 1\.0; a rate is in \[0, 1\)'),
  ],
)
def test_options_that_there_are_not(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize(
  ('name', 'count'),
  # `num_parameters` of transformers 5.23, without poolers and mask tokens;
  # CLIP: of both towers, less the logit scale.
  [
    ('clip_b32', 151_277_312),
    ('clip_b16', 149_620_736),
    ('clip_l14', 427_616_512),
    ('vit_b16', 85_798_656),
    ('deit_b16_distilled', 85_800_192),
    ('dinov2_s14', 22_056_192),
  ],
)
def test_sizes_of_the_pretrained_models(name, count):
  def size(build):
    shapes = pretrained.shapes(build).values()
    return sum(int(np.prod(shape)) for shape in shapes)

  found = size(lambda: vit.ViT(vit.CONFIGS[name], rngs=nnx.Rngs(0)))
  if name in clip.CONFIGS:
    text = clip.CONFIGS[name]
    found += size(lambda: clip.TextTower(text, rngs=nnx.Rngs(0)))
  assert found == count


def test_features_are_the_projected_class_token(params, images):
  model = build(FULL, params)
  expected = tokens(model, images)[:, 0]
  x_BxTxD = model.embed(images)
  assert x_BxTxD.shape == (4, 2 + 3 * 2, 24)
  # The last block for one token or for all: other matmuls, values near 3.
  close = dict.fromkeys(('rtol', 'atol'), 1e-5)
  np.testing.assert_allclose(model.class_token(x_BxTxD), expected, **close)
  expected = expected @ params['projection']['kernel']
  features = model.features(x_BxTxD)
  assert features.shape == (4, FULL.features) == (4, 10)
  np.testing.assert_allclose(features, expected, **close)
  stored = model.encode(x_BxTxD, stop=1)
  np.testing.assert_array_equal(model.features(stored, 1), features)


def test_without_projection_features_are_the_class_token(model, images):
  assert SMALL.features == SMALL.width
  tokens = model.embed(images)
  np.testing.assert_array_equal(
    model.features(tokens), model.class_token(tokens)
  )


@pytest.mark.parametrize('remat', [False, True])
def test_stacked_blocks_are_the_same_model(params, images, dropped, remat):
  features, grads = dropped
  config = dataclasses.replace(DROPPED, scan=True, remat=remat)
  stacked = vit.stack_blocks(params)
  found = run(config, stacked, images, KEY)
  # Compiled apart: rounding, of values near 3 and gradients near 10.
  np.testing.assert_allclose(found[0], features, rtol=1e-4, atol=1e-5)
  assert_close(found[1], vit.stack_blocks(grads), rtol=1e-4, atol=1e-4)


def test_stacked_blocks_start_from_the_same_weights():
  @jit
  def params():
    configs = FULL, dataclasses.replace(FULL, scan=True)
    return [nnx.state(vit.ViT(c, rngs=nnx.Rngs(0))) for c in configs]

  unrolled, stacked = map(nnx.to_pure_dict, params())
  assert_close(stacked, vit.stack_blocks(unrolled), rtol=0, atol=0)


def test_stacked_blocks_give_the_same_tokens(params, images):
  scan = dataclasses.replace(FULL, scan=True)
  model, stacked = build(FULL, params), build(scan, vit.stack_blocks(params))
  # Compiled apart: rounding, of values near 3.
  np.testing.assert_allclose(
    tokens(stacked, images), tokens(model, images), atol=1e-5
  )


@pytest.mark.parametrize('part', [{'start': 1}, {'stop': 1}, {'stop': -1}])
def test_stacked_blocks_run_as_a_whole(params, images, part):
  config = dataclasses.replace(FULL, scan=True)
  model = build(config, vit.stack_blocks(params))
  tokens = model.embed(images)
  with pytest.raises(ValueError, match=r'1 of the 2 blocks .* scan=False'):
    model.encode(tokens, **part)
  if 'start' in part:
    with pytest.raises(ValueError, match=r'1 of the 2 blocks .* scan=False'):
      model.features(tokens, 1)


@pytest.mark.slow
def test_a_stacked_model_trains_as_the_unrolled_one(params):
  """Adam-SPD, layer by layer, at a rate at which it decays."""
  rng = np.random.default_rng(1)
  batches = rng.normal(size=(8, 4, 28, 28, 3)).astype(np.float32)
  head = {
    'kernel': rng.normal(size=(10, 3)).astype(np.float32),
    'bias': np.zeros(3, np.float32),
  }
  # A large eps: gradients that are nothing but rounding stay nothing.
  tx = optax_spd.adam_spd(3e-3, eps=1e-3, layer_axes=vit.layer_axes)

  def train(config, params):
    def model():
      return heads.Classifier(vit.ViT(config, rngs=nnx.Rngs(0)), 3)

    model = pretrained.with_params(model, {'backbone': params, 'head': head})
    graphdef, params = nnx.split(model)

    @jit
    def step(params, state, images):
      def loss(params):
        model = nnx.merge(graphdef, params)
        logits = model(model.backbone.embed(images))
        return optax.losses.softmax_cross_entropy(logits, jnp.eye(4, 3)).mean()

      grads = jax.grad(loss)(params)
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for images in batches:
      params, state = step(params, state, images)
    names = optax_spd.layer_names(params, layer_axes=vit.layer_axes)
    counts = optax.tree.get(state, 'SPDState').decayed_count
    return nnx.to_pure_dict(params), dict(
      zip(names, counts.tolist(), strict=True)
    )

  unrolled, decayed = train(FULL, params)
  config = dataclasses.replace(FULL, scan=True)
  stacked, stacked_decayed = train(config, vit.stack_blocks(params))
  unrolled = vit.stack_blocks(unrolled.pop('backbone')) | unrolled
  stacked = stacked.pop('backbone') | stacked
  # 8 steps of 3e-3 in float32, compiled apart; the decays are larger by far.
  assert_close(stacked, unrolled, rtol=0, atol=2e-5)
  # 'backbone/blocks/attn/key/bias[2]' is 'backbone/blocks/2/attn/key/bias'.
  expected = {
    stacked_name(name): count
    for name, count in decayed.items()
    if 'key/bias' not in name  # whose gradient is rounding
  }
  assert expected == {
    name: count
    for name, count in stacked_decayed.items()
    if 'key/bias' not in name
  }
  in_blocks = [count for name, count in expected.items() if '[' in name]
  assert len(in_blocks) == FULL.depth * 17
  assert np.mean(in_blocks) > 1
  assert len(set(in_blocks)) > 2


def stacked_name(name):
  parts = name.split('/')
  if 'blocks' not in parts:
    return name
  index = parts.pop(parts.index('blocks') + 1)
  return '/'.join(parts) + f'[{index}]'


@pytest.mark.parametrize('scan', [False, True])
def test_layer_axes(scan):
  config = dataclasses.replace(FULL, scan=scan)
  model = nnx.eval_shape(
    lambda: heads.Classifier(vit.ViT(config, rngs=nnx.Rngs(0)), 3)
  )
  for params in (nnx.state(model), nnx.to_pure_dict(nnx.state(model))):
    axes = vit.layer_axes(params)
    assert jax.tree.structure(axes) == jax.tree.structure(params)
    blocks = jax.tree.leaves(axes['backbone'].pop('blocks'))
    assert set(blocks) == {int(scan)}
    assert set(jax.tree.leaves(axes)) == {0}


def test_recomputed_blocks(params, images, dropped, capsys):
  """The same gradients, for less memory."""
  config = dataclasses.replace(DROPPED, remat=True)
  features, grads = run(config, params, images, KEY)
  np.testing.assert_allclose(features, dropped[0], rtol=1e-5, atol=1e-5)
  # Rounding, of gradients near 10.
  assert_close(grads, dropped[1], rtol=1e-4, atol=1e-4)

  def kept_for_the_backward_pass(config):
    graphdef, state = nnx.split(build(config, params))
    ad_checkpoint.print_saved_residuals(
      lambda state: nnx.merge(graphdef, state)(images).sum(), state
    )
    lines = capsys.readouterr().out.splitlines()
    return sum('from the argument' not in line for line in lines)

  plain = kept_for_the_backward_pass(FULL)
  remat = kept_for_the_backward_pass(dataclasses.replace(FULL, remat=True))
  # What enters each block, and what lies outside of the blocks.
  assert remat < plain / 3


def test_bfloat16_activations(params, images, dropped):
  config = dataclasses.replace(DROPPED, dtype='bfloat16')
  model = build(config, params)
  assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {
    np.dtype('float32')
  }
  tokens = model.embed(images)
  assert tokens.dtype == model.encode(tokens, stop=1).dtype == jnp.bfloat16
  features, grads = run(config, params, images, KEY)
  assert features.dtype == np.float32
  assert {g.dtype for g in jax.tree.leaves(grads)} == {np.dtype('float32')}
  # bfloat16 has 8 bits: 0.4 % a rounding, and some thirty of them in a row.
  assert 1e-4 < relative(features, dropped[0]) < 0.03
  errors = jax.tree.map(relative, grads, dropped[1])
  errors = nnx.traversals.flatten_mapping(errors)
  errors = {path: e for path, e in errors.items() if path[-2:] != KEY_BIAS}
  assert max(errors.values()) < 0.1


def test_bfloat16_activations_of_stacked_blocks(images):
  """And without a projection: dtypes alone, nothing is computed."""
  config = dataclasses.replace(
    DROPPED, dtype='bfloat16', scan=True, projection=None
  )
  graphdef, state = nnx.split(
    nnx.eval_shape(lambda: vit.ViT(config, rngs=nnx.Rngs(0)))
  )

  def loss(state):
    model = nnx.merge(graphdef, state)
    features = model.features(model.embed(images), key=KEY)
    return features.sum(), features

  grads, features = jax.eval_shape(jax.grad(loss, has_aux=True), state)
  assert features.dtype == np.float32
  assert {g.dtype for g in jax.tree.leaves(grads)} == {np.dtype('float32')}


KEY_BIAS = ('key', 'bias')  # its gradient is rounding


def relative(x, y):
  return np.linalg.norm(x - y) / np.linalg.norm(y)


def test_layer_norm_is_float32_inside():
  x = (1000 + jax.random.normal(jax.random.key(0), (4, 64))).astype('bfloat16')
  norm = vit.LayerNorm(64, eps=1e-6)
  y = norm(x)
  assert y.dtype == jnp.bfloat16
  # Half a unit in the last place of values up to 4.
  np.testing.assert_allclose(
    y.astype('float32'), norm(x.astype('float32')), atol=2**-7
  )


def test_drop_path_drops_branches_of_images():
  """Each is there, divided by the probability of that, or not at all."""
  rate, B = 0.5, 256
  config = dataclasses.replace(FULL, depth=3, drop_path=rate)
  graphdef, state = nnx.split(build(config, random_params(config)))
  x_BxTxD = jax.random.normal(jax.random.key(2), (B, 3, 24))

  @jit
  def block_outputs(state, key):
    model = nnx.merge(graphdef, state)
    return [model.encode(x_BxTxD, i, i + 1, key=key) for i in range(3)]

  @jit
  def output(block, a, m):
    """With `a` times one branch, `m` times the other."""
    x_NxD = x_BxTxD.reshape(-1, 24)
    norm = block.norm1(x_NxD)
    y_NxD = x_NxD + a * block.scale1 * block.attn(norm, norm, B)
    y_NxD = y_NxD + m * block.scale2 * block.mlp(block.norm2(y_NxD))
    return y_NxD.reshape(x_BxTxD.shape)

  found = block_outputs(state, jax.random.key(3))
  for i, block_rate in enumerate([0, rate / 2, rate]):
    block = nnx.merge(graphdef, state).blocks[i]
    weights = [0, 1 / (1 - block_rate)]
    errors = [
      np.abs(output(block, a, m) - found[i]).max((1, 2))
      for a in weights
      for m in weights
    ]
    choice = np.argmin(errors, axis=0)
    # Rounding of values near 4; branches are as large.
    assert np.min(errors, axis=0).max() < 1e-5
    kept = np.stack([choice // 2, choice % 2])
    # 512 draws: .022 is a standard deviation.
    assert abs(kept.mean() - (1 - block_rate)) < 0.09
    if block_rate:
      # Images and branches, each on its own.
      assert len(set(choice.tolist())) == 4


def test_drop_path_depends_on_the_key_alone(params, images):
  graphdef, state = nnx.split(build(DROPPED, params))

  @jit
  def outputs(state, key):
    model = nnx.merge(graphdef, state)
    # Many images, so that some are dropped.
    x_BxTxD = jnp.tile(model.embed(images), (16, 1, 1))
    stored = model.encode(x_BxTxD, stop=1, key=key)
    whole = model.norm(model.encode(x_BxTxD, key=key)[:, 0])
    return (
      model.features(x_BxTxD, key=key),
      model.features(stored, 1, key=key),
      model.projection(whole),
    )

  key, other = jax.random.split(KEY)
  features, resumed, whole = outputs(state, key)
  # The same drops, whatever the first block and whatever is left out. Compiled
  # apart: rounding, of values near 3.
  np.testing.assert_allclose(resumed, features, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(whole, features, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(outputs(state, key)[0], features)
  assert np.abs(outputs(state, other)[0] - features).max() > 0.1
  # No key: evaluation, as without stochastic depth.
  evaluated = outputs(state, None)[0]
  assert np.abs(evaluated - features).max() > 0.1
  plain = build(FULL, params)
  expected = tokens(plain, images)[:, 0] @ params['projection']['kernel']
  np.testing.assert_allclose(
    evaluated, np.tile(expected, (16, 1)), rtol=1e-5, atol=1e-5
  )


def random_params(config):
  """Large enough for every part to matter."""
  rng = np.random.default_rng(0)
  shapes = pretrained.shapes(lambda: vit.ViT(config, rngs=nnx.Rngs(0)))
  values = {
    path: rng.normal(path[-1] == 'scale', 0.2, shape).astype(np.float32)
    for path, shape in shapes.items()
  }
  return nnx.traversals.unflatten_mapping(values)


def build(config, params):
  return pretrained.with_params(
    lambda: vit.ViT(config, rngs=nnx.Rngs(0)), params
  )


def tokens(model, images):
  graphdef, state = nnx.split(model)
  return jit(lambda state: nnx.merge(graphdef, state)(images))(state)


def run(config, params, images, key=None):
  """The features, and the gradients of a sum of them."""
  graphdef, state = nnx.split(build(config, params))

  @jit
  def features_and_grads(state):
    def loss(state):
      model = nnx.merge(graphdef, state)
      features = model.features(model.embed(images), key=key)
      return jnp.sin(features).sum(), features

    (_, features), grads = jax.value_and_grad(loss, has_aux=True)(state)
    return features, grads

  features, grads = features_and_grads(state)
  return features, nnx.to_pure_dict(grads)


def assert_close(found, expected, **tolerance):
  found, expected = map(nnx.traversals.flatten_mapping, (found, expected))
  assert found.keys() == expected.keys()
  for path in found:
    np.testing.assert_allclose(
      found[path], expected[path], err_msg=str(path), **tolerance
    )


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
