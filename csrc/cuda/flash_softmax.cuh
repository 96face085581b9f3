// The online softmax of a warpgroup's 64 rows of scores, as wgmma leaves them in registers: a thread holds two rows,
// lane / 4 and lane / 4 + 8 of its warp's sixteen, and of each row columns 8 i + 2 (lane % 4) + {0, 1} (Milakov and
// Gimelshein 2018; Dao 2023).
#pragma once

#include "hopper.cuh"

namespace mainspring {

constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float max_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 1));
}
__device__ __forceinline__ float sum_of_quad(float x) {
  x = __fadd_rn(x, __shfl_xor_sync(~0u, x, 2));
  return __fadd_rn(x, __shfl_xor_sync(~0u, x, 1));
}

// The division and the logarithm that Triton's `/` and log2 compile to.
__device__ __forceinline__ float divide(float a, float b) {
  float c;
  asm("div.full.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// cap tanh(x / cap) from the exponential: the unit's own tanh is off by 2^-11, which a large cap would multiply.
// in: 2 log2(e) scale / cap; out: log2(e) cap, so that the result is an exponent of two. Never NaN for finite scores.
__device__ __forceinline__ float capped(float score, float in, float out) {
  return __fmaf_rn(-2.0f * out, divide(1.0f, __fadd_rn(1.0f, exp2_approx(__fmul_rn(score, in)))), out);
}

// Which columns of a block a thread's two rows see: low[j] <= 8 i + l < high[j], the thread's own column shift taken off.
struct SeenColumns {
  int low[2], high[2];
};

template <bool Windowed, int N>
__device__ __forceinline__ void mask_scores(float (&s)[N], const SeenColumns& seen) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int l = 0; l < 2; ++l) {
        const int column = 8 * i + l;
        const bool unseen = column >= seen.high[j] || (Windowed && column < seen.low[j]);
        if (unseen) s[4 * i + 2 * j + l] = -INFINITY;
      }
    }
  }
}

// The state of a thread's two rows: scores so far lie at most `slack` (in powers of two) above `peak`, and `total` is
// this thread's share of sum 2^(factor (score - peak)).
struct RowState {
  float peak[2], total[2];
  __device__ __forceinline__ void reset() {
    peak[0] = peak[1] = -INFINITY;
    total[0] = total[1] = 0.0f;
  }
};

__device__ __forceinline__ float finite_peak(float peak) { return peak == -INFINITY ? 0.0f : peak; }

// What a thread has of a row are `Pairs` pairs of neighbouring columns, four elements apart, the first at s[First]. Each
// score s becomes its weight, 2^(factor s + shift); returns the sum by a binary tree of neighbours, as in all kernels of
// the canonical order.
template <int First, int Pairs, int N>
__device__ __forceinline__ float weigh_in_order(float (&s)[N], float factor, float shift) {
  if constexpr (Pairs == 1) {
    s[First] = exp2_approx(__fmaf_rn(s[First], factor, shift));
    s[First + 1] = exp2_approx(__fmaf_rn(s[First + 1], factor, shift));
    return __fadd_rn(s[First], s[First + 1]);
  } else {
    const float left = weigh_in_order<First, Pairs / 2>(s, factor, shift);
    return __fadd_rn(left, weigh_in_order<First + 2 * Pairs, Pairs / 2>(s, factor, shift));
  }
}
// The same in two chains, for which fewer registers do.
template <int First, int Pairs, int N>
__device__ __forceinline__ float weigh(float (&s)[N], float factor, float shift) {
  float sum[2] = {};
#pragma unroll
  for (int i = 0; i < Pairs; ++i) {
#pragma unroll
    for (int l = 0; l < 2; ++l) {
      float& x = s[First + 4 * i + l];
      x = exp2_approx(__fmaf_rn(x, factor, shift));
      sum[l] += x;
    }
  }
  return sum[0] + sum[1];
}

// Scores to weights in place, of the Columns that begin at column First; rescale[j] is what sums over earlier keys are
// to be multiplied by, exactly 1 where the peak stayed. The peak stays while no score exceeds it by more than `slack`
// powers of two: weights up to 2^slack lose no precision, and rescaling the output becomes rare. Whether it stays depends
// on the row alone. Every rounding is spelled out, as in the Triton kernel.
template <bool Masked, bool InOrder, int First, int Columns, int Row, int N>
__device__ __forceinline__ void online_softmax_row(float (&s)[N], float& peak, float& total, float& rescale, float factor,
                                                   float slack) {
  constexpr int kFirst = First / 2 + 2 * Row;  // element
  float top[2];
#pragma unroll
  for (int i = 0; i < Columns / 8; ++i) {
    const float a = s[kFirst + 4 * i], b = s[kFirst + 4 * i + 1];
    top[i % 2] = i < 2 ? fmaxf(a, b) : fmaxf(fmaxf(top[i % 2], a), b);
  }
  const float highest = max_of_quad(fmaxf(top[0], top[1])), before = peak;
  // At the first key `before` is -inf and the difference +inf (or NaN if there still is no key: then it stays).
  peak = __fmul_rn(__fsub_rn(highest, before), factor) > slack ? highest : before;
  const float finite = Masked ? finite_peak(peak) : peak;
  rescale = exp2_approx(__fmul_rn(__fsub_rn(before, finite), factor));
  const float shift = -__fmul_rn(finite, factor);
  float sum;
  if constexpr (InOrder) {
    sum = weigh_in_order<kFirst, Columns / 8>(s, factor, shift);
  } else {
    sum = weigh<kFirst, Columns / 8>(s, factor, shift);
  }
  total = __fmaf_rn(total, rescale, sum);
}
template <bool Masked, bool InOrder, int First, int Columns, int N>
__device__ __forceinline__ void online_softmax(float (&s)[N], RowState& state, float (&rescale)[2], float factor,
                                               float slack) {
  online_softmax_row<Masked, InOrder, First, Columns, 0>(s, state.peak[0], state.total[0], rescale[0], factor,
                                                                  slack);
  online_softmax_row<Masked, InOrder, First, Columns, 1>(s, state.peak[1], state.total[1], rescale[1], factor,
                                                                  slack);
}

// Merges a chunk's sums `part` and their state into those of the chunks before it (none at first), which lie in shared
// memory. whole: this thread's column of sums, quadruples 128 apart; states: peak and total of its rows, 8 apart (the four
// threads of a row write the same). At the last chunk the result is left in `part` and `chunk`.
template <int N>
__device__ __forceinline__ void merge_chunk(float4* whole, float2* states, bool first, bool last, float (&part)[N], RowState& chunk,
                                            float factor) {
  float before[2], now[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float2 merged = first ? make_float2(-INFINITY, 0.0f) : states[8 * j];
    const float peak = fmaxf(merged.x, chunk.peak[j]), finite = finite_peak(peak);
    before[j] = exp2_approx(__fmul_rn(__fsub_rn(merged.x, finite), factor));
    now[j] = exp2_approx(__fmul_rn(__fsub_rn(chunk.peak[j], finite), factor));
    merged = make_float2(peak, __fmaf_rn(merged.y, before[j], __fmul_rn(sum_of_quad(chunk.total[j]), now[j])));
    if (last) {
      chunk.peak[j] = merged.x, chunk.total[j] = merged.y;
    } else {
      states[8 * j] = merged;
    }
  }
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    float4 w = first ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : whole[i * 32];
    w.x = __fmaf_rn(w.x, before[0], __fmul_rn(part[i], now[0]));
    w.y = __fmaf_rn(w.y, before[0], __fmul_rn(part[i + 1], now[0]));
    w.z = __fmaf_rn(w.z, before[1], __fmul_rn(part[i + 2], now[1]));
    w.w = __fmaf_rn(w.w, before[1], __fmul_rn(part[i + 3], now[1]));
    if (!last) {
      whole[i * 32] = w;
      w = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    part[i] = w.x, part[i + 1] = w.y, part[i + 2] = w.z, part[i + 3] = w.w;
  }
}

}  // namespace mainspring
