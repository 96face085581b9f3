// Ops that pick or place elements by index.
#pragma once

#include "ops/shape.h"

namespace mainspring::tensor::ops {

// The index as contiguous int64 with every value wrapped into [0, size).
inline Tensor checked_index(const char* op, const Tensor& index, int64_t size) {
  if (is_float(index.dtype()) || index.dtype() == DType::Bool)
    fail(ErrorKind::DType, op, ": the index must be of integers, not ", index);
  const Tensor out = index.dtype() == DType::Int64 ? contiguous(index) : cast(index, DType::Int64);
  const int64_t* at = out.data<int64_t>();
  bool negative = false;
  for (int64_t i = 0; i < out.numel(); ++i) {
    if (at[i] < -size || at[i] >= size)
      fail(ErrorKind::Index, op, ": index ", at[i], " is out of range for size ", size);
    negative |= at[i] < 0;
  }
  if (!negative) return out;
  const Tensor wrapped = copy_of(out);
  for (int64_t* p = wrapped.data<int64_t>(); p != wrapped.data<int64_t>() + wrapped.numel(); ++p)
    if (*p < 0) *p += size;
  return wrapped;
}

struct Blocks {  // of a contiguous tensor seen as [outer, size of dim, inner]
  int64_t outer = 1, inner = 1;
  Blocks(const Tensor& x, int dim) {
    for (int d = 0; d < dim; ++d) outer *= x.size(d);
    for (int d = dim + 1; d < x.ndim(); ++d) inner *= x.size(d);
  }
};

// x, added to zeros of `shape` at `index` along `dim`.
struct IndexAdd {
  static constexpr auto name = "index_add";
  struct Saved { SavedTensor index; int dim; };
  static Tensor forward(const Tensor& x, const Dims& shape, int dim, const Tensor& index) {
    const Tensor from = contiguous(x);
    const DType acc = is_half(x.dtype()) ? DType::Float32 : x.dtype();
    const Tensor sum = zeros(shape, acc);
    const Blocks blocks(sum, dim);
    const int64_t count = index.numel(), size = shape[dim], inner = blocks.inner;
    const auto add = kernels().column_reduce[static_cast<int>(ReduceKernel::Sum)][static_cast<int>(x.dtype())];
    if (!is_float(x.dtype())) fail(ErrorKind::DType, "index_add: needs a floating-point tensor, not ", x);
    for (int64_t o = 0; o < blocks.outer; ++o)
      for (int64_t i = 0; i < count; ++i)
        add(inner, from.data<char>() + (o * count + i) * inner * itemsize(x.dtype()),
            sum.data<char>() + (o * size + index.data<int64_t>()[i]) * inner * itemsize(acc));
    Tensor out = cast(sum, x.dtype());
    if (recording(x)) record<IndexAdd>(out, {index, dim}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) { grads[0] = index_select(g, s.dim, s.index.get()); }
};

struct IndexSelect {
  static constexpr auto name = "index_select";
  struct Saved { SavedTensor index; Dims shape; int dim; };
  static Tensor forward(const Tensor& x, int64_t dim, const Tensor& index) {
    if (x.ndim() == 0) return reshape(forward(reshape(x, {1}), dim, reshape(index, {index.numel()})), {});
    if (index.ndim() != 1) fail(ErrorKind::Shape, "index_select: the index must have one dimension, not ", index);
    const int d = wrap_dim(name, dim, x.ndim());
    const Tensor at = checked_index(name, index, x.size(d)), from = contiguous(x);
    Dims shape = x.shape();
    shape[d] = index.numel();
    Tensor out = empty(shape, x.dtype());
    const Blocks blocks(x, d);
    const int64_t count = index.numel(), size = x.size(d), row = blocks.inner * itemsize(x.dtype());
    for (int64_t o = 0; o < blocks.outer; ++o)
      for (int64_t i = 0; i < count; ++i)
        std::memcpy(out.data<char>() + (o * count + i) * row, from.data<char>() + (o * size + at.data<int64_t>()[i]) * row,
                    static_cast<size_t>(row));
    if (recording(x)) record<IndexSelect>(out, {at, x.shape(), d}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    grads[0] = IndexAdd::forward(g, s.shape, s.dim, s.index.get());
  }
};

// Rows of weight[num_embeddings, dim] in the shape of the index.
struct Embedding {
  static constexpr auto name = "embedding";
  static Tensor forward(const Tensor& index, const Tensor& weight) {
    if (weight.ndim() != 2) fail(ErrorKind::Shape, "embedding: the weight must have two dimensions, not ", weight);
    const Tensor rows = IndexSelect::forward(weight, 0, reshape(index, {index.numel()}));
    Dims shape = index.shape();
    shape.push_back(weight.size(1));
    return reshape(rows, shape);
  }
};

// Calls body(offset in index, offset in x) for every element of the index.
template <class Body>
void for_gathered(const Tensor& index, const Tensor& x_shape, int dim, const int64_t* at, Body body) {
  const Dims strides = contiguous_strides(x_shape.shape());
  int64_t where[kMaxDims] = {};
  for (int64_t i = 0; i < index.numel(); ++i) {
    int64_t offset = 0;
    for (int d = 0; d < index.ndim(); ++d) offset += (d == dim ? at[i] : where[d]) * strides[d];
    body(i, offset);
    for (int d = index.ndim() - 1; d >= 0 && ++where[d] == index.size(d); --d) where[d] = 0;
  }
}

// x, added to zeros of `shape` at the places that the index names along `dim`.
struct ScatterAdd {
  static constexpr auto name = "scatter_add";
  struct Saved { SavedTensor index; int dim; };
  static Tensor forward(const Tensor& x, const Dims& shape, int dim, const Tensor& index) {
    const Tensor from = contiguous(x);
    const DType acc = is_half(x.dtype()) ? DType::Float32 : x.dtype();
    const Tensor sum = zeros(shape, acc);
    for_gathered(index, sum, dim, index.data<int64_t>(), [&](int64_t i, int64_t at) {
      char* to = sum.data<char>() + at * itemsize(acc);
      write_double(to, acc, read_double(to, acc) + read_double(from.data<char>() + i * itemsize(x.dtype()), x.dtype()));
    });
    Tensor out = cast(sum, x.dtype());
    if (recording(x)) record<ScatterAdd>(out, {index, dim}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads);
};

struct Gather {
  static constexpr auto name = "gather";
  struct Saved { SavedTensor index; Dims shape; int dim; };
  static Tensor forward(const Tensor& x, int64_t dim, const Tensor& index) {
    const int d = wrap_dim(name, dim, x.ndim());
    bool fits = x.ndim() == index.ndim();
    for (int i = 0; fits && i < x.ndim(); ++i) fits = i == d || index.size(i) <= x.size(i);
    if (!fits) fail(ErrorKind::Shape, "gather: the index ", index, " does not fit ", x, " outside dimension ", d);
    const Tensor at = checked_index(name, index, x.ndim() == 0 ? 1 : x.size(d)), from = contiguous(x);
    Tensor out = empty(index.shape(), x.dtype());
    const size_t item = static_cast<size_t>(itemsize(x.dtype()));
    for_gathered(at, from, d, at.data<int64_t>(), [&](int64_t i, int64_t offset) {
      std::memcpy(out.data<char>() + static_cast<size_t>(i) * item, from.data<char>() + static_cast<size_t>(offset) * item, item);
    });
    if (recording(x)) record<Gather>(out, {at, x.shape(), d}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    grads[0] = ScatterAdd::forward(g, s.shape, s.dim, s.index.get());
  }
};
inline void ScatterAdd::backward(const Saved& s, const Tensor& g, Grads& grads) {
  grads[0] = gather(g, s.dim, s.index.get());
}

// Keeps the elements at or below (tril), at or above (triu) the diagonal; the others become 0.
template <bool lower>
Tensor triangle(const char* op, const Tensor& x, int64_t diagonal) {
  if (x.ndim() < 2) fail(ErrorKind::Shape, op, ": ", x, " has fewer than two dimensions");
  const int64_t rows = x.size(x.ndim() - 2), cols = x.size(x.ndim() - 1);
  const Tensor mask = empty({rows, cols}, DType::Bool);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      mask.data<uint8_t>()[i * cols + j] = lower ? j - i <= diagonal : j - i >= diagonal;
  return where(mask, x, full_int({}, 0, x.dtype()));
}
struct Tril {
  static constexpr auto name = "tril";
  static Tensor forward(const Tensor& x, int64_t diagonal) { return triangle<true>(name, x, diagonal); }
};
struct Triu {
  static constexpr auto name = "triu";
  static Tensor forward(const Tensor& x, int64_t diagonal) { return triangle<false>(name, x, diagonal); }
};
struct MaskedFill {
  static constexpr auto name = "masked_fill";
  static Tensor forward(const Tensor& x, const Tensor& mask, double value) {
    Tensor filler = full({}, value, x.dtype());
    return where(mask, filler, x);
  }
};

}  // namespace mainspring::tensor::ops
