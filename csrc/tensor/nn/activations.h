// Activations. Without a tape for the backward pass their gradient is one fused loop; with one (higher-order
// gradients) it is written with ops.
#pragma once

#include "ops/elementwise.h"

namespace mainspring::tensor::ops {

template <class Op, UnaryKernel kernel, BinaryKernel gradient>
struct ActivationOfInput {  // Op::slope(x)
  struct Saved { SavedTensor x; };
  static Tensor forward(const Tensor& x) {
    Tensor out = unary_loop(kernel, Op::name, x, true);
    if (recording(x)) record<Op>(out, {x}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    const Tensor& x = s.x.get();
    grads[0] = grad_enabled() ? mul(g, Op::slope(x)) : binary_loop(gradient, Op::name, g, x);
  }
};

template <class Op, UnaryKernel kernel, BinaryKernel gradient>
struct ActivationOfOutput {  // Op::slope(y)
  struct Saved { SavedOutput y; };
  static Tensor forward(const Tensor& x) {
    Tensor out = unary_loop(kernel, Op::name, x, true);
    if (recording(x)) record<Op>(out, {out}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    const Tensor y = s.y.get();
    grads[0] = grad_enabled() ? mul(g, Op::slope(y)) : binary_loop(gradient, Op::name, g, y);
  }
};

struct Tanh : ActivationOfOutput<Tanh, UnaryKernel::Tanh, BinaryKernel::TanhGrad> {
  static constexpr auto name = "tanh";
  static Tensor slope(const Tensor& y) { return sub(number(1), square(y)); }
};
struct Sigmoid : ActivationOfOutput<Sigmoid, UnaryKernel::Sigmoid, BinaryKernel::SigmoidGrad> {
  static constexpr auto name = "sigmoid";
  static Tensor slope(const Tensor& y) { return mul(y, sub(number(1), y)); }
};
struct Relu {
  static constexpr auto name = "relu";
  struct Saved { SavedOutput y; };
  static Tensor forward(const Tensor& x) {
    Tensor out = unary_loop(UnaryKernel::Relu, name, x, false);
    if (recording(x)) record<Relu>(out, {out}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    const Tensor y = s.y.get();
    grads[0] = grad_enabled() ? mul(g, to(lt(number(0), y), g.dtype()))
                              : binary_loop(BinaryKernel::ReluGrad, name, g, y);
  }
};
struct Silu : ActivationOfInput<Silu, UnaryKernel::Silu, BinaryKernel::SiluGrad> {
  static constexpr auto name = "silu";
  static Tensor slope(const Tensor& x) {
    const Tensor s = sigmoid(x);
    return mul(s, add(mul(x, sub(number(1), s)), number(1)));
  }
};
struct GeluErf : ActivationOfInput<GeluErf, UnaryKernel::Gelu, BinaryKernel::GeluGrad> {
  static constexpr auto name = "gelu";
  static Tensor slope(const Tensor& x) {
    const Tensor cdf = mul(add(erf(mul(x, number(0.70710678118654752440))), number(1)), number(0.5));
    return add(cdf, mul(x, mul(exp(mul(square(x), number(-0.5))), number(0.39894228040143267794))));
  }
};
struct GeluTanh : ActivationOfInput<GeluTanh, UnaryKernel::GeluTanh, BinaryKernel::GeluTanhGrad> {
  static constexpr auto name = "gelu";
  static Tensor slope(const Tensor& x) {
    constexpr double kScale = 0.79788456080286535588, kCubic = 0.044715;
    const Tensor x2 = square(x);
    const Tensor t = tanh(mul(mul(x, add(mul(x2, number(kCubic)), number(1))), number(kScale)));
    const Tensor inner = mul(add(mul(x2, number(3 * kCubic)), number(1)), number(kScale));
    const Tensor slope = mul(mul(x, sub(number(1), square(t))), inner);
    return mul(add(add(t, number(1)), slope), number(0.5));
  }
};
struct Gelu {
  static constexpr auto name = "gelu";
  static Tensor forward(const Tensor& x, const std::string& approximate) {
    if (approximate == "none") return GeluErf::forward(x);
    if (approximate == "tanh") return GeluTanh::forward(x);
    fail(ErrorKind::Value, "gelu: approximate is '", approximate, "'; it must be 'none' or 'tanh'");
  }
};

// silu(gate) * up
struct Swiglu {
  static constexpr auto name = "swiglu";
  struct Saved { SavedTensor gate, up; };
  static Tensor forward(const Tensor& gate, const Tensor& up) {
    Tensor out = binary_loop(BinaryKernel::Swiglu, name, gate, up);
    if (recording(gate, up)) record<Swiglu>(out, {gate, up}, gate, up);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    const Tensor &gate = s.gate.get(), &up = s.up.get();
    if (grads.wanted(0)) {
      const Tensor inner = mul(g, up);
      grads[0] = grad_enabled() ? mul(inner, Silu::slope(gate)) : binary_loop(BinaryKernel::SiluGrad, name, inner, gate);
    }
    if (grads.wanted(1)) grads[1] = mul(g, silu(gate));
  }
};

}  // namespace mainspring::tensor::ops
