"""Image classification: pretrained ViTs, a linear head, images of classes."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from experiments import checks, evaluate, parallel
from experiments.configs import images
from experiments.data import augment, folders
from experiments.models import blocks, clip, heads, vit
from experiments.pretrained import load as pretrained
from experiments.pretrained import save
from experiments.studies import base, first_stage
from experiments.tasks import classification

HEADS = ('linear_probe', 'zero_shot', 'pretrained', 'zeros')
FILES = ('prompts', 'class_names')
STEP = (
  'image_size',
  'num_classes',
  'head',
  'mixup',
  'cutmix',
  'mix_probability',
  'mix_switch',
  'label_smoothing',
)
_WORDNET_ID = re.compile(r'n\d{8}')

defaults = images.base


def check(config):
  """See `studies.base`.

  Raises:
    ValueError, OSError, ModuleNotFoundError: saying what to change.
  """
  _check_keys(config)
  opened, first = _open_sets(config)
  class_names = opened['train'].class_names
  _check_workers(config, opened | first)
  _check_classes(config, opened | first, len(class_names))
  if config.head == 'zero_shot':
    _check_texts(config, class_names)
  if config.head == 'pretrained':
    pretrained.check_head(config.model.pretrained, class_names)
  text = _text_config(config) if config.head == 'zero_shot' else None
  pretrained.check(_model_config(config), config.model.pretrained, text)
  return opened


def build(config, sources):
  """See `studies.base`.

  Raises:
    ValueError, OSError: of a checkpoint that is not this model's, or not there.
  """
  class_names = sources['train'].class_names
  task = _make_task(config, len(class_names), sources)
  model = load_model(config, class_names)
  fit = None
  if config.head == 'linear_probe':
    fit = functools.partial(_fit_head, config, task, model)
  parts = _parts(config, task, model, _labelled(config, sources))
  if config.first_stage.num_steps:
    first = first_stage.open_sets(config)
    task = _make_task(config, len(class_names), first)
    fit = functools.partial(_learn_first, config, task, parts, fit, first)
  return parts._replace(fit=fit)


def _labelled(config, sources):
  transforms = augment.evaluation(config.image_size, config.eval_crop)
  return {
    name: classification.LabelledSet(
      source,
      transforms,
      config.num_workers,
      groups=source.groups,
      classes=_classes(config, name),
    )
    for name, source in sources.items()
  }


def _learn_first(config, task, parts, fit, first, sets, layout, progress):
  """A head, and then what the study trains, on the sets of the first stage."""
  del sets
  first_stage.learn(
    config,
    task,
    parts.model,
    parts.trained,
    _labelled(config, first),
    parts.augment,
    fit,
    layout,
    progress,
  )


def shapes(config):
  """See `studies.base`.

  Raises:
    ValueError: saying what to change.
  """
  _check_keys(config)
  if not config.num_classes:
    raise ValueError(
      'config.num_classes is 0, for as many as the training set has, which is '
      'not opened here; set it.'
    )

  def make():
    return heads.Classifier(
      vit.ViT(_model_config(config), rngs=nnx.Rngs(0)),
      config.num_classes,
      unit_features=config.head == 'zero_shot',
    )

  task = _make_task(config, config.num_classes)
  return _parts(config, task, nnx.eval_shape(make), {})


def exported(config, run, trained, format_):
  """See `studies.base`."""
  class_names = _read_class_names(run)
  zero_shot = config.head == 'zero_shot'
  if zero_shot:
    config.head = 'zeros'  # no texts: the run's own head follows
  model = load_model(config, class_names)
  model.unit_features |= zero_shot
  arguments = trained(model), class_names, config.image_size, config.eval_crop
  if format_ == 'peft':
    return save.peft(*arguments, base=config.model.pretrained)
  return save.merged(*arguments)


def _read_class_names(run):
  path = run / base.CLASSES
  try:
    return json.loads(path.read_text('utf-8'))
  except (OSError, ValueError) as error:
    raise ValueError(
      f'{path} cannot be read, which names the classes of the head: {error}; '
      'run the same command of experiments.main again, which writes it.'
    ) from error


def _parts(config, task, model, sets):
  size = config.image_size
  example = {
    'image': jax.ShapeDtypeStruct((size, size, 3), jnp.uint8),
    'label': jax.ShapeDtypeStruct((), jnp.int32),
  }
  transforms = None
  if config.augment:
    transforms = augment.training(
      config.image_size,
      scale=config.crop_scale,
      flip=config.flip,
      randaugment=config.randaugment,
      erasing=config.erasing,
    )
  trained = blocks.from_block(config.first_block)
  return base.Parts(task, model, trained, sets, example, transforms)


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
    pretrained.load_vit(_model_config(config), source),
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


def _fit_head(config, task, model, sets, layout, progress):
  """A linear probe on frozen features, so that theta_0 means something."""
  graphdef, state = nnx.split(model)
  state = layout.put(state)

  @jax.jit
  def features(state, batch):
    return task.features(nnx.merge(graphdef, state), batch)

  names = ('train', 'val')
  total = sum(len(sets[name].source) for name in names)
  with progress(total, 'features of the linear probe', 'image') as bar:
    columns = [
      evaluate.apply(
        functools.partial(features, state),
        sets[name],
        config.eval_batch_size,
        layout,
        bar.update,
      )
      for name in names
    ]
  with progress(1, 'linear probe', 'fit') as bar:
    head = heads.linear_probe(
      *((part['features'], part['label']) for part in columns),
      classification.METRICS[config.metrics[0]],
      balanced=config.balanced_loss,
    )
    bar.update()
  # To the last bit the same in every process.
  head = multihost_utils.broadcast_one_to_all(head)
  model.head.kernel[...], model.head.bias[...] = head


def _make_task(config, num_classes, sources=None):
  weights = np.ones(num_classes)
  if sources and config.balanced_loss:
    labels = sources['train'].labels
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
    tuple(config.metrics),
  )


def _classes(config, name):
  file = config.eval_sets.get(name, {}).get('only')
  return folders.class_mask(file) if file else None


def _model_config(config):
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


def _open_sets(config):
  """Those of the study, and `{'first_stage.train': source ...}`."""
  opened = base.open_sets(config, unread=('only',))
  first = {
    f'first_stage.{name}': source
    for name, source in first_stage.open_sets(config).items()
  }
  base.check_classes(opened | first)
  learned = [name for name in first if name == 'first_stage.train']
  base.check_apart(
    opened | {name: first[name] for name in learned},
    ours=('train', 'val', *learned),
  )
  # Both stages may be chosen on the same examples.
  unseen = {name: opened[name] for name in opened if name != 'val'}
  base.check_apart(unseen | first, ours=[n for n in first if n not in learned])
  return opened, first


def _check_keys(config):
  """What can be told without a file of data."""
  for name in config.metrics:
    checks.one_of('metrics', name, classification.METRICS)
  _check_model(config)
  _check_recipe(config)
  first_stage.check_keys(config, defaults())
  checks.check_effects(RULES, config, defaults())


def _check_workers(config, opened):
  """Where the images are run through the lower blocks, they are read once."""
  few = all(len(source) <= evaluate.FEW for source in opened.values())
  if config.num_workers and config.first_block and few:
    raise ValueError(
      f'config.num_workers is {config.num_workers}, which has no effect: with '
      f'config.first_block = {config.first_block} the images are read once, '
      f'and threads read up to {evaluate.FEW} of them; set one of the two to 0.'
    )


def _check_model(config):
  if config.model.name:
    checks.one_of('model.name', config.model.name, vit.CONFIGS)
  checks.one_of('model.dtype', config.model.dtype, ('float32', 'bfloat16'))
  checks.one_of('head', config.head, HEADS)
  if not config.model.pretrained:
    raise ValueError('config.model.pretrained is empty; say where weights are.')
  model = _model_config(config)
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


def _check_classes(config, opened, num_classes):
  """The classes are all there, as far as is known without reading images."""
  if config.num_classes not in (0, num_classes):
    raise ValueError(
      f'config.num_classes is {config.num_classes}, the training set has '
      f'{num_classes}; set it to that, or to 0.'
    )
  for name, eval_set in config.eval_sets.items():
    if 'only' in eval_set and len(_classes(config, name)) != num_classes:
      raise ValueError(
        f'config.eval_sets.{name}.only is of the 1,000 classes of ImageNet, '
        f'these are {num_classes}.'
      )
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
  for name in ('train', 'first_stage.train'):
    absent = np.setdiff1d(range(num_classes), known.get(name, []))
    if fitted and name in known and absent.size:
      names = [opened['train'].class_names[label] for label in absent[:5]]
      raise ValueError(
        f'{name} has no example of {absent.size} of its {num_classes} '
        f'classes: {", ".join(names)}.'
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


# Keys, whether they have an effect in a study, and if not, why and what to do.
RULES = (
  (
    ('data_dir',),
    lambda c: any(
      source.get('kind') != 'elpv'
      for source in (c.train, c.val, *c.eval_sets.values())
    ),
    'the images of ELPV lie in its package',
    'name another kind of source',
  ),
  (
    ('prompts', 'class_names'),
    lambda c: c.head == 'zero_shot',
    'the head is not made of texts',
    'set config.head to zero_shot',
  ),
  (
    ('model.remat',),
    lambda c: c.first_block < _model_config(c).depth - 1,
    'only the last block is trained, which is never recomputed',
    'lower config.first_block',
  ),
  (
    ('crop_scale', 'flip', 'randaugment', 'erasing'),
    lambda c: c.augment,
    'it is of augmentation, which is off',
    'set config.augment to True',
  ),
  (
    ('repeats',),
    lambda c: c.augment or c.mixup or c.cutmix,
    'the views of an image are all the same without augmentation',
    'set config.augment to True',
  ),
  (
    ('mixup', 'cutmix'),
    lambda c: _images_to_mix(c) > 1,
    'what is mixed is a part of a batch, under pmap of one device, and that is '
    'one image',
    'raise config.batch_size or lower config.accumulate',
  ),
  (
    ('mixup', 'cutmix'),
    lambda c: c.mix_probability,
    'no batch is mixed',
    'raise config.mix_probability',
  ),
  (
    ('mixup',),
    lambda c: not c.cutmix or c.mix_switch < 1,
    'it is always CutMix',
    'lower config.mix_switch',
  ),
  (
    ('cutmix',),
    lambda c: not c.mixup or c.mix_switch > 0,
    'it is always Mixup',
    'raise config.mix_switch',
  ),
  (
    ('mix_probability',),
    lambda c: c.mixup or c.cutmix,
    'there is neither Mixup nor CutMix',
    'set config.mixup or config.cutmix',
  ),
  (
    ('mix_switch',),
    lambda c: c.mixup and c.cutmix,
    'Mixup and CutMix are not both on',
    'set config.mixup and config.cutmix',
  ),
)


def _images_to_mix(config):
  devices = 1
  if config.layout == 'pmap':
    devices = parallel.layout(config.layout).num_devices
  return config.batch_size // (devices * config.accumulate)
