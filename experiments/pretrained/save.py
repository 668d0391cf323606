"""A fine-tuned classifier or decoder as files that transformers or PEFT reads.

The inverse of `load`. ViT, DeiT and DINOv2 become transformers' models for
image classification, and compute the same logits. CLIP becomes its vision tower
with the projection, since transformers has no head on that: the head is in a
file of its own, `head.safetensors`.
"""

import json
import os
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import save_file

from experiments.models import blocks, lora
from experiments.pretrained import (
  config_files,
  llama_files,
  metadata,
  names,
  paligemma,
)

_WEIGHTS = 'model.safetensors'
_ADAPTER = 'adapter_model.safetensors'
_RUN = 'run.json'


def merged(model, class_names, image_size, crop=1.0):
  """The whole model, adapters merged into the weights that they adapt.

  Args:
    model: a `heads.Classifier`; it stays as it is.
    class_names: of its head.
    image_size: of the images that it was trained on, in pixels.
    crop: as `augment.evaluation` takes it.

  Returns:
    `{name of a file: its tensors, {name: array}, or a dict of JSON}`.

  Raises:
    ValueError: transformers has no such model.
  """
  model = lora.merge(model)
  family = metadata.family(model.backbone.config)
  theirs = names.to_write(family)
  tensors = {}
  for path, array in _params(model.backbone, nnx.Param):
    name = names.name_of(path, theirs)
    tensors[name] = _tensor(names.torch_layout(path, name, array))
  head = _head(family, model.head)
  if family == 'clip':
    weights = {_WEIGHTS: tensors, config_files.HEAD: head}
  else:
    weights = {_WEIGHTS: tensors | head}
  return weights | _described(model, class_names, image_size, crop)


def peft(model, class_names, image_size, crop=1.0, *, base):
  """What PEFT keeps of a model with LoRA: the adapters and the head alone.

  The classes are in `head.json`; whoever loads the base says how many, by
  `num_labels`. Modules are named as transformers 5 names them. transformers 4
  has other names for ViT, DeiT and DINOv2; there take what `merged` returns.

  Args:
    model: a `heads.Classifier` whose backbone `lora.add` was called on.
    class_names: as for `merged`.
    image_size: as for `merged`.
    crop: so too.
    base: the checkpoint that the adapters are of, for adapter_config.json.

  Returns:
    As `merged`.

  Raises:
    ValueError: transformers has no such model, or it has no adapters.
  """
  adapters = _adapters(model.backbone)
  family = metadata.family(model.backbone.config)
  theirs = names.to_write(family)
  tensors, targets = {}, set()
  for (*path, factor), array in _params(model.backbone, nnx.LoRAParam):
    module = names.module_of(path, theirs)
    targets.add(module)
    name = f'base_model.model.{module}.lora_{factor[-1].upper()}.weight'
    tensors[name] = _tensor(array.T)
  plain = lora.merge(model)
  head = _head(family, plain.head)
  if family == 'clip':
    weights = {_ADAPTER: tensors, config_files.HEAD: head}
  else:
    tensors |= {f'base_model.model.{key}': head[key] for key in head}
    weights = {_ADAPTER: tensors}
  to_save = None if family == 'clip' else ['classifier']
  about = _about(adapters, targets, base, modules_to_save=to_save)
  described = _described(plain, class_names, image_size, crop)
  # With a config.json the folder would pass for a whole model.
  config = described.pop(config_files.CONFIG)
  of_head = ('id2label', 'label2id', config_files.UNIT_FEATURES)
  described['head.json'] = {k: config[k] for k in of_head if k in config}
  return weights | {'adapter_config.json': about} | described


def merged_llama(model, tokenizer):
  """A decoder, LoRA merged into the weights that it adapts.

  Args:
    model: a `llama.Llama`; it stays as it is.
    tokenizer: its `tokenizer.Tokenizer`.

  Returns:
    As `merged`.

  Raises:
    ValueError: it has adapters that cannot be merged.
  """
  model = lora.merge(model)
  tensors = {}
  for path, array in _params(model, nnx.Param):
    tensors[_llama_name(path)] = _tensor(
      array.T if path[-1] == 'kernel' else array
    )
  about = llama_files.to_config(model.config)
  about |= {'bos_token_id': tokenizer.start, 'eos_token_id': tokenizer.end}
  return {
    _WEIGHTS: tensors,
    config_files.CONFIG: about,
    **tokenizer.files(),
  }


def peft_llama(model, tokenizer, *, base):
  """What PEFT keeps of a decoder with LoRA: the adapters alone.

  Args:
    model: a `llama.Llama` that `lora.add` was called on.
    tokenizer: its `tokenizer.Tokenizer`.
    base: the checkpoint that the adapters are of, for adapter_config.json.

  Returns:
    As `merged`.

  Raises:
    ValueError: it has no LoRA.
  """
  return _peft_decoder(model, _llama_module, tokenizer, base)


def merged_paligemma(model, tokenizer):
  """A PaliGemma, LoRA merged; of the hub's names and vocabulary.

  Args:
    model: a `vision_language.VisionLanguage`; it stays as it is.
    tokenizer: as for `merged_llama`.

  Returns:
    As `merged`.

  Raises:
    ValueError: it has adapters that cannot be merged, or an untied head.
  """
  _check_tied(model)
  model = lora.merge(model)
  config, table = paligemma.with_all_rows(
    model.config, model.decoder.token_embed[...]
  )
  tensors = {}
  for path, array in _params(model, nnx.Param):
    if path == ('decoder', 'token_embed'):
      array = table
    name, array = paligemma.tensor_of(path, array, config.vision.patch_size)
    tensors[name] = _tensor(array)
  return {
    _WEIGHTS: tensors,
    config_files.CONFIG: paligemma.to_config(config),
    **paligemma.processor_files(config),
    **tokenizer.files(),
  }


def peft_paligemma(model, tokenizer, *, base):
  """What PEFT keeps of a PaliGemma with LoRA: the adapters alone.

  Args:
    model: a `vision_language.VisionLanguage` that `lora.add` was called on.
    tokenizer: as for `merged_llama`.
    base: as for `peft_llama`.

  Returns:
    As `merged`. Modules are named as transformers 5 names them.

  Raises:
    ValueError: it has no LoRA, or an untied head.
  """
  _check_tied(model)
  return _peft_decoder(model, paligemma.module_of, tokenizer, base)


def _check_tied(model):
  if hasattr(model, 'head'):
    raise ValueError(
      'The run trained an untied head (config.head), and the head of a '
      'PaliGemma is its table of embeddings: there is no such model in '
      'transformers.'
    )


def _peft_decoder(model, module_of, tokenizer, base):
  adapters = _adapters(model)
  tensors, targets = {}, set()
  for (*path, factor), array in _params(model, nnx.LoRAParam):
    module = module_of(tuple(path))
    targets.add(module)
    name = f'base_model.model.{module}.lora_{factor[-1].upper()}.weight'
    tensors[name] = _tensor(array.T)
  about = _about(adapters, targets, base, task_type='CAUSAL_LM')
  return {_ADAPTER: tensors, 'adapter_config.json': about, **tokenizer.files()}


def _llama_module(path):
  return _llama_name((*path, 'kernel')).removesuffix('.weight')


def _llama_name(path):
  name = llama_files.name_of(path)
  return name if name.startswith('lm_head') else f'model.{name}'


def _adapters(model):
  """Its modules with LoRA; those of one `lora.add` are alike."""
  found = [
    module
    for _, module in nnx.iter_modules(model)
    if isinstance(module, lora.LoRALinear) and module.kind == 'lora'
  ]
  if not found:
    raise ValueError(
      'The model has no LoRA adapters, which is all that PEFT keeps; take '
      '--format=safetensors.'
    )
  return found


def _about(adapters, targets, base, **changes):
  """The contents of adapter_config.json."""
  rank = adapters[0].lora_a.shape[-1]
  return {
    'peft_type': 'LORA',
    'base_model_name_or_path': base,
    'r': rank,
    'lora_alpha': adapters[0].scale * rank,
    'lora_dropout': adapters[0].dropout,
    'target_modules': sorted(targets),
    'modules_to_save': None,
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
    'task_type': None,
    **changes,
  }


def write(folder, files, run):
  """Writes a folder: all of it or nothing.

  Args:
    folder: its path. It may be there, if it is empty or has been written for
      the same run: then it is replaced.
    files: as `merged` and `peft` return them.
    run: what tells the run that it is of from others, a dict of JSON.

  Raises:
    ValueError: the folder holds something else.
    OSError: it cannot be written.
  """
  files = files | {_RUN: run}
  folder = pathlib.Path(folder).absolute()
  partial = folder.with_name(f'.{folder.name}.partial')
  replaced = folder.with_name(f'.{folder.name}.replaced')
  try:
    if folder.exists() and not _is_replaceable(folder, files):
      raise ValueError(
        f'{folder} holds something else than an export of this run; name '
        'another folder with --to.'
      )
    for left in (partial, replaced):  # by one that was killed
      shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, content in files.items():
      if name.endswith('.safetensors'):
        save_file(content, partial / name, metadata={'format': 'pt'})
        # For whom the folder is, not for its owner alone.
        (partial / name).chmod(partial.stat().st_mode & 0o666)
      else:
        text = json.dumps(content, indent=2) + '\n'
        (partial / name).write_text(text, 'utf-8')
    if folder.exists():
      os.replace(folder, replaced)
    os.replace(partial, folder)
    shutil.rmtree(replaced, ignore_errors=True)
  except (OSError, SafetensorError) as error:
    raise OSError(
      f'{folder} cannot be written: {getattr(error, "strerror", 0) or error}; '
      'make room, or name another folder with --to.'
    ) from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _is_replaceable(folder, files):
  held = {path.name for path in folder.iterdir()}
  if _RUN not in held:
    return not held
  same = config_files.read_json(folder / _RUN) == files[_RUN]
  return same and held <= files.keys()


def _params(model, kind):
  """Path and array of every parameter of a kind, blocks one by one."""
  params = blocks.unstack(nnx.to_pure_dict(nnx.state(model, kind)))
  return nnx.traversals.flatten_mapping(params).items()


def _head(family, head):
  weight, bias = head.kernel[...].T, head.bias[...]
  if family == 'dinov2':
    # transformers' sees the class token and the mean of the patches.
    weight = jnp.concatenate([weight, jnp.zeros_like(weight)], axis=1)
  return {
    'classifier.weight': _tensor(weight),
    'classifier.bias': _tensor(bias),
  }


def _described(model, class_names, image_size, crop):
  config = model.backbone.config
  family = metadata.family(config)
  files = config_files.of_transformers(
    family, config, class_names, image_size, crop
  )
  if model.unit_features:
    files[config_files.CONFIG][config_files.UNIT_FEATURES] = True
  return files


def _tensor(array):
  """As safetensors writes it: NumPy, one row after the other."""
  return np.ascontiguousarray(array, np.float32)
