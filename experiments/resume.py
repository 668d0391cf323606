"""What a study that was stopped has already, in config.output_dir.

Its rows, and, until nothing needs them, the params of the runs that others
start from or average.
"""

import json
import pathlib
import shutil

import jax
import numpy as np
from flax import traverse_util

from experiments import files, report, train
from experiments.configs import base

_PARAMS = 'params'  # the folder of those params


class Saved:
  """A study in its folder.

  Attributes:
    rows: those of every run that has ended, the first one first.
  """

  def __init__(self, config, about):
    """Reads what is there.

    Args:
      config: the study, checked.
      about: `runs.provenance`, of the rows to come.

    Raises:
      ValueError: the folder has the rows of another study, or damaged ones.
    """
    self._folder = pathlib.Path(config.output_dir)
    self._about, self._config = about, _plain(config.to_dict())
    self.rows = self._read()

  def has(self, name, seed):
    return any((r['method'], r['seed']) == (name, seed) for r in self.rows)

  def add(self, row):
    """Writes one more row."""
    self.rows.append({**self._about, **row})
    report.write_jsonl(self._folder / 'rows.jsonl', self.rows)
    everything = {**self._about, 'config': self._config, 'rows': self.rows}
    report.write_json(self._folder / 'results.json', everything)

  def keep(self, name, seed, run):
    """Writes the params that a `train.Run` chose, whole or not at all."""
    arrays = [np.array(run.step or 0), *jax.tree.leaves(run.params)]
    files.write_arrays(
      self._path(name, seed),
      {f'arr_{i}': np.asarray(array) for i, array in enumerate(arrays)},
      compressed=False,
    )

  def is_kept(self, name, seed):
    return self._path(name, seed).exists()

  def restore(self, tuning, name, seed):
    """The `train.Run` that was kept, without its history.

    Args:
      tuning: the `train.FineTuning` that it was of.
      name: of its method.
      seed: of the run.
    """
    with np.load(self._path(name, seed)) as arrays:
      step, *leaves = (arrays[f'arr_{i}'] for i in range(len(arrays)))
    params = jax.tree.unflatten(jax.tree.structure(tuning.pretrained), leaves)
    params = tuning.layout.put(params)
    return train.Run(params, int(step) or None, {}, None, None)

  def forget(self, but=()):
    """Removes the params that were kept, but for those of some methods."""
    for file in (self._folder / _PARAMS).glob('*'):
      if file.stem.rpartition('_')[0] not in but:
        file.unlink()
    if not but:
      shutil.rmtree(self._folder / _PARAMS, ignore_errors=True)

  def _path(self, name, seed):
    return self._folder / _PARAMS / f'{name}_{seed}.npz'

  def _read(self):
    path = self._folder / 'results.json'
    if not path.exists():
      return []
    remedy = (
      'set --config.output_dir to another folder, or remove this one if its '
      'rows are not needed'
    )
    try:
      written = json.loads(path.read_text('utf-8'))
      config, rows = written['config'], written['rows']
      for row in rows:
        row['history'] = {k: np.array(v) for k, v in row['history'].items()}
      ours, theirs = _flat(self._config, config), _flat(config, self._config)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
      raise ValueError(
        f'{path} cannot be gone on with ({error!r}); {remedy}.'
      ) from error
    for key in sorted(ours.keys() | theirs.keys()):
      if ours.get(key) != theirs.get(key):
        raise ValueError(
          f'{path} has rows of a study whose config.{key} is '
          f'{theirs.get(key)!r}; here it is {ours.get(key)!r}: {remedy}.'
        )
    for key in ('methods', 'sweep'):
      self._config[key] = {**config[key], **self._config[key]}
    return rows


def _plain(config):
  """As JSON has it: tuples are lists."""
  return json.loads(json.dumps(config))


def _flat(config, other):
  """What makes the rows of a config, by key: all but what is free to change.

  Of its methods only those that the other one has too, and their sweeps.
  """
  shared = {
    part: {
      name: value
      for name, value in config[part].items()
      if name in other['methods'] and name in config['methods']
    }
    for part in ('methods', 'sweep')
  }
  rest = {key: config[key] for key in config if key not in base.FREE}
  return traverse_util.flatten_dict(
    rest | shared, keep_empty_nodes=True, sep='.'
  )
