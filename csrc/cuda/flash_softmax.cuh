// The online softmax of a warpgroup's 64 rows of scores, as wgmma leaves them in registers: a thread holds two rows,
// lane / 4 and lane / 4 + 8 of its warp's sixteen, and of each row columns 8 i + 2 (lane % 4) + {0, 1} (Milakov and
// Gimelshein 2018; Dao 2023).
#pragma once

#include "hopper.cuh"

namespace mainspring {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float max_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float sum_of_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// 2^x without the special-function unit, which the exponentials of small heads keep busier than the tensor cores:
// x = n + f with |f| <= 1/2, 2^f by a polynomial (relative error 7.5e-5 at degree 3, 2.6e-6 at degree 4), n added to the
// exponent. For finite x below 127; below -126 it stays at 2^-126.
template <int Degree>
__device__ __forceinline__ float exp2_polynomial(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the nearest integer
  x = fmaxf(x, -126.0f);
  const float shifted = x + kRound;
  const float f = x - (shifted - kRound);
  float y;
  if constexpr (Degree == 3) {
    y = fmaf(0.055171494f, f, 0.242610938f);
    y = fmaf(y, f, 0.693260994f);
    y = fmaf(y, f, 0.999928085f);
  } else {
    y = fmaf(0.009570086f, f, 0.055917851f);
    y = fmaf(y, f, 0.240247451f);
    y = fmaf(y, f, 0.693121816f);
    y = fmaf(y, f, 0.999999261f);
  }
  return __int_as_float(__float_as_int(y) + (__float_as_int(shifted) << 23));
}

// tanh from the exponential: the unit's own tanh is off by 2^-11, which a large cap would multiply.
__device__ __forceinline__ float tanh_by_exp2(float x) {
  const float e = exp2_approx(fminf(x * (2.0f * kLog2E), 80.0f));
  return 1.0f - __fdividef(2.0f, e + 1.0f);
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

// Exponentials stay above a wait that follows: the assembler would move them below it, where nothing overlaps them. It
// keeps the order of this instruction and a wait, and this one, which is never executed, depends on every weight.
__device__ __forceinline__ void pin_before_wait(const RowState& state) {
  asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p nanosleep.u32 0;\n}" ::"f"(state.total[0] +
                                                                                            state.total[1])
               : "memory");
}

// Scores to weights in place; rescale[j] is what sums over earlier keys are to be multiplied by, exactly 1 where the
// peak stayed. The peak stays while no score exceeds it by more than `slack` powers of two: weights up to 2^slack lose
// no precision, and rescaling the output becomes rare. Whether it stays depends on the row alone.
template <bool Masked, int Emulated, int Degree, int N>
__device__ __forceinline__ void online_softmax(float (&s)[N], RowState& state, float (&rescale)[2], float factor,
                                               float slack) {
  float top[2][2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    top[j][0] = fmaxf(s[2 * j], s[2 * j + 1]);
    top[j][1] = fmaxf(s[4 + 2 * j], s[4 + 2 * j + 1]);
  }
#pragma unroll
  for (int i = 2; i < N / 4; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      top[j][i % 2] = fmaxf(top[j][i % 2], s[4 * i + 2 * j]);
      top[j][i % 2] = fmaxf(top[j][i % 2], s[4 * i + 2 * j + 1]);
    }
  }
  float offset[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float before = state.peak[j];
    const float highest = fmaxf(before, max_of_quad(fmaxf(top[j][0], top[j][1])));
    // At the first key `before` is -inf and the difference +inf (or NaN if there still is no key: then it stays).
    const float peak = (highest - before) * factor > slack ? highest : before;
    state.peak[j] = peak;
    const float finite = Masked && peak == -INFINITY ? 0.0f : peak;
    offset[j] = finite * factor;
    rescale[j] = exp2_approx((before - finite) * factor);
  }
  float sum[2][2] = {};
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int l = 0; l < 2; ++l) {
        float& x = s[4 * i + 2 * j + l];
        x = fmaf(x, factor, -offset[j]);
        const bool emulate = !Masked && Emulated > 0 && (2 * i + l) % 8 < Emulated;
        x = emulate ? exp2_polynomial<Degree>(x) : exp2_approx(x);
        sum[j][l] += x;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) state.total[j] = fmaf(state.total[j], rescale[j], sum[j][0] + sum[j][1]);
}

}  // namespace mainspring
