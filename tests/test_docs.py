"""Every Python block of the docs runs; links and tables are what they say."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen
from flax.training.train_state import TrainState

from experiments import docs
from experiments.configs import base, elpv

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'experiments/results'
WITH_CODE = ('README.md', 'RECIPES.md', 'experiments/README.md')
PAGES = (
  *WITH_CODE,
  'CONTRIBUTING.md',
  'experiments/COST.md',
  'experiments/PODS.md',
)


class Model(linen.Module):
  def setup(self):
    self.backbone = linen.Dense(8)
    self.head = linen.Dense(2)

  def __call__(self, x):
    return self.head(jnp.tanh(self.backbone(x)))


def namespace():
  model = Model()
  batches = [jax.random.normal(jax.random.key(i), (16, 4)) for i in range(5)]

  def loss_fn(params, batch):
    return jnp.mean((model.apply({'params': params}, batch) - 1) ** 2)

  return {
    'model': model,
    'pretrained': model.init(jax.random.key(0), batches[0])['params'],
    'batches': batches,
    'loss_fn': loss_fn,
    'TrainState': TrainState,
    'config': elpv.get_config(),
    'method': base.method,
  }


@pytest.mark.parametrize('name', WITH_CODE)
def test_every_block_runs(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  text = (ROOT / name).read_text()
  blocks = re.findall(r'^```python\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
  assert len(blocks) >= 2
  scope = namespace()
  for block in blocks:
    exec(compile(block, name, 'exec'), scope)


def anchors(page):
  """What GitHub makes of the page's headings."""
  titles = re.findall('^#+ (.*)', page.read_text(), re.MULTILINE)
  return {
    re.sub(r'[^\w\- ]', '', title).lower().replace(' ', '-') for title in titles
  }


def test_every_page_is_looked_at():
  found = {*ROOT.glob('*.md'), *ROOT.glob('experiments/**/*.md')}
  assert found == {ROOT / name for name in PAGES}


@pytest.mark.parametrize('name', PAGES)
def test_links_lead_somewhere(name):
  file = ROOT / name
  found = re.findall(r'\]\(([^)#]*)(?:#([^)]*))?\)', file.read_text())
  assert found
  for path, heading in found:
    if not path.startswith('https://'):
      target = file.parent / path if path else file
      assert target.exists(), path
      assert not heading or heading in anchors(target), heading


def test_tables_and_numbers_are_those_of_the_rows(capsys):
  docs.main(['--check'])
  assert not capsys.readouterr().out
  found = [
    name
    for page in docs.PAGES
    for name in re.findall(
      r'^<!-- table: (.*) -->\n\n\| ', (ROOT / page).read_text(), re.MULTILINE
    )
  ]
  assert set(found) >= {*docs.TABLES, 'elpv', 'elpv_lora', 'pacs_photo'}
  files = {path.stem for path in RESULTS.glob('*.jsonl')}
  of_files = {'costs': 'benchmark'}.get
  shown = {re.split(': |, ', name)[0] for name in found}
  assert files - {'growth'} == {of_files(name, name) for name in shown}


def test_a_number_without_a_row_is_told(tmp_path, monkeypatch, capsys):
  (tmp_path / 'experiments').mkdir()
  for page in docs.PAGES:
    (tmp_path / page).write_text((ROOT / page).read_text())
  monkeypatch.setattr(docs, '_ROOT', tmp_path)
  readme = tmp_path / 'README.md'
  text = readme.read_text()
  readme.write_text(
    text.replace('| Adam-SPD 1   | 0.852', '| Adam-SPD 1   | 0.952')
    + '\nSPD gains .123, or 1.456 times, with jax 0.10.2 and `rate=0.789`.\n'
  )
  with pytest.raises(SystemExit, match='1'):
    docs.main(['--check'])
  assert capsys.readouterr().out.splitlines() == [
    'README.md: a table is not what its rows say; run without --check.',
    'README.md: no table of it has .123, 1.456.',
  ]
  assert '0.952' in readme.read_text()
  with pytest.raises(SystemExit, match='1'):
    docs.main([])
  assert '| Adam-SPD 1   | 0.852' in readme.read_text()
  with pytest.raises(SystemExit, match='--check'):
    docs.main(['--force'])
