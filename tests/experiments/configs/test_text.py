"""The studies of language in small: their configs and formats, a tiny LLaMA."""

import pytest

from experiments import cli, compare, resume, runs, study
from experiments.configs import commonsense, sentiment
from tests.experiments import tiny_questions
from tests.experiments.data import questions, test_vader


def run(config, folder, **changes):
  """One seed of few steps; the rows by method, and the sets."""
  tiny_questions.write_checkpoint(folder / 'llama')
  config.model.update(name='', pretrained=str(folder / 'llama'))
  config.update(
    data_dir=str(folder),
    output_dir=str(folder / 'run'),
    num_epochs=0.0,
    num_steps=24,
    eval_every=12,
    batch_size=8,
    eval_batch_size=8,
    **changes,
  )
  sources = compare.configure(config, methods=list(config.methods))
  tuning = study.load(config, sources, cli.progress)
  saved = resume.Saved(config, runs.provenance(config))
  compare.run(config, tuning, saved)
  return {row['method']: row for row in saved.rows}, tuning.sets


def write(folder, splits):
  for seed, (name, split) in enumerate(splits):
    file = folder / 'commonsense' / name / f'{split}.json'
    questions.write(file, 40, seed, num_options=2 + seed % 3)


def check(rows, sets):
  """All methods of LoRA, from one theta_0; none of them is another one."""
  assert set(rows['adamw']['metrics']) == {'val', *sets}
  assert rows['zero_shot']['deviation'] == 0
  for row in rows.values():
    for metrics in row['metrics'].values():
      assert all(0 <= value <= 1 for value in metrics.values())
  found = [row['deviation'] for row in rows.values()]
  assert len(set(found)) == len(found) - 1  # AdamW without decay is Adam
  assert rows['adam']['deviation'] == rows['adamw_0']['deviation']
  # Half of B A.
  assert rows['wise_ft']['deviation'] == pytest.approx(
    rows['adamw']['deviation'] / 2, rel=1e-4
  )
  assert rows['spd_1']['decayed'] > 0
  assert rows['spd_1']['norm_a'] < rows['spd_1_b']['norm_a']


@pytest.mark.slow
def test_arc(tmp_path):
  sets = [(name, 'test') for name in commonsense.SETS if name != 'hellaswag']
  trained = ('ARC-Easy', 'ARC-Challenge', 'openbookqa')
  write(tmp_path, [(name, 'train') for name in trained] + sets)
  config = commonsense.get_config('arc')
  # A test set has a question of its training set, which is left out.
  (tmp_path / 'commonsense/ARC-Easy/test.json').write_text(
    (tmp_path / 'commonsense/ARC-Easy/train.json').read_text()
  )
  rows, sets = run(
    config, tmp_path, first_block=1, max_length=64, learning_rate=1e-1
  )
  check(rows, ['ID', 'PIQA', 'SIQA', 'WinoGrande', 'BoolQ'])
  answers = sets['ID'].source.columns['answer']
  assert (answers >= 0).sum() == 80


@pytest.mark.slow
def test_the_benchmark_s_setting(tmp_path):
  write(tmp_path, [(name, 'test') for name in commonsense.SETS])
  questions.write(tmp_path / 'commonsense/commonsense_170k.json', 60, 99)
  config = commonsense.get_config('llama13b')
  for spec, take in ((config.train, 0), (config.val, 1)):
    spec.part = {'shares': (0.5, 0.5), 'take': take, 'seed': 42}
  for part in ('adamw_0', 'adam', 'l2sp', 'spd_03', 'spd_1_start', 'spd_1_b'):
    del config.methods[part]
  config.model.update(remat=True, scan=True)
  rows, sets = run(config, tmp_path, max_length=256, learning_rate=1e-1)
  assert set(rows['adamw']['metrics']) == {'val', *commonsense.SETS}
  assert set(sets['boolq'].source.columns) == {'ids', 'length', 'answer'}
  assert rows['spd_1']['decayed'] > 0


def test_sentiment(tmp_path):
  test_vader.write(tmp_path, test_vader.LINES)
  config = sentiment.get_config()
  rows, _ = run(
    config, tmp_path, first_block=1, max_length=32, learning_rate=1e-1
  )
  check(rows, ['ID', 'tweets', 'editorials', 'films'])


def test_sentiment_in_short(tmp_path):
  test_vader.write(tmp_path, test_vader.LINES)
  tiny_questions.write_checkpoint(tmp_path / 'llama')
  config = sentiment.get_config('short')
  config.model.update(name='', pretrained=str(tmp_path / 'llama'))
  config.update(data_dir=str(tmp_path), output_dir=str(tmp_path / 'run'))
  config.update(first_block=1, max_length=32)
  sources = compare.configure(config)
  assert list(config.methods) == ['zero_shot', 'adamw', 'spd_1', 'wise_ft']
  assert set(sources) == {'train', 'val', 'ID', *sentiment.OOD}


@pytest.mark.parametrize('module', [commonsense, sentiment])
def test_an_unknown_argument(module):
  with pytest.raises(ValueError, match='llama70b'):
    module.get_config('llama70b')


def test_files_that_are_not_there(tmp_path):
  tiny_questions.write_checkpoint(tmp_path / 'llama')
  for config in (commonsense.get_config(), sentiment.get_config()):
    config.model.update(name='', pretrained=str(tmp_path / 'llama'))
    config.update(data_dir=str(tmp_path), output_dir=str(tmp_path / 'run'))
    config.update(first_block=1)
    with pytest.raises(FileNotFoundError, match=r'LLM-Adapters|pip download'):
      compare.configure(config)
