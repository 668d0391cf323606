"""Semantic segmentation: pretrained backbones, a decoder, images with masks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from experiments import checks, evaluate, pictures
from experiments.configs import segmentation as configs
from experiments.data import dense, masks
from experiments.models import blocks, heads, segmenter, swin, vit
from experiments.pretrained import load as pretrained
from experiments.studies import base
from experiments.tasks import segmentation

HEADS = ('linear_probe', 'new')
DECODERS = ('linear', 'mlp')
FILES = ()
STEP = ('image_size', 'num_classes', 'decoder')
# Patches that a linear probe is fitted to, drawn with seed 0.
_PROBED = 20_000
_DRAWN = 6  # images of a picture

defaults = configs.base


def check(config):
  """See `studies.base`.

  Raises:
    ValueError, OSError, ModuleNotFoundError: saying what to change.
  """
  _check_keys(config)
  _check_sources(config)
  opened = base.open_sets(config)
  base.check_classes(opened)
  base.check_apart(opened)
  num_classes = len(opened['train'].class_names)
  if config.num_classes not in (0, num_classes):
    raise ValueError(
      f'config.num_classes is {config.num_classes}, the training set has '
      f'{num_classes}; set it to that, or to 0.'
    )
  if not config.eval_resize:
    for name, source in opened.items():
      _check_size(config, name, source)
  pretrained.check(_model_config(config), config.model.pretrained)
  return opened


def build(config, sources):
  """See `studies.base`.

  Raises:
    ValueError, OSError: of a checkpoint that is not this model's, or not there.
  """
  num_classes = len(sources['train'].class_names)
  backbone = _load(_model_config(config), config.model.pretrained)
  model = segmenter.Segmenter(backbone, _head(config, num_classes))
  sizes = np.concatenate([source.sizes for source in sources.values()])
  whole = dense.Fit(
    _eval_size(config), tuple(sizes.max(0).tolist()), config.eval_resize
  )
  sets = {
    name: evaluate.EvalSet(
      source, [whole], config.num_workers, groups=source.groups
    )
    for name, source in sources.items()
  }
  parts = _parts(config, num_classes, model, sets)
  if config.head == 'linear_probe':
    fit = functools.partial(_fit_head, config, parts.task, model)
    parts = parts._replace(fit=fit)
  return parts


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
    model = _model_config(config)
    kind = swin.Swin if _is_swin(model) else vit.ViT
    backbone = kind(model, rngs=nnx.Rngs(0))
    return segmenter.Segmenter(backbone, _head(config, config.num_classes))

  return _parts(config, config.num_classes, nnx.eval_shape(make), {})


def draw(config, tuning, params):
  """See `studies.base`: the image in the middle of every set, or of some."""
  sources, examples = base.open_sets(config), {}
  predict = functools.partial(
    _predict, tuning.graphdef, tuning.task, params, tuning.frozen
  )
  for name in _shown(list(config.eval_sets)):
    row = len(sources[name]) // 2
    one = dataclasses.replace(
      tuning.sets[name], source=[tuning.sets[name].source[row]], num_workers=0
    )
    found = evaluate.apply(predict, one, config.eval_batch_size, tuning.layout)
    example = sources[name][row]
    height, width = example['mask'].shape
    examples[name] = (
      example['image'],
      example['mask'],
      found[0, :height, :width],
    )
  return pictures.draw_masks(examples, sources['train'].class_names, masks.VOID)


def _shown(names):
  """All of few names; of many the first two, and some from all over the rest.

  Of four corruptions at three severities it is the second of each.
  """
  first, rest = names[:2], names[2:]
  number = min(len(rest), _DRAWN - len(first))
  places = (np.arange(number) + 0.5) * len(rest) / max(number, 1)
  return [*first, *(rest[int(place)] for place in places)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predict(graphdef, task, params, frozen, batch):
  return task.predict(nnx.merge(graphdef, params, frozen), batch)


def _parts(config, num_classes, model, sets):
  size = tuple(config.image_size)
  example = {
    'image': jax.ShapeDtypeStruct((*size, 3), jnp.uint8),
    'mask': jax.ShapeDtypeStruct(size, jnp.int32),
    'scale': jax.ShapeDtypeStruct((2,), jnp.float32),
  }
  patch = _model_config(config).patch_size
  task = segmentation.Segmentation(
    num_classes=num_classes,
    first_block=config.first_block,
    grid=tuple(side // patch for side in _eval_size(config)),
    metric_names=tuple(config.metrics),
  )
  transforms = None
  if config.augment:
    transforms = dense.training(
      config.image_size, scale=config.crop_scale, flip=config.flip
    )
  trained = blocks.from_block(config.first_block)
  return base.Parts(task, model, trained, sets, example, transforms)


def _head(config, num_classes):
  """The new decoder."""
  model = _model_config(config)
  if config.decoder == 'linear':
    return segmenter.LinearDecoder(model.width, num_classes)
  return segmenter.MLPDecoder(
    model.widths, num_classes, eps=model.eps, rngs=nnx.Rngs(0)
  )


def _fit_head(config, task, model, sets, layout, progress):
  """A linear probe on frozen features, so that theta_0 means something.

  The class of a patch is the most frequent one of its pixels.
  """
  graphdef, state = nnx.split(model)
  state = layout.put(state)

  @jax.jit
  def features(state, batch):
    return task.features(nnx.merge(graphdef, state), batch)

  names = ('train', 'val')
  total = sum(len(sets[name].source) for name in names)
  columns = []
  with progress(total, 'features of the linear probe', 'image') as bar:
    for name in names:
      part = evaluate.apply(
        functools.partial(features, state),
        sets[name],
        config.eval_batch_size,
        layout,
        bar.update,
      )
      rows = np.flatnonzero(part['label'] != masks.VOID)
      rows = np.random.RandomState(0).permutation(rows)[:_PROBED]
      patches = part['features'].reshape(part['label'].size, -1)
      columns.append((patches[rows], part['label'].ravel()[rows]))
  with progress(1, 'linear probe', 'fit') as bar:
    head = _probe(*columns, task.num_classes)
    bar.update()
  # To the last bit the same in every process.
  head = multihost_utils.broadcast_one_to_all(head)
  linear = model.head.linear
  linear.kernel[...], linear.bias[...] = head


def _probe(train, val, num_classes):
  """`heads.linear_probe`; a class without a patch in `train` has no logit.

  That is 0, never the largest: those of the others sum to 0.
  """
  features, labels = train
  present, labels = np.unique(labels, return_inverse=True)

  def whole(columns):
    filled = np.zeros((*columns.shape[:-1], num_classes), np.float32)
    filled[..., present] = columns
    return filled

  def score(logits, labels):
    return segmentation.patch_miou(whole(logits), labels)

  return tuple(map(whole, heads.linear_probe((features, labels), val, score)))


def _is_swin(model):
  return isinstance(model, swin.SwinConfig)


def _load(model, source):
  load = pretrained.load_swin if _is_swin(model) else pretrained.load_vit
  return load(model, source)


def _model_config(config):
  """The `vit.ViTConfig` or `swin.SwinConfig` of the study.

  Raises:
    As `pretrained.model_config`, where `config.model.name` is ''.
  """
  model = pretrained.model_config(config.model.name, config.model.pretrained)
  changes = {key: config.model[key] for key in ('dtype', 'drop_path', 'remat')}
  if not _is_swin(model):
    changes['scan'] = config.model.scan
  return dataclasses.replace(model, **changes)


def _eval_size(config):
  return tuple(config.eval_size or config.image_size)


def _check_keys(config):
  """What can be told without a file of data."""
  for name in config.metrics:
    checks.one_of('metrics', name, segmentation.METRICS)
  checks.one_of('head', config.head, HEADS)
  checks.one_of('decoder', config.decoder, DECODERS)
  checks.one_of('model.dtype', config.model.dtype, ('float32', 'bfloat16'))
  if config.model.name:
    checks.one_of('model.name', config.model.name, vit.CONFIGS | swin.CONFIGS)
  if not config.model.pretrained:
    raise ValueError('config.model.pretrained is empty; say where weights are.')
  model = _model_config(config)
  _check_model(config, model)
  for key, size in (('image_size', config.image_size), ('eval_size', None)):
    size = _eval_size(config) if size is None else size
    patch = 1 if _is_swin(model) else model.patch_size
    if len(size) != 2 or min(size) < 1 or any(side % patch for side in size):
      raise ValueError(
        f'config.{key} is {tuple(size)}; it is a height and a width, multiples '
        f'of {patch}.'
      )
  _check_recipe(config)
  checks.check_effects(RULES, config, defaults())


def _check_model(config, model):
  if _is_swin(model) != (config.decoder == 'mlp'):
    raise ValueError(
      f"config.decoder is {config.decoder!r}; of a ViT it is 'linear', of a "
      "Swin 'mlp'."
    )
  if config.decoder == 'mlp' and config.head == 'linear_probe':
    raise ValueError(
      "config.head is 'linear_probe', which config.decoder = 'mlp' has none "
      "of; set config.head to 'new'."
    )
  if _is_swin(model) and (config.model.scan or config.first_block):
    raise ValueError(
      f'config.model.scan is {config.model.scan}, config.first_block '
      f'{config.first_block}; the blocks of a Swin are of several shapes, and '
      'all of them are trained: set them to False and 0.'
    )
  if not 0 <= config.first_block < model.depth:
    raise ValueError(
      f'config.first_block is {config.first_block}; the model has blocks 0 to '
      f'{model.depth - 1}.'
    )
  if config.first_block and config.model.scan:
    raise ValueError(
      'config.model.scan runs all blocks; set config.first_block to 0.'
    )


def _check_recipe(config):
  if config.augment and config.first_block:
    raise ValueError(
      'config.augment is True, but with config.first_block = '
      f'{config.first_block} the images are run through the lower blocks once; '
      'set one of the two to 0.'
    )
  if not 0 <= config.flip <= 1:
    raise ValueError(f'config.flip is {config.flip}; it is from 0 to 1.')
  scale = config.crop_scale
  if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
    raise ValueError(
      f'config.crop_scale is {scale}; it is the smallest and the largest '
      'factor of the sides, above 0.'
    )


def _check_sources(config):
  """Every source has masks, which no key of it changes the images of."""
  for name, source in (
    ('train', config.train),
    ('val', config.val),
    *((f'eval_sets.{k}', s) for k, s in config.eval_sets.items()),
  ):
    checks.one_of(f'{name}.kind', source.get('kind'), masks.KINDS)
    if 'resize' in source:
      raise ValueError(
        f'config.{name}.resize is of images without masks; leave it out: '
        'config.image_size is what the model sees.'
      )


def _check_size(config, name, source):
  size = _eval_size(config)
  large = np.flatnonzero((source.sizes > size).any(1))
  if large.size:
    first = large[0]
    raise ValueError(
      f'{name}: {large.size} images are larger than config.eval_size, {size}, '
      f'such as {source.names[first]}, {tuple(source.sizes[first].tolist())}; '
      'raise it, or set config.eval_resize to True.'
    )


# Keys, whether they have an effect in a study, and if not, why and what to do.
RULES = (
  (
    ('crop_scale', 'flip'),
    lambda c: c.augment,
    'it is of augmentation, which is off',
    'set config.augment to True',
  ),
  (
    ('repeats',),
    lambda c: c.augment,
    'the views of an image are all the same without augmentation',
    'set config.augment to True',
  ),
)
