"""Checkpoints of one run: saved while it goes on, restored by the same command.

A checkpoint holds all that the next step depends on: params, the optimizer's
state with the anchor, the running average, the history, the best step so far,
and the step. The step is also where the random numbers and the data are: a
step's key is folded from seed and step, and Grain's batches start at any step.
"""

import dataclasses
import pathlib
import shutil
import signal
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from experiments.configs import base


@dataclasses.dataclass
class About:
  """What a checkpoint knows beside arrays.

  Attributes:
    step: that it is after.
    best: the first metric on validation, the best so far.
    best_step: that it is of; None before the first evaluation.
    seconds: of training up to here.
    waited: those of them in which a step waited for data.
  """

  step: int
  best: float
  best_step: int | None
  seconds: float
  waited: float


class Checkpoints:
  """Of one run: the last few, and the best on validation.

  Until it is closed SIGTERM, and in a run of several processes any notice that
  JAX's preemption service passes on, asks the run to stop; see `stop_wanted`.
  """

  def __init__(self, folder, run, keep=2, read_only=False):
    """Opens a folder, or makes it.

    Args:
      folder: of this run alone.
      run: a dict: its config and what tells it from others. None, to read
        only, for whatever run it is of.
      keep: how many of the last ones to keep, beside the best.
      read_only: to leave everything as it is; the folder exists.

    Raises:
      OSError: the folder cannot be made.
      ValueError: it holds something else, or checkpoints of another run.
    """
    self._folder = pathlib.Path(folder).absolute()
    self._run = None if run is None else _plain(run)
    self._keep = keep
    self._best_step = None
    self._noticed = False
    self._handler = None
    self._terminated = threading.Event()
    others = [p.name for p in self._folder.glob('*') if not _is_step(p.name)]
    if others:
      raise ValueError(
        f'{self._folder} holds {", ".join(sorted(others)[:3])}, which is no '
        'checkpoint of a run; set --config.output_dir to another folder.'
      )
    if not read_only:
      self._folder.mkdir(parents=True, exist_ok=True)
    # Nothing is cleaned up before it is known whose it is.
    self._manager = self._open(read_only=True)
    if run is not None and self.last_step is not None:
      self._check_same(self.last_step)
    if read_only:
      return
    self._manager.close()
    self._manager = self._open(read_only=False)
    if jax.process_count() == 1:
      self._handler = signal.signal(
        signal.SIGTERM, lambda *_: self._terminated.set()
      )

  def _open(self, read_only):
    return ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        read_only=read_only,
        create=False,
        # What a killed process left half-written.
        cleanup_tmp_directories=not read_only,
        preservation_policy=preservation_policy.AnyPreservationPolicy(
          [preservation_policy.LatestN(self._keep), _Best(self)]
        ),
      ),
      item_handlers={
        'state': ocp.StandardCheckpointHandler(),
        'history': ocp.StandardCheckpointHandler(),
        'run': ocp.JsonCheckpointHandler(),
      },
    )

  @property
  def last_step(self):
    """Of the last checkpoint; None where there is none yet."""
    return self._manager.latest_step()

  def about(self, step):
    """The `About` of a checkpoint."""
    return About(**self._read(step, 'run', ocp.args.JsonRestore())['about'])

  def run(self, step):
    """The run that a checkpoint is of, a flat dict: `{'model.name': ...}`."""
    return self._read(step, 'run', ocp.args.JsonRestore())['run']

  def begin(self, step):
    """Says that the run starts after a step: from now on it can be stopped."""
    if jax.process_count() > 1:
      # A notice that came before has set the first step to stop at to 1.
      self._noticed = multihost_utils.reached_preemption_sync_point(1)
      multihost_utils.reached_preemption_sync_point(max(step, 1))

  def stop_wanted(self, step):
    """Whether the run is asked to stop; the same in every process."""
    if jax.process_count() == 1:
      return self._terminated.is_set()
    reached = multihost_utils.reached_preemption_sync_point(step)
    return self._noticed or reached

  def restore(self, like, step):
    """Reads a checkpoint.

    Args:
      like: a `train.State` of `jax.ShapeDtypeStruct`s with the layout to
        restore, as `abstract` makes it.
      step: of it.

    Returns:
      The state, the history, a list of the metrics of every step, and an
      `About`.

    Raises:
      ValueError: it is of another model, or cannot be read.
    """
    about = self.about(step)
    self._check_shapes(step, like)
    state = self._read(step, 'state', ocp.args.StandardRestore(like._asdict()))
    columns = self._read(step, 'history', ocp.args.StandardRestore())
    columns = {name: np.asarray(column) for name, column in columns.items()}
    self._best_step = about.best_step
    history = [
      {name: float(column[i]) for name, column in columns.items()}
      for i in range(step)
    ]
    return type(like)(**state), history, about

  def eval_params(self, step):
    """Reads the params that were evaluated after a step, and nothing else.

    Args:
      step: of a checkpoint of an `nnx.State`.

    Returns:
      `{path: NumPy array}`, a path like `('head', 'kernel')`, all strings.

    Raises:
      ValueError: it cannot be read.
    """

    def read():
      found = self._manager.item_metadata(step)['state'].tree
      name = 'params' if found['average'] is None else 'average'
      item = {name: found[name]}
      args = ocp.args.PyTreeRestore(
        item,
        restore_args=jax.tree.map(
          lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item
        ),
        partial_restore=True,
      )
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        folder = self._folder / str(step) / 'state'
        return reader.restore(folder, args=args)[name]

    flat = ocp.tree.to_flat_dict(self._try_to_read(step, read))
    return {path[:-1]: array for path, array in flat.items()}  # less 'value'

  def save(self, state, history, about):
    """Starts to write a checkpoint; the arguments are what `restore` returns.

    Raises:
      OSError: this one, or the one before, cannot be written.
    """
    self._best_step = about.best_step
    columns = {
      name: np.array([metrics[name] for metrics in history], np.float32)
      for name in history[0]
    }
    entry = {'run': self._run, 'about': dataclasses.asdict(about)}
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state._asdict()),
      history=ocp.args.StandardSave(columns),
      run=ocp.args.JsonSave(entry),
    )
    self._write(lambda: self._manager.save(about.step, args=args, force=True))

  def close(self):
    """Waits until all is written; SIGTERM ends the process again.

    Raises:
      OSError: as `save`.
    """
    self._write(self._manager.wait_until_finished)
    self._manager.close()
    if self._handler is not None:
      signal.signal(signal.SIGTERM, self._handler)

  def _write(self, action):
    try:
      action()
    except jax.errors.JaxRuntimeError:  # of a process that is gone
      raise
    except Exception as error:  # of tensorstore's, Orbax's and Python's types
      steps = sorted(p.name for p in self._folder.glob('*') if p.name.isdigit())
      steps = ', '.join(steps) or 'none'
      raise OSError(
        f'A checkpoint cannot be written to {self._folder}: {_line(error)} '
        f'Those before it are untouched: {steps}. Make room, and run the same '
        'command.'
      ) from error

  def _read(self, step, item, args):
    args = ocp.args.Composite(**{item: args})
    return self._try_to_read(
      step, lambda: self._manager.restore(step, args=args)[item]
    )

  def _try_to_read(self, step, action):
    try:
      return action()
    except jax.errors.JaxRuntimeError:  # of memory, or as in _write
      raise
    except Exception as error:
      raise ValueError(
        f'The checkpoint {self._folder / str(step)} cannot be read: '
        f'{_line(error)} Move it away to go on from the one before, or set '
        '--config.output_dir to another folder.'
      ) from error

  def _check_shapes(self, step, like):
    """Before Orbax does, which says it of every array, at length."""

    def shapes(tree):
      leaves = jax.tree_util.tree_leaves_with_path(tree)
      return {
        jax.tree_util.keystr(path, simple=True, separator='.'): leaf.shape
        for path, leaf in leaves
      }

    theirs = self._try_to_read(
      step, lambda: shapes(self._manager.item_metadata(step)['state'].tree)
    )
    ours = shapes(like._asdict())
    for name in sorted(ours.keys() | theirs.keys()):
      if ours.get(name) != theirs.get(name):
        raise ValueError(
          f'The checkpoint {self._folder / str(step)} is of another model: '
          f'{name} is {theirs.get(name, "not there")}, here '
          f'{ours.get(name, "not there")}. Set --config.output_dir to another '
          'folder.'
        )

  def check_space(self, like):
    """Refuses a run whose checkpoints have no room; `like` as for `restore`.

    Raises:
      OSError: saying how much there is.
    """
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
    # The last ones, the best, and a new one beside them.
    wanted = self._keep + 2 - len(self._manager.all_steps())
    free = shutil.disk_usage(self._folder).free
    if free < wanted * size:
      raise OSError(
        f'{self._folder} has room for {free / 1e9:.1f} GB, and {wanted} '
        f'checkpoints of {size / 1e9:.1f} GB are to come; make room, or set '
        '--config.output_dir to another folder.'
      )

  def _check_same(self, step):
    theirs = self.run(step)
    differ = [
      f'{key} was {theirs.get(key)!r}, now {self._run.get(key)!r}'
      for key in sorted(theirs.keys() | self._run.keys())
      if key not in base.FREE and theirs.get(key) != self._run.get(key)
    ]
    if differ:
      raise ValueError(
        f'The checkpoint {self._folder / str(step)} is of another run: '
        f'{"; ".join(differ[:5])}. Use its config, or set '
        '--config.output_dir to another folder.'
      )


class _Best(preservation_policy.PreservationPolicy):
  """Keeps the step that was the best when it was asked."""

  def __init__(self, checkpoints):
    self._checkpoints = checkpoints

  def should_preserve(self, checkpoints, *, context):
    del context
    return [c.step == self._checkpoints._best_step for c in checkpoints]


def _is_step(name):
  """Of Orbax: a step, one half-written, or what it knows of the folder."""
  return name.split('.')[0].isdigit() or name.startswith('_')


def _plain(run):
  """A nested dict as a flat one, of what JSON keeps."""
  flat = {}

  def add(prefix, value):
    if isinstance(value, dict):
      for key, inner in value.items():
        add(f'{prefix}.{key}' if prefix else str(key), inner)
    else:
      flat[prefix] = list(value) if isinstance(value, tuple) else value

  add('', run)
  return flat


def abstract(tree):
  """The shapes, dtypes and layout of arrays, without the arrays."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


def _line(error):
  """An error as one line, not too long, that ends with a full stop."""
  text = ' '.join(str(error).split())
  return (text if len(text) < 300 else text[:300] + ' ...').rstrip('.') + '.'
