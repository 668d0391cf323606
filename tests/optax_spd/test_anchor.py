"""The anchor: three kinds, copied, kept, and refused where they are wrong."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_spd import adam_spd, decay_to_anchor, spd, with_spd
from tests.optax_spd.problems import Quadratic, as_arrays


def run(tx, num_steps=30, problem=None):
  """Params and state after some steps of a noisy quadratic."""
  problem = problem or Quadratic()
  params = as_arrays(problem.params)
  state = tx.init(params)
  update = jax.jit(tx.update)
  for _ in range(num_steps):
    grads = problem.grads(params, problem.noise())
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params, optax.tree.get(state, 'SPDState')


def test_params_given_to_init_are_the_default():
  explicit = run(adam_spd(1e-3, Quadratic().params))
  implicit = run(adam_spd(1e-3))
  chex.assert_trees_all_equal(explicit, implicit)
  assert implicit[1].decayed_count.sum() > 0


def test_origin_is_an_anchor_of_zeros_without_memory():
  zeros = jax.tree.map(np.zeros_like, Quadratic().params)
  params, state = run(adam_spd(1e-3, 'origin'))
  expected, expected_state = run(adam_spd(1e-3, zeros))
  chex.assert_trees_all_equal(params, expected)
  assert state.decayed_count.sum() > 0
  assert jax.tree.leaves(state.anchor) == []
  chex.assert_trees_all_equal(state[1:], expected_state[1:])


def test_origin_may_stand_for_a_subtree():
  problem = Quadratic()
  params = {'lora': as_arrays(problem.params), 'rest': jnp.ones(3)}
  tx = adam_spd(1e-3, {'lora': 'origin', 'rest': np.zeros(3)})
  state = optax.tree.get(tx.init(params), 'SPDState')
  assert [x.shape for x in jax.tree.leaves(state.anchor)] == [(3,)]

  def is_hole(x):
    return isinstance(x, optax.MaskedNode)

  holes = jax.tree.leaves(state.anchor['lora'], is_leaf=is_hole)
  assert len(holes) == 8
  assert all(map(is_hole, holes))


def test_the_anchor_never_changes():
  problem = Quadratic()
  for tx in (
    adam_spd(1e-3),
    adam_spd(1e-3, problem.params),
    optax.chain(optax.scale_by_adam(), spd(problem.params, learning_rate=1e-3)),
  ):
    _, state = run(tx)
    chex.assert_trees_all_equal(state.anchor, problem.params)
    assert state.decayed_count.sum() > 0


def test_the_anchor_is_a_copy_of_what_the_caller_holds():
  given = {'w': np.ones(4096, np.float32)}
  params = {'w': np.zeros(4096, np.float32)}
  explicit = adam_spd(1e-3, given).init(params)[1]
  implicit = adam_spd(1e-3).init(params)[1]
  given['w'][:] = 7
  params['w'][:] = 7
  np.testing.assert_array_equal(explicit.anchor['w'], 1)
  np.testing.assert_array_equal(implicit.anchor['w'], 0)


@pytest.mark.parametrize('explicit', [False, True])
@pytest.mark.parametrize('jitted', [False, True])
def test_params_and_state_can_be_donated(explicit, jitted):
  problem = Quadratic()
  params = as_arrays(problem.params)
  # The anchor shares its buffers with the params that are donated.
  tx = adam_spd(1e-3, params if explicit else None)
  state = jax.jit(tx.init)(params) if jitted else tx.init(params)

  def step(params, state, noise):
    grads = problem.grads(params, noise)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  step = jax.jit(step, donate_argnums=(0, 1))
  for _ in range(20):
    old = params['layer_00']
    params, state = step(params, state, problem.noise())
    assert old.is_deleted()
  chex.assert_trees_all_equal(state[1].anchor, problem.params)
  assert state[1].decayed_count.sum() > 0


def test_mask_takes_the_plain_step_at_no_anchor_cost():
  problem = Quadratic()
  mask = {n: n != 'layer_02' for n in problem.params}
  tx = adam_spd(1e-3, mask=mask)
  params, state = as_arrays(problem.params), tx.init(as_arrays(problem.params))
  plain = optax.adam(1e-3)
  plain_state = plain.init(params)
  for _ in range(20):
    grads = problem.grads(params, problem.noise())
    updates, state = tx.update(grads, state, params)
    expected, plain_state = plain.update(grads, plain_state, params)
    np.testing.assert_array_equal(updates['layer_02'], expected['layer_02'])
    params = optax.apply_updates(params, updates)
  assert isinstance(state[1].anchor['layer_02'], optax.MaskedNode)
  assert state[1].alignment.shape == (7,)
  assert (state[1].decayed_count > 0).all()


@pytest.mark.filterwarnings('ignore:with_spd. mask leaves out every parameter')
def test_masks_may_be_functions_and_prefixes():
  params = {'a': {'w': jnp.ones(3), 'b': jnp.ones(3)}, 'c': jnp.ones((2, 2))}
  for mask, kept in (
    ({'a': True, 'c': False}, 2),
    (lambda p: jax.tree.map(lambda x: x.ndim > 1, p), 1),
    (False, 0),
  ):
    state = with_spd(optax.sgd(0.1), mask=mask).init(params)[1]
    assert len(jax.tree.leaves(state.anchor)) == kept
    assert state.ratio.shape == (kept,)


def test_what_lies_under_masked_out_paths_is_ignored():
  params = {'body': jnp.ones((3, 4)), 'head': {'w': jnp.ones((4, 2))}}
  mask = {'body': True, 'head': False}
  for anchor in (
    {'body': np.ones((3, 4))},
    {'body': np.ones((3, 4)), 'head': {'w': np.ones((4, 1000))}},
    {'body': np.ones((3, 4)), 'head': {'kernel': np.ones(4), 'b': np.ones(2)}},
  ):
    state = adam_spd(1e-3, anchor, mask=mask).init(params)
    assert state[1].anchor['body'].shape == (3, 4)


@pytest.mark.parametrize(
  ('anchor', 'message'),
  [
    (
      {'body': np.ones((4, 3)), 'head': np.ones(2)},
      r"anchor\['body'\] has shape \(4, 3\), its parameter \(3, 4\)",
    ),
    ({'body': np.ones((3, 4))}, r"nothing for the parameter params\['head'\]"),
    (
      {'body': np.ones((3, 4)), 'head': np.ones(2), 'neck': np.ones(2)},
      r"anchor\['neck'\] belongs to no parameter",
    ),
    (
      {'body': {'w': np.ones((3, 4))}, 'head': np.ones(2)},
      r"nothing for the parameter params\['body'\]",
    ),
    (np.ones(3), r"nothing for the parameter params\['body'\]"),
  ],
)
def test_an_anchor_of_another_model_is_refused(anchor, message):
  params = {'body': jnp.ones((3, 4)), 'head': jnp.ones(2)}
  for tx in (adam_spd(1e-3, anchor), spd(anchor, learning_rate=1e-3)):
    with pytest.raises(ValueError, match=message):
      tx.init(params)


def test_a_state_of_another_mask_is_refused():
  """Its masked node would pass for the origin, and the layer go to zero."""
  params = {'body': jnp.ones((3, 4)), 'head': jnp.ones(2)}
  made = adam_spd(1e-3, mask={'body': True, 'head': False}).init(params)
  used = adam_spd(1e-3, mask={'body': False, 'head': True})
  message = r"no anchor for params\['head'\]; update needs the mask"
  with pytest.raises(ValueError, match=message):
    used.update(params, made, params)
  made = decay_to_anchor(0.1, mask={'body': True, 'head': False}).init(params)
  with pytest.raises(ValueError, match=message):
    decay_to_anchor(0.1).update(params, made, params)


def test_a_state_of_another_optimizer_is_refused():
  params = {'w': jnp.ones(3)}
  tx, base = adam_spd(1e-3), optax.adam(1e-3)
  state = tx.init(params)
  chained = spd(learning_rate=1e-3)
  for wrong in (base.init(params)[0], state, None):
    with pytest.raises(TypeError, match='state that init of the same'):
      chained.update(params, wrong, params)
  with pytest.raises(TypeError, match='is a SPDState, not a tuple'):
    tx.update(params, state[1], params)


def test_gradients_that_are_not_real_are_refused():
  params = {'w': jnp.ones(3)}
  tx = adam_spd(1e-3)
  for grad in (jnp.ones(3, jnp.int32), jnp.ones(3, jnp.complex64)):
    with pytest.raises(TypeError, match=r"updates\['w'\] has dtype"):
      tx.update({'w': grad}, tx.init(params), params)


def test_an_anchor_on_the_host_stays_there():
  problem = Quadratic()
  params = as_arrays(problem.params)
  tx = adam_spd(1e-3)
  ours = theirs = tx.init(params)
  anchor = ours[1].anchor
  on_host = jax.tree.map(
    lambda x: x.sharding.with_memory_kind('pinned_host'), anchor
  )
  ours = optax.tree.set(ours, anchor=jax.device_put(anchor, on_host))
  update = jax.jit(tx.update)
  for _ in range(20):
    grads = problem.grads(params, problem.noise())
    expected, theirs = update(grads, theirs, params)
    updates, ours = update(grads, ours, params)
    chex.assert_trees_all_equal(updates, expected)
    params = optax.apply_updates(params, updates)
  for x in jax.tree.leaves(ours[1].anchor):
    assert x.sharding.memory_kind == 'pinned_host'
  assert ours[1].decayed_count.sum() > 0
  tx.update(grads, ours, params)  # and without jit
