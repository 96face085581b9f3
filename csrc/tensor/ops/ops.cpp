// The ops as functions (ops.h), each one line to its struct.
#include "ops/ops.h"

#include "ops/table.h"

namespace mainspring::tensor::ops {

Tensor number(double value) {
  Tensor t = full({}, value, DType::Float64);
  t->weak = true;
  return t;
}

Generator& default_generator() {
  static Generator generator;
  return generator;
}

Tensor add(const Tensor& a, const Tensor& b) { return Add::forward(a, b); }
Tensor sub(const Tensor& a, const Tensor& b) { return Sub::forward(a, b); }
Tensor mul(const Tensor& a, const Tensor& b) { return Mul::forward(a, b); }
Tensor div(const Tensor& a, const Tensor& b) { return Div::forward(a, b); }
Tensor pow(const Tensor& a, const Tensor& b) { return Pow::forward(a, b); }
Tensor where(const Tensor& condition, const Tensor& a, const Tensor& b) { return Where::forward(condition, a, b); }
Tensor eq(const Tensor& a, const Tensor& b) { return Eq::forward(a, b); }
Tensor lt(const Tensor& a, const Tensor& b) { return Lt::forward(a, b); }
Tensor le(const Tensor& a, const Tensor& b) { return Le::forward(a, b); }
Tensor add_(const Tensor& a, const Tensor& b) { return AddInPlace::forward(a, b); }

Tensor neg(const Tensor& x) { return Neg::forward(x); }
Tensor square(const Tensor& x) { return Square::forward(x); }
Tensor sqrt(const Tensor& x) { return Sqrt::forward(x); }
Tensor exp(const Tensor& x) { return Exp::forward(x); }
Tensor log(const Tensor& x) { return Log::forward(x); }
Tensor sin(const Tensor& x) { return Sin::forward(x); }
Tensor cos(const Tensor& x) { return Cos::forward(x); }
Tensor tanh(const Tensor& x) { return Tanh::forward(x); }
Tensor erf(const Tensor& x) { return Erf::forward(x); }
Tensor sign(const Tensor& x) { return Sign::forward(x); }
Tensor sigmoid(const Tensor& x) { return Sigmoid::forward(x); }
Tensor silu(const Tensor& x) { return Silu::forward(x); }

Tensor sum(const Tensor& x, const Dims& dims, bool keepdim) { return Sum::forward(x, dims, keepdim); }
Tensor mean(const Tensor& x, const Dims& dims, bool keepdim) { return Mean::forward(x, dims, keepdim); }
Tensor amax(const Tensor& x, const Dims& dims, bool keepdim) { return Amax::forward(x, dims, keepdim); }

Tensor clone(const Tensor& x) { return Clone::forward(x); }
Tensor to(const Tensor& x, DType dtype) { return To::forward(x, dtype); }
Tensor reshape(const Tensor& x, const Dims& shape) { return Reshape::forward(x, shape); }
Tensor permute(const Tensor& x, const Dims& dims) { return Permute::forward(x, dims); }
Tensor transpose(const Tensor& x, int64_t a, int64_t b) { return Transpose::forward(x, a, b); }
Tensor expand(const Tensor& x, const Dims& shape) { return Expand::forward(x, shape); }
Tensor strided(const Tensor& x, const Dims& starts, const Dims& steps, const Dims& sizes) {
  return Strided::forward(x, starts, steps, sizes);
}
Tensor detach(const Tensor& x) { return Detach::forward(x); }

Tensor matmul(const Tensor& a, const Tensor& b) { return Matmul::forward(a, b); }
Tensor softmax(const Tensor& x, int64_t dim) { return Softmax::forward(x, dim); }
Tensor gather(const Tensor& x, int64_t dim, const Tensor& index) { return Gather::forward(x, dim, index); }
Tensor index_select(const Tensor& x, int64_t dim, const Tensor& index) { return IndexSelect::forward(x, dim, index); }

}  // namespace mainspring::tensor::ops
