"""What a study of questions refuses, and how it answers in text."""

import json

import jax
import numpy as np
import pytest

from experiments import cli, compare, parallel, resume, runs, study
from experiments.configs import base
from experiments.studies import multiple_choice
from tests.experiments import tiny_questions
from tests.experiments.data import questions


@pytest.fixture
def config(noise, tmp_path):
  config = tiny_questions.get_config(str(noise))
  config.output_dir = str(tmp_path / 'run')
  config.update(num_steps=4, eval_every=2)
  return config


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'template': 'x'}, "template is 'x'; it must be one of exact, trimmed"),
    ({'response': 'x'}, "response is 'x'; it must be one of output, option"),
    ({'answers': 'x'}, "answers is 'x'; it must be one of scores, greedy"),
    ({'metrics': ('auroc',)}, "metrics is 'auroc'; it must be one of accur"),
    ({'metrics': ('macro_f1',)}, 'those of classes need options that are the'),
    ({'model.dtype': 'x'}, "dtype is 'x'; it must be one of float32"),
    ({'model.name': 'x'}, "model.name is 'x'; it must be one of llama_7b"),
    ({'model.pretrained': ''}, 'pretrained is empty; say where weights are'),
    ({'max_length': 1}, 'max_length is 1; it is at least 2'),
    ({'max_length': 300}, 'max_length is 300, and the context of the model 2'),
    ({'max_length': 12}, r"'which of them is .*' and its answer have 1\d to"),
    ({'max_length': 4, 'cut': True}, 'the prompts alone fill config.max_len'),
    ({'first_block': 2}, 'first_block is 2; the model has blocks 0 to 1'),
    ({'first_block': 1, 'model.scan': True}, 'scan runs all blocks'),
    ({'num_beams': 2}, 'num_beams is 2, which has no effect: no beam is se'),
    ({'max_new_tokens': 2}, 'max_new_tokens is 2, which has no effect: no t'),
    ({'max_new_tokens': 0}, 'max_new_tokens is 0; it is at least 1'),
    ({'num_workers': 2}, 'num_workers is 2, which has no effect: texts lie'),
    ({'repeats': 2}, 'repeats is 2, which has no effect: texts lie'),
    ({'answers': 'greedy'}, 'for the name of an option|set it to output'),
    ({'val.path': 'no.json'}, r'no\.json cannot be read'),
  ],
)
def test_what_is_refused(config, changes, message):
  config.update_from_flattened_dict(changes)
  with pytest.raises((ValueError, OSError), match=message):
    study.check(config)


def test_sets_that_share_a_question(config, tmp_path, noise):
  records = json.loads((noise / 'questions' / 'all.json').read_text())
  (tmp_path / 'test.json').write_text(json.dumps(records[:3]))
  path = str(tmp_path / 'test.json')
  config.eval_sets.ID = {'kind': 'questions', 'path': path}
  with pytest.raises(ValueError, match=r'train and ID share \d examples'):
    study.check(config)


def test_a_question_beyond_the_context(config, tmp_path):
  record = questions.record('which ' * 300, ['ice', 'fire'], 0)
  (tmp_path / 'long.json').write_text(json.dumps([record]))
  path = str(tmp_path / 'long.json')
  config.eval_sets.long = {'kind': 'questions', 'path': path}
  with pytest.raises(
    ValueError, match=r"long: 'which which .*' has 30\d tokens, .* room for 256"
  ):
    study.check(config)


def test_what_is_cut_is_said(config, capsys):
  config.update(max_length=14, cut=True, train_on_inputs=True)
  found = study.check(config)
  assert found['train'].columns['ids'].shape[1] == 14
  said = capsys.readouterr().out
  assert 'train: 120 examples in 120 rows of 14 tokens, 0.0% of them' in said
  assert '120 examples are cut' in said


def test_sets_share_one_program(config):
  config.eval_sets.two = {**config.eval_sets.ID, 'limit': 3}
  found = study.check(config)
  shapes = {
    name: {key: column.shape[1:] for key, column in one.columns.items()}
    for name, one in found.items()
  }
  assert shapes['val'] == shapes['ID'] == shapes['two']
  assert (found['two'].columns['answer'] >= 0).sum() == 3
  # The step of the benchmark is the study's, of the most targets.
  example = multiple_choice.shapes(config).example
  for name, column in found['train'].columns.items():
    assert example[name].dtype == column.dtype
    assert example[name].shape >= column.shape[1:]


@pytest.mark.parametrize('answers', ['greedy', 'beam'])
def test_answers_in_text(config, answers):
  """Validation scores options, the others are answered in text."""
  config.update(
    answers=answers, response='output', template='trimmed', max_length=100
  )
  config.max_new_tokens = 8
  config.first_block = 1
  lora = {'optimizer': 'adam', 'lora': 2, 'lora_modules': r'.*\.attn\.query'}
  config.methods.spd_1 = base.method('', spd=1.0, anchor='origin', **lora)
  sources = compare.configure(config, methods=['zero_shot', 'spd_1'])
  assert set(sources['ID'].columns) == {'ids', 'length', 'answer'}
  tuning = study.load(config, sources, cli.progress)
  saved = resume.Saved(config, runs.provenance(config))
  compare.run(config, tuning, saved)
  for row in saved.rows:
    assert set(row['metrics']) == {'val', 'ID'}
    assert 0 <= row['metrics']['ID']['accuracy'] <= 1
  # The text of the model itself, as it decodes it.
  eval_set = tuning.sets['ID']
  outputs = {
    'ids': np.full((len(eval_set.source), 8), 2, np.int32),
    'answer': eval_set.source.columns['answer'],
  }
  assert eval_set.task.metrics(outputs, eval_set) == {'accuracy': 0.0}


def test_adapters_are_told_apart(config):
  for name in list(config.methods):
    del config.methods[name]
  lora = {'lora': 2, 'lora_modules': r'.*\.attn\.query', 'rate': 3.0}
  adam = {'optimizer': 'adam', **lora}
  config.methods.update(
    {
      'zero_shot': base.method('start'),
      'adam': base.method('Adam', **adam),
      'spd_b': base.method('B', spd=1.0, anchor='origin_b', **adam),
      'l2sp': base.method(
        'L2-SP', optimizer='l2sp_origin', weight_decay=1.0, **lora
      ),
    }
  )
  config.update(num_steps=12, eval_every=12)
  sources = compare.configure(config)
  saved = resume.Saved(config, runs.provenance(config))
  compare.run(config, study.load(config, sources, cli.progress), saved)
  rows = {row['method']: row for row in saved.rows}
  assert 'norm_a' not in rows['zero_shot']
  for name in ('adam', 'spd_b', 'l2sp'):
    assert min(rows[name][key] for key in ('moved_a', 'norm_b')) > 0
  assert rows['l2sp']['norm_a'] < rows['adam']['norm_a']


def test_large_stacks_stay_split(config, monkeypatch):
  """The loop over the blocks gathers them, and takes the same steps."""
  config.update(num_steps=6, eval_every=6)
  config.model.scan = True
  found = []
  for layout in ('replicated', 'fsdp'):
    config.layout = layout
    tuning = study.load(config, study.check(config), cli.progress)
    found.append(runs.run(config, tuning, 'spd_1', 0).history)
    monkeypatch.setattr(parallel, '_SMALL', 0)
    monkeypatch.setattr(parallel, '_LARGE', 0)
    monkeypatch.setattr(parallel, 'all_devices', jax.devices)
  for key in ('loss', 'deviation'):
    # Sums in another order.
    np.testing.assert_allclose(found[1][key], found[0][key], rtol=1e-3)
