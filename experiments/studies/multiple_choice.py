"""Questions with options to a pretrained decoder, such as LLaMA."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from experiments import checks, evaluate
from experiments.configs import text
from experiments.data import prompts, rows, sources
from experiments.models import blocks, llama
from experiments.pretrained import load as pretrained
from experiments.pretrained import save
from experiments.studies import base
from experiments.tasks import language

ANSWERS = ('scores', 'greedy', 'beam')
FILES = ()
STEP = ('max_length',)

defaults = text.base


class Tokens(sources.Arrays):
  """A source of `data.rows`.

  Attributes:
    num_options: the most that an example has, where they are scored.
    names: of each question's options, where it is answered in text.
  """

  def __init__(self, columns, num_options=0, names=()):
    super().__init__(columns)
    self.num_options, self.names = num_options, names


def check(config):
  """See `studies.base`. The texts are read, and become tokens.

  Raises:
    ValueError, OSError, ModuleNotFoundError: saying what to change.
  """
  _check_keys(config)
  opened = base.open_sets(config)
  base.check_apart(opened)
  _check_classes(config, opened)
  model = _model_config(config)
  pretrained.check_llama(model, config.model.pretrained)
  encoder = rows.Encoder(
    pretrained.load_tokenizer(config.model.pretrained),
    config.template,
    config.response,
  )
  found = {'train': _training(config, opened.pop('train'), encoder)}
  if config.answers != 'scores':
    generated = {name: opened.pop(name) for name in config.eval_sets}
    room = model.context_length - config.max_new_tokens
    found |= _prompts(generated, encoder, room)
  return found | _options(config, opened, encoder, model.context_length)


def build(config, sources):
  """See `studies.base`.

  Raises:
    ValueError, OSError: of a checkpoint that is not this model's, or not there.
  """
  source = config.model.pretrained
  tokenizer = pretrained.load_tokenizer(source)
  sets = {name: evaluate.EvalSet(one) for name, one in sources.items()}
  if config.answers != 'scores':
    task = language.Generation(
      config.max_new_tokens,
      config.num_beams if config.answers == 'beam' else 1,
      tokenizer.end,
      tuple(config.metrics),
    )
    for name in config.eval_sets:
      one = sources[name]
      sets[name] = language.AnsweredSet(
        one, info=one.names, task=task, decode=tokenizer.decode
      )
  model = pretrained.load_llama(_model_config(config), source)
  return _parts(config, model, sets, sources['val'].num_options)


def shapes(config):
  """See `studies.base`. Every token of a row counts as a target.

  Raises:
    ValueError: saying what to change.
  """
  _check_keys(config)
  model = _model_config(config)
  made = nnx.eval_shape(lambda: llama.Llama(model, rngs=nnx.Rngs(0)))
  return _parts(config, made, {}, num_options=1)


def exported(config, run, trained, format_):
  """See `studies.base`."""
  del run
  source = config.model.pretrained
  model = trained(pretrained.load_llama(_model_config(config), source))
  tokenizer = pretrained.load_tokenizer(source)
  if format_ == 'peft':
    return save.peft_llama(model, tokenizer, base=source)
  return save.merged_llama(model, tokenizer)


def _parts(config, model, sets, num_options):
  row = jax.ShapeDtypeStruct((config.max_length,), jnp.int32)
  names = ('ids', 'positions', 'example', 'option', 'source', 'target')
  example = dict.fromkeys(names, row) | {
    'weight': jax.ShapeDtypeStruct(row.shape, jnp.float32)
  }
  task = language.MultipleChoice(
    num_options, config.first_block, tuple(config.metrics)
  )
  trained = blocks.from_block(config.first_block)
  return base.Parts(task, model, trained, sets, example)


def _training(config, source, encoder):
  """Packed `Tokens` of the training set; what was cut and wasted is said."""
  sequences, num_cut = [], 0
  for index in range(len(source)):
    example = source[index]
    ids, prompt, whole = encoder.training(example, config.max_length)
    if whole > config.max_length:
      num_cut += 1
      if not config.cut:
        raise ValueError(
          f'train: {example.question[:50]!r} and its answer have {whole} '
          f'tokens, more than config.max_length, {config.max_length}; raise '
          'it, or set config.cut to True.'
        )
    sequences.append((ids, prompt))
  columns = rows.training(sequences, config.max_length, config.train_on_inputs)
  if not columns['weight'].any():
    raise ValueError(
      'train: the prompts alone fill config.max_length, and no answer is left '
      'to train on; raise it.'
    )
  tqdm.write(
    f'train: {len(source):,} examples in {len(columns["ids"]):,} rows of '
    f'{config.max_length} tokens, {rows.padding(columns):.1%} of them padding; '
    f'{num_cut:,} examples are cut.'
  )
  return Tokens(columns)


def _options(config, opened, encoder, room):
  """`{name: Tokens}` of sets whose options are scored, all of one shape."""
  encoded = {
    name: [encoder.options(source[index]) for index in range(len(source))]
    for name, source in opened.items()
  }
  for name, examples in encoded.items():
    for index, (prompt, options) in enumerate(examples):
      longest = len(prompt) + max(map(len, options))
      _check_length(name, opened[name][index], longest, room)
  everything = [one for examples in encoded.values() for one in examples]
  size = max(config.max_length, *(rows.length(*one) for one in everything))
  most = max(len(options) for _, options in everything)
  columns = [
    rows.scoring(examples, opened[name].labels, rows.rounded(size), most)
    for name, examples in encoded.items()
  ]
  return {
    name: Tokens(one, most)
    for name, one in zip(encoded, rows.alike(columns), strict=True)
  }


def _prompts(opened, encoder, room):
  """`{name: Tokens}` of sets that are answered in text, all of one shape."""
  names, columns = [], []
  for name, source in opened.items():
    examples = [source[index] for index in range(len(source))]
    encoded = [encoder.prompt(example) for example in examples]
    for example, ids in zip(examples, encoded, strict=True):
      _check_length(name, example, len(ids), room)
    names.append([example.names for example in examples])
    columns.append(rows.generation(encoded, source.labels))
  return {
    name: Tokens(one, names=own)
    for name, one, own in zip(opened, rows.alike(columns), names, strict=True)
  }


def _check_length(name, example, length, room):
  if length > room:
    raise ValueError(
      f'{name}: {example.question[:50]!r} has {length} tokens, and the context '
      f'of the model has room for {room}; leave it out.'
    )


def _model_config(config):
  """The `llama.LlamaConfig` of the study.

  Raises:
    As `pretrained.llama_config`, where `config.model.name` is ''.
  """
  return dataclasses.replace(
    pretrained.llama_config(config.model.name, config.model.pretrained),
    dtype=config.model.dtype,
    remat=config.model.remat,
    scan=config.model.scan,
  )


def _check_keys(config):
  """What can be told without a file of data."""
  checks.one_of('model.dtype', config.model.dtype, ('float32', 'bfloat16'))
  checks.one_of('template', config.template, prompts.TEMPLATES)
  checks.one_of('response', config.response, prompts.RESPONSES)
  checks.one_of('answers', config.answers, ANSWERS)
  for name in config.metrics:
    checks.one_of('metrics', name, language.METRICS)
  if config.model.name:
    checks.one_of('model.name', config.model.name, llama.CONFIGS)
  if not config.model.pretrained:
    raise ValueError('config.model.pretrained is empty; say where weights are.')
  for key, least in (
    ('max_length', 2),
    ('num_beams', 2),
    ('max_new_tokens', 1),
  ):
    if config[key] < least:
      raise ValueError(
        f'config.{key} is {config[key]}; it is at least {least}.'
      )
  if config.answers != 'scores' and config.response != 'output':
    raise ValueError(
      f'config.answers is {config.answers}, in whose text the name of an '
      f'option is looked for, but config.response is {config.response}; set '
      'it to output, or config.answers to scores.'
    )
  _check_model(config)
  checks.check_effects(RULES, config, defaults())


def _check_model(config):
  model = _model_config(config)
  if not 0 <= config.first_block < model.depth:
    raise ValueError(
      f'config.first_block is {config.first_block}; the model has blocks 0 to '
      f'{model.depth - 1}.'
    )
  if config.first_block and config.model.scan:
    raise ValueError(
      'config.model.scan runs all blocks; set config.first_block to 0.'
    )
  if config.max_length > model.context_length:
    raise ValueError(
      f'config.max_length is {config.max_length}, and the context of the model '
      f'{model.context_length} tokens; make it smaller.'
    )


def _check_classes(config, opened):
  of_classes = set(config.metrics) - {'accuracy'}
  if of_classes and not all(source.class_names for source in opened.values()):
    raise ValueError(
      f'config.metrics are {", ".join(config.metrics)}; those of classes need '
      'options that are the same in all questions, so use accuracy alone.'
    )


# Keys, whether they have an effect in a study, and if not, why and what to do.
RULES = (
  (
    ('num_workers', 'repeats'),
    lambda c: False,
    'texts lie in memory, as tokens',
    'leave it out',
  ),
  (
    ('num_beams',),
    lambda c: c.answers == 'beam',
    'no beam is searched',
    'set config.answers to beam',
  ),
  (
    ('max_new_tokens',),
    lambda c: c.answers != 'scores',
    'no text is generated',
    'set config.answers to greedy or beam',
  ),
)
