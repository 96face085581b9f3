// float16 through the float32 kernels: pieces are widened, computed and rounded once. The processors that this is
// built for convert float16 fast but do not compute in it. Products widen while they pack (gemm.cpp).
#include "core/allocator.h"
#include "kernels/kernel_set.h"

namespace mainspring::tensor {
namespace {

constexpr int kPiece = 512;
constexpr int kHalf = static_cast<int>(DType::Float16), kSingle = static_cast<int>(DType::Float32);
constexpr int kHalfFloat = float_index(DType::Float16), kSingleFloat = float_index(DType::Float32);

// Elements i .. i + count of a strided operand as floats.
void widen_piece(const void* from_, int64_t i, int64_t stride, int64_t count, float* to) {
  const auto* from = static_cast<const Float16*>(from_) + i * stride;
  if (stride == 1) return kernels().widen_half(count, from, to);
  for (int64_t j = 0; j < count; ++j) to[j] = to_float(from[j * stride]);
}

template <class Body>
void for_pieces(int64_t n, Body body) {
  for (int64_t i = 0; i < n; i += kPiece) body(i, n - i < kPiece ? n - i : kPiece);
}

template <BinaryKernel kernel>
void binary(int64_t n, const void* a, int64_t sa, const void* b, int64_t sb, void* out) {
  const BinaryFn fn = kernels().binary[static_cast<int>(kernel)][kSingle];
  float x[kPiece], y[kPiece];
  for_pieces(n, [&](int64_t i, int64_t count) {
    widen_piece(a, i, sa, count, x);
    widen_piece(b, i, sb, count, y);
    fn(count, x, 1, y, 1, x);
    kernels().narrow_half(count, x, static_cast<Float16*>(out) + i);
  });
}

template <CompareKernel kernel>
void compare(int64_t n, const void* a, int64_t sa, const void* b, int64_t sb, void* out) {
  const BinaryFn fn = kernels().compare[static_cast<int>(kernel)][kSingle];
  float x[kPiece], y[kPiece];
  for_pieces(n, [&](int64_t i, int64_t count) {
    widen_piece(a, i, sa, count, x);
    widen_piece(b, i, sb, count, y);
    fn(count, x, 1, y, 1, static_cast<uint8_t*>(out) + i);
  });
}

template <UnaryKernel kernel>
void unary(int64_t n, const void* a, int64_t sa, void* out) {
  const UnaryFn fn = kernels().unary[static_cast<int>(kernel)][kSingle];
  float x[kPiece];
  for_pieces(n, [&](int64_t i, int64_t count) {
    widen_piece(a, i, sa, count, x);
    fn(count, x, 1, x);
    kernels().narrow_half(count, x, static_cast<Float16*>(out) + i);
  });
}

template <ReduceKernel kernel>
void row_reduce(int64_t n, const void* x, int64_t stride, void* acc) {
  const RowReduceFn fn = kernels().row_reduce[static_cast<int>(kernel)][kSingle];
  float piece[kPiece];
  for_pieces(n, [&](int64_t i, int64_t count) {
    widen_piece(x, i, stride, count, piece);
    fn(count, piece, 1, acc);
  });
}

template <ReduceKernel kernel>
void column_reduce(int64_t n, const void* x, void* acc) {
  const ColumnReduceFn fn = kernels().column_reduce[static_cast<int>(kernel)][kSingle];
  float piece[kPiece];
  for_pieces(n, [&](int64_t i, int64_t count) {
    widen_piece(x, i, 1, count, piece);
    fn(count, piece, static_cast<float*>(acc) + i);
  });
}

// A float32 copy of a whole operand. `to` is where it is rounded back to when the object goes, if anywhere.
class Widened {
 public:
  Widened(const void* from, int64_t n) : n_(n), bytes_(static_cast<size_t>(n) * sizeof(float)) {
    if (from == nullptr) return;
    data_ = static_cast<float*>(allocate(bytes_));
    kernels().widen_half(n, from, data_);
  }
  static Widened output(void* to, int64_t n) {
    Widened w(nullptr, n);
    w.to_ = to;
    if (to != nullptr) w.data_ = static_cast<float*>(allocate(w.bytes_));
    return w;
  }
  static Widened updated(void* x, int64_t n) {
    Widened w(x, n);
    w.to_ = x;
    return w;
  }
  Widened(Widened&& other) noexcept : data_(other.data_), to_(other.to_), n_(other.n_), bytes_(other.bytes_) {
    other.data_ = nullptr;
  }
  Widened(const Widened&) = delete;
  Widened& operator=(const Widened&) = delete;
  ~Widened() {
    if (data_ == nullptr) return;
    if (to_ != nullptr) kernels().narrow_half(n_, data_, to_);
    deallocate(data_, bytes_);
  }
  float* get() const { return data_; }

 private:
  float* data_ = nullptr;
  void* to_ = nullptr;
  int64_t n_;
  size_t bytes_;
};

void softmax(RowKernel kind, int64_t rows, int64_t n, const void* x, void* out) {
  const Widened values = Widened(x, rows * n), result = Widened::output(out, rows * n);
  kernels().softmax[kSingleFloat](kind, rows, n, values.get(), result.get());
}
void softmax_grad(RowKernel kind, int64_t rows, int64_t n, const void* y, const void* g, void* out) {
  const Widened values(y, rows * n), grads(g, rows * n), result = Widened::output(out, rows * n);
  kernels().softmax_grad[kSingleFloat](kind, rows, n, values.get(), grads.get(), result.get());
}
void norm(const NormArgs& a) {
  const Widened x(a.x, a.rows * a.n), weight(a.weight, a.n), bias(a.bias, a.n), out = Widened::output(a.out, a.rows * a.n);
  NormArgs single = a;
  single.x = x.get(), single.weight = weight.get(), single.bias = bias.get(), single.out = out.get();
  kernels().norm[kSingleFloat](single);
}
void norm_grad(const NormGradArgs& a) {
  const Widened x(a.x, a.rows * a.n), weight(a.weight, a.n), grad(a.grad, a.rows * a.n);
  const Widened grad_x = Widened::output(a.grad_x, a.rows * a.n);
  NormGradArgs single = a;
  single.x = x.get(), single.weight = weight.get(), single.grad = grad.get(), single.grad_x = grad_x.get();
  kernels().norm_grad[kSingleFloat](single);
}
void cross_entropy(const CrossEntropyArgs& a) {
  const Widened logits(a.logits, a.rows * a.n);
  CrossEntropyArgs single = a;
  single.logits = logits.get();
  kernels().cross_entropy[kSingleFloat](single);
}
void cross_entropy_grad(const CrossEntropyGradArgs& a) {
  const Widened logits(a.logits, a.rows * a.n), grad = Widened::output(a.grad, a.rows * a.n);
  CrossEntropyGradArgs single = a;
  single.logits = logits.get(), single.grad = grad.get();
  kernels().cross_entropy_grad[kSingleFloat](single);
}
void adam(const AdamArgs& a) {
  const Widened param = Widened::updated(a.param, a.n), grad(a.grad, a.n);
  AdamArgs single = a;
  single.param = param.get(), single.grad = grad.get();
  kernels().adam[kSingleFloat](single);
}
void sgd(const SgdArgs& a) {
  const Widened param = Widened::updated(a.param, a.n), grad(a.grad, a.n);
  SgdArgs single = a;
  single.param = param.get(), single.grad = grad.get();
  kernels().sgd[kSingleFloat](single);
}

}  // namespace

void fill_half(KernelSet& set) {
#define BINARY(name) \
  if (set.binary[static_cast<int>(BinaryKernel::name)][kSingle]) \
    set.binary[static_cast<int>(BinaryKernel::name)][kHalf] = binary<BinaryKernel::name>;
#define COMPARE(name) set.compare[static_cast<int>(CompareKernel::name)][kHalf] = compare<CompareKernel::name>;
#define UNARY(name) \
  if (set.unary[static_cast<int>(UnaryKernel::name)][kSingle]) \
    set.unary[static_cast<int>(UnaryKernel::name)][kHalf] = unary<UnaryKernel::name>;
#define REDUCE(name) \
  set.row_reduce[static_cast<int>(ReduceKernel::name)][kHalf] = row_reduce<ReduceKernel::name>; \
  set.column_reduce[static_cast<int>(ReduceKernel::name)][kHalf] = column_reduce<ReduceKernel::name>;
  MAINSPRING_BINARY_KERNELS(BINARY)
  MAINSPRING_COMPARE_KERNELS(COMPARE)
  MAINSPRING_UNARY_KERNELS(UNARY)
  MAINSPRING_REDUCE_KERNELS(REDUCE)
  set.softmax[kHalfFloat] = softmax;
  set.softmax_grad[kHalfFloat] = softmax_grad;
  set.norm[kHalfFloat] = norm;
  set.norm_grad[kHalfFloat] = norm_grad;
  set.cross_entropy[kHalfFloat] = cross_entropy;
  set.cross_entropy_grad[kHalfFloat] = cross_entropy_grad;
  set.adam[kHalfFloat] = adam;
  set.sgd[kHalfFloat] = sgd;
}

}  // namespace mainspring::tensor
