"""One public function per operation, each with its PyTorch reference and its backends.

Every function takes `policy`: its numerics ("lockstep" or "fast") and, for tests, a forced backend.
"""

from mainspring.ops.adjust_logits import adjust_logits
from mainspring.ops.attention import attention
from mainspring.ops.batch import KVCache, TokenBatch, check_block_tables
from mainspring.ops.cross_entropy import cross_entropy
from mainspring.ops.grouped_linear import grouped_linear
from mainspring.ops.linear import linear
from mainspring.ops.linear_swiglu import linear_swiglu
from mainspring.ops.linear_tp_invariant import join_tp_partials, linear_tp_invariant, linear_tp_partial
from mainspring.ops.log_probs import (
    linear_log_probs,
    linear_log_probs_and_entropy,
    token_log_probs,
    token_log_probs_and_entropy,
)
from mainspring.ops.logit_loss import IGNORE_INDEX
from mainspring.ops.norm import add_rms_norm, rms_norm
from mainspring.ops.norm_rope_cache import HeadNorms, norm_rope_write_cache
from mainspring.ops.policy import FAST, LOCKSTEP, Numerics, Policy
from mainspring.ops.qkv_heads import qkv_heads
from mainspring.ops.rope import RopeAngles, rope
from mainspring.ops.rope_cache import rope_write_cache
from mainspring.ops.routing import Routing, combine, route
from mainspring.ops.sample import sample
from mainspring.ops.sampling_tensors import SamplingTensors
from mainspring.ops.swiglu import swiglu

__all__ = [
    "FAST",
    "IGNORE_INDEX",
    "LOCKSTEP",
    "HeadNorms",
    "KVCache",
    "Numerics",
    "Policy",
    "RopeAngles",
    "Routing",
    "SamplingTensors",
    "TokenBatch",
    "add_rms_norm",
    "adjust_logits",
    "attention",
    "check_block_tables",
    "combine",
    "cross_entropy",
    "grouped_linear",
    "join_tp_partials",
    "linear",
    "linear_log_probs",
    "linear_log_probs_and_entropy",
    "linear_swiglu",
    "linear_tp_invariant",
    "linear_tp_partial",
    "norm_rope_write_cache",
    "qkv_heads",
    "rms_norm",
    "rope",
    "rope_write_cache",
    "route",
    "sample",
    "swiglu",
    "token_log_probs",
    "token_log_probs_and_entropy",
]
