"""A study's train step on devices that have room for it, or not."""

import types

import jax
import pytest

from experiments import parallel, topology
from experiments.configs import base
from tests.experiments import tiny_study

METHODS = ('adamw', 'spd_1')


@pytest.fixture
def config(tiny_clip):
  config = tiny_study.get_config('')
  topology.check(config, METHODS, 64)
  return config


@pytest.fixture
def layout():
  return parallel.layout('fsdp', jax.devices())


def test_the_step_of_a_study(config, layout):
  rows = list(topology.rows(config, METHODS, layout))
  adamw, spd = rows
  assert [row['method'] for row in rows] == ['AdamW', 'Adam-SPD']
  for row in rows:
    assert (row['devices'], row['batch_size']) == (8, 64)
    assert (row['remat'], row['accumulate']) == (False, 1)
    assert row['collectives']['all-reduce']
  # The anchor of about 10,000 numbers is whole here: all are small.
  assert spd['chip_bytes'] > adamw['chip_bytes'] + 20_000
  text = topology.table([{**row, 'topology': 'v5e:2x4'} for row in rows])
  (line,) = text.splitlines()[2:]
  assert '| v5e:2x4 |     8 |   fsdp | AdamW / Adam-SPD |    - |' in line
  assert ' 0.0 of 16 |' in line


class Program:
  """A compiled step that needs so much."""

  def __init__(self, found):
    self.found = found

  def compile(self, options):
    if isinstance(self.found, Exception):
      raise self.found
    return self

  def memory_analysis(self):
    return type(
      'Memory',
      (),
      {
        'argument_size_in_bytes': 5,
        'output_size_in_bytes': 4,
        'temp_size_in_bytes': 3,
        'alias_size_in_bytes': 2,
      },
    )


def rows_where(config, layout, monkeypatch, fits):
  """`rows` where a step fits as `fits(method, remat, accumulate)` says."""
  asked = []

  class Step:
    def lower(self, name):
      way = name, config.model.remat, config.accumulate
      asked.append(way)
      if fits(*way):
        return Program(None)
      return Program(jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: of HBM'))

  monkeypatch.setattr(topology, 'arguments', lambda _, name, layout: [name])
  monkeypatch.setattr(topology.train, 'jit_step', Step())
  monkeypatch.setattr(topology, 'count_program', lambda program: {})
  rows = list(topology.rows(config, METHODS, layout))
  return rows, asked


def test_the_first_way_that_fits(config, layout, monkeypatch):
  rows, asked = rows_where(
    config,
    layout,
    monkeypatch,
    lambda name, remat, accumulate: (
      accumulate >= METHODS.index(name) + 1 and remat
    ),
  )
  assert asked == [
    ('adamw', False, 1),
    ('adamw', True, 1),
    # It begins where the first method fitted.
    ('spd_1', True, 1),
    ('spd_1', True, 2),
  ]
  assert [(row['remat'], row['accumulate']) for row in rows] == [
    (True, 1),
    (True, 2),
  ]
  assert rows[0]['chip_bytes'] == 10
  counts = {'flops': 1e12, 'bytes_accessed': 1e9, 'topology': 'v5e:2x4'}
  sent = [{'all-gather': 3, 'all-reduce': 2}, {'all-gather': 3}]
  named = [
    {**row, **counts, 'collectives': collectives}
    for row, collectives in zip(rows, sent, strict=True)
  ]
  text = topology.table(named)
  assert '| rematerialisation / rematerialisation, 2 parts |' in text
  assert '| 3 all-gather, 2 / 0 all-reduce |' in text


def test_what_never_fits(config, layout, monkeypatch):
  rows, asked = rows_where(config, layout, monkeypatch, lambda *way: False)
  # 64 examples are no 16 parts on 8 devices.
  assert [way[2] for way in asked] == [1, 1, 2, 4, 8] * 2
  text = topology.table([{**row, 'topology': 'v5e:2x4'} for row in rows])
  assert '| AdamW / Adam-SPD | does not fit |' in text


def test_one_method_of_three_does_not_fit(config, layout):
  row = {'devices': 8, 'layout': 'fsdp', 'topology': 'v5e:2x4', 'method': 'A'}
  fits = row | {
    'remat': False,
    'accumulate': 1,
    'chip_bytes': 5 * 2**30,
    'flops': 1e12,
    'bytes_accessed': 1e9,
    'collectives': {'all-reduce': 3},
    'compile_s': 60.0,
  }
  text = topology.table([fits, row | {'method': 'B'}, fits | {'method': 'C'}])
  assert '| A / B / C | - / does not fit / - | 5.0 / - / 5.0 of 16 |' in text
  assert '| 3 / - / 3 all-reduce |' in text


def test_another_error_is_shown(config, layout, monkeypatch):
  broken = Program(jax.errors.JaxRuntimeError('INTERNAL: no'))
  step = types.SimpleNamespace(lower=lambda *args: broken)
  monkeypatch.setattr(topology.train, 'jit_step', step)
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    list(topology.rows(config, METHODS, layout))


@pytest.mark.parametrize(
  ('names', 'changes', 'message'),
  [
    (('x',), {}, 'x is none of its methods that train; they are adamw, spd_1'),
    (('wise_ft',), {}, 'wise_ft is none of its methods that train'),
  ],
)
def test_studies_that_it_does_not_take(config, names, changes, message):
  config.update(changes)
  with pytest.raises(ValueError, match=message):
    topology.check(config, names, 64)


def test_the_step_of_a_study_with_cached_blocks_and_lora(config, layout):
  """Its lower blocks are run once, before; the step has the upper ones."""
  config.methods.lora = base.method('', optimizer='adam', lora=2)
  program, _, _, state, batch, *_ = topology.arguments(config, 'lora', layout)
  assert batch['image'].shape == (64, 20, 20, 3)
  assert program.scale == 8
  assert not state.opt_state[0].mu['backbone']['blocks'][0]['attn'].get('out')
  config.first_block = 1
  for name, trained in (('adamw', {1}), ('lora', {1})):
    *_, params, _, batch, _, _, _ = topology.arguments(config, name, layout)
    assert batch['hidden'].shape == (64, 26, 16)
    assert batch['hidden'].dtype == 'float16'
    assert set(params['backbone']['blocks']) == trained
