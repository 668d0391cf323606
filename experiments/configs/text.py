"""What every study of a language model sets."""

from experiments.configs.base import base as every_study
from experiments.configs.base import method


def base():
  """`configs.base.base` and the keys of questions to a language model."""
  config = every_study()
  config.update(
    {
      'task': 'multiple_choice',
      'max_length': 256,  # tokens of a row, which training examples share
      'cut': False,  # a longer example, to max_length; else it is refused
      'template': 'question',  # a key of data.prompts.TEMPLATES
      'response': 'option',  # a key of data.prompts.RESPONSES
      'train_on_inputs': False,  # the loss is of the prompt too
      'answers': 'scores',  # of the eval sets; or greedy, or beam
      'num_beams': 4,
      'max_new_tokens': 32,  # of an answer in text
    }
  )
  return config


def lora_methods(lora):
  """The methods of the tables, of adapters; theta_0 comes first.

  L2-SP and SPD pull both factors back to zero. The last two are ablations, run
  where --methods names them: A anchored where it starts, and SPD on B alone.

  Args:
    lora: the keys of `method` that all of them share, rank and modules.
  """
  adam = {'optimizer': 'adam', **lora}
  adamw = {'optimizer': 'adamw', **lora}
  return {
    'zero_shot': method('zero-shot'),
    'adamw_0': method('AdamW, wd 0', **adamw),
    'adamw': method('AdamW, wd 0.01', weight_decay=0.01, **adamw),
    'adam': method('Adam', optional=True, **adam),
    'l2sp': method(
      'L2-SP to zero', weight_decay=0.01, **lora, optimizer='l2sp_origin'
    ),
    'spd_03': method('Adam-SPD', spd=0.3, anchor='origin', **adam),
    'spd_1': method('Adam-SPD', spd=1.0, anchor='origin', **adam),
    'wise_ft': method('WiSE-FT', average_of='adamw', alpha=0.5),
    'spd_1_start': method(
      'Adam-SPD, A to its start', spd=1.0, optional=True, **adam
    ),
    'spd_1_b': method(
      'Adam-SPD, B alone', spd=1.0, anchor='origin_b', optional=True, **adam
    ),
  }
