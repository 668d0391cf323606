"""What a kind of study is made of, and what all kinds open and check alike.

A kind is a module of this folder, and a line in `study.KINDS`. It has

  defaults() -> a config with every key of its studies,
  FILES, the keys that name a text file, whose contents make the study,
  STEP, the keys that its train step is made of, beside those of all kinds: what
    `topology` lets be changed,
  check(config) -> {name: source}: refuses what could not end, of its own keys;
    opens every source and reads no example,
  build(config, sources) -> Parts, the weights read,
  shapes(config) -> Parts: the same as jax.ShapeDtypeStructs; no data is opened,

and it may have

  exported(config, run, trained, format) -> the files of `experiments.export`,
    as `pretrained.save` returns them. `run` is the run's folder, and `trained`
    makes a model with theta_0's weights the one that was trained,

  draw(config, tuning, params) -> a Matplotlib figure of examples and of what a
    `train.FineTuning` makes of them with these params; in every process.

`study.check` has looked at the keys that all studies share before.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments import averages
from experiments.data import sources

CLASSES = 'classes.json'  # in a run's folder, the names of its classes


class Parts(NamedTuple):
  """What a study of a kind brings.

  Attributes:
    task: see `train.FineTuning`; with `lower(model, batch)` where
      `config.first_block` may be above 0, see `cache`.
    model: an `nnx.Module`, pretrained. A new head has the name `head`.
    trained: NNX filter of the params to train.
    sets: `{name: EvalSet}`, 'train' and 'val' among them; none in `shapes`.
    example: one that enters the task, without its B, as jax.ShapeDtypeStructs.
    augment: transforms of a training example; None for those of evaluation.
    fit: (sets, layout, progress) -> None: fits a new head of `model`, such as a
      linear probe, so that theta_0 means something; None where there is none.
    interpolate: (theta_0, theta, alpha) -> params between the two.
  """

  task: Any
  model: Any
  trained: Any
  sets: dict[str, Any]
  example: dict[str, Any]
  augment: Any = None
  fit: Callable[..., None] | None = None
  interpolate: Callable[..., Any] = averages.wise_ft


def open_sets(config, unread=()):
  """Opens every source of a study; reads no example.

  Args:
    config: the study.
    unread: keys of an eval set that are not of its source.

  Returns:
    `{'train': source, 'val': source, eval set: source ...}`.

  Raises:
    ValueError, OSError, ModuleNotFoundError: of the source that cannot be
      opened, or is empty.
  """
  if not config.eval_sets or {'train', 'val'} & set(config.eval_sets):
    raise ValueError(
      f'config.eval_sets are {", ".join(config.eval_sets) or "none"}; name at '
      'least one, and none train or val.'
    )
  specs = {'train': config.train.to_dict(), 'val': config.val.to_dict()}
  for name, spec in config.eval_sets.items():
    specs[name] = {k: v for k, v in spec.to_dict().items() if k not in unread}
  opened = {}
  for name, spec in specs.items():
    opened[name] = sources.open_source(spec, config.data_dir)
    if not len(opened[name]):
      raise ValueError(f'{name}: no example is left of {spec}.')
  return opened


def check_classes(opened):
  """Refuses sets whose classes are not those of the training set."""
  ours = opened['train'].class_names
  for name, source in opened.items():
    theirs = source.class_names
    if ours != theirs:
      differ = sorted(set(ours) ^ set(theirs))
      differ = ', '.join(map(repr, differ[:5])) or 'their order'
      raise ValueError(
        f'{name}: its {len(theirs)} classes are not the {len(ours)} of the '
        f'training set, they differ in {differ}; set `classes` of both sources '
        'to one list of all names, as data.folders.read_classes takes it.'
      )


def check_apart(opened, ours=('train', 'val')):
  """Refuses sets that share examples with some of them.

  Args:
    opened: `{name: source}`.
    ours: names of the sets that share none with another one.
  """
  ids = {name: set(source.ids) for name, source in opened.items()}
  for one, other in itertools.product(ours, ids):
    shared = ids[one] & ids[other]
    if shared and one != other:
      raise ValueError(
        f'{one} and {other} share {len(shared):,} examples, one of them '
        f'{min(shared)}; give them other sources, or one `part` that differs '
        'in `take`.'
      )
