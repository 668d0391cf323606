r"""LoRA: low-rank steps beside the Linear modules of any model.

    model = lora.add(
      model, 8, 16, modules=r'.*\.attn\.(query|value)', rngs=nnx.Rngs(0)
    )
    graphdef, params, frozen = nnx.split(model, nnx.LoRAParam, ...)

What is adapted keeps its name, with its own parameters under `base`. SPD pulls
both factors back to zero: its anchor is 'origin'.

References:
  Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022
"""

import itertools
import re

import jax
import jax.numpy as jnp
from flax import nnx


class LoRALinear(nnx.Module):
  """base(x) + (alpha / rank) x A B, computed in the dtype of base(x).

  As in PEFT, A [features in, rank] starts uniform within 1 / sqrt(features in)
  of zero and B [rank, features out] at zero: an adapted model starts as what it
  was. Both are float32; stacked blocks have theirs stacked. (`nnx.LoRA` has
  another start, and neither the factor nor stacks.)
  """

  def __init__(self, base, rank, alpha, dropout, *, rngs: nnx.Rngs):
    *stack, features_in, features_out = base.kernel.shape
    bound = features_in**-0.5
    self.base = base
    self.scale = alpha / rank
    self.dropout = dropout
    self.dropout_key = nnx.data(None)
    self.lora_a = nnx.LoRAParam(
      jax.random.uniform(
        rngs.params(), (*stack, features_in, rank), minval=-bound, maxval=bound
      )
    )
    self.lora_b = nnx.LoRAParam(jnp.zeros((*stack, rank, features_out)))

  def __call__(self, x):
    y = self.base(x)
    x, a, b = (v.astype(y.dtype) for v in (x, self.lora_a, self.lora_b))
    if self.dropout_key is not None:
      keep = jax.random.bernoulli(
        self.dropout_key[...], 1 - self.dropout, x.shape
      )
      x = jnp.where(keep, x / (1 - self.dropout), 0)
    return y + self.scale * (x @ a @ b)


def add(model, rank, alpha, *, modules, within=..., dropout=0.0, rngs):
  r"""The model with LoRA on some of its Linear modules.

  Args:
    model: any `nnx.Module`. It stays as it is, and shares its parameters with
      the result.
    rank: columns of A, rows of B; at least 1.
    alpha: the product A B is multiplied by alpha / rank.
    modules: regular expression of the whole path of a module, such as
      r'.*\.attn\.(query|value)'; in a list of blocks it is
      `blocks.3.attn.query`, in stacked ones `blocks.attn.query`. What it
      matches beside Linear modules stays.
    within: NNX filter of the kernels that may be adapted, such as of the part
      of the model that is trained; all by default.
    dropout: the share of x that an adapter does not see in training, in [0, 1);
      see `with_dropout`.
    rngs: of the As.

  Returns:
    The model, whose adapted modules are `LoRALinear`s.

  Raises:
    ValueError: a number is out of its range, or nothing matches.
  """
  if rank < 1 or not 0 <= dropout < 1:
    raise ValueError(
      f'lora.add: rank is {rank}, dropout {dropout}; the rank is at least 1, '
      'dropout in [0, 1).'
    )
  matched, others = [], []
  is_within = nnx.filterlib.to_predicate(within)

  def adapted(path, node):
    if not isinstance(node, nnx.Linear):
      return node
    if not is_within((*path, 'kernel'), node.kernel):
      return node
    name = '.'.join(map(str, path))
    if not re.fullmatch(modules, name):
      others.append(name)
      return node
    matched.append(name)
    return LoRALinear(node, rank, alpha, dropout, rngs=rngs)

  result = nnx.recursive_map(adapted, model)
  if not matched:
    raise ValueError(
      f'lora.add: modules={modules!r} matches no whole path of the '
      f'{len(others)} Linear modules, such as {", ".join(others[:3])}.'
    )
  return result


def merge(model):
  """The plain model that computes the same: kernels W + (alpha / rank) A B.

  The model that is given stays as it is.
  """

  def merged(_, node):
    if not isinstance(node, LoRALinear):
      return node
    product = jnp.matmul(
      node.lora_a[...], node.lora_b[...], precision='highest'
    )
    kernel = node.base.kernel[...] + node.scale * product
    node.base.kernel = node.base.kernel.replace(
      kernel.astype(node.base.kernel.dtype)
    )
    return node.base

  return nnx.recursive_map(merged, model)


def with_dropout(model, key):
  """The model as in one step of training: adapters miss a share of their input.

  Call it in the loss, where the model is made anew of its params. A model that
  it was not called on drops nothing.

  Args:
    model: one of `add`; it stays as it is.
    key: of the step; each module, and each of stacked blocks, has one of it.
  """
  count = itertools.count()

  def with_key(_, node):
    if isinstance(node, LoRALinear) and node.dropout:
      stack = node.lora_a.shape[:-2]
      module_key = jax.random.fold_in(key, next(count))
      node.dropout_key = nnx.Variable(jax.random.split(module_key, stack))
    return node

  return nnx.recursive_map(with_key, model)


def interpolate(start, params, alpha):
  """WiSE-FT of what was trained: the weights W + alpha (step to the end).

  The step of an adapted module is its product A B: A stays, and B is multiplied
  by alpha. Other params, such as a new head's, are interpolated one by one.

  Args:
    start: the params before training; LoRA's are not looked at.
    params: those after it, the same tree.
    alpha: 0 for the start, 1 for the end.
  """

  def between(path, first, last):
    names = _names(path)
    if 'lora_a' in names:
      return last
    if 'lora_b' in names:
      return alpha * last
    return first + alpha * (last - first)

  return jax.tree_util.tree_map_with_path(between, start, params)


def deviation(start, params, scale):
  """How far the weights are from where they were, the norm of all steps.

  The step of an adapted module is scale A B, whose squared norm is
  scale^2 tr(A^T A B B^T): no matrix is larger than [rank, rank]. That of other
  params is their difference from `start`.

  Args:
    start: the params before training; LoRA's are not looked at.
    params: those after it, the same tree.
    scale: alpha / rank, as `add` was given them.

  Returns:
    A float32 scalar.
  """
  leaves = [
    (_names(path), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  ]
  squares = [
    jnp.square(leaf - first).sum()
    for (names, leaf), first in zip(leaves, jax.tree.leaves(start), strict=True)
    if not {'lora_a', 'lora_b'}.intersection(names)
  ]
  # Leaves are in the order of their paths: one A, one B for each module.
  factors = zip(
    [a for names, a in leaves if 'lora_a' in names],
    [b for names, b in leaves if 'lora_b' in names],
    strict=True,
  )
  for a, b in factors:
    gram_a = jnp.matmul(a.mT, a, precision='highest')
    gram_b = jnp.matmul(b, b.mT, precision='highest')
    squares.append(scale**2 * (gram_a * gram_b).sum())
  # Rounding may leave a sum that is zero a little below.
  return jnp.sqrt(jnp.maximum(sum(squares), 0))


def factors(start, params):
  """The norms of both factors, over all modules, and how far A has moved.

  A does not start at zero, where SPD pulls it: it is told apart from B.

  Args:
    start: the params before training.
    params: those after it, the same tree.

  Returns:
    `{'norm_a': |A|, 'moved_a': |A - its start|, 'norm_b': |B|}`, float32; none
    where there is no LoRA.
  """
  leaves = [
    (_names(path), leaf, first)
    for (path, leaf), first in zip(
      jax.tree_util.tree_leaves_with_path(params),
      jax.tree.leaves(start),
      strict=True,
    )
  ]
  a = [(leaf, first) for names, leaf, first in leaves if 'lora_a' in names]
  b = [leaf for names, leaf, _ in leaves if 'lora_b' in names]
  if not a:
    return {}
  norms = {
    'norm_a': [leaf for leaf, _ in a],
    'moved_a': [leaf - first for leaf, first in a],
    'norm_b': b,
  }
  return {
    name: jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in leaves))
    for name, leaves in norms.items()
  }


def _names(path):
  return [jax.tree_util.keystr((key,), simple=True) for key in path]
