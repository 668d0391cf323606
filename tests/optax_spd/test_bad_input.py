"""Wrong uses, each refused by a message that says what, where and what to do.

The last tests are of uses that look wrong and are allowed on purpose.
"""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

from optax_spd import adam_spd, decay_to_anchor, layer_names, spd, with_spd

PARAMS = {
  'body': np.ones((3, 4), np.float32),
  'head': {'b': np.ones(2, np.float32)},
}
OTHER = {'body': PARAMS['body'], 'tail': {'b': PARAMS['head']['b']}}
ONE = {'body': PARAMS['body']}
TURNED = PARAMS | {'body': PARAMS['body'].T}


def chained(anchor=None, weight_decay=1.0, learning_rate=1e-3, **kwargs):
  return spd(anchor, weight_decay, learning_rate=learning_rate, **kwargs)


def wrapper(anchor=None, weight_decay=1.0, **kwargs):
  return with_spd(optax.sgd(1e-3), anchor, weight_decay, **kwargs)


def l2_sp(anchor=None, weight_decay=1.0, **kwargs):
  return decay_to_anchor(weight_decay, anchor, **kwargs)


SPD = {'spd': chained, 'with_spd': wrapper}
ALL = SPD | {'decay_to_anchor': l2_sp}


def init(make, **kwargs):
  return make(**kwargs).init(PARAMS)


def anchored(make, **entries):
  """Initialises with an anchor that is wrong in `entries` alone."""
  return make(PARAMS | entries).init(PARAMS)


def update(make, updates=PARAMS, params=PARAMS, state_of=None, **kwargs):
  """Updates from a state of `state_of`, by default of the same optimizer."""
  tx = make(**kwargs)
  return tx.update(updates, (state_of or tx).init(PARAMS), params)


def with_grad(grad, learning_rate=1e-3):
  tx = spd(learning_rate=learning_rate)
  return tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad=grad)


def injected(factory, *args, **kwargs):
  tx = optax.inject_hyperparams(factory)(*args, **kwargs)
  return jax.jit(tx.init)(PARAMS)


NOTHING = (
  'has nothing for the parameter params{}; give it an entry, or .*`mask`'
)
NOT_BODY, NOT_HEAD = (
  NOTHING.format(re.escape(where)) for where in ("['body']", "['head']['b']")
)
SURPLUS = r"\['neck'\] belongs to no parameter; pass a tree .*, or drop"
STRUCTURE = r'must have the structure of the params: missing \[.*{}.*surplus'
KINDS = r"an anchor is None \(.*\), 'origin' \(zero\), or a tree of arrays"
NUMBER = r"pass the pretrained params, None .*, or 'origin' for zero"
RANGE = r'not a number in \[0, {}\)'
FLAG = r"for params\['body'\]; it must be True \(SPD acts\) or False"
COUNT = (
  r"for params\['body'\]; it must be an int, .*'layer_axes' in static_args"
)
SHAPES = r"\['body'\] has shape \(4, 3\), its parameter \(3, 4\)"

# id: what is done, the error, and what its message says after 'caller: '.
WRONG_ANYWHERE = {
  'no_params': (
    lambda make: update(make, params=None),
    ValueError,
    r'update needs the current params; call tx\.update\(grads, state, params\)',
  ),
  # The anchor.
  'anchor_int': (lambda make: make(0), TypeError, f'number 0; {NUMBER}'),
  'anchor_float': (lambda make: make(0.5), TypeError, f'number 0.5; {NUMBER}'),
  'anchor_bool': (lambda make: make(True), TypeError, f'number True; {NUMBER}'),
  'anchor_function': (
    lambda make: make(lambda params: params),
    TypeError,
    f'anchor is <function .*; {KINDS}',
  ),
  'anchor_optimizer': (
    lambda make: make(optax.sgd(0.1)),
    TypeError,
    f'anchor.init is <function .*; {KINDS}',
  ),
  'anchor_list': (
    lambda make: make([1, 'x']),
    TypeError,
    rf"anchor\[1\] is 'x'; {KINDS}",
  ),
  'anchor_string': (
    lambda make: make('zero'),
    TypeError,
    f"anchor is 'zero'; {KINDS}",
  ),
  'anchor_string_in_a_tree': (
    lambda make: anchored(make, head={'b': 'zero'}),
    TypeError,
    rf"anchor\['head'\]\['b'\] is 'zero'; {KINDS}",
  ),
  'anchor_function_in_a_tree': (
    lambda make: anchored(make, body=np.zeros),
    TypeError,
    rf"anchor\['body'\] is <.*function zeros.*; {KINDS}",
  ),
  'anchor_transposed': (
    lambda make: make(TURNED).init(PARAMS),
    ValueError,
    f'anchor{SHAPES}; pass the pretrained tree of the same model, or .*`mask`',
  ),
  'anchor_number_in_a_tree': (
    lambda make: anchored(make, body=0.0),
    ValueError,
    r"anchor\['body'\] has shape \(\), its parameter \(3, 4\); pass",
  ),
  'anchor_of_another_model': (
    lambda make: make(OTHER).init(PARAMS),
    ValueError,
    f'anchor {NOT_HEAD}',
  ),
  'anchor_none_in_a_tree': (
    lambda make: anchored(make, body=None),
    ValueError,
    f'anchor {NOT_BODY}',
  ),
  'anchor_array_for_a_tree': (
    lambda make: make(PARAMS['body']).init(PARAMS),
    ValueError,
    f'anchor {NOT_BODY}',
  ),
  'anchor_surplus': (
    lambda make: anchored(make, neck=np.ones(2)),
    ValueError,
    f'anchor{SURPLUS}',
  ),
  'anchor_origin_surplus': (
    lambda make: anchored(make, neck='origin'),
    ValueError,
    f'anchor{SURPLUS}',
  ),
  **{
    f'anchor_{dtype.__name__}': (
      lambda make, d=dtype: anchored(make, body=np.ones((3, 4), d)),
      TypeError,
      rf"anchor\['body'\] has dtype {np.dtype(dtype)}; .* floating point",
    )
    for dtype in (np.int32, np.bool_, np.complex64)
  },
  'anchor_abstract': (
    lambda make: make(jax.eval_shape(lambda: PARAMS)).init(PARAMS),
    ValueError,
    r"anchor\['body'\] is abstract, ShapeDtypeStruct.*with values",
  ),
  # The weight decay.
  **{
    f'lambda_{value}': (
      lambda make, v=value: make(weight_decay=v),
      ValueError,
      rf'weight_decay is {value}, {RANGE.format("inf")}',
    )
    for value in (-1.0, np.nan, np.inf)
  },
  **{
    f'lambda_{type(value).__name__}': (
      lambda make, v=value: make(weight_decay=v),
      TypeError,
      rf'weight_decay is {value!r}, {RANGE.format("inf")}',
    )
    for value in (True, '1')
  },
  # The mask.
  'mask_surplus': (
    lambda make: init(make, mask={'body': True, 'head': True, 'neck': False}),
    ValueError,
    f'mask{SURPLUS}',
  ),
  'mask_missing': (
    lambda make: init(make, mask={'body': True}),
    ValueError,
    f'mask {NOT_HEAD}',
  ),
  'mask_function_missing': (
    lambda make: init(make, mask=lambda params: {'body': True}),
    ValueError,
    f'mask {NOT_HEAD}',
  ),
  'mask_deeper': (
    lambda make: init(make, mask={'body': {'w': True}, 'head': True}),
    ValueError,
    f'mask {NOT_BODY}',
  ),
  'mask_int': (
    lambda make: init(make, mask={'body': 1, 'head': True}),
    TypeError,
    f'mask is 1 {FLAG}',
  ),
  'mask_string': (
    lambda make: init(make, mask='body'),
    TypeError,
    f"mask is 'body' {FLAG}",
  ),
  'mask_array': (
    lambda make: init(make, mask={'body': jnp.array(True), 'head': True}),
    TypeError,
    rf'mask is Array\(True, .*\) {FLAG}',
  ),
  # The params.
  'params_int': (
    lambda make: make().init(PARAMS | {'steps': np.ones(2, np.int32)}),
    TypeError,
    r"params\['steps'\] has dtype int32, .*real floating.*; mask it out",
  ),
  'params_complex': (
    lambda make: make().init({'z': np.ones(2, np.complex64)}),
    TypeError,
    r"params\['z'\] has dtype complex64, .*mask it out, or wrap with optax",
  ),
  'params_transposed': (
    lambda make: update(make, TURNED, TURNED),
    ValueError,
    r"state's anchor\['body'\] has shape \(3, 4\), its parameter \(4, 3\)",
  ),
  'params_of_another_model': (
    lambda make: update(make, OTHER, OTHER),
    ValueError,
    rf"state's anchor {STRUCTURE.format('tail')} .*head",
  ),
  # The updates.
  'updates_missing': (
    lambda make: update(make, ONE),
    ValueError,
    f'updates {STRUCTURE.format("head")}',
  ),
  'updates_none': (
    lambda make: update(make, None),
    ValueError,
    f'updates {STRUCTURE.format("body")}',
  ),
  'updates_of_another_model': (
    lambda make: update(make, OTHER),
    ValueError,
    rf"updates {STRUCTURE.format('head')} .*\['tail'\]\['b'\]",
  ),
  'updates_in_other_containers': (
    lambda make: update(make, FrozenDict(PARAMS)),
    ValueError,
    r'updates must have the structure .*containers differ: .*FrozenDict',
  ),
  'updates_transposed': (
    lambda make: update(make, TURNED),
    ValueError,
    f'updates{SHAPES}',
  ),
  'updates_number_in_a_tree': (
    lambda make: update(make, PARAMS | {'body': 1.0}),
    ValueError,
    r"updates\['body'\] has shape \(\), its parameter \(3, 4\)",
  ),
  **{
    f'updates_{masked}_in_a_tree': (
      lambda make, x=masked: update(make, PARAMS | {'body': x}),
      ValueError,
      rf"updates\['body'\] is {re.escape(str(masked))}, its parameter is not",
    )
    for masked in (None, optax.MaskedNode())
  },
}

WRONG_FOR_SPD = {
  # The weight decay, whose tree `decay_to_anchor` does not take.
  **{
    f'lambda_tree_{value}': (
      lambda make, v=value: make(weight_decay={'body': 1, 'head': {'b': v}}),
      error,
      rf"weight_decay\['head'\]\['b'\] is {value!r}, {RANGE.format('inf')}",
    )
    for value, error in (
      (-1.0, ValueError),
      (np.nan, ValueError),
      (np.inf, ValueError),
      (False, TypeError),
      ('1', TypeError),
    )
  },
  'lambda_bool_array': (
    lambda make: init(make, weight_decay=np.True_),
    TypeError,
    'weight_decay is .*True.*, not a number',
  ),
  'lambda_complex': (
    lambda make: init(make, weight_decay=1j),
    TypeError,
    'weight_decay is 1j, not a number',
  ),
  'lambda_none': (
    lambda make: init(make, weight_decay=None),
    TypeError,
    r'weight_decay is None, not a number in \[0, inf\)',
  ),
  'lambda_tree_none': (
    lambda make: init(make, weight_decay={'body': 1.0, 'head': None}),
    ValueError,
    f'weight_decay {NOT_HEAD}',
  ),
  'lambda_tree_missing': (
    lambda make: init(make, weight_decay={'body': 1.0}),
    ValueError,
    f'weight_decay {NOT_HEAD}',
  ),
  'lambda_tree_surplus': (
    lambda make: init(make, weight_decay={'body': 1, 'head': 1, 'neck': 1}),
    ValueError,
    f'weight_decay{SURPLUS}',
  ),
  'lambda_array_has_a_nan': (
    lambda make: make(weight_decay=np.array([1, np.nan])),
    ValueError,
    rf'weight_decay is \[ 1. nan\], {RANGE.format("inf")}',
  ),
  'lambda_array_without_layer_axes': (
    lambda make: init(make, weight_decay={'body': np.ones(3), 'head': 1}),
    ValueError,
    r"shape \(3,\) for params\['body'\], .* shape \(\); .* or set layer_axes",
  ),
  'lambda_array_of_another_depth': (
    lambda make: init(make, weight_decay=np.ones(4), layer_axes=1),
    ValueError,
    r"shape \(4,\) for params\['body'\], whose layers have shape \(3,\); pass",
  ),
  'lambda_schedule_of_another_depth': (
    lambda make: init(make, weight_decay=lambda t: jnp.ones(5)),
    ValueError,
    r"shape \(5,\) for params\['body'\], whose layers have shape \(\); pass",
  ),
  # The layer axes.
  'layer_axes_surplus': (
    lambda make: init(make, layer_axes={'body': 1, 'head': 0, 'neck': 1}),
    ValueError,
    f'layer_axes{SURPLUS}',
  ),
  'layer_axes_missing': (
    lambda make: init(make, layer_axes={'body': 1}),
    ValueError,
    f'layer_axes {NOT_HEAD}',
  ),
  'layer_axes_beyond_the_rank': (
    lambda make: init(make, layer_axes=2),
    ValueError,
    r"2 for params\['head'\]\['b'\] of shape \(2,\); it must lie in 0\.\.1",
  ),
  'layer_axes_negative': (
    lambda make: init(make, layer_axes=-1),
    ValueError,
    r"-1 for params\['body'\] of shape \(3, 4\); it must lie in 0\.\.2",
  ),
  **{
    f'layer_axes_{type(value).__name__}': (
      lambda make, v=value: init(make, layer_axes={'body': v, 'head': 0}),
      TypeError,
      f'layer_axes is {re.escape(repr(value))} {COUNT}',
    )
    for value in (1.0, '1', np.array([0, 1]))
  },
  # The dtype of the anchor.
  **{
    f'anchor_dtype_{np.dtype(dtype)}': (
      lambda make, d=dtype: make(anchor_dtype=d),
      TypeError,
      f'anchor_dtype is .*{np.dtype(dtype)}.*such as jnp.bfloat16, or None',
    )
    for dtype in ('int8', jnp.int32, jnp.complex64)
  },
  # The state.
  'state_of_more_layers': (
    lambda make: update(make, ONE, ONE),
    ValueError,
    'state is of 2 layers, the params have 1; update needs the params, mask',
  ),
  'state_of_another_mask': (
    lambda make: update(
      make, mask={'body': True, 'head': False}, state_of=make()
    ),
    ValueError,
    'state is of 2 layers, the params have 1; .*mask and layer_axes that init',
  ),
  'state_of_other_layer_axes': (
    lambda make: update(make, layer_axes=1, state_of=make()),
    ValueError,
    'state is of 2 layers, the params have 5; .*mask and layer_axes that init',
  ),
}

# Here with the name of who refuses.
WRONG_ONCE = {
  **{
    f'learning_rate_{value}': (
      lambda v=value: spd(learning_rate=v),
      error,
      f'spd: learning_rate is {re.escape(repr(value))}, {RANGE.format("inf")}',
    )
    for value, error in (
      (-1e-3, ValueError),
      (np.nan, ValueError),
      (np.inf, ValueError),
      ('1e-3', TypeError),
      (True, TypeError),
      ({'body': 1e-3}, TypeError),
      (np.array([1e-3, 1e-3]), TypeError),
    )
  },
  **{
    f'b1_{value}': (
      lambda v=value: chained(b1=v),
      error,
      f'spd: b1 is {re.escape(repr(value))}, {RANGE.format(1)}',
    )
    for value, error in (
      (1.0, ValueError),
      (-0.1, ValueError),
      (np.nan, ValueError),
      ('0.9', TypeError),
      (True, TypeError),
      ([0.9, 0.9], TypeError),
      (np.zeros, TypeError),
    )
  },
  **{
    f'l2_sp_lambda_{name}': (
      lambda v=value: decay_to_anchor(v),
      TypeError,
      f'decay_to_anchor: weight_decay is {shown}, {RANGE.format("inf")}',
    )
    for name, value, shown in (
      ('schedule', optax.constant_schedule(1e-2), '<function .*'),
      ('tree', {'body': 0.1, 'head': 0.2}, r"\{'body': 0\.1, 'head': 0\.2\}"),
      ('array', np.ones(3), r'array\(\[1., 1., 1.\]\)'),
    )
  },
  'no_gradient_for_a_finished_step': (
    lambda: update(chained, learning_rate=None),
    ValueError,
    r'spd: learning_rate=None .*state, params, grad=grads\), or use with_spd',
  ),
  'grad_missing': (
    lambda: with_grad(ONE),
    ValueError,
    f'spd: grad {STRUCTURE.format("head")}',
  ),
  'grad_of_another_model': (
    lambda: with_grad(OTHER, learning_rate=None),
    ValueError,
    f'spd: grad {STRUCTURE.format("head")}.*tail',
  ),
  'grad_transposed': (
    lambda: with_grad(TURNED, learning_rate=None),
    ValueError,
    f'spd: grad{SHAPES}',
  ),
  'grad_true': (
    lambda: with_grad(True),
    ValueError,
    f'spd: grad {STRUCTURE.format("body")}',
  ),
  **{
    f'inner_{name}': (
      lambda inner=inner: with_spd(inner),
      TypeError,
      rf'with_spd: inner is {shown}; pass .* such as optax\.adam\(2e-5\)',
    )
    for name, inner, shown in (
      ('number', 0.1, r'0\.1'),
      ('not_called', optax.adam, '<function adam.*'),
      ('params', ONE, r"\{'body': .*"),
      ('none', None, 'None'),
    )
  },
  'inner_drops_a_parameter': (
    lambda: update(
      lambda: with_spd(optax.stateless(lambda updates, params: ONE))
    ),
    ValueError,
    f"with_spd: inner's step {STRUCTURE.format('head')}",
  ),
  'inner_turns_a_parameter': (
    lambda: update(
      lambda: with_spd(optax.stateless(lambda updates, params: TURNED))
    ),
    ValueError,
    f"with_spd: inner's step{SHAPES}",
  ),
  'inner_hides_a_parameter': (
    lambda: update(
      lambda: with_spd(
        optax.stateless(lambda u, _: u | {'body': optax.MaskedNode()})
      )
    ),
    ValueError,
    r"with_spd: inner's step\['body'\] is MaskedNode\(\), its parameter is not",
  ),
  'layer_names_mask': (
    lambda: layer_names(PARAMS, mask={'body': True}),
    ValueError,
    f'layer_names: mask {NOT_HEAD}',
  ),
  'layer_names_layer_axes': (
    lambda: layer_names(PARAMS, layer_axes=3),
    ValueError,
    r"layer_names: layer_axes is 3 for params\['body'\] of shape \(3, 4\)",
  ),
  'layer_names_int': (
    lambda: layer_names({'steps': np.ones(2, np.int32)}),
    TypeError,
    r"layer_names: params\['steps'\] has dtype int32, .*; mask it out",
  ),
  'adam_anchor': (
    lambda: adam_spd(1e-3, 0.9),
    TypeError,
    f'with_spd: anchor is the number 0.9; {NUMBER}',
  ),
  'injected_mask_function': (
    lambda: injected(adam_spd, 1e-3, mask=lambda params: params > 0),
    TypeError,
    rf"with_spd: mask is .* {FLAG} .*name 'mask' in static_args",
  ),
  'injected_anchor_number': (
    lambda: injected(adam_spd, 1e-3, anchor=0),
    ValueError,
    f'with_spd: anchor {NOT_BODY}',
  ),
  'injected_anchor_function': (
    lambda: injected(adam_spd, 1e-3, anchor=lambda params: 0),
    TypeError,
    f'with_spd: anchor is the number 0; {NUMBER}',
  ),
  'injected_layer_axes': (
    lambda: injected(adam_spd, 1e-3, layer_axes=1),
    TypeError,
    f'with_spd: layer_axes is .*Tracer.* {COUNT}',
  ),
}


def assert_refused(misuse, error, message):
  with pytest.raises(error) as caught:
    misuse()
  # Not a subclass, such as JAX's own.
  assert caught.type is error
  assert re.match(message, str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.parametrize('caller', ALL)
@pytest.mark.parametrize('name', WRONG_ANYWHERE)
def test_refused_by_all_three(name, caller):
  misuse, error, message = WRONG_ANYWHERE[name]
  assert_refused(lambda: misuse(ALL[caller]), error, f'{caller}: .*{message}')


@pytest.mark.parametrize('caller', SPD)
@pytest.mark.parametrize('name', WRONG_FOR_SPD)
def test_refused_by_spd(name, caller):
  misuse, error, message = WRONG_FOR_SPD[name]
  assert_refused(lambda: misuse(SPD[caller]), error, f'{caller}: .*{message}')


@pytest.mark.parametrize('name', WRONG_ONCE)
def test_refused(name):
  assert_refused(*WRONG_ONCE[name])


alike = pytest.mark.parametrize('make', ALL.values(), ids=ALL)


def test_a_mask_that_leaves_out_everything_is_warned_of():
  nothing = {'body': False, 'head': {'b': False}}
  for make in ALL.values():
    for mask in (nothing, lambda params: nothing, False):
      with pytest.warns(UserWarning, match=r'mask leaves out every parameter'):
        jax.jit(make(mask=mask).init)(PARAMS)
      make(mask={'body': True, 'head': False}).init(PARAMS)


@pytest.mark.parametrize('factory', [adam_spd, spd, decay_to_anchor])
def test_a_mask_that_inject_hyperparams_has_called_is_warned_of(factory):
  """It calls a function that is not in `static_args` with the count."""

  def kernels(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)

  def others(params):
    return jax.tree.map(lambda x: x.ndim < 2, params)

  rate = {} if factory is decay_to_anchor else {'learning_rate': 1e-3}
  for mask in (kernels, others):
    tx = optax.inject_hyperparams(factory)(mask=mask, weight_decay=1.0, **rate)
    with pytest.warns(UserWarning, match="name 'mask' in static_args"):
      tx.init(PARAMS)
    tx = optax.inject_hyperparams(factory, static_args=('mask',))(
      mask=mask, weight_decay=1.0, **rate
    )
    state = jax.jit(tx.init)(PARAMS)
    (anchor,) = jax.tree.leaves(anchor_of(state))
    assert anchor.ndim == (2 if mask is kernels else 1)


def anchor_of(state):
  return optax.tree.get(state, 'anchor')


@alike
@pytest.mark.parametrize('dtype', [np.float64, np.float16, jnp.bfloat16])
def test_allowed_an_anchor_of_another_precision_is_cast(make, dtype):
  anchor = jax.tree.map(lambda x: np.asarray(x / 3, dtype), PARAMS)
  expected = jax.tree.map(lambda x: x.astype(np.float32), anchor)
  found = anchor_of(make(anchor).init(PARAMS))
  chex.assert_trees_all_equal(found, expected)
  chex.assert_trees_all_equal_dtypes(found, PARAMS)


@alike
def test_allowed_an_anchor_in_other_containers(make):
  params = {'blocks': [PARAMS, PARAMS]}
  restored = {'blocks': {'0': PARAMS, '1': PARAMS}}
  for anchor in (restored, FrozenDict(restored), {'blocks': (PARAMS,) * 2}):
    found = anchor_of(make(anchor).init(params))
    chex.assert_trees_all_equal(found, params)
    chex.assert_trees_all_equal_structs(found, params)


@alike
def test_allowed_params_of_any_dtype_when_masked_out(make):
  params = PARAMS | {
    'steps': np.ones(2, np.int32),
    'phase': np.ones(2, np.complex64),
  }
  mask = {'body': True, 'head': np.bool_(True), 'steps': False, 'phase': False}
  params = jax.tree.map(jnp.asarray, params)
  tx = make(mask=mask)
  state = tx.init(params)
  chex.assert_trees_all_equal(
    jax.tree.leaves(anchor_of(state)), jax.tree.leaves(PARAMS)
  )
  updates, _ = tx.update(params, state, params)
  # SGD itself makes float steps of ints.
  chex.assert_trees_all_equal_shapes(updates, params)


@alike
def test_allowed_a_traced_weight_decay_is_not_checked(make):
  state = jax.jit(lambda value: make(weight_decay=value).init(PARAMS))(-1.0)
  chex.assert_trees_all_equal(anchor_of(state), PARAMS)


@pytest.mark.parametrize('make', SPD.values(), ids=SPD)
def test_allowed_what_a_schedule_returns_is_not_checked(make):
  update(make, weight_decay=lambda t: -1.0)


@alike
def test_allowed_the_anchor_of_the_state_is_the_one_that_counts(make):
  """A restored run keeps its anchor, whatever the factory is given."""
  state = make().init(PARAMS)
  updates, new = make(OTHER).update(PARAMS, state, PARAMS)
  expected, _ = make().update(PARAMS, state, PARAMS)
  chex.assert_trees_all_equal(updates, expected)
  chex.assert_trees_all_equal(anchor_of(new), PARAMS)


@alike
def test_allowed_an_abstract_anchor_under_eval_shape(make):
  shapes = jax.eval_shape(lambda: PARAMS)
  state = jax.eval_shape(make(shapes).init, PARAMS)
  chex.assert_trees_all_equal_shapes_and_dtypes(anchor_of(state), PARAMS)
