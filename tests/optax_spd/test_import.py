"""What `import optax_spd` brings with it."""

import subprocess
import sys

SCRIPT = """
import sys
import jax, optax
known = set(sys.modules)
import optax_spd
print(*sorted({name.split('.')[0] for name in set(sys.modules) - known}))
"""


def test_nothing_is_imported_beside_jax_and_optax():
  """What they have not loaded yet may be a part of them, and little of it."""
  done = subprocess.run(
    [sys.executable, '-c', SCRIPT], capture_output=True, text=True, check=True
  )
  assert set(done.stdout.split()) <= {'optax_spd', 'jax', 'optax'}
