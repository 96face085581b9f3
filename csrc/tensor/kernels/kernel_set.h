// What one instruction set offers to the tensors: plain loops over raw memory, chosen once at run time.
//
// Strides count elements. Outputs are contiguous unless a stride is given. float32 and bfloat16 are computed
// in float32, float64 in float64; float16 by the float32 kernels on widened pieces (half.cpp), in every set.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace mainspring::tensor {

#define MAINSPRING_BINARY_KERNELS(X) \
  X(Add) X(Sub) X(Mul) X(Div) X(Pow) X(Maximum) X(Minimum) X(And) X(Or) X(Xor) X(Swiglu) \
  X(FloorDivide) X(Remainder) X(Fmod) X(Atan2) X(Hypot) X(Copysign) X(ShiftLeft) X(ShiftRight) \
  X(TanhGrad) X(SigmoidGrad) X(ReluGrad) X(SiluGrad) X(GeluGrad) X(GeluTanhGrad)
#define MAINSPRING_COMPARE_KERNELS(X) X(Eq) X(Ne) X(Lt) X(Le)
#define MAINSPRING_UNARY_KERNELS(X) \
  X(Neg) X(Abs) X(Sign) X(Square) X(Reciprocal) X(Sqrt) X(Rsqrt) X(Exp) X(Expm1) X(Log) X(Log1p) X(Sin) X(Cos) \
  X(Tanh) X(Erf) X(Floor) X(Ceil) X(Round) X(Sigmoid) X(Relu) X(Silu) X(Gelu) X(GeluTanh) \
  X(Tan) X(Asin) X(Acos) X(Atan) X(Sinh) X(Cosh) X(Asinh) X(Acosh) X(Atanh) X(Exp2) X(Log2) X(Log10) X(Trunc) \
  X(Erfc) X(Lgamma) X(Digamma) X(Not)
#define MAINSPRING_REDUCE_KERNELS(X) X(Sum) X(Prod) X(Max) X(Min)

#define MAINSPRING_ENUMERATOR(name) name,
enum class BinaryKernel : uint8_t { MAINSPRING_BINARY_KERNELS(MAINSPRING_ENUMERATOR) Count };
enum class CompareKernel : uint8_t { MAINSPRING_COMPARE_KERNELS(MAINSPRING_ENUMERATOR) Count };
enum class UnaryKernel : uint8_t { MAINSPRING_UNARY_KERNELS(MAINSPRING_ENUMERATOR) Count };
enum class ReduceKernel : uint8_t { MAINSPRING_REDUCE_KERNELS(MAINSPRING_ENUMERATOR) Count };
#undef MAINSPRING_ENUMERATOR

using BinaryFn = void (*)(int64_t n, const void* a, int64_t sa, const void* b, int64_t sb, void* out);
using UnaryFn = void (*)(int64_t n, const void* a, int64_t sa, void* out);
// *acc = acc op x[0] op ... with acc a float (float32, bfloat16), double or int64.
using RowReduceFn = void (*)(int64_t n, const void* x, int64_t stride, void* acc);
// acc[i] = acc[i] op x[i]
using ColumnReduceFn = void (*)(int64_t n, const void* x, void* acc);

enum class RowKernel : uint8_t { Softmax, LogSoftmax };

struct NormArgs {
  const void* x;       // [rows, n]
  const void* weight;  // [n] or null
  const void* bias;    // [n] or null (LayerNorm only)
  void* out;           // [rows, n]
  void* mean;          // [rows], float or double; null for RMSNorm
  void* rstd;          // [rows]
  int64_t rows, n;
  double eps;
};

struct NormGradArgs {
  const void* x;
  const void* weight;
  const void* grad;  // [rows, n]
  const void* mean;  // null for RMSNorm
  const void* rstd;
  void* grad_x;       // or null
  void* grad_weight;  // [n] sums in float or double, or null
  void* grad_bias;    // the same
  int64_t rows, n;
};

struct CrossEntropyArgs {
  const void* logits;      // [rows, n]
  const int64_t* targets;  // [rows]
  int64_t ignore_index;
  double smoothing;
  void* losses;  // [rows], float or double
  void* lse;     // [rows]
  int64_t rows, n;
};

struct CrossEntropyGradArgs {
  const void* logits;
  const int64_t* targets;
  int64_t ignore_index;
  double smoothing;
  const void* lse;
  const void* scale;  // [rows], float or double: the gradient of each row's loss
  void* grad;         // [rows, n]
  int64_t rows, n;
};

struct AdamArgs {
  void* param;
  const void* grad;
  void* m;      // first moment, float for bfloat16 parameters
  void* v;      // second moment
  int64_t n;
  double lr, beta1, beta2, eps, decay;  // decay: p *= decay first (AdamW)
  double l2;                            // added to the gradient (Adam)
  double correction1, correction2;      // 1 - beta^t
};

struct SgdArgs {
  void* param;
  const void* grad;
  void* velocity;  // or null
  int64_t n;
  double lr, momentum, dampening, l2;
  bool nesterov, first;
};

// C[m, n] (+)= A[m, k] B[k, n] with any strides of A and B; C's rows are contiguous.
struct GemmArgs {
  const void* a;
  int64_t a_row, a_col;
  const void* b;
  int64_t b_row, b_col;
  void* c;
  int64_t c_row;
  const void* bias;  // [n], or null
  int64_t m, n, k;
  bool add = false;  // to C (float32 and float64)
};

constexpr int kNumFloats = 4;  // float16, bfloat16, float32, float64
constexpr int float_index(DType t) { return static_cast<int>(t) - static_cast<int>(DType::Float16); }

struct KernelSet {
  BinaryFn binary[static_cast<int>(BinaryKernel::Count)][kNumDTypes];
  BinaryFn compare[static_cast<int>(CompareKernel::Count)][kNumDTypes];
  UnaryFn unary[static_cast<int>(UnaryKernel::Count)][kNumDTypes];
  RowReduceFn row_reduce[static_cast<int>(ReduceKernel::Count)][kNumDTypes];
  ColumnReduceFn column_reduce[static_cast<int>(ReduceKernel::Count)][kNumDTypes];
  void (*widen)(int64_t n, const void* bfloat16, void* float32);
  void (*narrow)(int64_t n, const void* float32, void* bfloat16);
  void (*widen_half)(int64_t n, const void* float16, void* float32);
  void (*narrow_half)(int64_t n, const void* float32, void* float16);
  void (*softmax[kNumFloats])(RowKernel kind, int64_t rows, int64_t n, const void* x, void* out);
  void (*softmax_grad[kNumFloats])(RowKernel kind, int64_t rows, int64_t n, const void* y, const void* g, void* out);
  void (*norm[kNumFloats])(const NormArgs&);
  void (*norm_grad[kNumFloats])(const NormGradArgs&);
  void (*cross_entropy[kNumFloats])(const CrossEntropyArgs&);
  void (*cross_entropy_grad[kNumFloats])(const CrossEntropyGradArgs&);
  void (*adam[kNumFloats])(const AdamArgs&);
  void (*sgd[kNumFloats])(const SgdArgs&);
  void (*gemm[kNumFloats])(const GemmArgs&);
};

void fill_scalar(KernelSet& set);  // scalar.cpp: the entries that are the same in every set
void fill_half(KernelSet& set);    // half.cpp: the float16 entries of a set whose float32 entries are there

const KernelSet& kernels();  // of this processor, as csrc/kernels chose it (MAINSPRING_CPU_ISA lowers it)

}  // namespace mainspring::tensor
