"""A study of questions of a minute's worth of nothing, and a tiny LLaMA."""

import json

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from experiments.configs import base, text
from tests.experiments.data import questions

SIZES = {
  'vocab_size': 64,
  'hidden_size': 16,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 4,
  'intermediate_size': 24,
  'rms_norm_eps': 1e-5,
  'rope_theta': 10_000.0,
  'max_position_embeddings': 256,
  'tie_word_embeddings': True,
}
_WORDS = (
  *('<unk>', '<s>', '</s>', '\n', ':', '?', '/', '.', ' no', 'Question'),
  *('Answer', ' Answer', ' which', ' of', ' them', ' is', 'which', 'answer'),
  *(f' {thing}' for thing in questions.THINGS),
  *(f'{kind}{i}' for kind in ('answer', ' answer') for i in range(1, 5)),
  *(f' {i}' for i in range(12)),
  *(' negative', ' positive'),
)


def write(folder):
  """Files of questions, whose answer they name; a checkpoint and tokenizer."""
  questions.write(folder / 'questions' / 'all.json', 200)
  write_checkpoint(folder / 'llama')


def write_checkpoint(folder):
  """Random weights, in the names of transformers."""
  rng = np.random.default_rng(0)
  D, F = SIZES['hidden_size'], SIZES['intermediate_size']
  heads, shared = (
    SIZES[f'num_{name}_heads'] * SIZES['head_dim']
    for name in ('attention', 'key_value')
  )
  shapes = {
    'self_attn.q_proj': (heads, D),
    'self_attn.k_proj': (shared, D),
    'self_attn.v_proj': (shared, D),
    'self_attn.o_proj': (D, heads),
    'mlp.gate_proj': (F, D),
    'mlp.up_proj': (F, D),
    'mlp.down_proj': (D, F),
  }
  tensors = {
    'model.embed_tokens.weight': rng.normal(0, 0.3, (SIZES['vocab_size'], D)),
    'model.norm.weight': np.ones(D),
  }
  for layer in range(SIZES['num_hidden_layers']):
    prefix = f'model.layers.{layer}.'
    for name, shape in shapes.items():
      tensors[f'{prefix}{name}.weight'] = rng.normal(0, 0.3, shape)
    for name in ('input_layernorm', 'post_attention_layernorm'):
      tensors[f'{prefix}{name}.weight'] = np.ones(D)
  folder.mkdir(parents=True)
  safetensors.numpy.save_file(
    {name: array.astype(np.float32) for name, array in tensors.items()},
    folder / 'model.safetensors',
  )
  config = {
    'model_type': 'llama',
    'architectures': ['LlamaForCausalLM'],
    'hidden_act': 'silu',
    'bos_token_id': 1,
    'eos_token_id': 2,
    **SIZES,
  }
  (folder / 'config.json').write_text(json.dumps(config))
  vocabulary = [*_WORDS, *(f'<{i}>' for i in range(len(_WORDS), 64))]
  tokenizer = tokenizers.Tokenizer(
    models.WordLevel({word: i for i, word in enumerate(vocabulary)}, '<unk>')
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Split(
    tokenizers.Regex(r' ?\w+|[^\w]'), 'isolated'
  )
  tokenizer.decoder = decoders.Fuse()
  tokenizer.save(str(folder / 'tokenizer.json'))
  about = {'bos_token': '<s>', 'eos_token': '</s>'}
  (folder / 'tokenizer_config.json').write_text(json.dumps(about))


def get_config(arg=''):
  """AdamW and SPD on the questions of `write`; `arg` is their folder."""

  def part(take):
    part = {'shares': (0.6, 0.2, 0.2), 'take': take, 'seed': 0}
    return {'kind': 'questions', 'path': 'questions/all.json', 'part': part}

  config = text.base()
  config.update(
    title='questions',
    data_dir=arg,
    output_dir='runs/tiny',
    max_length=40,
    train=part(0),
    val=part(1),
    eval_sets={'ID': part(2)},
    num_steps=24,
    batch_size=16,
    eval_batch_size=16,  # of 20: the last batch is filled up
    eval_every=8,
    save_every=3,
    log_every=2,
    learning_rate=1e-2,
  )
  config.model.pretrained = f'{arg}/llama'
  config.methods.update(
    {
      'zero_shot': base.method('start'),
      'adamw': base.method('AdamW', optimizer='adamw', weight_decay=0.1),
      'spd_1': base.method('Adam-SPD', optimizer='adam', spd=1.0),
    }
  )
  return config
