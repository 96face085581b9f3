#include "parallel/cross_entropy.h"

#include <cmath>

#include "core/blocking.h"
#include "ops/loops.h"
#include "ops/ops.h"
#include "thread_pool.h"

namespace mainspring::tensor::parallel {
namespace {

constexpr int64_t kGrain = 16 * 1024;  // elements

// Calls body.operator()<A>() with the type that is computed in.
template <class Body>
void in_type(DType t, Body body) {
  if (t == DType::Float64) body.template operator()<double>();
  else body.template operator()<float>();
}

}  // namespace

Tensor VocabParallelCrossEntropy::forward(const Tensor& logits, const Tensor& given_targets, const GroupPtr& group,
                                          double label_smoothing) {
  if (!is_float(logits.dtype())) fail(ErrorKind::DType, name, ": the logits must be floating-point, not ", logits);
  if (given_targets.dtype() != DType::Int64) fail(ErrorKind::DType, name, ": the targets must be int64, not ", given_targets);
  const int last = logits.ndim() - 1;
  if (last < 0 || given_targets.shape() != Dims(logits->sizes, last))
    fail(ErrorKind::Shape, name, ": the targets ", given_targets, " do not fit the logits ", logits);
  if (!(label_smoothing >= 0 && label_smoothing < 1))
    fail(ErrorKind::Value, name, ": label_smoothing is ", label_smoothing, "; it must lie in [0, 1)");
  const DType type = logits.dtype() == DType::Float64 ? DType::Float64 : DType::Float32;
  const Tensor x = contiguous(cast(logits, type)), targets = contiguous(given_targets);
  const int64_t part = logits.size(last), rows = targets.numel(), classes = part * group->size(), start = group->rank() * part;
  const int64_t* target = targets.data<int64_t>();
  for (int64_t i = 0; i < rows; ++i)
    if (target[i] < 0 || target[i] >= classes)
      fail(ErrorKind::Index, name, ": target ", target[i], " at row ", i, " is not a class in [0, ", classes, ")");
  const double smoothing =
      label_smoothing == 0 || classes < 2 ? 0 : label_smoothing * static_cast<double>(classes) / static_cast<double>(classes - 1);

  const Tensor most = all_reduced(ops::reshape(ops::amax(x, {last}, false), {rows}), group, Reduction::Max);
  const Tensor probabilities = empty(x.shape(), type), local = empty({rows}, DType::Int64);
  const Tensor own = empty({rows}, type), own_sums = empty({smoothing == 0 ? 1 : 2, rows}, type);
  in_type(type, [&]<class A>() {
    constexpr int kType = static_cast<int>(std::is_same_v<A, double> ? DType::Float64 : DType::Float32);
    BlockingRegion region(8 * x.numel());
    parallel_ranges(rows, kGrain / (part + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const A* from = x.data<A>() + i * part;
        A* p = probabilities.data<A>() + i * part;
        const A top = most.data<A>()[i];
        const bool mine = target[i] >= start && target[i] < start + part;
        local.data<int64_t>()[i] = mine ? target[i] - start : -1;
        own.data<A>()[i] = mine ? from[target[i] - start] - top : A(0);
        const KernelSet& k = kernels();
        k.binary[static_cast<int>(BinaryKernel::Sub)][kType](part, from, 1, &top, 0, p);
        auto sum_into = [&](A& sum) {
          sum = 0;
          k.row_reduce[static_cast<int>(ReduceKernel::Sum)][kType](part, p, 1, &sum);
        };
        if (smoothing != 0) sum_into(own_sums.data<A>()[rows + i]);
        k.unary[static_cast<int>(UnaryKernel::Exp)][kType](part, p, 1, p);
        sum_into(own_sums.data<A>()[i]);
      }
    });
  });
  const Tensor predicted = all_reduced(own, group), sums = all_reduced(own_sums, group);

  Tensor losses = empty(targets.shape(), type);
  in_type(type, [&]<class A>() {
    constexpr int kType = static_cast<int>(std::is_same_v<A, double> ? DType::Float64 : DType::Float32);
    BlockingRegion region(x.numel());
    parallel_ranges(rows, kGrain / (part + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const A sum = sums.data<A>()[i], log_sum = std::log(sum), inverse = A(1) / sum;
        A loss = log_sum - predicted.data<A>()[i];
        if (smoothing != 0) {
          const A mean = sums.data<A>()[rows + i] / static_cast<A>(classes) - log_sum;
          loss = loss * static_cast<A>(1 - smoothing) - mean * static_cast<A>(smoothing);
        }
        losses.data<A>()[i] = loss;
        A* p = probabilities.data<A>() + i * part;
        kernels().binary[static_cast<int>(BinaryKernel::Mul)][kType](part, p, 1, &inverse, 0, p);
      }
    });
  });
  if (recording(logits)) record<VocabParallelCrossEntropy>(losses, {probabilities, local, smoothing, classes}, logits);
  return losses;
}

// d loss / d logits = p - (1 - s') onehot - s' / K
void VocabParallelCrossEntropy::backward(const Saved& s, const Tensor& g, Grads& grads) {
  if (grad_enabled()) fail(ErrorKind::Autograd, name, ": has no gradient of higher order");
  const Tensor &p = s.probabilities, weights = contiguous(cast(g, p.dtype())), out = empty(p.shape(), p.dtype());
  const int64_t rows = s.local.numel(), part = rows == 0 ? 0 : p.numel() / rows;
  in_type(p.dtype(), [&]<class A>() {
    BlockingRegion region(2 * p.numel());
    const A even = static_cast<A>(s.smoothing / static_cast<double>(s.classes)), hit = static_cast<A>(1 - s.smoothing);
    parallel_ranges(rows, kGrain / (part + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const A* from = p.data<A>() + i * part;
        A* to = out.data<A>() + i * part;
        const A weight = weights.data<A>()[i];
        for (int64_t j = 0; j < part; ++j) to[j] = (from[j] - even) * weight;
        const int64_t at = s.local.data<int64_t>()[i];
        if (at >= 0) to[at] -= hit * weight;
      }
    });
  });
  grads[0] = out;
}

}  // namespace mainspring::tensor::parallel
