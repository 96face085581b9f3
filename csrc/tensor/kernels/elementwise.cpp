// One output element from one or two input elements; and reductions. What wide registers cannot help is in scalar.cpp.
#include "kernels/kernel_set.h"
#include "kernels/vec.h"

namespace mainspring::MAINSPRING_ISA {
namespace {

using tensor::KernelSet;

// ---- what is computed: floats in vectors ----

template <class V>
MS_INLINE V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}
constexpr double kSqrtHalf = 0.70710678118654752440, kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kGeluScale = 0.79788456080286535588, kGeluCubic = 0.044715;
template <class V>
MS_INLINE V gelu_argument(V x) {
  return splat<V>(kGeluScale) * (x + splat<V>(kGeluCubic) * x * x * x);
}

#define BINARY(name, expression) \
  struct name { template <class V> static MS_INLINE V run(V a, V b) { return expression; } };
#define UNARY(name, expression) \
  struct name { template <class V> static MS_INLINE V run(V x) { return expression; } };

BINARY(Add, a + b)
BINARY(Sub, a - b)
BINARY(Mul, a * b)
BINARY(Div, a / b)
BINARY(Maximum, select(a != a, a, select(a > b, a, b)))
BINARY(Minimum, select(a != a, a, select(a < b, a, b)))
BINARY(Swiglu, a * sigmoid(a) * b)
// g is the gradient of the output; y the output, x the input.
BINARY(TanhGrad, a * (1 - b * b))
BINARY(SigmoidGrad, a * b * (1 - b))
BINARY(ReluGrad, select(b > splat<V>(0), a, splat<V>(0)))
struct SiluGrad {
  template <class V> static MS_INLINE V run(V g, V x) {
    const V s = sigmoid(x);
    return g * s * (1 + x * (1 - s));
  }
};
struct GeluGrad {
  template <class V> static MS_INLINE V run(V g, V x) {
    const V cdf = splat<V>(0.5) * (1 + erf(x * splat<V>(kSqrtHalf)));
    return g * (cdf + x * splat<V>(kInvSqrt2Pi) * exp(splat<V>(-0.5) * x * x));
  }
};
struct GeluTanhGrad {
  template <class V> static MS_INLINE V run(V g, V x) {
    const V t = tanh(gelu_argument(x));
    const V inner = splat<V>(kGeluScale) * (1 + splat<V>(3 * kGeluCubic) * x * x);
    return g * splat<V>(0.5) * (1 + t + x * (1 - t * t) * inner);
  }
};
UNARY(Neg, -x)
UNARY(Abs, abs(x))
UNARY(Sign, select(x > splat<V>(0), splat<V>(1), select(x < splat<V>(0), splat<V>(-1), select(x == splat<V>(0), splat<V>(0), x))))
UNARY(Square, x * x)
UNARY(Reciprocal, 1 / x)
UNARY(Sqrt, sqrt(x))
UNARY(Rsqrt, 1 / sqrt(x))
UNARY(Exp, exp(x))
UNARY(Log, log(x))
UNARY(Tanh, tanh(x))
UNARY(Erf, erf(x))
UNARY(Sigmoid, sigmoid(x))
UNARY(Relu, select(x < splat<V>(0), splat<V>(0), x))
UNARY(Silu, x * sigmoid(x))
UNARY(Gelu, splat<V>(0.5) * x * (1 + erf(x * splat<V>(kSqrtHalf))))
UNARY(GeluTanh, splat<V>(0.5) * x * (1 + tanh(gelu_argument(x))))
// One instruction each where the set has it.
#define ROUNDING(name, single, double_) \
  struct name { \
    static MS_INLINE vf run(vf v) { return lane_map(v, [](float x) { return single(x); }); } \
    static MS_INLINE vd run(vd v) { return lane_map(v, [](double x) { return double_(x); }); } \
  };
ROUNDING(Floor, __builtin_floorf, __builtin_floor)
ROUNDING(Ceil, __builtin_ceilf, __builtin_ceil)
ROUNDING(Round, __builtin_nearbyintf, __builtin_nearbyint)
ROUNDING(Trunc, __builtin_truncf, __builtin_trunc)

// ---- integers, one by one (the compiler makes vectors of it); arithmetic wraps around ----

template <class T> MS_INLINE T wrap(uint64_t x) { return static_cast<T>(x); }
template <class T> MS_INLINE uint64_t bits(T x) { return static_cast<uint64_t>(static_cast<int64_t>(x)); }
struct IntAdd { template <class T> static MS_INLINE T run(T a, T b) { return wrap<T>(bits(a) + bits(b)); } };
struct IntSub { template <class T> static MS_INLINE T run(T a, T b) { return wrap<T>(bits(a) - bits(b)); } };
struct IntMul { template <class T> static MS_INLINE T run(T a, T b) { return wrap<T>(bits(a) * bits(b)); } };
struct IntMaximum { template <class T> static MS_INLINE T run(T a, T b) { return a > b ? a : b; } };
struct IntMinimum { template <class T> static MS_INLINE T run(T a, T b) { return a < b ? a : b; } };
struct IntAnd { template <class T> static MS_INLINE T run(T a, T b) { return static_cast<T>(a & b); } };
struct IntOr { template <class T> static MS_INLINE T run(T a, T b) { return static_cast<T>(a | b); } };
struct IntXor { template <class T> static MS_INLINE T run(T a, T b) { return static_cast<T>(a ^ b); } };

struct Eq { template <class T> static MS_INLINE uint8_t run(T a, T b) { return a == b; } };
struct Ne { template <class T> static MS_INLINE uint8_t run(T a, T b) { return a != b; } };
struct Lt { template <class T> static MS_INLINE uint8_t run(T a, T b) { return a < b; } };
struct Le { template <class T> static MS_INLINE uint8_t run(T a, T b) { return a <= b; } };

// ---- loops ----

template <class T> MS_INLINE T value_of(T x) { return x; }
MS_INLINE float value_of(bf16 x) { return to_float(x); }

// A stretch of an operand as contiguous memory: the operand itself, or a copy in a small buffer.
constexpr int kStretch = 512;

template <class T>
struct Stretches {
  const T* p;
  int64_t stride;
  T buffer[kStretch];

  Stretches(const void* p_, int64_t s) : p(static_cast<const T*>(p_)), stride(s) {
    if (stride == 0) fill();
  }
  __attribute__((noinline)) void fill() {
    for (T& x : buffer) x = *p;
  }
  const T* at(int64_t i, int64_t count) { return stride == 1 ? p + i : gathered(i, count); }
  __attribute__((noinline)) const T* gathered(int64_t i, int64_t count) {
    if (stride != 0)
      for (int64_t j = 0; j < count; ++j) buffer[j] = p[(i + j) * stride];
    return buffer;
  }
};

// Whole vectors, then the rest as one padded vector through the same code: F is compiled once, not once more
// for tails, which halves the time to build this file.
template <class F, int inputs, class T>
MS_INLINE void run_vectors(int64_t count, const T* x, const T* y, T* to) {
  T x_rest[kLanes] = {}, y_rest[kLanes] = {}, to_rest[kLanes];
  T* last = nullptr;
  int rest = 0;
  for (;;) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      if constexpr (inputs == 2) store(to + i, F::run(load(x + i), load(y + i)));
      else store(to + i, F::run(load(x + i)));
    }
    if (rest != 0) break;
    rest = static_cast<int>(count - i);
    if (rest == 0) return;
    last = to + i;
    for (int j = 0; j < rest; ++j) x_rest[j] = x[i + j];
    if constexpr (inputs == 2)
      for (int j = 0; j < rest; ++j) y_rest[j] = y[i + j];
    x = x_rest, y = y_rest, to = to_rest, count = kLanes;
  }
  for (int j = 0; j < rest; ++j) last[j] = to_rest[j];
}

template <class T, class F>
void binary_float(int64_t n, const void* a, int64_t sa, const void* b, int64_t sb, void* out_) {
  T* out = static_cast<T*>(out_);
  const bool whole = n == 1 || (sa == 1 && sb == 1);
  Stretches<T> x(a, whole ? 1 : sa), y(b, whole ? 1 : sb);
  const int64_t step = whole ? n : kStretch;
  for (int64_t i = 0; i < n; i += step) {
    const int64_t count = min_of(step, n - i);
    run_vectors<F, 2>(count, x.at(i, count), y.at(i, count), out + i);
  }
}

template <class T, class F>
void unary_float(int64_t n, const void* a, int64_t sa, void* out_) {
  T* out = static_cast<T*>(out_);
  Stretches<T> x(a, n == 1 ? 1 : sa);
  const int64_t step = x.stride == 1 ? n : kStretch;
  for (int64_t i = 0; i < n; i += step) {
    const int64_t count = min_of(step, n - i);
    const T* from = x.at(i, count);
    run_vectors<F, 1>(count, from, from, out + i);
  }
}

template <class T, class F>
void binary_int(int64_t n, const void* a_, int64_t sa, const void* b_, int64_t sb, void* out_) {
  const T* a = static_cast<const T*>(a_);
  const T* b = static_cast<const T*>(b_);
  T* out = static_cast<T*>(out_);
  if (sa == 1 && sb == 1)
    for (int64_t i = 0; i < n; ++i) out[i] = F::run(a[i], b[i]);
  else
    for (int64_t i = 0; i < n; ++i) out[i] = F::run(a[i * sa], b[i * sb]);
}

template <class T, class F>
void compare(int64_t n, const void* a_, int64_t sa, const void* b_, int64_t sb, void* out_) {
  const T* a = static_cast<const T*>(a_);
  const T* b = static_cast<const T*>(b_);
  uint8_t* out = static_cast<uint8_t*>(out_);
  if (sa == 1 && sb == 1)
    for (int64_t i = 0; i < n; ++i) out[i] = F::run(value_of(a[i]), value_of(b[i]));
  else
    for (int64_t i = 0; i < n; ++i) out[i] = F::run(value_of(a[i * sa]), value_of(b[i * sb]));
}

template <class T, class F>
void row_reduce_float(int64_t n, const void* x_, int64_t stride, void* acc_) {
  using A = typename Traits<T>::A;
  const T* x = static_cast<const T*>(x_);
  A& acc = *static_cast<A*>(acc_);
  int64_t i = 0;
  if (stride == 1 && n >= 4 * kLanes) {
    auto part = [&](int64_t at) { return load(x + at); };
    auto r0 = part(0), r1 = part(kLanes), r2 = part(2 * kLanes), r3 = part(3 * kLanes);
    for (i = 4 * kLanes; i + 4 * kLanes <= n; i += 4 * kLanes) {
      r0 = F::run(r0, part(i));
      r1 = F::run(r1, part(i + kLanes));
      r2 = F::run(r2, part(i + 2 * kLanes));
      r3 = F::run(r3, part(i + 3 * kLanes));
    }
    A lanes[kLanes];
    store(lanes, F::run(F::run(r0, r1), F::run(r2, r3)));
    for (int width = kLanes / 2; width >= 1; width /= 2)
      for (int l = 0; l < width; ++l) lanes[l] = F::one(lanes[l], lanes[l + width]);
    acc = F::one(acc, lanes[0]);
  }
  for (; i < n; ++i) acc = F::one(acc, static_cast<A>(value_of(x[i * stride])));
}

template <class T, class F>
void column_reduce_float(int64_t n, const void* x_, void* acc_) {
  const T* x = static_cast<const T*>(x_);
  auto* acc = static_cast<typename Traits<T>::A*>(acc_);
  for_lanes(n, [&](int64_t i, int l) { store_lanes(acc + i, F::run(load_lanes(acc + i, l), load_lanes(x + i, l)), l); });
}

template <class T, class F>
void row_reduce_int(int64_t n, const void* x_, int64_t stride, void* acc_) {
  const T* x = static_cast<const T*>(x_);
  int64_t& acc = *static_cast<int64_t*>(acc_);
  for (int64_t i = 0; i < n; ++i) acc = F::run(acc, static_cast<int64_t>(x[i * stride]));
}

template <class T, class F>
void column_reduce_int(int64_t n, const void* x_, void* acc_) {
  const T* x = static_cast<const T*>(x_);
  int64_t* acc = static_cast<int64_t*>(acc_);
  for (int64_t i = 0; i < n; ++i) acc[i] = F::run(acc[i], static_cast<int64_t>(x[i]));
}

struct ReduceSum : Add { template <class A> static MS_INLINE A one(A a, A b) { return a + b; } };
struct ReduceProd : Mul { template <class A> static MS_INLINE A one(A a, A b) { return a * b; } };
struct ReduceMax : Maximum { template <class A> static MS_INLINE A one(A a, A b) { return a != a || a > b ? a : b; } };
struct ReduceMin : Minimum { template <class A> static MS_INLINE A one(A a, A b) { return a != a || a < b ? a : b; } };

// ---- the tables ----

constexpr int at(tensor::DType t) { return static_cast<int>(t); }
constexpr int kBool = at(tensor::DType::Bool), kUInt8 = at(tensor::DType::UInt8), kInt8 = at(tensor::DType::Int8),
              kInt16 = at(tensor::DType::Int16), kInt32 = at(tensor::DType::Int32), kInt64 = at(tensor::DType::Int64),
              kBFloat16 = at(tensor::DType::BFloat16), kFloat32 = at(tensor::DType::Float32),
              kFloat64 = at(tensor::DType::Float64);

template <class F>
void binary_floats(tensor::BinaryFn (&row)[tensor::kNumDTypes]) {
  row[kBFloat16] = binary_float<bf16, F>;
  row[kFloat32] = binary_float<float, F>;
  row[kFloat64] = binary_float<double, F>;
}
template <class F>
void binary_ints(tensor::BinaryFn (&row)[tensor::kNumDTypes]) {
  row[kUInt8] = binary_int<uint8_t, F>;
  row[kInt8] = binary_int<int8_t, F>;
  row[kInt16] = binary_int<int16_t, F>;
  row[kInt32] = binary_int<int32_t, F>;
  row[kInt64] = binary_int<int64_t, F>;
}
template <class F>
void unary_floats(tensor::UnaryFn (&row)[tensor::kNumDTypes]) {
  row[kBFloat16] = unary_float<bf16, F>;
  row[kFloat32] = unary_float<float, F>;
  row[kFloat64] = unary_float<double, F>;
}
template <class F>
void compares(tensor::BinaryFn (&row)[tensor::kNumDTypes]) {
  row[kBool] = row[kUInt8] = compare<uint8_t, F>;
  row[kInt8] = compare<int8_t, F>;
  row[kInt16] = compare<int16_t, F>;
  row[kInt32] = compare<int32_t, F>;
  row[kInt64] = compare<int64_t, F>;
  row[kBFloat16] = compare<bf16, F>;
  row[kFloat32] = compare<float, F>;
  row[kFloat64] = compare<double, F>;
}
template <class F, class I>
void reduces(KernelSet& set, tensor::ReduceKernel which) {
  auto& row = set.row_reduce[static_cast<int>(which)];
  auto& column = set.column_reduce[static_cast<int>(which)];
  row[kBool] = row[kUInt8] = row_reduce_int<uint8_t, I>;
  row[kInt8] = row_reduce_int<int8_t, I>;
  row[kInt16] = row_reduce_int<int16_t, I>;
  row[kInt32] = row_reduce_int<int32_t, I>;
  row[kInt64] = row_reduce_int<int64_t, I>;
  row[kBFloat16] = row_reduce_float<bf16, F>;
  row[kFloat32] = row_reduce_float<float, F>;
  row[kFloat64] = row_reduce_float<double, F>;
  column[kBool] = column[kUInt8] = column_reduce_int<uint8_t, I>;
  column[kInt8] = column_reduce_int<int8_t, I>;
  column[kInt16] = column_reduce_int<int16_t, I>;
  column[kInt32] = column_reduce_int<int32_t, I>;
  column[kInt64] = column_reduce_int<int64_t, I>;
  column[kBFloat16] = column_reduce_float<bf16, F>;
  column[kFloat32] = column_reduce_float<float, F>;
  column[kFloat64] = column_reduce_float<double, F>;
}

void widen_row(int64_t n, const void* x, void* out) {
  for_lanes(n, [&](int64_t i, int l) {
    store_lanes(static_cast<float*>(out) + i, load_lanes(static_cast<const bf16*>(x) + i, l), l);
  });
}
void narrow_row(int64_t n, const void* x, void* out) {
  for_lanes(n, [&](int64_t i, int l) {
    store_lanes(static_cast<bf16*>(out) + i, load_lanes(static_cast<const float*>(x) + i, l), l);
  });
}

void widen_half_row(int64_t n, const void* x, void* out) {
  for_lanes(n, [&](int64_t i, int l) {
    store_lanes(static_cast<float*>(out) + i, load_lanes(static_cast<const f16*>(x) + i, l), l);
  });
}
void narrow_half_row(int64_t n, const void* x, void* out) {
  for_lanes(n, [&](int64_t i, int l) {
    store_lanes(static_cast<f16*>(out) + i, load_lanes(static_cast<const float*>(x) + i, l), l);
  });
}

}  // namespace

void fill_elementwise(KernelSet& set) {
  using tensor::BinaryKernel, tensor::UnaryKernel, tensor::CompareKernel, tensor::ReduceKernel;
#define FLOATS(table, kind, name) table##_floats<name>(set.table[static_cast<int>(kind::name)]);
#define INTS(table, kind, name) table##_ints<Int##name>(set.table[static_cast<int>(kind::name)]);
#define B(name) FLOATS(binary, BinaryKernel, name)
#define BI(name) INTS(binary, BinaryKernel, name)
#define U(name) FLOATS(unary, UnaryKernel, name)
  B(Add) B(Sub) B(Mul) B(Div) B(Maximum) B(Minimum) B(Swiglu)
  B(TanhGrad) B(SigmoidGrad) B(ReluGrad) B(SiluGrad) B(GeluGrad) B(GeluTanhGrad)
  BI(Add) BI(Sub) BI(Mul) BI(Maximum) BI(Minimum) BI(And) BI(Or) BI(Xor)
  U(Neg) U(Abs) U(Sign) U(Square) U(Reciprocal) U(Sqrt) U(Rsqrt) U(Exp) U(Log) U(Tanh) U(Erf)
  U(Floor) U(Ceil) U(Round) U(Trunc) U(Sigmoid) U(Relu) U(Silu) U(Gelu) U(GeluTanh)
  // On 0 and 1: + and max are "or", * and min are "and".
  auto boolean = [&](BinaryKernel k, tensor::BinaryFn fn) { set.binary[static_cast<int>(k)][kBool] = fn; };
  boolean(BinaryKernel::Add, binary_int<uint8_t, IntOr>);
  boolean(BinaryKernel::Or, binary_int<uint8_t, IntOr>);
  boolean(BinaryKernel::Maximum, binary_int<uint8_t, IntOr>);
  boolean(BinaryKernel::Mul, binary_int<uint8_t, IntAnd>);
  boolean(BinaryKernel::And, binary_int<uint8_t, IntAnd>);
  boolean(BinaryKernel::Minimum, binary_int<uint8_t, IntAnd>);
  boolean(BinaryKernel::Xor, binary_int<uint8_t, IntXor>);
  compares<Eq>(set.compare[static_cast<int>(CompareKernel::Eq)]);
  compares<Ne>(set.compare[static_cast<int>(CompareKernel::Ne)]);
  compares<Lt>(set.compare[static_cast<int>(CompareKernel::Lt)]);
  compares<Le>(set.compare[static_cast<int>(CompareKernel::Le)]);
  reduces<ReduceSum, IntAdd>(set, ReduceKernel::Sum);
  reduces<ReduceProd, IntMul>(set, ReduceKernel::Prod);
  reduces<ReduceMax, IntMaximum>(set, ReduceKernel::Max);
  reduces<ReduceMin, IntMinimum>(set, ReduceKernel::Min);
  set.widen = widen_row;
  set.narrow = narrow_row;
  set.widen_half = widen_half_row;
  set.narrow_half = narrow_half_row;
}

}  // namespace mainspring::MAINSPRING_ISA
