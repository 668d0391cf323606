"""What a card's memory gives, and what optimizers make of it.

python -m experiments.card [--model=vit_b16] [--dtype=float32|bfloat16]
    [--steps=N] [--in_flight=10] [--output_dir=DIR]

Beside the optimizer's rows of `experiments.benchmark`, whose flags these are: a
copy, which nothing that reads and writes memory outdoes; PyTorch's fused AdamW
on tensors of the same shapes, where PyTorch is installed; and the time that the
kernels take, without what the host adds. `experiments.gpu_check` runs it.
"""

import glob
import pathlib
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments import benchmark, cli, parallel, report


def measure(case, num_steps, in_flight, copy_bytes):
  """Rows of a copy, of every method of the benchmark, and of PyTorch's AdamW.

  Args:
    case: a `benchmark.Case` of the optimizer.
    num_steps: to time, of each.
    in_flight: as for `benchmark.measure`.
    copy_bytes: that the copy reads, and as many that it writes.

  Returns:
    Dicts as of `benchmark.bench`, on a GPU with the ms of the kernels; of the
    copy and of PyTorch with case, method, ms and bytes_accessed. All have the
    GB/s of the copy.
  """
  layout = parallel.layout(devices=jax.devices()[:1])
  copies = time_copies(copy_bytes, num_steps, in_flight)
  rows = [
    {
      'case': f'{copy_bytes / 2**20:.0f} MiB',
      'method': 'copy',
      'ms': float(np.median(copies)) * 1e3,
      'bytes_accessed': 2 * copy_bytes,
    }
  ]
  found = benchmark.bench(case, layout, num_steps, in_flight)
  if jax.default_backend() == 'gpu':
    for row in found:
      row['kernel_ms'] = kernel_ms(case, row['method'], layout, num_steps)
  rows += found + torch_rows(case, num_steps, in_flight, found[0]['ms'])
  copy_gb_s = report.gb_s(rows[0])
  return [{**row, 'copy_gb_s': copy_gb_s} for row in rows]


def time_copies(size, num_steps, in_flight):
  """Seconds [num_steps] of a copy of so many bytes onto themselves."""
  x = jnp.zeros(size // 4, jnp.uint32)
  # In place, as an optimizer's step; one bit changes, or nothing would be done.
  copy = jax.jit(lambda x: x ^ 1, donate_argnums=0)
  seconds = []
  for i in range(num_steps + 2):
    start = time.perf_counter()
    for _ in range(in_flight):
      x = copy(x)
    jax.block_until_ready(x)
    if i > 1:
      seconds.append((time.perf_counter() - start) / in_flight)
  return np.array(seconds)


def kernel_ms(case, method, layout, num_steps):
  """Milliseconds a step that a GPU's kernels take, by JAX's profiler.

  An optimizer's step has some thousand buffers: where the host takes longer to
  hand them over than the card to work on them, the time of a step is the
  host's.

  Args:
    case: a `benchmark.Case`.
    method: key of `benchmark.METHODS`.
    layout: a `parallel.Layout` of one GPU.
    num_steps: to take.
  """
  programs = {method: benchmark.compile_step(case, method, layout)}
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      benchmark.measure(programs, num_steps)
    (path,) = glob.glob(f'{folder}/**/*.xplane.pb', recursive=True)
    data = jax.profiler.ProfileData.from_file(path)
  # It takes two more than it times.
  return kernel_ns(data) / (num_steps + 2) / 1e6


def kernel_ns(data):
  """Nanoseconds of all kernels in a `jax.profiler.ProfileData`.

  A GPU's plane has a line for each of its streams; other lines say the same by
  step or module. Copies from and to the host are on the streams, too.
  """
  return sum(
    event.duration_ns
    for plane in data.planes
    if plane.name.startswith('/device:GPU')
    for line in plane.lines
    if line.name.startswith('Stream')
    for event in line.events
    if not event.name.startswith('Memcpy')
  )


def torch_rows(case, num_steps, in_flight, adamw_ms):
  """A row of PyTorch's fused AdamW on tensors of the same shapes.

  Args:
    case: a `benchmark.Case` of the optimizer.
    num_steps: to time.
    in_flight: as for `benchmark.measure`.
    adamw_ms: of Optax's step, for the ratio.

  Returns:
    The row in a list; none where PyTorch is not there, or sees no GPU where JAX
    sees one.
  """
  try:
    import torch
  except ModuleNotFoundError:
    return []
  on_gpu = jax.default_backend() == 'gpu'
  if on_gpu and not torch.cuda.is_available():
    return []
  leaves = jax.tree.leaves(case.params)
  params = []
  for leaf in leaves:
    tensor = torch.randn(leaf.shape, device='cuda' if on_gpu else 'cpu') * 0.02
    tensor = tensor.to(getattr(torch, leaf.dtype.name))
    params.append(tensor.requires_grad_())
    params[-1].grad = torch.randn_like(tensor)
  optimizer = torch.optim.AdamW(params, lr=2e-5, fused=True)
  seconds = []
  for i in range(num_steps + 2):
    start = time.perf_counter()
    for _ in range(in_flight):
      optimizer.step()
    if on_gpu:
      torch.cuda.synchronize()
    if i > 1:
      seconds.append((time.perf_counter() - start) / in_flight)
  ms = float(np.median(seconds)) * 1e3
  size = sum(x.size * x.dtype.itemsize for x in leaves)
  return [
    {
      'case': case.name,
      'method': f'adamw of torch {torch.__version__}, fused',
      'ms': ms,
      'ratio': ms / adamw_ms,
      'bytes_accessed': 7 * size,  # p, g, m, v read, and p, m, v written
    }
  ]


def _main(argv):
  if argv[1:]:
    sys.exit(f'card: {argv[1]!r} is no flag; see --help.')
  values = benchmark.FLAGS
  read = ('model', 'dtype', 'steps', 'in_flight', 'output_dir')
  for flag in values.get_flags_for_module('experiments.benchmark'):
    if flag.present and flag.name not in read:
      sys.exit(f'card: --{flag.name} has no effect; it is for the benchmark.')
  folder = pathlib.Path(values.output_dir).expanduser()
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    sys.exit(f'card: {error}')
  case = benchmark.make_case('optimizer', values.model, values.dtype)
  size = 2**26 if jax.default_backend() == 'cpu' else 2**30
  with tempfile.TemporaryDirectory() as programs:  # they are compiled twice
    jax.config.update('jax_compilation_cache_dir', programs)
    found = measure(case, values.steps, values.in_flight, size)
  rows = [{**report.provenance(), **row} for row in found]
  report.write_jsonl(folder / 'rows.jsonl', rows)
  print(f'{report.speeds(rows)}\n\n{folder}/: rows.jsonl')


if __name__ == '__main__':
  cli.run('card', _main)
