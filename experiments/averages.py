"""Averages of the pretrained params and the fine-tuned ones."""

import jax

from experiments.models import lora as adapters


def wise_ft(pretrained, params, alpha):
  """WiSE-FT (Wortsman et al., 2022): (1 - alpha) theta_0 + alpha theta."""
  return jax.tree.map(lambda a, b: a + alpha * (b - a), pretrained, params)


def lora(pretrained, params, alpha):
  """WiSE-FT of LoRA: W + alpha B A, and `wise_ft` of what else is trained."""
  return adapters.interpolate(pretrained, params, alpha)
