// The one table of ops: from it come the Python functions and methods, their signatures, and the tests' list.
//
// OP(Python name, struct, "arguments with their defaults", kind)
// kind: Function; Method (a function too, the first argument being self); MethodOnly.
#pragma once

#include "nn/activations.h"
#include "nn/linear.h"
#include "nn/loss.h"
#include "nn/normalize.h"
#include "ops/in_place.h"
#include "ops/index.h"
#include "ops/matmul.h"

// clang-format off
#define MAINSPRING_TENSOR_OPS(OP) \
  OP(add, Add, "input, other", Method) \
  OP(sub, Sub, "input, other", Method) \
  OP(mul, Mul, "input, other", Method) \
  OP(div, Div, "input, other", Method) \
  OP(pow, Pow, "input, exponent", Method) \
  OP(maximum, Maximum, "input, other", Method) \
  OP(minimum, Minimum, "input, other", Method) \
  OP(where, Where, "condition, input, other", Function) \
  OP(eq, Eq, "input, other", Method) \
  OP(ne, Ne, "input, other", Method) \
  OP(lt, Lt, "input, other", Method) \
  OP(le, Le, "input, other", Method) \
  OP(gt, Gt, "input, other", Method) \
  OP(ge, Ge, "input, other", Method) \
  OP(bitwise_and, BitwiseAnd, "input, other", Method) \
  OP(bitwise_or, BitwiseOr, "input, other", Method) \
  OP(bitwise_xor, BitwiseXor, "input, other", Method) \
  OP(logical_not, LogicalNot, "input", Method) \
  OP(isnan, IsNan, "input", Method) \
  OP(neg, Neg, "input", Method) \
  OP(abs, Abs, "input", Method) \
  OP(sign, Sign, "input", Method) \
  OP(square, Square, "input", Method) \
  OP(reciprocal, Reciprocal, "input", Method) \
  OP(sqrt, Sqrt, "input", Method) \
  OP(rsqrt, Rsqrt, "input", Method) \
  OP(exp, Exp, "input", Method) \
  OP(expm1, Expm1, "input", Method) \
  OP(log, Log, "input", Method) \
  OP(log1p, Log1p, "input", Method) \
  OP(sin, Sin, "input", Method) \
  OP(cos, Cos, "input", Method) \
  OP(tanh, Tanh, "input", Method) \
  OP(erf, Erf, "input", Method) \
  OP(floor, Floor, "input", Method) \
  OP(ceil, Ceil, "input", Method) \
  OP(round, Round, "input", Method) \
  OP(clamp, Clamp, "input, min=None, max=None", Method) \
  OP(sigmoid, Sigmoid, "input", Method) \
  OP(relu, Relu, "input", Method) \
  OP(silu, Silu, "input", Function) \
  OP(gelu, Gelu, "input, approximate='none'", Function) \
  OP(swiglu, Swiglu, "gate, up", Function) \
  OP(sum, Sum, "input, dim=None, keepdim=False", Method) \
  OP(mean, Mean, "input, dim=None, keepdim=False", Method) \
  OP(var, Var, "input, dim=None, keepdim=False, correction=1.0", Method) \
  OP(amax, Amax, "input, dim=None, keepdim=False", Method) \
  OP(amin, Amin, "input, dim=None, keepdim=False", Method) \
  OP(argmax, Argmax, "input, dim=None, keepdim=False", Method) \
  OP(argmin, Argmin, "input, dim=None, keepdim=False", Method) \
  OP(any, Any, "input, dim=None, keepdim=False", Method) \
  OP(all, All, "input, dim=None, keepdim=False", Method) \
  OP(logsumexp, Logsumexp, "input, dim=None, keepdim=False", Method) \
  OP(reshape, Reshape, "input, shape", Method) \
  OP(view, View, "input, shape", MethodOnly) \
  OP(permute, Permute, "input, dims", Method) \
  OP(transpose, Transpose, "input, dim0, dim1", Method) \
  OP(expand, Expand, "input, shape", MethodOnly) \
  OP(squeeze, Squeeze, "input, dim=None", Method) \
  OP(unsqueeze, Unsqueeze, "input, dim", Method) \
  OP(flatten, Flatten, "input, start_dim=0, end_dim=-1", Method) \
  OP(narrow, Narrow, "input, dim, start, length", Method) \
  OP(split, Split, "input, split_size, dim=0", Method) \
  OP(chunk, Chunk, "input, chunks, dim=0", Method) \
  OP(cat, Cat, "tensors, dim=0", Function) \
  OP(stack, Stack, "tensors, dim=0", Function) \
  OP(clone, Clone, "input", Method) \
  OP(contiguous, Contiguous, "input", MethodOnly) \
  OP(to, To, "input, dtype", MethodOnly) \
  OP(detach, Detach, "input", MethodOnly) \
  OP(matmul, Matmul, "input, other", Method) \
  OP(gather, Gather, "input, dim, index", Method) \
  OP(index_select, IndexSelect, "input, dim, index", Method) \
  OP(tril, Tril, "input, diagonal=0", Method) \
  OP(triu, Triu, "input, diagonal=0", Method) \
  OP(masked_fill, MaskedFill, "input, mask, value", Method) \
  OP(embedding, Embedding, "input, weight", Function) \
  OP(linear, Linear, "input, weight, bias=None", Function) \
  OP(softmax, Softmax, "input, dim", Method) \
  OP(log_softmax, LogSoftmax, "input, dim", Method) \
  OP(layer_norm, LayerNorm, "input, weight=None, bias=None, eps=1e-5", Function) \
  OP(rms_norm, RmsNorm, "input, weight=None, eps=1e-6", Function) \
  OP(cross_entropy, CrossEntropy, "input, target, ignore_index=-100, reduction='mean', label_smoothing=0.0", Function) \
  OP(dropout, Dropout, "input, p=0.5, training=True", Function) \
  OP(add_, AddInPlace, "input, other", MethodOnly) \
  OP(sub_, SubInPlace, "input, other", MethodOnly) \
  OP(mul_, MulInPlace, "input, other", MethodOnly) \
  OP(div_, DivInPlace, "input, other", MethodOnly) \
  OP(copy_, CopyInPlace, "input, other", MethodOnly) \
  OP(fill_, FillInPlace, "input, value", MethodOnly) \
  OP(zero_, ZeroInPlace, "input", MethodOnly)
// clang-format on
