// 4 lanes by the compiler's own vectors (GCC, Clang): x86-64-v2 without FMA, and every other processor.
#pragma once

namespace mainspring::MAINSPRING_ISA {

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
constexpr int kLanes = 4;

MS_INLINE vf zero() { return vf{0, 0, 0, 0}; }
MS_INLINE vf all(float x) { return vf{x, x, x, x}; }
MS_INLINE vf add(vf a, vf b) { return a + b; }
MS_INLINE vf sub(vf a, vf b) { return a - b; }
MS_INLINE vf mul(vf a, vf b) { return a * b; }
MS_INLINE vf div(vf a, vf b) { return a / b; }
MS_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
MS_INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
MS_INLINE vf vmax(vf a, vf b) { return choose(a > b, a, b); }
MS_INLINE vf vmin(vf a, vf b) { return choose(a < b, a, b); }

MS_INLINE bf16 narrow(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return {static_cast<uint16_t>((bits | 0x400000u) >> 16)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

MS_INLINE vf load_n(const float* p, int n) {
  vf v = zero();
  memcpy(&v, p, sizeof(float) * static_cast<size_t>(n));
  return v;
}
MS_INLINE void store_n(float* p, vf v, int n) { memcpy(p, &v, sizeof(float) * static_cast<size_t>(n)); }
MS_INLINE vf load_n(const bf16* p, int n) {
  float lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
  return load_n(lanes, kLanes);
}
MS_INLINE void store_n(bf16* p, vf v, int n) {
  for (int i = 0; i < n; ++i) p[i] = narrow(v[i]);
}
MS_INLINE vf load(const float* p) { return load_n(p, kLanes); }
MS_INLINE vf load(const bf16* p) { return load_n(p, kLanes); }
MS_INLINE void store(float* p, vf v) { store_n(p, v, kLanes); }
MS_INLINE void store(bf16* p, vf v) { store_n(p, v, kLanes); }

MS_INLINE vf select_range(vf v, int64_t first, int64_t lo, int64_t hi, vf other) {
  const vi lane = {0, 1, 2, 3};
  return choose((lane >= static_cast<int32_t>(lo - first)) & (lane < static_cast<int32_t>(hi - first)), v, other);
}
MS_INLINE vf select_less(vf a, vf b, vf yes, vf no) { return choose(a < b, yes, no); }
MS_INLINE vf scale_by_power(vf v, vf n) {
  // In two halves, so that a power below the smallest normal one still rounds correctly.
  const vi power = __builtin_convertvector(n, vi);
  const vi half = power >> 1;
  return v * (vf)((half + 127) << 23) * (vf)((power - half + 127) << 23);
}

MS_INLINE float sum_lanes(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
MS_INLINE float max_lanes(vf v) {
  const float a = v[0] > v[2] ? v[0] : v[2];
  const float b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}

}  // namespace mainspring::MAINSPRING_ISA
