// Element loops that gain nothing from wide registers: what goes through the C library one element at a time, and
// integer operations that no processor has in vectors. Compiled once, not for each instruction set, as their time is
// spent in the functions they call.
#include <cmath>

#include "kernels/kernel_set.h"

namespace mainspring::tensor {
namespace {

// ---- floats; one function each for float32 (bfloat16 too) and float64 ----

// The quotient rounded down and what is left of a: the remainder takes the divisor's sign, as in Python.
template <class T>
T floor_mod(T a, T b) {
  const T rest = sizeof(T) == 4 ? static_cast<T>(::fmodf(static_cast<float>(a), static_cast<float>(b)))
                                : static_cast<T>(::fmod(static_cast<double>(a), static_cast<double>(b)));
  if (rest == 0) return static_cast<T>(__builtin_copysign(0.0, static_cast<double>(b)));
  return (rest < 0) != (b < 0) ? rest + b : rest;
}
template <class T>
T floor_quotient(T a, T b) {
  if (b == 0) return a / b;
  const T rest = floor_mod(a, b), quotient = (a - rest) / b;
  if (quotient == 0) return static_cast<T>(__builtin_copysign(0.0, static_cast<double>(a / b)));
  const T whole = static_cast<T>(__builtin_floor(static_cast<double>(quotient)));
  return quotient - whole > static_cast<T>(0.5) ? whole + 1 : whole;
}
// Derivative of log gamma: the recurrence up to 10, then the asymptotic series (Abramowitz and Stegun 6.3.18);
// the reflection formula (6.3.7) below 0.
double digamma(double x) {
  if (x == 0) return -__builtin_copysign(INFINITY, x);
  if (x < 0) {
    const double whole = __builtin_floor(x);
    if (whole == x) return NAN;
    return digamma(1 - x) - 3.14159265358979323846 / ::tan(3.14159265358979323846 * (x - whole));
  }
  double shift = 0;
  for (; x < 10; x += 1) shift -= 1 / x;
  const double z = 1 / (x * x);
  const double series =
      z * (1.0 / 12 - z * (1.0 / 120 - z * (1.0 / 252 - z * (1.0 / 240 - z * (1.0 / 132 - z * (691.0 / 32760 - z / 12))))));
  return shift + ::log(x) - 0.5 / x - series;
}
float digamma(float x) { return static_cast<float>(digamma(static_cast<double>(x))); }

#define LIBM(name, single, double_) \
  struct name { \
    static float run(float x) { return single(x); } \
    static double run(double x) { return double_(x); } \
  };
#define LIBM2(name, single, double_) \
  struct name { \
    static float run(float x, float y) { return single(x, y); } \
    static double run(double x, double y) { return double_(x, y); } \
  };
LIBM(Tan, ::tanf, ::tan)
LIBM(Asin, ::asinf, ::asin)
LIBM(Acos, ::acosf, ::acos)
LIBM(Atan, ::atanf, ::atan)
LIBM(Sinh, ::sinhf, ::sinh)
LIBM(Cosh, ::coshf, ::cosh)
LIBM(Asinh, ::asinhf, ::asinh)
LIBM(Acosh, ::acoshf, ::acosh)
LIBM(Atanh, ::atanhf, ::atanh)
LIBM(Exp2, ::exp2f, ::exp2)
LIBM(Log2, ::log2f, ::log2)
LIBM(Log10, ::log10f, ::log10)
LIBM(Erfc, ::erfcf, ::erfc)
LIBM(Lgamma, ::lgammaf, ::lgamma)
LIBM(Digamma, digamma, digamma)
LIBM(Expm1, ::expm1f, ::expm1)
LIBM(Log1p, ::log1pf, ::log1p)
LIBM(Sin, ::sinf, ::sin)
LIBM(Cos, ::cosf, ::cos)
LIBM2(Pow, ::powf, ::pow)
LIBM2(FloorDivide, floor_quotient, floor_quotient)
LIBM2(Remainder, floor_mod, floor_mod)
LIBM2(Fmod, ::fmodf, ::fmod)
LIBM2(Atan2, ::atan2f, ::atan2)
LIBM2(Hypot, ::hypotf, ::hypot)
LIBM2(Copysign, __builtin_copysignf, __builtin_copysign)

// ---- integers; arithmetic wraps around ----

template <class T> T wrap(uint64_t x) { return static_cast<T>(x); }
template <class T> uint64_t bits(T x) { return static_cast<uint64_t>(static_cast<int64_t>(x)); }
struct IntPow {
  template <class T> static T run(T a, T b) {
    if (b < 0) return static_cast<T>(a == 1 ? 1 : a == static_cast<T>(-1) ? (b % 2 == 0 ? 1 : -1) : 0);
    uint64_t result = 1, base = bits(a);
    for (uint64_t e = bits(b); e != 0; e >>= 1, base *= base)
      if (e & 1) result *= base;
    return wrap<T>(result);
  }
};
struct IntFloorDivide {
  template <class T> static T run(T a, T b) {
    if (b == 0) return 0;  // refused before the loop
    if (T(-1) < 0 && b == static_cast<T>(-1)) return wrap<T>(0 - bits(a));  // the least value's quotient would overflow
    const T q = static_cast<T>(a / b);
    return static_cast<T>(q - ((a % b != 0) & ((a < 0) != (b < 0))));
  }
};
struct IntRemainder {
  template <class T> static T run(T a, T b) {
    if (b == 0 || (T(-1) < 0 && b == static_cast<T>(-1))) return 0;
    const T r = static_cast<T>(a % b);
    return static_cast<T>(r != 0 && (r < 0) != (b < 0) ? r + b : r);
  }
};
struct IntFmod {
  template <class T> static T run(T a, T b) {
    if (b == 0 || (T(-1) < 0 && b == static_cast<T>(-1))) return 0;
    return static_cast<T>(a % b);
  }
};
struct IntShiftLeft {
  template <class T> static T run(T a, T b) {
    return static_cast<uint64_t>(b) >= 8 * sizeof(T) ? T{0} : wrap<T>(bits(a) << b);
  }
};
struct IntShiftRight {
  template <class T> static T run(T a, T b) {
    return static_cast<T>(static_cast<uint64_t>(b) >= 8 * sizeof(T) ? (a < 0 ? -1 : 0) : a >> b);
  }
};
struct IntNot { template <class T> static T run(T x) { return static_cast<T>(~x); } };
struct IntNeg { template <class T> static T run(T x) { return wrap<T>(0 - bits(x)); } };
struct IntAbs { template <class T> static T run(T x) { return x < 0 ? wrap<T>(0 - bits(x)) : x; } };
struct IntSign { template <class T> static T run(T x) { return static_cast<T>((x > 0) - (x < 0)); } };
struct IntSquare { template <class T> static T run(T x) { return wrap<T>(bits(x) * bits(x)); } };
struct IntRelu { template <class T> static T run(T x) { return x < 0 ? T{0} : x; } };
struct IntSame { template <class T> static T run(T x) { return x; } };


// ---- loops and tables ----

template <class T, class F>
void binary(int64_t n, const void* a_, int64_t sa, const void* b_, int64_t sb, void* out_) {
  const T* a = static_cast<const T*>(a_);
  const T* b = static_cast<const T*>(b_);
  T* out = static_cast<T*>(out_);
  for (int64_t i = 0; i < n; ++i) out[i] = from_value<T>(F::run(value_of(a[i * sa]), value_of(b[i * sb])));
}

template <class T, class F>
void unary(int64_t n, const void* a_, int64_t sa, void* out_) {
  const T* a = static_cast<const T*>(a_);
  T* out = static_cast<T*>(out_);
  for (int64_t i = 0; i < n; ++i) out[i] = from_value<T>(F::run(value_of(a[i * sa])));
}

constexpr int at(DType t) { return static_cast<int>(t); }

template <class F>
void floats(BinaryFn (&row)[kNumDTypes]) {
  row[at(DType::BFloat16)] = binary<BFloat16, F>;
  row[at(DType::Float32)] = binary<float, F>;
  row[at(DType::Float64)] = binary<double, F>;
}
template <class F>
void floats(UnaryFn (&row)[kNumDTypes]) {
  row[at(DType::BFloat16)] = unary<BFloat16, F>;
  row[at(DType::Float32)] = unary<float, F>;
  row[at(DType::Float64)] = unary<double, F>;
}
template <class F>
void integers(BinaryFn (&row)[kNumDTypes]) {
  row[at(DType::UInt8)] = binary<uint8_t, F>;
  row[at(DType::Int8)] = binary<int8_t, F>;
  row[at(DType::Int16)] = binary<int16_t, F>;
  row[at(DType::Int32)] = binary<int32_t, F>;
  row[at(DType::Int64)] = binary<int64_t, F>;
}
template <class F>
void integers(UnaryFn (&row)[kNumDTypes]) {
  row[at(DType::UInt8)] = unary<uint8_t, F>;
  row[at(DType::Int8)] = unary<int8_t, F>;
  row[at(DType::Int16)] = unary<int16_t, F>;
  row[at(DType::Int32)] = unary<int32_t, F>;
  row[at(DType::Int64)] = unary<int64_t, F>;
}

}  // namespace

void fill_scalar(KernelSet& set) {
#define B(name) floats<name>(set.binary[static_cast<int>(BinaryKernel::name)]);
#define U(name) floats<name>(set.unary[static_cast<int>(UnaryKernel::name)]);
#define BI(name) integers<Int##name>(set.binary[static_cast<int>(BinaryKernel::name)]);
#define UI(name) integers<Int##name>(set.unary[static_cast<int>(UnaryKernel::name)]);
  B(Pow) B(FloorDivide) B(Remainder) B(Fmod) B(Atan2) B(Hypot) B(Copysign)
  U(Tan) U(Asin) U(Acos) U(Atan) U(Sinh) U(Cosh) U(Asinh) U(Acosh) U(Atanh) U(Exp2) U(Log2) U(Log10) U(Erfc)
  U(Lgamma) U(Digamma) U(Expm1) U(Log1p) U(Sin) U(Cos)
  BI(Pow) BI(FloorDivide) BI(Remainder) BI(Fmod) BI(ShiftLeft) BI(ShiftRight)
  UI(Not) UI(Neg) UI(Abs) UI(Sign) UI(Square) UI(Relu)
  for (const UnaryKernel k : {UnaryKernel::Floor, UnaryKernel::Ceil, UnaryKernel::Round, UnaryKernel::Trunc})
    integers<IntSame>(set.unary[static_cast<int>(k)]);
}

}  // namespace mainspring::tensor
