// Vectors for kernels written once for float32, bfloat16 and float64 (products: float16 too): vf (csrc/kernels/simd.h)
// and vd, which has as many lanes, with the same function names. Same rule as there: nothing that the linker could merge
// with other instruction sets, so everything in this namespace and no std:: templates.
#pragma once

#include <math.h>

#include "core/dtype.h"
#include "exp.h"
#include "simd.h"

namespace mainspring::MAINSPRING_ISA {

typedef double vd __attribute__((vector_size(8 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));

MS_INLINE vd load_n(const double* p, int n) {
  vd v = {};
  memcpy(&v, p, sizeof(double) * static_cast<size_t>(n));
  return v;
}
MS_INLINE vd load(const double* p) {
  vd v;
  memcpy(&v, p, sizeof v);
  return v;
}
MS_INLINE void store(double* p, vd v) { memcpy(p, &v, sizeof v); }
MS_INLINE void store_n(double* p, vd v, int n) { memcpy(p, &v, sizeof(double) * static_cast<size_t>(n)); }
MS_INLINE vd load_lanes(const double* p, int n) { return n == kLanes ? load(p) : load_n(p, n); }
MS_INLINE void store_lanes(double* p, vd v, int n) {
  if (n == kLanes) return store(p, v);
  store_n(p, v, n);
}
MS_INLINE vd fma(vd a, vd b, vd c) { return a * b + c; }

using f16 = tensor::Float16;
#if defined(MAINSPRING_AVX512)
MS_INLINE vf load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
MS_INLINE void store(f16* p, vf v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0)); }
#elif defined(MAINSPRING_AVX2)
MS_INLINE vf load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
MS_INLINE void store(f16* p, vf v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0)); }
#else
MS_INLINE vf load(const f16* p) {
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = tensor::to_float(p[i]);
  return v;
}
MS_INLINE void store(f16* p, vf v) {
  for (int i = 0; i < kLanes; ++i) p[i] = tensor::to_float16(v[i]);
}
#endif
MS_INLINE vf load_lanes(const f16* p, int n) {
  if (n == kLanes) return load(p);
  f16 lanes[kLanes] = {};
  memcpy(lanes, p, sizeof(f16) * static_cast<size_t>(n));
  return load(lanes);
}
MS_INLINE void store_lanes(f16* p, vf v, int n) {
  if (n == kLanes) return store(p, v);
  f16 lanes[kLanes];
  store(lanes, v);
  memcpy(p, lanes, sizeof(f16) * static_cast<size_t>(n));
}

template <class T> struct Traits;  // of an element type: its vector, and the scalar it is computed in
template <> struct Traits<float> { using V = vf; using A = float; };
template <> struct Traits<bf16> { using V = vf; using A = float; };
template <> struct Traits<f16> { using V = vf; using A = float; };
template <> struct Traits<double> { using V = vd; using A = double; };
template <class V> struct LaneOf { using T = float; };
template <> struct LaneOf<vd> { using T = double; };
template <class V> using Lane = typename LaneOf<V>::T;

template <class V>
MS_INLINE V splat(double x) {
  return static_cast<Lane<V>>(x) - V{};
}
template <class V>
MS_INLINE V select(auto mask, V yes, V no) {
  return mask ? yes : no;
}

// f of every lane, for functions that have no vector form here.
template <class V, class F>
MS_INLINE V lane_map(V v, F f) {
  Lane<V> lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) lanes[i] = f(lanes[i]);
  return load(lanes);
}

template <class V, class F>
MS_INLINE V lane_map2(V a, V b, F f) {
  Lane<V> x[kLanes], y[kLanes];
  store(x, a);
  store(y, b);
  for (int i = 0; i < kLanes; ++i) x[i] = f(x[i], y[i]);
  return load(x);
}

// These are calls already: inlining them everywhere would only cost compile time.
[[maybe_unused]] __attribute__((noinline)) static vd exp(vd v) { return lane_map(v, [](double x) { return ::exp(x); }); }
[[maybe_unused]] __attribute__((noinline)) static vd tanh(vd v) { return lane_map(v, [](double x) { return ::tanh(x); }); }
[[maybe_unused]] __attribute__((noinline)) static vd log(vd v) { return lane_map(v, [](double x) { return ::log(x); }); }
[[maybe_unused]] __attribute__((noinline)) static vd erf(vd v) { return lane_map(v, [](double x) { return ::erf(x); }); }
MS_INLINE vf sqrt(vf v) { return lane_map(v, [](float x) { return __builtin_sqrtf(x); }); }
MS_INLINE vd sqrt(vd v) { return lane_map(v, [](double x) { return __builtin_sqrt(x); }); }
MS_INLINE vd abs(vd v) { return lane_map(v, [](double x) { return __builtin_fabs(x); }); }
MS_INLINE vf abs(vf v) { return (vf)((vi)v & 0x7fffffff); }

MS_INLINE double sum_lanes(vd v) {
  double s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}

// Natural logarithm within 2 ulp: x = m 2^e with m in [sqrt(1/2), sqrt(2)); the polynomial is that of Cephes' logf.
MS_INLINE vf log(vf x) {
  const vf tiny = splat<vf>(1.17549435e-38);
  const auto small = x < tiny;
  const vf scaled = select(small, x * 8388608.0f, x);
  const vi bits = (vi)scaled;
  vf m = (vf)((bits & 0x007fffff) | 0x3f000000);
  vf e = __builtin_convertvector((bits >> 23) - 126, vf) - select(small, splat<vf>(23), splat<vf>(0));
  const auto low = m < splat<vf>(0.707106781186547524);
  e = select(low, e - 1.0f, e);
  m = select(low, m + m, m) - 1.0f;
  const vf z = m * m;
  vf p = splat<vf>(7.0376836292e-2);
  p = fma(p, m, splat<vf>(-1.1514610310e-1));
  p = fma(p, m, splat<vf>(1.1676998740e-1));
  p = fma(p, m, splat<vf>(-1.2420140846e-1));
  p = fma(p, m, splat<vf>(1.4249322787e-1));
  p = fma(p, m, splat<vf>(-1.6668057665e-1));
  p = fma(p, m, splat<vf>(2.0000714765e-1));
  p = fma(p, m, splat<vf>(-2.4999993993e-1));
  p = fma(p, m, splat<vf>(3.3333331174e-1));
  vf y = p * m * z;
  y = fma(e, splat<vf>(-2.12194440e-4), y);
  y = fma(z, splat<vf>(-0.5), y);
  vf r = fma(e, splat<vf>(0.693359375), m + y);
  r = select(x == splat<vf>(INFINITY), x, r);
  r = select(x == splat<vf>(0), splat<vf>(-INFINITY), r);
  return select(!(x >= splat<vf>(0)), splat<vf>(NAN), r);
}

// Error function: an odd polynomial near 0, 1 - exp(polynomial) beyond (minimax fits, about 1 ulp).
MS_INLINE vf erf(vf x) {
  const vf t = abs(x), s = x * x;
  vf far = fma(splat<vf>(-1.72853470e-5), t, splat<vf>(3.83197126e-4));
  const vf u = fma(splat<vf>(-3.88396438e-3), t, splat<vf>(2.42546219e-2));
  far = fma(far, s, u);
  far = fma(far, t, splat<vf>(-1.06777877e-1));
  far = fma(far, t, splat<vf>(-6.34846687e-1));
  far = fma(far, t, splat<vf>(-1.28717512e-1));
  far = fma(far, t, -t);
  far = 1.0f - exp(far);
  far = (vf)(((vi)far & 0x7fffffff) | ((vi)x & (vi)splat<vf>(-0.0)));
  vf near = splat<vf>(-5.96761703e-4);
  near = fma(near, s, splat<vf>(4.99119423e-3));
  near = fma(near, s, splat<vf>(-2.67681349e-2));
  near = fma(near, s, splat<vf>(1.12819925e-1));
  near = fma(near, s, splat<vf>(-3.76125336e-1));
  near = fma(near, s, splat<vf>(1.28379166e-1));
  near = fma(near, x, x);
  return select(t > splat<vf>(0.927734375), far, near);
}

}  // namespace mainspring::MAINSPRING_ISA
