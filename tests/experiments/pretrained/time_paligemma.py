"""Times a LoRA step and greedy decoding of PaliGemma, beside transformers'.

  python -m tests.experiments.pretrained.time_paligemma

from the repository's root, with the extra `reference` installed. Both have two
blocks of PaliGemma-3B's full width in each tower and random weights, 224
pixels, 16 + 4 tokens of text, batch 2, float32, all cores; both train LoRA of
rank 8 on q, k, v and o with AdamW. They take turns; the medians of ten are
printed, as a row of JSON.
"""

import dataclasses
import json
import time

import jax
import numpy as np
import peft
import torch
import transformers
from flax import nnx

from experiments import optimizers, parallel, report, train
from experiments.configs import base, vqa_paligemma
from experiments.models import lora, vision_language
from experiments.tasks import vqa

BATCH, PREFIX, SUFFIX, ANSWER, TURNS = 2, 16, 4, 10, 10
WHOLE = vision_language.CONFIGS['paligemma_3b']
CONFIG = dataclasses.replace(
  WHOLE,
  vision=dataclasses.replace(WHOLE.vision, depth=2),
  decoder=dataclasses.replace(WHOLE.decoder, depth=2),
)


def main():
  ours, theirs = make_ours(), make_theirs()
  times = {f'{who} {what}': [] for who in ('our', 'their') for what in ours}
  for turn in range(TURNS + 1):
    for who, functions in (('our', ours), ('their', theirs)):
      for what, function in functions.items():
        since = time.perf_counter()
        function()
        if turn:  # the first one compiles
          times[f'{who} {what}'].append(time.perf_counter() - since)
  medians = {name: float(np.median(all_of)) for name, all_of in times.items()}
  print(json.dumps(report.provenance() | medians))


def make_ours():
  """{'step': function, 'decoding': function}."""
  model = vision_language.VisionLanguage(CONFIG, rngs=nnx.Rngs(0))
  method = base.method('', optimizer='adamw', **vqa_paligemma._LORA)
  model = lora.add(
    model,
    method.lora,
    method.lora_alpha,
    modules=method.lora_modules,
    dropout=method.lora_dropout,
    rngs=nnx.Rngs(0),
  )
  graphdef, params, frozen = nnx.split(model, nnx.LoRAParam, ...)
  task = vqa.VQA(ANSWER, -1, (), (), ('accuracy',))  # no answer ends
  layout = parallel.layout('replicated')
  config = vqa_paligemma.get_config()
  config.update(num_steps=100)
  config.accumulate = 1
  tuning = train.FineTuning(
    task, graphdef, params, frozen, None, {}, config, layout
  )
  method, hyperparams = optimizers.from_config(config, method)
  state = [tuning.init(method, hyperparams, params)]
  program = tuning.program(method)
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (BATCH, 224, 224, 3), np.uint8),
    'ids': rng.integers(5, 1000, (BATCH, PREFIX + SUFFIX), np.int32),
    'prefix': np.full(BATCH, PREFIX, np.int32),
    'length': np.full(BATCH, PREFIX + SUFFIX, np.int32),
  }

  def step():
    state[0], metrics = train.jit_step(
      program, frozen, params, state[0], batch, 0, 1, hyperparams
    )
    jax.block_until_ready(metrics)

  outputs = jax.jit(
    lambda state: task.outputs(nnx.merge(graphdef, *state), batch)
  )
  return {
    'step': step,
    'decoding': lambda: jax.block_until_ready(outputs((params, frozen))),
  }


def make_theirs():
  vision, decoder = CONFIG.vision, CONFIG.decoder
  config = transformers.PaliGemmaConfig(
    vision_config={
      'model_type': 'siglip_vision_model',
      'hidden_size': vision.width,
      'intermediate_size': vision.mlp_dim,
      'num_hidden_layers': vision.depth,
      'num_attention_heads': vision.num_heads,
      'patch_size': vision.patch_size,
      'image_size': vision.image_size,
      'vision_use_head': False,
    },
    text_config={
      'model_type': 'gemma',
      'vocab_size': decoder.vocab_size,
      'hidden_size': decoder.width,
      'intermediate_size': decoder.mlp_dim,
      'num_hidden_layers': decoder.depth,
      'num_attention_heads': decoder.num_heads,
      'num_key_value_heads': decoder.num_kv_heads,
      'head_dim': decoder.head_dim,
    },
    image_token_id=257_152,
    projection_dim=decoder.width,
  )
  model = peft.get_peft_model(
    transformers.PaliGemmaForConditionalGeneration(config),
    peft.LoraConfig(
      r=8,
      lora_alpha=16,
      lora_dropout=0.05,
      target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj'],
    ),
  )
  optimizer = torch.optim.AdamW(
    [p for p in model.parameters() if p.requires_grad]
  )
  text = torch.randint(5, 1000, (BATCH, PREFIX + SUFFIX))
  images = torch.full((BATCH, vision.grid**2), 257_152)
  ids = torch.cat([images, text], 1)
  asked = ids.shape[1] - SUFFIX
  types = torch.zeros_like(ids)
  types[:, asked:] = 1
  labels = torch.where(types == 1, ids, -100)
  pixels = torch.rand(BATCH, 3, 224, 224) * 2 - 1

  def step():
    model.train()
    optimizer.zero_grad()
    model(
      input_ids=ids,
      pixel_values=pixels,
      token_type_ids=types,
      attention_mask=torch.ones_like(ids),
      labels=labels,
    ).loss.backward()
    optimizer.step()

  def decoding():
    model.eval()
    with torch.no_grad():
      model.generate(
        input_ids=ids[:, :asked],
        pixel_values=pixels,
        token_type_ids=types[:, :asked],
        attention_mask=torch.ones_like(ids[:, :asked]),
        max_new_tokens=ANSWER,
        min_new_tokens=ANSWER,
        do_sample=False,
      )

  return {'step': step, 'decoding': decoding}


if __name__ == '__main__':
  main()
