"""The loops that users have: TrainState, nnx.Optimizer, a bare one, pmap."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

from optax_spd import SPDState, adam_spd, layer_names, spd

NUM_STEPS = 60


def spd_state(state):
  return optax.tree.get(state, 'SPDState')


class Network(linen.Module):
  @linen.compact
  def __call__(self, x):
    return linen.Dense(3, name='out')(
      jnp.tanh(linen.Dense(8, name='hidden')(x))
    )


PRETRAINED = Network().init(jax.random.key(0), jnp.ones((1, 6)))['params']


def batches(num_steps=NUM_STEPS):
  """Noisy targets of a network close by: SPD soon has something to do."""
  rng = np.random.default_rng(0)
  near = jax.tree.map(
    lambda p: p + 0.05 * rng.normal(size=p.shape).astype(np.float32), PRETRAINED
  )
  apply = jax.jit(Network().apply)
  for _ in range(num_steps):
    x = rng.normal(size=(16, 6)).astype(np.float32)
    y = apply({'params': near}, x) + rng.normal(size=(16, 3))
    yield x, np.asarray(y, np.float32)


def loss_fn(params, x, y):
  return jnp.mean((Network().apply({'params': params}, x) - y) ** 2)


def bare_loop(tx, params=PRETRAINED, data=None, state=None):
  state = tx.init(params) if state is None else state

  @jax.jit
  def step(params, state, x, y):
    updates, state = tx.update(jax.grad(loss_fn)(params, x, y), state, params)
    return optax.apply_updates(params, updates), state

  for x, y in batches() if data is None else data:
    params, state = step(params, state, x, y)
  return params, state


def train_state_loop(tx):
  train_state = TrainState.create(
    apply_fn=Network().apply, params=PRETRAINED, tx=tx
  )

  @jax.jit
  def step(train_state, x, y):
    grads = jax.grad(loss_fn)(train_state.params, x, y)
    return train_state.apply_gradients(grads=grads)

  for x, y in batches():
    train_state = step(train_state, x, y)
  return train_state.params, train_state.opt_state


class NNXNetwork(nnx.Module):
  def __init__(self, params):
    rngs = nnx.Rngs(0)
    self.hidden = nnx.Linear(6, 8, rngs=rngs)
    self.out = nnx.Linear(8, 3, rngs=rngs)
    nnx.update(self, params)

  def __call__(self, x):
    return self.out(jnp.tanh(self.hidden(x)))


def nnx_loop(tx):
  model = NNXNetwork(PRETRAINED)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, x, y):
    grads = nnx.grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
    optimizer.update(model, grads)

  for x, y in batches():
    step(model, optimizer, x, y)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  return params, optimizer.opt_state


def pmap_loop(tx):
  devices = jax.local_device_count()

  def step(params, state, x, y):
    grads = jax.lax.pmean(jax.grad(loss_fn)(params, x, y), 'batch')
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  step = jax.pmap(step, 'batch')
  params, state = jax.tree.map(
    lambda x: np.stack([np.asarray(x)] * devices),
    (PRETRAINED, tx.init(PRETRAINED)),
  )
  for x, y in batches():
    x, y = (a.reshape(devices, -1, *a.shape[1:]) for a in (x, y))
    params, state = step(params, state, x, y)
  for x in jax.tree.leaves((params, state)):
    np.testing.assert_array_equal(x, np.stack([x[0]] * devices))
  return jax.tree.map(lambda x: x[0], (params, state))


TRANSFORMATIONS = {
  'wrapper': adam_spd(1e-2),
  'chained': optax.chain(optax.scale_by_adam(), spd(learning_rate=1e-2)),
}


@pytest.mark.eight_devices
@pytest.mark.parametrize('kind', TRANSFORMATIONS)
@pytest.mark.parametrize('loop', [train_state_loop, nnx_loop, pmap_loop])
def test_every_loop_takes_the_same_way(kind, loop):
  assert jax.local_device_count() == 8
  expected, state = bare_loop(TRANSFORMATIONS[kind])
  params, _ = loop(TRANSFORMATIONS[kind])
  # The mean over eight devices is rounded in another order.
  chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-5)
  assert spd_state(state).decayed_count.sum() > 20


def test_the_numbers_of_every_layer_in_one_line():
  names = layer_names(PRETRAINED)
  _, state = bare_loop(TRANSFORMATIONS['chained'])
  decay = dict(zip(names, spd_state(state).decay.tolist(), strict=True))
  assert list(decay) == [
    'hidden/bias',
    'hidden/kernel',
    'out/bias',
    'out/kernel',
  ]


def test_lora_is_anchored_at_the_origin_at_no_memory():
  model = NNXNetwork(PRETRAINED)
  model.hidden = nnx.LoRA(6, 2, 8, base_module=model.hidden, rngs=nnx.Rngs(1))
  tx = adam_spd(1e-2, 'origin')
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
  before = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))

  @nnx.jit
  def step(model, optimizer, x, y):
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    grad_fn = nnx.grad(lambda m: jnp.mean((m(x) - y) ** 2), argnums=wrt)
    grads = grad_fn(model)
    optimizer.update(model, grads)

  for x, y in batches():
    step(model, optimizer, x, y)
  state = optimizer.opt_state
  after = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
  assert sorted(before['hidden']) == ['lora_a', 'lora_b']
  assert (after['hidden']['lora_b'] != 0).any()
  found = jax.tree.leaves(state)
  shapes = [x.shape for x in found]
  # Adam's two moments of A and B; no third copy.
  assert shapes.count((6, 2)) == shapes.count((2, 8)) == 2


def save(path, tree):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, tree)


def restore(path, like):
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(
      path, jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    )


@pytest.mark.parametrize('kind', TRANSFORMATIONS)
def test_a_restored_run_goes_on_to_the_bit(kind, tmp_path):
  tx = TRANSFORMATIONS[kind]
  data = list(batches())
  expected = bare_loop(tx, data=data)
  params, state = bare_loop(tx, data=data[:25])
  save(tmp_path / 'step_25', {'params': params, 'opt_state': state})
  del params, state

  # A new process: the pretrained params are not at hand, only their shapes.
  abstract = jax.eval_shape(lambda: PRETRAINED)
  like = {'params': abstract, 'opt_state': jax.eval_shape(tx.init, abstract)}
  found = restore(tmp_path / 'step_25', like)
  chex.assert_trees_all_equal(spd_state(found['opt_state']).anchor, PRETRAINED)
  resumed = bare_loop(tx, found['params'], data[25:], found['opt_state'])
  chex.assert_trees_all_equal(resumed, expected)
  assert spd_state(resumed[1]).decayed_count.sum() > 20


def test_switching_from_adamw_to_spd_and_back():
  """Adam's moments and count go along; only SPD's own state is new."""
  data = list(batches())
  adam = optax.adam(1e-2)
  params, adam_state = bare_loop(adam, data=data[:20])

  tx = adam_spd(1e-2, PRETRAINED)
  fresh = tx.init(params)[1]
  params, (adam_state, state) = bare_loop(
    tx, params, data[20:40], (adam_state, fresh)
  )
  assert adam_state[0].count == 40
  assert state.count == 20
  chex.assert_trees_all_equal(state.anchor, PRETRAINED)
  assert state.decayed_count.sum() > 10

  back, _ = bare_loop(adam, params, data[40:], adam_state)
  off, _ = bare_loop(
    adam_spd(1e-2, PRETRAINED, 0.0), params, data[40:], (adam_state, state)
  )
  # lambda = 0 is the base optimizer but for fused multiply-adds.
  chex.assert_trees_all_close(back, off, rtol=1e-5, atol=1e-6)
  assert isinstance(state, SPDState)
