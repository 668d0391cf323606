import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_spd
from experiments.models import blocks, heads, lora, vit
from experiments.pretrained import params as pretrained

TINY = dataclasses.replace(
  vit.CONFIGS['dinov2_s14'], width=16, depth=2, num_heads=2, mlp_dim=24, grid=2
)
MODULES = r'.*\.(query|value|fc1)'
RANK, ALPHA = 2, 6
IMAGES = np.random.default_rng(1).normal(size=(5, 28, 28, 3)).astype('float32')
BOTH = pytest.mark.parametrize('scan', [False, True])
# Tiny models spend their time in the compiler: half of it without this.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def classifier(scan, **changes):
  """Random weights, large enough for every part to matter."""
  config = dataclasses.replace(TINY, scan=scan, **changes)

  def build():
    return heads.Classifier(vit.ViT(config, rngs=nnx.Rngs(0)), 3)

  # Of the unrolled model: the stacked one has the same.
  listed = dataclasses.replace(config, scan=False)
  shapes = pretrained.shapes(
    lambda: heads.Classifier(vit.ViT(listed, rngs=nnx.Rngs(0)), 3)
  )
  params = nnx.traversals.unflatten_mapping(_random(shapes, 0))
  return pretrained.with_params(build, blocks.stack(params) if scan else params)


def adapted(scan, *, trained=False, **changes):
  """A classifier with LoRA; `trained` gives A and B other values."""
  dropout = changes.pop('dropout', 0.0)
  model = lora.add(
    classifier(scan, **changes),
    RANK,
    ALPHA,
    modules=MODULES,
    dropout=dropout,
    rngs=nnx.Rngs(0),
  )
  if trained:
    listed = adapted(False) if scan else model
    shapes = {
      path: leaf.shape
      for path, leaf in nnx.traversals.flatten_mapping(
        nnx.to_pure_dict(nnx.state(listed, nnx.LoRAParam))
      ).items()
    }
    params = nnx.traversals.unflatten_mapping(_random(shapes, 2))
    state = nnx.state(model, nnx.LoRAParam)
    nnx.replace_by_pure_dict(state, blocks.stack(params) if scan else params)
    nnx.update(model, state)
  return model


def _random(shapes, seed):
  rng = np.random.default_rng(seed)
  return {
    path: rng.normal(path[-1] == 'scale', 0.2, shape).astype(np.float32)
    for path, shape in shapes.items()
  }


def logits(model):
  graphdef, state = nnx.split(model)

  @jit
  def run(state):
    model = nnx.merge(graphdef, state)
    return model(model.backbone.embed(IMAGES))

  return run(state)


def names(model, *filters):
  return {
    '.'.join(map(str, path)): leaf
    for path, leaf in nnx.to_flat_state(nnx.state(model, *filters))
  }


@BOTH
def test_it_starts_as_the_model_that_it_adapts(scan):
  base, model = classifier(scan), adapted(scan)
  np.testing.assert_array_equal(logits(model), logits(base))
  params = names(model, nnx.LoRAParam)
  assert len(params) == 2 * 3 * (1 if scan else TINY.depth)
  block = 'backbone.blocks.' if scan else 'backbone.blocks.1.'
  stack = (2,) if scan else ()
  a, b = (params[f'{block}mlp.fc1.lora_{factor}'] for factor in 'ab')
  assert a.shape == (*stack, 16, RANK)
  assert b.shape == (*stack, RANK, 24)
  for name, param in params.items():
    assert param.dtype == jnp.float32
    if name.endswith('lora_b'):
      assert not param[...].any()
    else:
      # U(-1/4, 1/4), of 16 features.
      assert 0.2 < np.abs(param[...]).max() <= 1 / 4
      assert 0.1 < np.std(param[...]) < 0.19  # 1 / (4 sqrt(3)) of 32 and more
  if scan:
    assert (a[0] != a[1]).any()
  # What is frozen is what was pretrained.
  rest = {
    name.replace('.base', ''): value[...]
    for name, value in names(model, nnx.Not(nnx.LoRAParam)).items()
  }
  plain = {name: value[...] for name, value in names(base).items()}
  assert rest.keys() == plain.keys()
  jax.tree.map(np.testing.assert_array_equal, rest, plain)


@BOTH
def test_what_is_adapted_adds_a_scaled_product(scan):
  """And it is no other than the plain model of those weights."""
  base, model = classifier(scan), adapted(scan, trained=True)
  expected = names(base)
  for name, kernel in expected.items():
    module = name.removesuffix('.kernel')
    if name != module and f'{module}.lora_a' in names(model):
      a, b = (names(model)[f'{module}.lora_{factor}'][...] for factor in 'ab')
      kernel[...] = kernel[...] + ALPHA / RANK * (a @ b)
  before = names(model)
  merged = lora.merge(model)
  assert nnx.graphdef(merged) == nnx.graphdef(base)
  for name, value in names(merged).items():
    # Float32 products of rank 2.
    np.testing.assert_allclose(value[...], expected[name][...], atol=1e-6)
  found = logits(model)
  np.testing.assert_allclose(logits(merged), found, rtol=1e-5, atol=1e-5)
  assert np.abs(found - logits(classifier(scan))).max() > 0.1
  # The model that was merged is still adapted.
  assert names(model).keys() == before.keys()


def test_stacked_blocks_are_the_same_model():
  """With recomputation too."""
  expected = logits(adapted(False, trained=True))
  for remat in (False, True):
    found = logits(adapted(True, trained=True, remat=remat))
    # Compiled apart: rounding.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@BOTH
def test_gradients_are_of_the_factors_alone(scan):
  def gradients(model):
    graphdef, params, frozen = nnx.split(model, nnx.LoRAParam, ...)

    @jit
    def grad(params):
      def loss(params):
        model = nnx.merge(graphdef, params, frozen)
        return jnp.sin(model(model.backbone.embed(IMAGES))).sum()

      return jax.grad(loss)(params)

    return nnx.traversals.flatten_mapping(nnx.to_pure_dict(grad(params)))

  first = gradients(adapted(scan))
  assert {path[-1] for path in first} == {'lora_a', 'lora_b'}
  for path, grad in first.items():
    # Where B is zero, nothing depends on A.
    assert (np.abs(grad).max() > 1e-4) == (path[-1] == 'lora_b'), path
  for path, grad in gradients(adapted(scan, trained=True)).items():
    assert np.abs(grad).max() > 1e-4, path


@BOTH
def test_interpolation_and_deviation_are_of_the_weights(scan):
  """A new head is trained, too."""
  base, model = classifier(scan), adapted(scan, trained=True)
  trained = nnx.Any(nnx.LoRAParam, nnx.PathContains('head'))
  graphdef, params, frozen = nnx.split(model, trained, ...)
  start = nnx.state(adapted(scan), trained)
  params['head'] = jax.tree.map(lambda x: x + 0.3, params['head'])

  def weights(params):
    merged = lora.merge(nnx.merge(graphdef, params, frozen))
    return {name: value[...] for name, value in names(merged).items()}

  first, last = {n: v[...] for n, v in names(base).items()}, weights(params)
  for alpha in (0.0, 0.3, 1.0):
    found = weights(lora.interpolate(start, params, alpha))
    for name in first:
      np.testing.assert_allclose(
        found[name],
        (1 - alpha) * first[name] + alpha * last[name],
        atol=1e-6,  # float32 rounding of values near 1
        err_msg=name,
      )
  difference = jax.tree.map(np.subtract, last, first)
  norm = math.sqrt(sum(np.square(d).sum() for d in difference.values()))
  found = lora.deviation(start, params, ALPHA / RANK)
  np.testing.assert_allclose(found, norm, rtol=1e-5)
  # A alone moves no weight.
  assert lora.deviation(start, start, ALPHA / RANK) == 0


def test_bfloat16_stays_bfloat16():
  linear = nnx.Linear(4, 6, dtype='bfloat16', rngs=nnx.Rngs(0))
  model = lora.add(nnx.Sequential(linear), 2, 4, modules='.*', rngs=nnx.Rngs(0))
  layer = model.layers[0]
  layer.lora_b[...] = jnp.ones((2, 6))
  x = jnp.ones((3, 4))
  assert model(x).dtype == jnp.bfloat16
  expected = linear(x) + 2 * x @ layer.lora_a[...] @ layer.lora_b[...]
  np.testing.assert_allclose(model(x), expected, rtol=2**-6)


def test_weights_of_bfloat16_are_merged_in_it():
  linear = nnx.Linear(4, 6, param_dtype='bfloat16', rngs=nnx.Rngs(0))
  model = lora.add(nnx.Sequential(linear), 2, 4, modules='.*', rngs=nnx.Rngs(0))
  assert model.layers[0].lora_a.dtype == jnp.float32
  assert lora.merge(model).layers[0].kernel.dtype == jnp.bfloat16


def test_dropout_is_of_the_adapters_input():
  """The identity and a product that is the identity too: 1 + what is kept."""
  width, rate = 64, 0.25
  linear = nnx.Linear(width, width, rngs=nnx.Rngs(0))
  linear.kernel[...] = jnp.eye(width)
  model = nnx.Sequential(linear)
  model = lora.add(
    model, width, width, modules='.*', dropout=rate, rngs=nnx.Rngs(0)
  )
  model.layers[0].lora_a[...] = model.layers[0].lora_b[...] = jnp.eye(width)
  x = jnp.ones((16, width))
  np.testing.assert_array_equal(model(x), 2 * x)
  y = lora.with_dropout(model, jax.random.key(0))(x)
  kept = np.array(y > 1)
  np.testing.assert_allclose(y, 1 + kept / (1 - rate), rtol=1e-6)
  # 1,024 draws: .0135 is a standard deviation.
  assert abs(kept.mean() - (1 - rate)) < 0.06
  again, other = (
    lora.with_dropout(model, jax.random.key(seed))(x) for seed in (0, 1)
  )
  np.testing.assert_array_equal(again, y)
  assert (other != y).any()
  # In the copy alone.
  np.testing.assert_array_equal(model(x), 2 * x)


@BOTH
def test_every_module_and_block_drops_on_its_own(scan):
  model = lora.with_dropout(adapted(scan, dropout=0.5), jax.random.key(0))
  keys = [
    jax.random.key_data(module.dropout_key[...]).reshape(-1, 2)
    for _, module in nnx.iter_modules(model)
    if isinstance(module, lora.LoRALinear)
  ]
  assert len(np.unique(np.concatenate(keys), axis=0)) == 3 * TINY.depth


def test_dropout_in_recomputed_and_stacked_blocks():
  model = adapted(True, trained=True, dropout=0.5, remat=True)
  graphdef, params, frozen = nnx.split(model, nnx.LoRAParam, ...)

  @jit
  def loss_and_grads(params, key):
    def loss(params):
      model = nnx.merge(graphdef, params, frozen)
      model = lora.with_dropout(model, key)
      return jnp.sin(model(model.backbone.embed(IMAGES))).sum()

    return jax.value_and_grad(loss)(params)

  key = jax.random.key(0)
  found, grads = loss_and_grads(params, key)
  same = jnp.sin(logits(lora.with_dropout(model, key))).sum()
  # Compiled apart: rounding, of a sum of fifteen.
  np.testing.assert_allclose(found, same, rtol=1e-4, atol=1e-4)
  assert abs(found - jnp.sin(logits(model)).sum()) > 1e-2
  assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(grads))


def test_spd_decays_both_factors_to_the_origin():
  """Noisy targets: the gradient turns, and SPD finds something to do."""
  model = lora.add(
    nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0))),
    2,
    4,
    modules='.*',
    rngs=nnx.Rngs(1),
  )
  graphdef, start, frozen = nnx.split(model, nnx.LoRAParam, ...)
  x = jax.random.normal(jax.random.key(0), (8, 6))
  targets = jax.random.normal(jax.random.key(1), (40, 8, 4))

  def loss(params, targets):
    model = nnx.merge(graphdef, params, frozen)
    return jnp.square(model(x) - targets).mean()

  def train(strength):
    tx = optax_spd.adam_spd(1e-2, 'origin', strength)

    @jit
    def run(start):
      def step(carry, targets):
        params, state = carry
        grads = jax.grad(loss)(params, targets)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

      return jax.lax.scan(step, (start, tx.init(start)), targets)[0]

    params, state = run(start)
    return params, optax.tree.get(state, 'SPDState')

  params, state = train(1.0)
  assert len(optax_spd.layer_names(params)) == 2
  assert all(state.decayed_count > 0)
  # The origin takes no memory.
  assert not jax.tree.leaves(state.anchor)
  plain, _ = train(0.0)
  assert optax.tree.norm(params) < optax.tree.norm(plain)


def test_spd_decays_the_factors_of_each_stacked_block():
  params = nnx.state(nnx.eval_shape(lambda: adapted(True)), nnx.LoRAParam)
  axes = blocks.layer_axes(params)
  assert set(jax.tree.leaves(axes)) == {1}
  layers = optax_spd.layer_names(params, layer_axes=blocks.layer_axes)
  assert len(layers) == 2 * 3 * TINY.depth


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'rank': 0}, 'rank is 0, dropout 0.0; the rank is at least 1'),
    ({'dropout': 1.0}, r'dropout 1\.0; .* in \[0, 1\)'),
    ({'modules': 'query'}, "'query' matches no whole path of the 14 Linear"),
  ],
)
def test_arguments_that_do_not_fit(changes, message):
  model = nnx.eval_shape(lambda: classifier(False))
  options = {'rank': 2, 'modules': MODULES, 'dropout': 0.0, **changes}
  with pytest.raises(ValueError, match=message):
    lora.add(model, alpha=4, rngs=nnx.Rngs(0), **options)


def test_the_factors_are_told_apart():
  start = {
    'attn': {'lora_a': np.full((3, 2), 2.0), 'lora_b': np.zeros((2, 4))},
    'mlp': {'lora_a': np.full((1, 2), 1.0), 'lora_b': np.zeros((2, 1))},
    'head': {'kernel': np.ones(3)},
  }
  moved = jax.tree.map(lambda x: x + 0.5, start)
  found = lora.factors(start, moved)
  assert {name: float(norm) for name, norm in found.items()} == {
    'norm_a': pytest.approx(np.sqrt(6 * 2.5**2 + 2 * 1.5**2)),
    'moved_a': pytest.approx(np.sqrt(8 * 0.5**2)),
    'norm_b': pytest.approx(np.sqrt(10 * 0.5**2)),
  }
  assert lora.factors({'head': np.ones(3)}, {'head': np.ones(3)}) == {}
