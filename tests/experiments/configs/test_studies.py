"""Every study in small: its config, real formats, tiny data and models."""

import pathlib

import numpy as np
import pytest
import tensorflow_datasets

from experiments import cli, compare, resume, study
from experiments.configs import domainnet, imagenet, pacs
from experiments.data import folders
from tests.experiments.data import files, prepared


def colors(n):
  return np.random.default_rng(1).integers(0, 256, (n, 3))


def run(config, data_dir, capsys, methods=None, **changes):
  """One seed of few steps; the rows by method, and the sets."""
  config.update(
    data_dir=str(data_dir),
    output_dir=str(data_dir / 'run'),
    num_epochs=0.0,
    num_steps=4,
    eval_every=2,
    batch_size=8,
    eval_batch_size=8,
    num_workers=0,
    **changes,
  )
  opened = compare.configure(config, methods=methods)
  fine_tuning = study.load(config, opened, cli.progress)
  saved = resume.Saved(config, {})
  compare.run(config, fine_tuning, saved)
  capsys.readouterr()
  return {row['method']: row for row in saved.rows}, fine_tuning.sets


def check(rows, sets):
  """What holds in each study: SPD fired, and stayed closer."""
  assert list(rows['adamw']['metrics']) == ['val', *sets]
  for row in rows.values():
    for metrics in row['metrics'].values():
      assert all(0 <= value <= 1 for value in metrics.values())
  assert rows['spd_1']['decayed'] > 0
  assert 0 < rows['spd_1']['deviation'] < rows['adamw']['deviation']


@pytest.mark.slow
@pytest.mark.parametrize('source', ['photo', 'art_painting'])
def test_pacs(tmp_path, capsys, source):
  classes = ('dog', 'elephant', 'giraffe', 'guitar', 'horse', 'house', 'person')
  for domain in pacs.DOMAINS:
    for name, color in zip(classes, colors(7), strict=True):
      names = [f'pic_{i:03}.jpg' for i in range(10)]
      files.write_images(tmp_path / 'pacs' / domain / name, names, color)
  config = pacs.get_config(source)
  config.eval_sets.fog = {
    **config.eval_sets[source],
    'corruption': {'name': 'fog', 'severity': 3},
  }
  # Real weights.
  rows, _ = run(
    config, tmp_path, capsys, image_size=28, first_block=10, learning_rate=1e-3
  )
  assert set(rows) == set(config.methods)
  others = [domain for domain in pacs.DOMAINS if domain != source]
  check(rows, [source, *others, 'fog'])
  assert rows['linear_probe']['deviation'] == 0
  assert rows['lion_spd']['selected'] > 0
  assert rows['wise_ft_25']['deviation'] == pytest.approx(
    rows['adamw']['deviation'] / 4, rel=1e-3
  )
  # BitFit moves few parameters, and not far.
  assert 0 < rows['bitfit']['deviation'] < rows['adamw']['deviation']


def domainnet_files(root):
  """The official list files, and the images that they name."""
  names = folders.read_classes('domainnet')
  for domain in domainnet.DOMAINS:
    lines = {'train': [], 'test': []}
    for label in (0, 170, 344):
      folder = f'{domain}/{names[label]}'
      images = [f'{domain}_{i}.jpg' for i in range(24)]
      path = root / 'domainnet' / folder
      files.write_images(path, images, colors(345)[label])
      listed = [f'{folder}/{image} {label}' for image in images]
      lines['train'] += listed[:12]
      lines['test'] += listed[12:]
    for split in lines:
      file = root / 'domainnet' / f'{domain}_{split}.txt'
      file.write_text('\n'.join(lines[split]) + '\n')


def domainnet_tfds(root):
  """The same as tensorflow-datasets prepares it."""
  rng = np.random.default_rng(0)
  labels = np.repeat([0, 170, 344], 12)
  images = rng.normal(colors(345)[labels][:, None, None], 60, (36, 40, 36, 3))
  split = np.clip(images, 0, 255).astype(np.uint8), labels.tolist()
  for domain in domainnet.DOMAINS:
    prepared.prepare(
      root,
      f'domainnet/{domain}',
      {'train': split, 'test': split},
      folders.read_classes('domainnet'),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('arg', 'write'),
  [('clipart', domainnet_tfds), ('clipart,files', domainnet_files)],
)
def test_domainnet(tmp_path, capsys, tiny_clip, arg, write):
  write(tmp_path)
  config = domainnet.get_config(arg)
  config.model.pretrained = str(tiny_clip)
  # The whole recipe, on: augmentation, mixing, drop path, smoothing, bfloat16.
  rows, _ = run(
    config,
    tmp_path,
    capsys,
    methods=['zero_shot', 'linear_probe', 'lp_ft', 'adamw', 'spd_1'],
    image_size=20,
    learning_rate=1e-3,
  )
  check(rows, ['clipart', *(d for d in domainnet.DOMAINS if d != 'clipart')])
  assert rows['zero_shot']['deviation'] == 0
  assert rows['lp_ft']['deviation'] > rows['linear_probe']['deviation'] > 0


@pytest.mark.slow
def test_imagenet_from_folders(tmp_path, capsys, tiny_clip):
  names = folders.read_classes('imagenet')
  only_a = folders.class_mask('imagenet_a') & folders.class_mask('imagenet_r')
  labels = np.flatnonzero(only_a)[:2]
  for name in ('imagenet/train', 'imagenet/val', 'imagenet-a', 'imagenet-r'):
    for label in labels:
      images = [f'{i}.JPEG' for i in range(20)]
      path = tmp_path / name / names[label]
      files.write_images(path, images, colors(1000)[label])
  for label in labels:
    (tmp_path / 'imagenet-sketch').mkdir(exist_ok=True)
    for folder in (f'imagenet-v2/{label}', f'imagenet-sketch/{names[label]}'):
      files.write_images(tmp_path / folder, ['0.jpeg'], colors(1000)[label])
  file = tmp_path / 'imagenet.txt'
  file.write_text('\n'.join(f'thing {i}' for i in range(1000)))
  config = imagenet.get_config('files')
  config.model.update(pretrained=str(tiny_clip), scan=True, remat=True)
  config.train.part.shares = config.val.part.shares = (0.8, 0.2)
  rows, sets = run(
    config,
    tmp_path,
    capsys,
    image_size=20,
    learning_rate=1e-3,
    class_names=str(file),
    methods=['zero_shot', 'adamw', 'spd_1'],
  )
  check(rows, ['imagenet', 'V2', 'A', 'R', 'Sketch'])
  for name, classes in (('A', 'imagenet_a'), ('R', 'imagenet_r')):
    np.testing.assert_array_equal(
      sets[name].classes, folders.class_mask(classes)
    )
  assert sets['imagenet'].classes is sets['V2'].classes is None


def test_tfds_prepares_the_sets_where_they_are_read(tmp_path):
  for config in (imagenet.get_config(), domainnet.get_config('sketch')):
    for spec in (config.train, config.val, *config.eval_sets.values()):
      name, _, variant = spec.name.partition('/')
      builder = tensorflow_datasets.builder_cls(name)(
        data_dir=tmp_path, config=variant or None
      )
      folder = pathlib.Path(builder.data_dir).parent
      assert folder == tmp_path / spec.name


def test_tfds_sets_that_are_not_prepared(tmp_path):
  config = domainnet.get_config('real')
  config.update(data_dir=str(tmp_path), output_dir=str(tmp_path / 'run'))
  with pytest.raises(FileNotFoundError, match=r'domainnet/real.*Prepare it'):
    compare.configure(config)


@pytest.mark.parametrize(
  ('class_names', 'message'),
  [
    ('', 'named n01440764 and so on'),
    ('no/names.txt', r'names\.txt.*clip\.py says'),
  ],
)
def test_class_names_are_asked_for(tmp_path, class_names, message):
  config = imagenet.get_config('files')
  config.data_dir = str(tmp_path)
  config.output_dir = str(tmp_path / 'run')
  config.class_names = class_names
  names = folders.read_classes('imagenet')
  for name in ('imagenet/train', 'imagenet/val', 'imagenet-a', 'imagenet-r'):
    files.write_images(
      tmp_path / name / names[6], [f'{i}.jpeg' for i in range(4)], (0, 0, 0)
    )
  for folder in ('imagenet-v2/6', f'imagenet-sketch/{names[6]}'):
    files.write_images(tmp_path / folder, ['0.jpeg'], (0, 0, 0))
  config.batch_size = 2  # two images to mix
  config.train.part.shares = config.val.part.shares = (0.5, 0.5)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    compare.configure(config)
