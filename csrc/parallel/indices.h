// Which tokens make a training sample, and which data set the next sample comes from: Megatron's index helpers, in
// exact integers (the original takes a ceiling in float32 and compares shares in float64).
#pragma once

#include <vector>

#include "core/tensor.h"

namespace mainspring::tensor::parallel {

struct SampleOptions {
  int64_t seq_length, num_epochs, tokens_per_epoch;
  bool drop_last_partial_sequence, add_extra_token_to_sequence;
};

// sizes and document_idx: int64 [documents], [entries]. For each of the samples, and one more, its first entry of
// document_idx and the offset within that document: int64 [samples + 1, 2].
Tensor build_sample_idx(const Tensor& sizes, const Tensor& document_idx, const SampleOptions& options);

struct Blending {
  Tensor dataset;  // int32 [size]
  Tensor sample;   // int64 [size]: its number within that data set
};
// Each time the data set that is furthest behind its share of the weights; the first of equals.
Blending build_blending_indices(const std::vector<double>& weights, int64_t size);

}  // namespace mainspring::tensor::parallel
