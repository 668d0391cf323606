"""Batches of a source, read ahead by threads or processes, with Grain."""

import functools

import grain
from absl import flags

# Batches that each process works on at a time.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)


def train_batches(
  source,
  transforms,
  *,
  batch_size,
  seed,
  num_workers=0,
  repeats=1,
  start=0,
  shard=(0, 1),
):
  """Endless batches: every epoch in another order, all of it in full batches.

  What comes out depends on the source, the transforms, `batch_size`, `seed` and
  `repeats`, and on nothing else: the batches after `start` are those that a run
  from 0 sees, and the parts of all processes make up the batches of one, by any
  number of workers and processes.

  Args:
    source: as `sources.open_source` returns it.
    transforms: Grain transforms, as `augment.training` returns them.
    batch_size: B, of all processes together.
    seed: of order and transforms, 0 or more.
    num_workers: processes that read; 0 for threads of this one. A script that
      asks for processes needs `if __name__ == '__main__':`, as they import it.
    repeats: views of an image that follow one another (repeated augmentation;
      Hoffer et al., 2020). N / B batches then see N / repeats images.
    start: how many batches to pass over, unread.
    shard: (i, P): the i-th of P equal parts of each batch; P divides B.

  Returns:
    A `grain.DatasetIterator` of `{'image': uint8 [B / P, S, S, C], 'label':
    int32 [B / P]}`. Its `close` ends the workers; so does dropping it.
  """
  dataset = grain.MapDataset.source(source).seed(seed).shuffle()
  dataset = _Views(dataset, repeats).repeat().apply(transforms)
  return _iterate(dataset, batch_size, num_workers, shard, start)


def eval_batches(
  source, transforms, *, batch_size, num_workers=0, shard=(0, 1)
):
  """All of a source, once and in order; its last example fills the last batch.

  Args and Returns are those of `train_batches`.
  """
  dataset = grain.MapDataset.source(source).apply(transforms)
  dataset = _FilledUp(dataset, batch_size)
  return _iterate(dataset, batch_size, num_workers, shard)


def _iterate(dataset, batch_size, num_workers, shard, start=0):
  if num_workers and not flags.FLAGS.is_parsed():
    # Outside absl apps Grain 0.2.18 fails on a flag of its own that nobody has
    # parsed (github.com/google/grain/issues/1355).
    flags.FLAGS.mark_as_parsed()
  # Batches are made before they are shared out: in the same way by any number
  # of workers.
  own = _Shard(dataset, batch_size, *shard).batch(batch_size // shard[1])
  workers = grain.MultiprocessingOptions(num_workers)
  batches = own.slice(slice(start, None)).to_iter_dataset(_READ)
  return iter(batches.mp_prefetch(workers))


class _Shard(grain.MapDataset):
  """The same rows out of every batch, as they are; the others stay unread."""

  def __init__(self, parent, batch_size, index, count):
    super().__init__(parent)
    self._examples, self._batch_size = parent, batch_size
    self._index, self._count = index, count

  def __len__(self):
    return len(self._examples) // self._count

  def __getitem__(self, index):
    own = self._batch_size // self._count
    batch, row = divmod(index, own)
    return self._examples[batch * self._batch_size + self._index * own + row]


class _FilledUp(grain.MapDataset):
  """Full batches: the last example, again and again at the end."""

  def __init__(self, parent, batch_size):
    super().__init__(parent)
    self._examples, self._batch_size = parent, batch_size

  def __len__(self):
    return -(-len(self._examples) // self._batch_size) * self._batch_size

  def __getitem__(self, index):
    last = len(self._examples) - 1
    return self._examples[index] if index < last else self._last

  @functools.cached_property
  def _last(self):
    return self._examples[len(self._examples) - 1]


class _Views(grain.MapDataset):
  """Every example some times in a row, its epochs counted on."""

  def __init__(self, parent, repeats):
    super().__init__(parent)
    self._examples, self._repeats = parent, repeats

  def __len__(self):
    return len(self._examples) * self._repeats

  def __getitem__(self, index):
    return self._examples[index // self._repeats]
