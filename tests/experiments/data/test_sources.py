import itertools
import os
import pickle

import ml_collections
import numpy as np
import pytest
from PIL import Image

from experiments.data import corruptions, sources

_SIZES = {'cat': 50, 'dog': 20, 'emu': 7}
_SHARES = (0.8, 0.1, 0.1)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """Classes of 50, 20 and 7 images; the colour of an image is its number."""
  root = tmp_path_factory.mktemp('data')
  number = 0
  for name, size in _SIZES.items():
    (root / 'animals' / name).mkdir(parents=True)
    for i in range(size):
      image = Image.new('RGB', (40, 36), (number, 2 * number, 255 - number))
      image.save(root / 'animals' / name / f'{i:02}.png')
      number += 1
  return root


def open_animals(data_dir, **keys):
  return sources.open_source(
    {'kind': 'folder', 'path': 'animals', **keys}, data_dir
  )


def open_parts(data_dir, shares=_SHARES, **keys):
  return [
    open_animals(
      data_dir, part={'shares': shares, 'take': take, 'seed': 0}, **keys
    )
    for take in range(len(shares))
  ]


class Unlabelled:
  """A source whose labels are not known, as TFDS's."""

  class_names = ('a', 'b')
  labels = names = groups = None

  def __len__(self):
    return 100

  def __getitem__(self, index):
    return {'image': np.full((2, 2, 3), index), 'label': np.int32(index % 2)}


def test_elpv_is_a_kind():
  source = sources.open_source({'kind': 'elpv', 'split': 'val'}, 'nowhere')
  assert len(source) == 162


def test_list_is_a_kind(data_dir):
  (data_dir / 'list.txt').write_text('animals/cat/03.png 0\n')
  source = sources.open_source({'kind': 'list', 'path': 'list.txt'}, data_dir)
  assert source[0]['image'][0, 0, 0] == 3


def test_tfds_is_a_kind(data_dir):
  spec = {'kind': 'tfds', 'name': 'domainnet/real', 'split': 'train'}
  with pytest.raises(FileNotFoundError, match=r'no prepared data set'):
    sources.open_source(spec, data_dir)


def test_config_dicts_and_keys_that_are_none(data_dir):
  part = {'shares': _SHARES, 'take': 1, 'seed': 0}
  spec = ml_collections.ConfigDict(
    {
      'kind': 'folder',
      'path': 'animals',
      'classes': None,
      'part': part,
      'limit': ml_collections.config_dict.placeholder(int),
    }
  )
  source = sources.open_source(spec, data_dir)
  assert source.names == open_animals(data_dir, part=part).names


def test_parts_hold_every_example_once(data_dir):
  parts = open_parts(data_dir)
  names = [name for part in parts for name in part.names]
  assert len(set(names)) == len(names) == 77
  assert set(names) == set(open_animals(data_dir).names)


def test_parts_are_cut_class_by_class(data_dir):
  counts = [np.bincount(p.labels, minlength=3) for p in open_parts(data_dir)]
  assert np.array(counts).tolist() == [[40, 16, 6], [5, 2, 0], [5, 2, 1]]


def test_part_is_consistent(data_dir):
  """Labels, names and examples of a part belong together."""
  part = pickle.loads(pickle.dumps(open_parts(data_dir)[1]))
  whole = open_animals(data_dir)
  assert part.class_names == whole.class_names == tuple(_SIZES)
  assert len(part) == len(part.names) == len(part.labels) == 7
  for i, name in enumerate(part.names):
    number = whole.names.index(name)
    assert part[i]['image'][0, 0, 0] == number
    assert part[i]['label'] == part.labels[i] == whole.labels[number]
  assert list(part.names) == sorted(part.names)


def test_part_is_stable(data_dir):
  """A changed part would change what published numbers were measured on."""
  assert open_parts(data_dir)[1].names == (
    *(f'cat/{i:02}.png' for i in (0, 4, 6, 38, 43)),
    *('dog/09.png', 'dog/13.png'),
  )


def test_part_depends_on_its_seed_alone(data_dir):
  def names(**part):
    part = {'shares': _SHARES, 'take': 1, **part}
    return open_animals(data_dir, part=part).names

  assert names(seed=0) == names() == names(seed=0)
  assert names(seed=1) != names(seed=0)


def test_train_split_in_halves_leaves_the_others_as_they_were(data_dir):
  halves = open_parts(data_dir, (0.4, 0.4, 0.1, 0.1))
  train, val, test = open_parts(data_dir)
  assert halves[2].names == val.names
  assert halves[3].names == test.names
  assert {*halves[0].names, *halves[1].names} == set(train.names)


def test_parts_without_labels_are_random():
  whole = Unlabelled()
  parts = [sources.part(whole, _SHARES, take, seed=3) for take in range(3)]
  numbers = [
    [int(part[i]['image'][0, 0, 0]) for i in range(len(part))] for part in parts
  ]
  assert [len(part) for part in numbers] == [80, 10, 10]
  assert sorted(itertools.chain(*numbers)) == list(range(100))
  assert numbers[1] != list(range(80, 90))
  assert parts[0].labels is None
  assert parts[0].names is None


@pytest.mark.parametrize(
  ('part', 'match'),
  [
    ({'shares': (0.8, 0.1), 'take': 0}, r'shares are \(0\.8, 0\.1\); they mus'),
    ({'shares': (1.5, -0.5), 'take': 0}, r'they must sum to 1'),
    ({'shares': (0.8, 0.2), 'take': 2}, r'take is 2; the parts are 0 to 1'),
    ({'shares': (1.0,)}, r"missing .*'take', in the source"),
    ({'shares': (1.0,), 'take': 0, 'random': 1}, r"unexpected .*'random', in "),
  ],
)
def test_bad_parts(data_dir, part, match):
  with pytest.raises(ValueError, match=match):
    open_animals(data_dir, part=part)


def test_ids_are_of_the_files_whatever_is_done_with_them(data_dir):
  whole = open_animals(data_dir)
  assert len(set(whole.ids)) == 77
  assert whole.ids[3] == os.path.realpath(data_dir / 'animals/cat/03.png')
  assert open_animals(data_dir / 'animals' / '..', resize=32).ids == whole.ids
  parts = open_parts(data_dir, resize=32, limit=30)
  for part in parts:
    names = dict(zip(whole.names, whole.ids, strict=True))
    assert part.ids == [names[name] for name in part.names]
  (data_dir / 'some.txt').write_text('../animals/cat/03.png 0\n')
  spec = {
    'kind': 'list',
    'path': 'some.txt',
    'root': 'animals',
    'classes': None,
  }
  assert sources.open_source(spec, data_dir).ids == [whole.ids[3]]


def test_limit_draws_in_order_and_once(data_dir):
  source = open_animals(data_dir, limit=20)
  assert len(source) == 20
  assert list(source.names) == sorted(set(source.names))
  assert len(set(source.labels)) == 3  # not the first 20, all cats
  smaller = open_animals(data_dir, limit=10)
  assert set(smaller.names) < set(source.names)
  assert len(open_animals(data_dir, limit=1000)) == 77


@pytest.mark.parametrize('limit', [0, -1])
def test_limit_leaves_something(data_dir, limit):
  with pytest.raises(ValueError, match=rf'limit is {limit}; .* at least 1'):
    open_animals(data_dir, limit=limit)


def test_resize(data_dir):
  example = open_animals(data_dir, resize=32)[1]
  assert example['image'].shape == (32, 32, 3)
  assert example['image'].dtype == np.uint8
  assert example['image'][16, 16].tolist() == [1, 2, 254]


def test_resize_is_antialiased_bicubic(data_dir):
  noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
  (data_dir / 'noise' / 'a').mkdir(parents=True)
  Image.fromarray(noise).save(data_dir / 'noise' / 'a' / '1.png')
  spec = {'kind': 'folder', 'path': 'noise', 'resize': 20}
  image = sources.open_source(spec, data_dir)[0]['image']
  # Bicubic convolution (a = -0.5) stretched by 3, which is what Pillow does.
  centres = 3 * (np.arange(20) + 0.5) - 0.5
  x = np.abs(np.arange(60) - centres[:, None]) / 3
  near = 1.5 * x**3 - 2.5 * x**2 + 1
  far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
  weights = np.where(x < 1, near, np.where(x < 2, far, 0))
  weights /= weights.sum(1, keepdims=True)
  wanted = np.einsum('yh,xw,hwc->yxc', weights, weights, noise)
  # Pillow rounds after each of its two passes.
  np.testing.assert_allclose(image, np.clip(wanted, 0, 255), atol=1.5)


def test_corruption_belongs_to_the_image_not_to_its_place(data_dir):
  """In a part, or a limited set, an image is corrupted as in the whole."""
  corruption = {'name': 'gaussian_noise', 'severity': 3}
  whole = open_animals(data_dir, corruption=corruption, resize=32)
  few = open_parts(data_dir, corruption=corruption, resize=32, limit=4)[0]
  assert len(few) == 4
  for i, name in enumerate(few.names):
    np.testing.assert_array_equal(
      few[i]['image'], whole[whole.names.index(name)]['image']
    )
  assert few[0]['image'].shape == (32, 32, 3)
  clean = open_animals(data_dir, resize=32)
  wanted = corruptions.Corruption(**corruption)(clean[30]['image'], 30)
  np.testing.assert_array_equal(whole[30]['image'], wanted)


@pytest.mark.parametrize(
  ('spec', 'match'),
  [
    ({}, r'kind tfds, folder, list, elpv, .* not None'),
    ({'kind': 'file'}, r"not 'file': \{'kind'"),
    ({'kind': 'folder'}, r"missing .*'path', in the source \{'kind'"),
    ({'kind': 'elpv', 'split': 'val', 'limits': 3}, r"unexpected .*'limits'"),
    ({'kind': 'elpv', 'split': 'val', 'corruption': {}}, r"missing .*'name'"),
  ],
)
def test_bad_specs(spec, match):
  with pytest.raises(ValueError, match=match):
    sources.open_source(spec, 'nowhere')


def test_joined_is_one_after_the_other(data_dir):
  part = {'shares': _SHARES, 'seed': 0}
  specs = {
    name: {'kind': 'folder', 'path': 'animals', 'part': {**part, 'take': take}}
    for name, take in (('last', 2), ('first', 0), ('none', 1))
  }
  specs['none']['limit'] = 1
  joined = sources.open_source({'kind': 'joined', 'of': specs}, data_dir)
  apart = [sources.open_source(spec, data_dir) for spec in specs.values()]
  assert len(joined) == sum(map(len, apart)) == len(joined.ids)
  assert joined.ids == [one for source in apart for one in source.ids]
  assert joined.names == tuple(n for source in apart for n in source.names)
  assert joined.class_names == ('cat', 'dog', 'emu')
  examples = [source[i] for source in apart for i in range(len(source))]
  for i, (label, example) in enumerate(
    zip(joined.labels, examples, strict=True)
  ):
    np.testing.assert_array_equal(joined[i]['image'], example['image'])
    assert joined[i]['label'] == example['label'] == label
  again = pickle.loads(pickle.dumps(joined))
  assert again.ids == joined.ids


def test_groups_of_what_is_joined_stay_apart(data_dir):
  part = {'shares': (0.5, 0.5), 'seed': 0}
  specs = {
    name: {'kind': 'elpv', 'split': 'val', 'part': {**part, 'take': take}}
    for name, take in (('a', 0), ('b', 1))
  }
  joined = sources.open_source({'kind': 'joined', 'of': specs}, data_dir)
  apart = [
    sources.open_source(spec, data_dir).groups for spec in specs.values()
  ]
  assert not set(apart[0]) & set(apart[1])
  sizes = [np.unique(groups, return_counts=True)[1] for groups in apart]
  found = np.unique(joined.groups, return_counts=True)[1]
  assert found.tolist() == [*sizes[0], *sizes[1]]
  alone = {'kind': 'folder', 'path': 'animals'}
  specs = {'a': alone, 'b': alone}
  joined = sources.open_source({'kind': 'joined', 'of': specs}, data_dir)
  assert joined.groups is None


@pytest.mark.parametrize(
  ('of', 'message'),
  [
    ({}, 'of is empty'),
    (
      {'a': {'path': 'animals'}, 'b': {'path': 'others'}},
      'the classes of b are cat, dog, those of a cat, dog, emu; set `classes`',
    ),
  ],
)
def test_joined_refuses(data_dir, of, message):
  for name in ('cat', 'dog'):
    (data_dir / 'others' / name).mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (4, 4)).save(data_dir / 'others' / name / '0.png')
  of = {name: {'kind': 'folder', **spec} for name, spec in of.items()}
  with pytest.raises(ValueError, match=message):
    sources.open_source({'kind': 'joined', 'of': of}, data_dir)


def test_joined_is_of_labelled_images(tmp_path):
  spec = {'kind': 'easy_vqa', 'split': 'val'}
  with pytest.raises(ValueError, match='joined: a is no set of labelled im'):
    sources.open_source({'kind': 'joined', 'of': {'a': spec}}, tmp_path)
