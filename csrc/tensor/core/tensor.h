// Tensor: a counted reference to sizes, strides and a place in a storage, with its part in the tape.
//
// Who owns what: a Tensor (handle) owns a count of its TensorImpl, the impl owns a count of its Storage and
// of the tape node that made it, the node owns its inputs. A Python object owns one count of its impl;
// `wrapper` points back at it without owning, so that one impl has at most one Python object.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "core/allocator.h"
#include "core/dtype.h"
#include "core/shape.h"

namespace mainspring::tensor {

class Tensor;
struct Node;

// Memory that tensors share. Own memory follows the header in the same block; foreign memory has a release.
struct alignas(64) Storage {
  std::atomic<uint32_t> refs{1};
  std::atomic<uint32_t> version{0};  // counts the writes in place; saved tensors are checked against it
  size_t bytes = 0;
  void* data = nullptr;
  void (*release)(void* owner) = nullptr;
  void* owner = nullptr;

  static Storage* create(size_t bytes);
  static Storage* foreign(void* data, size_t bytes, void* owner, void (*release)(void*));
  void drop() {
    if (refs.fetch_sub(1, std::memory_order_acq_rel) == 1) destroy();
  }
  void destroy();
};

using Hook = std::function<Tensor(const Tensor&)>;  // may return an empty tensor: the gradient stays as it is
struct Hooks {
  std::vector<std::pair<int64_t, Hook>> entries;
};

struct TensorImpl : Pooled {
  std::atomic<uint32_t> refs{1};
  DType dtype;
  uint8_t ndim;
  bool contiguous;
  bool requires_grad = false;
  bool weak = false;  // made from a Python number: does not decide the dtype of a result
  bool retains_grad = false;
  int64_t numel;
  char* data;
  Storage* storage;
  void* wrapper = nullptr;
  Node* grad_fn = nullptr;     // owned
  TensorImpl* grad = nullptr;  // owned
  Hooks* hooks = nullptr;      // owned; of a leaf (a non-leaf's hooks are its node's)
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];

  TensorImpl();
  ~TensorImpl();
  void retain() { refs.fetch_add(1, std::memory_order_relaxed); }
  void drop() {
    if (refs.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }
};

int64_t live_tensors();

class Tensor {
 public:
  Tensor() = default;
  Tensor(const Tensor& other) : impl_(other.impl_) {
    if (impl_) impl_->retain();
  }
  Tensor(Tensor&& other) noexcept : impl_(std::exchange(other.impl_, nullptr)) {}
  Tensor& operator=(Tensor other) noexcept {
    std::swap(impl_, other.impl_);
    return *this;
  }
  ~Tensor() {
    if (impl_) impl_->drop();
  }
  static Tensor steal(TensorImpl* impl) {
    Tensor t;
    t.impl_ = impl;
    return t;
  }
  static Tensor borrow(TensorImpl* impl) {
    if (impl) impl->retain();
    return steal(impl);
  }
  TensorImpl* release() { return std::exchange(impl_, nullptr); }

  explicit operator bool() const { return impl_ != nullptr; }
  TensorImpl* get() const { return impl_; }
  TensorImpl* operator->() const { return impl_; }

  DType dtype() const { return impl_->dtype; }
  int ndim() const { return impl_->ndim; }
  int64_t numel() const { return impl_->numel; }
  int64_t size(int i) const { return impl_->sizes[i]; }
  int64_t stride(int i) const { return impl_->strides[i]; }
  Dims shape() const { return Dims(impl_->sizes, impl_->ndim); }
  Dims strides() const { return Dims(impl_->strides, impl_->ndim); }
  bool contiguous() const { return impl_->contiguous; }
  bool requires_grad() const { return impl_->requires_grad; }
  bool is_leaf() const { return impl_->grad_fn == nullptr; }
  uint32_t version() const { return impl_->storage->version.load(std::memory_order_relaxed); }
  void bump_version() const { impl_->storage->version.fetch_add(1, std::memory_order_relaxed); }
  bool same_shape(const Tensor& other) const;

  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(impl_->data);
  }

 private:
  TensorImpl* impl_ = nullptr;
};

std::string describe(const Tensor& t);  // "float32[2, 3]"
inline void append(std::string& out, const Tensor& t) { out += describe(t); }

// Uninitialised and contiguous.
Tensor empty(const Dims& shape, DType dtype);
Tensor empty_like(const Tensor& t);                // same shape and dtype, contiguous
Tensor empty_like(const Tensor& t, DType dtype);
Tensor full(const Dims& shape, double value, DType dtype);
Tensor full_int(const Dims& shape, int64_t value, DType dtype);
Tensor zeros(const Dims& shape, DType dtype);

// Another look at the same storage; no gradient is recorded.
Tensor make_view(const Tensor& t, const Dims& shape, const Dims& strides, int64_t offset_elements = 0);
Tensor alias(const Tensor& t);

// Around memory that someone else owns; release(owner) is called when the last tensor is gone.
Tensor from_foreign(void* data, const Dims& shape, const Dims& strides, DType dtype, void* owner,
                    void (*release)(void*));

}  // namespace mainspring::tensor
