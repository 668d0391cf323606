"""ImageNet and its shifted test sets; CLIP ViT-B/16 and its text tower.

python -m experiments.compare --config=imagenet --config.data_dir=DIR

Fine-tunes on ImageNet (a hundredth of its training set, held out by seed 0,
chooses the step), tests on its validation set (ID) and on V2, A, R and Sketch
(OOD). A and R are scored on their own 200 classes. DIR is the data_dir of
tensorflow-datasets with imagenet2012, imagenet_v2/matched-frequency,
imagenet_a, imagenet_r and imagenet_sketch prepared in it.
`--config=imagenet:files` reads folders of classes instead:
DIR/imagenet/{train,val}, DIR/imagenet-v2 (folders 0 to 999), DIR/imagenet-a,
DIR/imagenet-r, DIR/imagenet-sketch.

The names of the classes have to be OpenAI's, not WordNet's: a file of a
thousand lines, --config.class_names=FILE; `models/clip.py` says how to write
it, and one of OpenAI's 80 prompts, --config.prompts=FILE.

Zero-shot accuracies of CLIP ViT-B/16 to check a set-up with, with those
prompts: 67.82 on ImageNet, V2 61.19, A 50.97, R 75.73, Sketch 45.57; after
fine-tuning without SPD 84.27, 74.78, 45.54, 65.05, 48.28 (TPGM's README).

If the hub has no safetensors of the checkpoint on its main branch, name a
revision that has, --config.model.pretrained=openai/clip-vit-base-patch16@REF,
or a folder to which transformers saved it.

Hardware and time: not run here at full size, for want of the weights and the
images. 1.27 million images for 30 epochs are about 595,000 steps of 64.
"""

from experiments.configs.images import paper


def get_config(arg=''):
  """ImageNet.

  Args:
    arg: '' for tensorflow-datasets, 'files' for folders.
  """
  if arg not in ('', 'files'):
    raise ValueError(f"imagenet:{arg} is unknown; it is '' or 'files'.")

  def split(name, part):
    if arg == 'files':
      folder = name.partition('/')[0].replace('_', '-').removesuffix('2012')
      path = f'{folder}/{part}' if folder == 'imagenet' else folder
      return {'kind': 'folder', 'path': path, 'classes': 'imagenet'}
    part = {'train': 'train', 'val': 'validation'}.get(part, part)
    return {'kind': 'tfds', 'name': name, 'split': part}

  def part(take):
    held_out = {'shares': (0.99, 0.01), 'take': take, 'seed': 0}
    return {**split('imagenet2012', 'train'), 'part': held_out}

  config = paper()
  config.update(
    title='ImageNet, CLIP ViT-B/16',
    output_dir='runs/imagenet',
    num_classes=1000,
    train=part(0),
    val=part(1),
    eval_sets={
      'imagenet': split('imagenet2012', 'val'),
      'V2': split('imagenet_v2/matched-frequency', 'test'),
      'A': {**split('imagenet_a', 'test'), 'only': 'imagenet_a'},
      'R': {**split('imagenet_r', 'test'), 'only': 'imagenet_r'},
      'Sketch': split('imagenet_sketch', 'test'),
    },
    means={'OOD mean': ('V2', 'A', 'R', 'Sketch')},
    num_epochs=30.0,
    warmup=5 / 30,  # DeiT default: 5 epochs
    eval_every=5000,
  )
  return config
