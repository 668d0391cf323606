"""Every study in small: its config, real formats, tiny data and models."""

import pathlib

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image

from experiments import cli, compare, resume, study
from experiments.configs import (
  camvid,
  domainnet,
  imagenet,
  pacs,
  pacs_two_stage,
  pascal_context,
)
from experiments.data import folders
from tests.experiments import tiny_study
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


def write_pacs(folder):
  classes = ('dog', 'elephant', 'giraffe', 'guitar', 'horse', 'house', 'person')
  for domain in pacs.DOMAINS:
    for name, color in zip(classes, colors(7), strict=True):
      names = [f'pic_{i:03}.jpg' for i in range(10)]
      files.write_images(folder / 'pacs' / domain / name, names, color)


@pytest.mark.slow
@pytest.mark.parametrize('source', ['photo', 'art_painting'])
def test_pacs(tmp_path, capsys, source):
  write_pacs(tmp_path)
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


@pytest.mark.slow
def test_pacs_in_two_stages(tmp_path, capsys):
  write_pacs(tmp_path)
  config = pacs_two_stage.get_config('art_painting')
  config.first_stage.update(num_steps=2, eval_every=2, batch_size=8)
  # Real weights.
  rows, sets = run(
    config,
    tmp_path,
    capsys,
    methods=['theta_0', 'adamw', 'spd_1'],
    image_size=28,
    first_block=10,
    learning_rate=1e-3,
    cache_dir=str(tmp_path / 'kept'),
  )
  check(rows, ['art_painting', 'photo', 'cartoon', 'sketch'])
  assert rows['theta_0']['deviation'] == 0
  assert rows['theta_0']['label'] == 'theta_0, stage A'
  assert len(list((tmp_path / 'kept/first_stage').iterdir())) == 1
  # Of ten images a class four are of stage B; each domain has one for a test.
  assert len(config.train.part.shares) == 4
  assert {len(one.source) for one in sets.values()} == {7}
  whole = pacs.get_config('art_painting')
  whole.data_dir = config.data_dir
  one, other = study.check(config), study.check(whole)
  # What is tested is never trained on, whichever study it is.
  assert one['art_painting'].ids == other['art_painting'].ids
  assert set(one['train'].ids) < set(other['train'].ids)


def write_masks(images, masks, names, num_classes, size=(36, 48)):
  """Noise of the colours of its classes, a quarter of the picture each."""
  rng = np.random.default_rng(0)
  for folder in (images, masks):
    folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    quarters = rng.integers(0, num_classes, (2, 2))
    mask = np.kron(quarters, np.ones((size[0] // 2, size[1] // 2), int))
    pixels = rng.normal(colors(num_classes)[mask], 60).clip(0, 255)
    Image.fromarray(pixels.astype(np.uint8)).save(images / f'{name}.jpg')
    Image.fromarray(mask.astype(np.uint8)).save(masks / f'{name}.png')


@pytest.mark.slow
def test_camvid(tmp_path, capsys):
  root = tmp_path / 'camvid'
  frames = {
    'train': [
      '0001TP_1',
      *(f'{s}_{i}' for s in ('0006R0', '0016E5') for i in range(8)),
    ],
    'val': [f'0016E5_{i}' for i in range(8, 12)],
    'test': ['0001TP_2', *(f'Seq05VD_{i}' for i in range(3))],
  }
  for split, names in frames.items():
    write_masks(root / split, root / f'{split}annot', names, 11)
    paths = [f'/x/{split}/{n}.png /x/{split}annot/{n}.png\n' for n in names]
    (root / f'{split}.txt').write_text(''.join(paths))
  config = camvid.get_config()
  # Real weights.
  rows, _ = run(
    config,
    tmp_path,
    capsys,
    image_size=(28, 42),
    first_block=10,
    learning_rate=1e-3,
  )
  assert set(rows) == set(config.methods)
  corrupted = [
    f'{name} {severity}'
    for name in ('fog', 'defocus_blur', 'gaussian_noise', 'brightness')
    for severity in (1, 3, 5)
  ]
  check(rows, ['Seq05VD', 'dusk', *corrupted])
  assert rows['linear_probe']['deviation'] == 0
  free, anchored = rows['spd_1_free'], rows['spd_1']
  assert free['selected'] > 0
  assert free['metrics'] != anchored['metrics']
  for name in ('lora', 'lora_spd', 'bitfit', 'l2sp', 'layer_decay'):
    assert rows[name]['deviation'] > 0
  pictures = {file.stem for file in (tmp_path / 'run/pictures').iterdir()}
  assert pictures == {f'{name}_0' for name in rows}


def context_files(root, classes):
  """A folder of the official layout of each, and its pictures."""
  names = [f'2008_{i:06}' for i in range(44)]
  if classes == '21':
    root, lists, masks = root / 'PASCAL_MT', 'Context', 'semseg/pascal-context'
  else:
    root = root / 'VOCdevkit/VOC2010'
    lists, masks = 'SegmentationContext', 'SegmentationClassContext'
  write_masks(root / 'JPEGImages', root / masks, names, int(classes))
  folder = root / 'ImageSets' / lists
  folder.mkdir(parents=True)
  for split, part in (('train', names[:40]), ('val', names[40:])):
    (folder / f'{split}.txt').write_text('\n'.join(part))


@pytest.mark.slow
@pytest.mark.parametrize('classes', ['21', '59', '60'])
def test_pascal_context(tmp_path, capsys, classes):
  context_files(tmp_path, classes)
  config = pascal_context.get_config(classes)
  folder = tiny_study.CHECKPOINT.parent / 'swin'
  config.model.update(name='', pretrained=str(folder), drop_path=0.0)
  config.model.dtype = 'float32'
  methods = ['decoder', 'adamw', 'spd_1', 'spd_1_free']
  rows, sets = run(
    config,
    tmp_path,
    capsys,
    methods,
    image_size=(40, 48),
    eval_size=() if classes == '21' else (44, 52),
    learning_rate=1e-3,
  )
  assert len(sets['val'].source) == 4
  check(rows, [name for name in sets if name != 'val'])
  assert 0 < rows['decoder']['deviation'] < rows['adamw']['deviation']
  assert rows['spd_1_free']['metrics'] != rows['spd_1']['metrics']


def test_studies_of_masks_that_are_unknown():
  with pytest.raises(ValueError, match='camvid takes no argument; it was'):
    camvid.get_config('x')
  with pytest.raises(ValueError, match='pascal_context:20 is unknown; it is'):
    pascal_context.get_config('20')


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
