"""Where a loss that is not finite comes from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from optax_spd import layer_names

# Operations that only call another program: looked into, not at.
_CALLS = {
  'jit': 'jaxpr',
  'pjit': 'jaxpr',
  'closed_call': 'call_jaxpr',
  'core_call': 'call_jaxpr',
  'checkpoint': 'jaxpr',
  'remat2': 'jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
}


def first_not_finite(function, params, *args):
  """Says where the first number that is not finite comes from.

  Args:
    function: (params, *args) -> a scalar, its parts named by
      `jax.named_scope`.
    params: its parameters.
    *args: its other arguments.

  Returns:
    A sentence: the first parameter that is not finite; where all are, that the
    other arguments are not; or else the first operation, in the order of the
    computation, that makes of finite numbers one that is not.
  """
  finite = jax.device_get(_finite_leaves(params))
  wrong = [
    name
    for name, is_finite in zip(layer_names(params), finite, strict=True)
    if not is_finite
  ]
  if wrong:
    return (
      f'{len(wrong)} of {len(finite)} layers are not finite before it, the '
      f'first of them {wrong[0]}.'
    )
  if not all(jax.device_get(_finite_leaves(args))):
    return 'its batch is not finite.'
  sites = []
  flags = jax.jit(functools.partial(_flags, function, sites))(params, *args)
  for (scope, operation), wrong in zip(sites, np.asarray(flags), strict=True):
    if wrong:
      return (
        f'the first layer to go wrong is {scope or "the loss"}, in {operation}.'
      )
  return (
    'the same params and batch give a finite one when run again, with other '
    'random numbers where a batch is in parts.'
  )


@jax.jit
def _finite_leaves(params):
  return [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]


def _flags(function, sites, *args):
  """Bools: whether each operation makes what is not finite of what is.

  Where they are, (scope, operation), is appended to `sites`.
  """
  closed = jax.make_jaxpr(function)(*args)
  flags = []

  def run(jaxpr, consts, values, outer):
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, values, strict=True))

    def read(atom):
      return atom.val if isinstance(atom, core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
      given = [read(atom) for atom in eqn.invars]
      scope = '/'.join(filter(None, (outer, str(eqn.source_info.name_stack))))
      name = eqn.primitive.name
      if name in _CALLS:
        inner = eqn.params[_CALLS[name]]
        inner_consts = getattr(inner, 'consts', ())
        inner = getattr(inner, 'jaxpr', inner)
        made = run(inner, inner_consts, given, scope)
      else:
        made = eqn.primitive.bind(*given, **eqn.params)
        made = made if eqn.primitive.multiple_results else [made]
        sites.append((scope, name))
        flags.append(_all_finite(given) & ~_all_finite(made))
      known |= dict(zip(eqn.outvars, made, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  run(closed.jaxpr, closed.consts, jax.tree.leaves(args), '')
  return jnp.stack(flags)


def _all_finite(values):
  floats = [v for v in values if jnp.issubdtype(v.dtype, jnp.inexact)]
  return jnp.all(jnp.array([jnp.isfinite(v).all() for v in floats]))
