// Attention over blocks of queries: a block's scores stay in the cache, the matrix of all scores is never made.
// Everything is computed in float32 (float64 for float64).
#include "nn/attention.h"

#include "core/allocator.h"
#include "thread_pool.h"

namespace mainspring::tensor {
namespace {

constexpr int64_t kBlock = 64;  // queries

template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t n) : bytes_(static_cast<size_t>(n > 0 ? n : 1) * sizeof(A)), data_(static_cast<A*>(allocate(bytes_))) {}
  ~Buffer() { deallocate(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  A* get() const { return data_; }

 private:
  size_t bytes_;
  A* data_;
};

// One head's matrix [length, dim] inside [B, L, heads, dim]: rows lie heads * dim apart.
struct Matrix {
  const void* data;
  int64_t row;
};
Matrix head_of(const Tensor& x, int64_t b, int64_t h) {
  const int64_t row = x.size(2) * x.size(3);
  return {x.data<char>() + (b * x.size(1) * row + h * x.size(3)) * itemsize(x.dtype()), row};
}

template <class A>
void gemm(const A* a, int64_t a_row, int64_t a_col, const A* b, int64_t b_row, int64_t b_col, A* c, int64_t c_row, int64_t m,
          int64_t n, int64_t k, bool add) {
  constexpr int index = float_index(sizeof(A) == 8 ? DType::Float64 : DType::Float32);
  GemmArgs args = {a, a_row, a_col, b, b_row, b_col, c, c_row, nullptr, m, n, k};
  args.add = add;
  kernels().gemm[index](args);
}

// The matrix in the type to compute in: itself where it is that already (rows may lie apart), else a copy.
template <class A>
struct Operand {
  std::unique_ptr<Buffer<A>> copy;
  const A* data;
  int64_t row;
  Operand(const Tensor& x, int64_t b, int64_t h) {
    const Matrix m = head_of(x, b, h);
    if (itemsize(x.dtype()) == sizeof(A)) {
      data = static_cast<const A*>(m.data);
      row = m.row;
      return;
    }
    const int64_t length = x.size(1), dim = x.size(3);
    copy = std::make_unique<Buffer<A>>(length * dim);
    const auto widen = x.dtype() == DType::BFloat16 ? kernels().widen : kernels().widen_half;
    for (int64_t i = 0; i < length; ++i)
      widen(dim, static_cast<const char*>(m.data) + i * m.row * itemsize(x.dtype()), copy->get() + i * dim);
    data = copy->get();
    row = dim;
  }
};

// Writes (or adds) a head's rows [count, dim] from `first` on, rounding to the tensor's dtype.
template <class A>
void store_rows(const Tensor& x, int64_t b, int64_t h, int64_t first, int64_t count, const A* from) {
  const Matrix m = head_of(x, b, h);
  const int64_t dim = x.size(3);
  for (int64_t i = 0; i < count; ++i) {
    char* to = static_cast<char*>(const_cast<void*>(m.data)) + (first + i) * m.row * itemsize(x.dtype());
    if (itemsize(x.dtype()) == sizeof(A)) std::memcpy(to, from + i * dim, static_cast<size_t>(dim) * sizeof(A));
    else (x.dtype() == DType::BFloat16 ? kernels().narrow : kernels().narrow_half)(dim, from + i * dim, to);
  }
}

// The probabilities of queries first .. first + count; columns that no query sees are not touched. Returns how many
// keys the last one sees. `scaled` takes these queries times the scale: [count, dim].
template <class A>
int64_t probabilities(const AttentionShape& s, const Operand<A>& q, const Operand<A>& k, int64_t first, int64_t count,
                      A* scaled, A* p) {
  constexpr int index = float_index(sizeof(A) == 8 ? DType::Float64 : DType::Float32);
  const int64_t limit = s.causal ? first + count + s.keys - s.queries : s.keys;
  const A scale = static_cast<A>(s.scale);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < s.dim; ++j) scaled[i * s.dim + j] = q.data[(first + i) * q.row + j] * scale;
  gemm<A>(scaled, s.dim, 1, k.data, 1, k.row, p, limit, count, limit, s.dim, false);
  for (int64_t i = 0; i < count; ++i) {
    A* row = p + i * limit;
    const int64_t seen = s.causal ? first + i + 1 + s.keys - s.queries : s.keys;
    kernels().softmax[index](RowKernel::Softmax, 1, seen, row, row);
    for (int64_t j = seen; j < limit; ++j) row[j] = 0;
  }
  return limit;
}

template <class A>
void forward(const AttentionShape& s, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out) {
  const int64_t repeats = s.heads / s.groups;
  parallel_for(s.batch * s.heads, [&](int64_t task) {
    const int64_t b = task / s.heads, h = task % s.heads;
    const Operand<A> qm(q, b, h), km(k, b, h / repeats), vm(v, b, h / repeats);
    const int64_t block = s.queries < kBlock ? s.queries : kBlock;
    const Buffer<A> scaled(block * s.dim), p(block * s.keys), o(block * s.value_dim);
    for (int64_t first = 0; first < s.queries; first += block) {
      const int64_t count = s.queries - first < block ? s.queries - first : block;
      const int64_t limit = probabilities<A>(s, qm, km, first, count, scaled.get(), p.get());
      gemm<A>(p.get(), limit, 1, vm.data, vm.row, 1, o.get(), s.value_dim, count, s.value_dim, limit, false);
      store_rows<A>(out, b, h, first, count, o.get());
    }
  });
}

template <class A>
void backward(const AttentionShape& s, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& grad,
              const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v) {
  constexpr int index = float_index(sizeof(A) == 8 ? DType::Float64 : DType::Float32);
  const A scale = static_cast<A>(s.scale);
  const int64_t repeats = s.heads / s.groups;
  parallel_for(s.batch * s.groups, [&](int64_t task) {
    const int64_t b = task / s.groups, group = task % s.groups;
    const Operand<A> km(k, b, group), vm(v, b, group);
    const Buffer<A> gk(s.keys * s.dim), gv(s.keys * s.value_dim);
    std::memset(gk.get(), 0, static_cast<size_t>(s.keys * s.dim) * sizeof(A));
    std::memset(gv.get(), 0, static_cast<size_t>(s.keys * s.value_dim) * sizeof(A));
    const int64_t block = s.queries < kBlock ? s.queries : kBlock;
    const Buffer<A> scaled(block * s.dim), p(block * s.keys), gp(block * s.keys), gq(block * s.dim);
    for (int64_t h = group * repeats; h < (group + 1) * repeats; ++h) {
      const Operand<A> qm(q, b, h), gm(grad, b, h);
      for (int64_t first = 0; first < s.queries; first += block) {
        const int64_t count = s.queries - first < block ? s.queries - first : block;
        const int64_t limit = probabilities<A>(s, qm, km, first, count, scaled.get(), p.get());
        const A* go = gm.data + first * gm.row;
        gemm<A>(p.get(), 1, limit, go, gm.row, 1, gv.get(), s.value_dim, limit, s.value_dim, count, true);
        gemm<A>(go, gm.row, 1, vm.data, 1, vm.row, gp.get(), limit, count, limit, s.value_dim, false);
        kernels().softmax_grad[index](RowKernel::Softmax, count, limit, p.get(), gp.get(), gp.get());
        gemm<A>(gp.get(), limit, 1, km.data, km.row, 1, gq.get(), s.dim, count, s.dim, limit, false);
        for (int64_t i = 0; i < count * s.dim; ++i) gq.get()[i] *= scale;
        store_rows<A>(grad_q, b, h, first, count, gq.get());
        gemm<A>(gp.get(), 1, limit, scaled.get(), s.dim, 1, gk.get(), s.dim, limit, s.dim, count, true);
      }
    }
    store_rows<A>(grad_k, b, group, 0, s.keys, gk.get());
    store_rows<A>(grad_v, b, group, 0, s.keys, gv.get());
  });
}

int64_t work_of(const AttentionShape& s) { return s.batch * s.heads * s.queries * s.keys * (s.dim + s.value_dim) / 16; }

}  // namespace

void attention_forward(const AttentionShape& s, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out) {
  if (out.numel() == 0) return;
  if (s.keys == 0) {
    std::memset(out.data(), 0, static_cast<size_t>(out.numel() * itemsize(out.dtype())));
    return;
  }
  BlockingRegion region(work_of(s));
  if (q.dtype() == DType::Float64) forward<double>(s, q, k, v, out);
  else forward<float>(s, q, k, v, out);
}

void attention_backward(const AttentionShape& s, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& grad,
                        const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v) {
  if (s.batch * s.queries * s.keys * s.heads == 0) {
    std::memset(grad_q.data(), 0, static_cast<size_t>(grad_q.numel() * itemsize(grad_q.dtype())));
    return;
  }
  BlockingRegion region(3 * work_of(s));
  if (q.dtype() == DType::Float64) backward<double>(s, q, k, v, grad, grad_q, grad_k, grad_v);
  else backward<float>(s, q, k, v, grad, grad_q, grad_k, grad_v);
}

namespace ops {

Tensor Rope::rotate(const Tensor& given, const Tensor& cos_, const Tensor& sin_) {
  const Tensor x = contiguous(given);
  const DType angle = x.dtype() == DType::Float64 ? DType::Float64 : DType::Float32;
  const Tensor cos = contiguous(cast(cos_, angle)), sin = contiguous(cast(sin_, angle));
  const int64_t steps = x.size(1), heads = x.size(2), dim = x.size(3), half = cos.size(cos.ndim() - 1);
  const bool per_row = cos.ndim() == 3;
  Tensor out = empty_like(x);
  BlockingRegion region(x.numel());
  with_type(x.dtype(), [&]<class T>() {
    if constexpr (std::is_floating_point_v<T> || kIsHalf<T>) {
      using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
      parallel_ranges(x.size(0) * steps, 16 * 1024 / (heads * dim + 1), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const A* c = cos.data<A>() + (per_row ? r : r % steps) * half;
          const A* s = sin.data<A>() + (per_row ? r : r % steps) * half;
          for (int64_t h = 0; h < heads; ++h) {
            const T* from = x.data<T>() + (r * heads + h) * dim;
            T* to = out.data<T>() + (r * heads + h) * dim;
            for (int64_t i = 0; i < half; ++i) {
              const A a = value_of(from[i]), b = value_of(from[i + half]);
              to[i] = from_value<T>(a * c[i] - b * s[i]);
              to[i + half] = from_value<T>(b * c[i] + a * s[i]);
            }
            for (int64_t i = 2 * half; i < dim; ++i) to[i] = from[i];
          }
        }
      });
    }
  });
  return out;
}

}  // namespace ops
}  // namespace mainspring::tensor
