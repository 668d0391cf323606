"""What a config says reaches the model, the task, the data and the head."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
from flax import nnx

from experiments import cli, evaluate, study
from experiments.configs import base, images
from experiments.data import augment
from experiments.data import images as image_files
from experiments.models import clip, vit
from experiments.pretrained import safetensors
from experiments.studies import base as studies
from experiments.studies import classification
from tests.experiments.data import files

CLASSES = ('big_dog', 'cat', 'owl')
# A head without the texts of `config`.
ZEROS = {'head': 'zeros', 'prompts': images.base().prompts}


@pytest.fixture
def config(tmp_path, tiny_clip):
  """Three classes, of which 'far' is another domain."""
  for domain in ('near', 'far'):
    for i, name in enumerate(CLASSES):
      names = [f'{j}.jpg' for j in range(10)]
      files.write_images(tmp_path / domain / name, names, 3 * (60 * i,))
  prompts = tmp_path / 'prompts.txt'
  prompts.write_text('a {}.\nthe {}.\n')

  def near(take):
    part = {'shares': (0.8, 0.1, 0.1), 'take': take, 'seed': 0}
    return {'kind': 'folder', 'path': 'near', 'part': part}

  config = images.base()
  config.update(
    data_dir=str(tmp_path),
    output_dir=str(tmp_path / 'run'),
    image_size=20,
    head='zero_shot',
    prompts=str(prompts),
    train=near(0),
    val=near(1),
    eval_sets={'ID': near(2), 'OOD': {'kind': 'folder', 'path': 'far'}},
    num_steps=4,
    batch_size=8,
    eval_batch_size=4,
    methods={'adamw': base.method('AdamW', optimizer='adamw')},
  )
  config.model.update(name='clip_b16', pretrained=str(tiny_clip))
  return config


def load(config):
  opened = study.check(config)
  tuning = study.load(config, opened, cli.progress)
  model = nnx.merge(tuning.graphdef, tuning.pretrained, tuning.frozen)
  return model, tuning


def test_the_recipe_reaches_the_model_and_the_task(config):
  config.update(
    mixup=0.3,
    cutmix=0.4,
    mix_probability=0.6,
    mix_switch=0.7,
    label_smoothing=0.2,
    **ZEROS,
  )
  config.model.update(dtype='bfloat16', drop_path=0.25, remat=True, scan=True)
  model, tuning = load(config)
  ours = model.backbone.config
  assert (ours.dtype, ours.drop_path, ours.remat, ours.scan) == (
    'bfloat16',
    0.25,
    True,
    True,
  )
  assert tuning.task.num_classes == 3
  assert tuning.task.first_block == 0
  assert tuning.task.class_weights == (1, 1, 1)
  assert tuning.task.label_smoothing == 0.2
  assert (tuning.task.mixup, tuning.task.cutmix) == (0.3, 0.4)
  assert (tuning.task.mix_probability, tuning.task.mix_switch) == (0.6, 0.7)
  assert not model.unit_features
  assert not model.head.kernel[...].any()


def test_the_zero_shot_head(config, tiny_clip):
  model, tuning = load(config)
  text, tokenizer, scale = safetensors.load_text(
    clip.CONFIGS['clip_b16'], tiny_clip
  )
  # The names of the data, as words.
  expected = clip.zero_shot_head(
    text, tokenizer, ['big dog', 'cat', 'owl'], ['a {}.', 'the {}.'], scale
  )
  np.testing.assert_array_equal(model.head.kernel[...], expected)
  assert not model.head.bias[...].any()
  assert model.unit_features
  np.testing.assert_array_equal(
    tuning.pretrained['head']['kernel'][...], expected
  )


def test_a_model_that_the_checkpoint_describes(config, monkeypatch):
  named = classification.load_model(config, CLASSES)
  for configs in (vit.CONFIGS, clip.CONFIGS):
    monkeypatch.delitem(configs, 'clip_b16')
  config.model.update(name='', drop_path=0.25)
  model, _ = load(config)
  ours = named.backbone.config
  assert model.backbone.config == dataclasses.replace(ours, drop_path=0.25)
  np.testing.assert_array_equal(model.head.kernel[...], named.head.kernel[...])


@pytest.mark.parametrize('head', [ZEROS, {}])
@pytest.mark.parametrize(
  ('file', 'change', 'message'),
  [
    ('config.json', ('"clip"', '"vit"'), r"model_type is 'vit', but .* 'clip'"),
    ('config.json', ('quick_gelu', 'gelu'), 'hidden_act'),
    (
      'preprocessor_config.json',
      ('0.4814', '0.5814'),
      r'image_mean is \(0\.5814',
    ),
    (
      'model.safetensors',
      ('visual_proj', 'visuel_proj'),
      'surplus visuel_proj',
    ),
    ('model.safetensors', ('"F32"', '"I32"'), 'is I32'),
  ],
)
def test_a_wrong_checkpoint_is_refused_before_anything_is_read(
  config, tmp_path, tiny_clip, monkeypatch, head, file, change, message
):
  folder = tmp_path / 'checkpoint'
  shutil.copytree(tiny_clip, folder)
  old, new = (text.encode() for text in change)
  data = (folder / file).read_bytes()
  assert old in data
  (folder / file).write_bytes(data.replace(old, new))
  config.update(**head)
  config.model.pretrained = str(folder)
  monkeypatch.setattr(image_files, 'decode', None)
  monkeypatch.setattr(safetensors, '_read', None)
  with pytest.raises(ValueError, match=message) as error:
    study.check(config)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('file', 'change', 'message'),
  [
    ('tokenizer.json', ('endoftext', 'eos'), 'endoftext'),
    (
      'model.safetensors',
      ('l.final_l', 'l.finax_l'),
      r'missing text_model\.final',
    ),
  ],
)
def test_a_wrong_text_tower_matters_to_a_zero_shot_head(
  config, tmp_path, tiny_clip, file, change, message
):
  folder = tmp_path / 'checkpoint'
  shutil.copytree(tiny_clip, folder)
  old, new = (text.encode() for text in change)
  data = (folder / file).read_bytes()
  (folder / file).write_bytes(data.replace(old, new))
  config.model.pretrained = str(folder)
  with pytest.raises(ValueError, match=message):
    study.check(config)


def test_names_of_classes_out_of_a_file(config, tmp_path):
  (tmp_path / 'names.txt').write_text('a\nb\nc\n')
  config.class_names = str(tmp_path / 'names.txt')
  named = classification.load_model(config, CLASSES).head.kernel[...]
  config.class_names = ''
  assert (
    named != classification.load_model(config, CLASSES).head.kernel[...]
  ).any()
  (tmp_path / 'names.txt').write_text('a\nb\n')
  config.class_names = str(tmp_path / 'names.txt')
  with pytest.raises(ValueError, match=r'has 2 lines, the training set 3'):
    study.check(config)


def test_wordnet_ids_are_no_names(config, tmp_path):
  for domain in ('near', 'far'):
    for i, name in enumerate(CLASSES):
      folder = tmp_path / domain / name
      folder.rename(folder.with_name(f'n0000000{i}'))
  with pytest.raises(ValueError, match='named n00000000 and so on'):
    study.check(config)


def test_the_blocks_below_are_run_once(config):
  config.update(first_block=1, **ZEROS)
  model, tuning = load(config)
  images = next(
    evaluate.EvalSet(
      studies.open_sets(config)['OOD'], augment.evaluation(20)
    ).batches(4)
  )
  backbone = model.backbone
  tokens = backbone.embed(backbone.config.normalize(images['image']))
  tokens = backbone.encode(tokens, stop=1)
  found = next(tuning.sets['OOD'].batches(4))
  # Stored in half precision.
  np.testing.assert_allclose(found['hidden'], tokens, rtol=2e-3, atol=2e-3)
  np.testing.assert_array_equal(found['label'], images['label'])
  assert next(tuning.train(0))['hidden'].shape == (8, *tokens.shape[1:])
  assert set(tuning.pretrained['backbone']['blocks']) == {1}


@pytest.mark.parametrize('first_block', [0, 1])
def test_sets_know_of_earlier_ones_with_their_examples(config, first_block):
  config.update(first_block=first_block, **ZEROS)
  small = {**config.eval_sets.ID.to_dict(), 'resize': 10}
  config.eval_sets.small, config.eval_sets.again = small, small
  _, tuning = load(config)
  like = {name: one.like for name, one in tuning.sets.items()}
  assert like == {'val': '', 'ID': '', 'OOD': '', 'small': 'ID', 'again': 'ID'}


@pytest.mark.parametrize('repeats', [1, 2])
def test_images_in_training_are_those_of_evaluation_or_augmented(
  config, repeats
):
  config.update(**ZEROS)
  _, tuning = load(config)
  config.repeats = repeats  # refused without augmentation
  opened = studies.open_sets(config)
  plain = evaluate.EvalSet(opened['train'], augment.evaluation(20))
  known = {
    image.tobytes() for batch in plain.batches(8) for image in batch['image']
  }
  batch = next(tuning.train(0))
  assert all(image.tobytes() in known for image in batch['image'])
  pairs = batch['label'].reshape(4, 2)
  twice = batch['image'].reshape(4, 2, -1)
  assert (twice[:, 0] == twice[:, 1]).all() == (repeats == 2)
  assert (pairs[:, 0] == pairs[:, 1]).all() == (repeats == 2)
  config.augment = True
  _, tuning = load(config)
  batch = next(tuning.train(0))
  assert not any(image.tobytes() in known for image in batch['image'])


def test_each_piece_of_augmentation_can_be_switched_off(config):
  config.update(**ZEROS, augment=True, crop_scale=(0.5, 1.0))
  _, tuning = load(config)
  seen = [next(tuning.train(0))['image']]
  for changes in ({'flip': 0.0}, {'randaugment': False}, {'erasing': 0.0}):
    config.update(**changes)
    seen.append(next(load(config)[1].train(0))['image'])
  for before, after in itertools.pairwise(seen):
    assert (before != after).any()


def test_evaluation_sees_the_centre(config):
  config.update(**ZEROS, eval_crop=0.5)
  _, tuning = load(config)
  opened = studies.open_sets(config)
  for name, eval_set in tuning.sets.items():
    expected = evaluate.EvalSet(opened[name], augment.evaluation(20, 0.5))
    for ours, theirs in zip(
      eval_set.batches(4), expected.batches(4), strict=True
    ):
      np.testing.assert_array_equal(ours['image'], theirs['image'])


def test_classes_that_count_the_same(config, tmp_path):
  for file in sorted((tmp_path / 'near' / 'owl').iterdir())[5:]:
    file.unlink()
  config.update(balanced_loss=True, **ZEROS)
  _, tuning = load(config)
  # 8, 8 and 4 in training.
  np.testing.assert_allclose(
    tuning.task.class_weights, [20 / 24, 20 / 24, 20 / 12]
  )


def test_epochs_become_steps(config):
  config.update(num_steps=0, num_epochs=2.5)
  study.check(config)
  assert config.num_steps == 8  # 2.5 * 24 / 8, rounded


def spec(**changes):
  return {'kind': 'folder', 'path': 'near', **changes}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'eval_sets': {'val': spec()}}, 'none train or val'),
    ({'val': spec(part=None)}, 'train and val share 24 examples, one .*/near/'),
    (
      {'val': spec(path='./near', part=None)},
      'train and val share 24 examples',
    ),
    (
      {'val': spec(path='near/../near', resize=9)},
      'train and val share 24 exa',
    ),
    (
      {'val': {'kind': 'list', 'path': 'list.txt'}},
      'train and val share 2 exa',
    ),
    ({'val': spec(path='link')}, 'train and val share 24 examples'),
    ({'eval_sets.ID': spec(limit=1)}, 'and ID share 1 examples, one .*; give'),
    ({'train.part.seed': 1}, r'train and val share \d examples'),
    ({'train.part.take': 2}, 'train and ID share 3 examples'),
    ({'train.part.shares': (0.9, 0.05, 0.05)}, 'train and val share 3 exam'),
    ({'eval_sets.OOD.only': 'imagenet_a'}, 'of the 1,000 classes'),
    ({'eval_sets.OOD.pth': 'far'}, 'pth'),
    ({'means': {'mean': ('ID', 'x')}}, "config.means.mean is 'x'"),
    ({'metrics': ('auroc',)}, 'these are 3'),
  ],
)
def test_sets_that_do_not_go_together(config, changes, message, tmp_path):
  (tmp_path / 'link').symlink_to('near')
  (tmp_path / 'list.txt').write_text(
    ''.join(
      f'{domain}/{name}/0.jpg {i}\n'
      for domain in ('near', 'far')
      for i, name in enumerate(CLASSES)
    )
  )
  with config.unlocked():
    for key, value in changes.items():
      *above, last = key.split('.')
      target = config
      for name in above:
        target = target[name]
      target[last] = value
  with pytest.raises(ValueError, match=message):
    study.check(config)


def test_parts_that_share_nothing_go_together(config):
  config.train.part.shares = (0.7, 0.2, 0.1)
  study.check(config)


def test_other_classes_are_named(config, tmp_path):
  (tmp_path / 'far' / 'owl').rename(tmp_path / 'far' / 'hen')
  with pytest.raises(
    ValueError, match=r"OOD: its 3 classes.*'hen', 'owl'; set `cl"
  ):
    study.check(config)


def test_a_class_without_examples(config, tmp_path):
  (tmp_path / 'classes.txt').write_text('\n'.join([*CLASSES, 'yak']))
  for one in (config.train, config.val, *config.eval_sets.values()):
    with one.unlocked():
      one.classes = 'classes.txt'
  study.check(config)
  config.balanced_loss = True
  with pytest.raises(ValueError, match=r'no example of 1 of its 4.*: yak'):
    study.check(config)


def test_methods_that_hang_on_others(config):
  config.methods.update(
    {
      'b': base.method('', optimizer='adam', starts_from='adamw'),
      'c': base.method('', optimizer='adam', starts_from='b'),
    }
  )
  with pytest.raises(ValueError, match=r"methods\.c starts from 'b', which"):
    study.check(config)


def test_lora_starts_from_lora(config):
  config.methods.b = base.method(
    '', optimizer='adam', lora=4, starts_from='adamw'
  )
  with pytest.raises(
    ValueError, match=r"b\.lora is 4, and it starts from 'adamw', where it is 0"
  ):
    study.check(config)


def test_the_number_of_classes_is_the_training_set_s(config):
  config.num_classes = 4
  with pytest.raises(ValueError, match='is 4, the training set has 3; set it'):
    study.check(config)


def test_every_model_has_a_config():
  for name in clip.CONFIGS:
    assert vit.CONFIGS[name].projection == clip.CONFIGS[name].projection
