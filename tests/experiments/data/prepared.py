"""What TFDS leaves behind when it prepares data; written without TensorFlow."""

import io
import json

import tensorflow_datasets
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2


def prepare(
  root,
  name,
  splits,
  class_names,
  *,
  version='1.0.0',
  file_format='array_record',
  label='label',
):
  """Writes a data set of images and labels.

  Args:
    root: the data_dir.
    name: of data set and config, 'domainnet/real'.
    splits: `{split: (images, labels)}`; an image is uint8 [H, W, 3], or bytes
      to store as they are. Each split goes into two shards.
    class_names: of the labels.
    version: of the data set.
    file_format: that dataset_info.json claims.
    label: the name of that feature.

  Returns:
    The folder.
  """
  data_set, config = name.split('/')
  folder = root / name / version
  folder.mkdir(parents=True)
  tensorflow_datasets.features.FeaturesDict(
    {
      'image': tensorflow_datasets.features.Image(shape=(None, None, 3)),
      label: tensorflow_datasets.features.ClassLabel(names=list(class_names)),
    }
  ).save_config(folder)
  infos = []
  for split, (images, labels) in splits.items():
    half = (len(labels) + 1) // 2
    for shard, rows in enumerate((slice(half), slice(half, None))):
      file = folder / f'{data_set}-{split}.{file_format}-{shard:05}-of-00002'
      writer = array_record_module.ArrayRecordWriter(str(file), 'group_size:1')
      for image, value in zip(images[rows], labels[rows], strict=True):
        writer.write(_example(image, label, value))
      writer.close()
    infos.append(
      {
        'name': split,
        'numBytes': '1000',
        'shardLengths': [str(half), str(len(labels) - half)],
        'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
      }
    )
  info = {
    'name': data_set,
    'configName': config,
    'version': version,
    'fileFormat': file_format,
    'splits': infos,
  }
  (folder / 'dataset_info.json').write_text(json.dumps(info))
  return folder


def _example(image, label_name, label):
  if not isinstance(image, bytes):
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'PNG')
    image = file.getvalue()
  Feature = tf_feature_pb2.Feature
  feature = {
    'image': Feature(bytes_list=tf_feature_pb2.BytesList(value=[image])),
    label_name: Feature(int64_list=tf_feature_pb2.Int64List(value=[label])),
  }
  features = tf_feature_pb2.Features(feature=feature)
  return tf_example_pb2.Example(features=features).SerializeToString()
