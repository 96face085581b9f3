"""The optimizer of a loop that makes its own losses (post-training), when its model is spread over ranks.

optimizer = RankOptimizer(units, OptimizerSection(lr=1e-6))
for micro_batch in this_ranks_micro_batches:          # as many on every rank
    log_probs = units.model.log_probs(micro_batch)
    (share_of_the_steps_loss(log_probs)).backward()
    optimizer.accumulate()
norm = optimizer.step(1.0, clip_norm=1.0)             # all ranks together
"""

from __future__ import annotations

from mainspring.parallel.units import Units
from mainspring.train.recipe import OptimizerSection
from mainspring.train.sharded_optimizer import ShardedOptimizer


class RankOptimizer:
    """`accumulate` and `step` as those of `train.optimizer.Optimizer`; gradients are summed over all ranks.

    Make it after the weights were loaded. Every rank calls `step` equally often, and with ZeRO-2 and 3 or experts on
    several ranks each makes equally many forward and backward passes in between.
    """

    def __init__(self, units: Units, settings: OptimizerSection, *, offload: bool = False) -> None:
        self.units = units
        self.sharded = ShardedOptimizer(units, settings, offload=offload)
        """For checkpoints: `stored`, `pieces`, `steps`."""
        units.begin_step()

    def accumulate(self) -> None:
        """Nothing is left to do: the units took each gradient over while the backward pass ran."""

    def step(self, lr_factor: float, clip_norm: float) -> float:
        """Sums the gradients over the ranks, clips, moves the weights, forgets the gradients.

        Returns the norm of the whole model's gradient before clipping. A norm that is not finite moves nothing.
        """
        self.units.finish_step()
        norm = self.sharded.step(lr_factor, clip_norm)
        self.units.begin_step()
        return norm
