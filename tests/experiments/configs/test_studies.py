"""Every study in small: its config, real formats, tiny data and models."""

import dataclasses
import pathlib

import numpy as np
import pytest
from PIL import Image

from experiments import compare, study
from experiments.configs import domainnet, imagenet, pacs
from experiments.data import folders
from experiments.models import clip, vit

CLIP = pathlib.Path(__file__).parents[1] / 'pretrained/reference/clip'


@pytest.fixture
def tiny_clip(monkeypatch):
  """The checkpoint of `make_reference`, in the place of CLIP ViT-B/16."""
  sizes = {'depth': 2, 'num_heads': 2, 'mlp_dim': 24, 'projection': 8}
  config = dataclasses.replace(
    vit.CONFIGS['clip_b16'], patch_size=4, width=16, grid=5, **sizes
  )
  text = dataclasses.replace(
    clip.CONFIGS['clip_b16'], width=8, vocab_size=518, **sizes
  )
  monkeypatch.setitem(vit.CONFIGS, 'clip_b16', config)
  monkeypatch.setitem(clip.CONFIGS, 'clip_b16', text)


def write_images(folder, names, color):
  """Noise of a class's colour, as JPEG files."""
  rng = np.random.default_rng(0)
  folder.mkdir(parents=True)
  for name in names:
    image = np.clip(rng.normal(color, 60, (40, 36, 3)), 0, 255)
    Image.fromarray(image.astype(np.uint8)).save(folder / name)


def colors(n):
  return np.random.default_rng(1).integers(0, 256, (n, 3))


def run(config, data_dir, capsys, methods=None, **changes):
  """One seed of few steps; the rows by method."""
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
  found = []
  opened = compare.configure(config, methods=methods)
  fine_tuning, sets = study.load(config, opened, compare.progress)
  rows = compare.run(config, fine_tuning, sets, found.append)
  capsys.readouterr()
  return {row['method']: row for row in rows}


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
      files = [f'pic_{i:03}.jpg' for i in range(10)]
      write_images(tmp_path / 'pacs' / domain / name, files, color)
  config = pacs.get_config(source)
  # Real weights.
  rows = run(
    config, tmp_path, capsys, image_size=28, first_block=10, learning_rate=1e-3
  )
  assert set(rows) == set(config.methods)
  others = [domain for domain in pacs.DOMAINS if domain != source]
  check(rows, [source, *others])
  assert rows['linear_probe']['deviation'] == 0
  assert rows['lion_spd']['selected'] > 0
  assert rows['wise_ft_25']['deviation'] == pytest.approx(
    rows['adamw']['deviation'] / 4, rel=1e-3
  )
  # BitFit moves few parameters, and not far.
  assert 0 < rows['bitfit']['deviation'] < rows['adamw']['deviation']


@pytest.mark.slow
def test_domainnet_from_list_files(tmp_path, capsys, tiny_clip):
  names = folders.read_classes('domainnet')
  for domain in domainnet.DOMAINS:
    lines = []
    for label in (0, 170, 344):
      folder = f'{domain}/{names[label]}'
      files = [f'{domain}_{i}.jpg' for i in range(12)]
      path = tmp_path / 'domainnet' / folder
      write_images(path, files, colors(345)[label])
      lines += [f'{folder}/{file} {label}' for file in files]
    for split in ('train', 'test'):
      file = tmp_path / 'domainnet' / f'{domain}_{split}.txt'
      file.write_text('\n'.join(lines) + '\n')
  config = domainnet.get_config('clipart,files')
  config.model.pretrained = str(CLIP)
  # The whole recipe, on: augmentation, mixing, drop path, smoothing, bfloat16.
  rows = run(
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
      files = [f'{i}.JPEG' for i in range(20)]
      write_images(tmp_path / name / names[label], files, colors(1000)[label])
  for label in labels:
    (tmp_path / 'imagenet-sketch').mkdir(exist_ok=True)
    for folder in (f'imagenet-v2/{label}', f'imagenet-sketch/{names[label]}'):
      write_images(tmp_path / folder, ['0.jpeg'], colors(1000)[label])
  file = tmp_path / 'imagenet.txt'
  file.write_text('\n'.join(f'thing {i}' for i in range(1000)))
  config = imagenet.get_config('files')
  config.model.pretrained = str(CLIP)
  config.train.part.shares = config.val.part.shares = (0.8, 0.2)
  rows = run(
    config,
    tmp_path,
    capsys,
    image_size=20,
    learning_rate=1e-3,
    class_names=str(file),
    methods=['zero_shot', 'adamw', 'spd_1'],
  )
  check(rows, ['imagenet', 'V2', 'A', 'R', 'Sketch'])
  # Of A's images, the same as in the validation set, the zero-shot head picks
  # a class among 200, not 1,000.
  shot = rows['zero_shot']['metrics']
  assert shot['A']['accuracy'] >= shot['imagenet']['accuracy']


def test_tfds_sets_that_are_not_prepared(tmp_path):
  config = domainnet.get_config('real')
  config.update(data_dir=str(tmp_path), output_dir=str(tmp_path / 'run'))
  with pytest.raises(FileNotFoundError, match=r'domainnet/real.*Prepare it'):
    compare.configure(config)


def test_class_names_are_asked_for(tmp_path):
  config = imagenet.get_config('files')
  config.data_dir = str(tmp_path)
  config.output_dir = str(tmp_path / 'run')
  names = folders.read_classes('imagenet')
  for name in ('imagenet/train', 'imagenet/val', 'imagenet-a', 'imagenet-r'):
    write_images(tmp_path / name / names[6], ['0.jpeg', '1.jpeg'], (0, 0, 0))
  for folder in ('imagenet-v2/6', f'imagenet-sketch/{names[6]}'):
    write_images(tmp_path / folder, ['0.jpeg'], (0, 0, 0))
  config.batch_size = 1
  config.train.part.shares = config.val.part.shares = (0.5, 0.5)
  with pytest.raises(FileNotFoundError, match=r'imagenet\.txt.*clip\.py says'):
    compare.configure(config)
