"""A study of questions of a minute's worth of nothing."""

import dataclasses
import pathlib

from experiments.models import paligemma

_THREE_B = paligemma.CONFIGS['paligemma_3b']
# Of the checkpoint that `make_paligemma` writes.
PALIGEMMA = paligemma.PaliGemmaConfig(
  dataclasses.replace(
    _THREE_B.vision,
    patch_size=4,
    width=16,
    depth=2,
    num_heads=2,
    mlp_dim=24,
    grid=3,
  ),
  dataclasses.replace(
    _THREE_B.decoder,
    vocab_size=304,
    width=16,
    depth=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=24,
  ),
)
CHECKPOINT = pathlib.Path(__file__).parent / 'pretrained/reference/paligemma'
PREFIXES = ([2, 40, 41, 42, 5], [2, 50, 51, 40, 41, 43, 44, 5])
SUFFIXES = ([60, 61, 1], [62, 1])
