"""A method of a study, its averages and their rows, wherever it is run."""

import dataclasses
import hashlib
import pathlib

import jax
from flax import nnx

from experiments import (
  averages,
  checkpoint,
  examples,
  files,
  log,
  optimizers,
  report,
  study,
  train,
)
from experiments.models import lora
from experiments.studies import base as studies

CLASSES = studies.CLASSES


def adapt(fine_tuning, method, seed):
  """What a method trains: where it says so, LoRA and a new head alone.

  Args:
    fine_tuning: of the study.
    method: one of `config.methods`.
    seed: of the adapters.

  Returns:
    A `train.FineTuning`; the same where the method has no LoRA.

  Raises:
    ValueError: no module that the study trains has such a name.
  """
  if not method.lora:
    return fine_tuning
  before = dict(nnx.to_flat_state(fine_tuning.pretrained))
  model, trained = adapt_model(
    nnx.merge(fine_tuning.graphdef, fine_tuning.pretrained, fine_tuning.frozen),
    lambda path, _: path in before,
    method,
    seed,
  )
  graphdef, params, frozen = nnx.split(model, trained, ...)
  return dataclasses.replace(
    fine_tuning,
    graphdef=graphdef,
    pretrained=fine_tuning.layout.put(params),
    frozen=frozen,
    interpolate=averages.lora,
    scale=scale(method),
  )


def scale(method):
  """What a method's product B A is multiplied by; 1 where there is none."""
  return method.lora_alpha / method.lora if method.lora else 1.0


def adapt_model(model, trained, method, seed):
  """The same of a model and the NNX filter of what is trained of it."""
  if not method.lora:
    return model, trained
  model = lora.add(
    model,
    method.lora,
    method.lora_alpha,
    modules=method.lora_modules,
    within=trained,
    dropout=method.lora_dropout,
    kind=method.lora_kind,
    rngs=nnx.Rngs(seed),
  )
  return model, nnx.Any(nnx.LoRAParam, lambda path, _: path[0] == 'head')


def run(
  config, tuning, name, seed, start=None, callback=None, checkpoints=None
):
  """The `train.Run` of a method; of theta_0, where it trains nothing.

  Args:
    config: the study.
    tuning: as `adapt` returned it for the method.
    name: key of `config.methods`.
    seed: of the run.
    start: as `train.FineTuning.run` takes it; so are the next two.
    callback: see there.
    checkpoints: see there.
  """
  method = config.methods[name]
  if not method.optimizer:
    return train.Run(tuning.pretrained, None, {}, None, None)
  return tuning.run(
    *optimizers.from_config(config, method), seed, start, callback, checkpoints
  )


def average(config, tuning, name, run):
  """The `train.Run` of an average between theta_0 and what a run chose.

  Args:
    config: the study.
    tuning: that the run was of.
    name: of the average, a key of `config.methods`.
    run: the `train.Run`.
  """
  alpha = config.methods[name].alpha
  params = tuning.interpolate(tuning.pretrained, run.params, alpha)
  return train.Run(params, run.step, {}, None, None)


def row(config, tuning, name, seed, run):
  """What a table has of a `train.Run`: see `compare.run`.

  Of LoRA it has the `models.lora.factors` too. On the way are written what the
  run makes of the `examples` and, where the kind of the study has a `draw`, its
  picture.
  """
  if draw := getattr(study.kind(config), 'draw', None):
    figure = draw(config, tuning, run.params)
    if jax.process_index() == 0:
      pictures = pathlib.Path(config.output_dir, 'pictures')
      pictures.mkdir(parents=True, exist_ok=True)
      label = report.label(config.methods[name])
      figure.suptitle(f'{config.title}\n{label}, seed {seed}')
      figure.savefig(pictures / f'{name}_{seed}.png', dpi=100)
  factors = _factors(tuning.pretrained, run.params)
  kept = examples.Kept()
  described = tuning.describe(run, kept)
  if jax.process_index() == 0:
    kept.write(examples.path(config.output_dir, name, seed))
  return {
    'method': name,
    'label': report.label(config.methods[name]),
    'seed': seed,
    **described,
    **{key: float(value) for key, value in factors.items()},
  }


_factors = jax.jit(lora.factors)


def write_layers(config, tuning, name, seed, gathered):
  """Writes what SPD did in each layer of a run, where it has SPD.

  Args:
    config: the study.
    tuning: that the run was of.
    name: key of `config.methods`.
    seed: of the run.
    gathered: a `log.LayerLog` of its steps.
  """
  method, _ = optimizers.from_config(config, config.methods[name])
  layers = gathered.layers(method.layer_names(tuning.pretrained))
  if layers and jax.process_index() == 0:
    layers.write(log.Layers.path(config.output_dir, name, seed))


def provenance(config):
  """What all rows of a study share."""
  means = config.means.to_dict()
  return {'title': config.title, **report.provenance(), 'means': means}


def folder(config, name, seed):
  """Where a run of `experiments.main` writes to."""
  return pathlib.Path(config.output_dir, f'{name}_{seed}')


def checkpoints(config, name, seed, read_only=False):
  """The `checkpoint.Checkpoints` of a run of `experiments.main`."""
  about = config.to_dict()
  about['methods'] = {name: config.methods[name].to_dict()}
  # What is in the files: a clone elsewhere has them at another path.
  for key in study.kind(config).FILES:
    if config[key]:
      text = files.expand(config[key]).read_bytes()
      about[key] = hashlib.sha256(text).hexdigest()
  # Its devices draw other random numbers.
  about |= {'seed': seed, 'pmap': config.layout == 'pmap'}
  return checkpoint.Checkpoints(
    folder(config, name, seed) / 'checkpoints', about, config.keep, read_only
  )


def chosen_step(config, name, seed):
  """The step that a run of `experiments.main` chose.

  Raises:
    FileNotFoundError: it has not ended.
    ValueError: its checkpoints are not of this study.
  """
  if (folder(config, name, seed) / 'checkpoints').exists():
    saved = checkpoints(config, name, seed, read_only=True)
    last = saved.last_step
    if last == config.num_steps:
      return saved.about(last).best_step
  raise FileNotFoundError(
    f'The run of {name!r} with seed {seed} has not ended, which this one '
    f'starts from; run --method={name} --seed={seed} first.'
  )


def chosen_params(config, tuning, name, seed):
  """The params that a run of `experiments.main` chose; see `chosen_step`.

  Args:
    config: the study.
    tuning: as `adapt` returned it for the method.
    name: key of `config.methods`.
    seed: of the run.
  """
  method = optimizers.from_config(config, config.methods[name])
  like = checkpoint.abstract(tuning.init(*method, tuning.pretrained))
  step = chosen_step(config, name, seed)
  saved = checkpoints(config, name, seed, read_only=True)
  return saved.restore(like, step)[0].eval_params
