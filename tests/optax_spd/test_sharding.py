"""On eight devices: the same numbers, laid out as the params are."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_spd import adam_spd, spd, with_spd

pytestmark = pytest.mark.eight_devices
SPECS = {
  'replicated': {'kernel': P(), 'stacked': P(), 'bias': P()},
  'fsdp': {'kernel': P('data'), 'stacked': P(None, 'data'), 'bias': P('data')},
  'tensor': {
    'kernel': P(None, 'model'),
    'stacked': P(None, None, 'model'),
    'bias': P(),
  },
  # The axis that enumerates layers, too.
  'both': {
    'kernel': P('data', 'model'),
    'stacked': P('data', 'model'),
    'bias': P('data'),
  },
}
AXES = {'kernel': 0, 'stacked': 1, 'bias': 0}
TRANSFORMATIONS = {
  'wrapper': lambda **kw: adam_spd(1e-2, layer_axes=AXES, **kw),
  'chained': lambda **kw: optax.chain(
    optax.scale_by_adam(), spd(learning_rate=1e-2, layer_axes=AXES, **kw)
  ),
}
is_auto = pytest.mark.parametrize(
  'axis_type', [AxisType.Auto, AxisType.Explicit], ids=['auto', 'explicit']
)
kinds = pytest.mark.parametrize('kind', TRANSFORMATIONS)
layouts = pytest.mark.parametrize('layout', SPECS)


def make_params():
  rng = np.random.default_rng(0)
  shapes = {'kernel': (16, 8), 'stacked': (4, 8, 6), 'bias': (16,)}
  return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def gradients(num_steps):
  rng = np.random.default_rng(1)
  return [
    {
      n: (rng.normal(size=p.shape) + 0.1).astype(np.float32)
      for n, p in make_params().items()
    }
    for _ in range(num_steps)
  ]


def place(tree, mesh, layout):
  return {
    n: jax.device_put(x, NamedSharding(mesh, SPECS[layout][n]))
    for n, x in tree.items()
  }


def train(tx, params, grads, state):
  step = jax.jit(tx.update)
  for g in grads:
    updates, state = step(g, state, params)
    # One step at a time: on few cores the collectives of several may wait for
    # each other forever, as each device has to have a thread in all of them.
    params = jax.block_until_ready(optax.apply_updates(params, updates))
  return params, state, step


@functools.cache
def on_one_device(kind):
  tx = TRANSFORMATIONS[kind]()
  params = jax.tree.map(jnp.asarray, make_params())
  return train(tx, params, gradients(15), tx.init(params))[:2]


def describe(x):
  """Everything of an array that a compiled function depends on."""
  return x.shape, x.dtype, x.weak_type


@is_auto
@kinds
@layouts
def test_sharded_runs_give_the_numbers_of_one_device(kind, layout, axis_type):
  grads = gradients(15)
  tx = TRANSFORMATIONS[kind]()
  expected, expected_state = on_one_device(kind)

  mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(axis_type,) * 2)
  with jax.set_mesh(mesh):
    params = place(make_params(), mesh, layout)
    grads = [place(g, mesh, layout) for g in grads]
    eager, jitted = tx.init(params), jax.jit(tx.init)(params)
    found, state, step = train(tx, params, grads, eager)
    # One program: nothing about the state changed between two updates. On an
    # explicit mesh the first step writes P('a') as P('a', None), Adam's too.
    assert step._cache_size() == (1 if axis_type == AxisType.Auto else 2)

  # Sums over other partitions, rounded elsewhere; Adam's first steps are signs.
  chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
  ours, theirs = (
    optax.tree.get(s, 'SPDState') for s in (state, expected_state)
  )
  np.testing.assert_array_equal(ours.decayed_count, theirs.decayed_count)
  assert (ours.decayed_count > 0).all()

  for other in (eager, jitted):
    for a, b in zip(
      jax.tree.leaves(other), jax.tree.leaves(state), strict=True
    ):
      assert describe(a) == describe(b)
    for a, b in zip(
      jax.tree.leaves(optax.tree.get(other, 'SPDState')),
      jax.tree.leaves(ours),
      strict=True,
    ):
      assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    anchor = optax.tree.get(other, 'SPDState').anchor
    for n, p in params.items():
      assert anchor[n].sharding.is_equivalent_to(p.sharding, p.ndim)


@is_auto
@pytest.mark.parametrize('given', ['host', 'device'])
def test_an_explicit_anchor_is_laid_out_like_its_parameter(axis_type, given):
  mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(axis_type,) * 2)
  anchor = make_params()
  if given == 'device':
    anchor = jax.tree.map(jnp.asarray, anchor)
  with jax.set_mesh(mesh):
    params = place(make_params(), mesh, 'both')
    tx = adam_spd(1e-2, anchor, layer_axes=AXES)
    for init in (tx.init, jax.jit(tx.init)):
      state = init(params)
      for n, p in params.items():
        found = state[1].anchor[n]
        assert found.sharding.is_equivalent_to(p.sharding, p.ndim)
        np.testing.assert_array_equal(found, anchor[n])


def test_without_a_mesh_in_scope():
  """Sharded params alone, as `jax.device_put` made them."""
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, P('data'))
  params = {'w': jax.device_put(make_params()['kernel'], sharding)}
  tx = adam_spd(1e-2)
  grads = [{'w': g['kernel']} for g in gradients(5)]
  _, state, step = train(tx, params, grads, tx.init(params))
  assert step._cache_size() <= 2  # Adam's count moves to the mesh
  first = tx.init(params)[1]
  for a, b in zip(
    jax.tree.leaves(first), jax.tree.leaves(state[1]), strict=True
  ):
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@is_auto
@kinds
def test_a_sharded_layer_axis_without_a_mesh_in_scope(kind, axis_type):
  mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(axis_type,) * 2)
  params, grads = (
    place(t, mesh, 'both') for t in (make_params(), gradients(1)[0])
  )
  tx = TRANSFORMATIONS[kind]()
  state = tx.init(params)
  _, eager = tx.update(grads, state, params)
  _, jitted = jax.jit(tx.update)(grads, state, params)
  for found in (eager, jitted):
    assert optax.tree.get(found, 'SPDState').ratio.shape == (6,)


def test_on_a_device_that_is_not_the_default():
  device = jax.devices()[3]
  params = jax.device_put(make_params(), device)
  tx = adam_spd(1e-2, layer_axes=AXES)
  state = tx.init(params)[1]
  for x in jax.tree.leaves(state):
    assert x.devices() == {device}


@pytest.mark.parametrize(
  'dtype', [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64]
)
@kinds
def test_state_and_updates_keep_their_types(kind, dtype):
  with jax.enable_x64(dtype == jnp.float64):
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), make_params())
    tx = TRANSFORMATIONS[kind]()
    update = jax.jit(tx.update)
    for init in (tx.init, jax.jit(tx.init)):
      state = init(params)
      seen = [jax.tree.map(describe, state)]
      for g in gradients(12):
        g = jax.tree.map(lambda x: jnp.asarray(x, dtype), g)
        updates, state = update(g, state, params)
        seen.append(jax.tree.map(describe, state))
        assert all(u.dtype == dtype for u in jax.tree.leaves(updates))
        params = optax.apply_updates(params, updates)
      eager_updates, eager = tx.update(g, state, params)
      assert all(u.dtype == dtype for u in jax.tree.leaves(eager_updates))
      seen.append(jax.tree.map(describe, eager))
      assert all(s == seen[0] for s in seen)
      assert optax.tree.get(state, 'SPDState').decayed_count.sum() > 0
    spd_state = optax.tree.get(state, 'SPDState')
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    assert spd_state.deviation.dtype == wide


@is_auto
@layouts
@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16, jnp.float64])
def test_types_and_layouts_together(dtype, layout, axis_type):
  mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(axis_type,) * 2)
  with jax.enable_x64(dtype == jnp.float64), jax.set_mesh(mesh):
    params, grads = (
      place(jax.tree.map(lambda x: x.astype(dtype), t), mesh, layout)
      for t in (make_params(), gradients(1)[0])
    )
    tx = with_spd(optax.sgd(1e-2), layer_axes=AXES)
    first = tx.init(params)[1]
    _, state = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
    for a, b in zip(
      jax.tree.leaves(first), jax.tree.leaves(state[1]), strict=True
    ):
      assert describe(a) == describe(b)
      assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@is_auto
def test_a_state_of_a_jitted_init_can_be_donated(axis_type):
  mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(axis_type,) * 2)
  with jax.set_mesh(mesh):
    params = place(make_params(), mesh, 'both')
    tx = adam_spd(1e-2, layer_axes=AXES)
    state = jax.jit(tx.init)(params)
    step = jax.jit(tx.update, donate_argnums=(1, 2))
    step(place(gradients(1)[0], mesh, 'both'), state, params)


@layouts
@pytest.mark.parametrize('source', ['jax', 'numpy', 'params'])
def test_the_anchor_shares_no_memory_with_donated_params(layout, source):
  """Params and anchor laid out from one tree: device 0 would hold it once."""
  mesh = jax.make_mesh((4, 2), ('data', 'model'), (AxisType.Auto,) * 2)
  pretrained = make_params()
  if source == 'jax':
    pretrained = jax.tree.map(jnp.asarray, pretrained)
  shardings = {n: NamedSharding(mesh, s) for n, s in SPECS[layout].items()}
  params = jax.device_put(pretrained, shardings)
  tx = adam_spd(1e-2, None if source == 'params' else pretrained)
  state = tx.init(params)

  def addresses(tree):
    return {
      shard.data.unsafe_buffer_pointer()
      for leaf in jax.tree.leaves(tree)
      for shard in leaf.addressable_shards
    }

  anchor = state[1].anchor
  assert not addresses(anchor) & addresses(params)
  if source == 'jax':
    assert not addresses(anchor) & addresses(pretrained)
  expected = make_params()

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for grads in gradients(3):
    params, state = step(params, state, jax.device_put(grads, shardings))
  chex.assert_trees_all_equal(jax.device_get(state[1].anchor), expected)


@pytest.mark.parametrize('shape', [(64, 32), (256, 128)])
@pytest.mark.parametrize('spec', [P('data'), P(None, 'data')])
def test_no_param_moves_for_its_sums(shape, spec):
  """Sums of rows do; slices are not cut from what is sharded."""
  shape = shape if spec == P('data') else shape[::-1]
  mesh = jax.make_mesh((8,), ('data',), (AxisType.Auto,))
  params = {'w': jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))}
  tx = adam_spd(1e-2)
  state = tx.init(params)
  text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
  assert 'collective-permute' not in text
  assert 'all-to-all' not in text
  for dims in re.findall(r'= f32\[([\d,]*)\]\S* all-gather', text):
    # of each row of 4 slices' sum, on each device
    assert math.prod(map(int, dims.split(','))) <= min(shape) // 4 * 8
