// More functions of one or two elements: trigonometry, logarithms, division with remainder, shifts.
#pragma once

#include <limits>

#include "ops/reduce.h"

namespace mainspring::tensor::ops {

#define MAINSPRING_OF_INPUT(Op, python, slope_of_x) \
  struct Op : OfInput<Op, UnaryKernel::Op> { \
    static constexpr auto name = python; \
    static Tensor slope(const Tensor& x) { return slope_of_x; } \
  };
#define MAINSPRING_OF_OUTPUT(Op, python, slope_of_y) \
  struct Op : OfOutput<Op, UnaryKernel::Op> { \
    static constexpr auto name = python; \
    static Tensor slope(const Tensor& y) { return slope_of_y; } \
  };
inline Tensor one_plus(const Tensor& x) { return add(x, number(1)); }
inline Tensor one_minus(const Tensor& x) { return sub(number(1), x); }
inline Tensor inverse_root(const Tensor& x) { return div(number(1), sqrt(x)); }

struct Sinh;
struct Cosh;
Tensor sinh(const Tensor& x);
Tensor cosh(const Tensor& x);
MAINSPRING_OF_OUTPUT(Tan, "tan", one_plus(square(y)))
MAINSPRING_OF_INPUT(Asin, "asin", inverse_root(one_minus(square(x))))
MAINSPRING_OF_INPUT(Acos, "acos", neg(inverse_root(one_minus(square(x)))))
MAINSPRING_OF_INPUT(Atan, "atan", div(number(1), one_plus(square(x))))
MAINSPRING_OF_INPUT(Sinh, "sinh", cosh(x))
MAINSPRING_OF_INPUT(Cosh, "cosh", sinh(x))
MAINSPRING_OF_INPUT(Asinh, "asinh", inverse_root(one_plus(square(x))))
MAINSPRING_OF_INPUT(Acosh, "acosh", inverse_root(sub(square(x), number(1))))
MAINSPRING_OF_INPUT(Atanh, "atanh", div(number(1), one_minus(square(x))))
MAINSPRING_OF_OUTPUT(Exp2, "exp2", mul(y, number(0.69314718055994530942)))
MAINSPRING_OF_INPUT(Log2, "log2", div(number(1.44269504088896340736), x))
MAINSPRING_OF_INPUT(Log10, "log10", div(number(0.43429448190325182765), x))
MAINSPRING_OF_INPUT(Erfc, "erfc", mul(exp(neg(square(x))), number(-1.1283791670955126)))
inline Tensor sinh(const Tensor& x) { return Sinh::forward(x); }
inline Tensor cosh(const Tensor& x) { return Cosh::forward(x); }

struct Digamma {
  static constexpr auto name = "digamma";
  using Saved = Nothing;
  static Tensor forward(const Tensor& x) {
    Tensor out = unary_loop(UnaryKernel::Digamma, name, x, true);
    if (recording(x)) record<Digamma>(out, {}, x);
    return out;
  }
  static void backward(const Saved&, const Tensor&, Grads&) {
    fail(ErrorKind::Autograd, "digamma: its derivative (trigamma) is not implemented");
  }
};
struct Lgamma : OfInput<Lgamma, UnaryKernel::Lgamma> {
  static constexpr auto name = "lgamma";
  static Tensor slope(const Tensor& x) { return Digamma::forward(x); }
};
struct Trunc : Flat<Trunc, UnaryKernel::Trunc> { static constexpr auto name = "trunc"; };
struct Frac {
  static constexpr auto name = "frac";
  static Tensor forward(const Tensor& x) { return sub(x, Trunc::forward(x)); }
};
struct BitwiseNot {
  static constexpr auto name = "bitwise_not";
  static Tensor forward(const Tensor& x) {
    return x.dtype() == DType::Bool ? LogicalNot::forward(x) : unary_loop(UnaryKernel::Not, name, x, false);
  }
};
struct Signbit {
  static constexpr auto name = "signbit";
  static Tensor forward(const Tensor& x) {
    if (!is_float(x.dtype())) return lt(x, full_int({}, 0, x.dtype()));
    GradMode off(false);
    return lt(binary_loop(BinaryKernel::Copysign, name, number(1), x), number(0));
  }
};
struct IsInf {
  static constexpr auto name = "isinf";
  static Tensor forward(const Tensor& x) {
    if (!is_float(x.dtype())) return zeros(x.shape(), DType::Bool);
    GradMode off(false);
    return eq(unary_loop(UnaryKernel::Abs, name, x, false), number(std::numeric_limits<double>::infinity()));
  }
};
struct IsFinite {
  static constexpr auto name = "isfinite";
  static Tensor forward(const Tensor& x) {
    if (!is_float(x.dtype())) return full_int(x.shape(), 1, DType::Bool);
    GradMode off(false);
    return lt(unary_loop(UnaryKernel::Abs, name, x, false), number(std::numeric_limits<double>::infinity()));
  }
};

// ---- two elements ----

// Integer division by zero has no value to give.
inline void check_divisor(const char* op, const Tensor& a, const Tensor& b) {
  if (is_float(result_type(a, b))) return;
  if (result_type(a, b) == DType::Bool) fail(ErrorKind::DType, op, ": not defined for bool");
  GradMode off(false);
  const Tensor zero = reduce_loop(ReduceKernel::Max, eq(b, full_int({}, 0, b.dtype())), wrap_dims(op, {}, b.ndim()), false);
  if (b.numel() > 0 && a.numel() > 0 && read_int(zero.data(), zero.dtype()) != 0)
    fail(ErrorKind::Value, op, ": division of integers by zero in ", b);
}

struct FloorDivide {
  static constexpr auto name = "floor_divide";
  static Tensor forward(const Tensor& a, const Tensor& b) {
    check_divisor(name, a, b);
    return binary_loop(BinaryKernel::FloorDivide, name, a, b);
  }
};

// a - b q with the whole number q rounded down (remainder) or to zero (fmod).
template <class Op, BinaryKernel kernel, bool down>
struct Modulo {
  struct Saved { SavedTensor a, b; };
  static Tensor forward(const Tensor& a, const Tensor& b) {
    check_divisor(Op::name, a, b);
    Tensor out = binary_loop(kernel, Op::name, a, b);
    if (recording(a, b)) record<Op>(out, {a, b}, a, b);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    grads[0] = g;
    if (!grads.wanted(1)) return;
    const Tensor quotient = div(detach(s.a.get()), detach(s.b.get()));
    grads[1] = neg(mul(g, down ? Floor::forward(quotient) : Trunc::forward(quotient)));
  }
};
struct Remainder : Modulo<Remainder, BinaryKernel::Remainder, true> { static constexpr auto name = "remainder"; };
struct Fmod : Modulo<Fmod, BinaryKernel::Fmod, false> { static constexpr auto name = "fmod"; };

inline Tensor float_binary(BinaryKernel kernel, const char* op, const Tensor& a, const Tensor& b) {
  if (is_float(result_type(a, b))) return binary_loop(kernel, op, a, b);
  return binary_loop(kernel, op, cast(a, DType::Float32), cast(b, DType::Float32));
}
struct Atan2 {
  static constexpr auto name = "atan2";
  struct Saved { SavedTensor a, b; };
  static Tensor forward(const Tensor& a, const Tensor& b) {
    Tensor out = float_binary(BinaryKernel::Atan2, name, a, b);
    if (recording(a, b)) record<Atan2>(out, {a, b}, a, b);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    const Tensor &a = s.a.get(), &b = s.b.get();
    const Tensor scaled = div(g, add(square(a), square(b)));
    if (grads.wanted(0)) grads[0] = mul(scaled, b);
    if (grads.wanted(1)) grads[1] = neg(mul(scaled, a));
  }
};
struct Hypot {
  static constexpr auto name = "hypot";
  struct Saved { SavedTensor a, b; SavedOutput out; };
  static Tensor forward(const Tensor& a, const Tensor& b) {
    if (!is_float(result_type(a, b))) fail(ErrorKind::DType, "hypot: needs floating-point tensors, not ", a, " and ", b);
    Tensor out = binary_loop(BinaryKernel::Hypot, name, a, b);
    if (recording(a, b)) record<Hypot>(out, {a, b, out}, a, b);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    const Tensor scaled = div(g, s.out.get());
    if (grads.wanted(0)) grads[0] = mul(scaled, s.a.get());
    if (grads.wanted(1)) grads[1] = mul(scaled, s.b.get());
  }
};
struct Copysign {
  static constexpr auto name = "copysign";
  struct Saved { SavedTensor a; SavedOutput out; };
  static Tensor forward(const Tensor& a, const Tensor& b) {
    Tensor out = float_binary(BinaryKernel::Copysign, name, a, b);
    if (recording(a, b)) record<Copysign>(out, {a, out}, a, b);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    if (grads.wanted(0)) grads[0] = mul(g, mul(sign(detach(s.a.get())), sign(detach(s.out.get()))));
    if (grads.wanted(1)) grads[1] = mul(g, number(0));
  }
};
struct ShiftLeft {
  static constexpr auto name = "bitwise_left_shift";
  static Tensor forward(const Tensor& a, const Tensor& b) { return binary_loop(BinaryKernel::ShiftLeft, name, a, b); }
};
struct ShiftRight {
  static constexpr auto name = "bitwise_right_shift";
  static Tensor forward(const Tensor& a, const Tensor& b) { return binary_loop(BinaryKernel::ShiftRight, name, a, b); }
};
template <BinaryKernel kernel>
Tensor logical(const char* op, const Tensor& a, const Tensor& b) {
  return binary_loop(kernel, op, cast(a, DType::Bool), cast(b, DType::Bool));
}
struct LogicalAnd {
  static constexpr auto name = "logical_and";
  static Tensor forward(const Tensor& a, const Tensor& b) { return logical<BinaryKernel::And>(name, a, b); }
};
struct LogicalOr {
  static constexpr auto name = "logical_or";
  static Tensor forward(const Tensor& a, const Tensor& b) { return logical<BinaryKernel::Or>(name, a, b); }
};
struct LogicalXor {
  static constexpr auto name = "logical_xor";
  static Tensor forward(const Tensor& a, const Tensor& b) { return logical<BinaryKernel::Xor>(name, a, b); }
};

}  // namespace mainspring::tensor::ops
