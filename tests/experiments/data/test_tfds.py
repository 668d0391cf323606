"""Against data in TFDS's own format, written without TensorFlow."""

import pickle
import time

import numpy as np
import pytest
import tensorflow_datasets

from experiments.data import folders, tfds
from tests.experiments.data import prepared

_IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), np.uint8)
_LABELS = [2, 0, 1, 1, 2]


def prepare(root, images=_IMAGES, **changes):
  splits = {'train': (images, _LABELS)}
  return prepared.prepare(root, 'domainnet/real', splits, 'abc', **changes)


def test_examples_of_all_shards(tmp_path):
  prepare(tmp_path)
  source = tfds.open_tfds(tmp_path, 'domainnet/real', 'train')
  assert len(source) == 5
  assert source.class_names == ('a', 'b', 'c')
  assert source.labels is None
  assert source.names is None
  for i in range(5):
    np.testing.assert_array_equal(source[i]['image'], _IMAGES[i])
    assert source[i]['label'] == _LABELS[i]
    assert source[i]['label'].dtype == np.int32


def test_it_can_be_pickled_and_indexed_by_numpy(tmp_path):
  prepare(tmp_path)
  source = tfds.open_tfds(tmp_path, 'domainnet/real', 'train')
  source = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(source[np.int64(4)]['image'], _IMAGES[4])


def test_slice_of_a_split(tmp_path):
  prepare(tmp_path)
  source = tfds.open_tfds(tmp_path, 'domainnet/real', 'train[3:]')
  assert [source[i]['label'] for i in range(len(source))] == _LABELS[3:]


def test_latest_version(tmp_path):
  prepare(tmp_path, version='2.0.0')
  prepare(tmp_path, version='10.0.0')
  source = tfds.open_tfds(tmp_path, 'domainnet/real', 'train')
  assert str(source.records.dataset_info.version) == '10.0.0'


def test_what_is_not_prepared_fails_at_once_with_the_recipe(tmp_path):
  start = time.perf_counter()
  with pytest.raises(FileNotFoundError) as error:
    tfds.open_tfds(tmp_path, 'domainnet/real', 'train')
  # A name that TFDS looks up waits on the network for minutes.
  assert time.perf_counter() - start < 1
  assert str(tmp_path / 'domainnet' / 'real') in str(error.value)
  assert "tfds.builder('domainnet/real'" in str(error.value)
  assert "file_format='array_record').download_and_prepare()" in str(
    error.value
  )


def test_other_format(tmp_path):
  folder = prepare(tmp_path, file_format='tfrecord')
  with pytest.raises(ValueError, match=r'format tfrecord.*array_record') as e:
    tfds.open_tfds(tmp_path, 'domainnet/real', 'train')
  assert str(folder) in str(e.value)


@pytest.mark.parametrize('split', ['test', 'test[:2]'])
def test_no_such_split(tmp_path, split):
  prepare(tmp_path)
  with pytest.raises(ValueError, match=r"no split 'test.*it has train\."):
    tfds.open_tfds(tmp_path, 'domainnet/real', split)


def test_no_labels(tmp_path):
  prepare(tmp_path, label='answer')
  with pytest.raises(ValueError, match=r"answer, image.*'image' and a 'label'"):
    tfds.open_tfds(tmp_path, 'domainnet/real', 'train')


@pytest.mark.parametrize(
  'name',
  [
    'imagenet2012',
    'imagenet_v2',
    'imagenet_a',
    'imagenet_r',
    'imagenet_sketch',
  ],
)
def test_all_of_imagenets_have_its_thousand_labels(name, tmp_path):
  """In TFDS 4.9: so that -A and -R need a mask, and no other mapping."""
  builder = tensorflow_datasets.builder_cls(name)(data_dir=tmp_path)
  names = builder.info.features['label'].names
  assert tuple(names) == folders.read_classes('imagenet')


@pytest.mark.parametrize('label', [-1, 3])
def test_labels_that_are_no_class_are_named(tmp_path, label):
  """-1 is TFDS's of unlabelled examples; as one-hot targets, both are zeros."""
  splits = {'train': (_IMAGES, [0, 1, label, 2, 2])}
  prepared.prepare(tmp_path, 'domainnet/real', splits, 'abc')
  source = tfds.open_tfds(tmp_path, 'domainnet/real', 'train[1:]')
  with pytest.raises(
    ValueError, match=rf'real train\[1:\]\[1\] has the label {label}, of 3 cl'
  ):
    source[1]
  assert source[2]['label'] == 2


def test_labels_of_another_kind(tmp_path):
  folder = prepare(tmp_path)
  features = {
    'image': tensorflow_datasets.features.Image(shape=(None, None, 3)),
    'label': tensorflow_datasets.features.Scalar(np.float32),
  }
  tensorflow_datasets.features.FeaturesDict(features).save_config(folder)
  with pytest.raises(ValueError, match=r"real.*'label' is a Scalar; a ClassL"):
    tfds.open_tfds(tmp_path, 'domainnet/real', 'train')


def test_ids_are_of_the_examples_not_of_the_split(tmp_path):
  prepare(tmp_path / 'data')
  (tmp_path / 'link').symlink_to('data')

  def ids(split, root='data'):
    source = tfds.open_tfds(tmp_path / root, 'domainnet/real', split)
    assert len(source.ids) == len(source)
    return source.ids

  whole = ids('train')
  assert len(set(whole)) == 5
  assert ids('train[2:4]', 'link') == whole[2:4]
  assert ids('train[60%:]+train[:20%]') == [*whole[3:], whole[0]]


def test_folders_that_are_no_version(tmp_path):
  prepare(tmp_path, version='1.0.0')
  prepare(tmp_path, version='.2.0.0')
  prepare(tmp_path, version='3.0.0.incompleteABC')
  source = tfds.open_tfds(tmp_path, 'domainnet/real', 'train')
  assert str(source.records.dataset_info.version) == '1.0.0'


def test_home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  prepare(tmp_path / 'data')
  assert len(tfds.open_tfds('~/data', 'domainnet/real', 'train')) == 5


@pytest.mark.parametrize('change', ['cut', 'gone'])
def test_broken_shard_is_named(tmp_path, change):
  folder = prepare(tmp_path)
  shard = max(folder.glob('*.array_record-*'))
  if change == 'cut':
    shard.write_bytes(shard.read_bytes()[:-1000])
  else:
    shard.unlink()
  source = tfds.open_tfds(tmp_path, 'domainnet/real', 'train')
  with pytest.raises(
    OSError, match=r'real train\[4\] is not readable: .* anew'
  ):
    source[4]


def test_broken_image_is_named(tmp_path):
  prepare(tmp_path, [_IMAGES[0], b'no image', *_IMAGES[2:]])
  source = tfds.open_tfds(tmp_path, 'domainnet/real', 'train')
  with pytest.raises(
    OSError, match=r'domainnet/real train\[1\] \(8 bytes\) is'
  ):
    source[1]
