"""Makes beams.npz: what transformers' beam search finds (extra `reference`).

python tests/experiments/models/make_beams.py
"""

import pathlib

import numpy as np
import torch
import transformers

LENGTHS = (7, 3, 5, 6, 2, 4, 7, 7)
END = 16  # an id that comes often


def main():
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    rms_norm_eps=1e-6,
    bos_token_id=0,
    eos_token_id=END,
    tie_word_embeddings=False,
  )
  model = transformers.LlamaForCausalLM(config).eval()
  with torch.no_grad():
    for param in model.parameters():
      param.add_(torch.randn_like(param) * 0.25)
  ids = np.random.default_rng(0).integers(2, 50, (len(LENGTHS), 7))
  found = {}
  for number, num_beams in ((1, 4), (5, 4), (12, 4), (12, 2)):
    rows = []
    for row, length in zip(ids, LENGTHS, strict=True):
      text = model.generate(
        torch.tensor(row[None, :length]),
        attention_mask=torch.ones(1, length, dtype=torch.long),
        num_beams=num_beams,
        do_sample=False,
        max_new_tokens=number,
        pad_token_id=END,
      )[0, length:].tolist()
      rows.append(text + [END] * (number - len(text)))
    found[f'beams_{number}_{num_beams}'] = np.array(rows, np.int32)
  params = {k: v.numpy() for k, v in model.state_dict().items()}
  np.savez_compressed(
    pathlib.Path(__file__).with_name('beams.npz'),
    ids=ids.astype(np.int32),
    lengths=np.array(LENGTHS, np.int32),
    **found,
    **params,
  )


if __name__ == '__main__':
  main()
