// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a number is a
// function of (seed, position), so that the state is two integers and any part can be drawn alone.
#pragma once

#include <array>
#include <cstdint>

#include "core/tensor.h"

namespace mainspring::tensor {

std::array<uint32_t, 4> philox(uint64_t seed, uint64_t block);

struct Generator {
  uint64_t seed = 0;
  uint64_t position = 0;  // blocks of four 32-bit numbers drawn so far

  // Fill a contiguous tensor of a float dtype. uniform: [low, high); normal: Box and Muller's transform.
  void uniform(const Tensor& out, double low, double high);
  void normal(const Tensor& out, double mean, double std);
  void integers(const Tensor& out, int64_t low, int64_t high);  // int64, [low, high), bias below 2^-32
  void bernoulli(const Tensor& out, double p);                  // bool, 1 with probability p
};

}  // namespace mainspring::tensor
