// Ops on elements: binary, comparisons, where, unary.
//
// A backward gives gradients in the shape of the broadcast result; the engine sums them to the inputs' shapes.
#pragma once

#include "autograd/engine.h"
#include "ops/loops.h"
#include "ops/ops.h"

namespace mainspring::tensor::ops {

struct Nothing {};  // saved by ops whose gradient needs none of their inputs

struct Add {
  static constexpr auto name = "add";
  using Saved = Nothing;
  static Tensor forward(const Tensor& a, const Tensor& b) {
    Tensor out = binary_loop(BinaryKernel::Add, name, a, b);
    if (recording(a, b)) record<Add>(out, {}, a, b);
    return out;
  }
  static void backward(const Saved&, const Tensor& g, Grads& grads) {
    grads[0] = g;
    grads[1] = g;
  }
};

struct Sub {
  static constexpr auto name = "sub";
  using Saved = Nothing;
  static Tensor forward(const Tensor& a, const Tensor& b) {
    Tensor out = binary_loop(BinaryKernel::Sub, name, a, b);
    if (recording(a, b)) record<Sub>(out, {}, a, b);
    return out;
  }
  static void backward(const Saved&, const Tensor& g, Grads& grads) {
    grads[0] = g;
    if (grads.wanted(1)) grads[1] = neg(g);
  }
};

struct Mul {
  static constexpr auto name = "mul";
  struct Saved { SavedTensor a, b; };
  static Tensor forward(const Tensor& a, const Tensor& b) {
    Tensor out = binary_loop(BinaryKernel::Mul, name, a, b);
    if (recording(a, b))
      record<Mul>(out, {SavedTensor::when(b.requires_grad(), a), SavedTensor::when(a.requires_grad(), b)}, a, b);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    if (grads.wanted(0)) grads[0] = mul(g, s.b.get());
    if (grads.wanted(1)) grads[1] = mul(g, s.a.get());
  }
};

struct Div {
  static constexpr auto name = "div";
  struct Saved { SavedTensor a, b; };
  static Tensor forward(const Tensor& a, const Tensor& b) {
    Tensor out = binary_loop(BinaryKernel::Div, name, a, b);
    if (recording(a, b)) record<Div>(out, {SavedTensor::when(b.requires_grad(), a), b}, a, b);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    const Tensor scaled = div(g, s.b.get());
    if (grads.wanted(1)) grads[1] = neg(mul(scaled, div(s.a.get(), s.b.get())));
    grads[0] = scaled;
  }
};

struct Pow {
  static constexpr auto name = "pow";
  struct Saved { SavedTensor a, b; SavedOutput out; };
  static Tensor forward(const Tensor& a, const Tensor& b) {
    const bool squares = b->weak && b.numel() == 1 && read_double(b.data(), b.dtype()) == 2;
    Tensor out = squares ? unary_loop(UnaryKernel::Square, name, a, b.dtype() == DType::Float64)
                         : binary_loop(BinaryKernel::Pow, name, a, b);
    if (recording(a, b)) record<Pow>(out, {a, b, out}, a, b);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    const Tensor &a = s.a.get(), &b = s.b.get();
    const Tensor zero = number(0);
    if (grads.wanted(0)) {  // b a^(b - 1), and 0 where b is 0 even at a = 0
      const Tensor slope = mul(b, pow(a, sub(b, number(1))));
      grads[0] = where(eq(b, zero), mul(g, zero), mul(g, slope));
    }
    if (grads.wanted(1)) {  // log(a) a^b, and 0 where a is 0 and b >= 0
      const Tensor flat = eq(a, zero);
      const Tensor slope = mul(s.out.get(), log(where(flat, number(1), a)));
      grads[1] = where(flat, mul(g, zero), mul(g, slope));
    }
  }
};

// Where both are equal each gets half of the gradient, as in PyTorch.
inline void split_extremum(const Tensor& a, const Tensor& b, bool max, const Tensor& g, Grads& grads) {
  const Tensor half = mul(g, number(0.5)), zero = mul(g, number(0)), same = eq(a, b);
  const Tensor a_wins = max ? lt(b, a) : lt(a, b);
  if (grads.wanted(0)) grads[0] = where(same, half, where(a_wins, g, zero));
  if (grads.wanted(1)) grads[1] = where(same, half, where(a_wins, zero, g));
}

struct Maximum {
  static constexpr auto name = "maximum";
  struct Saved { SavedTensor a, b; };
  static Tensor forward(const Tensor& a, const Tensor& b) {
    Tensor out = binary_loop(BinaryKernel::Maximum, name, a, b);
    if (recording(a, b)) record<Maximum>(out, {a, b}, a, b);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    split_extremum(s.a.get(), s.b.get(), true, g, grads);
  }
};

struct Minimum {
  static constexpr auto name = "minimum";
  struct Saved { SavedTensor a, b; };
  static Tensor forward(const Tensor& a, const Tensor& b) {
    Tensor out = binary_loop(BinaryKernel::Minimum, name, a, b);
    if (recording(a, b)) record<Minimum>(out, {a, b}, a, b);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    split_extremum(s.a.get(), s.b.get(), false, g, grads);
  }
};

struct Where {
  static constexpr auto name = "where";
  struct Saved { SavedTensor condition; };
  static Tensor forward(const Tensor& condition, const Tensor& a, const Tensor& b) {
    Tensor out = where_loop(condition, a, b);
    if (recording(a, b)) record<Where>(out, {condition}, condition, a, b);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    const Tensor zero = mul(g, number(0));
    if (grads.wanted(1)) grads[1] = where(s.condition.get(), g, zero);
    if (grads.wanted(2)) grads[2] = where(s.condition.get(), zero, g);
  }
};

struct Eq {
  static constexpr auto name = "eq";
  static Tensor forward(const Tensor& a, const Tensor& b) { return compare_loop(CompareKernel::Eq, name, a, b); }
};
struct Ne {
  static constexpr auto name = "ne";
  static Tensor forward(const Tensor& a, const Tensor& b) { return compare_loop(CompareKernel::Ne, name, a, b); }
};
struct Lt {
  static constexpr auto name = "lt";
  static Tensor forward(const Tensor& a, const Tensor& b) { return compare_loop(CompareKernel::Lt, name, a, b); }
};
struct Le {
  static constexpr auto name = "le";
  static Tensor forward(const Tensor& a, const Tensor& b) { return compare_loop(CompareKernel::Le, name, a, b); }
};
struct Gt {
  static constexpr auto name = "gt";
  static Tensor forward(const Tensor& a, const Tensor& b) { return compare_loop(CompareKernel::Lt, name, b, a); }
};
struct Ge {
  static constexpr auto name = "ge";
  static Tensor forward(const Tensor& a, const Tensor& b) { return compare_loop(CompareKernel::Le, name, b, a); }
};
struct BitwiseAnd {
  static constexpr auto name = "bitwise_and";
  static Tensor forward(const Tensor& a, const Tensor& b) { return binary_loop(BinaryKernel::And, name, a, b); }
};
struct BitwiseOr {
  static constexpr auto name = "bitwise_or";
  static Tensor forward(const Tensor& a, const Tensor& b) { return binary_loop(BinaryKernel::Or, name, a, b); }
};
struct BitwiseXor {
  static constexpr auto name = "bitwise_xor";
  static Tensor forward(const Tensor& a, const Tensor& b) { return binary_loop(BinaryKernel::Xor, name, a, b); }
};
struct LogicalNot {
  static constexpr auto name = "logical_not";
  static Tensor forward(const Tensor& x) { return compare_loop(CompareKernel::Eq, name, x, number(0)); }
};
struct IsNan {
  static constexpr auto name = "isnan";
  static Tensor forward(const Tensor& x) { return compare_loop(CompareKernel::Ne, name, x, x); }
};

// ---- unary: the slope is written in terms of the input x or the output y ----

template <class Op, UnaryKernel kernel, bool to_float = true>
struct OfInput {  // Op::slope(x)
  struct Saved { SavedTensor x; };
  static Tensor forward(const Tensor& x) {
    Tensor out = unary_loop(kernel, Op::name, x, to_float);
    if (recording(x)) record<Op>(out, {x}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) { grads[0] = mul(g, Op::slope(s.x.get())); }
};

template <class Op, UnaryKernel kernel>
struct OfOutput {  // Op::slope(y)
  struct Saved { SavedOutput y; };
  static Tensor forward(const Tensor& x) {
    Tensor out = unary_loop(kernel, Op::name, x, true);
    if (recording(x)) record<Op>(out, {out}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) { grads[0] = mul(g, Op::slope(s.y.get())); }
};

template <class Op, UnaryKernel kernel>
struct Flat {  // the slope is 0 wherever there is one
  using Saved = Nothing;
  static Tensor forward(const Tensor& x) {
    Tensor out = unary_loop(kernel, Op::name, x, false);
    if (recording(x)) record<Op>(out, {}, x);
    return out;
  }
  static void backward(const Saved&, const Tensor& g, Grads& grads) { grads[0] = mul(g, number(0)); }
};

struct Neg {
  static constexpr auto name = "neg";
  using Saved = Nothing;
  static Tensor forward(const Tensor& x) {
    Tensor out = unary_loop(UnaryKernel::Neg, name, x, false);
    if (recording(x)) record<Neg>(out, {}, x);
    return out;
  }
  static void backward(const Saved&, const Tensor& g, Grads& grads) { grads[0] = neg(g); }
};
struct Abs : OfInput<Abs, UnaryKernel::Abs, false> {
  static constexpr auto name = "abs";
  static Tensor slope(const Tensor& x) { return sign(x); }
};
struct Square : OfInput<Square, UnaryKernel::Square, false> {
  static constexpr auto name = "square";
  static Tensor slope(const Tensor& x) { return mul(x, number(2)); }
};
struct Reciprocal : OfOutput<Reciprocal, UnaryKernel::Reciprocal> {
  static constexpr auto name = "reciprocal";
  static Tensor slope(const Tensor& y) { return neg(square(y)); }
};
struct Sqrt : OfOutput<Sqrt, UnaryKernel::Sqrt> {
  static constexpr auto name = "sqrt";
  static Tensor slope(const Tensor& y) { return div(number(0.5), y); }
};
struct Rsqrt : OfOutput<Rsqrt, UnaryKernel::Rsqrt> {
  static constexpr auto name = "rsqrt";
  static Tensor slope(const Tensor& y) { return mul(mul(square(y), y), number(-0.5)); }
};
struct Exp : OfOutput<Exp, UnaryKernel::Exp> {
  static constexpr auto name = "exp";
  static Tensor slope(const Tensor& y) { return y; }
};
struct Expm1 : OfOutput<Expm1, UnaryKernel::Expm1> {
  static constexpr auto name = "expm1";
  static Tensor slope(const Tensor& y) { return add(y, number(1)); }
};
struct Log : OfInput<Log, UnaryKernel::Log> {
  static constexpr auto name = "log";
  static Tensor slope(const Tensor& x) { return div(number(1), x); }
};
struct Log1p : OfInput<Log1p, UnaryKernel::Log1p> {
  static constexpr auto name = "log1p";
  static Tensor slope(const Tensor& x) { return div(number(1), add(x, number(1))); }
};
struct Sin : OfInput<Sin, UnaryKernel::Sin> {
  static constexpr auto name = "sin";
  static Tensor slope(const Tensor& x) { return cos(x); }
};
struct Cos : OfInput<Cos, UnaryKernel::Cos> {
  static constexpr auto name = "cos";
  static Tensor slope(const Tensor& x) { return neg(sin(x)); }
};
struct Erf : OfInput<Erf, UnaryKernel::Erf> {
  static constexpr auto name = "erf";
  static Tensor slope(const Tensor& x) { return mul(exp(neg(square(x))), number(1.1283791670955126)); }
};
struct Sign : Flat<Sign, UnaryKernel::Sign> { static constexpr auto name = "sign"; };
struct Floor : Flat<Floor, UnaryKernel::Floor> { static constexpr auto name = "floor"; };
struct Ceil : Flat<Ceil, UnaryKernel::Ceil> { static constexpr auto name = "ceil"; };
struct Round : Flat<Round, UnaryKernel::Round> { static constexpr auto name = "round"; };

struct Clamp {
  static constexpr auto name = "clamp";
  struct Saved { SavedTensor x; std::optional<double> min, max; };
  static Tensor forward(const Tensor& x, std::optional<double> min, std::optional<double> max) {
    if (!min && !max) fail(ErrorKind::Value, "clamp: give min, max or both");
    Tensor out = x;
    {
      GradMode off(false);
      if (min) out = binary_loop(BinaryKernel::Maximum, name, out, number(*min));
      if (max) out = binary_loop(BinaryKernel::Minimum, name, out, number(*max));
    }
    if (recording(x)) record<Clamp>(out, {x, min, max}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    Tensor out = g;
    const Tensor zero = mul(g, number(0));
    if (s.min) out = where(le(number(*s.min), s.x.get()), out, zero);
    if (s.max) out = where(le(s.x.get(), number(*s.max)), out, zero);
    grads[0] = out;
  }
};

}  // namespace mainspring::tensor::ops
