"""LLaMA 1, 2, 3 and SmolLM2 as transformers writes them: names, config.json."""

from flax import nnx

from experiments.models import llama
from experiments.pretrained import config_files, params

# Our modules -> theirs, of the model and of a block.
_NAMES = {
  'token_embed': 'embed_tokens',
  'norm': 'norm',
  'unembed': 'lm_head',
  'norm1': 'input_layernorm',
  'attn.query': 'self_attn.q_proj',
  'attn.key': 'self_attn.k_proj',
  'attn.value': 'self_attn.v_proj',
  'attn.out': 'self_attn.o_proj',
  'norm2': 'post_attention_layernorm',
  'mlp.gate': 'mlp.gate_proj',
  'mlp.up': 'mlp.up_proj',
  'mlp.down': 'mlp.down_proj',
}
# The frequencies of rotary positions, which old files have.
_IGNORED = r'.*\.rotary_emb\.inv_freq'
# Our attributes, their keys, and what is meant where a key is left out.
_KEYS = {
  'vocab_size': ('vocab_size', None),
  'width': ('hidden_size', None),
  'depth': ('num_hidden_layers', None),
  'num_heads': ('num_attention_heads', None),
  'mlp_dim': ('intermediate_size', None),
  'eps': ('rms_norm_eps', 1e-6),
  'context_length': ('max_position_embeddings', 2048),
  'tied': ('tie_word_embeddings', False),
}
# What else changes the computation, and the one value that is read here.
_ONLY = {
  'hidden_act': 'silu',
  'attention_bias': False,
  'mlp_bias': False,
  'quantization_config': None,
  'sliding_window': None,
}
_SCALING = {
  'low': 'low_freq_factor',
  'high': 'high_freq_factor',
  'original': 'original_max_position_embeddings',
}


def config(folder):
  """The `llama.LlamaConfig` that a folder's config.json describes.

  Args:
    folder: a pathlib.Path.

  Returns:
    It, in the default dtype; None where there is no config.json.

  Raises:
    ValueError: the file is damaged, or of a model that is not read here.
  """
  path = folder / config_files.CONFIG
  if not path.exists():
    return None
  given = config_files.read_json(path)
  if given.get('model_type') != 'llama':
    raise ValueError(
      f'{path}: model_type is {given.get("model_type")!r}; of decoders llama '
      'is read here.'
    )
  for key, value in _ONLY.items():
    if given.get(key, value) != value:
      raise ValueError(
        f'{path}: {key} is {given[key]!r}, which is not read here.'
      )
  found = {}
  for field, (key, default) in _KEYS.items():
    found[field] = given.get(key, default)
    if found[field] is None:
      raise ValueError(f'{path} does not say {key}; is it all there?')
  heads = found['num_heads']
  return llama.LlamaConfig(
    **found,
    num_kv_heads=given.get('num_key_value_heads') or heads,
    head_dim=given.get('head_dim') or found['width'] // heads,
    **_rope(path, given),
  )


def check(wanted, folder):
  """Refuses a checkpoint whose config.json contradicts the model.

  Args:
    wanted: the `llama.LlamaConfig`.
    folder: as for `config`.

  Raises:
    ValueError: naming the file, the attribute, both values, and what to set.
  """
  given = config(folder)
  if given:
    check_equal(wanted, given, folder / config_files.CONFIG)


def check_equal(wanted, given, path):
  """Refuses a `LlamaConfig` that differs from what a file says."""
  ways = {'dtype', 'remat', 'scan'}
  for field in given.__dataclass_fields__.keys() - ways:
    ours, theirs = getattr(wanted, field), getattr(given, field)
    if ours != theirs:
      raise ValueError(
        f'{path}: its {field} is {theirs!r}, but the model that was asked for '
        f"has {ours!r}; set --config.model.name='', which takes what the files "
        'say.'
      )


def assemble(source, wanted, readers):
  """The params of `llama.Llama(wanted)`, nested dicts of arrays.

  Args:
    source: the checkpoint, for errors.
    wanted: the `llama.LlamaConfig`, unrolled.
    readers: `{name: () -> the tensor [out, in]}`, as files have it.

  Raises:
    ValueError: a tensor is missing, surplus, or of another shape.
  """
  readers = {k.removeprefix('model.'): v for k, v in readers.items()}
  if wanted.tied:
    readers.pop('lm_head.weight', None)

  def read_one(path, name):
    array = readers[name]()
    return array.T if path[-1] == 'kernel' else array

  return params.assemble(
    source, shapes(wanted), list(readers), name_of, read_one, _IGNORED
  )


def shapes(wanted):
  return params.shapes(lambda: llama.Llama(wanted, rngs=nnx.Rngs(0)))


def name_of(path):
  """Our path of a parameter -> the name of its tensor, without `model.`."""
  names = list(map(str, path))
  if names[0] == 'token_embed':
    names.append('weight')
  before, module = '', names[:-1]
  if module[0] == 'blocks':
    before, module = f'layers.{module[1]}.', module[2:]
  return f'{before}{_NAMES[".".join(module)]}.weight'


def to_config(wanted):
  """`config` the other way: the contents of config.json, a dict."""
  rope = {'rope_theta': wanted.rope_theta, 'rope_type': 'default'}
  if scaling := wanted.rope_scaling:
    rope |= {'rope_type': scaling.kind, 'factor': scaling.factor}
    if scaling.kind == 'llama3':
      rope |= {key: getattr(scaling, ours) for ours, key in _SCALING.items()}
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    **{key: getattr(wanted, field) for field, (key, _) in _KEYS.items()},
    'num_key_value_heads': wanted.num_kv_heads,
    'head_dim': wanted.head_dim,
    'hidden_act': wanted.activation,
    'rope_parameters': rope,
    # transformers 4 has the two apart.
    'rope_theta': wanted.rope_theta,
    'rope_scaling': rope if wanted.rope_scaling else None,
    'dtype': 'float32',
  }


def _rope(path, given):
  """rope_theta and rope_scaling, of transformers 5's key or 4's two."""
  rope = given.get('rope_parameters') or given.get('rope_scaling') or {}
  theta = given.get('rope_theta', rope.get('rope_theta', 10_000.0))
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind == 'default':
    return {'rope_theta': theta}
  if kind not in ('linear', 'llama3'):
    raise ValueError(
      f'{path}: rotary positions are scaled by {kind!r}; what is read is '
      'linear and llama3.'
    )
  more = {}
  if kind == 'llama3':
    more = {ours: rope.get(key) for ours, key in _SCALING.items()}
  numbers = {'factor': rope.get('factor'), **more}
  if not all(isinstance(number, (int, float)) for number in numbers.values()):
    raise ValueError(
      f'{path}: the scaling of rotary positions, {kind}, is {rope}; it has to '
      'have a number for each of its keys.'
    )
  return {
    'rope_theta': theta,
    'rope_scaling': llama.RopeScaling(kind, **numbers),
  }
