// 16 lanes: AVX-512 F, BW, DQ, VL; bfloat16 dot products where the processor has them (MAINSPRING_BF16).
#pragma once

#include <immintrin.h>

namespace mainspring::MAINSPRING_ISA {

using vf = __m512;
constexpr int kLanes = 16;

MS_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }

MS_INLINE vf zero() { return _mm512_setzero_ps(); }
MS_INLINE vf all(float x) { return _mm512_set1_ps(x); }
MS_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
MS_INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
MS_INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
MS_INLINE vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
MS_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
MS_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
MS_INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }

MS_INLINE vf widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
MS_INLINE __m256i narrow(vf v) {
#ifdef MAINSPRING_BF16
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16));
#endif
}

MS_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
MS_INLINE vf load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
MS_INLINE void store(float* p, vf v) { _mm512_storeu_ps(p, v); }
MS_INLINE void store_n(float* p, vf v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
MS_INLINE vf load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
MS_INLINE vf load_n(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
MS_INLINE void store(bf16* p, vf v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
MS_INLINE void store_n(bf16* p, vf v, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(v)); }

MS_INLINE vf select_range(vf v, int64_t first, int64_t lo, int64_t hi, vf other) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 keep = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(static_cast<int>(lo - first))) &
                         _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(static_cast<int>(hi - first)));
  return _mm512_mask_blend_ps(keep, other, v);
}
MS_INLINE vf select_less(vf a, vf b, vf yes, vf no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
MS_INLINE vf scale_by_power(vf v, vf n) { return _mm512_scalef_ps(v, n); }

MS_INLINE void transpose(vf (&r)[16]) {
  vf t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  auto low = [](vf a, vf b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  auto high = [](vf a, vf b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  for (int i = 0; i < 16; i += 4) {  // now r[i + c], part p: column 4 p + c of rows i..i + 3
    r[i] = low(t[i], t[i + 2]);
    r[i + 1] = high(t[i], t[i + 2]);
    r[i + 2] = low(t[i + 1], t[i + 3]);
    r[i + 3] = high(t[i + 1], t[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {  // a 4 x 4 transpose of 128-bit parts for each c
    const vf ab_even = _mm512_shuffle_f32x4(r[c], r[c + 4], 0x88), ab_odd = _mm512_shuffle_f32x4(r[c], r[c + 4], 0xdd);
    const vf cd_even = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0x88);
    const vf cd_odd = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0xdd);
    t[c] = _mm512_shuffle_f32x4(ab_even, cd_even, 0x88);
    t[c + 8] = _mm512_shuffle_f32x4(ab_even, cd_even, 0xdd);
    t[c + 4] = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0x88);
    t[c + 12] = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// The four 128-bit parts of the result hold, for a, b, c and d in turn, four partial sums (lane l: l + 8 joined with l + 4).
MS_INLINE vf fold4(vf a, vf b, vf c, vf d) {
  const vf ab = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const vf cd = add(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  return add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}

// Lane sums of 16 vectors at once; v[r][c] lands in lane 4 r + c. Each sum is the tree of sum_lanes.
MS_INLINE vf sum_lanes_4x4(const vf (&v)[4][4]) {
  vf part[4];
  for (int c = 0; c < 4; ++c) part[c] = fold4(v[0][c], v[1][c], v[2][c], v[3][c]);
  auto pairs = [](vf a, vf b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  };
  const vf low = pairs(part[0], part[1]), high = pairs(part[2], part[3]);
  return add(_mm512_shuffle_ps(low, high, 0x88), _mm512_shuffle_ps(low, high, 0xdd));
}

MS_INLINE float sum_lanes(vf v) {
  const vf halves = add(v, _mm512_shuffle_f32x4(v, v, 0x4e));
  const __m128 four = _mm_add_ps(_mm512_castps512_ps128(halves), _mm512_extractf32x4_ps(halves, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
MS_INLINE float max_lanes(vf v) { return _mm512_reduce_max_ps(v); }

}  // namespace mainspring::MAINSPRING_ISA
