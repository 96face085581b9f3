// 8 lanes: AVX2 and FMA.
#pragma once

#include <immintrin.h>

namespace mainspring::MAINSPRING_ISA {

using vf = __m256;
constexpr int kLanes = 8;

MS_INLINE __m256i lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
MS_INLINE __m256i first_lanes(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane_numbers()); }

MS_INLINE vf zero() { return _mm256_setzero_ps(); }
MS_INLINE vf all(float x) { return _mm256_set1_ps(x); }
MS_INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
MS_INLINE vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
MS_INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
MS_INLINE vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
MS_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
MS_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
MS_INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }

MS_INLINE vf widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
MS_INLINE __m128i narrow(vf v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

MS_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
MS_INLINE vf load_n(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
MS_INLINE void store(float* p, vf v) { _mm256_storeu_ps(p, v); }
MS_INLINE void store_n(float* p, vf v, int n) { _mm256_maskstore_ps(p, first_lanes(n), v); }
MS_INLINE vf load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
MS_INLINE vf load_n(const bf16* p, int n) {
  bf16 lanes[kLanes] = {};
  memcpy(lanes, p, sizeof(bf16) * static_cast<size_t>(n));
  return load(lanes);
}
MS_INLINE void store(bf16* p, vf v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v)); }
MS_INLINE void store_n(bf16* p, vf v, int n) {
  bf16 lanes[kLanes];
  store(lanes, v);
  memcpy(p, lanes, sizeof(bf16) * static_cast<size_t>(n));
}

MS_INLINE vf select_range(vf v, int64_t first, int64_t lo, int64_t hi, vf other) {
  const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(lo - first)), lane_numbers());
  const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(hi - first)), lane_numbers());
  return _mm256_blendv_ps(other, v, _mm256_castsi256_ps(_mm256_andnot_si256(below, inside)));
}
MS_INLINE vf select_less(vf a, vf b, vf yes, vf no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
MS_INLINE vf scale_by_power(vf v, vf n) {
  // In two halves, so that a power below the smallest normal one still rounds correctly.
  const __m256i power = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(power, 1);
  auto exact = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  return mul(mul(v, exact(half)), exact(_mm256_sub_epi32(power, half)));
}

MS_INLINE void transpose(vf (&r)[kLanes]) {
  vf pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
      quads[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

MS_INLINE float sum_lanes(vf v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
MS_INLINE float max_lanes(vf v) {
  float lanes[kLanes];
  store(lanes, v);
  float most = lanes[0];
  for (int i = 1; i < kLanes; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

}  // namespace mainspring::MAINSPRING_ISA
