// silu(gate) * up on the fused output of the gate and up projections.
#include "exp.h"
#include "kernels.h"
#include "simd.h"
#include "thread_pool.h"

namespace mainspring::MAINSPRING_ISA {
namespace {

template <class T>
void swiglu_rows(const ms_swiglu_args& a) {
  const T* gate_up = static_cast<const T*>(a.gate_up);
  T* out = static_cast<T*>(a.out);
  constexpr int64_t kGrain = 8 * 1024;  // elements that make a task worth its hand-over
  parallel_ranges(a.m, kGrain / max_of(1, a.i), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* gate = gate_up + r * a.stride;
      for_lanes(a.i, [&](int64_t i, int lanes) {
        const vf g = load_lanes(gate + i, lanes);
        const vf silu = div(g, add(all(1.0f), exp(sub(zero(), g))));
        store_lanes(out + r * a.i + i, mul(silu, load_lanes(gate + a.i + i, lanes)), lanes);
      });
    }
  });
}

}  // namespace

void swiglu(const ms_swiglu_args& a) {
  if (a.dtype == MS_FLOAT32) return swiglu_rows<float>(a);
  swiglu_rows<bf16>(a);
}

}  // namespace mainspring::MAINSPRING_ISA
