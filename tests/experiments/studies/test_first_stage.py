"""What a study starts from: learned once, and kept."""

import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import cli, study, train
from experiments.pretrained import load as pretrained
from tests.experiments import kinds


def files(config):
  """What is kept."""
  return sorted(pathlib.Path(config.cache_dir, 'first_stage').iterdir())


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
  (file,) = files(config)
  assert file.suffix == '.npz'
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


@pytest.fixture
def images(noise, tiny_clip, tmp_path):
  """Classification, whose first stage learns half of the training images."""
  config = kinds.tiny('classification', noise)

  def part(take):
    shares = (0.3, 0.3, 0.2, 0.2)
    part = {'shares': shares, 'take': take, 'seed': 0}
    return {'kind': 'folder', 'path': 'noise', 'part': part}

  config.update(
    train=part(1),
    val=part(2),
    eval_sets={'ID': part(3)},
    head='linear_probe',
    first_block=1,
    cache_dir=str(tmp_path / 'kept'),
    num_steps=2,
  )
  config.first_stage.update(
    train={'kind': 'joined', 'of': {'noise': part(0)}},
    val={'kind': 'joined', 'of': {'noise': part(2)}},
    num_steps=30,
    batch_size=24,
    eval_every=30,
    learning_rate=1e-2,
  )
  return config


def flat(tuning):
  state = nnx.to_flat_state(tuning.pretrained)
  return {path: np.asarray(leaf[...]) for path, leaf in state}


def test_a_classifier_learns_its_head_and_then_the_upper_blocks(images):
  learned = load(images)
  of_stage = images.first_stage.train.of.noise.to_dict()
  images.first_stage.num_steps = 0
  images.train = of_stage
  probed = load(images)
  before, after = flat(probed), flat(learned)
  assert before.keys() == after.keys()
  # The linear probe of the first stage is that of a study of its images.
  moved = {path: np.abs(before[path] - after[path]).max() for path in before}
  assert min(moved.values()) > 0
  assert {path[:3] for path in moved if 'blocks' in path} == {
    ('backbone', 'blocks', 1)
  }
  # It has learned its noise, better than a head alone does.
  batch = next(probed.train(0))
  model = nnx.merge(learned.graphdef, learned.pretrained, learned.frozen)
  key = jax.random.key(0)
  assert float(learned.task.loss(model, batch, key)) < 0.7 * float(
    probed.task.loss(
      nnx.merge(probed.graphdef, probed.pretrained, probed.frozen), batch, key
    )
  )


# Keys, and whether they change what the first stage learns.
@pytest.mark.parametrize(
  ('changes', 'is_another'),
  [
    ({'num_steps': 3, 'learning_rate': 0.1, 'batch_size': 8}, False),
    ({'title': 'x', 'num_seeds': 2, 'train.limit': 20}, False),
    ({'tuning_seeds': 1, 'sweep': {'spd_1': {'spd': (1.0,)}}}, False),
    ({'first_stage.seed': 1}, True),
    ({'first_stage.num_steps': 2}, True),
    ({'first_stage.weight_decay': 0.1}, True),
    ({'first_stage.train.of.noise.part.take': 1, 'train.part.take': 0}, True),
    ({'first_stage.val.of.noise.limit': 20}, True),
    ({'metrics': ('balanced_accuracy',)}, True),
    ({'warmup': 0.2}, True),
    ({'label_smoothing': 0.1}, True),
    ({'head': 'zeros'}, True),
  ],
)
def test_what_makes_a_file_another(images, changes, is_another):
  images.train.limit = 30
  images.first_stage.val.of.noise.limit = 22
  images.first_stage.update(num_steps=1, eval_every=1)
  load(images)
  assert len(files(images)) == 1
  images.update_from_flattened_dict(changes)
  load(images)
  assert len(files(images)) == 1 + is_another


def test_other_weights_and_other_files_are_another_first_stage(
  images, monkeypatch, tmp_path
):
  images.first_stage.update(num_steps=1, eval_every=1)
  load(images)
  load_vit = pretrained.load_vit

  def moved(*args):
    vit = load_vit(*args)
    vit.norm.bias[...] += 1e-3
    return vit

  monkeypatch.setattr(pretrained, 'load_vit', moved)
  load(images)
  assert len(files(images)) == 2
  folder = pathlib.Path(images.data_dir)
  shutil.copytree(folder / 'noise', tmp_path / 'noise')
  (tmp_path / 'noise/a/0.png').rename(tmp_path / 'noise/a/00.png')
  images.data_dir = str(tmp_path)
  load(images)
  assert len(files(images)) == 3


def test_a_damaged_file_is_not_read(images):
  images.first_stage.update(num_steps=2, eval_every=1)
  learned = flat(load(images))
  (file,) = files(images)
  whole = file.read_bytes()
  middle = len(whole) // 2
  damaged = bytearray(whole)
  damaged[middle] ^= 1
  for data in (b'', whole[:middle], bytes(damaged)):
    file.write_bytes(data)
    again = flat(load(images))
    assert files(images) == [file]
    assert file.read_bytes() == whole
    for path in learned:
      np.testing.assert_array_equal(again[path], learned[path])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'train.part.take': 0}, 'train and first_stage.train share 36 examples'),
    (
      {'first_stage.train.of.noise.part.take': 2},
      'and first_stage.train share',
    ),
    ({'eval_sets.ID.part.take': 0}, 'first_stage.train and ID share 36'),
    ({'first_stage.val.of.noise.part.take': 3}, 'first_stage.val and ID share'),
    ({'first_stage.batch_size': 37}, 'no more than its 36 training examples'),
    ({'first_stage.eval_every': 0}, 'eval_every is 0; it must be at least 1'),
    ({'first_stage.learning_rate': 0.0}, 'learning_rate is above 0'),
  ],
)
def test_mistakes_of_a_first_stage(images, changes, message):
  images.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    study.check(images)
