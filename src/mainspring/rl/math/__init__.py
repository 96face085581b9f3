"""The formulas of post-training: pure functions on packed tensors, one concept a file.

Shapes: T tokens of S sequences lie end to end, `lengths` [S] int64 sums to T. Everything per token is [T].
`written` [T] bool marks the tokens that the policy wrote itself; prompts and what tools answered are not.
Where a mean is taken, its denominator is an argument: it counts the whole step, so that micro-batches add up.
(The entropy of a policy is `ops.linear_log_probs_and_entropy`: it comes from the logits, beside the log-probabilities.)
"""
