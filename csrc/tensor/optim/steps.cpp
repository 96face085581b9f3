#include "optim/steps.h"

#include <cmath>
#include <utility>

#include "core/blocking.h"
#include "ops/loops.h"
#include "ops/ops.h"

namespace mainspring::tensor::optim {
namespace {

DType moment_type(DType t) { return t == DType::Float64 ? t : DType::Float32; }

// The gradient as the kernels want it; an error where parameter, gradient and state do not fit together.
Tensor checked_grad(const char* op, const Tensor& param, const Tensor* state) {
  const Tensor grad = Tensor::borrow(param->grad);
  if (!param.contiguous()) fail(ErrorKind::Shape, op, ": the parameter ", param, " must be contiguous");
  if (!grad.same_shape(param)) fail(ErrorKind::Shape, op, ": the gradient ", grad, " does not fit the parameter ", param);
  if (state != nullptr && (!state->same_shape(param) || state->dtype() != moment_type(param.dtype()) || !state->contiguous()))
    fail(ErrorKind::Shape, op, ": the state ", *state, " does not fit the parameter ", param);
  return contiguous(cast(grad, param.dtype()));
}

void check_lists(const char* op, size_t params, size_t states) {
  if (params != states) fail(ErrorKind::Value, op, ": ", params, " parameters, but the state of ", states);
}

}  // namespace

Tensor moment_like(const Tensor& param) { return zeros(param.shape(), moment_type(param.dtype())); }

void adam_step(const std::vector<Tensor>& params, const std::vector<Tensor>& m, const std::vector<Tensor>& v,
               int64_t step, const AdamOptions& o) {
  check_lists("adam", params.size(), m.size());
  check_lists("adam", params.size(), v.size());
  const double t = static_cast<double>(step);
  const double correction1 = 1 - std::pow(o.beta1, t), correction2 = 1 - std::pow(o.beta2, t);
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& p = params[i];
    if (p->grad == nullptr || p.numel() == 0) continue;
    const Tensor grad = checked_grad("adam", p, &m[i]);
    if (!v[i].same_shape(m[i]) || v[i].dtype() != m[i].dtype()) fail(ErrorKind::Shape, "adam: the moments ", m[i], " and ", v[i], " differ");
    const AdamArgs args = {p.data(), grad.data(), m[i].data(), v[i].data(), p.numel(), o.lr, o.beta1, o.beta2, o.eps,
                           o.decoupled ? o.weight_decay : 0, o.decoupled ? 0 : o.weight_decay, correction1, correction2};
    {
      BlockingRegion region(4 * p.numel());
      kernels().adam[float_index(p.dtype())](args);
    }
    p.bump_version();
  }
}

void sgd_step(const std::vector<Tensor>& params, const std::vector<Tensor>& velocity, int64_t step, const SgdOptions& o) {
  if (!velocity.empty()) check_lists("sgd", params.size(), velocity.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& p = params[i];
    if (p->grad == nullptr || p.numel() == 0) continue;
    const Tensor* state = velocity.empty() ? nullptr : &velocity[i];
    const Tensor grad = checked_grad("sgd", p, state);
    const SgdArgs args = {p.data(), grad.data(), state ? state->data() : nullptr, p.numel(), o.lr, o.momentum,
                          o.dampening, o.weight_decay, o.nesterov, step == 1};
    {
      BlockingRegion region(2 * p.numel());
      kernels().sgd[float_index(p.dtype())](args);
    }
    p.bump_version();
  }
}

void zero_grad(const std::vector<Tensor>& params) {
  for (const Tensor& p : params)
    if (p->grad != nullptr) std::exchange(p->grad, nullptr)->drop();
}

double clip_grad_norm(const std::vector<Tensor>& params, double max_norm) {
  double total = 0;
  for (const Tensor& p : params) {
    if (p->grad == nullptr) continue;
    const Tensor grad = cast(Tensor::borrow(p->grad), moment_type(p.dtype()));
    const Tensor squares = ops::sum(ops::square(ops::detach(grad)), {}, false);
    total += read_double(squares.data(), squares.dtype());
  }
  const double norm = std::sqrt(total), scale = max_norm / (norm + 1e-6);
  if (scale < 1)
    for (const Tensor& p : params)
      if (p->grad != nullptr) binary_in_place(BinaryKernel::Mul, "clip_grad_norm", Tensor::borrow(p->grad), ops::number(scale));
  return norm;
}

}  // namespace mainspring::tensor::optim
