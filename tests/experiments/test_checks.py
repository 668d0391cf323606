"""Keys in vain are refused; where they have an effect they are not."""

import os
import pathlib

import pytest

from experiments import checks, main, parallel, study
from experiments.configs import (
  base,
  domainnet,
  elpv,
  imagenet,
  images,
  pacs,
)
from experiments.studies import classification
from tests.experiments import tiny_study

# What has an effect in one combination, and none in the other: the first
# changes, those that put it in vain, and what is said of it.
STUDY = [
  ({'prompts': 'p'}, {'head': 'zeros'}, 'not made of texts'),
  ({'class_names': 'c'}, {'head': 'zeros'}, 'not made of texts'),
  ({'model.remat': True}, {'first_block': 11}, 'never recomputed'),
  ({'mixup': 0.8}, {'accumulate': 32}, 'that is one image'),
  ({'cutmix': 0.8}, {'accumulate': 32}, 'that is one image'),
  ({'mixup': 0.8}, {'accumulate': 4, 'layout': 'pmap'}, 'under pmap of one'),
  ({'mixup': 0.8}, {'mix_probability': 0.0}, 'no batch is mixed'),
  (
    {'mixup': 0.8, 'cutmix': 1.0},
    {'mix_switch': 1.0},
    'mixup is .* always Cut',
  ),
  (
    {'mixup': 0.8, 'cutmix': 1.0},
    {'mix_switch': 0.0},
    'cutmix is .*always Mix',
  ),
  ({'mixup': 0.8, 'mix_probability': 0.5}, {'mixup': 0.0}, 'neither Mixup nor'),
  (
    {'mixup': 0.8, 'cutmix': 1.0, 'mix_switch': 0.7},
    {'mixup': 0.0},
    'not both',
  ),
  *(
    ({'augment': True, key: value}, {'augment': False}, 'set config.augment')
    for key, value in (
      ('crop_scale', (0.5, 1.0)),
      ('flip', 0.0),
      ('randaugment', False),
      ('erasing', 0.0),
      ('repeats', 3),
    )
  ),
  ({'mixup': 0.8, 'repeats': 3}, {'mixup': 0.0}, 'views of an image'),
  ({'warmup_learning_rate': 1e-6}, {'warmup': 0.0}, 'no warm-up'),
  ({'data_dir': 'x'}, {'train': {'kind': 'elpv'}}, 'lie in its package'),
]

METHOD = [
  *(
    ({'optimizer': 'adamw', key: value}, {'optimizer': ''}, 'a training run')
    for key, value in (
      ('rate', 0.5),
      ('weight_decay', 0.1),
      ('spd', 1.0),
      ('train', 'head'),
      ('layer_decay', 0.5),
      ('starts_from', 'adamw'),
      ('lora', 4),
    )
  ),
  ({'optimizer': 'adam', 'lora': 4}, {'train': 'biases'}, 'are not trained'),
  *(
    ({'optimizer': 'adam', 'lora': 4, key: value}, {'lora': 0}, 'is no LoRA')
    for key, value in (
      ('lora_alpha', 8.0),
      ('lora_dropout', 0.1),
      ('lora_modules', 'x'),
    )
  ),
  *(
    (
      {'optimizer': 'adam', 'lora': 4, 'spd': 1.0, 'anchor': 'origin'},
      in_vain,
      message,
    )
    for in_vain, message in (
      ({'lora': 0}, 'and there are none'),
      ({'spd': None}, 'of SPD, which is off'),
    )
  ),
  ({'average_of': 'adamw', 'alpha': 0.2}, {'average_of': ''}, 'nothing is ave'),
  (
    {'optimizer': 'adamw', 'weight_decay': 0.1},
    {'optimizer': 'adam'},
    'takes none',
  ),
  (
    {'optimizer': 'adam', 'spd': 1.0, 'anchor_head': False},
    {'spd': None},
    'of SPD, which is off',
  ),
  (
    {'optimizer': 'adam', 'spd': 1.0, 'anchor_head': False},
    {'train': 'head'},
    'has no anchor',
  ),
  (
    {'optimizer': 'adam', 'spd': 1.0, 'condition': 'always'},
    {'spd': None},
    'of SPD, which is off',
  ),
  (
    {
      'optimizer': 'adam',
      'spd': 1.0,
      'condition': 'random',
      'fire': (0.1, 0.2),
    },
    {'condition': 'exact'},
    'no layer is drawn',
  ),
  ({'optimizer': 'ftp'}, {'train': 'head'}, 'which FTP leaves to Adam'),
  ({'optimizer': 'muon', 'weight_decay': 0.1}, {'optimizer': 'ftp'}, 'none'),
  (
    {'optimizer': 'adamw', 'layer_decay': 0.5},
    {'train': 'head'},
    'whose rate is the full one',
  ),
]


@pytest.fixture
def config(monkeypatch):
  """A zero-shot study of folders, without mixing and augmentation."""
  devices = parallel.all_devices() * 8
  monkeypatch.setattr(parallel, 'all_devices', lambda: devices)
  config = images.base()
  config.update(
    head='zero_shot', train={'kind': 'folder'}, val={'kind': 'elpv'}
  )
  config.model.name = 'clip_b16'
  return config


def check_keys(config):
  """What can be told without a file of data."""
  study._check_keys(config)
  classification._check_keys(config)


def check_effects(config):
  for rules in (checks.RULES, classification.RULES):
    checks.check_effects(rules, config, images.base())
  for name, method in config.methods.items():
    checks.check_effects(
      checks.METHOD_RULES, method, base.method(''), f'methods.{name}'
    )


@pytest.mark.parametrize(('changes', 'in_vain', 'message'), STUDY)
def test_keys_of_a_study(config, changes, in_vain, message):
  config.update_from_flattened_dict(changes)
  check_effects(config)
  config.update(in_vain)
  with pytest.raises(ValueError, match=message):
    check_effects(config)
  # The default is what no one has asked for.
  for key in changes:
    default = images.base()
    for name in key.split('.'):
      default = default[name]
    config.update_from_flattened_dict({key: default})
  config.mix_probability, config.mix_switch = 1.0, 0.5
  check_effects(config)


@pytest.mark.parametrize(('changes', 'in_vain', 'message'), METHOD)
def test_keys_of_a_method(config, changes, in_vain, message):
  config.methods.mine = base.method('', **changes)
  check_effects(config)
  config.methods.mine.update(in_vain)
  with pytest.raises(ValueError, match=rf'config\.methods\.mine\..*{message}'):
    check_effects(config)


@pytest.mark.parametrize(
  'config',
  [
    elpv.get_config(),
    *map(pacs.get_config, pacs.DOMAINS),
    *map(domainnet.get_config, ('clipart', 'real,files')),
    *map(imagenet.get_config, ('', 'files')),
  ],
  ids=lambda config: config.title,
)
def test_studies_that_are_shipped(config):
  """And with the flags that leave keys of theirs without effect."""
  check_keys(config)
  for block in (0, config.first_block):
    config.first_block = block
    check_keys(config)
  for name in list(config.methods):
    if not config.methods[name].optimizer:
      del config.methods[name]
  check_keys(config)


def test_workers_that_have_nothing_to_read(tmp_path):
  config = elpv.get_config()
  config.num_workers = 2
  with pytest.raises(ValueError, match='num_workers is 2, which has no effect'):
    study.check(config)
  config.first_block = 0
  study.check(config)


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('eval_crop', 0.0, 'above 0, up to 1'),
    ('crop_scale', (0.5, 0.2), r'crop_scale is \(0\.5, 0\.2\)'),
    ('num_workers', -1, 'it is 0 or more'),
    ('profile', -1, 'it is 0 or more'),
    ('learning_rate', float('nan'), 'learning_rate is nan'),
    ('decay', 'steps', "decay is 'steps'; it must be one of cosine, linear"),
    ('methods.adamw.weight_decay', -0.1, 'is from 0 to inf'),
    ('methods.spd_1.spd', -1.0, 'is from 0 to inf'),
    ('methods.wise_ft.alpha', 1.5, 'is from 0 to 1'),
    ('methods.lora.lora', -1, 'is from 0 to inf'),
    ('methods.lora.lora_dropout', 1.0, '0 or more, below 1'),
    ('methods.lora.lora_modules', '(', 'is no regular expression: missing'),
    ('methods.lora.anchor', 'x', 'it must be one of start, origin'),
    ('methods.spd_1.condition', 'x', 'must be one of exact, estimated, always'),
    ('methods.spd_1.fire', (), 'each from 0 to 1'),
    ('methods.spd_1.fire', (0.5, 1.5), 'each from 0 to 1'),
  ],
)
def test_values_out_of_range(key, value, message):
  config = elpv.get_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    check_keys(config)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'optimizer': 'sgd', 'spd': 1.0, 'condition': 'estimated'},
      "of steps of Adam, and its optimizer 'sgd'",
    ),
    ({'optimizer': 'ftp', 'layer_decay': 0.5}, 'FTP after their projection'),
  ],
)
def test_optimizers_that_do_not_go_together(changes, message):
  config = elpv.get_config()
  config.methods.mine = base.method('', **changes)
  with pytest.raises(ValueError, match=message):
    check_keys(config)


def test_keys_that_no_study_has():
  config = elpv.get_config()
  config.methods.adamw.weight_decya = 0.1
  with pytest.raises(
    ValueError, match=r'weight_decya is no .* mean weight_decay\?'
  ):
    study.normalise(config)
  config = elpv.get_config()
  del config.model.scan
  with pytest.raises(ValueError, match=r'config\.model\.scan is missing'):
    study.normalise(config)


def test_home_stands_for_a_tilde(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  config = tiny_study.get_config('~/data')
  config.update(output_dir='~/runs', prompts='~/p', class_names='~/c')
  config.model.pretrained = '~/vit'
  for _ in range(2):  # what is expanded stays
    study.normalise(config)
    assert config.cache_dir == str(tmp_path / '.cache/optax_spd')
    assert config.data_dir == str(tmp_path / 'data')
    assert config.output_dir == str(tmp_path / 'runs')
    assert config.prompts == str(tmp_path / 'p')
    assert config.class_names == str(tmp_path / 'c')
    assert config.model.pretrained == str(tmp_path / 'vit')
  config.output_dir = '~no_such_user/runs'
  with pytest.raises(
    ValueError, match=r'output_dir is .* of a user that is not'
  ):
    study.normalise(config)


def test_a_run_in_the_home_folder(noise, tiny_clip, tmp_path, monkeypatch):
  """Read from there and written there, and gone on with by another name."""
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'noise').symlink_to(noise / 'noise')
  (tmp_path / 'vit').symlink_to(tiny_clip)

  def run(home):
    config = tiny_study.get_config(home)
    config.update(output_dir=f'{home}/runs', num_steps=2, eval_every=2)
    config.model.pretrained = f'{home}/vit'
    return main.run(config, 'adamw', 0)[0]['metrics']

  first = run('~')
  assert sorted(os.listdir()) == ['noise', 'runs', 'vit']
  assert pathlib.Path('runs/adamw_0/rows.jsonl').exists()
  assert run(str(tmp_path)) == first
