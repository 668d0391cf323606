import sys

import numpy as np
import pytest
from PIL import Image

from experiments import packages
from experiments.data import elpv

_SPLITS = ('train', 'val', 'test', 'ood')


@pytest.fixture(scope='module')
def folder():
  return packages.package_file(
    'elpv_dataset', 'data', 'elpv-dataset==1.0.0.post1'
  )


@pytest.fixture(scope='module')
def splits():
  return {split: elpv.open_elpv('', split) for split in _SPLITS}


def test_cells_of_a_module_are_a_group(splits):
  """Blocks of 60: 5, 6, 9, 3 and 3 of the poly runs, 1, 3, 12, 2 and 1 mono."""
  groups = splits['ood'].groups
  starts = np.flatnonzero(np.diff(groups, prepend=-1))
  assert np.diff([*starts, 1550]).tolist() == (
    [60] * 11 + [60] * 8 + [50] + [60] * 6
  )
  mono = np.concatenate([splits[name].groups for name in _SPLITS[:3]])
  assert len(np.unique(mono)) == 19


@pytest.mark.parametrize(
  ('name', 'cells', 'defects'),
  [
    ('train', 644, 233),
    ('val', 162, 70),
    ('test', 268, 66),
    ('ood', 1550, 452),
  ],
)
def test_counts(splits, name, cells, defects):
  split = splits[name]
  assert len(split) == len(split.names) == len(split.labels) == cells
  assert split.labels.dtype == np.int32
  assert split.labels.sum() == defects
  assert split.class_names == ('intact', 'defective')


def test_each_cell_is_in_one_split(splits):
  names = [name for split in splits.values() for name in split.names]
  assert len(set(names)) == len(names) == 2624


def test_each_mono_run_is_cut_in_file_order(splits):
  """Of the mono runs, one is cells 1 to 60, the next cells 361 to 540."""
  cell = {name: int(name[-8:-4]) for s in splits.values() for name in s.names}
  for first, length in ((1, 60), (361, 180)):
    for name, start, stop in (
      ('train', 0, 0.6),
      ('val', 0.6, 0.75),
      ('test', 0.75, 1),
    ):
      cells = range(first + int(start * length), first + int(stop * length))
      in_run = [
        cell[n] for n in splits[name].names if first <= cell[n] < first + length
      ]
      assert in_run == list(cells)


def test_images_and_labels_belong_to_their_names(folder, splits):
  lines = (folder / 'labels.csv').read_text().splitlines()
  rows = dict(line.split(maxsplit=1) for line in lines)
  for name, cell_type in (('val', 'mono'), ('ood', 'poly')):
    split = splits[name]
    for i in (0, len(split) // 2, len(split) - 1):
      probability, file_type = rows[split.names[i]].split()
      assert file_type == cell_type
      example = split[i]
      assert example['label'] == (float(probability) > 0.5)
      assert example['image'].shape == (300, 300, 1)
      with Image.open(folder / split.names[i]) as image:
        np.testing.assert_array_equal(example['image'][..., 0], image)


def test_no_such_split():
  with pytest.raises(ValueError, match=r"no split 'poly'; it has train, val"):
    elpv.open_elpv('', 'poly')


def test_package_not_installed(monkeypatch):
  monkeypatch.setattr(sys, 'path', [])
  with pytest.raises(
    ModuleNotFoundError, match=r'elpv_dataset .*`pip install elpv-dataset==1'
  ):
    elpv.open_elpv('', 'train')
