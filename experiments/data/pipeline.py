"""Batches of a source, read ahead by threads or processes, with Grain."""

import grain
from absl import flags

# Batches that each process works on at a time.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)


def train_batches(
  source, transforms, *, batch_size, seed, num_workers=0, repeats=1
):
  """Endless batches: every epoch in another order, all of it in full batches.

  What comes out depends on the source, the transforms, `batch_size`, `seed` and
  `repeats`, and on nothing else. The iterator's `get_state` and `set_state`
  store and restore where it is, with the same `num_workers`.

  Args:
    source: as `sources.open_source` returns it.
    transforms: Grain transforms, as `augment.training` returns them.
    batch_size: B.
    seed: of order and transforms, 0 or more.
    num_workers: processes that read; 0 for threads of this one. A script that
      asks for processes needs `if __name__ == '__main__':`, as they import it.
    repeats: views of an image that follow one another (repeated augmentation;
      Hoffer et al., 2020). N / B batches then see N / repeats images.

  Returns:
    A `grain.DatasetIterator` of `{'image': uint8 [B, S, S, C], 'label': int32
    [B]}`. Its `close` ends the processes; so does dropping it.
  """
  dataset = grain.MapDataset.source(source).seed(seed).shuffle()
  dataset = _Views(dataset, repeats).repeat().apply(transforms)
  return _iterate(dataset.batch(batch_size), num_workers)


def eval_batches(source, transforms, *, batch_size, num_workers=0):
  """All of a source, once and in order; the last batch is short.

  Args and Returns are those of `train_batches`.
  """
  dataset = grain.MapDataset.source(source).apply(transforms)
  return _iterate(dataset.batch(batch_size), num_workers)


def _iterate(dataset, num_workers):
  if num_workers and not flags.FLAGS.is_parsed():
    # Outside absl apps Grain 0.2.18 fails on a flag of its own that nobody has
    # parsed (github.com/google/grain/issues/1355).
    flags.FLAGS.mark_as_parsed()
  # Batches are made before they are shared out: in the same way by any number
  # of processes.
  workers = grain.MultiprocessingOptions(num_workers)
  return iter(dataset.to_iter_dataset(_READ).mp_prefetch(workers))


class _Views(grain.MapDataset):
  """Every example some times in a row, its epochs counted on."""

  def __init__(self, parent, repeats):
    super().__init__(parent)
    self._examples, self._repeats = parent, repeats

  def __len__(self):
    return len(self._examples) * self._repeats

  def __getitem__(self, index):
    return self._examples[index // self._repeats]
