"""Greedy decoding and beam search."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models import generate, llama
from tests.experiments.models import test_llama

END = 16  # as in make_beams
LENGTHS = np.array([7, 1, 4, 6])
IDS = np.random.default_rng(2).integers(0, 40, (4, 7))


def one_by_one(model, ids, number, end):
  """Greedy decoding by a whole pass for every token."""
  ids, start = list(ids), len(ids)
  while len(ids) < start + number:
    ids.append(int(model(jnp.array([ids]))[0, -1].argmax()))
    if ids[-1] == end:
      break
  new = ids[start:]
  return new + [end] * (number - len(new))


@pytest.mark.parametrize('scan', [False, True])
def test_greedy(scan):
  model = test_llama.make(scan=scan)
  free = [
    one_by_one(model, ids[:n], 8, -1)
    for ids, n in zip(IDS, LENGTHS, strict=True)
  ]
  end = free[0][3]  # one that comes in some texts
  expected = [
    one_by_one(model, ids[:n], 8, end)
    for ids, n in zip(IDS, LENGTHS, strict=True)
  ]
  assert expected != free
  found = generate.greedy(model, IDS, LENGTHS, 8, end)
  assert found.tolist() == expected
  # Whatever follows the prompts, and however long it is.
  padded = np.concatenate([IDS, np.full((4, 3), 5)], 1)
  padded[np.arange(10) >= LENGTHS[:, None]] = 11
  assert generate.greedy(model, padded, LENGTHS, 8, end).tolist() == expected
  assert generate.greedy(model, IDS, LENGTHS, 1, end)[:, 0].tolist() == [
    ids[0] for ids in expected
  ]


def test_it_stops_where_all_texts_have_ended(monkeypatch):
  model = test_llama.make()
  args = IDS, LENGTHS, 9
  free = generate.greedy(model, *args, -1)
  end = int(free[0, 1])
  steps, next_one = [], generate._next

  def counted(*args):
    jax.debug.callback(lambda: steps.append(1))
    return next_one(*args)

  monkeypatch.setattr(generate, '_next', counted)
  generate.greedy(model, IDS[:1], LENGTHS[:1], 9, end)
  jax.effects_barrier()
  assert len(steps) <= 1
  del steps[:]
  generate.greedy(model, *args, -1)
  jax.effects_barrier()
  assert len(steps) == 8


def test_one_beam_is_greedy_where_nothing_ends():
  model = test_llama.make()
  greedy = generate.greedy(model, IDS, LENGTHS, 6, -1)
  beam = generate.beam(model, IDS, LENGTHS, 6, -1, 1)
  assert beam.tolist() == greedy.tolist()


def transformers_model(arrays):
  """The model of `make_beams`."""
  config = llama.LlamaConfig(
    vocab_size=50,
    width=16,
    depth=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=24,
    eps=1e-6,
    rope_theta=10_000.0,
    context_length=64,
    tied=False,
  )
  model = llama.Llama(config, rngs=nnx.Rngs(0))
  model.token_embed[...] = arrays['model.embed_tokens.weight']
  model.norm.scale[...] = arrays['model.norm.weight']
  model.unembed.kernel[...] = arrays['lm_head.weight'].T
  for i, block in enumerate(model.blocks):
    for ours, theirs in (
      (block.norm1.scale, 'input_layernorm'),
      (block.norm2.scale, 'post_attention_layernorm'),
      (block.attn.query.kernel, 'self_attn.q_proj'),
      (block.attn.key.kernel, 'self_attn.k_proj'),
      (block.attn.value.kernel, 'self_attn.v_proj'),
      (block.attn.out.kernel, 'self_attn.o_proj'),
      (block.mlp.gate.kernel, 'mlp.gate_proj'),
      (block.mlp.up.kernel, 'mlp.up_proj'),
      (block.mlp.down.kernel, 'mlp.down_proj'),
    ):
      ours[...] = arrays[f'model.layers.{i}.{theirs}.weight'].T
  return model


@pytest.mark.parametrize(
  ('number', 'num_beams'), [(1, 4), (5, 4), (12, 4), (12, 2)]
)
def test_beams_are_those_of_transformers(number, num_beams):
  with np.load(pathlib.Path(__file__).with_name('beams.npz')) as arrays:
    arrays = dict(arrays)
  model = transformers_model(arrays)
  ids, lengths = arrays['ids'], arrays['lengths']
  expected = arrays[f'beams_{number}_{num_beams}']
  if number == 12:
    assert 0 < (expected == END).mean() < 1
  found = generate.beam(model, ids, lengths, number, END, num_beams)
  assert found.tolist() == expected.tolist()
