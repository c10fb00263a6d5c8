"""Other normalizers of the field, as pure functions, one file each.

Their layers are in :mod:`flax_sbn.linen` and :mod:`flax_sbn.nnx`, beside ours.
"""

from flax_sbn.alternatives.batch_renormalization import batch_renorm
from flax_sbn.alternatives.batchless import (
    batchless_init,
    batchless_nll,
    batchless_norm,
)
from flax_sbn.alternatives.binarization import binarize, binarize_kernel
from flax_sbn.alternatives.depthwise import bnet, depthwise_affine, identity_kernel
from flax_sbn.alternatives.diminishing import (
    diminished,
    diminishing_batch_norm,
    one_over_steps,
    update_diminished,
)
from flax_sbn.alternatives.entropy import shade, shade_init, shade_update
from flax_sbn.alternatives.filter_response import filter_response_norm, tlu
from flax_sbn.alternatives.ghost import ghost_batch_norm
from flax_sbn.alternatives.kalman import (
    add_statistics,
    kalman_norm,
    kalman_prior,
    kalman_update,
)
from flax_sbn.alternatives.l1 import l1_batch_norm, l1_moments
from flax_sbn.alternatives.mixture import (
    Mixture,
    initial_mixture,
    mixture_norm,
    mixture_normalize,
)
from flax_sbn.alternatives.moving_average import (
    MovingAverages,
    center_kernel,
    moving_average_batch_norm,
    moving_averages,
)
from flax_sbn.alternatives.norm_free import expected_std, norm_free_residual
from flax_sbn.alternatives.range_norm import range_batch_norm, range_moments
from flax_sbn.alternatives.weight_standardization import (
    activation_gain,
    scaled,
    standardize_kernel,
)

__all__ = [
    "Mixture",
    "MovingAverages",
    "activation_gain",
    "add_statistics",
    "batch_renorm",
    "batchless_init",
    "batchless_nll",
    "batchless_norm",
    "binarize",
    "binarize_kernel",
    "bnet",
    "center_kernel",
    "depthwise_affine",
    "diminished",
    "diminishing_batch_norm",
    "expected_std",
    "filter_response_norm",
    "ghost_batch_norm",
    "identity_kernel",
    "initial_mixture",
    "kalman_norm",
    "kalman_prior",
    "kalman_update",
    "l1_batch_norm",
    "l1_moments",
    "mixture_norm",
    "mixture_normalize",
    "moving_average_batch_norm",
    "moving_averages",
    "norm_free_residual",
    "one_over_steps",
    "range_batch_norm",
    "range_moments",
    "scaled",
    "shade",
    "shade_init",
    "shade_update",
    "standardize_kernel",
    "tlu",
    "update_diminished",
]
