"""`experiments.main` with a tiny model: python -m tests.experiments.tiny_main.

The flags are those of `experiments.main`; --config is `tiny_study.py` here.
"""

import os
import runpy

from tests.experiments import kinds, tiny_study

if __name__ == '__main__':
  kinds.install()
  tiny_study.install()
  tiny_study.disturb(
    float(os.environ.get('TINY_DELAY', 0)),
    int(os.environ.get('TINY_FULL_AT', 0)),
  )
  runpy.run_module('experiments.main', run_name='__main__', alter_sys=True)
