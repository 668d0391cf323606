"""A study of segmentation of a minute's worth of nothing: noise with masks."""

import numpy as np
from PIL import Image

from experiments.configs import base, segmentation
from tests.experiments import tiny_study


def write_masks(folder):
  """Noise, brighter or darker by its class; some of it is void."""
  rng = np.random.default_rng(1)
  for name in ('pixels', 'masks'):
    (folder / name).mkdir(parents=True)
  (folder / 'classes.txt').write_text('dark\nmiddle\nbright\n')
  for i in range(120):
    cells = rng.integers(0, 3, (5, 4))
    mask = np.kron(cells, np.ones((4, 4), int))
    noise = rng.normal(100 + 20 * mask[..., None], 90, (20, 16, 3))
    pixels = np.clip(noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / 'pixels' / f'{i}.png')
    mask = np.where(rng.random(mask.shape) < 0.1, 255, mask)
    Image.fromarray(mask.astype(np.uint8)).save(folder / 'masks' / f'{i}.png')


def get_config(arg=''):
  """AdamW and SPD on the pictures of `write_masks`; `arg` is their folder."""

  def part(take):
    part = {'shares': (0.6, 0.2, 0.2), 'take': take, 'seed': 0}
    paths = {'path': 'pixels', 'masks': 'masks', 'classes': 'classes.txt'}
    return {'kind': 'masks', **paths, 'part': part}

  config = segmentation.base()
  config.update(
    title='noise with masks',
    data_dir=arg,
    output_dir='runs/tiny',
    image_size=(20, 16),
    num_classes=3,
    head='new',
    train=part(0),
    val=part(1),
    eval_sets={'ID': part(2)},
    num_steps=24,
    batch_size=16,
    eval_batch_size=16,  # of 24: the last batch is filled up
    eval_every=8,
    save_every=3,
    log_every=2,
    learning_rate=1e-2,
  )
  config.model.update(name='clip_b16', pretrained=str(tiny_study.CHECKPOINT))
  config.methods.update(
    {
      'zero_shot': base.method('start'),
      'adamw': base.method('AdamW', optimizer='adamw', weight_decay=0.1),
      'spd_1': base.method('Adam-SPD', optimizer='adam', spd=1.0),
    }
  )
  return config
