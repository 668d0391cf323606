"""An image classification study: config -> what all of its methods share."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from experiments import checks, evaluate, optimizers, parallel, train
from experiments.data import augment, folders, pipeline, sources
from experiments.models import blocks, clip, heads, vit
from experiments.pretrained import load as pretrained
from experiments.tasks import classification

HEADS = ('linear_probe', 'zero_shot', 'pretrained', 'zeros')
_WORDNET_ID = re.compile(r'n\d{8}')


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
    opened, whose classes are not those of the training set, or that shares
    images with it or with the validation set.
  """
  if not config.eval_sets or {'train', 'val'} & set(config.eval_sets):
    raise ValueError(
      f'config.eval_sets are {", ".join(config.eval_sets) or "none"}; name at '
      'least one, and none train or val.'
    )
  specs = {'train': config.train.to_dict(), 'val': config.val.to_dict()}
  for name, spec in config.eval_sets.items():
    specs[name] = {k: v for k, v in spec.to_dict().items() if k != 'only'}
  opened = {}
  for name, spec in specs.items():
    opened[name] = sources.open_source(spec, config.data_dir)
    ours, theirs = opened['train'].class_names, opened[name].class_names
    if ours != theirs:
      differ = sorted(set(ours) ^ set(theirs))
      differ = ', '.join(map(repr, differ[:5])) or 'their order'
      raise ValueError(
        f'{name}: its {len(theirs)} classes are not the {len(ours)} of the '
        f'training set, they differ in {differ}; set `classes` of both sources '
        'to one list of all names, as data.folders.read_classes takes it.'
      )
    if not len(opened[name]):
      raise ValueError(f'{name}: no example is left of {spec}.')
  _check_apart(opened)
  return opened


def _check_apart(opened):
  """Refuses sets that share examples with the training or validation set."""
  ids = {name: set(source.ids) for name, source in opened.items()}
  for ours, other in itertools.product(('train', 'val'), ids):
    shared = ids[ours] & ids[other]
    if shared and ours != other:
      raise ValueError(
        f'{ours} and {other} share {len(shared):,} examples, one of them '
        f'{min(shared)}; give them other sources, or one `part` that differs '
        'in `take`.'
      )


def model_config(config):
  """The `vit.ViTConfig` of the study.

  Raises:
    As `pretrained.vit_config`, where `config.model.name` is ''.
  """
  return dataclasses.replace(
    pretrained.vit_config(config.model.name, config.model.pretrained),
    dtype=config.model.dtype,
    drop_path=config.model.drop_path,
    remat=config.model.remat,
    scan=config.model.scan,
  )


def _text_config(config):
  return pretrained.text_config(config.model.name, config.model.pretrained)


def check(config):
  """Refuses a study that could not end, before any time is spent on it.

  Where the budget is in epochs, it becomes `config.num_steps`; a ~ in a path
  becomes the home directory.

  Returns:
    As `open_sets`.

  Raises:
    ValueError, OSError, ModuleNotFoundError: saying what to change.
  """
  check_config(config)
  _check_devices(config)
  opened = open_sets(config)
  class_names = opened['train'].class_names
  _check_budget(config, len(opened['train']))
  _check_workers(config, opened)
  _check_classes(config, opened, len(class_names))
  if config.head == 'zero_shot':
    _check_texts(config, class_names)
  if config.head == 'pretrained':
    pretrained.check_head(config.model.pretrained, class_names)
  text = _text_config(config) if config.head == 'zero_shot' else None
  pretrained.check(model_config(config), config.model.pretrained, text)
  return opened


def check_config(config):
  """The part of `check` that looks at no file and no device.

  Raises:
    ValueError: saying what to change.
  """
  checks.normalise(config)
  for key in (
    'num_seeds',
    'batch_size',
    'eval_batch_size',
    'eval_every',
    'repeats',
    'accumulate',
    'save_every',
    'keep',
    'log_every',
  ):
    if config[key] < 1:
      raise ValueError(f'config.{key} is {config[key]}; it must be at least 1.')
  if not config.metrics or not config.methods:
    raise ValueError(
      'config.metrics and config.methods name at least one each.'
    )
  for name in config.metrics:
    _check_one_of('metrics', name, classification.METRICS)
  for name, method in config.methods.items():
    _check_method(config, name, method)
  _check_model(config)
  _check_recipe(config)
  checks.check_effects(config)


def _check_devices(config):
  number = parallel.layout(config.layout).num_devices
  parts = number * config.accumulate
  if config.batch_size % parts:
    raise ValueError(
      f'config.batch_size is {config.batch_size}; it must be a multiple of '
      f'{parts}: {number} devices times config.accumulate.'
    )
  if config.eval_batch_size % number:
    raise ValueError(
      f'config.eval_batch_size is {config.eval_batch_size}; it must be a '
      f'multiple of {number}, the number of devices.'
    )


def _check_budget(config, num_examples):
  if bool(config.num_steps) == bool(config.num_epochs):
    raise ValueError(
      f'config.num_steps is {config.num_steps} and config.num_epochs '
      f'{config.num_epochs}; set one, and the other to 0.'
    )
  if config.num_epochs:
    steps = config.num_epochs * num_examples / config.batch_size
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
  if config.batch_size > num_examples:
    raise ValueError(
      f'config.batch_size is {config.batch_size}, of {num_examples} training '
      'examples; make it smaller.'
    )


def _check_workers(config, opened):
  """Where the images are run through the lower blocks, they are read once."""
  few = all(len(source) <= evaluate.FEW for source in opened.values())
  if config.num_workers and config.first_block and few:
    raise ValueError(
      f'config.num_workers is {config.num_workers}, which has no effect: with '
      f'config.first_block = {config.first_block} the images are read once, '
      f'and threads read up to {evaluate.FEW} of them; set one of the two to 0.'
    )


def _check_one_of(key, value, known):
  if value not in known:
    raise ValueError(
      f'config.{key} is {value!r}; it must be one of {", ".join(known)}.'
    )


def _check_model(config):
  if config.model.name:
    _check_one_of('model.name', config.model.name, vit.CONFIGS)
  _check_one_of('model.dtype', config.model.dtype, ('float32', 'bfloat16'))
  _check_one_of('head', config.head, HEADS)
  if not config.model.pretrained:
    raise ValueError('config.model.pretrained is empty; say where weights are.')
  model = model_config(config)
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
      f'config.head is zero_shot, which {config.model.name or "this model"} '
      'has no text tower for; use a clip model, or another head.'
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
  shares = ('flip', 'erasing', 'mix_probability', 'mix_switch')
  for key in (*shares, 'label_smoothing'):
    if not 0 <= config[key] <= 1:
      raise ValueError(f'config.{key} is {config[key]}; it is from 0 to 1.')
  if not 0 < config.eval_crop <= 1:
    raise ValueError(
      f'config.eval_crop is {config.eval_crop}; it is above 0, up to 1.'
    )
  scale = config.crop_scale
  if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
    raise ValueError(
      f'config.crop_scale is {scale}; it is the smallest and the largest share '
      'of the area, above 0 and up to 1.'
    )
  if min(config.mixup, config.cutmix) < 0:
    raise ValueError(
      f'config.mixup is {config.mixup}, config.cutmix {config.cutmix}; '
      'neither is below 0.'
    )
  for key in ('clip_norm', 'num_workers', 'profile'):
    if not config[key] >= 0:
      raise ValueError(f'config.{key} is {config[key]}; it is 0 or more.')
  if not 0 <= config.ema < 1:
    raise ValueError(f'config.ema is {config.ema}; it is 0 or more, below 1.')
  if not 0 < config.learning_rate < math.inf:
    raise ValueError(
      f'config.learning_rate is {config.learning_rate}; it is above 0.'
    )
  for key in ('warmup_learning_rate', 'min_learning_rate'):
    if not 0 <= config[key] <= config.learning_rate:
      raise ValueError(
        f'config.{key} is {config[key]}; it is from 0 to '
        f'config.learning_rate, {config.learning_rate}.'
      )


def _check_classes(config, opened, num_classes):
  """The classes are all there, as far as is known without reading images."""
  for name, eval_set in config.eval_sets.items():
    if 'only' in eval_set and len(_classes(config, name)) != num_classes:
      raise ValueError(
        f'config.eval_sets.{name}.only is of the 1,000 classes of ImageNet, '
        f'these are {num_classes}.'
      )
  for name, eval_sets in config.means.items():
    for a_set in eval_sets:
      _check_one_of(f'means.{name}', a_set, config.eval_sets)
  of_two = {'auroc', 'ap'} & set(config.metrics)
  if of_two and num_classes != 2:
    raise ValueError(
      f'config.metrics are {", ".join(config.metrics)}; auroc and ap are of '
      f'two classes, these are {num_classes}.'
    )
  known = {
    name: np.unique(source.labels)
    for name, source in opened.items()
    if source.labels is not None
  }
  if config.balanced_loss and 'train' not in known:
    raise ValueError(
      'config.balanced_loss needs the labels of the training set, which are '
      'not known before it is read; set it to False.'
    )
  fitted = config.balanced_loss or config.head == 'linear_probe'
  absent = np.setdiff1d(range(num_classes), known.get('train', []))
  if fitted and 'train' in known and absent.size:
    names = [opened['train'].class_names[label] for label in absent[:5]]
    raise ValueError(
      f'The training set has no example of {absent.size} of its '
      f'{num_classes} classes: {", ".join(names)}.'
    )
  for name, labels in known.items():
    if of_two and len(labels) < 2:
      raise ValueError(f'{name} has one class only; auroc and ap need two.')


def _check_texts(config, class_names):
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
  if config.class_names and len(lines) != len(class_names):
    raise ValueError(
      f'config.class_names {config.class_names!r} has {len(lines)} lines, the '
      f'training set {len(class_names)} classes.'
    )
  if not config.class_names and all(map(_WORDNET_ID.fullmatch, class_names)):
    raise ValueError(
      f'The classes are named {class_names[0]} and so on, which no text tower '
      'knows; set --config.class_names to a file of names, a line each.'
    )


def _check_method(config, name, method):
  key = f'methods.{name}'
  if method.optimizer and method.average_of:
    raise ValueError(
      f'config.{key} has an optimizer and averages {method.average_of!r}; it '
      'is one or the other.'
    )
  if method.optimizer:
    _check_one_of(f'{key}.optimizer', method.optimizer, optimizers.OPTIMIZERS)
    _check_one_of(f'{key}.train', method.train, optimizers.TRAINED)
  for part, low, high in (
    ('rate', 0, math.inf),
    ('weight_decay', 0, math.inf),
    ('spd', 0, math.inf),
    ('layer_decay', 0, math.inf),
    ('alpha', 0, 1),
  ):
    value = method[part]
    if value is not None and not low <= value <= high:
      raise ValueError(
        f'config.{key}.{part} is {value}; it is from {low} to {high}.'
      )
  if method.starts_from and config.methods.get(method.starts_from, {}).get(
    'starts_from'
  ):
    raise ValueError(
      f'config.{key} starts from {method.starts_from!r}, which starts from '
      'another run itself; name one that starts from theta_0.'
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


def load_model(config, class_names):
  """The pretrained model; its head is so too, zero-shot, or zero so far.

  Args:
    config: a study that `check` accepted.
    class_names: of the training set.

  Returns:
    A `heads.Classifier`.

  Raises:
    ValueError, OSError: of a checkpoint that is not this model's, or not there.
  """
  source = config.model.pretrained
  model = heads.Classifier(
    pretrained.load_vit(model_config(config), source),
    len(class_names),
    unit_features=config.head == 'zero_shot',
  )
  if config.head == 'zero_shot':
    if config.class_names:
      names = clip.read_class_names(config.class_names)
    else:
      names = [name.replace('_', ' ') for name in class_names]
    prompts = clip.read_prompts(config.prompts)
    text, tokenizer, scale = pretrained.load_text(_text_config(config), source)
    model.head.kernel[...] = clip.zero_shot_head(
      text, tokenizer, names, prompts, scale
    )
  if config.head == 'pretrained':
    kernel, bias, unit_features = pretrained.load_head(source, class_names)
    model.head.kernel[...], model.head.bias[...] = kernel, bias
    model.unit_features = unit_features
  return model


def load(config, opened, model, progress):
  """Reads what is read once, and sets the model up for fine-tuning.

  Where `config.first_block` is not 0, the blocks below are not trained: their
  output is computed once, in float16.

  Args:
    config: a study that `check` accepted.
    opened: as `check` returned it.
    model: as `load_model` returned it; a linear probe becomes its head here.
    progress: (total, description) -> a context with `update(n)`.

  Returns:
    A `train.FineTuning`, and the sets to report, `{name: EvalSet}`.
  """
  layout = parallel.layout(config.layout)
  transforms = augment.evaluation(config.image_size, config.eval_crop)
  sets = {
    name: evaluate.EvalSet(
      source, transforms, config.num_workers, _classes(config, name)
    )
    for name, source in opened.items()
  }
  if config.first_block:
    sets = _run_lower_blocks(config, layout, model, sets, progress)
  labels = opened['train'].labels if config.balanced_loss else None
  task = make_task(config, len(opened['train'].class_names), labels)
  if config.head == 'linear_probe':
    _fit_head(config, layout, task, model, sets, progress)
  graphdef, params, frozen = nnx.split(
    model, blocks.from_block(config.first_block), ...
  )
  fine_tuning = train.FineTuning(
    task,
    functools.partial(classification.metrics, config.metrics),
    graphdef,
    layout.put(params),
    layout.put(frozen),
    functools.partial(_train_batches, config, sets['train']),
    sets['val'],
    config,
    layout,
  )
  return fine_tuning, {name: sets[name] for name in config.eval_sets}


def _train_batches(config, train_set, seed, start=0):
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
    start=start,
    shard=parallel.shard(),
  )


def _classes(config, name):
  file = config.eval_sets.get(name, {}).get('only')
  return folders.class_mask(file) if file else None


def make_task(config, num_classes, labels=None):
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


def _run_lower_blocks(config, layout, model, sets, progress):
  graphdef, state = nnx.split(model)
  state = layout.put(state)

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
        layout,
        bar.update,
      )
      cached[name] = evaluate.EvalSet(
        Arrays(*tokens_and_labels), classes=eval_set.classes
      )
  return cached


def _fit_head(config, layout, task, model, sets, progress):
  """A linear probe on frozen features, so that theta_0 means something."""
  graphdef, state = nnx.split(model)
  state = layout.put(state)

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
        layout,
        bar.update,
      )
      for name in names
    ]
  head = heads.linear_probe(
    *probed,
    classification.METRICS[config.metrics[0]],
    balanced=config.balanced_loss,
  )
  # To the last bit the same in every process.
  head = multihost_utils.broadcast_one_to_all(head)
  model.head.kernel[...], model.head.bias[...] = head
