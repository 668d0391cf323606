"""Selective Projection Decay for Optax.

Fine-tune a pretrained model without losing what it knew: SPD pulls a layer
back towards its pretrained weights only when the gradient says that going
further out does not pay, and by just as much as the step moved out.

  import optax
  from optax_spd import spd

  tx = optax.chain(optax.scale_by_adam(), spd(learning_rate=2e-5))
  opt_state = tx.init(pretrained_params)  # the anchor, kept in the state
"""

from optax_spd._decay import DecayToAnchorState as DecayToAnchorState
from optax_spd._decay import decay_to_anchor as decay_to_anchor
from optax_spd._layers import layer_names as layer_names
from optax_spd._projection import SPDState as SPDState
from optax_spd._spd import adam_spd as adam_spd
from optax_spd._spd import spd as spd
from optax_spd._spd import with_spd as with_spd
