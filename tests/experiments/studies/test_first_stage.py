"""What a study starts from: learned once, and kept."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import cli, study, train
from experiments.studies import first_stage
from tests.experiments import kinds


@pytest.fixture
def config(noise, tiny_clip, tmp_path):
  config = kinds.tiny('vqa', noise)
  parts = {'shares': (0.5, 0.5), 'seed': 0}
  broad = {**config.train.to_dict(), 'part': {**parts, 'take': 1}}
  config.train.part = {**parts, 'take': 0}
  config.update(cache_dir=str(tmp_path / 'kept'), num_steps=4, eval_every=2)
  config.first_stage.update(
    train=broad,
    val=config.val.to_dict(),
    num_steps=20,
    eval_every=10,
    batch_size=8,
    learning_rate=1e-2,
    lora=2,
  )
  return config


def load(config):
  return study.load(config, study.check(config), cli.progress)


def loss(tuning):
  """Of the training set of the study, which the first stage has not seen."""
  model = nnx.merge(tuning.graphdef, tuning.pretrained, tuning.frozen)
  batch = next(tuning.train(0))
  return float(tuning.task.loss(model, batch, jax.random.key(0)))


def test_it_is_learned_once(config, monkeypatch):
  learned = load(config)
  (file,) = first_stage.kept(config).parent.iterdir()
  assert file == first_stage.kept(config)
  steps = config.first_stage.num_steps
  config.first_stage.num_steps = 0
  before = load(config)
  assert loss(learned) < 0.8 * loss(before)
  # It is merged: the model is as large as before, and the tower what it was.
  moved = jax.tree.map(
    lambda a, b: float(abs(a - b).max()), learned.pretrained, before.pretrained
  )
  assert max(jax.tree.leaves(moved['vision'])) == 0
  assert min(jax.tree.leaves(moved['projector'])) > 0
  assert moved['decoder']['token_embed'] == 0
  for block in moved['decoder']['blocks'].values():
    assert min(jax.tree.leaves((block['attn'], block['mlp']))) > 0

  config.first_stage.num_steps = steps

  def run(*_, **__):
    raise AssertionError('it is there already')

  monkeypatch.setattr(train.FineTuning, 'run', run)
  again = load(config)
  jax.tree.map(
    np.testing.assert_array_equal, again.pretrained, learned.pretrained
  )
  config.first_stage.learning_rate = 3e-3
  with pytest.raises(AssertionError, match='it is there already'):
    load(config)


def test_lower_blocks_may_be_frozen(config):
  config.first_block = 2
  learned = load(config)
  assert 'vision' not in learned.pretrained
  assert loss(learned) > 0


def test_its_images_are_in_no_set_of_the_study(config):
  config.first_stage.train.part.take = 0
  with pytest.raises(
    ValueError, match=r'first_stage.train and train share 30 images, one of th'
  ):
    study.check(config)


def test_its_keys_are_known(config):
  with config.unlocked():
    config.first_stage.steps = 3
  with pytest.raises(
    ValueError, match=r'first_stage.steps is missing, or no k'
  ):
    study.check(config)
