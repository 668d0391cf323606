"""What a checkpoint's own files say of its model, against the study's.

The tensors' shapes do not tell the number of heads, the activation, eps, or
the mean and standard deviation of the pixels.
"""

from typing import NamedTuple

import numpy as np

from experiments.models import clip, swin, vit
from experiments.pretrained import config_files

# The attributes of a ViTConfig that tell the families apart.
_FLAGS = {
  'patch_bias': True,
  'pre_norm': False,
  'layer_scale': False,
  'distilled': False,
}
_FAMILIES = {
  'clip': {'pre_norm': True, 'patch_bias': False},
  'vit': {},
  'deit': {'distilled': True},
  'dinov2': {'layer_scale': True},
}
_BOTH = ('width', 'depth', 'num_heads', 'mlp_dim', 'activation', 'eps')
_VISION = (*_BOTH, 'family', 'patch_size', 'image_size', 'mean', 'std')
_FILES = 'config.json and preprocessor_config.json'
_SWIN = (
  *('family', 'width', 'depths', 'num_heads', 'window', 'patch_size'),
  *('mlp_ratio', 'eps', 'mean', 'std'),
)
_STAGES = ('depths', 'num_heads')  # of a Swin one number each stage
_TEXT = (*_BOTH, 'vocab_size', 'context_length', 'projection')


class Metadata(NamedTuple):
  """`config_files.Fact`s by the attribute of the config that they are of.

  Besides, `family` is a key of `_FAMILIES` or 'swin', `end` the id of the end
  token. What no file says is not in it.
  """

  vision: dict[str, config_files.Fact]
  text: dict[str, config_files.Fact]


def read(path):
  """Reads what the files beside a checkpoint say.

  Args:
    path: a pathlib.Path, its folder or its .safetensors file.

  Returns:
    A `Metadata`; an empty one, if there are no such files.

  Raises:
    ValueError: a file is damaged, or of a model that is not read here.
  """
  return Metadata(
    *(
      {field: _checked(field, fact) for field, fact in facts.items()}
      for facts in config_files.read(path)
    )
  )


def vit_config(source, found):
  """The `vit.ViTConfig` that the files beside a checkpoint describe.

  Args:
    source: the checkpoint, for errors.
    found: its `Metadata`.

  Raises:
    ValueError: they do not say everything, or are of a Swin.
  """
  if is_swin(found):
    raise ValueError(
      f'{source}: its files are of a Swin, which is for segmentation alone; '
      'name a checkpoint of a ViT.'
    )
  facts = _values(source, found.vision, _VISION, _FILES)
  family, image_size = facts.pop('family'), facts.pop('image_size')
  return vit.ViTConfig(
    grid=image_size // facts['patch_size'], **facts, **_FAMILIES[family]
  )


def swin_config(source, found):
  """The same of a Swin, a `swin.SwinConfig`."""
  facts = _values(source, found.vision, _SWIN, _FILES)
  del facts['family']
  return swin.SwinConfig(**facts)


def is_swin(found):
  """Whether the files are of a Swin."""
  return 'family' in found.vision and found.vision['family'].value == 'swin'


def text_config(source, found):
  """The same for a `clip.TextConfig`."""
  facts = _values(source, found.text, _TEXT, 'config.json, of both towers,')
  facts.pop('end', None)
  return clip.TextConfig(**facts)


def check(found, config=None, text=None):
  """Refuses a checkpoint whose files contradict the model.

  Args:
    found: its `Metadata`.
    config: the `vit.ViTConfig`; None to leave it out.
    text: the `clip.TextConfig`; None to leave it out.

  Raises:
    ValueError: it names the file, the key, both values, and what to set.
  """
  for ours, facts in ((config, found.vision), (text, found.text)):
    for field, (value, where) in facts.items() if ours else ():
      if not _agrees(ours, field, value):
        raise ValueError(
          f'{where} is {value!r}, but the model that was asked for has '
          f'{_value(ours, field)!r}; {_remedy(found)}.'
        )


def family(config):
  """The key of `_FAMILIES` of a `vit.ViTConfig`, or 'other'; or 'swin'."""
  if isinstance(config, swin.SwinConfig):
    return 'swin'
  flags = {flag: getattr(config, flag) for flag in _FLAGS}
  families = _FAMILIES.items()
  return next(
    (k for k, changes in families if flags == _FLAGS | changes), 'other'
  )


def _checked(field, fact):
  """A fact as a config has it: a number, three of them, or a known word."""
  value, where = fact
  families = (*_FAMILIES, 'swin')
  words = {'activation': vit.ACTIVATIONS, 'family': families}.get(field)
  if words:
    if value not in words:
      raise ValueError(
        f'{where} is {value!r}; what is read is {", ".join(words)}.'
      )
    return fact
  numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
  three = field in ('mean', 'std')
  stages = field in _STAGES and isinstance(value, (list, tuple))
  if not (
    all(type(number) in (int, float) for number in numbers)
    and (len(numbers) == 3 if three else stages or len(set(numbers)) == 1)
    and (field == 'mean' or min(numbers) > 0)
  ):
    raise ValueError(
      f'{where} is {value!r}; it has to be above 0, three numbers where it is '
      'mean or std, else one, or twice the same for two sides.'
    )
  return config_files.Fact(numbers if three or stages else numbers[0], where)


def _values(source, facts, needed, files):
  missing = [field for field in needed if field not in facts]
  if missing:
    raise ValueError(
      f'{source}: config.model.name is empty, and no file beside the weights '
      f'says their {", ".join(missing)}; copy {files} there, or set '
      '--config.model.name.'
    )
  return {field: fact.value for field, fact in facts.items()}


def _value(config, field):
  if field == 'family':
    return family(config)
  if field == 'end':
    return config.vocab_size - 1
  return getattr(config, field, None)  # of another family


def _agrees(config, field, value):
  ours = _value(config, field)
  if field in ('mean', 'std'):
    # A quarter of a grey level: some files round.
    return np.allclose(ours, value, rtol=0, atol=1e-3)
  if ours is None:
    return False
  if field == 'image_size':
    # What does not fill a patch is not seen.
    value -= value % config.patch_size
  return ours == value


def _remedy(found):
  """The names of models that everything agrees with, else ''."""

  known = vit.CONFIGS | swin.CONFIGS

  def fits(name):
    pairs = [(known[name], found.vision)]
    if name in clip.CONFIGS:
      pairs.append((clip.CONFIGS[name], found.text))
    return all(
      _agrees(config, field, fact.value)
      for config, facts in pairs
      for field, fact in facts.items()
    )

  if fitting := [name for name in known if fits(name)]:
    return f'set --config.model.name={" or ".join(fitting)}'
  return "set --config.model.name='', which takes what the files say"
