"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow.

DomainNet, ImageNet and its relatives (`imagenet2012`, `imagenet_v2/...`,
`imagenet_a`, `imagenet_r`, `imagenet_sketch`), and any other with an 'image'
and a 'label'. All of ImageNet's have the labels of its 1,000 classes.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import files
from experiments.data import images


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """A source: one split of a prepared data set.

  Attributes:
    name: what errors call it.
    records: `{'image': bytes, 'label': int, ...}` of every example.
    class_names: one for each label, in order.
    labels: None; it would take reading everything.
    names: None.
    groups: None.
  """

  name: str
  records: Sequence[dict[str, Any]]
  class_names: tuple[str, ...]
  labels: None = None
  names: None = None
  groups: None = None

  def __len__(self):
    return len(self.records)

  def __getitem__(self, index):
    name = f'{self.name}[{index}]'
    try:
      record = self.records[int(index)]
      label = int(record['label'])  # None, of a shard that is cut off
    except Exception as error:  # array_record and protobuf have their own
      raise OSError(
        f'{name} is not readable: {" ".join(str(error).split())}; prepare the '
        'data set anew.'
      ) from error
    number = len(self.class_names)
    if not 0 <= label < number:
      raise ValueError(
        f'{name} has the label {label}, of {number} classes from 0 to '
        f'{number - 1}; take a split whose examples are all labelled.'
      )
    return {
      'image': images.decode(record['image'], name),
      'label': np.int32(label),
    }

  @property
  def ids(self):
    """Resolved shard and row of every example."""
    split = self.records.dataset_info.splits[self.records.split]
    return [
      f'{shard}[{row}]'
      for part in split.file_instructions
      for shard in (os.path.realpath(part.filename),)
      for row in range(part.skip, part.skip + part.take)
    ]


def open_tfds(data_dir, name, split):
  """Opens a split of a prepared data set, the latest version there is.

  Nothing is downloaded: what is read is `data_dir/name/VERSION`.

  Args:
    data_dir: the folder that TensorFlow Datasets prepares data in.
    name: with its config, 'domainnet/real', 'imagenet_a'.
    split: 'train', 'test', or a slice of one, 'train[:10%]'.

  Returns:
    A `Prepared`.

  Raises:
    FileNotFoundError: it is not prepared there.
    ValueError: it is in another format, has no such split, or no labelled
      images.
    ModuleNotFoundError: `tensorflow-datasets` is not installed.
  """
  folder = files.expand(name, data_dir)
  recipe = (
    'on a machine with TensorFlow, `pip install tensorflow tensorflow-datasets '
    'importlib_resources` and `python -c "import tensorflow_datasets as tfds; '
    f"tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record')"
    '.download_and_prepare()"`'
  )
  versions = [
    file.parent
    for file in folder.glob('*/dataset_info.json')
    if re.fullmatch(r'\d+\.\d+\.\d+', file.parent.name)
  ]
  if not versions:
    raise FileNotFoundError(
      f'{folder} holds no prepared data set. Prepare it {recipe}, and set '
      'data_dir.'
    )
  # Here, for it is needed by no other kind of source.
  try:
    import tensorflow_datasets as tfds
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{name}: {error}; install this project's extra `.[tfds]`."
    ) from error

  builder = tfds.builder_from_directory(
    max(versions, key=lambda path: tfds.core.Version(path.name))
  )
  if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
    raise ValueError(
      f'{builder.data_dir} is in the format {builder.info.file_format.value}, '
      f'which needs TensorFlow; prepare it anew {recipe}.'
    )
  features = builder.info.features
  if not {'image', 'label'} <= set(features):
    raise ValueError(
      f"{builder.data_dir} has {', '.join(sorted(features))}; an 'image' and a "
      "'label' are needed."
    )
  if not getattr(features['label'], 'num_classes', None):
    raise ValueError(
      f"{builder.data_dir}: its 'label' is a {type(features['label']).__name__}"
      '; a ClassLabel is needed, which has names or a number of classes.'
    )
  if split.partition('[')[0] not in builder.info.splits:
    raise ValueError(
      f'{builder.data_dir} has no split {split!r}; it has '
      f'{", ".join(builder.info.splits)}.'
    )
  records = builder.as_data_source(
    split, decoders={'image': tfds.decode.SkipDecoding()}
  )
  return Prepared(f'{name} {split}', records, tuple(features['label'].names))
