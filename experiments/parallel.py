"""How arrays lie on the devices."""

import jax
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


LAYOUTS = {'replicated': replicated, 'fsdp': fsdp}
