"""An image classification study: config -> what all of its methods share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import evaluate, optimizers, train
from experiments.data import augment, folders, pipeline, sources
from experiments.models import clip, heads, vit
from experiments.pretrained import load as pretrained
from experiments.pretrained import safetensors
from experiments.tasks import classification

HEADS = ('linear_probe', 'zero_shot', 'zeros')


class Arrays:
  """A source of what lies in memory: inputs [N, ...] and labels [N]."""

  def __init__(self, inputs, labels):
    self.inputs, self.labels = inputs, labels

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    return {'image': self.inputs[index], 'label': self.labels[index]}


def open_sets(config):
  """Opens every source of the study; reads no image.

  Returns:
    `{'train': source, 'val': source, eval set: source ...}`.

  Raises:
    ValueError, OSError, ModuleNotFoundError: of the source that cannot be
    opened, or whose classes are not those of the training set.
  """
  specs = {'train': config.train, 'val': config.val, **config.eval_sets}
  opened = {}
  for name, spec in specs.items():
    spec = {key: spec[key] for key in spec if key != 'only'}
    opened[name] = sources.open_source(spec, config.data_dir)
    ours, theirs = opened['train'].class_names, opened[name].class_names
    if ours != theirs:
      differ = sorted(set(ours) ^ set(theirs)) or 'their order'
      raise ValueError(
        f'{name}: its {len(theirs)} classes are not the {len(ours)} of the '
        f'training set: {differ}.'
      )
    if not len(opened[name]):
      raise ValueError(f'{name}: no example is left of {spec}.')
  return opened


def model_config(config):
  """The `vit.ViTConfig` of the study."""
  return dataclasses.replace(
    vit.CONFIGS[config.model.name],
    dtype=config.model.dtype,
    drop_path=config.model.drop_path,
    remat=config.model.remat,
    scan=config.model.scan,
  )


def check(config):
  """Refuses a study that could not end, before any time is spent on it.

  Returns:
    As `open_sets`.

  Raises:
    ValueError, OSError, ModuleNotFoundError: saying what to change.
  """
  for key in (
    'num_seeds',
    'batch_size',
    'eval_batch_size',
    'eval_every',
    'repeats',
  ):
    if config[key] < 1:
      raise ValueError(f'config.{key} is {config[key]}; it must be at least 1.')
  _check_one_of('model.name', config.model.name, vit.CONFIGS)
  _check_one_of('model.dtype', config.model.dtype, ('float32', 'bfloat16'))
  _check_one_of('head', config.head, HEADS)
  for name in config.metrics:
    _check_one_of('metrics', name, classification.METRICS)
  _check_model(config)
  _check_recipe(config)
  for name, method in config.methods.items():
    _check_method(config, name, method)
  opened = open_sets(config)
  num_classes = len(opened['train'].class_names)
  if config.num_epochs:
    steps = config.num_epochs * len(opened['train']) / config.batch_size
    config.num_steps = round(steps)
  if config.num_steps < 1:
    raise ValueError(
      f'config.num_steps is {config.num_steps}; it must be at least 1.'
    )
  if not 0 <= round(config.warmup * config.num_steps) < config.num_steps:
    raise ValueError(
      f'config.warmup is {config.warmup}; it is the share of the '
      f'{config.num_steps} steps that warm up, less than all of them.'
    )
  if config.batch_size > len(opened['train']):
    raise ValueError(
      f'config.batch_size is {config.batch_size}, of {len(opened["train"])} '
      'training examples; make it smaller.'
    )
  if num_classes != 2 and {'auroc', 'ap'} & set(config.metrics):
    raise ValueError(
      f'config.metrics are {", ".join(config.metrics)}; auroc and ap are of '
      f'two classes, these are {num_classes}.'
    )
  if config.balanced_loss and opened['train'].labels is None:
    raise ValueError(
      'config.balanced_loss needs the labels of the training set, which are '
      'not known before it is read; set it to False.'
    )
  if config.head == 'zero_shot':
    _check_texts(config, num_classes)
  for name, eval_sets in config.means.items():
    for a_set in eval_sets:
      _check_one_of(f'means.{name}', a_set, config.eval_sets)
  pretrained.find(config.model.pretrained)
  return opened


def _check_one_of(key, value, known):
  if value not in known:
    raise ValueError(
      f'config.{key} is {value!r}; it must be one of {", ".join(known)}.'
    )


def _check_model(config):
  model = vit.CONFIGS[config.model.name]
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
  if config.head == 'zero_shot' and model.projection is None:
    raise ValueError(
      f'config.head is zero_shot, which {config.model.name} has no text tower '
      'for; use a clip model, or another head.'
    )
  if config.first_block and config.model.scan:
    raise ValueError(
      'config.model.scan runs all blocks; set config.first_block to 0.'
    )


def _check_recipe(config):
  changes = {'augment': config.augment, 'mixup': config.mixup}
  changes |= {'cutmix': config.cutmix}
  for key, value in changes.items():
    if value and config.first_block:
      raise ValueError(
        f'config.{key} is {value}, but with config.first_block = '
        f'{config.first_block} the images are run through the lower blocks '
        'once; set one of the two to 0.'
      )
  shares = ('flip', 'erasing', 'mix_probability', 'mix_switch', 'ema')
  for key in (*shares, 'label_smoothing'):
    if not 0 <= config[key] <= 1:
      raise ValueError(f'config.{key} is {config[key]}; it is from 0 to 1.')
  if not 0 <= config.model.drop_path < 1:
    raise ValueError(
      f'config.model.drop_path is {config.model.drop_path}; it is a '
      'probability below 1.'
    )


def _check_texts(config, num_classes):
  for key, read in (
    ('prompts', clip.read_prompts),
    ('class_names', clip.read_class_names),
  ):
    if not config[key] and key == 'class_names':
      continue
    try:
      lines = read(config[key])
    except OSError as error:
      raise FileNotFoundError(
        f'config.{key} {config[key]!r} cannot be read: {error.strerror}; '
        'experiments/models/clip.py says how to write it.'
      ) from error
  if config.class_names and len(lines) != num_classes:
    raise ValueError(
      f'config.class_names {config.class_names!r} has {len(lines)} lines, the '
      f'training set {num_classes} classes.'
    )


def _check_method(config, name, method):
  key = f'methods.{name}'
  if method.optimizer:
    _check_one_of(f'{key}.optimizer', method.optimizer, optimizers.OPTIMIZERS)
    _check_one_of(f'{key}.train', method.train, optimizers.TRAINED)
  elif method.spd is not None:
    raise ValueError(
      f'config.{key}.spd goes round an optimizer; set config.{key}.optimizer.'
    )
  for verb, source in (
    ('averages', method.average_of),
    ('starts from', method.starts_from),
  ):
    if source and not config.methods.get(source, {}).get('optimizer'):
      raise ValueError(
        f'config.{key} {verb} the run of {source!r}, which is not run; add '
        f'it: --methods={",".join([source, *config.methods])}.'
      )


def load(config, opened, progress):
  """Loads the model and its head, and sets it up for fine-tuning.

  Where `config.first_block` is not 0, the blocks below are not trained: their
  output is computed once, in float16.

  Args:
    config: a study that `check` accepted.
    opened: as `check` returned it.
    progress: (total, description) -> a context with `update(n)`.

  Returns:
    A `train.FineTuning`, and the sets to report, `{name: EvalSet}`.
  """
  backbone = pretrained.load_vit(model_config(config), config.model.pretrained)
  class_names = opened['train'].class_names
  model = heads.Classifier(
    backbone, len(class_names), unit_features=config.head == 'zero_shot'
  )
  transforms = augment.evaluation(config.image_size, config.eval_crop)
  sets = {
    name: evaluate.EvalSet(
      source, transforms, config.num_workers, _classes(config, name)
    )
    for name, source in opened.items()
  }
  if config.first_block:
    sets = _run_lower_blocks(config, model, sets, progress)
  labels = opened['train'].labels if config.balanced_loss else None
  task = _task(config, len(class_names), labels)
  _set_head(config, task, model, sets, class_names, progress)
  graphdef, params, frozen = nnx.split(
    model, train.trainable_from(config.first_block), ...
  )
  fine_tuning = train.FineTuning(
    task,
    functools.partial(classification.metrics, config.metrics),
    graphdef,
    params,
    frozen,
    functools.partial(_train_batches, config, sets['train']),
    sets['val'],
    config,
  )
  return fine_tuning, {name: sets[name] for name in config.eval_sets}


def _train_batches(config, train_set, seed):
  transforms = train_set.transforms
  if config.augment:
    transforms = augment.training(
      config.image_size,
      scale=config.crop_scale,
      flip=config.flip,
      randaugment=config.randaugment,
      erasing=config.erasing,
    )
  return pipeline.train_batches(
    train_set.source,
    transforms,
    batch_size=config.batch_size,
    seed=seed,
    num_workers=train_set.num_workers,
    repeats=config.repeats,
  )


def _classes(config, name):
  file = config.eval_sets.get(name, {}).get('only')
  return folders.class_mask(file) if file else None


def _task(config, num_classes, labels):
  weights = np.ones(num_classes)
  if labels is not None:
    weights = classification.balanced_weights(labels, num_classes)
  return classification.Classification(
    num_classes,
    config.first_block,
    tuple(weights.tolist()),
    config.label_smoothing,
    config.mixup,
    config.cutmix,
    config.mix_probability,
    config.mix_switch,
  )


def _run_lower_blocks(config, model, sets, progress):
  graphdef, state = nnx.split(model)

  @jax.jit
  def lower(state, images):
    backbone = nnx.merge(graphdef, state).backbone
    tokens = backbone.embed(backbone.config.normalize(images))
    tokens = backbone.encode(tokens, stop=config.first_block)
    return tokens.astype(jnp.float16)

  cached = {}
  with progress(sum(len(s.source) for s in sets.values()), 'images') as bar:
    for name, eval_set in sets.items():
      tokens_and_labels = evaluate.predictions(
        functools.partial(lower, state),
        eval_set,
        config.eval_batch_size,
        bar.update,
      )
      cached[name] = evaluate.EvalSet(
        Arrays(*tokens_and_labels), classes=eval_set.classes
      )
  return cached


def _set_head(config, task, model, sets, class_names, progress):
  """Makes the model theta_0: a backbone and a head that means something."""
  if config.head == 'zero_shot':
    text = safetensors.load_text(
      clip.CONFIGS[config.model.name], config.model.pretrained
    )
    if config.class_names:
      class_names = clip.read_class_names(config.class_names)
    else:
      class_names = [name.replace('_', ' ') for name in class_names]
    text, tokenizer, scale = text
    model.head.kernel[...] = clip.zero_shot_head(
      text, tokenizer, class_names, clip.read_prompts(config.prompts), scale
    )
  elif config.head == 'linear_probe':
    graphdef, state = nnx.split(model)

    @jax.jit
    def features(state, inputs):
      model = nnx.merge(graphdef, state)
      return model.features(task.tokens(model, inputs), config.first_block)

    names = ('train', 'val')
    total = sum(len(sets[name].source) for name in names)
    with progress(total, 'features') as bar:
      probed = [
        evaluate.predictions(
          functools.partial(features, state),
          sets[name],
          config.eval_batch_size,
          bar.update,
        )
        for name in names
      ]
    model.head.kernel[...], model.head.bias[...] = heads.linear_probe(
      *probed,
      classification.METRICS[config.metrics[0]],
      balanced=config.balanced_loss,
    )
