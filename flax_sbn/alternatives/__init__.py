"""Other normalizers of the field, as pure functions, one file each.

Their layers are in :mod:`flax_sbn.linen` and :mod:`flax_sbn.nnx`, beside ours.
"""

from flax_sbn.alternatives.batch_renormalization import batch_renorm
from flax_sbn.alternatives.ghost import ghost_batch_norm

__all__ = ["batch_renorm", "ghost_batch_norm"]
