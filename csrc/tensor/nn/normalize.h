// Softmax, LayerNorm and RMSNorm along rows.
#pragma once

#include "core/blocking.h"
#include "ops/shape.h"

namespace mainspring::tensor::ops {

inline int64_t row_count(const Tensor& x, int64_t n) { return n == 0 ? 0 : x.numel() / n; }
inline DType accumulation(DType t) { return t == DType::Float64 ? t : DType::Float32; }

// Along the last dimension of a contiguous tensor; the two kinds differ only in the kernels' argument.
template <class Op, RowKernel kind>
struct SoftmaxRows {
  struct Saved { SavedOutput y; };
  static Tensor forward(const Tensor& given) {
    const Tensor x = contiguous(given);
    Tensor out = empty_like(x);
    const int64_t n = x.ndim() == 0 ? 1 : x.size(x.ndim() - 1);
    BlockingRegion region(8 * x.numel());
    kernels().softmax[float_index(x.dtype())](kind, row_count(x, n), n, x.data(), out.data());
    return out;
  }
  static Tensor recorded(const Tensor& x) {
    Tensor out = forward(x);
    if (recording(x)) record<Op>(out, {out}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    const Tensor y = s.y.get();
    if (grad_enabled()) {
      grads[0] = Op::gradient(y, g);
      return;
    }
    const Tensor grad = contiguous(g);
    Tensor out = empty_like(y);
    const int64_t n = y.ndim() == 0 ? 1 : y.size(y.ndim() - 1);
    BlockingRegion region(4 * y.numel());
    kernels().softmax_grad[float_index(y.dtype())](kind, row_count(y, n), n, y.data(), grad.data(), out.data());
    grads[0] = out;
  }
};

struct LastSoftmax : SoftmaxRows<LastSoftmax, RowKernel::Softmax> {
  static constexpr auto name = "softmax";
  static Tensor gradient(const Tensor& y, const Tensor& g) {
    return mul(y, sub(g, sum(mul(g, y), {-1}, true)));
  }
};
struct LastLogSoftmax : SoftmaxRows<LastLogSoftmax, RowKernel::LogSoftmax> {
  static constexpr auto name = "log_softmax";
  static Tensor gradient(const Tensor& y, const Tensor& g) {
    return sub(g, mul(exp(y), sum(g, {-1}, true)));
  }
};

template <class Last>
Tensor softmax_along(const Tensor& x, int64_t dim) {
  if (!is_float(x.dtype())) fail(ErrorKind::DType, Last::name, ": needs a floating-point tensor, not ", x);
  const int d = wrap_dim(Last::name, dim, x.ndim());
  if (x.ndim() == 0 || d == x.ndim() - 1) return Last::recorded(x);
  return transpose(Last::recorded(transpose(x, d, -1)), d, -1);
}
struct Softmax {
  static constexpr auto name = "softmax";
  static Tensor forward(const Tensor& x, int64_t dim) { return softmax_along<LastSoftmax>(x, dim); }
};
struct LogSoftmax {
  static constexpr auto name = "log_softmax";
  static Tensor forward(const Tensor& x, int64_t dim) { return softmax_along<LastLogSoftmax>(x, dim); }
};

// Shared by both norms: h = (x - mean) rstd (mean 0 for RMSNorm), out = h weight + bias, over the last dimension.
struct Normalized {
  Tensor x, out, mean, rstd;
};
inline void check_norm(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  if (!is_float(x.dtype()) || x.ndim() == 0)
    fail(ErrorKind::DType, op, ": needs a floating-point tensor with at least one dimension, not ", x);
  for (const Tensor* t : {&weight, &bias})
    if (*t && (t->ndim() != 1 || t->size(0) != x.size(x.ndim() - 1) || t->dtype() != x.dtype()))
      fail(ErrorKind::Shape, op, ": the weight or bias ", *t, " does not fit the last dimension of ", x);
}
inline Normalized normalize(const Tensor& given, const Tensor& weight, const Tensor& bias, double eps, bool center) {
  const Tensor x = contiguous(given);
  Dims rows = x.shape();
  rows[rows.size() - 1] = 1;
  const DType acc = accumulation(x.dtype());
  Normalized r = {x, empty_like(x), center ? empty(rows, acc) : Tensor(), empty(rows, acc)};
  const Tensor w = weight ? contiguous(weight) : weight, b = bias ? contiguous(bias) : bias;
  const int64_t n = x.size(x.ndim() - 1);
  BlockingRegion region(4 * x.numel());
  kernels().norm[float_index(x.dtype())]({x.data(), w ? w.data() : nullptr, b ? b.data() : nullptr, r.out.data(),
                                          r.mean ? r.mean.data() : nullptr, r.rstd.data(), row_count(x, n), n, eps});
  return r;
}
// Gradients 0: x, 1: weight, 2: bias.
inline void normalize_grad(const Tensor& x, const Tensor& weight, const Tensor& mean, const Tensor& rstd, const Tensor& g_,
                           Grads& grads, bool has_bias) {
  const Tensor g = contiguous(g_), w = weight ? contiguous(weight) : weight;
  const int64_t n = x.size(x.ndim() - 1);
  const DType acc = accumulation(x.dtype());
  const Tensor gx = grads.wanted(0) ? empty_like(x) : Tensor();
  const Tensor gw = grads.wanted(1) ? zeros({n}, acc) : Tensor();
  const Tensor gb = has_bias && grads.wanted(2) ? zeros({n}, acc) : Tensor();
  {
    BlockingRegion region(6 * x.numel());
    auto at = [](const Tensor& t) { return t ? t.data() : nullptr; };
    kernels().norm_grad[float_index(x.dtype())](
        {x.data(), at(w), g.data(), at(mean), rstd.data(), at(gx), at(gw), at(gb), row_count(x, n), n});
  }
  if (gx) grads[0] = gx;
  if (gw) grads[1] = gw;
  if (gb) grads[2] = gb;
}
// The same with ops, for higher-order gradients; mean and rstd are computed anew from x.
inline void normalize_grad_with_ops(const Tensor& x, const Tensor& weight, double eps, bool center, const Tensor& g,
                                    Grads& grads, bool has_bias) {
  const Tensor c = center ? sub(x, mean(x, {-1}, true)) : x;
  const Tensor rstd = div(number(1), sqrt(add(mean(square(c), {-1}, true), number(eps))));
  const Tensor h = mul(c, rstd);
  const Tensor u = weight ? mul(g, weight) : g;
  if (grads.wanted(0)) {
    const Tensor rest = center ? sub(u, mean(u, {-1}, true)) : u;
    grads[0] = mul(rstd, sub(rest, mul(h, mean(mul(u, h), {-1}, true))));
  }
  if (grads.wanted(1)) grads[1] = mul(g, h);  // the engine sums over the rows
  if (has_bias && grads.wanted(2)) grads[2] = g;
}

struct LayerNorm {
  static constexpr auto name = "layer_norm";
  struct Saved { SavedTensor x, weight; Tensor mean, rstd; double eps; };
  static Tensor forward(const Tensor& x, const std::optional<Tensor>& weight_, const std::optional<Tensor>& bias_, double eps) {
    const Tensor weight = weight_.value_or(Tensor()), bias = bias_.value_or(Tensor());
    check_norm(name, x, weight, bias);
    Normalized r = normalize(x, weight, bias, eps, true);
    if (recording(x, weight, bias)) record<LayerNorm>(r.out, {x, weight, r.mean, r.rstd, eps}, x, weight, bias);
    return r.out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    if (grad_enabled()) return normalize_grad_with_ops(s.x.get(), s.weight.get(), s.eps, true, g, grads, true);
    normalize_grad(contiguous(s.x.get()), s.weight.get(), s.mean, s.rstd, g, grads, true);
  }
};

// Zhang and Sennrich, "Root mean square layer normalization", 2019.
struct RmsNorm {
  static constexpr auto name = "rms_norm";
  struct Saved { SavedTensor x, weight; Tensor rstd; double eps; };
  static Tensor forward(const Tensor& x, const std::optional<Tensor>& weight_, double eps) {
    const Tensor weight = weight_.value_or(Tensor());
    check_norm(name, x, weight, Tensor());
    Normalized r = normalize(x, weight, Tensor(), eps, false);
    if (recording(x, weight)) record<RmsNorm>(r.out, {x, weight, r.rstd, eps}, x, weight);
    return r.out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    if (grad_enabled()) return normalize_grad_with_ops(s.x.get(), s.weight.get(), s.eps, false, g, grads, false);
    normalize_grad(contiguous(s.x.get()), s.weight.get(), Tensor(), s.rstd, g, grads, false);
  }
};

}  // namespace mainspring::tensor::ops
