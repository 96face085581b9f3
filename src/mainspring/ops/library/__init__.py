"""The operations as PyTorch operators (`mainspring::...`): what torch.compile and torch.export see of them.

Each is opaque to the compiler, has shapes for fake tensors and, where there is one, a gradient for autograd, and calls
the table of the operation of the same name, which then chooses the backend by the real tensors. Whether a gradient is
recorded (`needs_grad`) is known only while the call is traced, so it is an argument. A public function takes this way
only while it is traced: an operator's dispatch costs more than a small kernel.
"""

from mainspring.ops.library.attention import packed_attention
from mainspring.ops.library.cache import paged_attention, rope_write_cache
from mainspring.ops.library.experts import combine, grouped_linear, route
from mainspring.ops.library.linear import linear, linear_tp_invariant
from mainspring.ops.library.losses import (
    linear_cross_entropy,
    linear_log_probs,
    linear_log_probs_and_entropy,
    row_cross_entropy,
    token_log_probs,
    token_log_probs_and_entropy,
)
from mainspring.ops.library.rowwise import add_rms_norm, rms_norm, rope, swiglu
from mainspring.ops.library.sampling import adjust_logits, sample
from mainspring.ops.library.support import is_traced

__all__ = [
    "add_rms_norm",
    "adjust_logits",
    "combine",
    "grouped_linear",
    "is_traced",
    "linear",
    "linear_cross_entropy",
    "linear_log_probs",
    "linear_log_probs_and_entropy",
    "linear_tp_invariant",
    "packed_attention",
    "paged_attention",
    "rms_norm",
    "rope",
    "rope_write_cache",
    "route",
    "row_cross_entropy",
    "sample",
    "swiglu",
    "token_log_probs",
    "token_log_probs_and_entropy",
]
