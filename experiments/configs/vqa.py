"""What every study of questions about images sets, and their rows."""

from experiments.configs import base as every

# q, k, v and o of the decoder, and the tower's that are called the same: as
# Hugging Face's target modules q_proj, k_proj, v_proj and o_proj are taken.
LORA_MODULES = (
  r'decoder\..*\.attn\.(query|key|value|out)'
  r'|vision\..*\.attn\.(query|key|value)'
)


def base():
  """`configs.base.base` and the keys of questions about images."""
  config = every.base()
  config.update(
    {
      'task': 'vqa',
      'image_size': 224,  # pixels, a multiple of the patch size
      'prompt': 'answer en {}',  # with {} for the question
      'separator': '\n',  # behind it, tokenised apart
      # Tokens of prompt and answer together, in training and validation; sets
      # that ask longer questions have longer rows.
      'text_length': 48,
      'answer_length': 10,  # the most of an answer, its end among them
      'options': (),  # answers to choose from; () to generate alone
      'head': 'tied',  # to the embeddings; or 'untied', a copy to be trained
      # The projector and, merged, LoRA on the decoder.
      'first_stage': every.first_stage(
        learning_rate=1e-3,
        lora=16,  # rank, and alpha is as much
        lora_modules=r'decoder\..*',
      ),
    }
  )
  return config


def lora_methods(weight_decay, strengths, **lora):
  """AdamW, L2-SP and Adam-SPD of LoRA, and WiSE-FT of its product.

  L2-SP and SPD pull both factors to zero.

  Args:
    weight_decay: AdamW's.
    strengths: of SPD.
    **lora: keys of `configs.base.method`.
  """
  method = every.method
  spd = {
    f'spd_{strength:g}'.replace('.', ''): method(
      'Adam-SPD', optimizer='adam', spd=strength, anchor='origin', **lora
    )
    for strength in strengths
  }
  averages = {
    f'wise_ft_{round(100 * alpha)}': method(
      'WiSE-FT', average_of='adamw', alpha=alpha
    )
    for alpha in (0.25, 0.5, 0.75)
  }
  return {
    'zero_shot': method('start'),
    'adamw': method(
      'AdamW', optimizer='adamw', weight_decay=weight_decay, **lora
    ),
    'l2sp': method('L2-SP', optimizer='l2sp_origin', weight_decay=1e-2, **lora),
    **spd,
    **averages,
  }
