"""Does a study's train step fit a slice of TPUs? By the compiler, without one.

`experiments.benchmark --config=STUDY --topology=...` prints its table. The step
is `train`'s own, of the study's model, recipe and methods; weights and images
are shapes only.
"""

import itertools
import time

import jax
from flax import nnx

from experiments import optimizers, report, study, train
from experiments.configs import images

# GiB of main memory that a chip has (cloud.google.com/tpu/docs).
HBM = {'v4': 32, 'v5e': 16, 'v5p': 95, 'v6e': 32}

_OPTIONS = {
  # XLA's own, which hides what does not fit, and takes minutes.
  'xla_disable_hlo_passes': 'rematerialization',
  # O0, XLA's least effort: a minute instead of four; on v5e:4x4 the same
  # operations and collectives, and memory within a hundredth.
  'optimization_level': 9,
}

# The keys of a study that the step is made of. Rematerialisation and parts are
# tried, batch size and layout are flags, and no image is read.
_READ = (
  'image_size',
  'first_block',
  'head',
  'mixup',
  'cutmix',
  'mix_probability',
  'mix_switch',
  'label_smoothing',
  'ema',
  'num_steps',
  'learning_rate',
  'warmup',
  'warmup_learning_rate',
  'min_learning_rate',
  'clip_norm',
  'methods',
)
UNREAD = (
  *(key for key in images.base() if key not in (*_READ, 'model')),
  'model.remat',
)

# What is tried until the step fits: (rematerialisation, parts of the batch).
_WAYS = [(False, 1), (True, 1), (True, 2), (True, 4), (True, 8), (True, 16)]


def lower(config, name, layout, num_classes):
  """Lowers a method's train step, for the devices of a layout.

  Args:
    config: a study that trains all blocks; `num_steps` is set.
    name: key of `config.methods`.
    layout: a `parallel.Layout`.
    num_classes: of the head.

  Returns:
    As `jax.jit(...).lower` does.
  """

  config.num_classes = num_classes
  parts = study.shapes(config)
  graphdef, params, frozen = nnx.split(parts.model, parts.trained, ...)
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

  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (config.batch_size, *x.shape), x.dtype, sharding=layout.split
    ),
    parts.example,
  )
  program = train.Program(
    graphdef,
    parts.task,
    method,
    layout,
    config.ema,
    config.accumulate,
  )
  return train.jit_step.lower(
    program,
    place(frozen),
    place(params),
    place(state),
    batch,
    0,
    1,
    hyperparams,
  )


def check(config, names, batch_size):
  """Makes a config what `rows` takes; a ValueError says what it cannot be."""
  unknown = [
    name for name in names if not config.methods.get(name, {}).get('optimizer')
  ]
  if unknown or config.first_block:
    raise ValueError(
      f'--config: {", ".join(unknown)} is none of its methods that train; they '
      f'are {", ".join(k for k, m in config.methods.items() if m.optimizer)}.'
      if unknown
      else '--config: its lower blocks are not in the step; use a study with '
      'first_block 0.'
    )
  config.batch_size = batch_size
  config.num_steps = config.num_steps or 10_000  # of the schedule alone


def rows(config, names, layout, num_classes, count):
  """What the compiler says of the step, in the first way that fits.

  Args:
    config: that `check` accepted; `model.remat` and `accumulate` are set here.
    names: keys of `config.methods`. Each begins with the way in which the one
      before it fitted, so that they are compared in the same one.
    layout: a `parallel.Layout` of a topology's devices.
    num_classes: of the head.
    count: a compiled program -> dict, as `benchmark.count_program`.

  Yields:
    Dicts of devices, layout, method and batch size; where a way fits, also of
    remat, accumulate, bytes of memory on a chip, seconds to compile, and what
    `count` returns.
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
        lowered = lower(config, name, layout, num_classes)
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
        **count(program),
      }
      ways = ways[i:]
      break
    yield row


def table(found):
  """A Markdown table of `rows`: the methods of a slice and layout on one line.

  FLOPs and bytes are of a chip and a step, as the compiler counts them: what is
  in a loop, such as over the parts of a batch, once.
  """
  titles = ['slice', 'chips', 'layout', 'methods', 'with', 'HBM GiB a chip']
  lines = [[*titles, 'TFLOP', 'GB accessed', 'collectives', 'compile s']]
  keys = ('topology', 'devices', 'layout')
  for key, group in itertools.groupby(found, lambda r: [r[k] for k in keys]):
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
