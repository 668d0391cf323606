"""Checkpoints in safetensors files, out of a folder, a file or the hub.

CLIP (both towers), ViT, DeiT, DINOv2 and Swin, as transformers, timm and
open_clip write them. A pickle (`pytorch_model.bin`) is never loaded: that would
run its code.
"""

import functools
import math
import pathlib
import re

import huggingface_hub
import numpy as np
import safetensors
from flax import nnx
from huggingface_hub.errors import HFValidationError
from tokenizers import processors

from experiments.models import clip, swin, vit
from experiments.pretrained import config_files, metadata, names, params
from experiments.pretrained import tokenizer as tokenizer_files

_HUB_ID = re.compile(r'(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?')
_INDEX = 'model.safetensors.index.json'
_WEIGHTS = ('model.safetensors', _INDEX)
_OPEN_CLIP_WEIGHTS = ('open_clip_model.safetensors',)
_SHARDS = 'model-*-of-*.safetensors'
_SMALL_FILES = (
  *config_files.NAMES,
  config_files.HEAD,
  'tokenizer.json',
  'tokenizer_config.json',
)
_DTYPES = ('F64', 'F32', 'F16', 'BF16')
_CONVERT = (
  'a pickle such as pytorch_model.bin is never loaded; where torch and '
  'transformers are installed, convert it once: '
  "`AutoModel.from_pretrained('...').save_pretrained('folder')`, and pass the "
  'folder'
)


def describe(source):
  """What the files beside the weights say; of the hub's only those are sent.

  Args:
    source: as for `load_vit_params`.

  Returns:
    A `metadata.Metadata`.

  Raises:
    FileNotFoundError: there is no such checkpoint, or the hub is out of reach.
    ValueError: a file is damaged, or of a model that is not read here.
  """
  return metadata.read(_local(source, _SMALL_FILES))


def check(config, source, text=None):
  """Refuses a checkpoint that is not the model's, without reading weights.

  What the hub has not sent yet is left out.

  Args:
    config: as for `load_vit_params`.
    source: so too.
    text: the `clip.TextConfig`, if `load_text` is to follow.

  Raises:
    As `load_vit_params` and `load_text`.
  """
  path = _local(source, _SMALL_FILES)
  metadata.check(metadata.read(path), config, text)
  try:
    tensors = _open(path)
  except FileNotFoundError:
    if pathlib.Path(source).exists():
      raise
  else:
    _assemble(source, config, tensors, _shape)
    if text:
      _assemble(source, text, tensors, _shape)
  if text:
    _load_tokenizer(_folder(path), text)


def load_vit_params(config, source):
  """Reads a ViT, the vision tower of a CLIP, or a Swin.

  Args:
    config: its `vit.ViTConfig`, unrolled (without `scan`), or its
      `swin.SwinConfig`.
    source: a folder with model.safetensors, or its shards and
      model.safetensors.index.json, or open_clip_model.safetensors; a
      .safetensors file; or an id of the hub, org/name or org/name@revision,
      which is downloaded. What `metadata` reads beside it is checked.

  Returns:
    The params of `vit.ViT(config)` or `swin.Swin(config)`, nested dicts of
    arrays.

  Raises:
    FileNotFoundError: there is no such checkpoint, or the hub is out of reach.
    ValueError: a file is damaged; one beside the weights disagrees with
      `config`; a tensor is missing, surplus, or of another shape or kind.
  """
  path = _with_weights(source)
  metadata.check(metadata.read(path), config)
  return _assemble(source, config, _open(path), _read)


def load_text(config, source):
  """Reads what a zero-shot head needs of a CLIP.

  Args:
    config: the `clip.TextConfig` of its text tower.
    source: as for `load_vit_params`; with a tokenizer.json.

  Returns:
    text: the `clip.TextTower`.
    tokenizer: a `tokenizers.Tokenizer` that pads and cuts to
      `config.context_length` tokens.
    scale: exp(logit_scale), a float.

  Raises:
    As `load_vit_params`.
  """
  path = _with_weights(source)
  metadata.check(metadata.read(path), text=config)
  tree = _assemble(source, config, _open(path), _read)
  scale = math.exp(tree.pop('logit_scale'))
  text = params.with_params(lambda: _build(config), tree)
  return text, _load_tokenizer(_folder(path), config), scale


def read_tensors(source, is_read):
  """The tensors of any model's checkpoint.

  Args:
    source: as for `load_vit_params`.
    is_read: whether they are to be read; else each is one zero, seen as an
      array of that shape, and of the hub's files only the small ones are sent.

  Returns:
    The folder, and `{name, less a prefix of all: () -> array}`; None for that
    where the hub has not sent the weights yet.

  Raises:
    As `load_vit_params`, but for what the tensors are of.
  """
  path = _with_weights(source) if is_read else _local(source, _SMALL_FILES)
  try:
    opened = _open(path)
  except FileNotFoundError:
    if is_read or pathlib.Path(source).exists():
      raise
    return _folder(path), None
  read = _read if is_read else _shape
  return _folder(path), {
    name: functools.partial(_checked, source, read, *tensor)
    for name, tensor in opened.items()
  }


def check_head(source, class_names):
  """Refuses a checkpoint whose head is not of these classes.

  Args:
    source: as for `load_vit_params`.
    class_names: of the labels; the head's may be in another order.

  Returns:
    The labels of the head, one for each of `class_names`.

  Raises:
    FileNotFoundError: as `load_vit_params`.
    ValueError: its config.json is damaged, or names other classes.
  """
  file = _folder(_local(source, _SMALL_FILES)) / config_files.CONFIG
  given = config_files.read_json(file) if file.exists() else {}
  labels = {name: int(i) for i, name in (given.get('id2label') or {}).items()}
  if labels.keys() != set(class_names):
    differ = ', '.join(map(repr, sorted(labels.keys() ^ set(class_names))[:5]))
    raise ValueError(
      f'{source}: config.head is pretrained, but the {len(labels)} classes of '
      f'its config.json are not the {len(class_names)} of the study; they '
      f'differ in {differ}. Take another head, such as linear_probe.'
    )
  return [labels[name] for name in class_names]


def load_head(source, class_names):
  """Reads the head of a checkpoint, such as experiments.export writes it.

  Args:
    source: as for `load_vit_params`.
    class_names: as for `check_head`.

  Returns:
    kernel: [F, C] float32, of the class token's features.
    bias: [C].
    unit_features: as `heads.Classifier` has it.

  Raises:
    As `check_head`; and ValueError: there is no head, or one of other features.
  """
  labels = check_head(source, class_names)
  path = _with_weights(source)
  head, file = (
    _folder(path) / config_files.HEAD,
    _folder(path) / config_files.CONFIG,
  )
  tensors = {
    whole: opened
    for opened, whole in _open(head if head.exists() else path).values()
  }
  if not {'classifier.weight', 'classifier.bias'} <= tensors.keys():
    raise ValueError(
      f'{source}: config.head is pretrained, but it has no classifier.weight '
      'and classifier.bias; take another head, such as linear_probe.'
    )
  weight, bias = (
    np.asarray(_read(tensors[name], name), np.float32)[labels]
    for name in ('classifier.weight', 'classifier.bias')
  )
  given = config_files.read_json(file)
  if given.get('model_type') == 'dinov2':
    weight, of_patches = np.split(weight, 2, axis=1)
    if of_patches.any():
      raise ValueError(
        f'{source}: its head sees the mean of the patches too, here it is of '
        'the class token alone; take another head, such as linear_probe.'
      )
  return weight.T, bias, bool(given.get(config_files.UNIT_FEATURES))


def folder(source):
  """Where the files beside the weights are; of the hub's only those are sent.

  Args:
    source: as for `load_vit_params`.

  Returns:
    A pathlib.Path.

  Raises:
    FileNotFoundError: there is no such checkpoint, or the hub is out of reach.
  """
  return _folder(_local(source, _SMALL_FILES))


def _load_tokenizer(folder, config):
  path = folder / tokenizer_files.FILE
  tokenizer = tokenizer_files.read(path)
  end = tokenizer.token_to_id(clip.END)
  if end != config.vocab_size - 1:
    raise ValueError(
      f'{path}: {clip.END} has id {end}, not the highest below vocab_size='
      f'{config.vocab_size}; is it the tokenizer of this CLIP?'
    )
  start = tokenizer.token_to_id(clip.START)
  if tokenizer.post_processor is None and start is not None:
    # Without the two tokens, the features would be another position's.
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f'{clip.START} $A {clip.END}',
      special_tokens=[(clip.START, start), (clip.END, end)],
    )
  length = config.context_length
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length, pad_id=end, pad_token=clip.END)
  # Longer than any text may be, so that no end is padding.
  ids = tokenizer.encode('a ' * length).ids
  if start is None or (ids[0], ids[-1], len(ids)) != (start, end, length):
    raise ValueError(
      f'{path}: a text has to become {clip.START}, its own tokens and '
      f'{clip.END}, but a long one begins with {tokenizer.id_to_token(ids[0])} '
      f'and ends with {tokenizer.id_to_token(ids[-1])}; take the file of '
      'openai/clip-vit-base-patch32.'
    )
  return tokenizer


def _local(source, patterns):
  """Where a checkpoint is: its path, or what the hub sent of `patterns`."""
  path = pathlib.Path(source)
  if path.exists():
    return path
  if not _HUB_ID.fullmatch(str(source)):
    raise FileNotFoundError(
      f'{source}: no such file or folder, nor an id of the hub, org/name or '
      'org/name@revision.'
    )
  return _download(source, patterns)


def _with_weights(source):
  path = _local(source, _SMALL_FILES)
  if pathlib.Path(source).exists():
    return path
  for wanted in _weights(path):
    # One after the other: some have the same weights under both names.
    _download(source, (*wanted, _SHARDS) if _INDEX in wanted else wanted)
    if any((path / name).exists() for name in wanted):
      break
  return path


def _weights(folder):
  """What the weights may be called, the first choice first."""
  order = [_WEIGHTS, _OPEN_CLIP_WEIGHTS]
  return order[::-1] if config_files.of_open_clip(folder) else order


def _folder(path):
  return path if path.is_dir() else path.parent


def _open(path):
  """For each tensor's name, less a shared prefix, its open file and name."""
  tensors = {}
  for file in _files(path):
    try:
      opened = safetensors.safe_open(file, 'numpy')
    except safetensors.SafetensorError as error:
      raise ValueError(
        f'{file} ({file.stat().st_size} bytes) is cut short or damaged '
        f'({error}): delete it and download it again.'
      ) from error
    tensors |= dict.fromkeys(opened.keys(), opened)
  shorter = names.without_prefix(list(tensors))
  return {name: (tensors[whole], whole) for name, whole in shorter.items()}


def _files(path):
  """The .safetensors files of a checkpoint."""
  if path.is_file():
    if path.suffix != '.safetensors':
      raise ValueError(f'{path} is not a .safetensors file: {_CONVERT}.')
    return [path]
  for wanted in _weights(path):
    for name in wanted:
      if name == _INDEX and (path / name).exists():
        return _shards(path)
      if (path / name).exists():
        return [path / name]
  raise FileNotFoundError(
    f'{path} has no {_WEIGHTS[0]} or {_OPEN_CLIP_WEIGHTS[0]}: {_CONVERT}.'
  )


def _shards(path):
  shards = config_files.read_json(path / _INDEX).get('weight_map')
  if not isinstance(shards, dict):
    raise ValueError(f'{path / _INDEX} has no weight_map: download it again.')
  shards = sorted(set(shards.values()))
  for shard in shards:
    if not (path / shard).exists():
      raise FileNotFoundError(
        f'{path / shard} is missing, one of {len(shards)} files that {_INDEX} '
        'lists: download it too.'
      )
  return [path / shard for shard in shards]


def _download(hub_id, patterns):
  try:
    name, revision = _HUB_ID.fullmatch(hub_id).groups()
    folder = huggingface_hub.snapshot_download(
      name, revision=revision, allow_patterns=list(patterns)
    )
  except (OSError, HFValidationError) as error:
    reason = ' '.join(str(error).split())
    raise FileNotFoundError(
      f'{hub_id} is no local folder, and the hub did not send it '
      f'({type(error).__name__}: {reason}): check the name and the network, or '
      f'pass a folder that holds its {_WEIGHTS[0]} and .json files.'
    ) from error
  return pathlib.Path(folder)


def _build(config):
  if isinstance(config, clip.TextConfig):
    return clip.TextTower(config, rngs=nnx.Rngs(0))
  if isinstance(config, swin.SwinConfig):
    return swin.Swin(config, rngs=nnx.Rngs(0))
  return vit.ViT(config, rngs=nnx.Rngs(0))


@functools.cache
def _shapes(config):
  """Kept, since a study is checked and then loaded: seconds, of ViT-L."""
  return params.shapes(lambda: _build(config))


def _assemble(source, config, tensors, read):
  """The params of a tower, each of them by `read(file, name)`."""
  text = isinstance(config, clip.TextConfig)
  wanted = _shapes(config) | ({('logit_scale',): ()} if text else {})
  model = 'text' if text else metadata.family(config)
  theirs = names.of(source, tensors, model, config.eps)
  theirs = theirs._replace(depths=getattr(config, 'depths', ()))

  def name_of(path):
    return names.name_of(path, theirs)

  def read_one(path, name):
    return names.layout(path, name, _checked(source, read, *tensors[name]))

  return params.assemble(
    source, wanted, tensors, name_of, read_one, theirs.ignored
  )


def _checked(source, read, file, name):
  """What `read` makes of a tensor, if that is one of weights."""
  dtype = file.get_slice(name).get_dtype()
  if dtype not in _DTYPES:
    raise ValueError(
      f'{source}: {name} is {dtype}, which is quantised or no weight; what is '
      f'read is {", ".join(_DTYPES)}.'
    )
  return read(file, name)


def _read(file, name):
  return file.get_tensor(name)


def _shape(file, name):
  """Out of the header: one zero, seen as an array of that shape."""
  return np.broadcast_to(np.float32(0), file.get_slice(name).get_shape())
