"""What a config of questions reaches: the checks, the sets, the picture."""

import json
import shutil

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from experiments import cli, compare, resume, runs, study
from experiments.configs import base, easy_vqa, vqa_paligemma
from experiments.studies import vqa
from tests.experiments import kinds, tiny_vqa
from tests.experiments.data import vqa_files


@pytest.fixture
def config(noise, tiny_clip, tmp_path):
  config = kinds.tiny('vqa', noise)
  config.update(output_dir=str(tmp_path), num_steps=4, eval_every=2)
  return config


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'metrics': ('bleu',)}, r"metrics is 'bleu'; it must be one of accuracy"),
    ({'head': 'new'}, r"head is 'new'; it must be one of tied, untied"),
    (
      {'model.name': 'clip_b16'},
      r"model.name is 'clip_b16'; it must be one of",
    ),
    ({'model.dtype': 'int8'}, r'model.dtype is'),
    ({'model.pretrained': ''}, r'model.pretrained is empty'),
    ({'image_size': 15}, r'image_size is 15; it must be a multiple of 4'),
    ({'first_block': 1}, r'first_block is 1; it is 0, or 2, where the vision'),
    ({'answer_length': 20}, r'answer_length is 20; .* below .*text_length, 20'),
    (
      {'prompt': 'what'},
      r"prompt is 'what'; it has one \{\}, for the question",
    ),
    ({'repeats': 2}, r'repeats is 2, which has no effect: the views'),
    ({'options': ('yesyes',)}, r"options: 'yesyes' and its end have more toke"),
    (
      {'text_length': 18},
      r"the prompt of 'is it \w+\?' has 13 tokens, and .* 12",
    ),
  ],
)
def test_keys_that_cannot_be(config, changes, message):
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    study.check(config)


def test_other_sources_are_refused(config):
  config.eval_sets.other = {'kind': 'elpv', 'split': 'test'}
  with pytest.raises(
    ValueError, match=r"other.kind is 'elpv'; it must be one o"
  ):
    study.check(config)


def test_images_that_are_trained_on_are_in_no_other_set(config):
  config.eval_sets.again = {**config.train, 'limit': 3}
  with pytest.raises(
    ValueError, match=r'train and again share 3 images, one of'
  ):
    study.check(config)


def test_a_checkpoint_of_another_size_is_refused(config, tmp_path, monkeypatch):
  shutil.copytree(tiny_vqa.CHECKPOINT, tmp_path, dirs_exist_ok=True)
  about = json.loads((tmp_path / 'config.json').read_text())
  about['vision_config']['image_size'] = 448
  (tmp_path / 'config.json').write_text(json.dumps(about))
  config.model.pretrained = str(tmp_path)
  with pytest.raises(ValueError, match=r'image_size is 448, that of'):
    study.check(config)


def test_the_picture_has_right_answers_and_wrong_ones(config):
  tuning = study.load(config, study.check(config), cli.progress)
  run = runs.run(config, tuning, 'adamw', 0)
  runs.row(config, tuning, 'adamw', 0, run)
  file = f'{config.output_dir}/pictures/adamw_0.png'
  with Image.open(file) as picture:
    assert min(picture.size) > 800
  figure = vqa.draw(config, tuning, run.params)
  titles = [axes.get_title() for axes in figure.axes]
  assert len(titles) == 16
  assert [t for t in titles if 'said: ' not in t or 'truth: ' not in t] == []
  right = [title for title in titles if title.endswith('(1.0)')]
  assert 0 < len(right) < 16
  colors = {axes.title.get_color() for axes in figure.axes}
  assert colors == {'#000000', '#D55E00'}


@pytest.mark.parametrize(
  ('scores', 'expected'),
  [
    ([1.0] * 20 + [0.0] * 20, [*range(8), *range(20, 28)]),
    ([0.0] * 3 + [1.0] * 20, [*range(3, 16), 0, 1, 2]),
    ([1.0] * 3 + [0.0] * 20, [*range(16)]),
    ([0.3, 0.9], [1, 0]),
  ],
)
def test_which_are_drawn(scores, expected):
  assert vqa._right_and_wrong(np.array(scores)).tolist() == expected


def test_validation_is_what_is_not_outside(config):
  config.metrics = ('accuracy', 'outside')
  tuning = study.load(config, study.check(config), cli.progress)
  found = tuning.evaluate(tuning.pretrained, tuning.sets)
  assert found['val'].keys() == {'accuracy'}
  assert found['ID']['outside'] == found['ID']['accuracy']


@pytest.mark.slow
def test_paligemma_s_study(tmp_path, tiny_clip, capsys):
  """All ten sets; and LP-FT, which trains LoRA from where the head ended."""
  vqa_files.write_all(tmp_path)
  tables = {}
  for arg, methods in (
    ('', ['zero_shot', 'adamw', 'l2sp', 'spd_05', 'wise_ft_50']),
    ('untied', ['linear_probe', 'lp_ft']),
  ):
    config = vqa_paligemma.get_config(arg)
    config.update(
      data_dir=str(tmp_path),
      output_dir=str(tmp_path / f'run{arg}'),
      layout='replicated',
      image_size=12,
      text_length=60,
      num_workers=0,
      num_epochs=0.0,
      num_steps=6,
      batch_size=4,
      eval_batch_size=4,
      eval_every=3,
    )
    config.model.update(pretrained=str(tiny_vqa.CHECKPOINT), dtype='float32')
    sources = compare.configure(config, methods=methods)
    tuning = study.load(config, sources, cli.progress)
    saved = resume.Saved(config, {})
    compare.run(config, tuning, saved)
    tables |= {row['method']: row for row in saved.rows}
  capsys.readouterr()
  # Of letters: VizWiz asks the longest question.
  rows = {name: one.transforms[0] for name, one in tuning.sets.items()}
  assert rows['VizWiz'].text_length == 96
  assert rows['VQAv2'].text_length == rows['val'].text_length == 60
  names = set(tables['adamw']['metrics'])
  assert names == {'val', 'VQAv2', *vqa_paligemma._NAMES.values()}
  for row in tables.values():
    for metrics in row['metrics'].values():
      assert all(0 <= value <= 1 for value in metrics.values())
  assert 'kept' in tables['adamw']['metrics']['CV-VQA']
  assert 'consensus 2' in tables['adamw']['metrics']['VQA-Rephrasings']
  for name in ('adamw', 'l2sp', 'spd_05', 'linear_probe', 'lp_ft'):
    assert tables[name]['deviation'] > 0
  assert tables['spd_05']['norm_a'] < tables['adamw']['norm_a']
  assert tables['wise_ft_50']['deviation'] == pytest.approx(
    tables['adamw']['deviation'] / 2, rel=1e-3
  )
  assert tables['lp_ft']['deviation'] != tables['linear_probe']['deviation']


def test_lora_reaches_the_modules_of_the_paper(config):
  """q, k, v, o of the decoder and q, k, v of the tower, as by their suffix."""
  config.methods = {
    'lora': base.method(
      'LoRA', optimizer='adam', **vqa_paligemma._LORA | {'lora': 2}
    )
  }
  config.head = 'tied'
  tuning = study.load(config, study.check(config), cli.progress)
  adapted = runs.adapt(tuning, config.methods.lora, 0)
  found = {
    '.'.join(map(str, path[:-1]))
    for path, _ in nnx.to_flat_state(adapted.pretrained)
  }
  # 27 x 3 + 18 x 4 = 153 of PaliGemma-3B.
  assert found == {
    f'{tower}.blocks.{i}.attn.{name}'
    for tower, names in (
      ('vision', ('query', 'key', 'value')),
      ('decoder', ('query', 'key', 'value', 'out')),
    )
    for name in names
    for i in range(2)
  }


def test_two_models_that_were_joined_are_no_model_of_transformers():
  with pytest.raises(ValueError, match=r'dinov2_smollm2, two models .*no such'):
    vqa.exported(easy_vqa.get_config(), None, None, 'peft')
