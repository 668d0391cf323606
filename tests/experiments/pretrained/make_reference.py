"""Writes `reference/`: tiny random models, and what transformers makes of them.

From the repository's root, with the extra `reference` installed:

  python tests/experiments/pretrained/make_reference.py

Each folder is what `save_pretrained` writes, and outputs.npz with inputs and
outputs, computed in float64. The tests need neither torch nor transformers.
"""

import pathlib

import numpy as np
import tokenizers
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / 'reference'
GRID, PATCH = 5, 4
WIDE = (28, 16)  # pixels: another image size than the model's
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


def main():
  vit = transformers.ViTForImageClassification(
    transformers.ViTConfig(**SIZES, **IMAGES)
  )
  write('vit', vit, hidden=hidden_of(vit.vit, interpolate_pos_encoding=True))
  deit = transformers.DeiTModel(transformers.DeiTConfig(**SIZES, **IMAGES))
  write('deit', deit, hidden=hidden_of(deit, interpolate_pos_encoding=True))
  sizes = {key: SIZES[key] for key in SIZES if key != 'intermediate_size'}
  dinov2 = transformers.Dinov2Model(
    transformers.Dinov2Config(**sizes, **IMAGES, mlp_ratio=2)
  )
  write('dinov2', dinov2, hidden=hidden_of(dinov2))
  write_clip()


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
  ids = tokenizer(
    list(TEXTS), padding='max_length', truncation=True, max_length=77
  ).input_ids

  def features(images):
    pooled = clip.get_image_features(images, interpolate_pos_encoding=True)
    return pooled.pooler_output

  def hidden(images):
    hidden = clip.vision_model(images, interpolate_pos_encoding=True)
    return clip.vision_model.post_layernorm(hidden.last_hidden_state)

  def text_features():
    return clip.get_text_features(torch.tensor(ids)).pooler_output

  write('clip', clip, features=features, hidden=hidden)
  with torch.no_grad():
    text_features = text_features().numpy().astype(np.float32)
  path = FOLDER / 'clip' / 'texts.npz'
  np.savez_compressed(path, texts=TEXTS, ids=ids, features=text_features)


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


def write(name, model, **outputs):
  """Randomises a model, saves it, and then its outputs."""
  model.eval()
  generator = torch.Generator().manual_seed(0)
  for parameter, values in model.named_parameters():
    noise = torch.randn(values.shape, generator=generator)
    # Small inputs to the first LayerNorm, so that its eps shows.
    std = 0.02 if 'embedding' in parameter else 0.3
    # Scales and the logit scale are near the 1 or the 2.7 that they start at.
    start = values.detach() if is_scale(parameter) else 0
    values.data = start + std * noise
  model.save_pretrained(FOLDER / name)
  model.double()
  rng = np.random.default_rng(0)
  arrays = {}
  for size, pixels in (('', (GRID * PATCH,) * 2), ('wide_', WIDE)):
    images = rng.normal(size=(2, *pixels, 3)).astype(np.float16)
    arrays[f'{size}images'] = images
    images = torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float64)
    with torch.no_grad():
      for output, function in outputs.items():
        arrays[size + output] = function(images).numpy().astype(np.float32)
  np.savez_compressed(FOLDER / name / 'outputs.npz', **arrays)


def is_scale(parameter):
  return 'norm' in parameter or 'scale' in parameter


if __name__ == '__main__':
  main()
