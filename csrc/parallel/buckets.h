// Data parallelism: gradients in buckets, each averaged over the ranks while the backward pass goes on.
#pragma once

#include "parallel/group.h"

namespace mainspring::tensor::parallel {

// Hooks on the parameters fill the buckets, in the reverse order of the parameters, which is about the order in which
// the backward pass meets them; a bucket's all-reduce starts with its last gradient.
class GradientBuckets {
 public:
  // A bucket is closed when it holds at least `bucket_elements`; parameters of another dtype start a new one.
  GradientBuckets(const std::vector<Tensor>& params, const std::shared_ptr<Group>& group, int64_t bucket_elements);
  ~GradientBuckets() { remove_hooks(); }
  GradientBuckets(const GradientBuckets&) = delete;
  GradientBuckets& operator=(const GradientBuckets&) = delete;

  void wait();           // for every bucket; a parameter without a gradient counts as zero on this rank
  void store_gradients();  // the averages become .grad of the parameters, for the next backward pass the buckets are empty
  void remove_hooks();
  int64_t size() const { return static_cast<int64_t>(buckets_.size()); }

 private:
  struct Slot { Tensor param, view; int64_t hook; bool filled; };
  struct Bucket {
    Tensor buffer;
    std::vector<Slot> slots;
    size_t num_filled = 0;
    std::shared_ptr<Work> work;
  };
  void take(Bucket& bucket, size_t slot, const Tensor& grad);
  void start(Bucket& bucket);

  std::shared_ptr<Group> group_;
  std::vector<std::unique_ptr<Bucket>> buckets_;
};

}  // namespace mainspring::tensor::parallel
