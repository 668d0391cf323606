"""Noisy quadratics, on which SPD is known to act."""

import jax
import jax.numpy as jnp
import numpy as np


class Quadratic:
  """Layers of 64, each pulled by noisy gradients towards an optimum.

  Gradients are params - optimum + noise of standard deviation 1, the optimum
  lies .05 away from the start in every coordinate: at a learning rate of 1e-3
  SPD selects about half of the decisions and decays every other one of them.
  """

  def __init__(self, num_layers=8, size=64, distance=0.05, seed=0):
    self.rng = np.random.default_rng(seed)
    names = [f'layer_{i:02}' for i in range(num_layers)]
    # The size of pretrained weights; float32 resolves them well enough for
    # distances of 1e-3 from them.
    self.params = {n: 0.02 * self._normal(size) for n in names}
    self.optimum = {
      n: p + distance * self.rng.choice([-1.0, 1.0], size).astype(np.float32)
      for n, p in self.params.items()
    }

  def _normal(self, size):
    return self.rng.normal(size=size).astype(np.float32)

  def noise(self):
    return {n: self._normal(p.shape) for n, p in self.params.items()}

  def grads(self, params, noise):
    return jax.tree.map(lambda p, o, n: p - o + n, params, self.optimum, noise)


def as_arrays(tree):
  return jax.tree.map(jnp.asarray, tree)
