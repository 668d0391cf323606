"""What every study of semantic segmentation sets."""

from experiments.configs.base import base as every_study


def base():
  """`configs.base.base` and the keys of segmentation, all switched off."""
  config = every_study()
  config.model.drop_path = 0.0  # stochastic depth of the last block
  config.update(
    {
      'task': 'segmentation',
      # Height and width, in pixels: a multiple of a ViT's patch size.
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
      # One example is as large as a picture.
      'batch_size': 4,
      'eval_batch_size': 8,
    }
  )
  return config
