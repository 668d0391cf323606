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
from concurrent import futures
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments import packages

_REQUIREMENT = 'elpv-dataset==1.0.0.post1'


class Split(NamedTuple):
  """Labelled images; N of them, S x S pixels."""

  images: np.ndarray  # [N, S, S, 1] uint8, grey
  labels: np.ndarray  # [N] int32, 1 where the cell is defective
  names: list[str]  # [N] file names


def find():
  """The folder of the installed package's files.

  Raises:
    ModuleNotFoundError: the package is not installed.
  """
  return packages.package_file('elpv_dataset', 'data', _REQUIREMENT)


def load_elpv(image_size):
  """Reads the images and splits them.

  Label: the defect probability is above 0.5. The cells of one module follow one
  another in the file, and defect rates differ between modules, so neither whole
  modules nor random cells are held out: in each run of mono cells, in the
  file's order, the first 60 % train, the next 15 % validate and the last 25 %
  test. All poly cells are OOD.

  Args:
    image_size: S, in pixels; 300 in the files, resized by antialiased bicubic.

  Returns:
    `{'train': Split, 'val': Split, 'test': Split, 'ood': Split}` of 644, 162,
    268 and 1,550 cells.

  Raises:
    As `find`.
  """
  folder = find()
  lines = (folder / 'labels.csv').read_text().splitlines()
  names, probabilities, types = zip(*map(str.split, lines), strict=True)
  labels = (np.asarray(probabilities, float) > 0.5).astype(np.int32)

  def read(name):
    with Image.open(folder / name) as image:
      size = (image_size, image_size)
      return np.asarray(image.resize(size, Image.Resampling.BICUBIC))

  # Threads: Pillow decodes and resizes outside the interpreter's lock.
  with futures.ThreadPoolExecutor() as pool:
    images = np.stack(list(pool.map(read, names)))[..., None]

  return {
    split: Split(images[rows], labels[rows], [names[row] for row in rows])
    for split, rows in _split_rows(types).items()
  }


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
