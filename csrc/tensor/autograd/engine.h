// The backward pass, and what a tensor owns of it: hooks, .grad, retain_grad.
#pragma once

#include "autograd/node.h"

namespace mainspring::tensor {

struct BackwardOptions {
  bool retain_graph = false;
  bool create_graph = false;  // record the backward pass itself, for higher-order gradients
};

// Adds d(sum(root * grad)) / d(leaf) to .grad of every leaf below. grad may be empty for a single element.
void backward(const Tensor& root, const Tensor& grad, BackwardOptions options);

// The gradients of `inputs` alone; an input that root does not depend on gives an empty tensor.
std::vector<Tensor> gradients(const Tensor& root, const Tensor& grad, const std::vector<Tensor>& inputs,
                              BackwardOptions options);

// The hook sees the whole gradient of the tensor, once for each backward pass.
int64_t add_hook(const Tensor& t, Hook hook);
void remove_hook(const Tensor& t, int64_t id);
void retain_grad(const Tensor& t);

void set_requires_grad(const Tensor& t, bool value);

// Refuses a write in place that the tape could not follow.
void check_in_place(const char* op, const Tensor& t);

Tensor sum_to(const Tensor& t, const Dims& shape);  // undoes broadcasting

}  // namespace mainspring::tensor
