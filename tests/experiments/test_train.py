"""Fine-tuning on a tiny ViT: the protocol that every method shares."""

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from experiments import train
from experiments.models import heads, vit

TINY = vit.ViTConfig(
  patch_size=14,
  width=16,
  depth=3,
  num_heads=2,
  mlp_dim=32,
  grid=2,
  eps=1e-6,
  mean=(0.5, 0.5, 0.5),
  std=(0.5, 0.5, 0.5),
)


def fine_tuning(**changes):
  config = ConfigDict(
    {
      'learning_rate': 1e-2,
      'num_steps': 40,
      'batch_size': 16,
      'eval_batch_size': 32,
      'eval_every': 10,
      'warmup': 0.1,
      **changes,
    }
  )
  backbone = vit.ViT(TINY, rngs=nnx.Rngs(0))
  model = heads.Classifier(backbone, 2, rngs=nnx.Rngs(1))
  graphdef, pretrained, frozen = nnx.split(model, train.trainable_from(1), ...)
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(200, 5, 16)).astype(np.float16)
  # Noisy labels: the gradient turns, and SPD finds something to do.
  labels = (tokens[:, 0, 0] + rng.normal(size=200) > 0.5).astype(np.int32)
  return train.FineTuning(
    graphdef,
    pretrained,
    frozen,
    1,
    (tokens[:100], labels[:100]),
    (tokens[100:], labels[100:]),
    config,
  )


def test_what_is_trained():
  tuning = fine_tuning()
  names = nnx.to_pure_dict(tuning.pretrained)
  assert set(names) == {'backbone', 'head'}
  assert set(names['backbone']) == {'blocks', 'norm'}
  assert set(names['backbone']['blocks']) == {1, 2}


def test_a_run_is_deterministic_in_its_seed():
  tuning = fine_tuning()
  first, again, other = (
    tuning.run('adam_spd', 1.0, seed) for seed in (0, 0, 1)
  )
  jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
  np.testing.assert_array_equal(first.history['loss'], again.history['loss'])
  assert (first.history['loss'] != other.history['loss']).any()


def test_spd_at_zero_is_adam_and_at_one_stays_closer():
  tuning = fine_tuning()
  adam = tuning.run('adamw', 0.0, 0)
  zero = tuning.run('adam_spd', 0.0, 0)
  one = tuning.run('adam_spd', 1.0, 0)
  # Fused differently around apply_updates: the last bits.
  np.testing.assert_allclose(
    adam.history['loss'], zero.history['loss'], rtol=1e-4
  )
  assert zero.history['selected'].mean() > 0.05
  assert zero.history['decayed'].max() == 0
  assert one.history['decayed'].mean() > 0.05
  assert one.history['deviation'][-1] < 0.95 * adam.history['deviation'][-1]


def test_l2sp_stays_closer_and_adamw_learns():
  tuning = fine_tuning()
  adam = tuning.run('adamw', 0.0, 0)
  l2sp = tuning.run('l2sp', 1.0, 0)
  assert l2sp.history['deviation'][-1] < 0.9 * adam.history['deviation'][-1]
  losses = adam.history['loss']
  assert losses[-5:].mean() < 0.8 * losses[:5].mean()


def test_the_best_step_on_validation_is_kept():
  seen = []

  class Recorded(train.FineTuning):
    def evaluate(self, params, sets):
      metrics = super().evaluate(params, sets)
      seen.append((metrics['val']['auroc'], jax.device_get(params)))
      return metrics

  tuning = fine_tuning(eval_every=7)
  run = Recorded(**vars(tuning)).run('adamw', 0.1, 0)
  steps = [7, 14, 21, 28, 35, 40]
  assert len(seen) == len(steps)
  aurocs = [auroc for auroc, _ in seen]
  # Of equals, the last.
  best = max(i for i, auroc in enumerate(aurocs) if auroc == max(aurocs))
  assert run.step == steps[best]
  jax.tree.map(np.testing.assert_array_equal, run.params, seen[best][1])
  assert len(run.history['loss']) == 40


def test_a_loss_that_is_not_finite_stops_the_run():
  tuning = fine_tuning(learning_rate=1e30)
  with pytest.raises(FloatingPointError, match=r'adamw: the loss is .*at step'):
    tuning.run('adamw', 0.0, 0)


def test_wise_ft_averages():
  tuning = fine_tuning()
  params = jax.tree.map(lambda p: p + 1, tuning.pretrained)
  half = train.wise_ft(tuning.pretrained, params, 0.5)
  for a, b in zip(
    jax.tree.leaves(half), jax.tree.leaves(tuning.pretrained), strict=True
  ):
    np.testing.assert_allclose(a, b + 0.5, rtol=1e-6)
  size = sum(p.size for p in jax.tree.leaves(params))
  assert tuning.deviation(half) == pytest.approx(0.5 * size**0.5, rel=1e-5)
