// Cross-entropy over a vocabulary that is split over the ranks: no rank ever holds a whole row of logits.
#pragma once

#include "parallel/mappings.h"

namespace mainspring::tensor::parallel {

// Losses [...] of logits [..., vocabulary / ranks] and targets [...], by exactly three all-reduces of [...]. The third
// carries the sum of the exponentials and, for label smoothing, the sum of all ranks' logits beside it, so that the mean
// log-probability is that of the whole vocabulary. With K classes and smoothing s, as in Megatron:
// loss = (1 - s') nll - s' mean(log p), where s' = s K / (K - 1). Computed in float32 (float64 for float64).
struct VocabParallelCrossEntropy {
  static constexpr auto name = "vocab_parallel_cross_entropy";
  struct Saved { Tensor probabilities, local; double smoothing; int64_t classes; };  // local: -1 where another rank's
  static Tensor forward(const Tensor& logits, const Tensor& targets, const GroupPtr& group, double label_smoothing);
  static void backward(const Saved& s, const Tensor& g, Grads& grads);
};

}  // namespace mainspring::tensor::parallel
