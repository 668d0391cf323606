"""How arrays lie on the devices."""

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def mesh_of(devices):
  """A mesh of one axis, 'data'."""
  return jax.make_mesh(
    (len(devices),),
    ('data',),
    (jax.sharding.AxisType.Auto,),
    devices=devices,
  )


def replicated(tree, mesh):
  """A `NamedSharding` for every leaf: all of it on every device."""
  return jax.tree.map(lambda _: NamedSharding(mesh, P()), tree)


def fsdp(tree, mesh):
  """A `NamedSharding` for every leaf: along one axis, over all devices.

  That axis is the longest that the devices divide; a leaf without one, such as
  a scalar, lies on every device.
  """

  def sharding(leaf):
    axes = [i for i, n in enumerate(leaf.shape) if n % mesh.size == 0]
    if not axes:
      return NamedSharding(mesh, P())
    longest = max(axes, key=lambda i: leaf.shape[i])
    return NamedSharding(mesh, P(*[None] * longest, 'data'))

  return jax.tree.map(sharding, tree)


def split_batch(tree, mesh):
  """A `NamedSharding` for every leaf: along its first axis, the examples."""
  return jax.tree.map(lambda _: NamedSharding(mesh, P('data')), tree)


def like_params(tx, opt_state, on_params, mesh):
  """A `NamedSharding` for every leaf of an optimizer's state.

  Args:
    tx: the optimizer.
    opt_state: its state, or the shapes of one.
    on_params: the `NamedSharding`s of the params.
    mesh: that holds whole what is not shaped like the params.
  """
  return optax.tree.map_params(
    tx,
    lambda _, sharding: sharding,
    opt_state,
    on_params,
    transform_non_params=lambda _: NamedSharding(mesh, P()),
  )


LAYOUTS = {'replicated': replicated, 'fsdp': fsdp}
