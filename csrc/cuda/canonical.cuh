// The canonical order of attention's sums (docs/design.md, "Canonical reduction order"), which prefill, decode and training
// share with ops/triton/attention.py, down to the last bit:
//
// - Keys are reduced in chunks of kCanonicalChunk, aligned at position 0, each on its own, and merged left to right.
// - Within a chunk the online softmax walks over units of canonical_unit keys. What weights are relative to moves only when
//   a unit's largest score exceeds it by more than kCanonicalSlack powers of two.
// - A row's total has eight lanes: lane r sums the weights of columns 8 i + r of a unit by a binary tree of neighbours over
//   i; at the end of a chunk the lanes are added by a binary tree of neighbours.
// - Scores and weighted values are chains of products over 16 elements or keys, which mma.sync and wgmma add alike.
//
// Every rounding is spelled out: a compiler that was free to fuse might do so in one kernel and not in another.
#pragma once

#include "hopper.cuh"

namespace mainspring {

#ifndef MAINSPRING_CHUNK
#define MAINSPRING_CHUNK 1024
#endif
constexpr int kCanonicalChunk = MAINSPRING_CHUNK;
constexpr float kCanonicalSlack = 8.0f;

// Keys of a unit: as many as registers hold scores of.
constexpr int canonical_unit(int head_dim) { return head_dim <= 128 ? 128 : 64; }

constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float finite_peak(float peak) { return peak == -INFINITY ? 0.0f : peak; }

// The division that Triton's `/` compiles to. (Its log2 is CUDA's own.)
__device__ __forceinline__ float divide(float a, float b) {
  float c;
  asm("div.full.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// cap tanh(x / cap) from the exponential: the unit's own tanh is off by 2^-11, which a large cap would multiply.
// in: 2 log2(e) scale / cap; out: log2(e) cap, so that the result is an exponent of two. Never NaN for finite scores.
__device__ __forceinline__ float capped(float score, float in, float out) {
  return __fmaf_rn(-2.0f * out, divide(1.0f, __fadd_rn(1.0f, exp2_approx(__fmul_rn(score, in)))), out);
}

// Of the sum of a row's exponentials, the natural logarithm.
__device__ __forceinline__ float log_sum(float peak, float total, float factor) {
  return __fmul_rn(__fmaf_rn(peak, factor, log2f(total)), kLn2);
}

// A chunk's state joins that of the chunks before it: by what either is multiplied.
struct Merge {
  float peak, before, now;
  __device__ __forceinline__ Merge(float earlier, float chunk, float factor) {
    peak = fmaxf(earlier, chunk);
    const float finite = finite_peak(peak);
    before = exp2_approx(__fmul_rn(__fsub_rn(earlier, finite), factor));
    now = exp2_approx(__fmul_rn(__fsub_rn(chunk, finite), factor));
  }
  __device__ __forceinline__ float operator()(float earlier, float chunk) const {
    return __fmaf_rn(earlier, before, __fmul_rn(chunk, now));
  }
};

}  // namespace mainspring
