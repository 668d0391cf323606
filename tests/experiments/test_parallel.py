"""How arrays lie on the devices; test_kinds.py runs studies so."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments import parallel


def test_where_arrays_lie():
  devices = jax.devices()
  layout = parallel.layout('fsdp:4', devices)
  assert dict(layout.mesh.shape) == {'data': 2, 'fsdp': 4}
  assert layout.sharding((768, 3072)).spec == P(None, 'fsdp')
  assert layout.sharding((3072, 768)).spec == P('fsdp')
  assert layout.sharding((770, 3074)).spec == P()  # not by four
  assert layout.sharding((3072,)).spec == P()  # small
  assert parallel.layout('fsdp', devices).sharding((8, 4096)).spec == P(
    None, 'fsdp'
  )
  whole = parallel.layout('replicated', devices)
  assert whole.sharding((768, 3072)).spec == P()
  assert parallel.layout('fsdp:1', devices) == whole
  batch = layout.put_batch({'x': np.arange(16)})['x']
  assert {shard.data.shape for shard in batch.addressable_shards} == {(2,)}
  np.testing.assert_array_equal(layout.gather(batch), np.arange(16))


def test_devices_are_in_the_order_of_the_rows_of_a_batch():
  layout = parallel.layout('fsdp:2', jax.devices()[::-1])
  assert [d.id for d in layout.mesh.devices.flat] == list(range(8))


def test_put_copies():
  layout = parallel.layout('replicated', jax.devices()[:1])
  x = layout.put(np.ones(3))
  y = layout.put(x)
  jax.jit(lambda x: x + 1, donate_argnums=0)(y).block_until_ready()
  np.testing.assert_array_equal(x, np.ones(3))


@pytest.mark.parametrize(
  'name', ['fsdp:3', 'fsdp:0', 'fsdp:', 'pmap:2', 'x', '', 'fsdp:16']
)
def test_layouts_that_there_are_not(name):
  with pytest.raises(ValueError, match=r'divides the 8 devices'):
    parallel.layout(name, jax.devices())


@pytest.mark.parametrize('processes', ['host', 'host:1,2', 'host:1,2,x'])
def test_processes_that_there_are_not(processes):
  with pytest.raises(ValueError, match=r"it is 'auto' or HOST:PORT,PROC"):
    parallel.start(processes)


@pytest.mark.parametrize(
  ('ending', 'says'),
  [
    ('os.abort()', True),
    ('os.kill(os.getpid(), signal.SIGKILL)', True),
    ('os._exit(0)', True),
    ('parallel.good_bye(); os._exit(0)', False),
    ('sys.exit(1)', False),
  ],
)
def test_who_ends_without_a_word_has_it_said(ending, says):
  code = f"""
import os, signal, sys
from experiments import parallel
parallel.say_if_lost('It is lost.')
{ending}
"""
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, timeout=60
  )
  assert done.stderr == ('It is lost.\n' if says else '')
