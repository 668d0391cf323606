"""What every test runs with, set before jax starts."""

import atexit
import os
import pathlib
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

# Linux gives a process 65,530 mappings of memory (vm.max_map_count). A compiled
# program is some ten of them, and beyond them the compiler ends with a
# segmentation fault.
_MANY_MAPPINGS = 20_000
_MAPS = pathlib.Path('/proc/self/maps')


@pytest.fixture(autouse=True)
def few_programs():
  """Tests leave no compiled programs behind when there are many."""
  yield
  if _MAPS.exists() and _MAPS.read_bytes().count(b'\n') > _MANY_MAPPINGS:
    jax.clear_caches()
