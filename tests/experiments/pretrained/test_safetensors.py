"""Against transformers' outputs; make_reference.py wrote them."""

import dataclasses
import functools
import json
import math
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from experiments.pretrained import load, safetensors

ALL = ('clip', 'vit', 'deit', 'dinov2')


@pytest.mark.parametrize(
  ('name', 'scan'), [*((name, False) for name in ALL), ('clip', True)]
)
def test_outputs_are_those_of_transformers(reference, configs, name, scan):
  config = dataclasses.replace(configs[name], scan=scan)
  outputs = np.load(reference / name / 'outputs.npz')
  model = load.load_vit(config, reference / name)
  for size in ('', 'wide_'):
    hidden, features = run(model, outputs[f'{size}images'])
    # Float32 against float64: 2e-6 was seen, of values with deviation 1. The
    # wrong eps makes 4e-4, the wrong GELU 2e-2.
    np.testing.assert_allclose(hidden, outputs[f'{size}hidden'], atol=1e-5)
    expected = outputs[f'{size}hidden'][:, 0]
    if name == 'clip':
      expected = outputs[f'{size}features']
    np.testing.assert_allclose(features, expected, atol=1e-5)


@pytest.mark.parametrize(
  ('name', 'changes'),
  [
    *((name, {'eps': 3e-6}) for name in ALL),
    *((name, {'activation': 'quick_gelu'}) for name in ALL if name != 'clip'),
    ('clip', {'activation': 'gelu'}),
    *((name, {'num_heads': 4}) for name in ALL),
  ],
)
def test_the_outputs_tell_what_shapes_do_not(
  reference, configs, tmp_path, name, changes
):
  """Without config.json a wrong config is loaded, but does not pass above."""
  shutil.copy(reference / name / 'model.safetensors', tmp_path)
  config = dataclasses.replace(configs[name], **changes)
  outputs = np.load(reference / name / 'outputs.npz')
  hidden, _ = run(load.load_vit(config, tmp_path), outputs['images'])
  assert np.abs(hidden - outputs['hidden']).max() > 1e-4


def test_text_features_are_those_of_transformers(reference, text_config):
  texts = np.load(reference / 'clip' / 'texts.npz')
  text, tokenizer, scale = safetensors.load_text(
    text_config, reference / 'clip'
  )
  ids = [e.ids for e in tokenizer.encode_batch(texts['texts'].tolist())]
  np.testing.assert_array_equal(ids, texts['ids'])
  # As above.
  np.testing.assert_allclose(text(np.array(ids)), texts['features'], atol=1e-5)
  tensors = load_file(reference / 'clip' / 'model.safetensors')
  assert scale == pytest.approx(math.exp(tensors['logit_scale']))


@pytest.mark.parametrize(
  ('name', 'changes', 'extra'),
  [
    ('deit', 'deit.', ['cls_classifier.bias', 'distillation_classifier.bias']),
    ('dinov2', 'dinov2.', ['classifier.weight']),
    ('clip', '', ['vision_model.embeddings.position_ids']),
  ],
)
def test_a_task_on_top(reference, configs, tmp_path, name, changes, extra):
  """The same tensors, with a prefix and others besides."""
  tensors = load_file(reference / name / 'model.safetensors')
  tensors = {changes + key: tensor for key, tensor in tensors.items()}
  tensors |= {key: np.zeros(3, np.float32) for key in extra}
  path = tmp_path / 'some.safetensors'
  save_file(tensors, path)
  expected = safetensors.load_vit_params(configs[name], reference / name)
  found = safetensors.load_vit_params(configs[name], path)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_shards(reference, configs, tmp_path):
  shard(reference / 'vit', tmp_path)
  expected = safetensors.load_vit_params(configs['vit'], reference / 'vit')
  found = safetensors.load_vit_params(configs['vit'], tmp_path)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_shard_is_missing(reference, tmp_path):
  shard(reference / 'vit', tmp_path)
  (tmp_path / 'model-00002-of-00002.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match=r'00002-of-00002\.saf.*2 files'):
    safetensors.find(tmp_path)


def test_bfloat16_checkpoint(reference, configs, tmp_path):
  tensors = load_file(reference / 'vit' / 'model.safetensors')
  tensors = {key: t.astype('bfloat16') for key, t in tensors.items()}
  save_file(tensors, tmp_path / 'model.safetensors')
  model = load.load_vit(configs['vit'], tmp_path)
  kernel = model.blocks[0].mlp.fc1.kernel[...]
  assert kernel.dtype == np.float32
  expected = tensors['vit.encoder.layer.0.intermediate.dense.weight'].T
  np.testing.assert_array_equal(kernel, expected.astype(np.float32))


@pytest.mark.parametrize(
  ('theirs', 'ours', 'named'),
  [
    ('vit', 'clip', r'missing vision_model\.embeddings.* and \d+ more'),
    ('clip', 'vit', r'missing embeddings\.cls_token.*surplus logit_scale, '),
    ('deit', 'vit', r'surplus embeddings\.distillation_token'),
    ('dinov2', 'vit', r'missing encoder\.layer\.0\.intermediate\.dense\.bias'),
    ('vit', 'dinov2', r'surplus vit\.embeddings\.cls_token, .* and \d+ more'),
  ],
)
def test_another_models_checkpoint(
  reference, configs, tmp_path, theirs, ours, named
):
  shutil.copy(reference / theirs / 'model.safetensors', tmp_path)
  with pytest.raises(
    ValueError, match=f'{tmp_path}: not a checkpoint.*{named}'
  ):
    safetensors.load_vit_params(configs[ours], tmp_path)


@pytest.mark.parametrize('name', ALL)
def test_surplus_tensor(reference, configs, tmp_path, name):
  tensors = load_file(reference / name / 'model.safetensors')
  tensors['blocks.adapter.weight'] = np.zeros(3, np.float32)
  save_file(tensors, tmp_path / 'model.safetensors')
  with pytest.raises(
    ValueError, match=r'missing nothing, surplus blocks\.adapter\.weight;'
  ):
    safetensors.load_vit_params(configs[name], tmp_path)


def test_missing_tensor(reference, configs, tmp_path):
  tensors = load_file(reference / 'vit' / 'model.safetensors')
  del tensors['vit.encoder.layer.1.layernorm_after.bias']
  save_file(tensors, tmp_path / 'model.safetensors')
  with pytest.raises(
    ValueError, match=r'missing vit\.enc.*1\.layernorm_after\.bias, surplus not'
  ):
    safetensors.load_vit_params(configs['vit'], tmp_path)


def test_tensor_of_another_shape(reference, configs, tmp_path):
  shutil.copy(reference / 'vit' / 'model.safetensors', tmp_path)
  config = dataclasses.replace(configs['vit'], grid=6)
  with pytest.raises(
    ValueError,
    match=r'vit\.embeddings\.position_embeddings has shape \(26, 16\) .* '
    r'pos_embed \(37, 16\)',
  ):
    safetensors.load_vit_params(config, tmp_path)


def test_truncated_file(reference, configs, tmp_path):
  data = (reference / 'vit' / 'model.safetensors').read_bytes()
  path = tmp_path / 'model.safetensors'
  path.write_bytes(data[:-100])
  with pytest.raises(
    ValueError, match=rf'{path} \({len(data) - 100} bytes\).*download it again'
  ):
    safetensors.load_vit_params(configs['vit'], tmp_path)


def test_truncated_config(reference, configs, tmp_path):
  shutil.copytree(reference / 'vit', tmp_path, dirs_exist_ok=True)
  (tmp_path / 'config.json').write_text('{"hidden_act"')
  with pytest.raises(ValueError, match=r'config\.json is cut short or damaged'):
    safetensors.load_vit_params(configs['vit'], tmp_path)


def test_pickles_are_not_loaded(configs, tmp_path):
  pickle = tmp_path / 'pytorch_model.bin'
  pickle.write_bytes(b'a pickle')
  match = r'never loaded;.*`AutoModel\.from_pretrained'
  with pytest.raises(FileNotFoundError, match=f'{tmp_path} has no .*{match}'):
    safetensors.load_vit_params(configs['vit'], tmp_path)
  with pytest.raises(ValueError, match=f'{pickle} is not .*{match}'):
    safetensors.load_vit_params(configs['vit'], pickle)


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('vit', {'num_heads': 4}, 'num_attention_heads is 2, but .* 4'),
    ('vit', {'eps': 1e-6}, 'layer_norm_eps is 1e-12, but .* 1e-06'),
    ('deit', {'activation': 'quick_gelu'}, "'gelu', but .* 'quick_gelu'"),
    ('dinov2', {'grid': 4}, 'image_size is 20, but .* 16'),
    ('clip', {'patch_size': 5, 'grid': 4}, 'patch_size is 4, but .* 5'),
    (
      'clip',
      {'activation': 'gelu'},
      "hidden_act is 'quick_gelu', but .*'gelu'",
    ),
  ],
)
def test_config_json_disagrees(reference, configs, name, changes, message):
  config = dataclasses.replace(configs[name], **changes)
  with pytest.raises(ValueError, match=rf'config\.json: .*{message}'):
    safetensors.load_vit_params(config, reference / name)


def test_a_clip_with_the_exact_gelu(reference, configs, text_config, tmp_path):
  """LAION's CLIPs have gelu in both towers; OpenAI's quick_gelu."""
  shutil.copytree(reference / 'clip', tmp_path, dirs_exist_ok=True)
  edit_config(tmp_path, 'vision_config', hidden_act='gelu')
  with pytest.raises(ValueError, match=r"is 'gelu', but .* 'quick_gelu'; corr"):
    safetensors.load_vit_params(configs['clip'], tmp_path)
  gelu = dataclasses.replace(configs['clip'], activation='gelu')
  safetensors.load_vit_params(gelu, tmp_path)
  safetensors.load_text(text_config, tmp_path)
  edit_config(tmp_path, 'text_config', hidden_act='gelu')
  with pytest.raises(ValueError, match=r"is 'gelu', but .* 'quick_gelu'; corr"):
    safetensors.load_text(text_config, tmp_path)


def test_config_json_leaves_out_defaults(reference, configs, tmp_path):
  """As transformers 4 wrote the sections of CLIP's."""
  shutil.copytree(reference / 'clip', tmp_path, dirs_exist_ok=True)
  edit_config(tmp_path, 'vision_config', hidden_act=None, layer_norm_eps=None)
  safetensors.load_vit_params(configs['clip'], tmp_path)
  gelu = dataclasses.replace(configs['clip'], activation='gelu')
  with pytest.raises(ValueError, match="hidden_act is 'quick_gelu', but"):
    safetensors.load_vit_params(gelu, tmp_path)


def test_end_of_text(reference, text_config, tmp_path):
  shutil.copytree(reference / 'clip', tmp_path, dirs_exist_ok=True)
  edit_config(tmp_path, 'text_config', eos_token_id=2)  # "the highest id"
  safetensors.load_text(text_config, tmp_path)
  edit_config(tmp_path, 'text_config', eos_token_id=300)
  with pytest.raises(ValueError, match=r'eos_token_id is 300, but .* 517'):
    safetensors.load_text(text_config, tmp_path)


def test_another_tokenizer(reference, text_config, tmp_path):
  shutil.copytree(reference / 'clip', tmp_path, dirs_exist_ok=True)
  path = tmp_path / 'tokenizer.json'
  path.write_text(path.read_text().replace('endoftext', 'eos'))
  with pytest.raises(ValueError, match=r'tokenizer\.json: .*endoftext.* None'):
    safetensors.load_text(text_config, tmp_path)
  path.unlink()
  with pytest.raises(FileNotFoundError, match=f'{path} is missing'):
    safetensors.load_text(text_config, tmp_path)


def test_the_hub_is_out_of_reach(configs, tmp_path, monkeypatch):
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', tmp_path)
  with pytest.raises(
    FileNotFoundError,
    match=r'org/some-name is no local folder, and the hub did not send it '
    r'\(LocalEntryNotFoundError: .*\): check the name and the network, or pass',
  ):
    safetensors.load_vit_params(configs['vit'], 'org/some-name')


@pytest.mark.parametrize(
  ('name', 'ref'),
  [('org/some-name', 'main'), ('org/some-name@refs/pr/3', 'refs/pr/3')],
)
def test_what_the_hub_sent_before(
  reference, configs, tmp_path, monkeypatch, name, ref
):
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', tmp_path)
  repository = tmp_path / 'models--org--some-name'
  shutil.copytree(reference / 'vit', repository / 'snapshots' / 'abc')
  (repository / 'refs' / ref).parent.mkdir(parents=True)
  (repository / 'refs' / ref).write_text('abc')
  expected = safetensors.load_vit_params(configs['vit'], reference / 'vit')
  found = safetensors.load_vit_params(configs['vit'], name)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def run(model, images):
  """All tokens after the last LayerNorm, and the features."""
  graphdef, state = nnx.split(model)

  # Tiny models spend their time in the compiler.
  @functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0}
  )
  def outputs(state):
    model = nnx.merge(graphdef, state)
    x_BxHxWx3 = images.astype(np.float32)
    return model(x_BxHxWx3), model.features(model.embed(x_BxHxWx3))

  return outputs(state)


def shard(source, folder):
  tensors = load_file(source / 'model.safetensors')
  weight_map = {
    key: f'model-0000{1 + i % 2}-of-00002.safetensors'
    for i, key in enumerate(tensors)
  }
  for file in set(weight_map.values()):
    part = {key: tensors[key] for key in tensors if weight_map[key] == file}
    save_file(part, folder / file)
  index = folder / 'model.safetensors.index.json'
  index.write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))


def edit_config(folder, section, **changes):
  path = folder / 'config.json'
  config = json.loads(path.read_text())
  config[section] |= changes
  for key in [key for key, value in changes.items() if value is None]:
    del config[section][key]
  path.write_text(json.dumps(config))
