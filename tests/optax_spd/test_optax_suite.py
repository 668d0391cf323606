"""Optax's own suite for contributed optimizers, on ours.

It asks for Optax's contract, not for the method: that SPD acts is asked
elsewhere.
"""

import inspect
import re
import unittest

import optax
import pytest
from optax.contrib import _common_test as suite

import optax_spd

OPTIMIZERS = {
  'adam_spd': {
    'opt_name': 'adam_spd',
    'opt_kwargs': {'learning_rate': 1e-2, 'weight_decay': 1.0},
    'wrapper_name': None,
    'wrapper_kwargs': None,
  },
  # Not at 1e-2: there SGD by itself leaves the suite's Rosenbrock for NaN.
  'with_spd-sgd': {
    'opt_name': 'sgd',
    'opt_kwargs': {'learning_rate': 1e-3, 'momentum': 0.9},
    'wrapper_name': 'with_spd',
    'wrapper_kwargs': {'weight_decay': 1.0},
  },
}


def _cases():
  """(test function, its own params), once each, whatever the optimizer."""
  cases = {}
  for name, method in vars(suite.ContribTest).items():
    if not name.startswith('test_'):
      continue
    params = inspect.getclosurevars(method).nonlocals['testcase_params']
    own = {k: v for k, v in params.items() if k not in OPTIMIZERS['adam_spd']}
    function = method.__wrapped__
    cases[function.__name__, str(sorted(own.items()))] = function, own
  return list(cases.values())


def _name(case):
  function, own = case
  values = (getattr(v, '__name__', str(v)) for v in own.values())
  return '-'.join([function.__name__, *values])


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('case', _cases(), ids=_name)
def test_optax_suite(case, optimizer, monkeypatch):
  function, own = case
  for name in ('adam_spd', 'with_spd'):
    monkeypatch.setattr(
      optax.contrib, name, getattr(optax_spd, name), raising=False
    )
  try:
    function(suite.ContribTest(), **OPTIMIZERS[optimizer], **own)
  except unittest.SkipTest as skip:
    pytest.fail(f'skipped itself: {skip}')


def test_the_whole_suite_was_found():
  names = {function.__name__ for function, _ in _cases()}
  source = inspect.getsource(suite.ContribTest)
  assert names == set(re.findall(r'def (test_\w+)\(', source))
  assert len(_cases()) >= 16
