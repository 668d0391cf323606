"""Fine-tuning on a tiny ViT: the protocol that every method shares."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from experiments import averages, optimizers, parallel, train
from experiments.data import pipeline, sources
from experiments.models import blocks, heads, vit
from experiments.tasks import classification
from optax_spd import with_spd

TINY = dataclasses.replace(
  vit.CONFIGS['dinov2_s14'], width=16, depth=3, num_heads=2, mlp_dim=32, grid=2
)
TASK = classification.Classification(
  2, 1, (1.0, 1.0), 0.0, 0.0, 0.0, 1.0, 0.5, ('auroc',)
)
METHOD = optimizers.Method('adam', 'all', 1.0, False, 40, 0.1, 0.0, 0.0, True)
SPD = dataclasses.replace(METHOD, spd=True)


def hyperparams(weight_decay=0.0, spd=0.0, learning_rate=1e-2):
  return {
    'learning_rate': learning_rate,
    'weight_decay': weight_decay,
    'spd': spd,
  }


def fine_tuning(task=TASK, model_config=TINY, layout=None, **changes):
  layout = layout or parallel.layout(devices=jax.devices()[:1])
  config = ConfigDict(
    {
      'num_steps': 40,
      'eval_batch_size': 32,
      'eval_every': 10,
      'ema': 0.0,
      'accumulate': 1,
      **changes,
    }
  )
  model = heads.Classifier(vit.ViT(model_config, rngs=nnx.Rngs(0)), 2)
  graphdef, pretrained, frozen = nnx.split(
    model, blocks.from_block(task.first_block), ...
  )
  rng = np.random.default_rng(0)
  if task.first_block:
    inputs = rng.normal(size=(200, 5, 16)).astype(np.float16)
    signal = inputs[:, 0, 0]
  else:
    inputs = rng.integers(0, 256, (200, 28, 28, 3), np.uint8)
    signal = 20 * (inputs.mean((1, 2, 3)) / 127.5 - 1)
  # Noisy labels: the gradient turns, and SPD finds something to do.
  labels = (signal + rng.normal(size=200) > 0.5).astype(np.int32)
  name = 'hidden' if task.first_block else 'image'
  train_set, val_set = (
    sources.Arrays({name: inputs[rows], 'label': labels[rows]})
    for rows in (slice(100), slice(100, 200))
  )
  return train.FineTuning(
    task,
    graphdef,
    layout.put(pretrained),
    layout.put(frozen),
    lambda seed, start=0: pipeline.train_batches(
      train_set, (), batch_size=16, seed=seed, start=start
    ),
    {'val': classification.LabelledSet(val_set)},
    config,
    layout,
  )


def test_what_is_trained():
  names = nnx.to_pure_dict(fine_tuning().pretrained)
  assert set(names) == {'backbone', 'head'}
  assert set(names['backbone']) == {'blocks', 'norm'}
  assert set(names['backbone']['blocks']) == {1, 2}


def test_the_whole_network_is_trained_from_images():
  task = dataclasses.replace(TASK, first_block=0, mixup=0.2, cutmix=0.2)
  config = dataclasses.replace(TINY, drop_path=0.3)
  tuning = fine_tuning(task, config, num_steps=6)
  assert not jax.tree.leaves(tuning.frozen)
  first, again = (tuning.run(SPD, hyperparams(spd=1.0), 0) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
  moved = jax.tree.map(
    lambda a, b: (a != b).any(), first.params, tuning.pretrained
  )
  assert all(jax.tree.leaves(moved))
  # Another seed drops and mixes otherwise, were the data the same.
  other = dataclasses.replace(
    tuning, train=lambda seed, start: tuning.train(0, start)
  )
  other = other.run(SPD, hyperparams(spd=1.0), 1)
  assert (other.history['loss'][1:] != first.history['loss'][1:]).any()


def test_a_run_is_deterministic_in_its_seed():
  tuning = fine_tuning()
  first, again, other = (
    tuning.run(SPD, hyperparams(spd=1.0), seed) for seed in (0, 0, 1)
  )
  jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
  np.testing.assert_array_equal(first.history['loss'], again.history['loss'])
  assert (first.history['loss'] != other.history['loss']).any()
  assert 0 <= first.waiting < 1


def test_spd_at_zero_is_adam_and_at_one_stays_closer():
  tuning = fine_tuning()
  adam = tuning.run(METHOD, hyperparams(), 0)
  zero = tuning.run(SPD, hyperparams(), 0)
  one = tuning.run(SPD, hyperparams(spd=1.0), 0)
  # Fused differently around apply_updates: the last bits.
  np.testing.assert_allclose(
    adam.history['loss'], zero.history['loss'], rtol=1e-4
  )
  assert zero.history['selected'].mean() > 0.05
  assert zero.history['decayed'].max() == 0
  assert one.history['decayed'].mean() > 0.05
  assert one.history['deviation'][-1] < 0.95 * adam.history['deviation'][-1]


def test_what_spd_did_is_told():
  tuning = fine_tuning(num_steps=12)
  seen = []
  run = tuning.run(
    SPD, hyperparams(spd=0.7), 0, callback=lambda _, step: seen.append(step)
  )
  row, history = tuning.describe(run), run.history
  steps = {
    key: np.array([step[key] for step in seen], np.float64)
    for key in train.LAYERS
  }
  selected = np.diff(steps['selected_count'], axis=0, prepend=0) > 0
  decay = np.where(selected, 0.7 * steps['ratio'], 0)
  assert row['mean_decay'] == pytest.approx(decay[selected].mean(), rel=1e-5)
  pulled = history['decay_share'] * history['path']
  assert row['decay_share'] == pytest.approx(
    pulled.sum() / history['path'].sum()
  )
  assert 0.05 < row['decay_share'] < 2
  assert row['acted'] is True


@pytest.mark.parametrize('strength', [0.7, 1.0, 3.0])
def test_the_length_that_layers_are_taken_back_by(strength):
  """From the state alone, against the vectors, in float64."""
  rng = np.random.default_rng(0)
  start = {name: rng.normal(size=(4, 3)) for name in 'abc'}
  tx = optax.adam(1e-2)
  whole = with_spd(tx, weight_decay=strength)
  params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), start)
  theta_0 = jax.tree.map(np.float64, params)
  state, inner_state = whole.init(params), tx.init(params)
  total = 0.0
  for _ in range(20):
    grads = jax.tree.map(
      lambda p, x: jnp.float32(p - x - 0.02 + 0.1 * rng.normal(size=p.shape)),
      params,
      theta_0,
    )
    steps, inner_state = tx.update(grads, inner_state, params)
    ahead = jax.tree.map(lambda p, u: np.float64(p) + u, params, steps)
    updates, after = whole.update(grads, state, params)
    before, spd = state[1], after[1]
    selected = spd.selected_count - before.selected_count
    path = optax.tree.norm(updates)
    found = train._pull(spd, before, selected, path)
    back = [
      np.sum((s * (p - x)) ** 2)
      for s, p, x in zip(
        spd.decay, ahead.values(), theta_0.values(), strict=True
      )
    ]
    wanted = np.sqrt(np.sum(back))
    # Float32 of differences, near the anchor.
    np.testing.assert_allclose(
      found['decay_share'] * path, wanted, rtol=1e-3, atol=1e-6
    )
    total += wanted
    state, params = after, optax.apply_updates(params, updates)
  assert total > 0.01
  # Onto the anchor itself, where the distance after it says nothing.
  vectors = {'decay': [1.0], 'ratio': [0.5], 'deviation': [0.0]}
  spd = spd._replace(**{k: jnp.array(v) for k, v in vectors.items()})
  before = before._replace(deviation=jnp.array([2.0]))
  found = train._pull(spd, before, jnp.array([1]), 8.0)
  assert found == {'mean_decay': 1.0, 'decay_share': 0.5}


def test_a_run_in_which_spd_did_not_act_says_so():
  tuning = fine_tuning(num_steps=6)
  row = tuning.describe(tuning.run(SPD, hyperparams(spd=0.0), 0))
  assert row['acted'] is False
  assert row['selected'] > 0
  assert row['mean_decay'] == row['decay_share'] == 0
  run = tuning.run(METHOD, hyperparams(), 0)
  row = tuning.describe(run)
  assert row['acted'] is row['mean_decay'] is row['decay_share'] is None
  # A path is no shorter than the distance that it leads to.
  assert run.history['path'].sum() >= row['deviation'] > 0


CONTROLS = (
  {'condition': 'always'},
  {'condition': 'estimated'},
  {'condition': 'random'},
  {'optimizer': 'sgd'},
  {'optimizer': 'muon'},
  {'optimizer': 'ftp', 'spd': False},
  {'optimizer': 'digrap', 'spd': False},
)


@pytest.mark.slow
@pytest.mark.parametrize('changes', CONTROLS, ids=str)
def test_controls_take_the_same_steps_on_split_params(changes, monkeypatch):
  """And of one program: rates and lambda are traced."""
  monkeypatch.setattr(parallel, '_SMALL', 0)
  method = dataclasses.replace(SPD, num_steps=8, **changes)
  values = hyperparams(spd=0.5)
  if method.condition == 'random':
    values['fire'] = np.array([0.5], np.float32)
  tuning = fine_tuning(num_steps=8)
  alone = tuning.run(method, values, 0)
  programs = train.jit_step._cache_size()
  tuning.run(method, jax.tree.map(lambda x: 0.9 * x, values), 1)
  assert train.jit_step._cache_size() == programs
  layout = parallel.layout('fsdp', jax.devices()[:4])
  split = fine_tuning(layout=layout, num_steps=8).run(method, values, 0)
  # Sums in another order.
  for key in ('loss', 'deviation', 'path'):
    np.testing.assert_allclose(
      alone.history[key], split.history[key], rtol=2e-3, atol=1e-6
    )
  if method.spd:
    assert alone.history['decayed'].mean() > 0.05
  assert any(
    not leaf.sharding.is_fully_replicated
    for leaf in jax.tree.leaves(split.params)
  )


def test_a_seed_draws_other_layers():
  tuning = fine_tuning(num_steps=6)
  tuning = dataclasses.replace(
    tuning, train=lambda seed, start: fine_tuning().train(0, start)
  )
  method = dataclasses.replace(SPD, num_steps=6, condition='random')
  values = hyperparams(spd=1.0) | {'fire': np.array([0.5], np.float32)}
  first, again, other = (tuning.run(method, values, s) for s in (0, 0, 1))
  for key in ('selected', 'loss'):
    np.testing.assert_array_equal(first.history[key], again.history[key])
    assert (first.history[key] != other.history[key]).any()


def test_l2sp_stays_closer_and_adam_learns():
  tuning = fine_tuning()
  adam = tuning.run(METHOD, hyperparams(), 0)
  l2sp = dataclasses.replace(METHOD, optimizer='l2sp')
  l2sp = tuning.run(l2sp, hyperparams(weight_decay=1.0), 0)
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
  run = Recorded(**vars(tuning)).run(METHOD, hyperparams(), 0)
  steps = [7, 14, 21, 28, 35, 40]
  assert len(seen) == len(steps)
  aurocs = [auroc for auroc, _ in seen]
  # Of equals, the last.
  best = max(i for i, auroc in enumerate(aurocs) if auroc == max(aurocs))
  assert run.step == steps[best]
  jax.tree.map(np.testing.assert_array_equal, run.params, seen[best][1])
  assert len(run.history['loss']) == 40


def test_the_running_average():
  evaluated = []

  class Recorded(train.FineTuning):
    def evaluate(self, params, sets):
      evaluated.append(jax.device_get(params))
      return super().evaluate(params, sets)

  def every_step(ema):
    evaluated.clear()
    tuning = fine_tuning(num_steps=4, eval_every=1, ema=ema)
    Recorded(**vars(tuning)).run(METHOD, hyperparams(), 0)
    return tuning.pretrained, list(evaluated)

  pretrained, params = every_step(0.0)
  expected = pretrained
  for one, averaged in zip(params, every_step(0.75)[1], strict=True):
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, expected, one)
    # Float32 rounding of params near 1.
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-6),
      averaged,
      expected,
    )


def test_a_run_that_starts_from_another():
  tuning = fine_tuning(num_steps=5)
  head = dataclasses.replace(METHOD, train='head')
  probe = tuning.run(head, hyperparams(learning_rate=0.1), 0)
  jax.tree.map(
    np.testing.assert_array_equal,
    probe.params['backbone'],
    tuning.pretrained['backbone'],
  )
  assert probe.params['head']['kernel'][...].any()
  then = tuning.run(METHOD, hyperparams(learning_rate=0.0), 0, probe.params)
  jax.tree.map(np.testing.assert_array_equal, then.params, probe.params)
  # It anchors there too: a strong pull holds it by the probe.
  l2sp = dataclasses.replace(METHOD, optimizer='l2sp_decoupled')
  held = tuning.run(l2sp, hyperparams(weight_decay=50.0), 0, probe.params)
  kernel, start, theta_0 = (
    params['head']['kernel'][...]
    for params in (held.params, probe.params, tuning.pretrained)
  )
  assert abs(kernel - start).max() < 0.5 * abs(start - theta_0).max()


def test_a_loss_that_is_not_finite_stops_the_run():
  tuning = fine_tuning()
  with pytest.raises(FloatingPointError, match=r'adam: the loss is .*at step'):
    tuning.run(METHOD, hyperparams(learning_rate=1e30), 0)


def test_wise_ft_averages():
  tuning = fine_tuning()
  params = jax.tree.map(lambda p: p + 1, tuning.pretrained)
  half = averages.wise_ft(tuning.pretrained, params, 0.5)
  for a, b in zip(
    jax.tree.leaves(half), jax.tree.leaves(tuning.pretrained), strict=True
  ):
    np.testing.assert_allclose(a, b + 0.5, rtol=1e-6)
  size = sum(p.size for p in jax.tree.leaves(params))
  assert tuning.deviation(half) == pytest.approx(0.5 * size**0.5, rel=1e-5)
