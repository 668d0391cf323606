"""SPD in float64 NumPy, from the paper's formulas; shares no code with ours.

One layer is one 1-D or N-D array. Norms are taken and subtracted as written,
which float64 can afford.
"""

import numpy as np


class Adam:
  """The finished step u_t of Adam (Kingma & Ba, 2015) for one array.

  `rates` holds the learning rate of each step.
  """

  def __init__(self, rates, b1=0.9, b2=0.999, eps=1e-8):
    self.rates = rates
    self.b1, self.b2, self.eps = b1, b2, eps
    self.t, self.m, self.v = 0, 0.0, 0.0

  def step(self, g):
    rate = float(self.rates[self.t])
    self.t += 1
    self.m = self.b1 * self.m + (1 - self.b1) * g
    self.v = self.b2 * self.v + (1 - self.b2) * g**2
    m_hat = self.m / (1 - self.b1**self.t)
    v_hat = self.v / (1 - self.b2**self.t)
    return -rate * m_hat / (np.sqrt(v_hat) + self.eps)


def spd_step(theta, theta_0, g, u, weight_decay):
  """One step of one layer.

  Returns:
    theta_t, and a dict of c_t, r_t, s_t and the radii gamma_{t-1}, gamma_t.
  """
  theta_tilde = theta + u
  c = -np.sum(g * (theta - theta_0))
  gamma_before = np.sqrt(np.sum((theta - theta_0) ** 2))
  gamma = np.sqrt(np.sum((theta_tilde - theta_0) ** 2))
  r = max(0.0, gamma - gamma_before) / gamma if gamma > 0 else 0.0
  s = weight_decay * r if c < 0 else 0.0
  theta_new = theta_tilde - s * (theta_tilde - theta_0)
  return theta_new, {
    'c': c,
    'r': r,
    's': s,
    'before': gamma_before,
    'after': gamma,
  }
