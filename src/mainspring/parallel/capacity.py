"""Expert capacity: an expert takes so many slots of a micro-batch, in the order of its tokens, and drops the rest.

GShard (Lepikhin et al., arXiv 2006.16668, section 3.1) and Switch Transformers (Fedus et al., arXiv 2101.03961,
section 2.2): an expert's capacity is C = ceil(factor · k · T / E) of the T · k slots of a micro-batch. A dropped slot
adds nothing, so its token passes by the residual stream; the weights of the token's other experts stay what they are.
The first tokens are served first, so that no token's output depends on a later one.

T counts the tokens of the whole micro-batch, also where context parallelism spreads it over ranks, so that what is
dropped depends on the batch and not on the layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mainspring.ops import Routing
from mainspring.parallel.collectives import gather_terms
from mainspring.parallel.context import pieces_of
from mainspring.parallel.mesh import Group


@torch.no_grad()
def within_capacity(routing: Routing, factor: float, pieces: Sequence[int], context: Group) -> Tensor:
    """[R] bool: which of the sorted rows their expert takes.

    pieces: tokens of each piece of the stream that this rank of the context group holds, in the order of its rows
    (one piece where the group is a single rank).
    """
    experts, order = routing.experts.flatten().long(), routing.order.long()
    num_experts, top_k = routing.offsets.shape[0] - 1, routing.experts.shape[1]
    expert = experts[order]  # of each sorted row
    ends = torch.tensor(pieces, device=expert.device).cumsum(0)
    piece = torch.bucketize(order // top_k, ends, right=True)
    counts = torch.zeros(len(pieces), num_experts, dtype=torch.int64, device=expert.device)
    counts.index_put_((piece, expert), torch.ones_like(expert), accumulate=True)
    before, slots = _before(counts, context)
    capacity = torch.ceil(slots * (factor / num_experts))
    # An expert's rows are in the order of tokens: this rank's first piece, then its second.
    row = torch.arange(expert.shape[0], device=expert.device) - routing.offsets.long()[expert]
    within = row - (counts.cumsum(0) - counts)[piece, expert]
    return before[piece, expert] + within < capacity


def _before(counts: Tensor, context: Group) -> tuple[Tensor, Tensor]:
    """counts: [P, E] slots of each own piece -> (slots of all earlier pieces of the stream [P, E], all slots [])."""
    if context.size == 1:
        return counts.cumsum(0) - counts, counts.sum().double()
    theirs = gather_terms(counts, context)  # [2, E] each
    in_stream = torch.empty(2 * context.size, counts.shape[1], dtype=counts.dtype, device=counts.device)
    for rank, of_rank in enumerate(theirs):
        in_stream[list(pieces_of(rank, context.size))] = of_rank
    before = in_stream.cumsum(0) - in_stream
    return before[list(pieces_of(context.rank, context.size))], in_stream.sum().double()
