"""What a step costs, in counts that no machine changes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_spd import adam_spd, spd

SHAPE = (128, 256)
OPTIMIZERS = {
  'adamw': lambda: optax.adamw(1e-3),
  'adam_spd': lambda: adam_spd(1e-3),
  'chain': lambda: optax.chain(optax.scale_by_adam(), spd(learning_rate=1e-3)),
}
methods = pytest.mark.parametrize('name', ['adam_spd', 'chain'])


def shapes(num_tensors, shape):
  leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
  return {f'w{i}': leaf for i in range(num_tensors)}


def lowered(name, num_tensors, shape=SHAPE, **kwargs):
  """An optimizer's step on tensors of one shape, for CPU unless told."""
  tx = OPTIMIZERS[name]()

  def step(state, params, grads):
    updates, state = tx.update(grads, state, params)
    return state, optax.apply_updates(params, updates)

  params = shapes(num_tensors, shape)
  state = jax.eval_shape(tx.init, params)
  traced = jax.jit(step, donate_argnums=(0, 1)).trace(state, params, params)
  return traced.lower(**kwargs)


def bytes_accessed(name, num_tensors=4):
  return lowered(name, num_tensors).compile().cost_analysis()['bytes accessed']


@pytest.mark.parametrize(
  # Adam's reads and writes are ten floats a parameter. SPD adds the step, the
  # sums and the anchor, and a gradient in the exact condition.
  ('name', 'passes'),
  [('adam_spd', 1.75), ('chain', 1.65)],
)
def test_passes_over_memory(name, passes):
  assert bytes_accessed(name) < passes * bytes_accessed('adamw')


@methods
def test_scratch_is_the_step_and_no_more(name):
  memory = lowered(name, 4).compile().memory_analysis()
  # Each tensor's step, and a few rows: no products, no differences.
  assert memory.temp_size_in_bytes < 1.1 * 4 * math.prod(SHAPE) * 4


@methods
def test_memory_is_adam_s_and_an_anchor_to_the_byte(name):
  params = {'a': jnp.ones((8, 3)), 'b': jnp.ones(5)}

  def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

  tx = OPTIMIZERS[name]()
  adam = size(optax.scale_by_adam().init(params))
  # alignment, deviation, ratio, decay and two counters a layer; the count
  assert size(tx.init(params)) == adam + size(params) + 6 * 4 * 2 + 4
  narrow = adam_spd(1e-3, anchor_dtype=jnp.bfloat16).init(params)
  assert size(narrow) == adam + size(params) // 2 + 6 * 4 * 2 + 4
  origin = adam_spd(1e-3, 'origin').init(params)
  assert size(origin) == adam + 6 * 4 * 2 + 4


@methods
def test_the_program_grows_with_the_tensors_and_no_faster(name):
  def instructions(num_tensors):
    text = lowered(name, num_tensors).compile().as_text()
    return len(re.findall(r' = ', text))

  few, more, most = (instructions(n) for n in (10, 20, 40))
  assert most - more <= 2.02 * (more - few)


@methods
@pytest.mark.parametrize('shape', [(128,), SHAPE])  # stacked, and not
def test_kernels_are_shared_by_tensors_of_one_shape(name, shape):
  """XLA compiles each once: no place of one tensor among others is in them."""

  def kernels(num_tensors):
    text = lowered(name, num_tensors, shape).compile().as_text()
    # fused, or wrapped: an operation on its own
    found = re.findall(
      r'^%(?:fused|wrapped)_\S+ [^\n]*\n(.*?)^}', text, re.M | re.S
    )
    assert len(found) > 2 * num_tensors
    return {re.sub(r'metadata=\{[^}]*\}|%[\w.\-]+', '', x) for x in found}

  of_params = 'f32[{}]'.format(','.join(map(str, shape)))
  few, many = kernels(20), kernels(40)
  assert 4 <= sum(of_params in kernel for kernel in few) <= 6
  assert len(few) == len(many)


@methods
def test_sums_stay_apart_where_xla_merges_them(name):
  sums = 4 if name == 'adam_spd' else 3
  cpu = lowered(name, 1, lowering_platforms=('cpu',)).as_text()
  tpu = lowered(name, 1, lowering_platforms=('tpu',)).as_text()
  # stablehlo.reduce(a init: x), (b init: y), ...: one of several operands
  several = re.findall(r'stablehlo.reduce\(.*', cpu)
  assert [line.count(' init: ') for line in several] == [sums] * len(several)
  assert tpu.count('stablehlo.reduce(') == sums
  # rows of 4 slices' sum, and the sums of the rows
  stages = ['32x256', '32']
  found = [re.search(r': \(tensor<([\dx]+)xf32>', line)[1] for line in several]
  assert found == stages
  assert 'tensor<32x256xf32>' in cpu
  assert 'tensor<32x256xf32>' not in tpu


@pytest.mark.parametrize('shape', [(2048, 1024), (4, 65536), (2**21,)])
def test_long_sums_keep_their_digits(shape):
  """Two million terms one after the other lose three digits in float32."""
  rng = np.random.default_rng(0)
  theta_0 = rng.normal(1, 0.1, shape).astype(np.float32)
  theta = theta_0 + rng.uniform(0, 1e-2, theta_0.shape).astype(np.float32)
  tx = adam_spd(1e-9, {'w': theta_0})
  grads = {'w': theta}
  state = tx.init({'w': theta})
  _, state = jax.jit(tx.update)(grads, state, {'w': theta})
  found = optax.tree.get(state, 'SPDState')
  delta = (theta - theta_0).astype(np.float64)
  np.testing.assert_allclose(
    found.deviation[0], np.linalg.norm(delta), rtol=1e-6
  )
  np.testing.assert_allclose(
    found.alignment[0], np.sum(delta * theta.astype(np.float64)), rtol=1e-6
  )
  assert found.selected_count[0] == 1


@methods
def test_an_update_can_be_differentiated(name):
  """dL/dlambda of a step that decays: -r_t <theta~_t - theta_0, dL/dtheta>."""
  # Two of one shape, which are stacked.
  params = {n: jnp.linspace(1, 2, 12).reshape(3, 4) for n in 'vw'}
  anchor = jax.tree.map(jnp.zeros_like, params)
  up = jax.tree.map(jnp.ones_like, params)

  def final(weight_decay):
    # Adam's momentum still moves out when the gradient has turned back.
    if name == 'adam_spd':
      tx = adam_spd(0.1, anchor, weight_decay)
    else:
      chained = spd(anchor, weight_decay, learning_rate=0.1)
      tx = optax.chain(optax.scale_by_adam(), chained)
    theta, state = params, tx.init(params)
    for sign in (-1.0, -1.0, -1.0, 0.4, 0.4):
      grads = jax.tree.map(lambda x, sign=sign: sign * x, up)
      updates, state = tx.update(grads, state, theta)
      theta = optax.apply_updates(theta, updates)
    return jnp.sum(theta['v'] + theta['w']), optax.tree.get(state, 'SPDState')

  slope, state = jax.grad(final, has_aux=True)(1.0)
  # The second sums depend on lambda.
  assert state.decayed_count.tolist() == [2, 2]
  small = 1e-2
  difference = (final(1 + small)[0] - final(1 - small)[0]) / (2 * small)
  assert slope < 0
  np.testing.assert_allclose(slope, difference, rtol=1e-3)
