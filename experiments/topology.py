"""The TPU compiler, without a TPU: what it says of a program, and of a study.

Does a study's train step fit a slice of TPUs? `experiments.benchmark
--config=STUDY --topology=...` prints the table. The step is `train`'s own, of
the study's model, recipe and methods; weights and examples are shapes only.
"""

import collections
import importlib.util
import itertools
import math
import os
import re
import time

import jax
from flax import nnx

from experiments import cache, optimizers, report, runs, study, train

# GiB of main memory that a chip has (cloud.google.com/tpu/docs).
HBM = {'v4': 32, 'v5e': 16, 'v5p': 95, 'v6e': 32}

_OPTIONS = {
  # XLA's own, which hides what does not fit, and takes minutes.
  'xla_disable_hlo_passes': 'rematerialization',
  # O0, XLA's least effort: a minute instead of four; on v5e:4x4 the same
  # operations and collectives, and memory within a hundredth.
  'optimization_level': 9,
}

# The keys of all studies that the step is made of; a kind's own are its STEP.
# Rematerialisation and parts are tried, batch size and layout are flags, and no
# data is read.
_READ = (
  'task',
  'first_block',
  'ema',
  'num_steps',
  'learning_rate',
  'decay',
  'warmup',
  'warmup_learning_rate',
  'min_learning_rate',
  'clip_norm',
  'methods',
)
TRIED = ('accumulate', 'model.remat')


def _unread():
  """The keys that no kind of study makes its step of."""
  kinds = study.KINDS.values()
  read = {
    *_READ,
    *TRIED,
    'model',
    *(key for kind in kinds for key in kind.STEP),
  }
  return tuple({key for kind in kinds for key in kind.defaults()} - read)


UNREAD = _unread()

# What is tried until the step fits: (rematerialisation, parts of the batch).
_WAYS = [(False, 1), (True, 1), (True, 2), (True, 4), (True, 8), (True, 16)]


def abstract(tree):
  """The shapes and dtypes of a tree of arrays, or of such shapes."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def batch(example, batch_size):
  """A batch of `studies.base.Parts.example`, in shapes."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape), x.dtype), example
  )


def arguments(config, name, layout):
  """What `train.jit_step` takes of a study, in shapes.

  Args:
    config: a study; `num_steps` is set.
    name: key of `config.methods`.
    layout: a `parallel.Layout`, of devices or of a topology's.

  Returns:
    A tuple: the `train.Program`, the frozen state, theta_0, the `train.State`,
    the batch, seed, step, and the hyperparameters.
  """
  parts = study.shapes(config)
  rows = batch(parts.example, config.batch_size)
  if config.first_block:
    rows = cache.shapes(parts.task, parts.model, rows)
  model, trained = runs.adapt_model(
    parts.model, parts.trained, config.methods[name], 0
  )
  graphdef, params, frozen = nnx.split(model, trained, ...)
  method, hyperparams = optimizers.from_config(config, config.methods[name])
  opt_state = jax.eval_shape(
    lambda params: method.make(**hyperparams).init(params), params
  )
  average = params if config.ema else None
  finite = jax.ShapeDtypeStruct((), bool)
  state = train.State(params, opt_state, average, finite)

  def place(tree):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=layout.sharding(x.shape)
      ),
      tree,
    )

  rows = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.split),
    rows,
  )
  program = train.Program(
    graphdef,
    parts.task,
    method,
    layout,
    config.ema,
    config.accumulate,
    runs.scale(config.methods[name]),
  )
  frozen, params, state = map(place, (frozen, params, state))
  return program, frozen, params, state, rows, 0, 1, hyperparams


def check(config, names, batch_size):
  """Makes a config what `rows` takes; a ValueError says what it cannot be."""
  unknown = [
    name for name in names if not config.methods.get(name, {}).get('optimizer')
  ]
  if unknown:
    raise ValueError(
      f'--config: {", ".join(unknown)} is none of its methods that train; they '
      f'are {", ".join(k for k, m in config.methods.items() if m.optimizer)}.'
    )
  config.batch_size = batch_size or config.batch_size
  config.num_steps = config.num_steps or 10_000  # of the schedule alone
  study.shapes(config)  # refuses what it has no shapes of


def rows(config, names, layout):
  """What the compiler says of the step, in the first way that fits.

  Args:
    config: that `check` accepted; `model.remat` and `accumulate` are set here.
    names: keys of `config.methods`. Each begins with the way in which the one
      before it fitted, so that they are compared in the same one.
    layout: a `parallel.Layout` of a topology's devices.

  Yields:
    Dicts of devices, layout, method and batch size; where a way fits, also of
    remat, accumulate, bytes of memory on a chip, seconds to compile, and what
    `count_program` returns.
  """
  number = layout.num_devices
  ways = [way for way in _WAYS if config.batch_size % (number * way[1]) == 0]
  for name in names:
    row = {
      'devices': number,
      'layout': layout.name,
      'method': config.methods[name].label,
      'batch_size': config.batch_size,
    }
    for i, (remat, accumulate) in enumerate(ways):
      config.model.remat, config.accumulate = remat, accumulate
      since = time.perf_counter()
      try:
        lowered = train.jit_step.lower(*arguments(config, name, layout))
        program = lowered.compile(_OPTIONS)
      except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
          raise
        continue
      memory = program.memory_analysis()
      row |= {
        'remat': remat,
        'accumulate': accumulate,
        'chip_bytes': memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        'compile_s': time.perf_counter() - since,
        **count_program(program),
      }
      ways = ways[i:]
      break
    yield row


def table(rows):
  """A Markdown table of `rows`: the methods of a slice and layout on one line.

  FLOPs and bytes are of a chip and a step, as the compiler counts them: what is
  in a loop, such as over the parts of a batch, once.
  """
  titles = ['slice', 'chips', 'layout', 'methods', 'with', 'HBM GiB a chip']
  lines = [[*titles, 'TFLOP', 'GB accessed', 'collectives', 'compile s']]
  keys = ('topology', 'devices', 'layout')
  for key, group in itertools.groupby(rows, lambda r: [r[k] for k in keys]):
    group = list(group)
    cells = list(map(_all, zip(*map(_cells, group), strict=True)))
    cells[2] += f' of {HBM.get(key[0].split(":")[0], "?")}'
    counts = [row.get('collectives') for row in group]
    sent = [
      _all('-' if c is None else str(c.get(name, 0)) for c in counts)
      + f' {name}'
      for name in dict.fromkeys(name for c in counts if c for name in c)
    ]
    *cells, seconds = cells
    lines.append([*map(str, key), *cells, ', '.join(sent) or '-', seconds])
  return report.markdown(lines)


def _all(cells):
  """Of the methods, once where they agree."""
  cells = list(cells)
  return cells[0] if len(set(cells)) == 1 else ' / '.join(cells)


def _cells(row):
  """Of one row: method, way, memory, FLOPs, bytes, seconds."""
  if 'chip_bytes' not in row:
    return [row['method'], 'does not fit', *'----']
  ways = ['rematerialisation'] * row['remat']
  if row['accumulate'] > 1:
    ways.append(f'{row["accumulate"]} parts')
  return [
    row['method'],
    ', '.join(ways) or '-',
    f'{row["chip_bytes"] / 2**30:.1f}',
    f'{row["flops"] / 1e12:.2f}',
    f'{row["bytes_accessed"] / 1e9:.0f}',
    f'{row["compile_s"]:.0f}',
  ]


def devices(name):
  """A TPU's devices, for the compiler alone.

  Args:
    name: such as 'v5e:4x4', 'v5p:4x4x4' or 'v6e:16x16'.

  Raises:
    ModuleNotFoundError: libtpu is not installed.
    ValueError: libtpu knows no such topology.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ModuleNotFoundError(
      "--topology needs libtpu; install it with pip install '.[tpu]'."
    )
  # There is no TPU to ask for its neighbours.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  # Nor one that only one process may have.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  from jax.experimental import topologies

  try:
    description = topologies.get_topology_desc(
      topology_name=name, platform='tpu'
    )
  except Exception as error:  # of the plugin's own types
    reason = ' '.join(str(error).split())[:150]
    raise ValueError(
      f'--topology={name} is none that libtpu knows: {reason}'
    ) from None
  return description.devices


def count_program(compiled):
  """What the compiler counts of a program; see `benchmark.count`."""
  costs, text = compiled.cost_analysis(), compiled.as_text()
  return {
    'flops': costs['flops'],
    'bytes_accessed': costs['bytes accessed'],
    'hbm_bytes': hbm_bytes(text),
    'scratch_bytes': compiled.memory_analysis().temp_size_in_bytes,
    'collectives': collectives(text),
  }


_WIDTHS = {'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'f16': 2, 'f64': 8}
_ARRAY = re.compile(r'\b(\w+)\[([\d,]*)\](?:\{([^}]*)\})?')
_INSTRUCTION = re.compile(
  r'^ +(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)'
)
_FREE = ('parameter', 'tuple', 'get-tuple-element', 'bitcast', 'constant')


def hbm_bytes(text):
  """Bytes that a compiled program reads from and writes to main memory.

  The compiler's own count takes every operand of every operation; on a TPU
  many of them lie in the chip's vector memory, S(1) in a layout.

  Args:
    text: `compiled.as_text()`.
  """
  entry = text[text.index('\nENTRY') :]
  arrays_of, total = {}, 0
  for line in entry.splitlines():
    match = _INSTRUCTION.match(line)
    if not match:
      continue
    name, shape, operation, rest = match.groups()
    arrays = [
      (
        math.prod(map(int, filter(None, dims.split(','))))
        * _WIDTHS.get(dtype, 1),
        'S(' in layout,
      )
      for dtype, dims, layout in _ARRAY.findall(shape)
    ]
    arrays_of[name] = arrays
    if operation in _FREE or operation.endswith('-done'):
      continue
    if operation == 'custom-call' and 'ConcatBitcast' in rest:
      continue
    names = re.findall(r'%([\w.\-]+)', rest.split('), ')[0])
    if operation == 'copy-start':  # (to, from, context)
      moved = arrays[:2]
    elif operation == 'slice-start':  # ((from), to, context)
      size, on_chip = arrays[1]
      moved = [(size, arrays[0][1]), (size, on_chip)]
    else:
      moved = arrays + [a for n in names for a in arrays_of.get(n, [])]
    total += sum(size for size, on_chip in moved if not on_chip)
  return total


_COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'collective-permute',
  'all-to-all',
)


def collectives(text):
  """`{operation: how many}` of a compiled program."""
  names = re.findall(rf' ({"|".join(_COLLECTIVES)})(?:-start)?\(', text)
  return dict(collections.Counter(names))
