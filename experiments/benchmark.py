"""What a step of SPD costs: on this machine, or by the TPU compiler.

python -m experiments.benchmark [--case=optimizer|train|lora] [--model=vit_b16]
    [--dtype=float32|bfloat16] [--layout=replicated,fsdp] [--growth]
    [--batch_size=N] [--image_size=N] [--topology=v5e:4x4,...] [--steps=N]
    [--in_flight=N] [--output_dir=DIR]
python -m experiments.benchmark --config=STUDY [--methods=A,B]
    [--topology=v5e:4x4,...]

Every method takes the same step, A B A B, so that a noisy machine favours none;
ratios are to AdamW's step of the same round. `--topology` compiles for TPUs
that need not be there, and counts (extra `tpu`). Prints a table, and writes its
rows to --output_dir. `--growth` does so for ever larger models and ever more
devices, with a plot; topologies come after the devices here. With `--config`
it is the train step of a study, as `experiments.train` takes it, on this
machine; or, by the TPU compiler, whether a slice of TPUs has room for it.
"""

import math
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

from experiments import (
  cli,
  figures,
  parallel,
  report,
  study,
  topology,
  train,
)
from experiments.configs import base, images
from experiments.models import lora, vit
from optax_spd import adam_spd, spd

_RATE = 2e-5
METHODS = {
  'adamw': lambda anchor: optax.adamw(_RATE),
  'adam_spd': lambda anchor: adam_spd(_RATE, anchor),
  'chain': lambda anchor: optax.chain(
    optax.scale_by_adam(), spd(anchor, learning_rate=_RATE)
  ),
}


class Case(NamedTuple):
  """A step that every method takes.

  Attributes:
    name: of its rows.
    make_step: tx -> a function (opt_state, params, batch, frozen) ->
      (opt_state, params).
    params: tree of `jax.ShapeDtypeStruct`s, as are the next two.
    batch: examples on the leading axis; None for gradients like the params.
    frozen: what is not trained.
    anchor: as for `optax_spd.spd`.
  """

  name: str
  make_step: Any
  params: Any
  batch: Any = None
  frozen: Any = None
  anchor: Any = None


def optimizer_case(name, params):
  """The optimizer alone, on gradients that are given."""

  def make_step(tx):
    def step(opt_state, params, grads, frozen):
      del frozen
      updates, opt_state = tx.update(grads, opt_state, params)
      return opt_state, optax.apply_updates(params, updates)

    return step

  return Case(name, make_step, params)


def train_case(name, parts, trained, batch_size, anchor=None):
  """A whole train step.

  Args:
    name: of its rows.
    parts: the `studies.base.Parts` of a study, in shapes.
    trained: NNX filter of what is trained.
    batch_size: examples.
    anchor: as for `optax_spd.spd`.
  """
  graphdef, params, frozen = nnx.split(parts.model, trained, ...)

  def make_step(tx):
    def step(opt_state, params, batch, frozen):
      def loss_fn(params):
        model = nnx.merge(graphdef, params, frozen)
        return parts.task.loss(model, batch, jax.random.key(0))

      grads = jax.grad(loss_fn)(params)
      updates, opt_state = tx.update(grads, opt_state, params)
      return opt_state, optax.apply_updates(params, updates)

    return step

  batch = topology.batch(parts.example, batch_size)
  return Case(name, make_step, params, batch, frozen, anchor)


def classifier(model, image_size=None, dtype='float32'):
  """The `studies.base.Parts` of ten classes of images, in shapes.

  Args:
    model: key of `vit.CONFIGS`.
    image_size: side of the images, in pixels; None for six patches.
    dtype: that it computes in; its parameters are float32.
  """
  config = images.base()
  config.model.update(name=model, pretrained='none', dtype=dtype)
  config.update(
    head='zeros',
    num_classes=10,
    image_size=image_size or 6 * vit.CONFIGS[model].patch_size,
    methods={'adamw': base.method('AdamW', optimizer='adamw')},
  )
  return study.shapes(config)


def make_case(name, model, dtype, batch_size=None, image_size=None):
  """A case of `--case`.

  Args:
    name: 'optimizer', 'train' or 'lora'.
    model: key of `vit.CONFIGS`; None for the ViT-B/16 of the optimizer, and a
      ViT-S/14 in a train step.
    dtype: of the optimizer's params; what a train step computes in.
    batch_size: images of a train step; None for 32.
    image_size: their side, in pixels; None for six patches.
  """
  if name == 'optimizer':
    model = model or 'vit_b16'
    params = nnx.state(classifier(model).model, nnx.Param)
    params = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), params
    )
    return optimizer_case(f'optimizer, {model}, {dtype}', params)
  model = model or 'dinov2_s14'
  batch_size = batch_size or 32
  parts = classifier(model, image_size, dtype)
  side, _, _ = parts.example['image'].shape
  title = f'{model}, {dtype}, {batch_size} images of {side} px'
  if name == 'train':
    return train_case(f'train step, {title}', parts, nnx.Param, batch_size)
  adapted = lora.add(
    parts.model, 8, 16, modules=r'.*\.attn\.(query|value)', rngs=nnx.Rngs(0)
  )
  return train_case(
    f'LoRA train step, {title}',
    parts._replace(model=topology.abstract(adapted)),
    nnx.LoRAParam,
    batch_size,
    'origin',
  )


class Program(NamedTuple):
  """A compiled step of one method.

  Attributes:
    case: that it is of.
    compiled: opt_state, params, batch, frozen -> opt_state, params.
    tx: the method.
    shardings: of the four arguments.
    seconds: to trace and lower it, and to compile it.
    call: the same function where `compiled` takes other arguments.
  """

  case: Case
  compiled: Any
  tx: Any
  shardings: Any
  seconds: float
  call: Any = None


def compile_step(case, method, layout):
  """Compiles a method's step for the devices of a layout.

  Args:
    case: a `Case`.
    method: key of `METHODS`.
    layout: a `parallel.Layout`, of devices or of a topology's.

  Returns:
    A `Program`.
  """
  tx = METHODS[method](case.anchor)
  opt_state = jax.eval_shape(tx.init, case.params)
  batch = case.params if case.batch is None else case.batch
  on_params = layout.shardings(case.params)
  shardings = (
    layout.shardings(opt_state),
    on_params,
    on_params if case.batch is None else _all(batch, layout.split),
    layout.shardings(case.frozen),
  )
  step = jax.jit(
    case.make_step(tx),
    in_shardings=shardings,
    out_shardings=shardings[:2],
    # In the order of the outputs: jax pairs buffers of one shape in turn, and
    # a wrong pair costs a copy.
    donate_argnums=(0, 1),
  )
  start = time.perf_counter()
  lowered = step.lower(opt_state, case.params, batch, case.frozen)
  compiled = lowered.compile()
  seconds = time.perf_counter() - start
  return Program(case, compiled, tx, shardings, seconds)


def compile_study(config, name, layout):
  """Compiles the train step of a study's method, as `train` takes it.

  Args:
    config: that `topology.check` accepted.
    name: key of `config.methods`.
    layout: a `parallel.Layout`, of devices.

  Returns:
    A `Program`.
  """
  start = time.perf_counter()
  args = topology.arguments(config, name, layout)
  compiled = train.jit_step.lower(*args).compile()
  seconds = time.perf_counter() - start
  step, frozen, params, state, batch, *_, hyperparams = args
  rest = []  # of the state: the running average, and whether all is finite

  def call(opt_state, params, batch, constants):
    frozen, theta_0 = constants
    if not rest:
      average = layout.put(params) if config.ema else None
      rest[:] = average, layout.put(jnp.array(True))
    state = train.State(params, opt_state, *rest)
    state, _ = compiled(frozen, theta_0, state, batch, 0, 1, hyperparams)
    rest[:] = state.average, state.finite
    return state.opt_state, state.params

  case = Case(config.title, None, params, batch, (frozen, params))
  shardings = jax.tree.map(
    lambda x: x.sharding, (state.opt_state, params, batch, case.frozen)
  )
  tx = step.method.make(**hyperparams)
  return Program(case, compiled, tx, shardings, seconds, call)


def _all(tree, sharding):
  return jax.tree.map(lambda _: sharding, tree)


def measure(programs, num_steps, in_flight=1):
  """Times the steps, one of each program in turn.

  Args:
    programs: `{method: Program}`.
    num_steps: of each, after two that are not counted.
    in_flight: steps that are sent off before one is waited for, which count as
      one step of their mean time. An accelerator takes them one by one, while
      the host prepares the next.

  Returns:
    `{method: seconds [num_steps]}`.
  """
  rng = np.random.default_rng(0)

  def sample(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      return rng.normal(0, 0.02, leaf.shape).astype(leaf.dtype)
    return np.zeros(leaf.shape, leaf.dtype)

  carries, constants = {}, {}
  for method, program in programs.items():
    on_state, on_params, on_batch, on_frozen = program.shardings
    case = program.case
    batch = case.params if case.batch is None else case.batch
    params, batch, frozen = (
      jax.tree.map(sample, tree) for tree in (case.params, batch, case.frozen)
    )
    placed = jax.device_put(params, on_params)
    opt_state = jax.device_put(program.tx.init(placed), on_state)
    carries[method] = opt_state, placed
    constants[method] = (
      jax.device_put(batch, on_batch),
      jax.device_put(frozen, on_frozen),
    )
  seconds = {method: [] for method in programs}
  for i in range(num_steps + 2):
    for method, program in programs.items():
      start = time.perf_counter()
      step = program.call or program.compiled
      for _ in range(in_flight):
        carries[method] = step(*carries[method], *constants[method])
      jax.block_until_ready(carries[method])
      if i > 1:
        seconds[method].append((time.perf_counter() - start) / in_flight)
  return {method: np.array(times) for method, times in seconds.items()}


def count(program):
  """What does not depend on the machine's state.

  Returns:
    A dict: params (numbers), tensors; flops, bytes accessed (as the compiler
    counts them), bytes moved to and from HBM, scratch bytes, each of a device;
    collectives, `{operation: how many}`; bytes of the optimizer's state.
  """
  params = program.case.params
  sizes = [x.size for x in jax.tree.leaves(params)]
  state = jax.tree.leaves(jax.eval_shape(program.tx.init, params))
  return {
    'params': sum(sizes),
    'tensors': len(sizes),
    **topology.count_program(program.compiled),
    'state_bytes': sum(x.size * x.dtype.itemsize for x in state),
  }


def bench(case, layout, num_steps=0, in_flight=1):
  """The rows of a case: one of each method, with its ratios to AdamW's.

  Args:
    case: a `Case`.
    layout: a `parallel.Layout`.
    num_steps: to time; 0 counts only, as a topology needs.
    in_flight: as for `measure`.

  Returns:
    Dicts of case, method, layout, devices, seconds to compile, and
    the numbers of `count`; where steps were timed, ms (median), ratio to
    AdamW (median over rounds) and the ratio's quartiles.
  """
  return rows_of(
    {method: compile_step(case, method, layout) for method in METHODS},
    layout,
    num_steps,
    in_flight,
  )


def bench_study(config, names, layout, num_steps, in_flight=1):
  """The same of the train step of a study; ratios are to the first method."""
  return rows_of(
    {name: compile_study(config, name, layout) for name in names},
    layout,
    num_steps,
    in_flight,
  )


def rows_of(programs, layout, num_steps, in_flight):
  """The rows of `{method: Program}`; see `bench`."""
  first = next(iter(programs))
  rows = [
    {
      'case': program.case.name,
      'method': method,
      'layout': layout.name,
      'devices': layout.num_devices,
      'compile_s': program.seconds,
      **count(program),
    }
    for method, program in programs.items()
  ]
  if num_steps:
    seconds = measure(programs, num_steps, in_flight)
    for row in rows:
      times = seconds[row['method']]
      ratios = times / seconds[first]
      row |= {
        'steps': num_steps,
        'in_flight': in_flight,
        'ms': float(np.median(times)) * 1e3,
        'ratio': float(np.median(ratios)),
        'ratio_quartiles': np.percentile(ratios, [25, 75]).tolist(),
        'gflops': row['flops'] / float(np.median(times)) / 1e9,
      }
  return rows


def table(rows):
  """A Markdown table of the rows of `bench`; ratios are to the first row's."""
  lines = []
  first = rows[0]
  for row in rows:
    if row['method'] == rows[0]['method']:
      first = row

    def ratio(key, row=row, first=first):
      return f'{row[key] / first[key]:.2f}' if first[key] else '-'

    time_cells = ['-', '-']
    if 'ms' in row:
      low, high = row['ratio_quartiles']
      time_cells = [
        f'{row["ms"]:.0f}',
        f'{row["ratio"]:.2f} ({low:.2f} to {high:.2f})',
      ]
    on = row.get('topology', 'this machine')
    if 'ms' in row and row.get('GLIBC_TUNABLES'):
      on += ', GLIBC_TUNABLES'
    if row['devices'] > 1:
      on += f', {row["devices"]} devices, {row["layout"]}'
    lines.append(
      [
        row['case'],
        on,
        row['method'],
        *time_cells,
        ratio('bytes_accessed'),
        ratio('hbm_bytes'),
        f'{row["scratch_bytes"] / 1e6:.0f}',
        ' '.join(f'{v} {k}' for k, v in row['collectives'].items()) or '-',
        f'{row["compile_s"]:.1f}',
        f'{row["state_bytes"] / row["params"]:.2f}',
      ]
    )
  titles = [
    'step',
    'on',
    'method',
    'ms',
    'ratio',
    'bytes',
    'HBM',
    'scratch MB',
    'collectives',
    'compile s',
    'state B/param',
  ]
  return report.markdown([titles, *lines])


GROWTH = {
  'params': [(n, 20) for n in (1e6, 3e6, 10e6, 30e6, 100e6, 300e6)],
  'tensors': [(8e6, n) for n in (10, 30, 100, 300, 1000, 2000)],
}


def growing_case(num_params, num_tensors):
  """The optimizer on as many matrices of one shape; the count is rounded."""
  rows = max(1, round(math.sqrt(num_params / num_tensors)))
  columns = max(1, round(num_params / num_tensors / rows))
  leaf = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
  params = {f'w{i}': leaf for i in range(num_tensors)}
  return optimizer_case(f'{rows} x {columns}, {num_tensors} tensors', params)


def growth(num_steps, topologies):
  """Rows of ever larger models, and of ever more devices.

  Args:
    num_steps: to time, of each.
    topologies: `{name: devices}`, to count on beside the devices here.

  Yields:
    `(axis, x, rows)`: what grows, its size, and the rows of `bench`.
  """
  one = parallel.layout(devices=jax.devices()[:1])
  for axis, sizes in GROWTH.items():
    for params, tensors in sizes:
      case = growing_case(params, tensors)
      x = params if axis == 'params' else tensors
      yield axis, x, bench(case, one, num_steps=num_steps)
  case = growing_case(16 * 2**20, 16)
  for n in (1, 2, 4, 8):
    if n <= jax.device_count():
      layout = parallel.layout('fsdp', jax.devices()[:n])
      rows = bench(case, layout, num_steps)
      yield 'devices', n, rows
  for name, devices in topologies.items():
    rows = bench(case, parallel.layout('fsdp', devices))
    yield 'topology', len(devices), [{**row, 'topology': name} for row in rows]


def plot_growth(rows, path):
  """Lines over what grows: the time of a step, and of compiling it.

  Args:
    rows: of `growth`, each with its 'axis' and 'x'.
    path: of the picture.
  """
  panels = [
    ('params', 'parameters, 20 tensors', 'ms', 'ms a step'),
    ('tensors', 'tensors, 8 M parameters', 'ms', 'ms a step'),
    ('tensors', 'tensors, 8 M parameters', 'compile_s', 's to compile'),
    ('devices', 'devices on one CPU, FSDP', 'ms', 'ms a step'),
    ('topology', 'TPU chips, FSDP', 'hbm_bytes', 'HBM bytes a step and chip'),
  ]
  panels = [p for p in panels if any(row['axis'] == p[0] for row in rows)]
  figure = figures.empty_figure(2.8 * len(panels), 3)
  for axes, (axis, label, key, unit) in zip(
    figure.subplots(1, len(panels)), panels, strict=True
  ):
    for method in METHODS:
      own = [r for r in rows if (r['axis'], r['method']) == (axis, method)]
      x, y = [r['x'] for r in own], [r[key] for r in own]
      axes.plot(x, y, marker='o', markersize=3, label=method)
    axes.set(xscale='log', yscale='log', xlabel=label, ylabel=unit)
    if axis in ('devices', 'topology'):
      axes.set_xticks(x, [str(n) for n in x])
      axes.set_xticks([], minor=True)
    axes.spines[['top', 'right']].set_visible(False)
  figure.axes[0].legend(frameon=False)
  figure.savefig(path, dpi=120)


FLAGS = flags.FLAGS
flags.DEFINE_multi_enum(
  'case', ['optimizer'], ['optimizer', 'train', 'lora'], 'Steps to take.'
)
flags.DEFINE_enum(
  'model',
  None,
  list(vit.CONFIGS),
  'vit_b16 for the optimizer, dinov2_s14 for a train step.',
)
flags.DEFINE_enum(
  'dtype',
  'float32',
  ['float32', 'bfloat16'],
  "Of the optimizer's params; what a train step computes in.",
)
flags.DEFINE_integer(
  'image_size', None, 'Of a train step; six patches.', lower_bound=1
)
flags.DEFINE_list(
  'layout',
  [],
  'As parallel.layout names them; replicated, and fsdp in a study.',
)
flags.DEFINE_integer('steps', 20, 'To time.', lower_bound=1)
flags.DEFINE_integer(
  'in_flight', 1, 'Steps sent off before one is waited for.', lower_bound=1
)
flags.DEFINE_list(
  'topology', [], 'Of TPUs, such as v5e:4x4,v5e:8x8; only counts.'
)
flags.DEFINE_bool('growth', False, 'Ever larger models, instead of a case.')
flags.DEFINE_string('output_dir', 'runs/benchmark', 'For rows and tables.')
flags.DEFINE_integer(
  'batch_size',
  None,
  "Of a train step, 32; of a study's, its own, or 4096 on all chips.",
  lower_bound=1,
)
flags.DEFINE_list('methods', ['adamw', 'spd_1'], 'Of the study.')


def _check_flags():
  """Refuses a flag that has no effect beside the others."""
  unused = {}
  images = ('batch_size', 'image_size')
  if FLAGS.config:
    names = ('case', 'model', 'dtype', 'image_size', 'growth')
    unused |= dict.fromkeys(names, '--config')
    if FLAGS.topology:
      unused |= dict.fromkeys(('steps', 'in_flight'), '--topology')
  else:
    unused['methods'] = 'no --config'
    if FLAGS.growth:
      names = ('case', 'model', 'dtype', 'layout', 'in_flight', *images)
      unused |= dict.fromkeys(names, '--growth')
    else:
      if FLAGS.topology:
        unused |= dict.fromkeys(('steps', 'in_flight'), '--topology')
      if FLAGS.case == ['optimizer']:
        unused |= dict.fromkeys(images, '--case=optimizer')
  for name, beside in unused.items():
    if FLAGS[name].present:
      raise ValueError(
        f'--{name} has no effect with {beside}; see --help, and leave it out.'
      )


def _main(argv):
  if argv[1:]:
    sys.exit(f'benchmark: {argv[1]!r} is no flag; see --help.')
  # Before a backend starts. Compiling is timed, and what is compiled for a
  # topology cannot be read back.
  jax.config.update('jax_enable_compilation_cache', False)
  if FLAGS.growth:
    jax.config.update('jax_num_cpu_devices', 8)  # that share the cores
  if FLAGS.topology:
    jax.config.update('jax_platforms', 'cpu')  # not a TPU that is not there
  folder = pathlib.Path(FLAGS.output_dir).expanduser()
  slices = FLAGS.config and FLAGS.topology
  names = FLAGS.layout or ['replicated', *(['fsdp'] if slices else [])]
  batch_size = FLAGS.batch_size or (4096 if slices else 0)
  try:
    _check_flags()
    folder.mkdir(parents=True, exist_ok=True)
    topologies = {name: topology.devices(name) for name in FLAGS.topology}
    layouts = [
      (kind, parallel.layout(name, devices))
      for kind, devices in (topologies or {None: jax.devices()}).items()
      for name in names
    ]
    if FLAGS.config:
      topology.check(FLAGS.config, FLAGS.methods, batch_size)
  except (OSError, ValueError, ModuleNotFoundError) as error:
    sys.exit(f'benchmark: {error}')
  about, rows = report.provenance(), []
  # What changes the speed of XLA and of malloc, and is set before the start.
  for name in ('XLA_FLAGS', 'GLIBC_TUNABLES'):
    about[name] = os.environ.get(name, '')

  def add(new, show=table, **more):
    new = [{**more, **about, **row} for row in new]
    rows.extend(new)
    report.write_jsonl(folder / 'rows.jsonl', rows)
    print(show(new), '\n', flush=True)

  if slices:
    for kind, layout in layouts:
      new = topology.rows(FLAGS.config, FLAGS.methods, layout)
      add(new, topology.table, topology=kind)
    print(f'{topology.table(rows)}\n\n{folder}/: rows.jsonl')
    return
  if FLAGS.config:
    for _, layout in layouts:
      add(
        bench_study(
          FLAGS.config, FLAGS.methods, layout, FLAGS.steps, FLAGS.in_flight
        )
      )
  elif FLAGS.growth:
    for axis, x, new in growth(FLAGS.steps, topologies):
      add(new, axis=axis, x=x)
    plot_growth(rows, folder / 'growth.png')
  else:
    for name in FLAGS.case:
      case = make_case(
        name, FLAGS.model, FLAGS.dtype, FLAGS.batch_size, FLAGS.image_size
      )
      for kind, layout in layouts:
        steps = 0 if kind else FLAGS.steps
        new = bench(case, layout, steps, FLAGS.in_flight)
        add(new, **({'topology': kind} if kind else {}))
  print(
    'ratio: of the time, to adamw, median over rounds and quartiles. bytes: as '
    'the\ncompiler counts them, HBM: those to and from main memory, both to '
    'adamw. state:\nbytes of optimizer state a parameter, the anchor too.\n\n'
    f'{folder}/: rows.jsonl' + (', growth.png' if FLAGS.growth else '')
  )


if __name__ == '__main__':
  for_slices = any(a.lstrip('-').startswith('topology') for a in sys.argv)
  unread = (*topology.UNREAD, *(topology.TRIED if for_slices else ()))
  cli.define_config('benchmark', default=None, unread=unread)
  cli.run('benchmark', _main)
