#include "parallel/softmax.h"

#include <cmath>

#include "core/blocking.h"
#include "ops/loops.h"
#include "ops/ops.h"
#include "thread_pool.h"

namespace mainspring::tensor::parallel {
namespace {

constexpr double kMasked = -10000;  // Megatron's score of a masked place
constexpr int64_t kRowGrain = 16 * 1024;  // elements

}  // namespace

Tensor ScaledMaskedSoftmax::forward(const Tensor& given, const std::optional<Tensor>& mask_, double scale, bool causal) {
  if (!is_float(given.dtype()) || given.ndim() < 2)
    fail(ErrorKind::Shape, name, ": needs floating-point scores [..., queries, keys], not ", given);
  const Tensor x = contiguous(given);
  Tensor mask;
  if (mask_ && mask_->dtype() != DType::Bool) fail(ErrorKind::DType, name, ": the mask must be bool, not ", *mask_);
  if (mask_) mask = contiguous(expand_to(*mask_, x.shape()));
  const int64_t queries = x.size(x.ndim() - 2), keys = x.size(x.ndim() - 1), rows = keys == 0 ? 0 : x.numel() / keys;
  Tensor out = empty_like(x);
  with_type(x.dtype(), [&]<class T>() {
    if constexpr (std::is_floating_point_v<T> || kIsHalf<T>) {
      using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
      constexpr int kIndex = float_index(sizeof(A) == 8 ? DType::Float64 : DType::Float32);
      const A factor = static_cast<A>(scale), masked = static_cast<A>(kMasked);
      BlockingRegion region(4 * x.numel());
      parallel_ranges(rows, kRowGrain / (keys + 1) + 1, [&](int64_t begin, int64_t end) {
        A* row = static_cast<A*>(thread_scratch(static_cast<size_t>(keys) * sizeof(A)));
        for (int64_t r = begin; r < end; ++r) {
          const T* from = x.data<T>() + r * keys;
          T* to = out.data<T>() + r * keys;
          const int64_t seen = causal ? std::max<int64_t>(0, r % queries + 1 + keys - queries) : keys;
          for (int64_t j = 0; j < keys; ++j) row[j] = j < seen ? static_cast<A>(value_of(from[j])) * factor : -A(INFINITY);
          if (mask) {
            const uint8_t* hidden = mask.data<uint8_t>() + r * keys;
            for (int64_t j = 0; j < keys; ++j) row[j] = hidden[j] ? masked : row[j];
          }
          kernels().softmax[kIndex](RowKernel::Softmax, 1, keys, row, row);
          for (int64_t j = 0; j < keys; ++j) to[j] = from_value<T>(row[j]);
        }
      });
    }
  });
  if (recording(given)) record<ScaledMaskedSoftmax>(out, {out, scale}, given);
  return out;
}

// scale y (g - sum(y g))
void ScaledMaskedSoftmax::backward(const Saved& s, const Tensor& g, Grads& grads) {
  const Tensor y = s.out.get();
  Tensor grad;
  if (grad_enabled()) {
    grad = ops::mul(y, ops::sub(g, ops::sum(ops::mul(y, g), {y.ndim() - 1}, true)));
  } else {
    const Tensor given = contiguous(cast(g, y.dtype()));
    const int64_t keys = y.size(y.ndim() - 1);
    grad = empty_like(y);
    BlockingRegion region(2 * y.numel());
    if (keys > 0)
      kernels().softmax_grad[float_index(y.dtype())](RowKernel::Softmax, y.numel() / keys, keys, y.data(), given.data(), grad.data());
  }
  grads[0] = ops::mul(grad, ops::number(s.scale));
}

}  // namespace mainspring::tensor::parallel
