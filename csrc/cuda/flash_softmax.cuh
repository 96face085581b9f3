// The online softmax of a warpgroup's 64 rows of scores, as wgmma leaves them in registers: a thread holds two rows,
// lane / 4 and lane / 4 + 8 of its warp's sixteen, and of each row columns 8 i + 2 (lane % 4) + {0, 1} (Milakov and
// Gimelshein 2018; Dao 2023).
#pragma once

#include "canonical.cuh"

#include <type_traits>

namespace mainspring {

__device__ __forceinline__ float max_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 1));
}
// By a binary tree of neighbours.
__device__ __forceinline__ float sum_of_quad(float x) {
  x = __fadd_rn(x, __shfl_xor_sync(~0u, x, 1));
  return __fadd_rn(x, __shfl_xor_sync(~0u, x, 2));
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
// this thread's share of sum 2^(factor (score - peak)): in canonical order that of even columns and that of odd ones, the
// thread's two lanes of the total.
template <bool InOrder>
struct RowState {
  static constexpr int kLanes = InOrder ? 2 : 1;
  float peak[2], total[2][kLanes];
  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      peak[j] = -INFINITY;
#pragma unroll
      for (int l = 0; l < kLanes; ++l) total[j][l] = 0.0f;
    }
  }
  // Of row j, in all threads of a quad.
  __device__ __forceinline__ float whole_total(int j) const {
    return sum_of_quad(InOrder ? __fadd_rn(total[j][0], total[j][kLanes - 1]) : total[j][0]);
  }
};

// What a thread has of a row are `Pairs` pairs of neighbouring columns, four elements apart, the first at s[First]. Each
// score s becomes its weight, 2^(factor s + shift); returns the sums of even and of odd columns by binary trees of
// neighbours.
template <int First, int Pairs, int N>
__device__ __forceinline__ float2 weigh_in_order(float (&s)[N], float factor, float shift) {
  if constexpr (Pairs == 1) {
    s[First] = exp2_approx(__fmaf_rn(s[First], factor, shift));
    s[First + 1] = exp2_approx(__fmaf_rn(s[First + 1], factor, shift));
    return make_float2(s[First], s[First + 1]);
  } else {
    const float2 left = weigh_in_order<First, Pairs / 2>(s, factor, shift);
    const float2 right = weigh_in_order<First + 2 * Pairs, Pairs / 2>(s, factor, shift);
    return make_float2(__fadd_rn(left.x, right.x), __fadd_rn(left.y, right.y));
  }
}
// The same in two chains, for which fewer registers do.
template <int First, int Pairs, int N>
__device__ __forceinline__ float2 weigh(float (&s)[N], float factor, float shift) {
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
  return make_float2(sum[0], sum[1]);
}

// Scores to weights in place; rescale[j] is what sums over earlier keys are to be multiplied by, exactly 1 where the peak
// stayed. The peak stays while no score exceeds it by more than `slack` powers of two: weights up to 2^slack lose no
// precision, and rescaling the output becomes rare. Whether it stays depends on the row alone.
// Returns whether any row's peak of the warp moved. Both rows come to their peaks before either is weighed, so that their
// chains of maxima and shuffles run side by side; the assembler would take one row after the other but for the branch.
template <bool Masked, bool InOrder, int N>
__device__ __forceinline__ bool online_softmax(float (&s)[N], RowState<InOrder>& state, float (&rescale)[2], float factor,
                                               float slack) {
  constexpr int kPairs = N / 4;
  float top[2][2], highest[2], shift[2];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float a = s[2 * j + 4 * i], b = s[2 * j + 4 * i + 1];
      top[j][i % 2] = i < 2 ? fmaxf(a, b) : fmaxf(fmaxf(top[j][i % 2], a), b);
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) highest[j] = fmaxf(top[j][0], top[j][1]);
#pragma unroll
  for (int distance = 2; distance > 0; distance /= 2) {
    float other[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) other[j] = __shfl_xor_sync(~0u, highest[j], distance);
#pragma unroll
    for (int j = 0; j < 2; ++j) highest[j] = fmaxf(highest[j], other[j]);
  }
  // At the first key the peak is -inf and the difference +inf (or NaN if there still is no key: then it stays).
  bool grows[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) grows[j] = __fmul_rn(__fsub_rn(highest[j], state.peak[j]), factor) > slack;
  const bool grew = __any_sync(~0u, grows[0] || grows[1]);
  rescale[0] = rescale[1] = 1.0f;
  if (grew) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float before = state.peak[j];
      if (grows[j]) state.peak[j] = highest[j];
      const float finite = Masked ? finite_peak(state.peak[j]) : state.peak[j];
      rescale[j] = exp2_approx(__fmul_rn(__fsub_rn(before, finite), factor));
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) shift[j] = -__fmul_rn(Masked ? finite_peak(state.peak[j]) : state.peak[j], factor);
  const auto add_row = [&](auto row) {
    constexpr int j = decltype(row)::value;
    float(&total)[RowState<InOrder>::kLanes] = state.total[j];
    if constexpr (InOrder) {
      const float2 sums = weigh_in_order<2 * j, kPairs>(s, factor, shift[j]);
      total[0] = __fmaf_rn(total[0], rescale[j], sums.x);
      total[1] = __fmaf_rn(total[1], rescale[j], sums.y);
    } else {
      const float2 sums = weigh<2 * j, kPairs>(s, factor, shift[j]);
      total[0] = __fmaf_rn(total[0], rescale[j], sums.x + sums.y);
    }
  };
  add_row(std::integral_constant<int, 0>());
  add_row(std::integral_constant<int, 1>());
  return grew;
}

// The sums and states of the chunks merged so far, in shared memory. sums: this thread's column of them, quadruples 128
// apart; states: peak and total of its rows, 8 apart (the four threads of a row write the same).
struct MergedChunks {
  float4* sums;
  float2* states;
  bool none;

  // Merges a chunk's sums `part` and their state. Of the last chunk `part` becomes the whole sums, with peak and total.
  template <bool Last, bool InOrder, int N>
  __device__ __forceinline__ void add(float (&part)[N], const RowState<InOrder>& chunk, float factor, float (&peak)[2],
                                      float (&total)[2]) {
    if (!Last && none) {  // + 0: as merging does to -0
      none = false;
#pragma unroll
      for (int j = 0; j < 2; ++j) states[8 * j] = make_float2(chunk.peak[j], chunk.whole_total(j));
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        sums[i * 32] = make_float4(__fadd_rn(part[i], 0.0f), __fadd_rn(part[i + 1], 0.0f), __fadd_rn(part[i + 2], 0.0f),
                                   __fadd_rn(part[i + 3], 0.0f));
      }
      return;
    }
    const auto merge_row = [&](int j) {
      const float2 merged = states[8 * j];
      const Merge merge(merged.x, chunk.peak[j], factor);
      peak[j] = merge.peak;
      total[j] = merge(merged.y, chunk.whole_total(j));
      if (!Last) states[8 * j] = make_float2(peak[j], total[j]);
      return merge;
    };
    const Merge upper = merge_row(0), lower = merge_row(1);
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      float4 w = sums[i * 32];
      w = make_float4(upper(w.x, part[i]), upper(w.y, part[i + 1]), lower(w.z, part[i + 2]), lower(w.w, part[i + 3]));
      if (Last) {
        part[i] = w.x, part[i + 1] = w.y, part[i + 2] = w.z, part[i + 3] = w.w;
      } else {
        sums[i * 32] = w;
      }
    }
  }
};

}  // namespace mainspring
