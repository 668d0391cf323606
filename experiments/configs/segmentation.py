"""What every study of semantic segmentation sets, and their rows."""

from experiments.configs import base as every

CORRUPTIONS = ('fog', 'defocus_blur', 'gaussian_noise', 'brightness')
SEVERITIES = (1, 3, 5)


def base():
  """`configs.base.base` and the keys of segmentation, all switched off."""
  config = every.base()
  config.model.drop_path = 0.0  # stochastic depth of the last block
  config.update(
    {
      'task': 'segmentation',
      # Height and width, in pixels: multiples of a ViT's patch size.
      'image_size': (224, 224),
      # Of whole images, in evaluation; () for image_size.
      'eval_size': (),
      'eval_resize': True,  # scale them to fit; else they have to as they are
      'num_classes': 0,  # 0: as many as the training set has
      'decoder': 'linear',  # of a ViT; 'mlp': SegFormer's, of a Swin
      'head': 'linear_probe',  # that theta_0 starts from; or 'new'
      'metrics': ('miou', 'pixel_accuracy'),
      # Augmentation, of image and mask alike, needs first_block = 0.
      'augment': False,
      'crop_scale': (0.5, 2.0),  # factor of the sides of an image
      'flip': 0.5,  # probability
      # An example is a picture.
      'batch_size': 4,
      'eval_batch_size': 8,
    }
  )
  return config


def corrupted(source):
  """A source under each corruption, `{'fog 1': source, ...}`."""
  return {
    f'{name} {severity}': {
      **source,
      'corruption': {'name': name, 'severity': severity},
    }
    for name in CORRUPTIONS
    for severity in SEVERITIES
  }


def means():
  """Of the sets of `corrupted`: each corruption's, and that of all."""
  sets = {
    name: tuple(f'{name} {severity}' for severity in SEVERITIES)
    for name in CORRUPTIONS
  }
  return sets | {'corruptions': sum(sets.values(), ())}


def methods():
  """`configs.base.methods`, LoRA, and SPD that leaves the decoder to itself.

  The decoder is not pretrained: the other rows of SPD pull it back to where it
  starts.
  """
  # Ten times the rate of all weights, as is usual.
  lora = {'lora': 8, 'rate': 10.0}
  return {
    **every.methods(),
    'spd_1_free': every.method(
      'Adam-SPD, decoder free', optimizer='adam', spd=1.0, anchor_head=False
    ),
    'lora': every.method('LoRA', optimizer='adamw', weight_decay=0.1, **lora),
    'lora_spd': every.method(
      'LoRA, Adam-SPD', optimizer='adam', spd=1.0, anchor='origin', **lora
    ),
    'lora_wise_ft': every.method(
      'WiSE-FT of LoRA', average_of='lora', alpha=0.5
    ),
  }
