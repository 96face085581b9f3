// Vectors of float32 lanes for the instruction set that this file is being compiled for.
//
// Every kernel is written once with the names below. A lane is always computed by the same instructions,
// in full vectors and in masked tails, so a value's bits do not depend on where it falls in a vector.
//
//   vf, kLanes                  a vector of kLanes floats
//   load, load_n, store, store_n   float or bf16 in memory; _n: the first n lanes, others read as 0
//   fma(a, b, c)                a b + c (two roundings where the hardware has no fma)
//   vmax(a, b)                  b where either is NaN
//   select_range(v, first, lo, hi, other)   lane i keeps v where lo <= first + i < hi
//   select_less(a, b, yes, no)  yes where a < b
//   scale_by_power(v, n)        v 2^n for integral n, rounding to subnormals, zero or infinity
//   sum_lanes, max_lanes        one fixed tree
//   transpose(r)                of kLanes vectors as a square
//
// Sources here are compiled with wide instructions: they must not emit functions that the linker could
// merge with those of other sources. So: everything in this namespace, and no std:: templates.
#pragma once

#include <stdint.h>
#include <string.h>

#define MS_INLINE inline __attribute__((always_inline))

namespace mainspring::MAINSPRING_ISA {

struct bf16 {
  uint16_t bits;
};

MS_INLINE float to_float(float x) { return x; }
MS_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

MS_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
MS_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace mainspring::MAINSPRING_ISA

#if defined(MAINSPRING_AVX512)
#include "simd_avx512.h"
#elif defined(MAINSPRING_AVX2)
#include "simd_avx2.h"
#else
#include "simd_base.h"
#endif

namespace mainspring::MAINSPRING_ISA {

// Sets of whole vectors that a tail may end: body(offset, lanes) with lanes == kLanes but for the last.
template <class Body>
MS_INLINE void for_lanes(int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, kLanes);
  if (i < count) body(i, static_cast<int>(count - i));
}

template <class T>
MS_INLINE vf load_lanes(const T* p, int lanes) {
  return lanes == kLanes ? load(p) : load_n(p, lanes);
}
template <class T>
MS_INLINE void store_lanes(T* p, vf v, int lanes) {
  if (lanes == kLanes) return store(p, v);
  store_n(p, v, lanes);
}

#if !defined(MAINSPRING_AVX512) && !defined(MAINSPRING_AVX2)
MS_INLINE void transpose(vf (&r)[kLanes]) {
  float from[kLanes][kLanes], to[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) store(from[i], r[i]);
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) to[j][i] = from[i][j];
  for (int i = 0; i < kLanes; ++i) r[i] = load(to[i]);
}
#endif

}  // namespace mainspring::MAINSPRING_ISA
