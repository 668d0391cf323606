"""Two methods over the same seeds: how far apart, and how sure that is."""

from typing import NamedTuple

import numpy as np

LEVEL = 0.95  # of the intervals
_RESAMPLES = 10_000


class Difference(NamedTuple):
  """Of two methods, over n seeds that both have.

  Attributes:
    n: seeds.
    mean: of the differences.
    low: where the interval of the mean begins; NaN of one seed.
    high: where it ends.
    p: two-sided, of the t-test that the mean is 0; NaN of one seed, or where
      all differences are the same but not 0.
    detectable: the smallest effect that so many seeds with this spread can
      tell from 0, half of the interval of t: t_{n-1} SD / sqrt(n).
  """

  n: int
  mean: float
  low: float
  high: float
  p: float
  detectable: float


def paired(differences, draws=None):
  """The mean difference of two methods, paired by seed.

  The interval is that of the percentile bootstrap. With d the differences, a
  draw of the seeds s, and a draw of the examples on which the differences are
  e, it has the percentiles of

    mean(d) + k (mean(d_s) - mean(d)) + mean(e_s - d_s),
    k = sqrt(n / (n - 1)) t_{n-1} / z,

  t and z being the percentiles of Student's and of the normal distribution.
  All seeds are scored on the same examples, whose noise more seeds do not take
  away. Without k the interval is too narrow, and holds the mean of three normal
  differences three times out of four; with k it is about Student's.

  Args:
    differences: [n], one a seed.
    draws: [R, n], the same on R draws of the examples, each with the same
      examples for all seeds; None for none.

  Returns:
    A `Difference`. `p` and `detectable` are of the seeds alone.

  References:
    Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, on k.
    Owen, "The pigeonhole bootstrap", 2007, on two things drawn at a time.
  """
  from scipy import stats  # half a second that most runs can save

  differences = np.asarray(differences, float)
  n, mean = len(differences), float(np.mean(differences))
  if n < 2:
    return Difference(n, mean, np.nan, np.nan, np.nan, np.nan)
  t = stats.t.ppf((1 + LEVEL) / 2, n - 1)
  detectable = t * np.std(differences, ddof=1) / np.sqrt(n)
  if np.ptp(differences) < 1e-12:  # no spread, of which the test makes nothing
    p = np.nan if mean else 1.0
  else:
    p = stats.ttest_1samp(differences, 0).pvalue
  rng = np.random.default_rng(0)
  seeds = rng.integers(n, size=(_RESAMPLES, n))
  drawn = differences[seeds].mean(1)
  k = np.sqrt(n / (n - 1)) * t / stats.norm.ppf((1 + LEVEL) / 2)
  means = mean + k * (drawn - mean)
  if draws is not None:
    draw = rng.integers(len(draws), size=(_RESAMPLES, 1))
    means += np.asarray(draws)[draw, seeds].mean(1) - drawn
  low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return Difference(n, mean, *map(float, (low, high, p, detectable)))


def holm(p_values):
  """Holm's (1979) adjustment for several comparisons.

  With p_(1) <= ... <= p_(m), the i-th becomes

    max over j <= i of min(1, (m - j + 1) p_(j)).

  Args:
    p_values: of the comparisons; NaN stands for none, and is not counted.

  Returns:
    An array of as many, in their order.
  """
  p_values = np.asarray(p_values, float)
  order = np.argsort(p_values)  # NaN last
  number = np.count_nonzero(~np.isnan(p_values))
  factors = np.maximum(number - np.arange(len(p_values)), 1)
  adjusted = np.empty(len(p_values))
  adjusted[order] = np.maximum.accumulate(
    np.minimum(1, factors * p_values[order])
  )
  return adjusted
