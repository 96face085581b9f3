// Activations and losses that are formulas over other ops.
#pragma once

#include "nn/activations.h"
#include "nn/loss.h"
#include "ops/composite.h"

namespace mainspring::tensor::ops {

// ---- activations ----

inline Tensor zero_like(const Tensor& x) { return full_int({}, 0, x.dtype()); }
MAINSPRING_COMPOSITE(LeakyRelu, "leaky_relu", (const Tensor& x, double negative_slope),
  return where(lt(number(0), detach(x)), x, mul(x, number(negative_slope)));)
MAINSPRING_COMPOSITE(Prelu, "prelu", (const Tensor& x, const Tensor& weight),
  Tensor w = weight;
  if (weight.numel() != 1) {
    if (x.ndim() < 2 || weight.ndim() != 1 || weight.size(0) != x.size(1)) fail(ErrorKind::Shape, "prelu: the weight ", weight, " does not fit ", x);
    Dims shape = x.shape();
    for (int d = 0; d < x.ndim(); ++d) shape[d] = d == 1 ? x.size(1) : 1;
    w = reshape(weight, shape);
  } else {
    w = reshape(weight, {});
  }
  return where(lt(number(0), detach(x)), x, mul(x, w));)
MAINSPRING_COMPOSITE(Elu, "elu", (const Tensor& x, double alpha),
  const Tensor positive = lt(number(0), detach(x));
  return where(positive, x, mul(Expm1::forward(where(positive, zero_like(x), x)), number(alpha)));)
MAINSPRING_COMPOSITE(Celu, "celu", (const Tensor& x, double alpha),
  const Tensor positive = lt(number(0), detach(x));
  return where(positive, x, mul(Expm1::forward(div(where(positive, zero_like(x), x), number(alpha))), number(alpha)));)
MAINSPRING_COMPOSITE(Selu, "selu", (const Tensor& x),
  if (is_half(x.dtype())) return to(forward(to(x, DType::Float32)), x.dtype());
  return mul(Elu::forward(x, 1.6732632423543772848), number(1.0507009873554804934));)
MAINSPRING_COMPOSITE(Relu6, "relu6", (const Tensor& x), return Clamp::forward(x, 0.0, 6.0);)
MAINSPRING_COMPOSITE(Hardtanh, "hardtanh", (const Tensor& x, double min_val, double max_val), return Clamp::forward(x, min_val, max_val);)
MAINSPRING_COMPOSITE(Hardsigmoid, "hardsigmoid", (const Tensor& x), return div(Clamp::forward(add(x, number(3)), 0.0, 6.0), number(6));)
MAINSPRING_COMPOSITE(Hardswish, "hardswish", (const Tensor& x), return mul(x, Hardsigmoid::forward(x));)
MAINSPRING_COMPOSITE(Hardshrink, "hardshrink", (const Tensor& x, double lambd),
  const Tensor fixed = detach(x);
  const Tensor near = LogicalAnd::forward(le(number(-lambd), fixed), le(fixed, number(lambd)));
  return where(near, zero_like(x), x);)
MAINSPRING_COMPOSITE(Softshrink, "softshrink", (const Tensor& x, double lambd),
  const Tensor fixed = detach(x);
  return where(lt(number(lambd), fixed), sub(x, number(lambd)), where(lt(fixed, number(-lambd)), add(x, number(lambd)), mul(x, number(0))));)
MAINSPRING_COMPOSITE(Softplus, "softplus", (const Tensor& x, double beta, double threshold),
  const Tensor scaled = mul(x, number(beta));
  const Tensor linear = lt(number(threshold), detach(scaled));
  return where(linear, x, div(Log1p::forward(exp(where(linear, zero_like(x), scaled))), number(beta)));)
MAINSPRING_COMPOSITE(LogSigmoid, "logsigmoid", (const Tensor& x),
  return sub(Minimum::forward(x, zero_like(x)), Log1p::forward(exp(neg(Abs::forward(x)))));)
MAINSPRING_COMPOSITE(Softsign, "softsign", (const Tensor& x), return div(x, add(Abs::forward(x), number(1)));)
MAINSPRING_COMPOSITE(Tanhshrink, "tanhshrink", (const Tensor& x), return sub(x, tanh(x));)
MAINSPRING_COMPOSITE(Mish, "mish", (const Tensor& x), return mul(x, tanh(Softplus::forward(x, 1, 20)));)
MAINSPRING_COMPOSITE(Threshold, "threshold", (const Tensor& x, double threshold, double value),
  return where(lt(number(threshold), detach(x)), x, full({}, value, x.dtype()));)
MAINSPRING_COMPOSITE(Softmin, "softmin", (const Tensor& x, int64_t dim), return softmax(neg(x), dim);)
MAINSPRING_COMPOSITE(Glu, "glu", (const Tensor& x, int64_t dim),
  const int d = wrap_dim(name, dim, x.ndim());
  if (x.ndim() == 0 || x.size(d) % 2 != 0) fail(ErrorKind::Shape, "glu: dimension ", d, " of ", x, " is not even");
  const int64_t half = x.size(d) / 2;
  return mul(Narrow::forward(x, d, 0, half), sigmoid(Narrow::forward(x, d, half, half)));)

// ---- losses ----

inline Tensor reduced(const char* op, const Tensor& losses, const std::string& reduction) {
  if (reduction == "mean") return mean(losses, {}, false);
  if (reduction == "sum") return sum(losses, {}, false);
  if (reduction == "none") return losses;
  fail(ErrorKind::Value, op, ": reduction is '", reduction, "'; it must be 'mean', 'sum' or 'none'");
}
MAINSPRING_COMPOSITE(MseLoss, "mse_loss", (const Tensor& x, const Tensor& target, const std::string& reduction),
  return reduced(name, square(sub(x, target)), reduction);)
MAINSPRING_COMPOSITE(L1Loss, "l1_loss", (const Tensor& x, const Tensor& target, const std::string& reduction),
  return reduced(name, Abs::forward(sub(x, target)), reduction);)
MAINSPRING_COMPOSITE(HuberLoss, "huber_loss", (const Tensor& x, const Tensor& target, const std::string& reduction, double delta),
  const Tensor far = Abs::forward(sub(x, target));
  const Tensor inside = le(detach(far), number(delta));
  return reduced(name, where(inside, mul(square(far), number(0.5)), mul(sub(far, number(0.5 * delta)), number(delta))), reduction);)
MAINSPRING_COMPOSITE(SmoothL1Loss, "smooth_l1_loss", (const Tensor& x, const Tensor& target, const std::string& reduction, double beta),
  if (beta == 0) return L1Loss::forward(x, target, reduction);
  const Tensor far = Abs::forward(sub(x, target));
  const Tensor inside = lt(detach(far), number(beta));
  return reduced(name, where(inside, mul(square(far), number(0.5 / beta)), sub(far, number(0.5 * beta))), reduction);)
MAINSPRING_COMPOSITE(BceWithLogits, "binary_cross_entropy_with_logits", (const Tensor& x, const Tensor& target, const std::string& reduction),
  return reduced(name, sub(mul(sub(number(1), target), x), LogSigmoid::forward(x)), reduction);)
MAINSPRING_COMPOSITE(BinaryCrossEntropy, "binary_cross_entropy", (const Tensor& p, const Tensor& target, const std::string& reduction),
  const Tensor yes = Clamp::forward(log(p), -100.0, std::nullopt), no = Clamp::forward(Log1p::forward(neg(p)), -100.0, std::nullopt);
  return reduced(name, sub(mul(sub(target, number(1)), no), mul(target, yes)), reduction);)
MAINSPRING_COMPOSITE(KlDiv, "kl_div", (const Tensor& x, const Tensor& target, const std::string& reduction, bool log_target),
  const Tensor losses = log_target ? mul(exp(target), sub(target, x)) : sub(Xlogy::forward(target, target), mul(target, x));
  if (reduction == "batchmean") return div(sum(losses, {}, false), number(static_cast<double>(x.ndim() == 0 ? 1 : x.size(0))));
  return reduced(name, losses, reduction);)
MAINSPRING_COMPOSITE(NllLoss, "nll_loss", (const Tensor& x, const Tensor& target, int64_t ignore_index, const std::string& reduction),
  if (x.ndim() != 2 || target.ndim() != 1 || x.size(0) != target.size(0)) fail(ErrorKind::Shape, "nll_loss: needs [N, C] and targets [N], not ", x, " and ", target);
  const Tensor ignored = eq(target, full_int({}, ignore_index, DType::Int64));
  const Tensor safe = where(ignored, full_int({}, 0, DType::Int64), target);
  const Tensor picked = reshape(gather(x, 1, reshape(safe, {-1, 1})), {x.size(0)});
  const Tensor losses = where(ignored, zero_like(x), neg(picked));
  if (reduction != "mean") return reduced(name, losses, reduction);
  return div(sum(losses, {}, false), to(sum(to(LogicalNot::forward(ignored), DType::Int64), {}, false), x.dtype()));)
MAINSPRING_COMPOSITE(CosineSimilarity, "cosine_similarity", (const Tensor& left, const Tensor& right, int64_t dim, double eps),
  const Dims shape = broadcast_shapes(name, left.shape(), right.shape());
  const Tensor a = expand(left, shape), b = expand(right, shape);
  auto size = [&](const Tensor& x) { return Clamp::forward(VectorNorm::forward(x, 2, {dim}, true), eps, std::nullopt); };
  return sum(mul(div(a, size(a)), div(b, size(b))), {dim}, false);)
MAINSPRING_COMPOSITE(Normalize, "normalize", (const Tensor& x, double p, int64_t dim, double eps),
  return div(x, Clamp::forward(VectorNorm::forward(x, p, {dim}, true), eps, std::nullopt));)
MAINSPRING_COMPOSITE(PairwiseDistance, "pairwise_distance", (const Tensor& a, const Tensor& b, double p, double eps, bool keepdim),
  return VectorNorm::forward(add(sub(a, b), number(eps)), p, {-1}, keepdim);)
MAINSPRING_COMPOSITE(GroupNorm, "group_norm", (const Tensor& x, int64_t num_groups, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps),
  if (x.ndim() < 2 || num_groups < 1 || x.size(1) % num_groups != 0)
    fail(ErrorKind::Shape, "group_norm: the ", x.ndim() < 2 ? 0 : x.size(1), " channels of ", x, " do not fall into ", num_groups, " groups");
  const int64_t per_group = x.size(0) * num_groups == 0 ? 0 : x.numel() / (x.size(0) * num_groups);
  Tensor out = reshape(LayerNorm::forward(reshape(x, {x.size(0), num_groups, per_group}), std::nullopt, std::nullopt, eps), x.shape());
  Dims channels = x.shape();
  for (int d = 0; d < x.ndim(); ++d) channels[d] = d == 1 ? x.size(1) : 1;
  if (weight) out = mul(out, reshape(*weight, channels));
  if (bias) out = add(out, reshape(*bias, channels));
  return out;)

}  // namespace mainspring::tensor::ops
