"""The instrument: its counts against programs that can be counted by hand."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure

from experiments import benchmark, parallel, runs, topology
from experiments.configs import base, domainnet
from experiments.models import vit

PROGRAM = """
HloModule jit_step

%fused (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  ROOT %q = f32[8,128]{1,0} add(%p, %p)
}

ENTRY %main (a: f32[8,128], b: f32[8,128]) -> (f32[8,128], bf16[8,128]) {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = f32[8,128]{1,0:T(8,128)} parameter(1)
  %start = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]) copy-start(%a)
  %done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%start)
  %cut = ((f32[8,128]), f32[2,128]{1,0:S(1)}, s32[]) slice-start(%b)
  %cut.done = f32[2,128]{1,0:S(1)} slice-done(%cut)
  %fusion = (f32[8,128]{1,0:S(1)}, bf16[8,128]) fusion(%done, %b), kind=kLoop
  %sum = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%fusion), index=0
  %half = bf16[8,128]{1,0} get-tuple-element(%fusion), index=1
  %joined = f32[16,128]{1,0} custom-call(%a, %b), target="ConcatBitcast"
  %all = (f32[], f32[]) all-reduce-start(%x, %y), replica_groups={{0,1}}
  %gather = f32[16,128]{1,0} all-gather(%half), dimensions={0}
  ROOT %tuple = (f32[8,128], bf16[8,128]) tuple(%sum, %half)
}
"""


def test_bytes_are_those_of_main_memory():
  unit = 8 * 128 * 4
  # copy-start reads a; slice-start reads two rows of b; the fusion reads b and
  # writes half; the all-reduce writes two floats; the gather reads half and
  # writes [16, 128]. What is joined in place is not moved.
  expected = unit + unit // 4 + unit + unit // 2 + 8 + unit // 2 + 2 * unit
  assert topology.hbm_bytes(PROGRAM) == expected


def test_collectives_are_counted_once():
  assert topology.collectives(PROGRAM) == {'all-reduce': 1, 'all-gather': 1}


def test_hbm_is_the_compiler_s_count_where_all_memory_is_main():
  """On CPU; small fusions of scalars aside, and what XLA counts twice."""
  case = benchmark.growing_case(2**20, 4)
  layout = parallel.layout(devices=jax.devices()[:1])
  rows = benchmark.bench(case, layout)
  for row in rows:
    np.testing.assert_allclose(
      row['hbm_bytes'], row['bytes_accessed'], rtol=0.01
    )


def test_rows_of_the_optimizer():
  case = benchmark.growing_case(4 * 64 * 32, 4)
  layout = parallel.layout(devices=jax.devices()[:1])
  rows = benchmark.bench(case, layout, num_steps=3)
  adamw, adam_spd, chain = rows
  assert [row['method'] for row in rows] == list(benchmark.METHODS)
  assert adamw['params'] == sum(x.size for x in case.params.values())
  assert adamw['tensors'] == 4
  assert adamw['ratio'] == 1
  assert adamw['collectives'] == {}
  # an anchor, six numbers a layer and a count
  for row in (adam_spd, chain):
    more = row['state_bytes'] - adamw['state_bytes']
    assert more == 4 * row['params'] + 6 * 4 * 4 + 4
    assert row['ms'] > 0
    low, high = row['ratio_quartiles']
    assert low <= row['ratio'] <= high
  json.dumps(rows)
  lines = benchmark.table(rows).splitlines()
  assert len(lines) == 5
  assert '1.00 (1.00 to 1.00)' in lines[2]


def test_ratios_are_to_adamw_s_step_of_the_round(monkeypatch):
  case = benchmark.growing_case(4 * 64 * 32, 4)
  layout = parallel.layout(devices=jax.devices()[:1])
  times = {'adamw': [1, 2, 1], 'adam_spd': [2, 2, 6], 'chain': [1, 2, 1]}
  seconds = {method: np.array(t) for method, t in times.items()}
  monkeypatch.setattr(benchmark, 'measure', lambda *_: seconds)
  _, adam_spd, chain = benchmark.bench(case, layout, num_steps=3)
  assert adam_spd['ratio'] == 2  # of 2, 1 and 6
  assert adam_spd['ratio_quartiles'] == [1.5, 4]
  assert adam_spd['ms'] == 2000
  assert adam_spd['gflops'] == adam_spd['flops'] / 2e9
  assert chain['ratio'] == 1


def test_methods_take_turns_and_go_on_from_where_they_were():
  case = benchmark.growing_case(64, 1)
  layout = parallel.layout(devices=jax.devices()[:1])
  calls = []

  def program(method):
    def step(count, params, batch, frozen):
      calls.append((method, int(count)))
      return count + 1, params

    tx = optax.GradientTransformation(lambda params: jnp.zeros(()), None)
    on_one = layout.shardings((jnp.zeros(()), case.params, case.params, None))
    return benchmark.Program(case, step, tx, on_one, 0.0)

  programs = {method: program(method) for method in ('a', 'b')}
  seconds = benchmark.measure(programs, 3)
  # The first two are not timed.
  assert calls == [(method, i) for i in range(5) for method in ('a', 'b')]
  assert {method: len(times) for method, times in seconds.items()} == {
    'a': 3,
    'b': 3,
  }
  calls.clear()
  benchmark.measure(programs, 1, in_flight=2)
  turns = [(0, 1), (2, 3), (4, 5)]
  assert calls == [(m, i) for turn in turns for m in ('a', 'b') for i in turn]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_cases_are_of_the_model_and_dtype_that_are_asked_for(
  dtype, monkeypatch
):
  for name in ('vit_b16', 'dinov2_s14'):
    small = dataclasses.replace(vit.CONFIGS[name], depth=1, mlp_dim=32)
    monkeypatch.setitem(vit.CONFIGS, name, small)
  case = benchmark.make_case('optimizer', None, dtype)
  assert case.name == f'optimizer, vit_b16, {dtype}'
  assert all(x.dtype == dtype for x in jax.tree.leaves(case.params))
  case = benchmark.make_case('train', 'vit_b16', dtype, 8, 224)
  assert case.name == f'train step, vit_b16, {dtype}, 8 images of 224 px'
  assert case.batch['image'].shape == (8, 224, 224, 3)
  # Computed in the dtype, by parameters of float32.
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(case.params))
  tx = optax.sgd(1)
  jaxpr = jax.make_jaxpr(case.make_step(tx))(
    tx.init(case.params), case.params, case.batch, case.frozen
  )
  assert ('bf16[' in str(jaxpr)) == (dtype == 'bfloat16')
  case = benchmark.make_case('lora', None, dtype)
  assert case.batch['image'].shape == (32, 84, 84, 3)
  assert case.anchor == 'origin'


@pytest.mark.parametrize('lora_rank', [0, 2])
def test_a_train_step_runs_and_lora_has_no_anchor(lora_rank, monkeypatch):
  sizes = {'width': 16, 'depth': 2, 'num_heads': 2, 'mlp_dim': 32, 'grid': 5}
  tiny = dataclasses.replace(vit.CONFIGS['dinov2_s14'], **sizes)
  monkeypatch.setitem(vit.CONFIGS, 'tiny', tiny)
  parts = benchmark.classifier('tiny', 2 * tiny.patch_size)
  if lora_rank:
    method = base.method('', lora=lora_rank)
    model, _ = runs.adapt_model(parts.model, parts.trained, method, 0)
    parts = parts._replace(model=topology.abstract(model))
  case = benchmark.train_case(
    'tiny',
    parts,
    nnx.LoRAParam if lora_rank else nnx.Param,
    batch_size=4,
    anchor='origin' if lora_rank else None,
  )
  tensors = len(jax.tree.leaves(case.params))
  if lora_rank:
    assert tensors == tiny.depth * 2 * 2
  layout = parallel.layout(devices=jax.devices()[:1])
  adamw, adam_spd, _ = benchmark.bench(case, layout, num_steps=1)
  anchor = 0 if lora_rank else 4 * adam_spd['params']
  more = adam_spd['state_bytes'] - adamw['state_bytes']
  assert more == anchor + 6 * 4 * tensors + 4
  # Adam alone takes 15 a parameter.
  assert adamw['flops'] > 60 * adamw['params']


def test_sharded_over_eight_devices():
  """Matrices and their moments in eighths; SPD's vectors whole."""
  case = benchmark.growing_case(8 * 128 * 128, 8)
  layout = parallel.layout('fsdp', jax.devices())
  rows = benchmark.bench(case, layout, num_steps=2)
  adamw, adam_spd, _ = rows
  assert adamw['collectives'] == {}
  assert adam_spd['collectives']
  assert adam_spd['ms'] > 0
  assert '8 devices, fsdp' in benchmark.table(rows)
  program = benchmark.compile_step(case, 'adam_spd', layout)
  on_state = program.shardings[0]
  assert on_state[1].anchor['w0'].spec == P('fsdp')
  assert on_state[1].alignment.spec == P()


def test_growth_is_drawn(tmp_path, monkeypatch):
  axes = ('params', 'tensors', 'devices', 'topology')
  keys = ('ms', 'compile_s', 'hbm_bytes')
  methods = list(benchmark.METHODS)

  def value(axis, key, x, method):
    i, j = axes.index(axis), keys.index(key)
    return x + methods.index(method) + 10 * i + 50 * j

  rows = [
    {'axis': axis, 'x': x, 'method': method}
    | {key: value(axis, key, x, method) for key in keys}
    for axis in axes
    for x in (10, 100)
    for method in methods
  ]
  figures = []
  save = Figure.savefig

  def savefig(figure, *args, **kwargs):
    figures.append(figure)
    save(figure, *args, **kwargs)

  monkeypatch.setattr(Figure, 'savefig', savefig)
  benchmark.plot_growth(rows, tmp_path / 'growth.png')
  assert (tmp_path / 'growth.png').exists()
  drawn = [
    [line.get_xydata().tolist() for line in panel.lines]
    for panel in figures[0].axes
  ]
  assert drawn == [
    [[[x, value(axis, key, x, m)] for x in (10, 100)] for m in methods]
    for axis, key in (
      ('params', 'ms'),
      ('tensors', 'ms'),
      ('tensors', 'compile_s'),
      ('devices', 'ms'),
      ('topology', 'hbm_bytes'),
    )
  ]
  # Without libtpu there is no topology.
  benchmark.plot_growth(rows[:-6], tmp_path / 'growth.png')
  assert len(figures[1].axes) == 4


def test_what_grows(monkeypatch):
  def bench(case, layout, num_steps=0):
    return [
      {
        'params': case.params,
        'devices': layout.num_devices,
        'layout': layout.name,
        'num_steps': num_steps,
      }
    ]

  monkeypatch.setattr(benchmark, 'bench', bench)
  found = {}
  for axis, x, rows in benchmark.growth(3, {'v5e:2x4': jax.devices()}):
    found.setdefault(axis, []).append((x, rows[0]))
  for axis, sizes in benchmark.GROWTH.items():
    place = ('params', 'tensors').index(axis)
    assert [x for x, _ in found[axis]] == [size[place] for size in sizes]
    for _, row in found[axis]:
      assert (row['devices'], row['num_steps']) == (1, 3)
  assert [x for x, _ in found['devices']] == [1, 2, 4, 8]
  for x, row in found['devices']:
    assert (row['devices'], row['num_steps']) == (x, 3)
    assert row['layout'] == ('fsdp' if x > 1 else 'replicated')
  ((x, row),) = found['topology']
  assert (x, row['topology'], row['layout']) == (8, 'v5e:2x4', 'fsdp')
  assert not row['num_steps']  # there is nothing to time


def test_growing_cases_have_the_size_they_are_drawn_at():
  for sizes in benchmark.GROWTH.values():
    for num_params, num_tensors in sizes:
      case = benchmark.growing_case(num_params, num_tensors)
      leaves = jax.tree.leaves(case.params)
      assert len(leaves) == num_tensors
      total = sum(leaf.size for leaf in leaves)
      np.testing.assert_allclose(total, num_params, rtol=0.02)


def test_a_topology_without_libtpu_says_what_to_install(monkeypatch):
  monkeypatch.setattr(topology.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ModuleNotFoundError, match=r'\.\[tpu\]'):
    topology.devices('v5e:2x2')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['extra'], "'extra' is no flag"),
    (['--model=vit_b99'], 'should be one of'),
    (['--output_dir=/dev/null/x'], 'Not a directory'),
  ],
)
def test_bad_flags_end_with_a_line(arguments, message):
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.benchmark', *arguments],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1
  assert message in done.stderr
  assert 'Traceback' not in done.stderr


@pytest.mark.tpu
@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason=(
    'libtpu, the TPU compiler, is 700 MB, for Linux on x86-64 alone; '
    "'.[test,tpu]' installs it, and .ci/run runs these"
  ),
)
class TestTPU:
  """The TPU compiler's program, without a TPU."""

  CASE = benchmark.growing_case(20 * 512 * 512, 20)

  def test_replicated_moves_little_more_than_adamw(self):
    layout = parallel.layout(devices=topology.devices('v5e:2x2'))
    adamw, adam_spd, chain = benchmark.bench(self.CASE, layout)
    assert adamw['hbm_bytes'] < 1.01 * 7 * 4 * adamw['params']
    assert adam_spd['hbm_bytes'] < 1.35 * adamw['hbm_bytes']
    assert chain['hbm_bytes'] < 1.35 * adamw['hbm_bytes']
    for row in (adamw, adam_spd, chain):
      assert row['collectives'] == {}

  def test_sharded_state_costs_one_all_reduce(self):
    layout = parallel.layout('fsdp', topology.devices('v5e:4x4'))
    adamw, adam_spd, chain = benchmark.bench(self.CASE, layout)
    assert adamw['collectives'] == {}
    for row, sums in ((adam_spd, 4), (chain, 3)):
      # of all layers' sums; the compiler joins up to 256
      assert sums * 20 <= 256
      assert row['collectives'] == {'all-reduce': 1}
      assert row['hbm_bytes'] < 1.35 * adamw['hbm_bytes']

  def test_the_train_step_of_a_vit(self, monkeypatch):
    """At full size but for its depth: its class token broke the compiler."""
    one_block = dataclasses.replace(vit.CONFIGS['clip_b16'], depth=1)
    monkeypatch.setitem(vit.CONFIGS, 'clip_b16', one_block)
    config = domainnet.get_config()
    topology.check(config, ['spd_1'], 64)
    layout = parallel.layout('fsdp', topology.devices('v5e:2x2'))
    (row,) = topology.rows(config, ['spd_1'], layout)
    assert not row['remat']
    assert 0 < row['chip_bytes'] < 2e9

  def test_an_unknown_topology_is_named(self):
    with pytest.raises(ValueError, match='v9z:7x7'):
      topology.devices('v9z:7x7')
