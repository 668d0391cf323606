"""A study of a minute's worth of nothing: random images, a tiny ViT."""

import dataclasses
import pathlib
import resource
import time

import numpy as np
from PIL import Image

from experiments import parallel
from experiments.configs import base, images
from experiments.data import pipeline
from experiments.models import clip, vit

_SIZES = {'depth': 2, 'num_heads': 2, 'mlp_dim': 24, 'projection': 8}
CLIP = dataclasses.replace(
  vit.CONFIGS['clip_b16'], patch_size=4, width=16, grid=5, **_SIZES
)
TEXT = dataclasses.replace(
  clip.CONFIGS['clip_b16'], width=8, vocab_size=518, **_SIZES
)
CHECKPOINT = pathlib.Path(__file__).parent / 'pretrained/reference/clip'


def install():
  """Puts the checkpoint of `make_reference` in the place of CLIP ViT-B/16.

  Its params are all small, but are to be split where a layout splits.
  """
  vit.CONFIGS['clip_b16'], clip.CONFIGS['clip_b16'] = CLIP, TEXT
  parallel._SMALL = 0


def write_images(folder):
  """Noise, in three classes: what is learned turns the gradient soon."""
  rng = np.random.default_rng(0)
  for name in 'abc':
    (folder / 'noise' / name).mkdir(parents=True)
    for i in range(40):
      pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
      Image.fromarray(pixels).save(folder / 'noise' / name / f'{i}.png')


def get_config(arg=''):
  """AdamW and SPD on the images of `write_images`; `arg` is their folder."""

  def part(take):
    part = {'shares': (0.6, 0.2, 0.2), 'take': take, 'seed': 0}
    return {'kind': 'folder', 'path': 'noise', 'part': part}

  config = images.base()
  config.update(
    title='noise',
    data_dir=arg,
    output_dir='runs/tiny',
    image_size=20,
    num_classes=3,
    head='zeros',
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
  config.model.update(name='clip_b16', pretrained=str(CHECKPOINT))
  config.methods.update(
    {
      'zero_shot': base.method('start'),
      'adamw': base.method('AdamW', optimizer='adamw', weight_decay=0.1),
      'spd_1': base.method('Adam-SPD', optimizer='adam', spd=1.0),
      'after': base.method(
        'AdamW, then SPD', optimizer='adam', spd=1.0, starts_from='adamw'
      ),
      'wise_ft': base.method('WiSE-FT', average_of='adamw', alpha=0.5),
    }
  )
  return config


def disturb(seconds, full_at):
  """Makes a run easy to hit.

  Args:
    seconds: that every batch of training takes.
    full_at: the batch with which the disk is as if full: no file grows beyond
      what the log takes; 0 for none.
  """
  make = pipeline.train_batches

  def disturbed(*args, **kwargs):
    for i, batch in enumerate(make(*args, **kwargs), 1):
      time.sleep(seconds)
      if i == full_at:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
      yield batch

  pipeline.train_batches = disturbed
