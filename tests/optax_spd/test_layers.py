"""What a layer is: names, stacks of layers, weight decays of each, trees."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

from optax_spd import (
  _layers,
  _stacks,
  _xla,
  adam_spd,
  layer_names,
  spd,
  with_spd,
)

TRANSFORMATIONS = {
  'wrapper': lambda **kw: adam_spd(1e-3, **kw),
  'chained': lambda **kw: optax.chain(
    optax.scale_by_adam(), spd(learning_rate=1e-3, **kw)
  ),
}
kinds = pytest.mark.parametrize('kind', TRANSFORMATIONS)


def spd_state(state):
  return optax.tree.get(state, 'SPDState')


def run(tx, params, grads):
  params = jax.tree.map(jnp.asarray, params)
  state = tx.init(params)
  update = jax.jit(tx.update)
  for g in grads:
    updates, state = update(g, state, params)
    params = optax.apply_updates(params, updates)
  return params, spd_state(state)


def gradients(params, num_steps=60):
  rng = np.random.default_rng(0)
  return [
    jax.tree.map(
      lambda p: (rng.normal(size=p.shape) + 0.1).astype(np.float32), params
    )
    for _ in range(num_steps)
  ]


def test_names_follow_the_order_of_the_vectors():
  params = {
    'b': {'w': jnp.full((2, 3), 2.0), 'v': jnp.full(4, 3.0)},
    'a': [jnp.full(9, 1.0), jnp.full(1, 5.0)],
  }
  names = layer_names(params)
  assert names == ['a/0', 'a/1', 'b/v', 'b/w']
  # A step of the size of the params from a zero anchor: deviation tells which.
  tx = adam_spd(0.0, 'origin')
  _, state = tx.update(params, tx.init(params), params)
  deviation = dict(zip(names, state[1].deviation.tolist(), strict=True))
  assert deviation == {
    'a/0': 3.0,
    'a/1': 5.0,
    'b/v': 6.0,
    'b/w': float(jnp.sqrt(24.0)),
  }


def test_names_of_shapes_and_of_masked_params():
  params = {'a': jnp.ones(3), 'b': {'w': jnp.ones((2, 2)), 'v': jnp.ones(2)}}
  shapes = jax.eval_shape(lambda: params)
  mask = {'a': True, 'b': {'w': True, 'v': False}}
  assert layer_names(shapes, mask=mask) == ['a', 'b/w']


def stacked_and_unstacked():
  rng = np.random.default_rng(1)
  stack = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
  head = rng.normal(size=(4, 2)).astype(np.float32)
  stacked = {'blocks': stack, 'head': head}
  unstacked = {
    'blocks': {f'{i}{j}': stack[i, j] for i in range(2) for j in range(3)},
    'head': head,
  }
  return stacked, unstacked


def unstack(tree):
  blocks = tree['blocks']
  return {
    'blocks': {f'{i}{j}': blocks[i, j] for i in range(2) for j in range(3)},
    'head': tree['head'],
  }


@kinds
@pytest.mark.parametrize('per_layer', [False, True])
def test_a_stack_takes_the_steps_of_its_layers(kind, per_layer):
  stacked, unstacked = stacked_and_unstacked()
  grads = gradients(stacked)
  axes = {'blocks': 2, 'head': 0}
  decay_of_stack, decay_of_layers = 1.0, 1.0
  if per_layer:
    array = np.linspace(0.2, 2.0, 6).reshape(2, 3)
    decay_of_stack = {'blocks': array, 'head': 0.5}
    decay_of_layers = {
      'blocks': unstack({'blocks': array, 'head': 0})['blocks'],
      'head': 0.5,
    }
  make = TRANSFORMATIONS[kind]
  ours, state = run(
    make(layer_axes=axes, weight_decay=decay_of_stack), stacked, grads
  )
  theirs, expected = run(
    make(weight_decay=decay_of_layers), unstacked, [unstack(g) for g in grads]
  )
  # The sums run over the same numbers, in another order.
  chex.assert_trees_all_close(unstack(ours), theirs, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(state.decayed_count, expected.decayed_count)
  assert (state.decayed_count > 0).all()
  names = layer_names(stacked, layer_axes=axes)
  assert names[:4] == [
    'blocks[0, 0]',
    'blocks[0, 1]',
    'blocks[0, 2]',
    'blocks[1, 0]',
  ]
  assert len(names) == len(state.ratio) == 7
  # And a stack taken for one layer is something else.
  wrong, _ = run(make(weight_decay=1.0), stacked, grads)
  assert not np.allclose(wrong['blocks'], ours['blocks'], atol=1e-6)


@pytest.mark.parametrize('axes', [lambda p: {'blocks': 2, 'head': 0}, None])
def test_layer_axes_may_be_a_function(axes):
  stacked, _ = stacked_and_unstacked()
  state = spd_state(adam_spd(1e-3, layer_axes=axes).init(stacked))
  assert state.ratio.shape == ((7,) if axes else (2,))


def test_weight_decays_of_a_tree_and_schedules_in_it():
  params = {
    'body': {'a': np.ones(64, np.float32), 'b': np.ones(64, np.float32)},
    'head': np.ones(64, np.float32),
  }
  grads = gradients(params)
  tree = {'body': lambda t: 0.0 if t is None else 0.02 * t, 'head': 0.0}
  ours, state = run(adam_spd(1e-3, weight_decay=tree), params, grads)
  scheduled, _ = run(
    adam_spd(1e-3, weight_decay=lambda t: 0.02 * t), params, grads
  )
  plain, _ = run(optax.chain(adam_spd(1e-3, weight_decay=0.0)), params, grads)
  chex.assert_trees_all_equal(ours['body'], scheduled['body'])
  np.testing.assert_array_equal(ours['head'], plain['head'])
  assert (state.decayed_count[:2] > 0).all()
  assert state.decayed_count[2] == 0


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_a_narrow_anchor_costs_half_and_errs_by_its_rounding(dtype):
  rng = np.random.default_rng(0)
  params = {'w': (0.02 * rng.normal(size=(64, 64))).astype(np.float32)}
  grads = gradients(params)
  ours, state = run(adam_spd(1e-3, anchor_dtype=dtype), params, grads)
  theirs, expected = run(adam_spd(1e-3), params, grads)
  assert state.anchor['w'].dtype == dtype
  assert 2 * state.anchor['w'].nbytes == expected.anchor['w'].nbytes
  # The anchor is off by up to half a unit in its last place; so is everything
  # that is measured from it.
  rounding = np.linalg.norm(
    params['w'].astype(dtype).astype(np.float32) - params['w']
  )
  assert abs(state.deviation - expected.deviation) <= 2 * rounding
  assert np.linalg.norm(ours['w'] - theirs['w']) <= 2 * rounding
  assert state.decayed_count[0] > 0


class Pair(NamedTuple):
  left: jax.Array
  right: jax.Array


class Model(nnx.Module):
  def __init__(self, rngs):
    self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
    self.head = nnx.Linear(4, 2, rngs=rngs)


TREES = {
  'dict': {'a': {'w': np.ones((3, 2))}, 'b': np.ones(5)},
  'frozen': FrozenDict({'a': {'w': np.ones((3, 2))}, 'b': np.ones(5)}),
  'named_tuple': Pair(np.ones(3), np.ones((2, 2))),
  'nested': [Pair(np.ones(3), np.ones(2)), (np.ones(4), {'x': np.ones(1)})],
  'none': {'a': np.ones(3), 'b': None, 'c': [None, np.ones(2)]},
  'scalar': np.float32(2.0),
  'array': np.ones((3, 4)),
  'with_scalar': {'a': np.float32(1.0), 'b': np.ones(2)},
  'zero_size': {'a': np.ones((0, 3)), 'b': np.ones(4)},
  'empty': {},
  'nnx': nnx.state(Model(nnx.Rngs(0)), nnx.Param),
}


@kinds
@pytest.mark.parametrize('name', TREES)
def test_any_tree(kind, name):
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), TREES[name])
  tx = TRANSFORMATIONS[kind]()
  grads = gradients(params, 30)
  new, state = run(tx, params, grads)
  assert jax.tree.structure(new) == jax.tree.structure(params)
  chex.assert_trees_all_equal(state.anchor, params)
  chex.assert_tree_all_finite(new)
  names = layer_names(params)
  assert len(names) == len(state.ratio) == len(jax.tree.leaves(params))
  sizes = [x.size for x in jax.tree.leaves(params)]
  decayed = state.decayed_count > 0
  np.testing.assert_array_equal(decayed, [size > 0 for size in sizes])


def test_an_nnx_state_takes_a_pure_dict_for_an_anchor():
  state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
  anchor = nnx.to_pure_dict(nnx.state(Model(nnx.Rngs(1)), nnx.Param))
  found = spd_state(adam_spd(1e-3, anchor).init(state)).anchor
  chex.assert_trees_all_equal(nnx.to_pure_dict(found), anchor)
  assert layer_names(state)[0] == 'blocks/0/bias'


def test_an_nnx_state_may_be_a_part_of_a_tree():
  state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
  params = {'model': state, 'scale': jnp.ones(3)}
  assert layer_names(params)[0] == 'model/blocks/0/bias'
  anchor = {'model': nnx.to_pure_dict(state), 'scale': 'origin'}
  found = spd_state(adam_spd(1e-3, anchor).init(params)).anchor
  chex.assert_trees_all_equal(found['model'], state)
  tx = adam_spd(1e-3, mask={'model': state_of(True, state), 'scale': False})
  assert spd_state(tx.init(params)).ratio.shape == (6,)


def state_of(value, state):
  return jax.tree.map(lambda _: value, state)


def test_a_field_named_value_beside_others_keeps_its_name():
  class Attention(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array

  params = {'attn': Attention(jnp.ones(2), jnp.ones(3), jnp.ones(4))}
  assert layer_names(params) == ['attn/query', 'attn/key', 'attn/value']


@kinds
def test_float64_numpy_params_are_taken_as_jax_takes_them(kind):
  params = {'w': np.ones(64)}
  tx = TRANSFORMATIONS[kind]()
  state = tx.init(params)
  _, state = tx.update({'w': np.ones(64)}, state, params)
  assert spd_state(state).anchor['w'].dtype == jnp.float32


@pytest.mark.parametrize(
  'tx', [spd(learning_rate=1e-3), with_spd(optax.sgd(1e-3))]
)
def test_strict_promotion_of_dtypes(tx):
  with jax.numpy_dtype_promotion('strict'):  # Optax's Adam cannot run there
    params = {'w': jnp.ones(64, jnp.bfloat16), 'v': jnp.ones(8)}
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
  assert spd_state(state).count == 1


def test_a_stack_of_no_large_layers_is_left_as_it_is():
  params = {'none': jnp.ones((0, 256, 256)), 'w': jnp.ones((2, 3))}
  axes = {'none': 1, 'w': 0}
  for tx in (
    adam_spd(0.1, layer_axes=axes),
    optax.chain(optax.scale_by_adam(), spd(learning_rate=0.1, layer_axes=axes)),
  ):
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates['none'].shape == (0, 256, 256)
    np.testing.assert_allclose(updates['w'], -0.1, rtol=1e-5)


def test_the_chained_s_rate_is_rounded_to_each_param_s_dtype():
  """As Optax does; of what is masked out too, and in what is recorded."""
  params = {
    'half': jnp.full((3, 4), 2, jnp.bfloat16),
    'head': jnp.full((2, 2), 2, jnp.bfloat16),
    'whole': jnp.full((5,), 2.0),
  }
  anchor = {'half': jnp.zeros((3, 4)), 'whole': jnp.zeros(5)}
  mask = {'half': True, 'head': False, 'whole': True}
  rate = 0.0123  # 0.01233 in bfloat16
  chained = spd(anchor, 0.5, learning_rate=rate, mask=mask)
  plain = optax.scale_by_learning_rate(rate)
  inward, out = (jax.tree.map(lambda x, s=s: s * x, params) for s in (1, -1))

  updates, state = chained.update(inward, chained.init(params), params)
  expected, _ = plain.update(inward, plain.init(params))
  chex.assert_trees_all_equal(updates, expected)  # nothing moves out

  # Further out, against the gradient: g is 2 theta, the step 2 rate.
  updates, state = chained.update(
    out, chained.init(params), params, grad=params
  )
  expected, _ = plain.update(out, plain.init(params))
  chex.assert_trees_all_equal(updates['head'], expected['head'])
  assert state.decayed_count.tolist() == [1, 1]
  for i, name in enumerate(('half', 'whole')):
    rounded = float(jnp.asarray(rate, params[name].dtype))
    before = 2 * np.sqrt(params[name].size)
    after = before * (1 + rounded)
    ratio = (after - before) / after
    np.testing.assert_allclose(state.ratio[i], ratio, rtol=1e-5)
    np.testing.assert_allclose(
      state.deviation[i], (1 - 0.5 * ratio) * after, rtol=1e-5
    )


def test_a_schedule_is_called_once_for_all_layers():
  calls = []

  def schedule(count):
    calls.append(count)
    return 1.0

  params = {str(i): jnp.ones(3) for i in range(9)}
  tx = adam_spd(1e-3, weight_decay=schedule)
  state = tx.init(params)
  calls.clear()
  tx.update(params, state, params)
  assert len(calls) == 1


@pytest.mark.parametrize('kind', ['wrapper', 'chained'])
def test_small_params_of_one_shape_are_treated_as_if_alone(kind, monkeypatch):
  """Stacked for speed: the same layers, in the same order."""
  rng = np.random.default_rng(3)
  shapes = {f'b{i}': (4, 6) for i in range(4)} | {'a': (6,), 'z': (6,)}
  shapes |= {'masked': (4, 6), 'origin': (4, 6), 'narrow': (4, 6)}
  params = {
    n: jnp.asarray(rng.normal(size=s), jnp.bfloat16 if n == 'narrow' else None)
    for n, s in shapes.items()
  }
  anchor = jax.tree.map(lambda p: p + 0.3, params) | {'origin': 'origin'}
  options = {
    'weight_decay': {n: 0.1 * (i + 1) for i, n in enumerate(shapes)},
    'mask': {n: n != 'masked' for n in shapes},
    # b1 holds four layers, the others one each.
    'layer_axes': {n: int(n == 'b1') for n in shapes},
  }

  def trajectory():
    if kind == 'wrapper':
      tx = adam_spd(0.1, anchor, **options)
    else:
      chained = spd(anchor, learning_rate=0.1, **options)
      tx = optax.chain(optax.scale_by_adam(), chained)
    state, theta, seen = tx.init(params), params, []
    for i in range(6):
      noise = np.random.default_rng(i)
      grads = jax.tree.map(
        lambda p, noise=noise: jnp.asarray(noise.normal(size=p.shape), p.dtype),
        params,
      )
      updates, state = tx.update(grads, state, theta)
      theta = optax.apply_updates(theta, updates)
      seen.append((updates, optax.tree.get(state, 'SPDState')))
    return seen

  stacked = trajectory()
  monkeypatch.setattr(_xla, 'SMALL', 0)
  alone = trajectory()
  chex.assert_trees_all_close(stacked, alone, rtol=1e-5, atol=1e-7)
  counts = alone[-1][1].decayed_count
  assert len(counts) == len(layer_names(params, **_only(options)))
  assert len(set(counts.tolist())) > 1  # a wrong order would show
  assert counts.sum() > 5


def _only(options):
  return {key: options[key] for key in ('mask', 'layer_axes')}


def test_what_is_stacked_and_what_is_not():
  """In a ViT two parameters of three are small."""
  params = {
    'big1': jnp.ones((128, 129)),
    'big2': jnp.ones((128, 129)),
    'small1': jnp.ones((128, 128)),
    'small2': jnp.ones((128, 128)),
    'bias1': jnp.ones(8),
    'bias2': jnp.ones(8),
    'narrow': jnp.ones(8, jnp.bfloat16),
    'longer': jnp.ones(9),
  }
  layers = _layers.Layers.of('test', params)
  names = [leaf.name[0] for leaf in layers.leaves]
  groups = [[names[i] for i in group] for group in _stacks.group(layers)]
  assert groups == [
    ['bias1', 'bias2'],
    ['big1'],
    ['big2'],
    ['longer'],
    ['narrow'],
    ['small1', 'small2'],
  ]
  column = [optax.MaskedNode() if n == 'bias1' else 0.0 for n in names]
  assert len(_stacks.group(layers, column)) == 7
  axes = {name: int(name == 'bias1') for name in params}
  layers = _layers.Layers.of('test', params, layer_axes=axes)
  assert len(_stacks.group(layers)) == 7


def test_slices_are_those_of_the_array_to_the_bit():
  rng = np.random.default_rng(0)
  for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
    # All there is: -0, subnormals, NaNs with a payload; 65 are more than go
    # at once.
    bits = rng.integers(0, 256, (65, 6 * jnp.dtype(dtype).itemsize), np.uint8)
    bits[::9] = 0
    bits[::9, 0] = 1
    array = jnp.asarray(bits.view(dtype))
    for one in (array, array[:, 0], array[:1], array[:0]):
      found = jax.jit(_xla.slices)(one)
      assert len(found) == len(one)
      for x, y in zip(found, one, strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
