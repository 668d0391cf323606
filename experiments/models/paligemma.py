"""PaliGemma: SigLIP So400m, a linear projector, and Gemma.

References:
  Beyer et al., "PaliGemma: A versatile 3B VLM for transfer", 2024
"""

import dataclasses

from flax import nnx

from experiments.models import llama, vision_language, vit


@dataclasses.dataclass(frozen=True)
class PaliGemmaConfig:
  """The two towers.

  Attributes:
    vision: SigLIP's.
    decoder: Gemma's, by the options of LLaMA's.
  """

  vision: vit.ViTConfig
  decoder: llama.LlamaConfig


CONFIGS = {
  # 224 pixels, 256 image tokens; big_vision's configs and config.json.
  'paligemma_3b': PaliGemmaConfig(
    vit.ViTConfig(
      patch_size=14,
      width=1152,
      depth=27,
      num_heads=16,
      mlp_dim=4304,
      grid=16,
      eps=1e-6,
      mean=(0.5, 0.5, 0.5),
      std=(0.5, 0.5, 0.5),
      activation='gelu_tanh',
      class_token=False,
    ),
    llama.LlamaConfig(
      vocab_size=257_216,
      width=2048,
      depth=18,
      num_heads=8,
      num_kv_heads=1,
      head_dim=256,
      mlp_dim=16_384,
      eps=1e-6,
      rope_theta=10_000.0,
      context_length=8192,
      tied=True,
      activation='gelu_tanh',
      unit_offset=True,
      scaled_embeddings=True,
    ),
  ),
}


def build(config, *, untied=False, rngs: nnx.Rngs):
  """A `vision_language.VisionLanguage`.

  Args:
    config: the `PaliGemmaConfig`.
    untied: whether the head is a copy of the embeddings, to be trained.
    rngs: of the start.
  """
  return vision_language.VisionLanguage(
    vit.ViT(config.vision, rngs=rngs),
    llama.Llama(config.decoder, rngs=rngs),
    is_prefix_lm=True,
    untied=untied,
    rngs=rngs,
  )
