"""Writes `reference/`: tiny random models, and their outputs.

From the repository's root, with the extra `reference` installed:

  python tests/experiments/pretrained/make_reference.py

Each folder is what transformers, timm or open_clip save, and outputs.npz with
inputs and outputs, computed in float64. Those in `exports/` are what
`experiments.pretrained.save` writes, with what transformers and PEFT make of
it. The tests need none of the four, nor torch.
"""

import copy
import functools
import pathlib
import shutil

import numpy as np
import open_clip
import peft
import timm
import tokenizers
import torch
import transformers
from open_clip.push_to_hf_hub import save_for_hf
from safetensors.torch import load_file

from experiments.pretrained import save
from tests.experiments.pretrained import exports, make_paligemma

FOLDER = pathlib.Path(__file__).parent / 'reference'
GRID, PATCH = 5, 4
WIDE = (28, 16)  # pixels: another image size than the model's
# For Swin, one that neither patches, nor windows, nor the merging divide.
ODD = (27, 35)
EVEN = 48
TEXTS = (
  'a photo of a cat.',
  'A  Photo of\na CAT!',
  "it's 12 o'clock: déjà vu",
  '',
  'too long ' * 20,
)
SIZES = {
  'hidden_size': 16,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'intermediate_size': 24,
}
IMAGES = {'image_size': GRID * PATCH, 'patch_size': PATCH}
IMAGENET = {
  'image_mean': timm.data.IMAGENET_DEFAULT_MEAN,
  'image_std': timm.data.IMAGENET_DEFAULT_STD,
}

# What reads an export, and what the adapters are put on.
EXPORTED = {
  'clip': (transformers.CLIPVisionModelWithProjection, transformers.CLIPModel),
  'vit': (transformers.ViTForImageClassification,) * 2,
  'deit': (transformers.DeiTForImageClassification,) * 2,
  'dinov2': (transformers.Dinov2ForImageClassification,) * 2,
}


def main():
  vit = transformers.ViTForImageClassification(
    transformers.ViTConfig(**SIZES, **IMAGES)
  )
  vit_hidden = hidden_of(vit.vit, interpolate_pos_encoding=True)
  write('vit', vit, hidden=vit_hidden)
  transformers.ViTImageProcessor().save_pretrained(FOLDER / 'vit')
  deit = transformers.DeiTModel(transformers.DeiTConfig(**SIZES, **IMAGES))
  write('deit', deit, hidden=hidden_of(deit, interpolate_pos_encoding=True))
  transformers.DeiTImageProcessor(**IMAGENET).save_pretrained(FOLDER / 'deit')
  sizes = {key: SIZES[key] for key in SIZES if key != 'intermediate_size'}
  dinov2 = transformers.Dinov2Model(
    transformers.Dinov2Config(**sizes, **IMAGES, mlp_ratio=2)
  )
  write('dinov2', dinov2, hidden=hidden_of(dinov2))
  transformers.BitImageProcessor(**IMAGENET).save_pretrained(FOLDER / 'dinov2')
  write_swin()
  write_clip()
  make_paligemma.main()
  for name, architecture in (
    ('timm_vit', 'vit_base_patch16_224'),
    ('timm_deit', 'deit_base_distilled_patch16_224'),
    ('timm_dinov2', 'vit_small_patch14_dinov2'),
  ):
    write_timm(name, architecture)
  write_timm_swin()
  write_open_clip()
  for name in exports.NAMES:
    write_export(name)


def write_swin():
  """Two stages; the second shifts its windows at the odd size alone."""
  swin = transformers.SwinForImageClassification(
    transformers.SwinConfig(
      **IMAGES,
      embed_dim=8,
      depths=[2, 2],
      num_heads=[2, 4],
      window_size=3,
      mlp_ratio=2.0,
    )
  )

  def model(images, **kwargs):
    # Once an image was too small for shifted windows, it never shifts again.
    return copy.deepcopy(swin.swin)(images, **kwargs)

  def hidden(images):
    return model(images).last_hidden_state

  def stage(images):
    found = model(
      images,
      output_hidden_states=True,
      output_hidden_states_before_downsampling=True,
    )
    return found.reshaped_hidden_states[1].permute(0, 2, 3, 1)

  write('swin', swin, wide=ODD, hidden=hidden, stage=stage)
  transformers.ViTImageProcessor(**IMAGENET).save_pretrained(FOLDER / 'swin')


def write_clip():
  tokenizer = transformers.CLIPTokenizer(*vocabulary())
  end = tokenizer.eos_token_id
  text = {
    **SIZES,
    'hidden_size': 8,
    'vocab_size': end + 1,
    'bos_token_id': end - 1,
    'eos_token_id': end,
    'pad_token_id': end,
  }
  clip = transformers.CLIPModel(
    transformers.CLIPConfig(
      vision_config={**SIZES, **IMAGES}, text_config=text, projection_dim=8
    )
  )
  tokenizer.save_pretrained(FOLDER / 'clip')
  transformers.CLIPImageProcessor().save_pretrained(FOLDER / 'clip')

  def features(images):
    pooled = clip.get_image_features(images, interpolate_pos_encoding=True)
    return pooled.pooler_output

  def hidden(images):
    hidden = clip.vision_model(images, interpolate_pos_encoding=True)
    return clip.vision_model.post_layernorm(hidden.last_hidden_state)

  def text_features(ids):
    return clip.get_text_features(ids).pooler_output

  write('clip', clip, features=features, hidden=hidden)
  write_texts('clip', tokenizer, text_features)


def write_timm(name, architecture):
  """At the model's own size: timm resizes positions with antialiasing."""
  sizes = {
    'img_size': GRID * PATCH,
    'patch_size': PATCH,
    'embed_dim': SIZES['hidden_size'],
    'depth': SIZES['num_hidden_layers'],
    'num_heads': SIZES['num_attention_heads'],
    'mlp_ratio': SIZES['intermediate_size'] / SIZES['hidden_size'],
  }
  model = timm.create_model(architecture, num_classes=3, **sizes)
  save = functools.partial(
    timm.models.save_for_hf, model, model_args=sizes, safe_serialization=True
  )
  write(name, model, save, wide=None, hidden=model.forward_features)


def write_timm_swin():
  """At a size that windows divide: others timm shifts before it pads them."""
  sizes = {
    'img_size': EVEN,
    'embed_dim': 8,
    'depths': (2, 2),
    'num_heads': (2, 4),
    'window_size': 3,
    'mlp_ratio': 2.0,
  }
  model = timm.create_model(
    'swin_tiny_patch4_window7_224', num_classes=3, **sizes
  )
  save = functools.partial(
    timm.models.save_for_hf, model, model_args=sizes, safe_serialization=True
  )

  def stage(images):
    first, _ = model.forward_intermediates(images, intermediates_only=True)
    return first.permute(0, 2, 3, 1)

  write(
    'timm_swin',
    model,
    save,
    size=EVEN,
    wide=None,
    hidden=model.forward_features,
    stage=stage,
  )


def write_open_clip():
  """One of LAION's: with the exact GELU. At its own size, as timm's."""
  tokenizer = transformers.CLIPTokenizer(*vocabulary())
  sizes = {
    'layers': SIZES['num_hidden_layers'],
    'mlp_ratio': SIZES['intermediate_size'] / SIZES['hidden_size'],
  }
  config = {
    'embed_dim': 8,
    'vision_cfg': {**sizes, **IMAGES, 'width': 16, 'head_width': 8},
    'text_cfg': {
      **sizes,
      'context_length': 77,
      'vocab_size': tokenizer.eos_token_id + 1,
      'width': 8,
      'heads': 2,
    },
  }
  model = open_clip.CLIP(**config)
  preprocessing = {
    'mean': open_clip.OPENAI_DATASET_MEAN,
    'std': open_clip.OPENAI_DATASET_STD,
  }
  open_clip.model.set_model_preprocess_cfg(model, preprocessing)

  def save(folder):
    save_for_hf(model, tokenizer, config, folder, safe_serialization=True)

  write('open_clip', model, save, wide=None, features=model.encode_image)
  write_texts('open_clip', tokenizer, model.encode_text)


def write_export(name):
  """Of a model with LoRA: merged, and the adapters for PEFT."""
  folder = FOLDER / 'exports' / name
  shutil.rmtree(folder, ignore_errors=True)
  base = FOLDER / name
  model = exports.adapted(base)
  about = exports.CLASS_NAMES, exports.IMAGE_SIZE
  save.write(folder / 'merged', save.merged(model, *about), {})
  save.write(folder / 'peft', save.peft(model, *about, base=name), {})
  merged_type, base_type = EXPORTED[name]
  merged, loading = merged_type.from_pretrained(
    folder / 'merged', output_loading_info=True
  )
  assert not any(loading.values()), loading
  labels = {} if name == 'clip' else {'num_labels': len(exports.CLASS_NAMES)}
  adapted = peft.PeftModel.from_pretrained(
    base_type.from_pretrained(base, **labels, ignore_mismatched_sizes=True),
    folder / 'peft',
  )
  processor = transformers.AutoImageProcessor.from_pretrained(folder / 'merged')
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, 30, 24, 3), np.uint8)
  pixels = processor(images=list(images), return_tensors='pt').pixel_values
  outputs = {}
  for key, model in (('merged', merged), ('peft', adapted)):
    model.eval().double()
    with torch.no_grad():
      if name == 'clip':
        logits = clip_logits(model, pixels.double(), folder / key)
      else:
        logits = model(pixels.double()).logits
    outputs[key] = logits.numpy().astype(np.float32)
  np.savez_compressed(
    folder / 'outputs.npz',
    images=images,
    pixels=pixels.numpy().transpose(0, 2, 3, 1),
    class_names=list(merged.config.id2label.values()),
    **outputs,
  )


def clip_logits(model, pixels, folder):
  if isinstance(model, peft.PeftModel):
    features = model.get_image_features(pixels).pooler_output
  else:
    features = model(pixels).image_embeds
  head = load_file(folder / 'head.safetensors')
  weight, bias = (
    head[f'classifier.{key}'].double() for key in ('weight', 'bias')
  )
  functional = torch.nn.functional
  return functional.linear(functional.normalize(features), weight, bias)


def vocabulary():
  """All bytes, within and at the end of words; some merges; the specials."""
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  merges = [('c', 'a'), ('ca', 't</w>'), ('o', 'f</w>'), ('p', 'h')]
  tokens = letters + [f'{letter}</w>' for letter in letters]
  tokens += [''.join(pair) for pair in merges]
  tokens += ['<|startoftext|>', '<|endoftext|>']
  return {token: i for i, token in enumerate(tokens)}, merges


def hidden_of(model, **kwargs):
  return lambda images: model(images, **kwargs).last_hidden_state


def write(name, model, save=None, *, size=GRID * PATCH, wide=WIDE, **outputs):
  """Randomises a model, saves it, and then its outputs."""
  model.eval()
  generator = torch.Generator().manual_seed(0)
  for parameter, values in model.named_parameters():
    noise = torch.randn(values.shape, generator=generator)
    # Small inputs to the first LayerNorm, so that its eps shows.
    std = 0.02 if is_embedding(parameter) else 0.3
    # Scales and the logit scale are near the 1 or the 2.7 that they start at.
    start = values.detach() if is_scale(parameter) else 0
    values.data = start + std * noise
  (save or model.save_pretrained)(FOLDER / name)
  model.double()
  rng = np.random.default_rng(0)
  arrays = {}
  sizes = {'': (size, size), **({'wide_': wide} if wide else {})}
  for prefix, pixels in sizes.items():
    images = rng.normal(size=(2, *pixels, 3)).astype(np.float16)
    arrays[f'{prefix}images'] = images
    images = torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float64)
    with torch.no_grad():
      for output, function in outputs.items():
        arrays[prefix + output] = function(images).numpy().astype(np.float32)
  np.savez_compressed(FOLDER / name / 'outputs.npz', **arrays)


def write_texts(name, tokenizer, features):
  ids = tokenizer(
    list(TEXTS), padding='max_length', truncation=True, max_length=77
  ).input_ids
  with torch.no_grad():
    features = features(torch.tensor(ids)).numpy().astype(np.float32)
  path = FOLDER / name / 'texts.npz'
  np.savez_compressed(path, texts=TEXTS, ids=ids, features=features)


def is_embedding(parameter):
  if 'embeddings.norm' in parameter or 'patch_embed.norm' in parameter:
    return False  # Swin's
  return any(part in parameter for part in ('embed', 'token', 'conv1'))


def is_scale(parameter):
  return any(part in parameter for part in ('norm', 'scale', 'ln_'))


if __name__ == '__main__':
  main()
