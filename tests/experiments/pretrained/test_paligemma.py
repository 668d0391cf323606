import dataclasses
import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.models import vision_language
from experiments.pretrained import paligemma as pretrained
from experiments.pretrained import save
from tests.experiments import tiny_vqa
from tests.experiments.pretrained import exports


@pytest.fixture
def config(monkeypatch):
  monkeypatch.setitem(
    vision_language.CONFIGS, 'paligemma_3b', tiny_vqa.PALIGEMMA
  )
  return tiny_vqa.PALIGEMMA


@pytest.fixture
def folder(reference):
  return reference / 'paligemma'


def source_and_config(folder, name):
  source = str(folder / name)
  return source, pretrained.model_config('paligemma_3b', source)


def prompts(model, outputs, i):
  """Of example i, with padding behind it."""
  prefix, suffix = tiny_vqa.PREFIXES[i], tiny_vqa.SUFFIXES[i]
  ids = np.zeros((1, 12), np.int32)
  ids[0, : len(prefix) + len(suffix)] = prefix + suffix
  return vision_language.Prompts(
    model.see(outputs['images'][i : i + 1]),
    jnp.asarray(ids),
    jnp.array([len(prefix)]),
    jnp.array([len(prefix) + len(suffix)]),
  )


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('name', ['', 'weights.npz'])
def test_logits_and_answers_are_those_of_transformers(
  folder, config, name, scan
):
  source, config = source_and_config(folder, name)
  config = dataclasses.replace(
    config,
    vision=dataclasses.replace(config.vision, scan=scan),
    decoder=dataclasses.replace(config.decoder, scan=scan),
  )
  pretrained.check(config, source)
  model = pretrained.load(config, source)
  outputs = np.load(folder / 'outputs.npz')
  rows = config.decoder.vocab_size
  for i in range(2):
    asked = prompts(model, outputs, i)
    logits = model.answer_logits(asked, 3)
    n = len(tiny_vqa.PREFIXES[i])
    expected = outputs[f'logits{i}'][n - 1 :, :rows]
    for found, wanted in zip(logits[0], expected, strict=False):
      np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    said = vision_language.greedy(model, asked, 6, end=1)
    np.testing.assert_array_equal(said[0], outputs[f'answer{i}'])


def test_options_are_scored_as_whole_answers(folder, config):
  """Against the model run on prompt and answer, one at a time."""
  model = pretrained.load(config, str(folder))
  outputs = np.load(folder / 'outputs.npz')
  options = np.array([[60, 61, 1], [62, 1, 0], [70, 1, 0]])
  weights = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 0]])
  for i in range(2):
    asked = prompts(model, outputs, i)
    found = vision_language.option_scores(model, asked, options, weights)
    n = len(tiny_vqa.PREFIXES[i])
    for k in range(3):
      own = options[k][weights[k] > 0]
      ids = asked.ids.at[0, n : n + len(own)].set(own)
      whole = asked._replace(ids=ids, length=jnp.array([n + len(own)]))
      logits = np.asarray(model.answer_logits(whole, 3)[0], np.float64)
      log_z = np.log(np.exp(logits).sum(-1))
      expected = sum(logits[a, own[a]] - log_z[a] for a in range(len(own)))
      assert found[0, k] == pytest.approx(expected, abs=1e-4)


def test_padding_is_not_seen(folder, config):
  model = pretrained.load(config, str(folder))
  asked = prompts(model, np.load(folder / 'outputs.npz'), 0)
  other = asked._replace(ids=asked.ids.at[0, 8:].set(99))
  for function in (
    lambda p: model.answer_logits(p, 3)[:, :3],
    lambda p: vision_language.greedy(model, p, 4, end=1),
  ):
    np.testing.assert_array_equal(function(asked), function(other))


def test_an_untied_head_starts_as_the_embeddings(folder, config):
  asked = None
  found = []
  for untied in (False, True):
    model = pretrained.load(config, str(folder), untied=untied)
    asked = prompts(model, np.load(folder / 'outputs.npz'), 1)
    found.append(model.answer_logits(asked, 2))
  assert model.head.kernel.shape == (16, 364)
  np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


def test_the_tokenizer(folder, config):
  tokenizer = pretrained.load_tokenizer(config, str(folder))
  ids = tokenizer.encode('answer en is it?')
  assert tokenizer.start not in ids
  assert tokenizer.end not in ids
  assert tokenizer.decode([*ids, tokenizer.end]) == 'answer en is it?'
  assert tokenizer.encode('\n') == [5]


def copy(folder, tmp_path):
  shutil.copytree(folder, tmp_path / 'copy')
  return tmp_path / 'copy'


@pytest.mark.parametrize(
  ('part', 'key', 'value', 'message'),
  [
    ('vision_config', 'image_size', 448, r'image_size is 448, that of .* 12;'),
    ('text_config', 'vocab_size', 256_000, r'vocab_size is 256000, that of'),
    ('text_config', 'model_type', 'gemma2', r"model_type is 'gemma2', that of"),
    ('vision_config', 'layer_norm_eps', 1e-5, r'layer_norm_eps is 1e-05, that'),
  ],
)
def test_another_model_is_refused_by_its_config(
  folder, config, tmp_path, part, key, value, message
):
  folder = copy(folder, tmp_path)
  content = json.loads((folder / 'config.json').read_text())
  content[part][key] = value
  (folder / 'config.json').write_text(json.dumps(content))
  with pytest.raises(ValueError, match=message):
    pretrained.check(config, str(folder))


@pytest.mark.parametrize('name', ['', 'weights.npz'])
def test_another_size_or_vocabulary_is_refused_by_the_tensors(
  folder, config, tmp_path, name
):
  folder = copy(folder, tmp_path)
  (folder / 'config.json').unlink()
  source, config = source_and_config(folder, name)
  larger = dataclasses.replace(config.vision, grid=6)
  with pytest.raises(ValueError, match=r'of images of 12 pixels .*name of 24;'):
    pretrained.check(dataclasses.replace(config, vision=larger), source)
  other = dataclasses.replace(config.decoder, vocab_size=280)
  with pytest.raises(
    ValueError, match=r'its vocabulary has 3\d\d entries .* 280'
  ):
    pretrained.check(dataclasses.replace(config, decoder=other), source)


def test_damaged_checkpoints_are_refused(folder, config, tmp_path):
  folder = copy(folder, tmp_path)
  file = folder / 'tokenizer.json'
  whole = file.read_text()
  file.write_text(whole[:-50])
  with pytest.raises(ValueError, match=r'tokenizer.json is cut short or damag'):
    pretrained.check(config, str(folder))
  file.write_text(
    whole.replace('<loc100>', '<bos2>').replace('"<bos>"', '"<b>"')
  )
  with pytest.raises(ValueError, match=r'<bos> None .* not those of a PaliG'):
    pretrained.check(config, str(folder))
  file.unlink()
  with pytest.raises(FileNotFoundError, match=r'tokenizer.json is missing'):
    pretrained.check(config, str(folder))
  (folder / 'config.json').write_text('{"model_type": "llava"}')
  with pytest.raises(ValueError, match="model_type is 'llava'; only a paligem"):
    pretrained.check(config, str(folder))
  for name in ('model.safetensors', 'weights.npz'):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
  with pytest.raises(ValueError, match='is cut short or damaged'):
    pretrained.load(config, str(folder))
  source, config = source_and_config(folder, 'weights.npz')
  with pytest.raises(ValueError, match=r'is not an .npz of plain arrays'):
    pretrained.load(config, source)


def test_half_precision_of_both_kinds_is_read(folder, config, tmp_path):
  """In an .npz bfloat16 has lost its name."""
  arrays = dict(np.load(folder / 'weights.npz'))
  half = {name: a.astype(ml_dtypes.bfloat16) for name, a in arrays.items()}
  shutil.copy(folder / 'tokenizer.json', tmp_path)
  np.savez(tmp_path / 'half.npz', **half)
  source, config = source_and_config(tmp_path, 'half.npz')
  pretrained.check(config, source)
  model = pretrained.load(config, source)
  kernel = model.projector.kernel[...]
  assert kernel.dtype == jnp.float32
  np.testing.assert_array_equal(
    kernel, half['params/img/head/kernel'].astype(np.float32)
  )


def adapted(model):
  """With random LoRA in both towers."""
  modules = r'.*\.attn\.(query|value|out)'
  return exports.with_adapters(model, modules, 0.2)


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('name', ['', 'weights.npz'])
def test_it_is_written_as_it_was_read(folder, config, name, scan):
  """And transformers read the file that it is equal to."""
  source, config = source_and_config(folder, name)
  towers = {
    tower: dataclasses.replace(getattr(config, tower), scan=scan)
    for tower in ('vision', 'decoder')
  }
  config = dataclasses.replace(config, **towers)
  model = pretrained.load(config, source)
  own = pretrained.load_tokenizer(config, source)
  files = save.merged_paligemma(model, own)
  expected = load_file(folder / 'model.safetensors')
  found = files['model.safetensors']
  assert {key.replace('.vision_model', '') for key in found} == set(expected)
  for key, tensor in found.items():
    wanted = expected[key.replace('.vision_model', '')]
    if name and 'embed_tokens' in key:
      assert not tensor[300:].any()
      tensor, wanted = tensor[:300], wanted[:300]
    np.testing.assert_array_equal(tensor, wanted)
  theirs = json.loads((folder / 'config.json').read_text())
  ours = files['config.json']
  for part in ('vision_config', 'text_config'):
    theirs |= {f'{part}.{k}': v for k, v in theirs.pop(part).items()}
    ours |= {f'{part}.{k}': v for k, v in ours.pop(part).items()}
  same = ours.keys() & theirs.keys() - {'hidden_size'}  # the tiny one's is 2048
  assert len(same) > 20
  assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}


def test_adapters_are_what_peft_reads(folder, config, tmp_path):
  """reference/paligemma/peft: what was written here, and PEFT's logits."""
  model = adapted(pretrained.load(config, str(folder)))
  own = pretrained.load_tokenizer(config, str(folder))
  files = save.peft_paligemma(model, own, base='paligemma')
  adapters = load_file(folder / 'peft/adapter_model.safetensors')
  found = files['adapter_model.safetensors']
  assert found.keys() == adapters.keys()
  for key, tensor in found.items():
    np.testing.assert_array_equal(tensor, adapters[key])
  about = json.loads((folder / 'peft/adapter_config.json').read_text())
  assert files['adapter_config.json'] == about
  outputs = np.load(folder / 'outputs.npz')
  logits = model.answer_logits(prompts(model, outputs, 0), 3)[0]
  expected = np.load(folder / 'peft/outputs.npz')['logits']
  before = outputs['logits0'][len(tiny_vqa.PREFIXES[0]) - 1 :][:3]
  assert np.abs(expected - before).max() > 1
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
  save.write(tmp_path / 'out', save.merged_paligemma(model, own), {})
  pretrained.check(config, str(tmp_path / 'out'))
  merged = pretrained.load(config, str(tmp_path / 'out'))
  logits = merged.answer_logits(prompts(merged, outputs, 0), 3)[0]
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_an_untied_head_is_not_written(folder, config):
  model = pretrained.load(config, str(folder), untied=True)
  own = pretrained.load_tokenizer(config, str(folder))
  with pytest.raises(ValueError, match=r'untied head .*no such model'):
    save.merged_paligemma(model, own)


def test_nothing_is_said_behind_the_end(folder, config):
  model = pretrained.load(config, str(folder))
  outputs = np.load(folder / 'outputs.npz')
  said = outputs['answer0']
  asked = prompts(model, outputs, 0)
  found = vision_language.greedy(model, asked, 6, end=int(said[2]))
  np.testing.assert_array_equal(found[0], [*said[:3], *[said[2]] * 3])
