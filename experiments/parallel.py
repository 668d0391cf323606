"""How a run lies on the devices: one layout for a laptop, a node and a pod."""

import atexit
import dataclasses
import faulthandler
import functools
import math
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

# A smaller array lies on every device: to gather it costs more than it holds.
_SMALL = 2**14
# A larger array, in bytes, is never whole on a device within a step.
_LARGE = 2**30


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where arrays lie. Hashable: it is part of the program.

  Attributes:
    mesh: all devices, axes 'data' and 'fsdp'. A batch is split over both; a
      params-shaped array along one axis over 'fsdp', and repeated over 'data'.
    pmap: whether a train step is a `jax.pmap` instead of a `jax.jit`.
  """

  mesh: Any
  pmap: bool = False

  @property
  def num_devices(self):
    return self.mesh.size

  @property
  def name(self):
    """As `layout` takes it."""
    ways = self.mesh.shape['fsdp']
    if self.pmap:
      return 'pmap'
    if ways == 1:
      return 'replicated'
    return 'fsdp' if ways == self.num_devices else f'fsdp:{ways}'

  def sharding(self, shape):
    """The `NamedSharding` of a params-shaped array.

    It is split along the longest axis that the 'fsdp' devices divide; a small
    array, and one without such an axis, lies whole on every device. By shape
    alone: so Adam's moments and SPD's anchor lie as their parameter does.
    """
    ways = self.mesh.shape['fsdp']
    axes = [i for i, n in enumerate(shape) if n % ways == 0]
    if ways == 1 or not axes or math.prod(shape) < _SMALL:
      return self.whole
    longest = max(axes, key=lambda i: shape[i])
    return NamedSharding(self.mesh, P(*[None] * longest, 'fsdp'))

  @property
  def whole(self):
    """The `NamedSharding` of an array of which every device has all."""
    return NamedSharding(self.mesh, P())

  @property
  def split(self):
    """The `NamedSharding` of a batch: its first axis over all devices."""
    return NamedSharding(self.mesh, P(('data', 'fsdp')))

  def shardings(self, tree):
    """`sharding` of every leaf of arrays or `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda leaf: self.sharding(leaf.shape), tree)

  def put(self, tree):
    """Copies arrays, the same in every process, to where they lie."""
    # Copied: what is already there would be shared, and donated with.
    return jax.tree.map(
      lambda leaf: jnp.copy(jax.device_put(leaf, self.sharding(leaf.shape))),
      tree,
    )

  def put_batch(self, rows, stacked=False):
    """A batch [B, ...] of the rows [B / processes, ...] of each process.

    Args:
      rows: a tree of NumPy arrays.
      stacked: whether it is for a train step, which under `pmap` takes
        [devices, B / devices, ...].
    """

    def put(rows):
      rows = np.asarray(rows)
      if stacked and self.pmap:
        own = self.num_devices // jax.process_count()
        rows = rows.reshape(own, -1, *rows.shape[1:])
      return jax.make_array_from_process_local_data(self.split, rows)

    return jax.tree.map(put, rows)

  def constrain(self, tree):
    """Inside a jit: lays params-shaped results out like the params."""
    return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

  def constrain_whole(self, tree):
    """Inside a jit: lays results out whole on every device.

    What is large stays as it is: the stacked blocks of a large model, whose
    loop then gathers a block at a time.
    """
    return jax.tree.map(
      lambda x: (
        x
        if x.size * x.dtype.itemsize > _LARGE
        else jax.lax.with_sharding_constraint(x, self.whole)
      ),
      tree,
    )

  def gather(self, tree):
    """Makes arrays whole on every device, where each process can read them."""
    return _identity(self.whole)(tree)

  def enter(self, tree):
    """What a train step takes: for a `jax.pmap` [devices, ...] of each leaf."""
    return _stack(self.num_devices, self.split)(tree) if self.pmap else tree

  def leave(self, tree):
    """The inverse, of what it returned."""
    return _first(self.whole)(tree) if self.pmap else tree


@functools.cache
def _identity(sharding):
  return jax.jit(lambda tree: tree, out_shardings=sharding)


@functools.cache
def _stack(number, sharding):
  def stack(tree):
    return jax.tree.map(
      lambda leaf: jnp.broadcast_to(leaf, (number, *jnp.shape(leaf))), tree
    )

  return jax.jit(stack, out_shardings=sharding)


@functools.cache
def _first(sharding):
  def first(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)

  return jax.jit(first, out_shardings=sharding)


def layout(name='replicated', devices=None):
  """A layout by name.

  Args:
    name: one of
      'replicated': data parallel; every device has all params,
      'fsdp': params and the optimizer's state are split over all devices,
      'fsdp:N': over N devices, and repeated over the rest (N chips of a host
        that share a fast link, say),
      'pmap': as 'replicated', by `jax.pmap`, in one process.
    devices: that it uses; all of all processes by default.

  Returns:
    A `Layout`.

  Raises:
    ValueError: there is no such layout for so many devices.
  """
  devices = all_devices() if devices is None else devices
  number = len(devices)
  ways = {'replicated': 1, 'pmap': 1, 'fsdp': number}
  ways |= {f'fsdp:{n}': n for n in range(1, number + 1) if number % n == 0}
  if name not in ways:
    raise ValueError(
      f'config.layout is {name!r}; it must be replicated, fsdp, pmap, or '
      f'fsdp:N with an N that divides the {number} devices.'
    )
  if name == 'pmap' and jax.process_count() > 1:
    raise ValueError(
      "config.layout is 'pmap', which is for one process; use replicated."
    )
  # In the order of the processes, which each read their rows of a batch; not
  # in that of jax.make_mesh, which follows a TPU's wiring.
  devices = sorted(devices, key=lambda d: (d.process_index, d.id))
  mesh = jax.sharding.Mesh(
    np.array(devices).reshape(number // ways[name], ways[name]),
    ('data', 'fsdp'),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )
  return Layout(mesh, pmap=name == 'pmap')


# How long a process may be silent before the others take it for dead.
_HEARTBEAT_SECONDS = 30


def start(processes):
  """Joins the processes of a run; before anything else touches a device.

  Args:
    processes: 'auto' where JAX knows them by itself (a TPU pod, SLURM), else
      'HOST:PORT,PROCESSES,INDEX': the address of process 0, how many there are
      and which one this is.

  Raises:
    ValueError: it is neither.
    ConnectionError: they do not come together.
  """
  keys = {}
  if processes != 'auto':
    address, *numbers = processes.split(',')
    if len(numbers) != 2 or not all(n.isdigit() for n in numbers):
      raise ValueError(
        f"--distributed is {processes!r}; it is 'auto' or "
        'HOST:PORT,PROCESSES,INDEX.'
      )
    keys = {
      'coordinator_address': address,
      'num_processes': int(numbers[0]),
      'process_id': int(numbers[1]),
    }
  try:
    jax.distributed.initialize(
      **keys, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
    )
  except ValueError as error:
    raise ValueError(
      f'--distributed={processes}: {error} Where JAX knows of no cluster, give '
      'HOST:PORT,PROCESSES,INDEX.'
    ) from error
  except RuntimeError as error:
    raise ConnectionError(f'--distributed={processes}: {error}') from error


# What a process says where it cannot speak itself, unless it said good-bye.
_LAST_WORDS = """
import sys
if not sys.stdin.buffer.read():
  print(sys.argv[1], file=sys.stderr)
"""
_speakers = []


def say_if_lost(message):
  """Has a line printed if this process ends without `good_bye`.

  JAX aborts a process that has lost touch with another one, whatever it is
  waiting for. A process of its own, which waits for the end of this one, speaks
  then.
  """
  faulthandler.disable()  # absl's stacks of all threads would bury the line
  _speakers.append(
    subprocess.Popen(
      [sys.executable, '-I', '-S', '-c', _LAST_WORDS, message],
      stdin=subprocess.PIPE,
      start_new_session=True,  # a signal to this one's group is not for it
    )
  )
  atexit.register(good_bye)


def good_bye():
  """Takes `say_if_lost` back; any exit but `os._exit` and a signal calls it."""
  while _speakers:
    _speakers.pop().communicate(b'good-bye')


def all_devices():
  """Those of all processes."""
  return jax.devices()


def shard():
  """`(index, count)` of this process: which rows of a batch it reads."""
  return jax.process_index(), jax.process_count()
