"""PASCAL-Context: what every pixel of VOC 2010's pictures shows; Swin-Tiny.

python -m experiments.compare --config=pascal_context:21 --config.data_dir=DIR

Fine-tunes a Swin-Tiny of ImageNet-21K with SegFormer's all-MLP decoder, a new
one, and tests on the validation split (ID) and on it under fog, defocus blur,
gaussian noise and brightness, of severity 1, 3 and 5 each (OOD). A tenth of the
training split, held out by seed 0, chooses the step.

The argument is the number of classes. 21: those of VOC, in DIR/PASCAL_MT; whole
images are seen as they are, on 512 x 512. 59 or 60, without the background or
with it: DIR/VOCdevkit/VOC2010, boxes of 480 x 480 in training and whole images
scaled to 520 x 520. `data.masks.open_pascal_context` names the files of both.

The paper names the model, the data and the corruptions; boxes, scales and the
size in tests are those usual for 59 and 60 classes. Epochs, batch, rate and
drop path are ours.

Hardware and time: not run here at full size, for want of the weights and the
images. The paper took four RTX 2080 Ti. Nine tenths of the 4,998 images for 60
epochs are 8,434 steps of 32.

References:
  Mottaghi et al., "The Role of Context for Object Detection and Semantic
  Segmentation in the Wild", 2014.
"""

from experiments.configs.base import method
from experiments.configs.segmentation import base, corrupted, means, methods

SIZES = {'21': (512, 512), '59': (480, 480), '60': (480, 480)}


def get_config(classes='21'):
  """PASCAL-Context.

  Args:
    classes: a key of `SIZES`.
  """
  if classes not in SIZES:
    raise ValueError(
      f'pascal_context:{classes} is unknown; it is one of {", ".join(SIZES)}, '
      'the number of classes.'
    )

  def split(name):
    path = 'PASCAL_MT' if classes == '21' else 'VOCdevkit/VOC2010'
    source = {'kind': 'pascal_context', 'path': path}
    return {**source, 'split': name, 'classes': classes}

  def part(take):
    held_out = {'shares': (0.9, 0.1), 'take': take, 'seed': 0}
    return {**split('train'), 'part': held_out}

  config = base()
  config.update(
    title=f'PASCAL-Context, {classes} classes, Swin-Tiny',
    output_dir=f'runs/pascal_context_{classes}',
    num_classes=int(classes),
    image_size=SIZES[classes],
    decoder='mlp',
    head='new',
    train=part(0),
    val=part(1),
    eval_sets={'clean': split('val'), **corrupted(split('val'))},
    means=means(),
    num_workers=8,
    augment=True,
    num_epochs=60.0,
    batch_size=32,
    eval_every=500,
  )
  if classes == '21':
    config.eval_resize = False
  else:
    config.eval_size = (520, 520)
  config.model.update(
    name='swin_t',
    pretrained='timm/swin_tiny_patch4_window7_224.ms_in22k',
    dtype='bfloat16',
    drop_path=0.2,
  )
  decoder = {'optimizer': 'adamw', 'train': 'head', 'weight_decay': 0.1}
  config.methods.update({'decoder': method('decoder', **decoder), **methods()})
  return config
