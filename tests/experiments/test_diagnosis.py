"""A loss that is not finite is traced to its layer."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import diagnosis
from tests.experiments import test_train

_TINY = dataclasses.replace(test_train.TINY, depth=1)


def sentence(config=_TINY, change=None):
  """What a run says whose pretrained params were changed."""
  task = dataclasses.replace(test_train.TASK, first_block=0)
  tuning = test_train.fine_tuning(task, config, num_steps=3)
  if change:
    blocks = tuning.pretrained['backbone']['blocks']
    kernel = (blocks if config.scan else blocks[0])['mlp']['fc1']['kernel']
    kernel[...] = change(kernel[...])
  with pytest.raises(FloatingPointError) as caught:
    tuning.run(test_train.METHOD, test_train.hyperparams(), 0)
  return str(caught.value)


def overflow(kernel):
  return jnp.full_like(kernel, 3e38)


@pytest.mark.parametrize(
  ('changes', 'layer'),
  [
    ({'remat': True, 'drop_path': 0.1}, r'blocks.0/mlp, in dot_general.'),
    ({'scan': True, 'depth': 2}, 'blocks, in scan.'),
  ],
)
def test_the_first_operation_in_the_order_of_the_forward_pass(changes, layer):
  config = dataclasses.replace(_TINY, **changes)
  said = sentence(config, overflow)
  assert f'the first layer to go wrong is {layer}' in said
  assert 'at step 1, where the learning rate is 0;' in said


def test_a_parameter_that_is_not_finite():
  said = sentence(change=lambda kernel: kernel.at[0, 0].set(jnp.nan))
  assert '1 of 26 layers are not finite before it, the first' in said
  assert 'backbone/blocks/0/mlp/fc1/kernel' in said


def test_one_batch_that_is_not_finite():
  """The params stay those of its step, though the next one has begun."""
  tuning = test_train.fine_tuning(num_steps=6)
  whole = tuning.train

  def train(seed, start):
    for i, batch in enumerate(whole(seed, start)):
      yield {
        **batch,
        'hidden': batch['hidden'] * np.float16(np.inf if i == 2 else 1),
      }

  tuning = dataclasses.replace(tuning, train=train)
  message = r'is nan at step 3, .*; its batch is not finite\. Lower'
  with pytest.raises(FloatingPointError, match=message):
    tuning.run(test_train.METHOD, test_train.hyperparams(), 0)


def test_what_is_minus_infinity_on_purpose_is_no_fault():
  def masked(params, x):
    logits = jnp.where(x > 0, x * params['w'], -jnp.inf)
    with diagnosis.jax.named_scope('bad'):
      return jnp.log(jnp.exp(logits).sum() - 1e9)

  said = diagnosis.first_not_finite(
    masked, {'w': jnp.ones(2)}, jnp.array([1.0, -1.0])
  )
  assert said == 'the first layer to go wrong is bad, in log.'


def test_what_is_finite():
  said = diagnosis.first_not_finite(lambda p: p['w'].sum(), {'w': jnp.ones(2)})
  assert 'give a finite one when run again' in said
