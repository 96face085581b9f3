// Softmax of scaled and masked attention scores in one pass, as Megatron fuses it.
#pragma once

#include <optional>

#include "autograd/engine.h"

namespace mainspring::tensor::parallel {

// softmax(scale scores) over the last dimension of [..., queries, keys]; where the (broadcast) bool mask is true the
// score is -10000, so that a row masked whole is uniform and not NaN. Causal hides the keys behind a query with -inf.
// Halves are computed in float32 and rounded once.
struct ScaledMaskedSoftmax {
  static constexpr auto name = "scaled_masked_softmax";
  struct Saved { SavedOutput out; double scale; };
  static Tensor forward(const Tensor& scores, const std::optional<Tensor>& mask, double scale, bool causal);
  static void backward(const Saved& s, const Tensor& g, Grads& grads);
};

}  // namespace mainspring::tensor::parallel
