import pickle

import numpy as np
import pytest
from PIL import Image

from experiments.data import masks, sources

IDS = np.array([[0, 1, 2, 255], [1, 1, 0, 2]])
PALETTE = [value for i in range(256) for value in (255 - i, i, 7)]


@pytest.fixture(autouse=True)
def nothing_kept():
  masks._survey.cache_clear()


def grey(ids):
  return Image.fromarray(ids.astype(np.uint8))


def palette(ids):
  image = grey(ids)
  image.putpalette(PALETTE)
  return image


def deep(ids):
  return Image.fromarray(ids.astype(np.uint16))


def write(root, name, image):
  file = root / name
  file.parent.mkdir(parents=True, exist_ok=True)
  image.save(file)


def pair(root, stem, ids=IDS, of=grey):
  height, width = np.shape(ids)
  pixels = np.full((height, width, 3), len(stem), np.uint8)
  write(root, f'images/{stem}.png', Image.fromarray(pixels))
  write(root, f'masks/{stem}.png', of(np.asarray(ids)))


def open_them(root, **changes):
  (root / 'names').write_text('road\ncar\nsky\n')
  spec = {
    **{'kind': 'masks', 'path': 'images', 'masks': 'masks'},
    **{'classes': 'names', **changes},
  }
  return sources.open_source(spec, root)


@pytest.mark.parametrize('of', [grey, palette, deep])
def test_the_values_of_a_mask_are_classes(tmp_path, of):
  pair(tmp_path, 'b', of=of)
  pair(tmp_path, 'deeper/a', np.ones((3, 5)), of)
  source = open_them(tmp_path)
  assert source.class_names == ('road', 'car', 'sky')
  assert source.names == ('images/b.png', 'images/deeper/a.png')
  assert source.sizes.tolist() == [[2, 4], [3, 5]]
  assert source.labels is None
  example = source[0]
  assert example['image'].shape == (2, 4, 3)
  assert example['mask'].dtype == np.int32
  assert example['mask'].tolist() == [[0, 1, 2, -1], [1, 1, 0, 2]]
  assert source.ids[1] == str(tmp_path / 'images/deeper/a.png')
  assert len(pickle.loads(pickle.dumps(source))) == 2


def test_ids_of_sixteen_bits(tmp_path):
  pair(tmp_path, 'a', np.array([[0, 2, 60_000]]), deep)
  source = open_them(tmp_path, void=60_000)
  assert source[0]['mask'].tolist() == [[0, 2, -1]]


def test_files_may_end_otherwise(tmp_path):
  pair(tmp_path, 'a')
  (tmp_path / 'masks/a.png').rename(tmp_path / 'masks/a.PNG')
  write(tmp_path, 'images/b.jpg', Image.new('RGB', (4, 2)))
  write(tmp_path, 'masks/b.tif', grey(IDS))
  write(tmp_path, 'masks/.c.png', grey(IDS))
  assert open_them(tmp_path).masks == ('masks/a.PNG', 'masks/b.tif')


def test_parts_and_limits_keep_sizes(tmp_path):
  for i in range(1, 5):
    pair(tmp_path, str(i), np.ones((1, i)))
  source = open_them(
    tmp_path, part={'shares': (0.5, 0.5), 'take': 1, 'seed': 0}
  )
  assert len(source) == 2
  for size, example in zip(source.sizes, source, strict=True):
    assert example['mask'].shape == tuple(size)


def test_images_are_corrupted_and_masks_are_not(tmp_path):
  """At full size, by the index of the image; the same every time."""
  ids = np.random.default_rng(0).integers(0, 3, (40, 50))
  pair(tmp_path, 'a', ids)
  pair(tmp_path, 'b', ids)
  (tmp_path / 'images/b.png').write_bytes(
    (tmp_path / 'images/a.png').read_bytes()
  )
  noise = {'name': 'gaussian_noise', 'severity': 3}
  plain, first = open_them(tmp_path), open_them(tmp_path, corruption=noise)
  again = open_them(tmp_path, corruption=noise)
  assert first.sizes.tolist() == [[40, 50]] * 2
  for i in range(2):
    assert first[i]['mask'].tolist() == ids.tolist()
    assert first[i]['image'].shape == (40, 50, 3)
    np.testing.assert_array_equal(first[i]['image'], again[i]['image'])
  assert (first[0]['image'] != plain[0]['image']).mean() > 0.5
  assert (first[0]['image'] != first[1]['image']).mean() > 0.5


def test_all_that_is_wrong_is_told_at_once(tmp_path):
  pair(tmp_path, 'good')
  pair(tmp_path, 'large')
  write(tmp_path, 'masks/large.png', grey(np.zeros((4, 2))))
  pair(tmp_path, 'beyond', np.array([[0, 7, 3]]))
  pair(tmp_path, 'bare')
  (tmp_path / 'masks/bare.png').unlink()
  pair(tmp_path, 'twice')
  write(tmp_path, 'masks/twice.tif', grey(IDS))
  pair(tmp_path, 'coloured')
  write(tmp_path, 'masks/coloured.png', Image.new('RGB', (4, 2)))
  pair(tmp_path, 'broken')
  (tmp_path / 'masks/broken.png').write_bytes(b'x')
  pair(tmp_path, 'torn')
  (tmp_path / 'images/torn.png').write_bytes(b'x')
  with pytest.raises(ValueError) as caught:
    open_them(tmp_path)
  head, *lines = str(caught.value).splitlines()
  assert head.startswith(f'{tmp_path}: 7 images or masks cannot be used. Mend')
  for part, what in (
    ('masks/large.png', 'has 4 x 2 pixels, its image 2 x 4'),
    ('masks/beyond.png', 'has the id 3; there are 3 classes, 0 to 2, void 255'),
    ('images/bare.png', f'it has no mask {tmp_path / "masks/bare.png"}'),
    ('images/twice.png', 'one of 3 files that are named twice'),
    ('masks/coloured.png', "a picture of mode 'RGB', not of ids; a mask is"),
    ('masks/broken.png', 'not readable: Pillow knows no such image format'),
    ('images/torn.png', 'Pillow knows no such image format'),
  ):
    (line,) = [line for line in lines if str(tmp_path / part) in line[:200]]
    assert what in line
  assert len(lines) == 7


def test_ids_below_the_first_class(tmp_path):
  pair(tmp_path, 'a')
  below = Image.fromarray(np.where(IDS == 2, -5, IDS).astype(np.int32))
  (tmp_path / 'masks/a.png').unlink()
  write(tmp_path, 'masks/a.tif', below)
  with pytest.raises(ValueError, match='has the id -5; there are 3 classes'):
    open_them(tmp_path)


def test_masks_of_nothing_but_void(tmp_path):
  pair(tmp_path, 'a', np.full((2, 4), 255))
  pair(tmp_path, 'b', np.full((3, 5), 255))
  with pytest.raises(ValueError, match='every pixel of its 2 masks is void; t'):
    open_them(tmp_path)


def test_masks_without_an_image_are_counted(tmp_path, caplog):
  pair(tmp_path, 'a')
  write(tmp_path, 'masks/b.png', grey(IDS))
  assert len(open_them(tmp_path)) == 1
  assert '1 masks have no image, such as b' in caplog.text


@pytest.mark.parametrize('gone', ['images', 'masks'])
def test_folders_that_are_not_there(tmp_path, gone):
  pair(tmp_path, 'a')
  (tmp_path / gone).rename(tmp_path / 'elsewhere')
  with pytest.raises(FileNotFoundError, match=f'{gone} is no folder; set data'):
    open_them(tmp_path)


def camvid(root, split, *names, suffix='.png', mask=IDS % 200):
  lines = []
  for name in names:
    write(root, f'camvid/{split}/{name}{suffix}', Image.new('RGB', (4, 2)))
    write(root, f'camvid/{split}annot/{name}.png', grey(mask))
    folder = '/SegNet/CamVid/'
    lines.append(
      f'{folder}{split}/{name}.png {folder}{split}annot/{name}.png\n'
    )
  (root / f'camvid/{split}.txt').write_text(''.join(lines))


def open_camvid(root, **keys):
  return sources.open_source({'kind': 'camvid', **keys}, root)


@pytest.mark.parametrize('suffix', ['.png', '.jpg'])
def test_camvid_in_segnet_s_layout(tmp_path, suffix):
  mask = np.array([[0, 5, 10, 11], [11, 1, 2, 3]])
  names = ('0016E5_2', '0001TP_9', '0006R0_1')
  camvid(tmp_path, 'train', *names, suffix=suffix, mask=mask)
  camvid(tmp_path, 'test', '0001TP_3', 'Seq05VD_1', suffix=suffix, mask=mask)
  source = open_camvid(tmp_path, split='train')
  assert source.names == tuple(f'train/{name}{suffix}' for name in names)
  assert source.class_names[0] == 'sky'
  assert source.class_names[10] == 'bicyclist'
  assert source[0]['mask'].tolist() == [[0, 5, 10, -1], [-1, 1, 2, 3]]
  kept = open_camvid(
    tmp_path, split='train', sequences=('0006R0', '0016E5')
  ).names
  assert kept == (f'train/0016E5_2{suffix}', f'train/0006R0_1{suffix}')
  dusk = open_camvid(tmp_path, split='train+test', sequences=('0001TP',))
  assert dusk.names == (f'train/0001TP_9{suffix}', f'test/0001TP_3{suffix}')


def test_frames_that_follow_one_another_are_a_group(tmp_path):
  names = [f'{drive}_{i:02d}' for drive in ('A', 'B') for i in range(12)]
  camvid(tmp_path, 'test', *names, mask=IDS % 11)
  source = open_camvid(tmp_path, split='test')
  expected = [0] * 10 + [1] * 2 + [2] * 10 + [3] * 2
  assert source.groups.tolist() == expected
  fog = {'corruption': {'name': 'fog', 'severity': 1}, 'limit': 9}
  some = open_camvid(tmp_path, split='test', **fog)
  assert some.groups.tolist() == [
    expected[names.index(name[5:-4])] for name in some.names
  ]


@pytest.mark.parametrize(
  ('keys', 'message'),
  [
    ({'split': 'all'}, "camvid has no split 'all'; its splits are train, val"),
    ({'split': 'val'}, 'val.txt is no file; set data_dir'),
    ({'split': 'train', 'sequences': ('x',)}, 'has no image of these with a'),
    ({}, "missing a required argument: 'split', in the source"),
  ],
)
def test_a_camvid_that_is_not_there(tmp_path, keys, message):
  camvid(tmp_path, 'train', '1', mask=np.zeros((2, 4)))
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    open_camvid(tmp_path, **keys)


def test_lines_of_camvid_that_cannot_be_used(tmp_path):
  camvid(tmp_path, 'train', '1', '2', mask=np.zeros((2, 4)))
  (tmp_path / 'camvid/train/2.png').unlink()
  with pytest.raises(
    ValueError, match=r'train/2\.png: it is not there, but in line 2 of train'
  ):
    open_camvid(tmp_path, split='train')
  (tmp_path / 'camvid/train.txt').write_text('a b\nonly\n')
  (tmp_path / 'camvid/train.txt').write_text('x/a.png\n')
  with pytest.raises(ValueError, match=r"train\.txt:1: 'x/a\.png' is not the"):
    open_camvid(tmp_path, split='train')


def context(root, sets, places):
  for i, place in enumerate(places):
    write(root, f'voc/JPEGImages/{i}.jpg', Image.new('RGB', (4, 2)))
    write(root, f'voc/{place}/{i}.png', palette(CONTEXT_IDS))
  lists = root / f'voc/ImageSets/{sets}'
  lists.mkdir(parents=True)
  names = [f'{i}\n' for i in range(len(places))]
  (lists / 'val.txt').write_text(''.join(names))


CONTEXT_IDS = np.array([[0, 1, 2, 20], [20, 20, 0, 2]])


@pytest.mark.parametrize(
  ('classes', 'expected', 'first', 'last'),
  [
    ('59', [[-1, 0, 1, 19], [19, 19, -1, 1]], 'aeroplane', 'wood'),
    ('60', CONTEXT_IDS.tolist(), 'background', 'wood'),
  ],
)
def test_pascal_context(tmp_path, classes, expected, first, last):
  context(tmp_path, 'SegmentationContext', ['SegmentationClassContext'])
  spec = {'kind': 'pascal_context', 'path': 'voc', 'split': 'val'}
  source = sources.open_source({**spec, 'classes': classes}, tmp_path)
  assert source[0]['mask'].tolist() == expected
  names = source.class_names
  assert (len(names), names[0], names[-1]) == (int(classes), first, last)


def test_pascal_context_of_21_classes(tmp_path):
  places = ['semseg/VOC12', 'semseg/pascal-context']
  context(tmp_path, 'Context', places)
  ids = np.array([[0, 20, 255, 0]] * 2)
  write(tmp_path, 'voc/semseg/VOC12/0.png', grey(ids))
  spec = {'kind': 'pascal_context', 'path': 'voc', 'split': 'val'}
  source = sources.open_source({**spec, 'classes': '21'}, tmp_path)
  assert source.masks == tuple(f'{p}/{i}.png' for i, p in enumerate(places))
  assert source[0]['mask'].tolist() == [[0, 20, -1, 0]] * 2
  assert source.class_names[20] == 'tvmonitor'
  (tmp_path / 'voc/semseg/VOC12/0.png').unlink()
  with pytest.raises(
    ValueError, match=r'0\.jpg: it has no mask semseg/VOC12/0\.png or semseg/p'
  ):
    sources.open_source({**spec, 'classes': '21'}, tmp_path)
  with pytest.raises(ValueError, match="classes is '20'; it is one of 21, 59"):
    sources.open_source({**spec, 'classes': '20'}, tmp_path)
