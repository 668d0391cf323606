"""What a run made of every example, kept for the statistics of its study.

outputs/METHOD_SEED.npz has, of each set but 'val', 'SET/outputs/NAME': what the
task's metrics are a function of, a row an example; and, of sets up to 20,000
examples, 'SET/draws/METRIC' [R]: the metrics of R draws of as many examples,
with replacement. Draw r is of the same examples in every run of a study, and in
all of its sets that have the same ones, such as a set and what corrupts it.
"""

import dataclasses
import pathlib
import warnings
import zlib

import jax
import numpy as np

from experiments import files

DRAWS = 200  # R
# Examples of a set that are drawn from. The noise of more is under half a point
# of accuracy, and draws of VQAv2's 214,354 would take minutes.
_MOST = 20_000
# Bytes of what is kept of an output: ImageNet's logits are too many.
_LARGEST = 1 << 25


def path(folder, name, seed):
  """The file of a run, in the folder of its rows."""
  return pathlib.Path(folder, 'outputs', f'{name}_{seed}.npz')


class Kept:
  """A `keep` of `evaluate.evaluate`: what is to be written of a run."""

  def __init__(self):
    self._arrays = {}

  def __call__(self, name, task, outputs, eval_set):
    """Takes a set; the first process of several alone."""
    if name == 'val' or jax.process_index() > 0:
      return
    for key, leaf in jax.tree_util.tree_leaves_with_path(outputs):
      if leaf.nbytes <= _LARGEST:
        key = jax.tree_util.keystr(key, simple=True, separator='.')
        self._arrays[f'{name}/outputs/{key}'] = leaf
    if len(eval_set.source) > _MOST:
      return
    drawn = draws(eval_set.like or name, task, outputs, eval_set)
    for metric, values in drawn.items():
      self._arrays[f'{name}/draws/{metric}'] = values

  def write(self, file):
    """Writes them whole or not at all."""
    files.write_arrays(file, self._arrays)


def draws(name, task, outputs, eval_set, number=DRAWS):
  """Metrics of draws of a set's examples, with replacement.

  Args:
    name: of the set; those of a study are drawn independently.
    task: with `metrics(outputs, eval_set)`.
    outputs: of every example, a tree of [N, ...].
    eval_set: an `evaluate.EvalSet`; its `groups`, where it has them, are drawn.
    number: of the draws, R.

  Returns:
    `{metric: [R]}`; NaN where a metric is not defined of a draw.
  """
  total = len(jax.tree.leaves(outputs)[0])
  groups = np.arange(total) if eval_set.groups is None else eval_set.groups
  _, groups, sizes = np.unique(groups, return_inverse=True, return_counts=True)
  members = np.split(np.argsort(groups, kind='stable'), np.cumsum(sizes)[:-1])
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  found = []
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of a draw that has one class only
    for _ in range(number):
      drawn = rng.integers(len(members), size=len(members))
      rows = np.concatenate([members[i] for i in drawn])
      own = eval_set
      if own.info is not None:
        own = dataclasses.replace(own, info=[own.info[i] for i in rows])
      found.append(
        task.metrics(jax.tree.map(lambda leaf, i=rows: leaf[i], outputs), own)
      )
  names = dict.fromkeys(name for metrics in found for name in metrics)
  return {
    name: np.array([metrics.get(name, np.nan) for metrics in found])
    for name in names
  }


def read_draws(folder, row):
  """The draws of a row, `{set: {metric: [R]}}`; {} where none were kept.

  Args:
    folder: of the file of rows; or the file that `pack` wrote.
    row: of a study.
  """
  name, seed, start = row['method'], row['seed'], ''
  if pathlib.Path(folder).suffix == '.npz':
    file, start = pathlib.Path(folder), f'{name}_{seed}/'
  else:
    # Rows of `main` lie in a folder of their own.
    files = [path(f, name, seed) for f in (folder, pathlib.Path(folder).parent)]
    file = next((file for file in files if file.exists()), None)
  if file is None:
    return {}
  found = {}
  with np.load(file) as arrays:
    for key in arrays.files:
      name, _, rest = key.removeprefix(start).partition('/draws/')
      if rest and key.startswith(start):
        found.setdefault(name, {})[rest] = arrays[key]
  return found


def pack(rows, file):
  """Writes the draws of the first metric of all rows as one small file.

  Args:
    rows: of a study, with `folder`; those of tuning are left out.
    file: NAME.npz; `report` finds it beside NAME.jsonl with the rows.

  Returns:
    The number of rows that have draws.

  Raises:
    ValueError: none has, or the file is to have another name.
  """
  if pathlib.Path(file).suffix != '.npz':
    raise ValueError(f'{file} is to end in .npz.')
  arrays, number = {}, 0
  for row in rows:
    if row.get('phase') != 'tuning':
      metric = next(iter(row['metrics']['val']))
      found = read_draws(row['folder'], row)
      number += bool(found)
      for name, drawn in found.items():
        if metric in drawn:
          key = f'{row["method"]}_{row["seed"]}/{name}/draws/{metric}'
          arrays[key] = drawn[metric].astype(np.float32)
  if not number:
    raise ValueError(
      f'{file}: no row has draws; give the rows.jsonl beside outputs/.'
    )
  files.write_arrays(pathlib.Path(file), arrays)
  return number
