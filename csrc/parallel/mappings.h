// What flows between ranks forward, and its transpose backward: Megatron's mapping functions.
//
// Each backward is the forward of another of these ops, so that gradients of any order flow between the ranks too.
#pragma once

#include "autograd/engine.h"
#include "parallel/group.h"

namespace mainspring::tensor::parallel {

using GroupPtr = std::shared_ptr<Group>;

// The collectives as functions of a tensor; nothing is recorded.
Tensor all_reduced(const Tensor& x, const GroupPtr& group, Reduction op = Reduction::Sum);  // of its own storage
Tensor gathered(const Tensor& x, const GroupPtr& group, bool last);  // the ranks' parts along the first or last dimension
Tensor reduce_scattered(const Tensor& x, const GroupPtr& group);     // this rank's part of the sum, of the first dimension
Tensor own_part(const Tensor& x, const GroupPtr& group, int64_t dim);  // this rank's share, of its own storage

struct ReduceFromTensorParallel;

// As it is; the gradients of the ranks are summed.
struct CopyToTensorParallel {
  static constexpr auto name = "copy_to_tensor_parallel";
  struct Saved { GroupPtr group; };
  static Tensor forward(const Tensor& x, const GroupPtr& group);
  static void backward(const Saved& s, const Tensor& g, Grads& grads);
};

// The sum over the ranks; the gradient as it is.
struct ReduceFromTensorParallel {
  static constexpr auto name = "reduce_from_tensor_parallel";
  struct Saved { GroupPtr group; };
  static Tensor forward(const Tensor& x, const GroupPtr& group);
  static void backward(const Saved& s, const Tensor& g, Grads& grads);
};

// This rank's part of the first or last dimension; the gradients are gathered.
struct Scatter {
  static constexpr auto name = "scatter_to_ranks";
  struct Saved { GroupPtr group; bool last; };
  static Tensor forward(const Tensor& x, const GroupPtr& group, bool last);
  static void backward(const Saved& s, const Tensor& g, Grads& grads);
};

// All ranks' parts; backward the own part of the gradient, or (sums) of the ranks' summed gradients.
struct Gather {
  static constexpr auto name = "gather_from_ranks";
  struct Saved { GroupPtr group; bool last, sums; };
  static Tensor forward(const Tensor& x, const GroupPtr& group, bool last, bool sums);
  static void backward(const Saved& s, const Tensor& g, Grads& grads);
};

// This rank's part of the sum over the ranks, of the first dimension; the gradients are gathered.
struct ReduceScatter {
  static constexpr auto name = "reduce_scatter_to_sequence_parallel";
  struct Saved { GroupPtr group; };
  static Tensor forward(const Tensor& x, const GroupPtr& group);
  static void backward(const Saved& s, const Tensor& g, Grads& grads);
};

// Piece r of the first dimension goes to rank r, and back.
struct AllToAll {
  static constexpr auto name = "all_to_all";
  struct Saved { GroupPtr group; };
  static Tensor forward(const Tensor& x, const GroupPtr& group);
  static void backward(const Saved& s, const Tensor& g, Grads& grads);
};

}  // namespace mainspring::tensor::parallel
