"""What every test runs with, set before jax starts."""

import atexit
import os
import shutil
import tempfile

# On a CPU, unless the environment says JAX_PLATFORMS=cuda; then with
# -m 'not eight_devices', as `experiments.gpu_check` runs them.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Eight CPU devices.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
# The same kernels in less time to compile, which is most of what tests do.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
# Programs that several tests compile, shared by the workers of one run.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _folder = tempfile.mkdtemp(prefix='optax_spd_tests_')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _folder
  atexit.register(shutil.rmtree, _folder, ignore_errors=True)
# Small ones too, which most of them are.
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

import jax
import pytest


@pytest.fixture(scope='module', autouse=True)
def few_programs():
  """A module leaves no compiled program behind.

  Each is some ten mappings of memory. Linux gives a process 65,530 of them
  (vm.max_map_count), and the compiler ends with a segmentation fault beyond.
  """
  yield
  jax.clear_caches()
