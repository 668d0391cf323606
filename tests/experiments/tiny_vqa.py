"""A study of questions of a minute's worth of nothing."""

import dataclasses
import pathlib

import numpy as np

from experiments.configs import base, vqa
from experiments.models import vision_language
from tests.experiments.data import vqa_files

_THREE_B = vision_language.CONFIGS['paligemma_3b']
# Of the checkpoint that `make_paligemma` writes.
PALIGEMMA = dataclasses.replace(
  _THREE_B,
  vision=dataclasses.replace(
    _THREE_B.vision,
    patch_size=4,
    width=16,
    depth=2,
    num_heads=2,
    mlp_dim=24,
    grid=3,
  ),
  decoder=dataclasses.replace(
    _THREE_B.decoder,
    vocab_size=364,
    width=16,
    depth=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=24,
  ),
)
CHECKPOINT = pathlib.Path(__file__).parent / 'pretrained/reference/paligemma'
PREFIXES = ([2, 40, 41, 42, 5], [2, 50, 51, 40, 41, 43, 44, 5])
SUFFIXES = ([60, 61, 1], [62, 1])


def write_questions(folder):
  """Noise of a colour, in VQAv2's files; what it is asked is hard to see."""
  rng = np.random.default_rng(2)
  for year, first in (('train2014', 100), ('val2014', 200)):
    questions, annotations = [], []
    for image in range(first, first + 60):
      color = rng.integers(0, 3)
      pixels = rng.normal(100, 70, (14, 12, 3))
      pixels[..., color] += 40
      name = f'coco/{year}/COCO_{year}_{image:012d}.jpg'
      vqa_files.write_pixels(
        folder / name, np.clip(pixels, 0, 255).astype(np.uint8)
      )
      asked = vqa_files.ask(image, text=f'is it {rng.choice(["red", "blue"])}?')
      is_so = asked['question'] == ('is it red?', '', 'is it blue?')[color]
      ten = ['yes' if is_so else 'no'] * 8 + ['red', 'blue']
      questions.append(asked)
      annotations.append(vqa_files.annotation(asked, ten))
    vqa_files.write_pair(
      folder / 'vqav2', vqa_files.years(year), questions, annotations
    )


def get_config(arg=''):
  """AdamW and SPD on the files of `write_questions`; `arg` is their folder."""

  def part(split):
    place = {'path': 'vqav2', 'root': 'coco', 'split': split}
    return {'kind': 'vqa', 'name': 'vqav2', **place}

  config = vqa.base()
  config.update(
    title='questions about noise',
    data_dir=arg,
    output_dir='runs/tiny',
    image_size=12,
    prompt='{}',
    text_length=20,
    answer_length=6,
    options=('yes', 'no', 'red'),
    head='untied',
    train=part('train'),
    val=part('val'),
    eval_sets={'ID': part('test')},
    metrics=('accuracy', 'generated'),
    num_steps=24,
    batch_size=16,
    eval_batch_size=16,  # of 30: the last batch is filled up
    eval_every=8,
    save_every=3,
    log_every=2,
    learning_rate=1e-2,
  )
  config.model.update(name='paligemma_3b', pretrained=str(CHECKPOINT))
  config.methods.update(
    {
      'zero_shot': base.method('start'),
      'adamw': base.method('AdamW', optimizer='adamw', weight_decay=0.1),
      'spd_1': base.method('Adam-SPD', optimizer='adam', spd=1.0),
    }
  )
  return config
