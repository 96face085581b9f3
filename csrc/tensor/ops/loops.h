// From tensors of any shape, strides and dtype to the kernels' plain loops.
#pragma once

#include "core/tensor.h"
#include "kernels/kernel_set.h"

namespace mainspring::tensor {

// PyTorch's rule: a tensor without dimensions, and still more a Python number, decides the dtype only where its
// category (bool < integer < float) is higher.
DType result_type(const Tensor& a, const Tensor& b);

Tensor contiguous(const Tensor& t);               // t itself, or a contiguous copy
Tensor cast(const Tensor& t, DType dtype);        // t itself, or a converted contiguous copy
Tensor as_float(const Tensor& t);                 // integers and bool become float32
Tensor copy_of(const Tensor& t);                  // contiguous, of its own storage
void copy_into(const Tensor& to, const Tensor& from);  // broadcasts and converts
Tensor expand_to(const Tensor& t, const Dims& shape);  // a view with stride 0 where it is broadcast

Tensor binary_loop(BinaryKernel kernel, const char* op, const Tensor& a, const Tensor& b);
Tensor compare_loop(CompareKernel kernel, const char* op, const Tensor& a, const Tensor& b);
Tensor unary_loop(UnaryKernel kernel, const char* op, const Tensor& a, bool to_float);
void binary_in_place(BinaryKernel kernel, const char* op, const Tensor& a, const Tensor& b);
Tensor where_loop(const Tensor& condition, const Tensor& a, const Tensor& b);

// Over `dims`, which become size 1. The dtype is int64 for integers and bool where `widen`, else the same.
Tensor reduce_loop(ReduceKernel kernel, const Tensor& t, const Dims& dims, bool widen);
Tensor arg_reduce_loop(bool max, const Tensor& t, int dim);  // int64, the dimension becomes size 1

// N operands walked together: dimensions that all can be merged are, the innermost is handed to the body.
template <int N>
struct Walk {
  int ndim = 0;
  int64_t sizes[kMaxDims + 1];  // a caller may append one of size 1
  int64_t strides[N][kMaxDims + 1];

  // Operand i is at[i] elements wide in every dimension of `shape` (0 where it is broadcast).
  void add(int64_t size, const int64_t (&step)[N]) {
    if (size == 1) return;
    if (ndim > 0) {
      bool merge = true;
      for (int i = 0; i < N; ++i) merge &= strides[i][ndim - 1] == size * step[i];
      if (merge) {
        sizes[ndim - 1] *= size;
        for (int i = 0; i < N; ++i) strides[i][ndim - 1] = step[i];
        return;
      }
    }
    sizes[ndim] = size;
    for (int i = 0; i < N; ++i) strides[i][ndim] = step[i];
    ++ndim;
  }
  int64_t inner() const { return ndim == 0 ? 1 : sizes[ndim - 1]; }
  int64_t inner_stride(int i) const { return ndim == 0 ? 1 : strides[i][ndim - 1]; }
  int64_t rows() const {
    int64_t n = 1;
    for (int d = 0; d + 1 < ndim; ++d) n *= sizes[d];
    return n;
  }
  // Calls body(row, offsets) for rows begin..end; offsets are in elements.
  template <class Body>
  void for_rows(int64_t begin, int64_t end, Body body) const {
    int64_t index[kMaxDims] = {}, offset[N] = {};
    int64_t rest = begin;
    for (int d = ndim - 2; d >= 0; --d) {
      index[d] = rest % sizes[d];
      rest /= sizes[d];
      for (int i = 0; i < N; ++i) offset[i] += index[d] * strides[i][d];
    }
    for (int64_t row = begin; row < end; ++row) {
      body(row, offset);
      for (int d = ndim - 2; d >= 0; --d) {
        for (int i = 0; i < N; ++i) offset[i] += strides[i][d];
        if (++index[d] < sizes[d]) break;
        for (int i = 0; i < N; ++i) offset[i] -= index[d] * strides[i][d];
        index[d] = 0;
      }
    }
  }
};

}  // namespace mainspring::tensor
