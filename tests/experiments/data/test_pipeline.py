import os
import pathlib
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from experiments.data import augment, images, pipeline

RECIPE = {
  'scale': (0.08, 1.0),
  'flip': 0.5,
  'randaugment': True,
  'erasing': 0.25,
}

_N = 23


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """Files whose label is their number."""
  folder = tmp_path_factory.mktemp('images')
  rng = np.random.default_rng(0)
  names = [f'{i:02}.png' for i in range(_N)]
  for name in names:
    pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(folder / name)
  labels = np.arange(_N, dtype=np.int32)
  return images.ImageFiles(folder, names, labels, tuple(map(str, range(_N))))


def take(number, source, *, batch_size=8, seed=0, augmented=True, **options):
  """The first batches of training."""
  transforms = augment.evaluation(16)
  if augmented:
    transforms = augment.training(16, **RECIPE)
  batches = pipeline.train_batches(
    source, transforms, batch_size=batch_size, seed=seed, **options
  )
  taken = [next(batches) for _ in range(number)]
  batches.close()
  return taken


def stack(batches, key):
  return np.concatenate([batch[key] for batch in batches])


def assert_equal(batches, others):
  for key in ('image', 'label'):
    np.testing.assert_array_equal(stack(batches, key), stack(others, key))


def test_batches(source):
  for batch in take(5, source):
    assert batch.keys() == {'image', 'label'}
    assert batch['image'].shape == (8, 16, 16, 3)
    assert batch['image'].dtype == np.uint8
    assert batch['label'].shape == (8,)
    assert batch['label'].dtype == np.int32


def test_every_epoch_has_all_of_it_in_another_order(source):
  labels = stack(take(9, source), 'label')[: 3 * _N].reshape(3, _N)
  np.testing.assert_array_equal(np.sort(labels), [range(_N)] * 3)
  orders = {tuple(epoch) for epoch in [*labels.tolist(), range(_N)]}
  assert len(orders) == 4


def test_images_belong_to_their_labels(source):
  transform = augment.CentreCrop(16, 1.0)
  for batch in take(3, source, augmented=False):
    for image, label in zip(batch['image'], batch['label'], strict=True):
      wanted = transform.map(source[label])['image']
      np.testing.assert_array_equal(image, wanted)


def test_every_epoch_is_augmented_anew(source):
  batches = take(6, source)
  found = stack(batches, 'image').reshape(48, -1)
  assert len(np.unique(found, axis=0)) == 48


def test_the_seed_alone_decides(source):
  assert_equal(take(4, source), take(4, source))
  other = take(4, source, seed=1)
  assert not np.array_equal(
    stack(other, 'label'), stack(take(4, source), 'label')
  )
  # Another augmentation, too, of the same images.
  by_label = {
    label: i
    for b in other
    for i, label in zip(b['image'], b['label'], strict=True)
  }
  for batch in take(1, source):
    for image, label in zip(batch['image'], batch['label'], strict=True):
      assert not np.array_equal(image, by_label[label])


def test_repeats(source):
  batches = take(9, source, repeats=3)
  labels = stack(batches, 'label')[: 3 * _N].reshape(_N, 3)
  assert (labels == labels[:, :1]).all()
  assert sorted(labels[:, 0]) == list(range(_N))
  views = stack(batches, 'image').reshape(72, -1)
  assert len(np.unique(views, axis=0)) == 72


def test_repeats_have_other_orders_in_other_epochs(source):
  labels = stack(take(18, source, repeats=3), 'label')[: 6 * _N]
  first, second = labels.reshape(2, _N, 3)[..., 0]
  assert sorted(first) == sorted(second)
  assert first.tolist() != second.tolist()


@pytest.mark.parametrize(
  'num_workers', [0, pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_later_start_and_processes_make_the_same(source, num_workers):
  wanted = take(8, source, repeats=2)
  options = {'repeats': 2, 'num_workers': num_workers}
  assert_equal(take(5, source, start=3, **options), wanted[3:])
  assert_equal(take(3, source, **options), wanted[:3])


def test_what_is_before_the_start_is_not_read(source):
  class Counted:
    read = 0

    def __len__(self):
      return len(source)

    def __getitem__(self, index):
      Counted.read += 1
      return source[index]

  take(1, Counted(), start=10_000, augmented=False)
  assert Counted.read < 100  # a few batches ahead


@pytest.mark.parametrize('count', [2, 4])
def test_the_parts_of_all_processes_make_up_the_batches(source, count):
  wanted = take(3, source, repeats=2)
  parts = [take(3, source, repeats=2, shard=(i, count)) for i in range(count)]
  for key in ('image', 'label'):
    for whole, *rows in zip(wanted, *parts, strict=True):
      assert all(len(own[key]) == 8 // count for own in rows)
      np.testing.assert_array_equal(
        np.concatenate([own[key] for own in rows]), whole[key]
      )


def test_evaluation_in_parts(source):
  transforms = augment.evaluation(16)
  parts = [
    list(pipeline.eval_batches(source, transforms, batch_size=8, shard=(i, 2)))
    for i in range(2)
  ]
  labels = [
    np.concatenate([mine['label'], other['label']])
    for mine, other in zip(*parts, strict=True)
  ]
  np.testing.assert_array_equal(np.concatenate(labels)[:_N], range(_N))


def test_evaluation_reads_all_of_it_in_order(source):
  batches = list(
    pipeline.eval_batches(source, augment.evaluation(16), batch_size=8)
  )
  assert [len(batch['label']) for batch in batches] == [8, 8, 8]
  filled_up = [*range(_N), _N - 1]
  np.testing.assert_array_equal(stack(batches, 'label'), filled_up)
  transform = augment.CentreCrop(16, 1.0)
  wanted = [transform.map(source[i])['image'] for i in filled_up]
  np.testing.assert_array_equal(stack(batches, 'image'), wanted)


def test_arrays_in_memory_without_transforms():
  class Arrays:
    def __len__(self):
      return 5

    def __getitem__(self, index):
      return {'image': np.full((3, 2), index, np.float16), 'label': index}

  batches = list(pipeline.eval_batches(Arrays(), (), batch_size=3))
  assert batches[0]['image'].dtype == np.float16
  np.testing.assert_array_equal(stack(batches, 'label'), [*range(5), 4])


@pytest.mark.parametrize('num_workers', [0, 1])
def test_a_broken_file_is_named(tmp_path, num_workers):
  for name in ('a.png', 'b.png', 'c.png'):
    Image.new('RGB', (16, 16)).save(tmp_path / name)
  (tmp_path / 'b.png').write_bytes(b'broken')
  source = images.ImageFiles(
    tmp_path, ['a.png', 'b.png', 'c.png'], np.zeros(3, np.int32), ('x',)
  )
  batches = pipeline.eval_batches(
    source, augment.evaluation(16), batch_size=1, num_workers=num_workers
  )
  next(batches)
  with pytest.raises(OSError, match=r'b\.png \(6 bytes\) is not readable'):
    next(batches)
  batches.close()


@pytest.mark.parametrize('call', ['app.run(main)', 'main([])'])
def test_processes_in_a_script(source, call, tmp_path):
  """With flags that absl has parsed, and without."""
  (tmp_path / 'source').write_bytes(pickle.dumps(source))
  script = tmp_path / 'script.py'
  script.write_text(
    textwrap.dedent(f"""
      import pathlib
      import pickle

      from absl import app

      from experiments.data import augment, pipeline

      def main(argv):
        file = pathlib.Path(__file__).with_name('source')
        source = pickle.loads(file.read_bytes())
        batches = pipeline.eval_batches(
          source, augment.evaluation(16), batch_size=8, num_workers=1
        )
        print([label for batch in batches for label in batch['label'].tolist()])

      if __name__ == '__main__':
        {call}
      """)
  )
  done = subprocess.run(
    [sys.executable, '-W', 'error', script],
    env={**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[3])},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.stdout == f'{[*range(_N), _N - 1]}\n', done.stderr
  assert done.returncode == 0
