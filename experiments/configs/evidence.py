"""The studies that the claims rest on: tuned, ten seeds, controls.

python -m experiments.compare --config=evidence:pacs_photo
                              --config.data_dir=DIR

The argument is `pacs_photo`, `pacs_art_painting` (`pacs_two_stage`, from
theta_0 of stage A) or `elpv` (from its linear probe). Every family has the same
budget, up to six settings with two tuning seeds, and is represented by two: the
best on ID validation, and the strongest within a standard error of it
(`experiments.sweep`). OOD sets choose nothing. Those run with ten other seeds.
AdamW and L2-SP, brought as far from theta_0 as SPD came, are the controls for
SPD being no more than smaller steps, and SPD with as many selections of every
layer, at random steps, for its condition. That is some 120 to 180 runs of 200
steps. --methods=spd,spd_always adds to their rows a second control of the
condition: SPD without it, tuned, and at the strength that ends as far out.
"""

from experiments.configs import base, elpv, pacs_two_stage

STUDIES = ('pacs_photo', 'pacs_art_painting', 'elpv')
_RATES = (0.1, 0.3, 1.0)  # of 1e-4


def get_config(arg='pacs_photo'):
  """One of the studies.

  Args:
    arg: one of `STUDIES`.
  """
  if arg not in STUDIES:
    raise ValueError(
      f'evidence:{arg} is no study; it is one of {", ".join(STUDIES)}.'
    )
  if arg == 'elpv':
    config = elpv.get_config()
    start = {'linear_probe': config.methods.linear_probe}
  else:
    config = pacs_two_stage.get_config(arg.removeprefix('pacs_'))
    start = {'theta_0': config.methods.theta_0}
  config.methods = base.ordered()
  config.methods.update(
    {
      **start,
      'head': base.method(
        'linear probe, trained on', optimizer='adamw', train='head', rate=10.0
      ),
      'adamw': base.method('AdamW', optimizer='adamw'),
      'l2sp': base.method('L2-SP', optimizer='l2sp'),
      'spd': base.method('Adam-SPD', optimizer='adam', spd=1.0),
      'wise_ft': base.method('WiSE-FT', average_of='adamw'),
      'spd_always': base.method(
        'Adam-SPD, always',
        optimizer='adam',
        spd=0.3,
        condition='always',
        optional=True,
      ),
    }
  )
  config.update(
    title=f'{config.title}, tuned',
    output_dir=f'runs/evidence_{arg}',
    learning_rate=1e-4,
    num_steps=200,
    batch_size=32,
    num_seeds=10,
    tuning_seeds=2,
    sweep={
      'adamw': {'rate': _RATES, 'weight_decay': (0.0, 0.1)},
      'l2sp': {'rate': _RATES[1:], 'weight_decay': (1e-2, 1e-1, 1.0)},
      'spd': {'rate': _RATES, 'spd': (1.0, 3.0)},
      'wise_ft': {'alpha': (0.25, 0.5, 0.75)},
      'spd_always': {'rate': _RATES[1:], 'spd': (0.1, 0.3, 0.6)},
    },
    controls={'spd': ('adamw', 'l2sp', 'spd_always')},
  )
  return config
