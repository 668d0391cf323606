"""What every study of images sets, and the recipe of the paper's."""

import pathlib

from experiments.configs.base import base as every_study
from experiments.configs.base import first_stage, method, methods

_PROMPTS = pathlib.Path(__file__).parents[1] / 'prompts'


def base():
  """`configs.base.base` and the keys of image classification, all switched off.

  `paper` switches the parts on.
  """
  config = every_study()
  config.model.drop_path = 0.0  # stochastic depth of the last block
  config.update(
    {
      'image_size': 224,  # pixels, a multiple of the patch size
      'num_classes': 0,  # 0: as many as the training set has
      'head': 'linear_probe',  # that theta_0 starts from; HEADS has the others
      # Of a zero-shot head: a file, a line each, with {}.
      'prompts': str(_PROMPTS / 'photo.txt'),
      'class_names': '',  # the same: a file, a line each; '' for the data's own
      'balanced_loss': False,  # every class counts the same
      'eval_crop': 1.0,  # side of the centre crop, as a share; DeiT: 0.875
      # Of what the study trains: a head as above, and then all of it.
      'first_stage': first_stage(),
      # The recipe. Augmentation and mixing need first_block = 0.
      'augment': False,
      'crop_scale': (0.08, 1.0),  # share of the area; DeiT default
      'flip': 0.5,  # probability; DeiT default
      'randaugment': True,  # rand-m9-mstd0.5-inc1; DeiT default
      'erasing': 0.25,  # probability; DeiT default
      'mixup': 0.0,  # alpha of the Beta distribution
      'cutmix': 0.0,
      'mix_probability': 1.0,  # DeiT default
      'mix_switch': 0.5,  # probability of CutMix, if both are on; DeiT default
      'label_smoothing': 0.0,
    }
  )
  return config


def paper():
  """What the SPD paper's image studies share: CLIP, the recipe, the methods.

  The paper names CLIP ViT-B, weight decay 0.1 (AdamW's), drop path 0.2, label
  smoothing 0.1, Mixup 0.8, CutMix 1.0 and the rate 2e-5. The rest is the
  default of the DeiT code that it builds on, and marked so, here and in `base`.
  Left out are DeiT's evaluation crop, which is not CLIP's, its rates scaled by
  the batch, and epochs at the minimum rate after the cosine.
  """
  config = base()
  config.model.update(
    name='clip_b16',
    pretrained='openai/clip-vit-base-patch16',
    dtype='bfloat16',
    drop_path=0.2,
  )
  config.update(
    head='zero_shot',
    num_workers=8,
    augment=True,
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
    batch_size=64,  # DeiT default
    learning_rate=2e-5,
    warmup_learning_rate=1e-6,  # DeiT default
    min_learning_rate=1e-5,  # DeiT default
  )
  probe = {'optimizer': 'adamw', 'train': 'head', 'rate': 50.0}
  from_probe = {'weight_decay': 0.1, 'starts_from': 'linear_probe'}
  config.methods.update(
    {
      'zero_shot': method('zero-shot'),
      'linear_probe': method('linear probe', **probe),
      'lp_ft': method('LP-FT', optimizer='adamw', **from_probe),
      **methods(),
    }
  )
  return config
