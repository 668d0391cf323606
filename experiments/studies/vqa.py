"""Questions about images, to a pretrained vision tower with a decoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import checks, evaluate, pictures
from experiments.configs import vqa as configs
from experiments.data import sources as data
from experiments.data import vqa_rows
from experiments.models import lora, vision_language
from experiments.pretrained import save
from experiments.pretrained import vision_language as pretrained
from experiments.studies import base, first_stage
from experiments.tasks import vqa

HEADS = ('tied', 'untied')
FILES = ()
STEP = ('image_size', 'text_length', 'answer_length', 'head')
_KINDS = ('vqa', 'easy_vqa')  # of sources, with questions
# Examples that a picture is chosen from, and how many it shows.
_LOOKED_AT, _DRAWN = 64, 16
_STEP = 32  # tokens, of the lengths of rows

defaults = configs.base


def check(config):
  """See `studies.base`.

  Raises:
    ValueError, OSError, ModuleNotFoundError: saying what to change.
  """
  _check_keys(config)
  _check_sources(config)
  opened = base.open_sets(config)
  _check_apart('train', opened['train'], opened)
  model = _model_config(config)
  pretrained.check(model, config.model.pretrained)
  encode = _encode(config, model)
  first = first_stage.open_sets(config)
  if first:
    held_out = {'first_stage.val': first['val']}
    _check_apart('first_stage.train', first['train'], opened | held_out)
  for name in ('train', 'val'):
    _check_lengths(config, name, opened[name], encode)
  for name, source in first.items():
    _check_lengths(config, f'first_stage.{name}', source, encode)
  for option in config.options:
    if len(encode.tokenizer.encode(option)) >= config.answer_length:
      raise ValueError(
        f'config.options: {option!r} and its end have more tokens than '
        f'config.answer_length, {config.answer_length}; raise it.'
      )
  return opened


def build(config, sources):
  """See `studies.base`.

  Raises:
    ValueError, OSError: of a checkpoint that is not this model's, or not there.
  """
  model_config = _model_config(config)
  encode = _encode(config, model_config)
  held_out = frozenset(q.picture for q in sources['val'].questions)
  sets = {
    name: _answered(config, source, encode, held_out)
    for name, source in sources.items()
  }
  model = pretrained.load(
    model_config, config.model.pretrained, untied=config.head == 'untied'
  )
  options = tuple(tuple(encode.answer(option)) for option in config.options)
  parts = _parts(config, model, sets, encode.tokenizer.end, options)
  if not config.first_stage.num_steps:
    return parts
  first_sets = {
    name: _answered(config, source, encode)
    for name, source in first_stage.open_sets(config).items()
  }
  fit = functools.partial(_learn_first, config, parts.task, model, first_sets)
  return parts._replace(fit=fit)


def _learn_first(config, task, model, first_sets, sets, layout, progress):
  """The projector and LoRA on the decoder, merged; see `studies.base`."""
  del sets
  stage = config.first_stage
  adapted = lora.add(
    model,
    stage.lora,
    stage.lora,
    modules=stage.lora_modules,
    rngs=nnx.Rngs(stage.seed),
  )
  trained = nnx.Any(nnx.LoRAParam, lambda path, _: path[0] == 'projector')
  first_stage.learn(
    config, task, adapted, trained, first_sets, None, None, layout, progress
  )
  nnx.update(model, nnx.state(lora.merge(adapted)))


def shapes(config):
  """See `studies.base`. No answer is given, and none has an end.

  Raises:
    ValueError: saying what to change.
  """
  _check_keys(config)
  model = nnx.eval_shape(
    lambda: vision_language.VisionLanguage(
      _model_config(config), untied=config.head == 'untied', rngs=nnx.Rngs(0)
    )
  )
  return _parts(config, model, {}, -1, ())


def draw(config, tuning, params):
  """See `studies.base`: of the first eval set, right answers and wrong ones."""
  name, spec = next(iter(config.eval_sets.items()))
  source = data.open_source(spec.to_dict(), config.data_dir)
  whole = tuning.sets[name]
  rows = np.linspace(0, len(source) - 1, min(_LOOKED_AT, len(source)))
  rows = rows.round().astype(int)
  some = dataclasses.replace(
    whole,
    source=[whole.source[row] for row in rows],
    info=[whole.info[row] for row in rows],
    num_workers=0,
  )
  outputs = evaluate.apply(
    functools.partial(
      _outputs, tuning.graphdef, tuning.task, params, tuning.frozen
    ),
    some,
    config.eval_batch_size,
    tuning.layout,
  )
  said, _ = tuning.task.answer(outputs, some)
  scores = vqa.accuracies(said, some.info)
  examples = [
    (source[rows[i]]['image'], some.info[i], said[i], scores[i])
    for i in _right_and_wrong(scores)
  ]
  return pictures.draw_answers(examples)


def exported(config, run, trained, format_):
  """See `studies.base`."""
  del run
  if not pretrained.is_paligemma(config.model.name):
    raise ValueError(
      f'The run is of {config.model.name}, two models that were joined here: '
      'transformers has no such model.'
    )
  source, wanted = config.model.pretrained, _model_config(config)
  model = trained(
    pretrained.load(wanted, source, untied=config.head == 'untied')
  )
  tokenizer = pretrained.load_tokenizer(wanted, source)
  if format_ == 'peft':
    return save.peft_paligemma(model, tokenizer, base=source)
  return save.merged_paligemma(model, tokenizer)


def _right_and_wrong(scores):
  """Rows: up to half of those drawn right, the others wrong, as there are."""
  right, wrong = np.flatnonzero(scores >= 0.5), np.flatnonzero(scores < 0.5)
  num_right = max(_DRAWN // 2, _DRAWN - len(wrong))
  right = right[:num_right]
  return np.concatenate([right, wrong[: _DRAWN - len(right)]])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _outputs(graphdef, task, params, frozen, batch):
  return task.outputs(nnx.merge(graphdef, params, frozen), batch)


def _parts(config, model, sets, end, options):
  size, number = config.image_size, jax.ShapeDtypeStruct((), jnp.int32)
  example = {
    'image': jax.ShapeDtypeStruct((size, size, 3), jnp.uint8),
    'ids': jax.ShapeDtypeStruct((config.text_length,), jnp.int32),
    'prefix': number,
    'length': number,
  }
  task = vqa.VQA(
    config.answer_length,
    end,
    options,
    tuple(config.options),
    tuple(config.metrics),
  )
  trained = _without_vision if config.first_block else ...
  return base.Parts(task, model, trained, sets, example)


def _answered(config, source, encode, held_out=frozenset()):
  return vqa.AnsweredSet(
    source,
    [_with_room(encode, source)],
    config.num_workers,
    info=source.questions,
    groups=source.groups,
    decode=encode.tokenizer.decode,
    held_out=held_out,
  )


def _without_vision(path, _):
  return path[0] != 'vision'


def _encode(config, model):
  return vqa_rows.Encode(
    pretrained.load_tokenizer(model, config.model.pretrained),
    config.prompt,
    config.separator,
    config.image_size,
    config.text_length,
    config.answer_length,
  )


def _model_config(config):
  """The `vision_language.VisionLanguageConfig` of the study."""
  model = pretrained.model_config(config.model.name, config.model.pretrained)
  changes = {key: config.model[key] for key in ('dtype', 'remat', 'scan')}
  return dataclasses.replace(
    model,
    vision=dataclasses.replace(model.vision, **changes),
    decoder=dataclasses.replace(model.decoder, **changes),
  )


def _check_keys(config):
  """What can be told without a file of data."""
  for name in config.metrics:
    checks.one_of('metrics', name, vqa.METRICS)
  checks.one_of('head', config.head, HEADS)
  checks.one_of('model.name', config.model.name, vision_language.CONFIGS)
  checks.one_of('model.dtype', config.model.dtype, ('float32', 'bfloat16'))
  if not config.model.pretrained:
    raise ValueError('config.model.pretrained is empty; say where weights are.')
  vision = _model_config(config).vision
  if config.image_size < 1 or config.image_size % vision.patch_size:
    raise ValueError(
      f'config.image_size is {config.image_size}; it must be a multiple of '
      f'{vision.patch_size}.'
    )
  if config.first_block not in (0, vision.depth):
    raise ValueError(
      f'config.first_block is {config.first_block}; it is 0, or '
      f'{vision.depth}, where the vision tower is run once and not trained.'
    )
  if not 2 <= config.answer_length < config.text_length:
    raise ValueError(
      f'config.answer_length is {config.answer_length}; it is 2 or more, and '
      f'below config.text_length, {config.text_length}.'
    )
  if config.prompt.count('{}') != 1:
    raise ValueError(
      f'config.prompt is {config.prompt!r}; it has one {{}}, for the question.'
    )
  first_stage.check_keys(config, defaults())
  checks.check_effects(RULES, config, defaults())


def _check_sources(config):
  for name, source in (
    ('train', config.train),
    ('val', config.val),
    *((f'eval_sets.{k}', s) for k, s in config.eval_sets.items()),
  ):
    checks.one_of(f'{name}.kind', source.get('kind'), _KINDS)


def _check_apart(ours, train, opened):
  """No set shows an image that is trained on."""
  trained_on = {question.picture for question in train.questions}
  for name, source in opened.items():
    shared = trained_on & {question.picture for question in source.questions}
    if shared and source is not train:
      raise ValueError(
        f'{ours} and {name} share {len(shared):,} images, one of them '
        f'{min(shared)}; give them other sources.'
      )


def _check_lengths(config, name, source, encode):
  length, text = _longest(encode, source)
  room = config.text_length - config.answer_length
  if length > room:
    raise ValueError(
      f'{name}: the prompt of {text!r} has {length} tokens, and config.'
      f'text_length less config.answer_length is {room}; raise text_length.'
    )


def _longest(encode, source):
  """Tokens of the longest prompt, and its question."""
  texts = {question.text for question in source.questions}
  return max((len(encode.prefix(text)), text) for text in texts)


def _with_room(encode, source):
  """The same for longer questions than those that are trained on.

  In steps, since each length is a program of its own.
  """
  length = _longest(encode, source)[0] + encode.answer_length
  longer = -(-length // _STEP) * _STEP
  if length <= encode.text_length:
    return encode
  return dataclasses.replace(encode, text_length=longer)


# Keys, whether they have an effect in a study, and if not, why and what to do.
RULES = (
  (
    ('repeats',),
    lambda c: False,
    'the views of an example are all the same',
    'raise config.num_steps',
  ),
)
