// RMSNorm, alone or after adding the residual, with the roundings of Hugging Face's Llama.
#include <math.h>

#include "kernels.h"
#include "simd.h"
#include "thread_pool.h"

namespace mainspring::MAINSPRING_ISA {
namespace {

// Vector i of the row goes to accumulator i % 4; the four are joined pairwise, then the lanes.
template <class T>
float sum_of_squares(const T* row, int64_t h) {
  vf acc[4] = {zero(), zero(), zero(), zero()};
  int which = 0;
  for_lanes(h, [&](int64_t i, int lanes) {
    const vf v = load_lanes(row + i, lanes);
    acc[which] = fma(v, v, acc[which]);
    which = (which + 1) & 3;
  });
  return sum_lanes(add(add(acc[0], acc[2]), add(acc[1], acc[3])));
}

// The value as it reads after a store in T.
MS_INLINE vf rounded(vf v, const float*) { return v; }
MS_INLINE vf rounded(vf v, const bf16*) {
  bf16 lanes[kLanes];
  store(lanes, v);
  return load(lanes);
}

template <class T>
void normalize_row(const T* row, const T* weight, T* out, int64_t h, float eps) {
  const float mean = sum_of_squares(row, h) / static_cast<float>(h);
  const vf scale = all(1.0f / sqrtf(mean + eps));
  for_lanes(h, [&](int64_t i, int lanes) {
    const vf normed = rounded(mul(load_lanes(row + i, lanes), scale), row);
    store_lanes(out + i, mul(normed, load_lanes(weight + i, lanes)), lanes);
  });
}

template <class T>
void rms_norm_rows(const ms_rms_norm_args& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  T* sum = static_cast<T*>(a.residual_out);
  T* out = static_cast<T*>(a.out);
  constexpr int64_t kGrain = 32 * 1024;  // elements that make a task worth its hand-over
  parallel_ranges(a.outer * a.inner, kGrain / max_of(1, a.h), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* row = x + r / a.inner * a.x_outer_stride + r % a.inner * a.x_inner_stride;
      if (residual != nullptr) {
        for_lanes(a.h, [&](int64_t i, int lanes) {
          const vf v = add(load_lanes(row + i, lanes), load_lanes(residual + r * a.h + i, lanes));
          store_lanes(sum + r * a.h + i, v, lanes);
        });
        row = sum + r * a.h;
      }
      normalize_row(row, static_cast<const T*>(a.weight), out + r * a.h, a.h, a.eps);
    }
  });
}

}  // namespace

void rms_norm(const ms_rms_norm_args& a) {
  if (a.h == 0) return;
  if (a.dtype == MS_FLOAT32) return rms_norm_rows<float>(a);
  rms_norm_rows<bf16>(a);
}

}  // namespace mainspring::MAINSPRING_ISA
