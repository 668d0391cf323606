"""Every Python block of the README and the recipes runs, in order."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen
from flax.training.train_state import TrainState

from experiments import benchmark, report, topology
from experiments.configs import base, elpv

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ('README.md', 'RECIPES.md', 'experiments/README.md')


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


@pytest.mark.parametrize('name', PAGES)
def test_every_block_runs(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  text = (ROOT / name).read_text()
  blocks = re.findall(r'^```python\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
  assert len(blocks) >= 2
  scope = namespace()
  for block in blocks:
    exec(compile(block, name, 'exec'), scope)


@pytest.mark.parametrize('name', PAGES)
def test_links_lead_somewhere(name):
  file = ROOT / name
  for link in re.findall(r'\]\(([^)#]+)\)', file.read_text()):
    assert link.startswith('https://') or (file.parent / link).exists(), link


@pytest.mark.parametrize('name', ['elpv', 'pacs_photo', 'pacs_art_painting'])
def test_tables_are_those_of_the_rows(name):
  rows = report.read_jsonl(ROOT / 'experiments/results' / f'{name}.jsonl')
  pages = [ROOT / 'README.md', ROOT / 'experiments/README.md']
  assert any(
    report.table(rows, rows[0]['means']) in page.read_text() for page in pages
  )


@pytest.mark.parametrize(
  ('module', 'name'), [(benchmark, 'benchmark'), (topology, 'slices')]
)
def test_the_tables_of_costs_are_those_of_their_rows(module, name):
  rows = report.read_jsonl(ROOT / f'experiments/results/{name}.jsonl')
  assert module.table(rows) in (ROOT / 'README.md').read_text()
