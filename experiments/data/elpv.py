"""ELPV: photographs of solar cells in which the defects show.

2,624 real grey electroluminescence images, of mono- and polycrystalline cells,
out of the package `elpv-dataset`. A shift with shared labels: a model is tuned
on mono cells and tested on mono (ID) and poly (OOD).

The images are CC-BY-NC-SA-4.0: use them at run time, never commit them.

References:
  Deitsch et al., "Segmentation of photovoltaic module cells in uncalibrated
  electroluminescence images", 2021; https://github.com/zae-bayern/elpv-dataset
"""

import itertools

import numpy as np

from experiments import files, packages
from experiments.data import images

_MODULE = 60  # cells
_REQUIREMENT = 'elpv-dataset==1.0.0.post1'


def find():
  """The folder of the installed package's files.

  Raises:
    ModuleNotFoundError: the package is not installed.
  """
  return packages.package_file('elpv_dataset', 'data', _REQUIREMENT)


def open_elpv(data_dir, split):
  """Opens a split of the installed package's images, 300 x 300 and grey.

  Label: the defect probability is above 0.5. The cells of one module follow one
  another in the file, and defect rates differ between modules, so neither whole
  modules nor random cells are held out: in each run of mono cells, in the
  file's order, the first 60 % train, the next 15 % validate and the last 25 %
  test. All poly cells are OOD.

  Args:
    data_dir: of the other kinds of sources.
    split: 'train', 'val', 'test' or 'ood', of 644, 162, 268 and 1,550 cells.

  Returns:
    An `images.ImageFiles` in the file's order. Its groups are what 60 cells
    that follow one another in a run have in the split: a module has 60 cells or
    72, and where one begins is not known.

  Raises:
    ValueError: no such split.
    ModuleNotFoundError: the package is not installed.
  """
  del data_dir
  folder = find()
  lines = files.read_lines(folder / 'labels.csv')
  names, probabilities, types = zip(*map(str.split, lines), strict=True)
  splits = _split_rows(types)
  if split not in splits:
    raise ValueError(
      f'ELPV has no split {split!r}; it has {", ".join(splits)}.'
    )
  rows = splits[split]
  labels = (np.asarray(probabilities, float) > 0.5).astype(np.int32)
  return images.ImageFiles(
    folder,
    tuple(names[row] for row in rows),
    labels[rows],
    ('intact', 'defective'),
    mode='L',
    groups=images.stretches(types, _MODULE)[rows],
  )


def _split_rows(types):
  rows = {'train': [], 'val': [], 'test': [], 'ood': []}
  for cell_type, run in itertools.groupby(range(len(types)), types.__getitem__):
    run = list(run)
    if cell_type == 'poly':
      rows['ood'] += run
    else:
      train, val = round(0.6 * len(run)), round(0.75 * len(run))
      rows['train'] += run[:train]
      rows['val'] += run[train:val]
      rows['test'] += run[val:]
  return rows
