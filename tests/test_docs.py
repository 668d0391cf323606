"""Every Python block of the docs runs; links and tables are what they say."""

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


def table(page, title):
  """The cells of the table whose first title it is."""
  text = (ROOT / page).read_text()
  lines = text[text.index(f'\n| {title} ') :].strip().split('\n\n')[0]
  cells = [
    [cell.strip() for cell in line.split('|')[1:-1]]
    for line in lines.splitlines()
  ]
  return [cells[0], *cells[2:]]  # without the rule


@pytest.mark.parametrize(
  'name', ['elpv', 'elpv_lora', 'pacs_photo', 'pacs_art_painting']
)
def test_tables_are_those_of_the_rows(name):
  rows = report.read_jsonl(RESULTS / f'{name}.jsonl')
  page = (ROOT / 'experiments/README.md').read_text()
  assert report.table(rows, rows[0]['means']) in page


def test_the_main_job_s_table_is_a_part_of_the_whole():
  titles, *short = table('README.md', 'method')
  whole_titles, *whole = table('experiments/README.md', 'method')
  places = [whole_titles.index(title) for title in titles]
  assert short == [[row[i] for i in places] for row in whole]


@pytest.mark.parametrize(
  ('module', 'name', 'page'),
  [
    (benchmark, 'benchmark', 'experiments/COST.md'),
    (topology, 'slices', 'experiments/PODS.md'),
    (topology, 'pascal_context_slices', 'experiments/PODS.md'),
  ],
)
def test_the_tables_of_costs_are_those_of_their_rows(module, name, page):
  rows = report.read_jsonl(RESULTS / f'{name}.jsonl')
  assert module.table(rows) in (ROOT / page).read_text()


def costs(case, topology=None):
  """The first rows of a case on a machine: AdamW's and the two of SPD."""
  rows = report.read_jsonl(RESULTS / 'benchmark.jsonl')
  found = [
    row
    for row in rows
    if row['case'].startswith(case) and row.get('topology') == topology
  ]
  methods = ('adamw', 'adam_spd', 'chain')
  return [next(r for r in found if r['method'] == m) for m in methods]


def test_the_costs_in_short():
  found = [
    [row['ratio'] for row in costs(case)[1:]]
    for case in ('train', 'LoRA', 'optimizer')
  ]
  adamw, *spd = (row['hbm_bytes'] for row in costs('optimizer', 'v5e:2x2'))
  found.append([size / adamw for size in spd])
  _, *lines = table('README.md', 'times')
  assert [cells for _, *cells in lines] == [
    [f'{ratio:.2f}' for ratio in ratios] for ratios in found
  ]


def test_the_passes_over_the_params():
  def passes(topology):
    for row in costs('optimizer', topology):
      share = row['devices'] if row['layout'] == 'fsdp' else 1
      yield f'{row["hbm_bytes"] * share / row["params"] / 4:.1f}'  # float32

  _, *lines = table('experiments/COST.md', 'passes')
  columns = [passes(topology) for topology in (None, 'v5e:2x2', 'v5e:4x4')]
  assert [tuple(cells) for _, _, *cells in lines] == list(
    zip(*columns, strict=True)
  )
