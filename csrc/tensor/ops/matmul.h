// Matrix products.
#pragma once

#include "core/blocking.h"
#include "ops/shape.h"

namespace mainspring::tensor::ops {

// c[m, n] = a[m, k] b[k, n] (+ bias[n]) for operands of any strides. All of one floating-point dtype.
inline void gemm(const Tensor& a, const char* pa, const Tensor& b, const char* pb, char* pc, const Tensor& bias) {
  const int i = a.ndim() - 2, j = b.ndim() - 2;
  const GemmArgs args = {pa, a.stride(i), a.stride(i + 1), pb, b.stride(j), b.stride(j + 1), pc, b.size(j + 1),
                         bias ? bias.data() : nullptr, a.size(i), b.size(j + 1), a.size(i + 1)};
  BlockingRegion region(args.m * args.n * args.k / 16);
  kernels().gemm[float_index(a.dtype())](args);
}

inline DType product_type(const char* op, const Tensor& a, const Tensor& b) {
  if (!is_float(a.dtype()) || !is_float(b.dtype()))
    fail(ErrorKind::DType, op, ": needs floating-point tensors, not ", a, " and ", b, "; convert them with to()");
  if (a.dtype() != b.dtype())
    fail(ErrorKind::DType, op, ": ", a, " and ", b, " have different dtypes; convert one with to()");
  return a.dtype();
}

// Both have at least two dimensions; those before the last two broadcast.
struct BatchedMatmul {
  static constexpr auto name = "matmul";
  struct Saved { SavedTensor a, b; };
  static Tensor forward(const Tensor& a, const Tensor& b) {
    const DType t = product_type(name, a, b);
    const int na = a.ndim(), nb = b.ndim();
    if (a.size(na - 1) != b.size(nb - 2))
      fail(ErrorKind::Shape, "matmul: ", a, " and ", b, " cannot be multiplied: ", a.size(na - 1), " columns, ",
           b.size(nb - 2), " rows");
    const Dims batch = broadcast_shapes(name, Dims(a->sizes, na - 2), Dims(b->sizes, nb - 2));
    Dims shape = batch;
    shape.push_back(a.size(na - 2));
    shape.push_back(b.size(nb - 1));
    Tensor out = empty(shape, t);
    const int64_t step = a.size(na - 2) * b.size(nb - 1) * itemsize(t);
    auto batch_stride = [&](const Tensor& x, int d) {
      const int at = x.ndim() - 2 - (batch.size() - d);
      return at < 0 || (x.size(at) == 1 && batch[d] != 1) ? 0 : x.stride(at);
    };
    Walk<2> walk;
    for (int d = 0; d < batch.size(); ++d) {
      const int64_t steps[2] = {batch_stride(a, d), batch_stride(b, d)};
      walk.add(batch[d], steps);
    }
    const int64_t inner = walk.inner();
    if (out.numel() > 0)
      walk.for_rows(0, walk.rows(), [&](int64_t row, const int64_t* at) {
        for (int64_t i = 0; i < inner; ++i)
          gemm(a, a.data<char>() + (at[0] + i * walk.inner_stride(0)) * itemsize(t), b,
               b.data<char>() + (at[1] + i * walk.inner_stride(1)) * itemsize(t),
               out.data<char>() + (row * inner + i) * step, Tensor());
      });
    if (recording(a, b))
      record<BatchedMatmul>(out, {SavedTensor::when(b.requires_grad(), a), SavedTensor::when(a.requires_grad(), b)}, a, b);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    if (grads.wanted(0)) grads[0] = forward(g, transpose(s.b.get(), -2, -1));
    if (grads.wanted(1)) grads[1] = forward(transpose(s.a.get(), -2, -1), g);
  }
};

// NumPy's rules: a vector is a row on the left and a column on the right.
struct Matmul {
  static constexpr auto name = "matmul";
  static Tensor forward(const Tensor& a, const Tensor& b) {
    if (a.ndim() == 0 || b.ndim() == 0)
      fail(ErrorKind::Shape, "matmul: ", a, " and ", b, ": both need at least one dimension");
    if (!is_float(a.dtype()) && !is_float(b.dtype()) && a.ndim() > 1 && b.ndim() > 1) return of_integers(a, b);
    if (b.ndim() == 1) {
      const Tensor out = forward(a.ndim() == 1 ? reshape(a, {1, a.size(0)}) : a, reshape(b, {b.size(0), 1}));
      return reshape(out, Dims(out->sizes, a.ndim() == 1 ? 0 : out.ndim() - 1));
    }
    if (a.ndim() == 1) {
      const Tensor out = forward(reshape(a, {1, a.size(0)}), b);
      Dims shape = out.shape();
      shape.erase(shape.size() - 2);
      return reshape(out, shape);
    }
    if (a.ndim() > 2 && b.ndim() == 2 && a.numel() > 0) {  // one product instead of many
      Dims shape = a.shape();
      const Tensor out = BatchedMatmul::forward(reshape(a, {-1, a.size(a.ndim() - 1)}), b);
      shape[shape.size() - 1] = b.size(1);
      return reshape(out, shape);
    }
    return BatchedMatmul::forward(a, b);
  }

 private:
  // Exact, and rare enough for plain products and sums.
  static Tensor of_integers(const Tensor& a, const Tensor& b) {
    const DType t = result_type(a, b);
    if (t == DType::Bool) fail(ErrorKind::DType, "matmul: not defined for bool");
    if (a.size(a.ndim() - 1) != b.size(b.ndim() - 2))
      fail(ErrorKind::Shape, "matmul: ", a, " and ", b, " cannot be multiplied: ", a.size(a.ndim() - 1), " columns, ",
           b.size(b.ndim() - 2), " rows");
    Dims left = a.shape(), right = b.shape();
    left.push_back(1);
    right.insert(b.ndim() - 2, 1);
    const Tensor products = mul(reshape(a, left), reshape(b, right));
    return cast(sum(products, {-2}, false), t);
  }
};

}  // namespace mainspring::tensor::ops
