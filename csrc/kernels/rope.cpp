// Rotary position embedding of queries and keys, in place (half-split convention of Hugging Face).
#include "kernels.h"
#include "simd.h"
#include "thread_pool.h"

namespace mainspring::MAINSPRING_ISA {
namespace {

template <class T>
MS_INLINE void rotate_head(T* head, const float* cos, const float* sin, int64_t half) {
  for_lanes(half, [&](int64_t i, int lanes) {
    const vf x1 = load_lanes(head + i, lanes), x2 = load_lanes(head + half + i, lanes);
    const vf c = load_lanes(cos + i, lanes), s = load_lanes(sin + i, lanes);
    store_lanes(head + i, sub(mul(x1, c), mul(x2, s)), lanes);
    store_lanes(head + half + i, add(mul(x2, c), mul(x1, s)), lanes);
  });
}

template <class T>
void rope_tokens(const ms_rope_args& a) {
  T* q = static_cast<T*>(a.q);
  T* k = static_cast<T*>(a.k);
  constexpr int64_t kGrain = 16 * 1024;  // elements that make a task worth its hand-over
  const int64_t token_size = max_of(1, (a.q_heads + a.k_heads) * a.half * 2);
  parallel_ranges(a.t, kGrain / token_size, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* cos = a.cos + t * a.half;
      const float* sin = a.sin + t * a.half;
      for (int64_t h = 0; h < a.q_heads; ++h) rotate_head(q + t * a.q_stride + h * 2 * a.half, cos, sin, a.half);
      for (int64_t h = 0; h < a.k_heads; ++h) rotate_head(k + t * a.k_stride + h * 2 * a.half, cos, sin, a.half);
    }
  });
}

}  // namespace

void rope(const ms_rope_args& a) {
  if (a.dtype == MS_FLOAT32) return rope_tokens<float>(a);
  rope_tokens<bf16>(a);
}

}  // namespace mainspring::MAINSPRING_ISA
