// Operands of attention's two products, packed so that the inner loops read whole vectors.
//
// A packed operand is made of 32-bit units: one value as float32, or, where the processor multiplies pairs
// of bfloat16, a pair (two neighbouring dims of a key, or one dim of two neighbouring keys).
#pragma once

#include "kernels.h"
#include "simd.h"

namespace mainspring::MAINSPRING_ISA {

constexpr int kChunk = MS_ATTENTION_CHUNK;

template <class T>
struct Packed {
  using Unit = float;
  static constexpr int kValues = 1;  // values in a unit

  static MS_INLINE vf load_units(const T* row, int n) { return load_lanes(row, n); }
  static MS_INLINE vf join_keys(const T* const* rows, int64_t i, int n) {
    return rows[0] == nullptr ? zero() : load_lanes(rows[0] + i, n);
  }
  static MS_INLINE void store_probs(Unit* p, vf probs) { store(p, probs); }
  // acc + one * many, lane by lane
  static MS_INLINE vf step(vf acc, const Unit* one, vf many) { return fma(all(*one), many, acc); }
};

#ifdef MAINSPRING_BF16
template <>
struct Packed<bf16> {
  using Unit = float;  // 32 bits that are only ever moved and handed to the dot product
  static constexpr int kValues = 2;

  static MS_INLINE vf load_units(const bf16* row, int n) { return load_lanes(reinterpret_cast<const float*>(row), n); }
  static MS_INLINE vf join_keys(const bf16* const* rows, int64_t i, int n) {
    auto half = [&](const bf16* row) {
      return row == nullptr ? _mm512_setzero_si512()
                            : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), row + i));
    };
    return _mm512_castsi512_ps(_mm512_or_si512(half(rows[0]), _mm512_slli_epi32(half(rows[1]), 16)));
  }
  // The probabilities are rounded to bfloat16; their sum is taken before.
  static MS_INLINE void store_probs(Unit* p, vf probs) { store(reinterpret_cast<bf16*>(p), probs); }
  static MS_INLINE vf step(vf acc, const Unit* one, vf many) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(all(*one)), (__m512bh)_mm512_castps_si512(many));
  }
};
#endif

// One query: d values as units.
template <class T>
MS_INLINE void pack_query(const T* row, int64_t d, float* out) {
  using P = Packed<T>;
  for_lanes(d / P::kValues, [&](int64_t i, int n) { store_lanes(out + i, P::load_units(row + i * P::kValues, n), n); });
}

// Rows lie scattered, a few lines each: the hardware's prefetchers do not see the pattern.
template <class T>
MS_INLINE void prefetch_rows(const T* const* rows, int64_t begin, int64_t end, int64_t d) {
  for (int64_t key = begin; key < end; ++key)
    for (int64_t byte = 0; byte < d * static_cast<int64_t>(sizeof(T)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(rows[key]) + byte);
}

// Keys begin..end of a chunk, transposed: out[unit][key], a row of kChunk keys for each unit of d. `begin` and
// `end` are multiples of kLanes; a null row packs as zeros.
template <class T>
void pack_keys(const T* const* rows, int begin, int end, int64_t d, float* out) {
  using P = Packed<T>;
  for (int key = begin; key < end; key += kLanes) {
    prefetch_rows(rows, key + kLanes, min_of(key + 2 * kLanes, end), d);
    for_lanes(d / P::kValues, [&](int64_t i, int n) {
      vf square[kLanes];
      for (int j = 0; j < kLanes; ++j)
        square[j] = rows[key + j] == nullptr ? zero() : P::load_units(rows[key + j] + i * P::kValues, n);
      transpose(square);
      for (int u = 0; u < n; ++u) store(out + (i + u) * kChunk + key, square[u]);
    });
  }
}

// Values of keys begin..end of a chunk: out[key / kValues][dim], rows of `stride` units, dims past d as zeros.
template <class T>
void pack_values(const T* const* rows, int begin, int end, int64_t d, int64_t stride, float* out) {
  using P = Packed<T>;
  for (int key = begin / P::kValues * P::kValues; key < end; key += P::kValues) {
    prefetch_rows(rows, key + 8 * P::kValues, min_of(key + 9 * P::kValues, end), d);
    for_lanes(d, [&](int64_t i, int n) { store(out + key / P::kValues * stride + i, P::join_keys(rows + key, i, n)); });
  }
}

}  // namespace mainspring::MAINSPRING_ISA
