// out = x wᵀ + bias with the weights as GGML quantises them and x rounded to int8, a block of 32 at a time.
//
// A block of x is q = round(x / d), d = max|x| / 127; a block of w is codes, a scale d and perhaps a minimum m (see
// quantised_pack.cpp for the layout). Their product is exact in integers; blocks are added in float32 from the first to
// the last. So an output's bits depend on its own row of x and of w alone, not on the tile, and where two instruction sets
// both have fma they agree.
#include "kernels.h"
#include "quantised.h"
#include "simd.h"
#include "thread_pool.h"

#ifdef __SSSE3__
#include <immintrin.h>
#endif

namespace mainspring::MAINSPRING_ISA {
namespace {

// Integers: kLanes sums of 32 bits, and as many groups of four codes.
#if defined(MAINSPRING_AVX512)
using vi = __m512i;
constexpr int kTileHeight = 8;
MS_INLINE vi int_all(int32_t x) { return _mm512_set1_epi32(x); }
MS_INLINE vi add_ints(vi a, vi b) { return _mm512_add_epi32(a, b); }
MS_INLINE vi load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
MS_INLINE vi low_codes(vi w) { return _mm512_and_si512(w, _mm512_set1_epi8(0x0f)); }
MS_INLINE vi high_codes(vi w) { return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(0x0f)); }
MS_INLINE vf to_floats(vi x) { return _mm512_cvtepi32_ps(x); }
MS_INLINE vf load_halves(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MS_INLINE vi store_codes(int8_t* to, vf x) {  // to the nearest integers, even ones of two
  const vi whole = _mm512_cvtps_epi32(x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(whole));
  return whole;
}
#ifdef MAINSPRING_VNNI
template <int bits>
MS_INLINE vi dot4(vi sum, vi codes, vi x) { return _mm512_dpbusd_epi32(sum, codes, x); }
#else
MS_INLINE vi dot4_small(vi sum, vi codes, vi x, int16_t factor) {  // codes below 128: pairs do not saturate
  return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, x), _mm512_set1_epi16(factor)));
}
template <int bits>
MS_INLINE vi dot4(vi sum, vi codes, vi x) {
  if constexpr (bits < 8) return dot4_small(sum, codes, x, 1);
  const vi top = _mm512_and_si512(_mm512_srli_epi16(codes, 7), _mm512_set1_epi8(1));
  return dot4_small(dot4_small(sum, _mm512_and_si512(codes, _mm512_set1_epi8(0x7f)), x, 1), top, x, 128);
}
#endif
#elif defined(MAINSPRING_AVX2)
using vi = __m256i;
constexpr int kTileHeight = 3;
MS_INLINE vi int_all(int32_t x) { return _mm256_set1_epi32(x); }
MS_INLINE vi add_ints(vi a, vi b) { return _mm256_add_epi32(a, b); }
MS_INLINE vi load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
MS_INLINE vi low_codes(vi w) { return _mm256_and_si256(w, _mm256_set1_epi8(0x0f)); }
MS_INLINE vi high_codes(vi w) { return _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi8(0x0f)); }
MS_INLINE vf to_floats(vi x) { return _mm256_cvtepi32_ps(x); }
MS_INLINE vi store_codes(int8_t* to, vf x) {  // to the nearest integers, even ones of two
  const vi whole = _mm256_cvtps_epi32(x);
  const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(pairs, pairs));
  return whole;
}
MS_INLINE vf load_halves(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
MS_INLINE vi dot4_small(vi sum, vi codes, vi x, int16_t factor) {  // codes below 128: pairs do not saturate
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(factor)));
}
template <int bits>
MS_INLINE vi dot4(vi sum, vi codes, vi x) {
  if constexpr (bits < 8) return dot4_small(sum, codes, x, 1);
  const vi top = _mm256_and_si256(_mm256_srli_epi16(codes, 7), _mm256_set1_epi8(1));
  return dot4_small(dot4_small(sum, _mm256_and_si256(codes, _mm256_set1_epi8(0x7f)), x, 1), top, x, 128);
}
#else
constexpr int kTileHeight = 2;
typedef uint8_t codes_t __attribute__((vector_size(16)));
MS_INLINE vi int_all(int32_t x) { return vi{x, x, x, x}; }
MS_INLINE vi add_ints(vi a, vi b) { return a + b; }
MS_INLINE codes_t load_codes(const uint8_t* p) {
  codes_t w;
  memcpy(&w, p, sizeof w);
  return w;
}
MS_INLINE codes_t low_codes(codes_t w) { return w & 0x0f; }
MS_INLINE codes_t high_codes(codes_t w) { return w >> 4; }
MS_INLINE vf to_floats(vi x) { return __builtin_convertvector(x, vf); }
MS_INLINE vi store_codes(int8_t* to, vf x) {  // to the nearest integers, even ones of two
  const vf whole = (x + 12582912.0f) - 12582912.0f;  // 1.5 2^23: what is behind the point is rounded away
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<int8_t>(whole[i]);
  return __builtin_convertvector(whole, vi);
}
MS_INLINE vf load_halves(const uint8_t* p) {
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(static_cast<uint16_t>(p[2 * i] | p[2 * i + 1] << 8));
  return v;
}
#ifdef __SSSE3__
MS_INLINE vi dot4_small(vi sum, codes_t codes, vi x, int16_t factor) {  // codes below 128: pairs do not saturate
  const __m128i pairs = _mm_maddubs_epi16((__m128i)codes, (__m128i)x);
  return sum + (vi)_mm_madd_epi16(pairs, _mm_set1_epi16(factor));
}
template <int bits>
MS_INLINE vi dot4(vi sum, codes_t codes, vi x) {
  if constexpr (bits < 8) return dot4_small(sum, codes, x, 1);
  return dot4_small(dot4_small(sum, codes & 0x7f, x, 1), codes >> 7, x, 128);
}
#else
template <int bits>
MS_INLINE vi dot4(vi sum, codes_t codes, vi x) {
  int8_t bytes[16];
  memcpy(bytes, &x, sizeof bytes);
  for (int i = 0; i < 16; ++i) sum[i / 4] += static_cast<int32_t>(codes[i]) * bytes[i];
  return sum;
}
#endif
#endif

// What one row of x needs of a block beside its codes.
struct BlockScale {
  float d;
  int32_t sum;  // of the codes
};

struct Rounded {  // x: codes [m, k], scales [m, k / 32]
  const int8_t* codes;
  const BlockScale* scales;
};

template <class T>
void round_row(const T* x, int64_t k, int8_t* codes, BlockScale* scales) {
  for (int64_t b = 0; b < k / kBlock; ++b) {
    float values[kBlock];
    vf most = zero();
    for (int i = 0; i < kBlock; i += kLanes) {
      const vf v = load(x + b * kBlock + i);
      store(values + i, v);
      most = vmax(most, vmax(v, sub(zero(), v)));
    }
    const float largest = max_lanes(most), d = largest / 127.0f;
    const vf inverse = all(d > 1e-37f ? 1.0f / d : 0.0f);
    vi total = int_all(0);
    for (int i = 0; i < kBlock; i += kLanes)
      total = add_ints(total, store_codes(codes + b * kBlock + i, mul(load(values + i), inverse)));
    alignas(64) int32_t parts[kLanes];
    memcpy(parts, &total, sizeof total);
    int32_t sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += parts[i];
    scales[b] = {d, sum};
  }
}

// Rows of x against kLanes of the 16 rows of w in a group, `first` the first of them.
template <class Type, int Rows>
MS_INLINE void tile(const Rounded& x, int64_t k, const uint8_t* group, int first, vf (&sums)[Rows]) {
  const int64_t blocks = k / kBlock;
  for (int r = 0; r < Rows; ++r) sums[r] = zero();
  for (int64_t b = 0; b < blocks; ++b, group += Type::kBytes) {
    const uint8_t* codes = group + Type::kCodes + 4 * first;
    vi sum[Rows], more[Rows];  // a single row has two chains: its products would wait for each other
    for (int r = 0; r < Rows; ++r) sum[r] = more[r] = int_all(0);
    auto step = [&](auto w, int quad, vi(&to)[Rows]) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        int32_t four;
        memcpy(&four, x.codes + r * k + b * kBlock + 4 * quad, sizeof four);
        to[r] = dot4<Type::kBits>(to[r], w, int_all(four));
      }
    };
    if constexpr (Type::kBits == 4) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const auto w = load_codes(codes + 64 * v);
        step(low_codes(w), v, sum);
        if constexpr (Rows == 1) step(high_codes(w), v + 4, more);
        else step(high_codes(w), v + 4, sum);
      }
    } else {
#pragma GCC unroll 4
      for (int v = 0; v < 8; v += 2) {
        step(load_codes(codes + 64 * v), v, sum);
        if constexpr (Rows == 1) step(load_codes(codes + 64 * (v + 1)), v + 1, more);
        else step(load_codes(codes + 64 * (v + 1)), v + 1, sum);
      }
    }
    const vf d = load_halves(group + 2 * first);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const BlockScale& scale = x.scales[r * blocks + b];
      vi total = sum[r];
      if constexpr (Rows == 1) total = add_ints(total, more[r]);
      if constexpr (Type::kOffset != 0) total = add_ints(total, int_all(-Type::kOffset * scale.sum));
      sums[r] = fma(to_floats(total), mul(d, all(scale.d)), sums[r]);
      if constexpr (Type::kHasMinimum)
        sums[r] = fma(load_halves(group + 32 + 2 * first), all(scale.d * static_cast<float>(scale.sum)), sums[r]);
    }
  }
}

template <class Type, int Rows, class T, class Out>
void tile_out(const ms_quantised_linear_args& a, const Rounded& x, int64_t row, int64_t col) {
  const uint8_t* group = static_cast<const uint8_t*>(a.w) + col / kGroup * (a.k / kBlock) * Type::kBytes;
  for (int first = 0; first < kGroup && col + first < a.n; first += kLanes) {
    vf sums[Rows];
    tile<Type, Rows>(x, a.k, group, first, sums);
    const int lanes = static_cast<int>(min_of(kLanes, a.n - col - first));
    for (int r = 0; r < Rows; ++r) {
      vf v = sums[r];
      if (a.bias != nullptr) v = add(v, load_lanes(static_cast<const T*>(a.bias) + col + first, lanes));
      store_lanes(static_cast<Out*>(a.out) + (row + r) * a.out_stride + col + first, v, lanes);
    }
  }
}

template <class Type, class T, class Out, int Rows = kTileHeight>
void rows_out(const ms_quantised_linear_args& a, const Rounded& all_x, int64_t row, int64_t end, int64_t col) {
  const int64_t blocks = a.k / kBlock;
  for (; row + Rows <= end; row += Rows)
    tile_out<Type, Rows, T, Out>(a, {all_x.codes + row * a.k, all_x.scales + row * blocks}, row, col);
  if constexpr (Rows > 1)
    if (row < end) rows_out<Type, T, Out, Rows / 2>(a, all_x, row, end, col);
}

template <class Type, class T, class Out>
void product(const ms_quantised_linear_args& a) {
  const int64_t blocks = a.k / kBlock;
  const size_t code_bytes = static_cast<size_t>(a.m * a.k + 63) / 64 * 64;
  auto* codes = static_cast<int8_t*>(thread_scratch(code_bytes + static_cast<size_t>(a.m * blocks) * sizeof(BlockScale)));
  auto* scales = reinterpret_cast<BlockScale*>(codes + code_bytes);
  parallel_ranges(a.m, 32 * 1024 / (a.k + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      round_row(static_cast<const T*>(a.x) + r * a.x_stride, a.k, codes + r * a.k, scales + r * blocks);
  });
  const Rounded x = {codes, scales};
  constexpr int64_t kRowBytes = 384 * 1024;   // of x's codes, to stay in the second-level cache
  constexpr int64_t kTaskBytes = 48 * 1024;   // of w, at least, for a task to be worth its hand-over
  const int64_t block_rows = max_of(kTileHeight, kRowBytes / max_of(1, a.k) / kTileHeight * kTileHeight);
  const int64_t row_blocks = (a.m + block_rows - 1) / block_rows;
  const int64_t groups = (a.n + kGroup - 1) / kGroup, group_bytes = max_of(1, blocks * Type::kBytes);
  const int64_t least = max_of(1, kTaskBytes / (group_bytes * max_of(1, min_of(a.m, 8) / 2)));
  const int64_t task_groups = max_of(least, groups / (8 * num_threads()));
  const int64_t col_blocks = (groups + task_groups - 1) / task_groups;
  parallel_for(row_blocks * col_blocks, [&](int64_t i) {
    const int64_t row = i / col_blocks * block_rows, first = i % col_blocks * task_groups;
    for (int64_t g = first; g < min_of(first + task_groups, groups); ++g)
      rows_out<Type, T, Out>(a, x, row, min_of(row + block_rows, a.m), g * kGroup);
  });
}

template <class Type>
void by_dtype(const ms_quantised_linear_args& a) {
  if (a.dtype == MS_FLOAT32) return product<Type, float, float>(a);
  if (a.out_dtype == MS_FLOAT32) return product<Type, bf16, float>(a);
  product<Type, bf16, bf16>(a);
}

}  // namespace

void quantised_linear(const ms_quantised_linear_args& a) {
  if (a.m == 0 || a.n == 0) return;
  switch (a.type) {
    case MS_Q4_0: return by_dtype<Q4_0>(a);
    case MS_Q4_1: return by_dtype<Q4_1>(a);
    case MS_Q8_0: return by_dtype<Q8_0>(a);
  }
}

}  // namespace mainspring::MAINSPRING_ISA
