"""Writes `reference/paligemma`: a tiny random PaliGemma of transformers.

Its weights also lie there as big_vision publishes them, in weights.npz: stacked
over blocks, and without the rows that transformers adds to the table of
embeddings. `make_reference` calls it.
"""

import pathlib

import numpy as np
import peft
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers

FOLDER = pathlib.Path(__file__).parent / 'reference/paligemma'
ROWS, IMAGE = 364, 300  # of the table; the id of an image token is the first
GRID, PATCH = 3, 4  # beyond big_vision's
VISION = {
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'image_size': GRID * PATCH,
  'patch_size': PATCH,
  'vision_use_head': False,
}
TEXT = {
  'model_type': 'gemma',
  'vocab_size': ROWS,
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 6,
}
# Prompts and answers of two examples.
PREFIXES = ([2, 40, 41, 42, 5], [2, 50, 51, 40, 41, 43, 44, 5])
SUFFIXES = ([60, 61, 1], [62, 1])
LENGTH = 6  # of what is generated
STD = 0.5  # of all weights


def main():
  config = transformers.PaliGemmaConfig(
    vision_config={'model_type': 'siglip_vision_model', **VISION},
    text_config=TEXT,
    image_token_id=IMAGE,
    projection_dim=TEXT['hidden_size'],
  )
  model = transformers.PaliGemmaForConditionalGeneration(config).eval()
  generator = torch.Generator().manual_seed(3)
  for name, values in model.named_parameters():
    noise = torch.randn(values.shape, generator=generator)
    scale = 1.0 if 'norm' in name and 'vision' in name else 0.0
    values.data = (
      scale * (values.ndim == 1) * ('bias' not in name) + STD * noise
    )
  model.tie_weights()
  model.save_pretrained(FOLDER)
  transformers.SiglipImageProcessor(
    size={'height': GRID * PATCH, 'width': GRID * PATCH}
  ).save_pretrained(FOLDER)
  tokenizer().save(str(FOLDER / 'tokenizer.json'))
  np.savez_compressed(FOLDER / 'weights.npz', **big_vision(model))
  np.savez_compressed(FOLDER / 'outputs.npz', **outputs(model.double()))
  make_peft()


def outputs(model):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, GRID * PATCH, GRID * PATCH, 3), np.uint8)
  pixels = torch.tensor(images.transpose(0, 3, 1, 2) / 127.5 - 1)
  arrays = {'images': images}
  for i, (prefix, suffix) in enumerate(zip(PREFIXES, SUFFIXES, strict=True)):
    ids = torch.tensor([[IMAGE] * GRID**2 + prefix + suffix])
    is_suffix = torch.tensor(
      [[0] * (GRID**2 + len(prefix)) + [1] * len(suffix)]
    )
    asked = GRID**2 + len(prefix)
    with torch.no_grad():
      logits = model(
        input_ids=ids,
        pixel_values=pixels[i : i + 1],
        token_type_ids=is_suffix,
        attention_mask=torch.ones_like(ids),
      ).logits[0, GRID**2 :]
      said = model.generate(
        input_ids=ids[:, :asked],
        pixel_values=pixels[i : i + 1],
        token_type_ids=is_suffix[:, :asked],
        attention_mask=torch.ones_like(ids[:, :asked]),
        max_new_tokens=LENGTH,
        do_sample=False,
        eos_token_id=1,
      )[0, asked:]
    arrays[f'logits{i}'] = logits.numpy().astype(np.float32)
    arrays[f'answer{i}'] = said.numpy()
    print(said)
  return arrays


def make_peft():
  """The logits of example 0 with the adapters in reference/paligemma/peft.

  They are what `save.peft_paligemma` writes for `test_paligemma.adapted`.
  """
  arrays = np.load(FOLDER / 'outputs.npz')
  base = transformers.PaliGemmaForConditionalGeneration.from_pretrained(FOLDER)
  model = peft.PeftModel.from_pretrained(base, FOLDER / 'peft').eval().double()
  prefix, suffix = PREFIXES[0], SUFFIXES[0]
  asked = GRID**2 + len(prefix)
  with torch.no_grad():
    logits = model(
      input_ids=torch.tensor([[IMAGE] * GRID**2 + prefix + suffix]),
      pixel_values=torch.tensor(
        arrays['images'][:1].transpose(0, 3, 1, 2) / 127.5 - 1
      ),
      token_type_ids=torch.tensor([[0] * asked + [1] * len(suffix)]),
      attention_mask=torch.ones(1, asked + len(suffix), dtype=torch.int64),
    ).logits[0, asked - 1 : asked - 1 + len(suffix)]
  np.savez_compressed(
    FOLDER / 'peft/outputs.npz', logits=logits.numpy().astype(np.float32)
  )


def tokenizer():
  """Of letters, with Gemma's blanks; the first ids are Gemma's."""
  tokens = ['<pad>', '<eos>', '<bos>', '<unk>', '<mask>', '\n', '▁']
  tokens += [chr(i) for i in range(33, 127)]
  tokens += [f'<loc{i}>' for i in range(IMAGE - len(tokens))] + ['<image>']
  vocab = {token: i for i, token in enumerate(tokens)}
  made = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token='<unk>'))
  made.normalizer = normalizers.Replace(' ', '▁')
  made.decoder = decoders.Sequence(
    [decoders.Replace('▁', ' '), decoders.Fuse()]
  )
  made.add_special_tokens(['<pad>', '<eos>', '<bos>', '<unk>', '<image>'])
  return made


def big_vision(model):
  """The weights as its .npz has them, in half precision."""
  state = {
    name.removeprefix('model.'): values.detach().numpy()
    for name, values in model.state_dict().items()
  }

  def stack(name, change=lambda x: x):
    return np.stack([change(state[name.format(i)]) for i in range(2)])

  arrays = {}
  vision, text = 'vision_tower.vision_model.', 'language_model.'
  if f'{vision}embeddings.position_embedding.weight' not in state:
    vision = 'vision_tower.'
  block = 'params/img/Transformer/encoderblock/'
  layer = vision + 'encoder.layers.{}.'
  for theirs, ours in (
    ('LayerNorm_0', 'layer_norm1'),
    ('LayerNorm_1', 'layer_norm2'),
  ):
    arrays[f'{block}{theirs}/scale'] = stack(f'{layer}{ours}.weight')
    arrays[f'{block}{theirs}/bias'] = stack(f'{layer}{ours}.bias')
  for theirs, ours in (('Dense_0', 'fc1'), ('Dense_1', 'fc2')):
    name = f'{layer}mlp.{ours}'
    arrays[f'{block}MlpBlock_0/{theirs}/kernel'] = stack(
      f'{name}.weight', np.transpose
    )
    arrays[f'{block}MlpBlock_0/{theirs}/bias'] = stack(f'{name}.bias')
  heads, width = VISION['num_attention_heads'], VISION['hidden_size']
  attention = f'{block}MultiHeadDotProductAttention_0/'
  for theirs, ours in (('query', 'q'), ('key', 'k'), ('value', 'v')):
    name = f'{layer}self_attn.{ours}_proj'
    arrays[f'{attention}{theirs}/kernel'] = stack(
      f'{name}.weight', lambda w: w.T.reshape(width, heads, -1)
    )
    arrays[f'{attention}{theirs}/bias'] = stack(
      f'{name}.bias', lambda b: b.reshape(heads, -1)
    )
  name = f'{layer}self_attn.out_proj'
  arrays[f'{attention}out/kernel'] = stack(
    f'{name}.weight', lambda w: w.T.reshape(heads, -1, width)
  )
  arrays[f'{attention}out/bias'] = stack(f'{name}.bias')
  patches = state[f'{vision}embeddings.patch_embedding.weight']
  arrays |= {
    'params/img/embedding/kernel': patches.transpose(2, 3, 1, 0),
    'params/img/embedding/bias': state[
      f'{vision}embeddings.patch_embedding.bias'
    ],
    'params/img/pos_embedding': state[
      f'{vision}embeddings.position_embedding.weight'
    ][None],
    'params/img/Transformer/encoder_norm/scale': state[
      f'{vision}post_layernorm.weight'
    ],
    'params/img/Transformer/encoder_norm/bias': state[
      f'{vision}post_layernorm.bias'
    ],
    'params/img/head/kernel': state['multi_modal_projector.linear.weight'].T,
    'params/img/head/bias': state['multi_modal_projector.linear.bias'],
    'params/llm/embedder/input_embedding': state[f'{text}embed_tokens.weight'][
      :IMAGE
    ],
    'params/llm/final_norm/scale': state[f'{text}norm.weight'],
  }
  layer, theirs = text + 'layers.{}.', 'params/llm/layers/'
  K = TEXT['head_dim']
  q = stack(
    f'{layer}self_attn.q_proj.weight',
    lambda w: w.reshape(-1, K, width).transpose(0, 2, 1),
  )
  k, v = (
    stack(
      f'{layer}self_attn.{name}_proj.weight',
      lambda w: w.reshape(-1, K, width).transpose(0, 2, 1),
    )
    for name in 'kv'
  )
  gate, up = (
    stack(f'{layer}mlp.{name}_proj.weight', np.transpose)
    for name in ('gate', 'up')
  )
  arrays |= {
    f'{theirs}attn/q_einsum/w': q,
    f'{theirs}attn/kv_einsum/w': np.stack([k, v], 1),
    f'{theirs}attn/attn_vec_einsum/w': stack(
      f'{layer}self_attn.o_proj.weight', lambda w: w.T.reshape(-1, K, width)
    ),
    f'{theirs}mlp/gating_einsum': np.stack([gate, up], 1),
    f'{theirs}mlp/linear': stack(f'{layer}mlp.down_proj.weight', np.transpose),
    f'{theirs}pre_attention_norm/scale': stack(
      f'{layer}input_layernorm.weight'
    ),
    f'{theirs}pre_ffw_norm/scale': stack(
      f'{layer}post_attention_layernorm.weight'
    ),
  }
  return arrays


if __name__ == '__main__':
  main()
