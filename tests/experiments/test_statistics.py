"""The statistics of pairs, against formulas and simulations."""

import numpy as np
import pytest
from scipy import stats

from experiments import statistics


@pytest.mark.parametrize('n', [3, 5, 10])
def test_the_interval_holds_the_mean_as_often_as_it_says(n, monkeypatch):
  monkeypatch.setattr(statistics, '_RESAMPLES', 1000)
  rng, trials = np.random.default_rng(n), 1000
  held = 0
  for _ in range(trials):
    found = statistics.paired(rng.normal(0.3, 2.0, n))
    held += found.low <= 0.3 <= found.high
  error = np.sqrt(0.95 * 0.05 / trials)
  # Few seeds have few resamples: a percent less than Student's own.
  assert 0.95 - 0.015 - 2 * error < held / trials < 0.95 + 3 * error


def test_the_interval_is_of_new_examples_too(monkeypatch):
  """Noise that all seeds share, since they are scored on the same examples."""
  monkeypatch.setattr(statistics, '_RESAMPLES', 1000)
  rng, trials, n, examples = np.random.default_rng(0), 400, 5, 100
  held, without = 0, 0
  for _ in range(trials):
    scores = 0.1 + rng.normal(0, 0.02, (1, n)) + rng.normal(0, 1, (examples, 1))
    scores = scores + rng.normal(0, 0.1, (examples, n))
    drawn = rng.integers(examples, size=(200, examples))
    draws = scores[drawn].mean(1)
    found = statistics.paired(scores.mean(0), draws)
    held += found.low <= 0.1 <= found.high
    found = statistics.paired(scores.mean(0))
    without += found.low <= 0.1 <= found.high
  assert held / trials > 0.93
  assert without / trials < 0.6


def test_the_interval_by_hand():
  """Of two seeds the resampled means are the two, and their mean twice."""
  found = statistics.paired([1.0, 3.0])
  t = np.tan(np.pi * 0.475)  # one degree of freedom is Cauchy's
  k = np.sqrt(2) * t / 1.959964
  assert found.low == pytest.approx(2 - k, rel=1e-6)
  assert found.high == pytest.approx(2 + k, rel=1e-6)
  assert found.detectable == pytest.approx(t, rel=1e-6)  # SD / sqrt(2) is 1
  assert (found.n, found.mean) == (2, 2.0)


def test_p_is_that_of_the_paired_t_test():
  rng = np.random.default_rng(0)
  a, b = rng.normal(0.5, 1, (2, 7))
  found = statistics.paired(a - b)
  assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)


@pytest.mark.parametrize(('n', 'factor'), [(3, 2.48), (5, 1.24), (10, 0.72)])
def test_what_so_many_seeds_can_tell(n, factor):
  differences = np.random.default_rng(0).normal(size=n)
  spread = np.sqrt(np.sum((differences - differences.mean()) ** 2) / (n - 1))
  found = statistics.paired(differences)
  assert found.detectable / spread == pytest.approx(factor, abs=0.006)


def test_holm_by_hand():
  # Sorted .01 .02 .03 .04, times 4 3 2 1: .04 .06 .06 .04, never decreasing.
  found = statistics.holm([0.03, 0.01, np.nan, 0.04, 0.02])
  np.testing.assert_allclose(found, [0.06, 0.04, np.nan, 0.06, 0.06])
  np.testing.assert_allclose(statistics.holm([0.5, 0.9]), [1.0, 1.0])
  assert statistics.holm([]).shape == (0,)


def test_what_cannot_be_told():
  one = statistics.paired([0.25])
  assert one[:2] == (1, 0.25)
  assert np.isnan(one[2:]).all()
  same = statistics.paired([0.0, 0.0, 0.0])
  assert same == (3, 0.0, 0.0, 0.0, 1.0, 0.0)
  constant = statistics.paired([0.1, 0.1])
  assert np.isnan(constant.p)
  assert constant.low == constant.high == pytest.approx(0.1)
