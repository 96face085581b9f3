#include "parallel/buckets.h"

#include <cstring>

#include "autograd/engine.h"
#include "ops/loops.h"

namespace mainspring::tensor::parallel {

GradientBuckets::GradientBuckets(const std::vector<Tensor>& params, const std::shared_ptr<Group>& group, int64_t bucket_elements)
    : group_(group) {
  if (bucket_elements < 1) fail(ErrorKind::Value, "DataParallel: bucket_elements is ", bucket_elements, "; it must be positive");
  int64_t held = 0;
  for (size_t i = params.size(); i-- > 0;) {
    const Tensor& p = params[i];
    const bool fits = !buckets_.empty() && held < bucket_elements && buckets_.back()->slots[0].param.dtype() == p.dtype();
    if (!fits) {
      buckets_.push_back(std::make_unique<Bucket>());
      held = 0;
    }
    held += p.numel();
    buckets_.back()->slots.push_back({p, Tensor(), 0, false});
  }
  for (const auto& bucket : buckets_) {
    int64_t total = 0, at = 0;
    for (const Slot& s : bucket->slots) total += s.param.numel();
    bucket->buffer = zeros({total}, bucket->slots[0].param.dtype());
    for (size_t i = 0; i < bucket->slots.size(); ++i) {
      Slot& s = bucket->slots[i];
      Dims strides = s.param.shape();
      int64_t step = 1;
      for (int d = strides.size() - 1; d >= 0; --d) {
        const int64_t size = strides[d];
        strides[d] = step;
        step *= size;
      }
      s.view = make_view(bucket->buffer, s.param.shape(), strides, at);
      at += s.param.numel();
      // The hook lives at most as long as this: remove_hooks() runs before the buckets go.
      s.hook = add_hook(s.param, [this, b = bucket.get(), i](const Tensor& grad) {
        take(*b, i, grad);
        return Tensor();
      });
    }
  }
}

void GradientBuckets::take(Bucket& bucket, size_t index, const Tensor& grad) {
  Slot& slot = bucket.slots[index];
  if (slot.filled)
    fail(ErrorKind::Autograd, "DataParallel: a second backward pass before finish(); accumulate with main_grad instead");
  copy_into(slot.view, grad);
  slot.filled = true;
  if (++bucket.num_filled == bucket.slots.size()) start(bucket);
}

void GradientBuckets::start(Bucket& bucket) {
  bucket.work = group_->collectives.submit(
      [group = group_.get(), buffer = bucket.buffer] { group->all_reduce(buffer, Reduction::Avg); });
}

void GradientBuckets::wait() {
  for (const auto& bucket : buckets_) {
    if (bucket->work) continue;
    for (const Slot& s : bucket->slots)
      if (!s.filled) std::memset(s.view.data(), 0, static_cast<size_t>(s.view.numel() * itemsize(s.view.dtype())));
    start(*bucket);
  }
  for (const auto& bucket : buckets_) bucket->work->wait();
}

void GradientBuckets::store_gradients() {
  for (const auto& bucket : buckets_) {
    for (Slot& s : bucket->slots) {
      TensorImpl* old = std::exchange(s.param->grad, copy_of(s.view).release());
      if (old != nullptr) old->drop();
      s.filled = false;
    }
    bucket->num_filled = 0;
    bucket->work.reset();
  }
}

void GradientBuckets::remove_hooks() {
  for (const auto& bucket : buckets_)
    for (Slot& s : bucket->slots)
      if (s.hook != 0) remove_hook(s.param, std::exchange(s.hook, 0));
}

}  // namespace mainspring::tensor::parallel
