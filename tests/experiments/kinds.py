"""The kinds of studies, each with a tiny one: a new kind adds a line."""

from typing import Any, NamedTuple

from experiments import study
from experiments.configs import base
from experiments.models import vision_language
from tests.experiments import (
  tiny_questions,
  tiny_segmentation,
  tiny_study,
  tiny_vqa,
  toy,
)


class Kind(NamedTuple):
  """One of them.

  Attributes:
    module: its tiny study, with `get_config(folder)`; the folder has images,
      masks, and questions.
    lora_modules: what LoRA adapts in its model.
    everything: keys of all that is drawn at random in a step of it.
    lives: how often a run of it is killed.
    first_block: from which on it can be trained, above 0.
    lower: beginning of the paths of params that are below that.
    lora_rate: of LoRA, as a share of the study's, so that SPD acts on it.
    rtol: of losses, where sums in another order grow from step to step.
  """

  module: Any
  lora_modules: str
  everything: dict[str, Any]
  lives: int
  first_block: int = 1
  lower: tuple[str | int, ...] = ('backbone', 'blocks', 0)
  lora_rate: float = 1.0
  rtol: float = 0.0


KINDS = {
  'classification': Kind(
    tiny_study,
    r'.*\.attn\.(query|value)',
    {'augment': True, 'mixup': 0.8, 'cutmix': 1.0, 'model.drop_path': 0.2},
    lives=20,
  ),
  'segmentation': Kind(
    tiny_segmentation,
    r'.*\.attn\.(query|value)',
    {'augment': True, 'model.drop_path': 0.2},
    lives=6,
  ),
  'multiple_choice': Kind(
    tiny_questions,
    r'.*\.attn\.(query|value)',
    {},
    lives=4,
    lower=('blocks', 0),
    lora_rate=10.0,
    rtol=1e-3,
  ),
  'vqa': Kind(
    tiny_vqa,
    r'decoder\..*\.attn\.(query|value)',
    {},
    lives=4,
    first_block=2,
    lower=('vision',),
    rtol=1e-3,
  ),
  'regression': Kind(toy, r'blocks\.\d', {}, lives=4, lower=('blocks', 0)),
}


class Stop(Exception):  # noqa: N818
  """As a kill does, it leaves what is on disk."""


def install():
  """Makes the kinds of the tests known, for as long as the process runs."""
  study.KINDS['regression'] = toy
  vision_language.CONFIGS['paligemma_3b'] = tiny_vqa.PALIGEMMA


def tiny(name, folder):
  """The tiny study of a kind, with LoRA among its methods."""
  kind = KINDS[name]
  config = kind.module.get_config(str(folder))
  lora = {
    'optimizer': 'adam',
    'rate': kind.lora_rate,
    'lora': 2,
    'lora_modules': kind.lora_modules,
  }
  config.methods.update(
    {
      'lora': base.method('LoRA', **lora),
      'lora_spd': base.method('LoRA-SPD', spd=1.0, anchor='origin', **lora),
      # So slow that it stays where it starts.
      'lora_after': base.method(
        'LoRA, on', starts_from='lora', **lora | {'rate': 1e-6}
      ),
      'lora_wise_ft': base.method('WiSE', average_of='lora', alpha=0.25),
    }
  )
  return config
