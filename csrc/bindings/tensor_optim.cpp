// The optimizers' steps; their state and options live in mainspring.tensor.optim.
#include "optim/steps.h"

#include "tensor_object.h"

using nanobind::literals::operator""_a;

namespace mainspring::tensor::python {

void bind_optim(nb::module_& m) {
  using Tensors = std::vector<Tensor>;
  m.def("_moment_like", &optim::moment_like, "param"_a);
  m.def("_adam_step", [](const Tensors& params, const Tensors& m, const Tensors& v, int64_t step, double lr, double beta1,
                         double beta2, double eps, double weight_decay, bool decoupled) {
    optim::adam_step(params, m, v, step, {lr, beta1, beta2, eps, weight_decay, decoupled});
  }, "params"_a, "m"_a, "v"_a, "step"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "decoupled"_a);
  m.def("_sgd_step", [](const Tensors& params, const Tensors& velocity, int64_t step, double lr, double momentum,
                        double dampening, double weight_decay, bool nesterov) {
    optim::sgd_step(params, velocity, step, {lr, momentum, dampening, weight_decay, nesterov});
  }, "params"_a, "velocity"_a, "step"_a, "lr"_a, "momentum"_a, "dampening"_a, "weight_decay"_a, "nesterov"_a);
  m.def("_zero_grad", &optim::zero_grad, "params"_a);
  m.def("_clip_grad_norm", &optim::clip_grad_norm, "params"_a, "max_norm"_a);
}

}  // namespace mainspring::tensor::python
