"""A pretrained vision tower with a decoder, of one checkpoint or of two."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models import blocks, llama, vision_language
from experiments.pretrained import load as pretrained
from experiments.pretrained import paligemma
from experiments.pretrained.params import with_params

_JOINS = '+'  # two sources


def model_config(name, source):
  """The `vision_language.VisionLanguageConfig` of a study.

  Args:
    name: a key of `vision_language.CONFIGS`.
    source: as for `load`; big_vision's files have a smaller vocabulary.

  Raises:
    ValueError: one source is given for two towers, or two for a PaliGemma.
  """
  if is_paligemma(name) != (_JOINS not in source):
    raise ValueError(
      f'config.model.pretrained is {source!r}; of {name} it is '
      + (
        'one checkpoint.'
        if is_paligemma(name)
        else f'that of the vision tower, {_JOINS}, and that of the decoder.'
      )
    )
  if is_paligemma(name):
    return paligemma.model_config(name, source)
  return vision_language.CONFIGS[name]


def check(config, source):
  """As `paligemma.check`, of one source or two."""
  if _JOINS not in source:
    paligemma.check(config, source)
    return
  vision, decoder = source.split(_JOINS)
  pretrained.check(config.vision, vision)
  pretrained.check_llama(_whole(config.decoder), decoder)
  load_tokenizer(config, source)


def load(config, source, *, untied=False):
  """A `vision_language.VisionLanguage` with pretrained weights in it.

  Of two sources the projector is new, and of the decoder's blocks the first
  ones are taken.

  Args:
    config: as for `paligemma.load`.
    source: as there, or 'VISION+DECODER', as `load.load_vit` and
      `load.load_llama` take them.
    untied: as there.

  Raises:
    As there.
  """
  if _JOINS not in source:
    return paligemma.load(config, source, untied=untied)
  vision, decoder = (
    nnx.to_pure_dict(nnx.state(tower)) for tower in _towers(config, source)
  )
  depth = config.decoder.depth
  decoder['blocks'] = {i: decoder['blocks'][i] for i in range(depth)}
  tree = {
    'vision': blocks.stack(vision) if config.vision.scan else vision,
    'decoder': blocks.stack(decoder) if config.decoder.scan else decoder,
    'projector': _projector(config, decoder['token_embed'].std()),
  }
  if untied:
    tree['head'] = {'kernel': decoder['token_embed'].T}
  return with_params(
    lambda: vision_language.VisionLanguage(
      config, untied=untied, rngs=nnx.Rngs(0)
    ),
    tree,
  )


def load_tokenizer(config, source):
  """As `paligemma.load_tokenizer`, of one source or two."""
  if _JOINS not in source:
    return paligemma.load_tokenizer(config, source)
  return pretrained.load_tokenizer(source.split(_JOINS)[1])


def _towers(config, source):
  vision, decoder = source.split(_JOINS)
  plain = dataclasses.replace(config.vision, scan=False)
  return (
    pretrained.load_vit(plain, vision),
    pretrained.load_llama(_whole(config.decoder), decoder),
  )


def _projector(config, std):
  """A new one, to tokens as large as those of text: the features are of 1."""
  width = config.vision.width
  shape = (width, config.decoder.width)
  kernel = jax.random.normal(jax.random.key(0), shape) * std / width**0.5
  return {'kernel': kernel, 'bias': jnp.zeros(config.decoder.width)}


def is_paligemma(name):
  """Whether a key of `vision_language.CONFIGS` is of one checkpoint."""
  return name.startswith('paligemma')


def _whole(decoder):
  """The config of the decoder whose first blocks are taken."""
  free = {'dtype': 'float32', 'remat': False, 'scan': False}
  return next(
    whole
    for whole in llama.CONFIGS.values()
    if dataclasses.replace(decoder, depth=whole.depth, **free) == whole
  )
