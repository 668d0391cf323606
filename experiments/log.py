"""What a run tells while it goes on: JSON lines, TensorBoard, a profile."""

import importlib.util
import json
import pathlib
import resource
import sys
import time
from typing import NamedTuple

import jax
import numpy as np

from experiments import files, report


def check(config):
  """Refuses a config whose TensorBoard or profile cannot be written.

  Raises:
    ModuleNotFoundError: tensorboardX is not installed.
    ValueError: the step to profile is none of the run.
  """
  if config.profile > config.num_steps:
    raise ValueError(
      f'config.profile is {config.profile}, which has no effect: the run has '
      f'{config.num_steps} steps; name one of them, or 0.'
    )
  if config.tensorboard and importlib.util.find_spec('tensorboardX') is None:
    raise ModuleNotFoundError(
      "config.tensorboard needs this project's extra `.[tensorboard]`; install "
      'it, or set --config.tensorboard=False.'
    )


class Log:
  """A `callback` of `train.FineTuning.run`.

  `metrics.jsonl` gets a line every `config.log_every` steps: step; loss and the
  shares of layers selected and decayed, means since the line before; learning
  rate; |theta - theta_0|; images a second; seconds left; the memory's peak in
  bytes, of the fullest device, or of the process where devices do not tell.
  (Speed and time from the second line on.) Under SPD `layers.jsonl` gets one of
  `{name: [layers]}`, its first line the names of the layers. A run that goes on
  drops the lines after its checkpoint.
  """

  def __init__(self, folder, config, rate, layer_names, bar):
    """Opens the files; in the first process of several alone.

    Args:
      folder: of the run; it exists.
      config: `num_steps`, `batch_size`, `log_every`, `tensorboard`, `profile`.
      rate: step -> learning rate.
      layer_names: of SPD's vectors.
      bar: with `set_postfix` and `update`.
    """
    self._folder = pathlib.Path(folder)
    self._config, self._rate, self._bar = config, rate, bar
    self._layer_names = layer_names
    self._since = None
    self._writes = jax.process_index() == 0
    self._board = None
    self._traces = False
    self._trace(0)

  def __call__(self, history, layers):
    """See `train.FineTuning.run`."""
    step, metrics = len(history), history[-1]
    if self._since is None:
      self._start(step)
    self._bar.set_postfix(loss=f'{metrics["loss"]:.3f}', refresh=False)
    self._bar.update()
    self._trace(step)
    every = self._config.log_every
    if step % every and step != self._config.num_steps:
      return
    seen = history[(step - 1) // every * every :]
    shares = [key for key in ('selected', 'decayed') if key in metrics]
    line = {
      'step': step,
      **{k: _mean(seen, k) for k in ('loss', *shares)},
      'deviation': metrics['deviation'],
      'learning_rate': self._rate(step),
      'peak_bytes': _peak_bytes(),
    }
    (since, before), now = self._since, time.perf_counter()
    if step > before:
      rate = (step - before) / (now - since)
      line['images_per_second'] = rate * self._config.batch_size
      line['seconds_left'] = (self._config.num_steps - step) / rate
    self._since = now, step
    layers = {k: v.tolist() for k, v in jax.device_get(layers).items()}
    if self._writes:
      _append(self._folder / 'metrics.jsonl', line)
      if layers:
        _append(self._folder / 'layers.jsonl', {'step': step, **layers})
      if self._board:
        self._show(step, line, layers)

  def _start(self, step):
    """Where this process begins; what is written of later steps is dropped."""
    self._since = time.perf_counter(), step
    self._bar.update(step - 1)
    if not self._writes:
      return
    names = [{'layers': list(self._layer_names)}] if self._layer_names else []
    for file, first in (('metrics.jsonl', []), ('layers.jsonl', names)):
      before = [
        line
        for line in _read(self._folder / file)
        if line.get('step', step) < step
      ]
      lines = [json.dumps(line) + '\n' for line in [*first, *before]]
      if first or file == 'metrics.jsonl':
        report.write(self._folder / file, ''.join(lines))
    if self._config.tensorboard:
      import tensorboardX

      self._board = tensorboardX.SummaryWriter(
        str(self._folder / 'tensorboard'), purge_step=step
      )

  def _trace(self, step):
    # The next step to start is two after the one that is told.
    if self._config.profile and max(self._config.profile - 2, 0) == step:
      jax.profiler.start_trace(self._folder / 'profile')
      self._traces = True
    last = step == self._config.num_steps
    if self._traces and (last or step > self._config.profile):
      jax.profiler.stop_trace()
      self._traces = False

  def _show(self, step, line, layers):
    for key, value in line.items():
      if key != 'step':
        self._board.add_scalar(key, value, step)
    for key, values in layers.items():
      for name, value in zip(self._layer_names, values, strict=True):
        self._board.add_scalar(f'{key}/{name}', value, step)
    self._board.flush()
    if step == self._config.num_steps:
      self._board.close()  # flush alone leaves a few behind


class Layers(NamedTuple):
  """What SPD did in each layer, over one run.

  Attributes:
    names: of the layers, as `optax_spd.layer_names` has them.
    deviation: float16 [steps, layers], |delta| after the step.
    selected: bools [steps, layers], of that step; so the next one.
    decayed: see there.
  """

  names: np.ndarray
  deviation: np.ndarray
  selected: np.ndarray
  decayed: np.ndarray

  @staticmethod
  def path(folder, name, seed):
    """The file of a run, in the folder of its rows."""
    return pathlib.Path(folder, 'layers', f'{name}_{seed}.npz')

  @classmethod
  def read(cls, path):
    with np.load(path) as arrays:
      return cls(**{key: arrays[key] for key in cls._fields})

  def write(self, path):
    """Whole or not at all."""
    files.write_arrays(path, self._asdict())


class LayerLog:
  """Gathers the `Layers` of a run; `add` is given what its callback is."""

  def __init__(self):
    self._steps = []

  def add(self, layers):
    if layers:
      keys = 'deviation', 'selected_count', 'decayed_count'
      self._steps.append(jax.device_get([layers[key] for key in keys]))

  def layers(self, names):
    """The `Layers`, whose names are given; None of a run without SPD."""
    if not self._steps:
      return None
    deviation, *counts = map(np.array, zip(*self._steps, strict=True))
    of_steps = [np.diff(count, axis=0, prepend=0) > 0 for count in counts]
    return Layers(np.array(names), deviation.astype(np.float16), *of_steps)


def _mean(seen, key):
  return float(np.mean([metrics[key] for metrics in seen]))


def _append(path, line):
  with path.open('a') as file:
    file.write(json.dumps(line) + '\n')


def _read(path):
  """The lines of a file, but for one that was cut short."""
  lines = []
  if path.exists():
    for text in path.read_text().splitlines():
      try:
        lines.append(json.loads(text))
      except json.JSONDecodeError:
        break
  return lines


def _peak_bytes():
  stats = [device.memory_stats() for device in jax.local_devices()]
  if all(stats):
    return max(one['peak_bytes_in_use'] for one in stats)
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
