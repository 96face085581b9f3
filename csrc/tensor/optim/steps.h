// One step of an optimizer over a list of parameters. A parameter without a gradient is left alone.
#pragma once

#include "core/tensor.h"

namespace mainspring::tensor::optim {

// Moments are float32 (float64 for float64 parameters), contiguous, of the parameters' shapes.
Tensor moment_like(const Tensor& param);

struct AdamOptions {
  double lr, beta1, beta2, eps;
  double weight_decay;
  bool decoupled;  // AdamW: the decay acts on the parameter, not through the gradient
};
// `step` counts from 1.
void adam_step(const std::vector<Tensor>& params, const std::vector<Tensor>& m, const std::vector<Tensor>& v,
               int64_t step, const AdamOptions& options);

struct SgdOptions {
  double lr, momentum, dampening, weight_decay;
  bool nesterov;
};
// `velocity` is empty without momentum; the first step sets it to the gradient.
void sgd_step(const std::vector<Tensor>& params, const std::vector<Tensor>& velocity, int64_t step,
              const SgdOptions& options);

void zero_grad(const std::vector<Tensor>& params);

// Scales all gradients so that their joint norm is at most `max_norm`; returns the norm before.
double clip_grad_norm(const std::vector<Tensor>& params, double max_norm);

}  // namespace mainspring::tensor::optim
