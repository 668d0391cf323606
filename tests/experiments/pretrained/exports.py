"""Tiny fine-tuned models: `make_reference` shows transformers their exports."""

import dataclasses

import numpy as np
from flax import nnx

from experiments.models import blocks, heads, lora
from experiments.pretrained import load

NAMES = ('clip', 'vit', 'deit', 'dinov2')  # of the checkpoints in reference/
CLASS_NAMES = ('cat', 'great_owl', 'ant')
IMAGE_SIZE = 20
RANK, ALPHA = 2, 6.0
MODULES = r'backbone\..*\.(query|out|fc1|fc2)'


def classifier(checkpoint, scan=False):
  """A checkpoint of `reference/`, and a random head."""
  config = load.vit_config('', checkpoint)
  config = dataclasses.replace(config, scan=scan)
  backbone = load.load_vit(config, checkpoint)
  unit_features = config.projection is not None
  model = heads.Classifier(backbone, 3, unit_features=unit_features)
  rng = np.random.default_rng(0)
  for param in (model.head.kernel, model.head.bias):
    param[...] = rng.normal(size=param.shape)
  return model


def adapted(checkpoint, scan=False):
  """The same with random adapters."""
  model = lora.add(
    classifier(checkpoint), RANK, ALPHA, modules=MODULES, rngs=nnx.Rngs(0)
  )
  params = nnx.state(model, nnx.LoRAParam)
  rng = np.random.default_rng(1)
  random = {
    path: rng.normal(size=param.shape, scale=0.3).astype(np.float32)
    for path, param in nnx.to_flat_state(params)
  }
  tree = nnx.traversals.unflatten_mapping(random)
  if scan:
    model = lora.add(
      classifier(checkpoint, scan=True),
      RANK,
      ALPHA,
      modules=MODULES,
      rngs=nnx.Rngs(0),
    )
    params, tree = nnx.state(model, nnx.LoRAParam), blocks.stack(tree)
  nnx.replace_by_pure_dict(params, tree)
  nnx.update(model, params)
  return model


def with_adapters(model, modules, std):
  """A decoder with LoRA that is far from its start."""
  model = lora.add(model, RANK, ALPHA, modules=modules, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  state = nnx.state(model, nnx.LoRAParam)
  for _, leaf in nnx.to_flat_state(state):
    leaf[...] = rng.normal(0, std, leaf.shape).astype(np.float32)
  nnx.update(model, state)
  return model


def logits(model, images):
  """Of normalised images [B, H, W, 3]."""
  return nnx.jit(lambda model, x: model(model.backbone.embed(x)))(model, images)
