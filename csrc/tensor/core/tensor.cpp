#include "core/tensor.h"

#include "autograd/node.h"

namespace mainspring::tensor {
namespace {

std::atomic<int64_t> live{0};

bool is_contiguous(const int64_t* sizes, const int64_t* strides, int ndim) {
  int64_t expected = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (sizes[i] == 0) return true;
    if (sizes[i] != 1 && strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return true;
}

}  // namespace

double read_double(const void* p, DType t) {
  return with_type(t, [&]<class T>() { return static_cast<double>(value_of(*static_cast<const T*>(p))); });
}

int64_t read_int(const void* p, DType t) {
  return with_type(t, [&]<class T>() { return static_cast<int64_t>(value_of(*static_cast<const T*>(p))); });
}

void write_double(void* p, DType t, double value) {
  if (t == DType::Bool) {
    *static_cast<uint8_t*>(p) = value != 0;
    return;
  }
  with_type(t, [&]<class T>() { *static_cast<T*>(p) = from_value<T>(value); });
}

void write_int(void* p, DType t, int64_t value) {
  if (t == DType::Bool) {
    *static_cast<uint8_t*>(p) = value != 0;
    return;
  }
  with_type(t, [&]<class T>() { *static_cast<T*>(p) = from_value<T>(value); });
}

std::string to_string(const Dims& dims) {
  std::string out = "[";
  for (int i = 0; i < dims.size(); ++i) out += (i ? ", " : "") + std::to_string(dims[i]);
  return out + "]";
}

Dims broadcast_shapes(const char* op, const Dims& a, const Dims& b) {
  const Dims& longer = a.size() >= b.size() ? a : b;
  const Dims& shorter = a.size() >= b.size() ? b : a;
  Dims out = longer;
  const int shift = longer.size() - shorter.size();
  for (int i = 0; i < shorter.size(); ++i) {
    const int64_t x = longer[i + shift], y = shorter[i];
    if (x == y || y == 1) continue;
    if (x != 1)
      fail(ErrorKind::Shape, op, ": shapes ", a, " and ", b, " do not broadcast (sizes ", a[i + a.size() - shorter.size()],
           " and ", b[i + b.size() - shorter.size()], " at dimension ", i - shorter.size(), ")");
    out[i + shift] = y;
  }
  return out;
}

int wrap_dim(const char* op, int64_t dim, int ndim) {
  const int64_t n = ndim == 0 ? 1 : ndim;
  if (dim < -n || dim >= n)
    fail(ErrorKind::Index, op, ": dimension ", dim, " is out of range for ", ndim, " dimensions (", -n, " to ", n - 1,
         ")");
  return static_cast<int>(dim < 0 ? dim + n : dim);
}

Dims contiguous_strides(const Dims& shape) {
  Dims strides = shape;
  int64_t step = 1;
  for (int i = shape.size() - 1; i >= 0; --i) {
    strides[i] = step;
    step *= shape[i] > 1 ? shape[i] : 1;
  }
  return strides;
}

Storage* Storage::create(size_t bytes) {
  auto* s = new (allocate(sizeof(Storage) + bytes)) Storage;
  s->bytes = bytes;
  s->data = s + 1;
  return s;
}

Storage* Storage::foreign(void* data, size_t bytes, void* owner, void (*release)(void*)) {
  auto* s = new (allocate(sizeof(Storage))) Storage;
  s->bytes = bytes;
  s->data = data;
  s->owner = owner;
  s->release = release;
  return s;
}

void Storage::destroy() {
  const size_t block = sizeof(Storage) + (release == nullptr ? bytes : 0);
  if (release != nullptr) release(owner);
  deallocate(this, block);
}

TensorImpl::TensorImpl() { live.fetch_add(1, std::memory_order_relaxed); }

TensorImpl::~TensorImpl() {
  live.fetch_sub(1, std::memory_order_relaxed);
  if (grad != nullptr) grad->drop();
  if (grad_fn != nullptr) {
    if (retains_grad && grad_fn->retain_into == this) grad_fn->retain_into = nullptr;
    grad_fn->drop();
  }
  delete hooks;
  storage->drop();
}

int64_t live_tensors() { return live.load(std::memory_order_relaxed); }

bool Tensor::same_shape(const Tensor& other) const {
  if (impl_->ndim != other->ndim) return false;
  for (int i = 0; i < impl_->ndim; ++i)
    if (impl_->sizes[i] != other->sizes[i]) return false;
  return true;
}

std::string describe(const Tensor& t) { return text(name(t.dtype()), t.shape()); }

Tensor empty(const Dims& shape, DType dtype) {
  int64_t numel = 1;
  for (const int64_t size : shape) {
    if (size < 0) fail(ErrorKind::Shape, "a size may not be negative: ", shape);
    if (__builtin_mul_overflow(numel, size, &numel) || numel > (int64_t{1} << 46))
      fail(ErrorKind::Shape, "a tensor of shape ", shape, " is too large for this machine's memory");
  }
  Storage* storage = Storage::create(static_cast<size_t>(numel * itemsize(dtype)));
  auto* impl = new TensorImpl;
  impl->dtype = dtype;
  impl->ndim = static_cast<uint8_t>(shape.size());
  impl->contiguous = true;
  impl->numel = numel;
  impl->storage = storage;
  impl->data = static_cast<char*>(storage->data);
  int64_t step = 1;
  for (int i = shape.size() - 1; i >= 0; --i) {
    impl->sizes[i] = shape[i];
    impl->strides[i] = step;
    step *= shape[i] > 1 ? shape[i] : 1;
  }
  return Tensor::steal(impl);
}

Tensor empty_like(const Tensor& t) { return empty(t.shape(), t.dtype()); }
Tensor empty_like(const Tensor& t, DType dtype) { return empty(t.shape(), dtype); }

namespace {
void fill_from_first(const Tensor& t) {
  const size_t item = static_cast<size_t>(itemsize(t.dtype()));
  const size_t total = static_cast<size_t>(t.numel()) * item;
  char* data = t.data<char>();
  for (size_t done = item; done < total;) {
    const size_t piece = done < total - done ? done : total - done;
    std::memcpy(data + done, data, piece);
    done += piece;
  }
}
}  // namespace

Tensor full(const Dims& shape, double value, DType dtype) {
  Tensor t = empty(shape, dtype);
  if (t.numel() == 0) return t;
  write_double(t.data(), dtype, value);
  fill_from_first(t);
  return t;
}

Tensor full_int(const Dims& shape, int64_t value, DType dtype) {
  Tensor t = empty(shape, dtype);
  if (t.numel() == 0) return t;
  write_int(t.data(), dtype, value);
  fill_from_first(t);
  return t;
}

Tensor zeros(const Dims& shape, DType dtype) {
  Tensor t = empty(shape, dtype);
  std::memset(t.data(), 0, static_cast<size_t>(t.numel() * itemsize(dtype)));
  return t;
}

Tensor make_view(const Tensor& t, const Dims& shape, const Dims& strides, int64_t offset_elements) {
  auto* impl = new TensorImpl;
  impl->dtype = t.dtype();
  impl->ndim = static_cast<uint8_t>(shape.size());
  impl->numel = shape.product();
  impl->storage = t->storage;
  impl->storage->refs.fetch_add(1, std::memory_order_relaxed);
  impl->data = t->data + offset_elements * itemsize(t.dtype());
  for (int i = 0; i < shape.size(); ++i) {
    impl->sizes[i] = shape[i];
    impl->strides[i] = strides[i];
  }
  impl->contiguous = is_contiguous(impl->sizes, impl->strides, impl->ndim);
  return Tensor::steal(impl);
}

Tensor alias(const Tensor& t) { return make_view(t, t.shape(), t.strides()); }

Tensor from_foreign(void* data, const Dims& shape, const Dims& strides, DType dtype, void* owner,
                    void (*release)(void*)) {
  auto* impl = new TensorImpl;
  impl->dtype = dtype;
  impl->ndim = static_cast<uint8_t>(shape.size());
  impl->numel = shape.product();
  impl->storage = Storage::foreign(data, static_cast<size_t>(impl->numel * itemsize(dtype)), owner, release);
  impl->data = static_cast<char*>(data);
  for (int i = 0; i < shape.size(); ++i) {
    impl->sizes[i] = shape[i];
    impl->strides[i] = strides[i];
  }
  impl->contiguous = is_contiguous(impl->sizes, impl->strides, impl->ndim);
  return Tensor::steal(impl);
}

}  // namespace mainspring::tensor
