// The one table of ops: from it come the Python functions and methods, their signatures, and the tests' list.
//
// OP(Python name, struct, "arguments with their defaults", kind)
// kind: Function; Method (a function too, the first argument being self); MethodOnly.
#pragma once

#include "nn/attention.h"
#include "nn/conv.h"
#include "nn/functional.h"
#include "nn/linear.h"
#include "ops/advanced_index.h"
#include "ops/composite_shapes.h"
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
  OP(isinf, IsInf, "input", Method) \
  OP(isfinite, IsFinite, "input", Method) \
  OP(signbit, Signbit, "input", Method) \
  OP(isclose, IsClose, "input, other, rtol=1e-05, atol=1e-08, equal_nan=False", Method) \
  OP(logical_and, LogicalAnd, "input, other", Method) \
  OP(logical_or, LogicalOr, "input, other", Method) \
  OP(logical_xor, LogicalXor, "input, other", Method) \
  OP(bitwise_not, BitwiseNot, "input", Method) \
  OP(bitwise_left_shift, ShiftLeft, "input, other", Method) \
  OP(bitwise_right_shift, ShiftRight, "input, other", Method) \
  OP(floor_divide, FloorDivide, "input, other", Method) \
  OP(remainder, Remainder, "input, other", Method) \
  OP(fmod, Fmod, "input, other", Method) \
  OP(atan2, Atan2, "input, other", Method) \
  OP(hypot, Hypot, "input, other", Method) \
  OP(copysign, Copysign, "input, other", Method) \
  OP(fmax, Fmax, "input, other", Method) \
  OP(fmin, Fmin, "input, other", Method) \
  OP(logaddexp, Logaddexp, "input, other", Method) \
  OP(logaddexp2, Logaddexp2, "input, other", Method) \
  OP(xlogy, Xlogy, "input, other", Method) \
  OP(heaviside, Heaviside, "input, values", Method) \
  OP(lerp, Lerp, "input, end, weight", Method) \
  OP(addcmul, Addcmul, "input, tensor1, tensor2, value=1.0", Method) \
  OP(addcdiv, Addcdiv, "input, tensor1, tensor2, value=1.0", Method) \
  OP(positive, Positive, "input", Method) \
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
  OP(exp2, Exp2, "input", Method) \
  OP(log2, Log2, "input", Method) \
  OP(log10, Log10, "input", Method) \
  OP(tan, Tan, "input", Method) \
  OP(asin, Asin, "input", Method) \
  OP(acos, Acos, "input", Method) \
  OP(atan, Atan, "input", Method) \
  OP(sinh, Sinh, "input", Method) \
  OP(cosh, Cosh, "input", Method) \
  OP(asinh, Asinh, "input", Method) \
  OP(acosh, Acosh, "input", Method) \
  OP(atanh, Atanh, "input", Method) \
  OP(erfc, Erfc, "input", Method) \
  OP(lgamma, Lgamma, "input", Method) \
  OP(digamma, Digamma, "input", Method) \
  OP(trunc, Trunc, "input", Method) \
  OP(frac, Frac, "input", Method) \
  OP(deg2rad, Deg2Rad, "input", Method) \
  OP(rad2deg, Rad2Deg, "input", Method) \
  OP(sinc, Sinc, "input", Method) \
  OP(logit, Logit, "input, eps=None", Method) \
  OP(nan_to_num, NanToNum, "input, nan=0.0, posinf=None, neginf=None", Method) \
  OP(clip, ClampTensor, "input, min=None, max=None", Method) \
  OP(clamp, Clamp, "input, min=None, max=None", Method) \
  OP(sigmoid, Sigmoid, "input", Method) \
  OP(relu, Relu, "input", Method) \
  OP(silu, Silu, "input", Function) \
  OP(gelu, Gelu, "input, approximate='none'", Function) \
  OP(swiglu, Swiglu, "gate, up", Function) \
  OP(leaky_relu, LeakyRelu, "input, negative_slope=0.01", Function) \
  OP(prelu, Prelu, "input, weight", Function) \
  OP(elu, Elu, "input, alpha=1.0", Function) \
  OP(celu, Celu, "input, alpha=1.0", Function) \
  OP(selu, Selu, "input", Function) \
  OP(relu6, Relu6, "input", Function) \
  OP(hardtanh, Hardtanh, "input, min_val=-1.0, max_val=1.0", Function) \
  OP(hardsigmoid, Hardsigmoid, "input", Function) \
  OP(hardswish, Hardswish, "input", Function) \
  OP(hardshrink, Hardshrink, "input, lambd=0.5", Function) \
  OP(softshrink, Softshrink, "input, lambd=0.5", Function) \
  OP(softplus, Softplus, "input, beta=1.0, threshold=20.0", Function) \
  OP(logsigmoid, LogSigmoid, "input", Function) \
  OP(softsign, Softsign, "input", Function) \
  OP(tanhshrink, Tanhshrink, "input", Function) \
  OP(mish, Mish, "input", Function) \
  OP(threshold, Threshold, "input, threshold, value", Function) \
  OP(softmin, Softmin, "input, dim", Function) \
  OP(glu, Glu, "input, dim=-1", Function) \
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
  OP(prod, Prod, "input, dim=None, keepdim=False", Method) \
  OP(std, Std, "input, dim=None, keepdim=False, correction=1.0", Method) \
  OP(var_mean, VarMean, "input, dim=None, keepdim=False, correction=1.0", Function) \
  OP(std_mean, StdMean, "input, dim=None, keepdim=False, correction=1.0", Function) \
  OP(nansum, Nansum, "input, dim=None, keepdim=False", Method) \
  OP(nanmean, Nanmean, "input, dim=None, keepdim=False", Method) \
  OP(count_nonzero, CountNonzero, "input, dim=None", Method) \
  OP(aminmax, Aminmax, "input, dim=None, keepdim=False", Method) \
  OP(vector_norm, VectorNorm, "input, ord=2.0, dim=None, keepdim=False", Function) \
  OP(dist, Dist, "input, other, p=2.0", Method) \
  OP(trace, Trace, "input", Method) \
  OP(median, Median, "input, dim=-1, keepdim=False", Method) \
  OP(kthvalue, Kthvalue, "input, k, dim=-1, keepdim=False", Method) \
  OP(diff, Diff, "input, n=1, dim=-1, prepend=None, append=None", Method) \
  OP(cumsum, Cumsum, "input, dim", Method) \
  OP(cumprod, Cumprod, "input, dim", Method) \
  OP(cummax, Cummax, "input, dim", Method) \
  OP(cummin, Cummin, "input, dim", Method) \
  OP(logcumsumexp, Logcumsumexp, "input, dim", Method) \
  OP(sort, Sort, "input, dim=-1, descending=False, stable=False", Method) \
  OP(argsort, Argsort, "input, dim=-1, descending=False, stable=False", Method) \
  OP(msort, Msort, "input", Method) \
  OP(topk, Topk, "input, k, dim=-1, largest=True, sorted=True", Method) \
  OP(nonzero, Nonzero, "input", Method) \
  OP(searchsorted, Searchsorted, "sorted_sequence, input, right=False", Function) \
  OP(bucketize, Bucketize, "input, boundaries, right=False", Function) \
  OP(unique_all, UniqueAll, "input", Function) \
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
  OP(hstack, Hstack, "tensors", Function) \
  OP(vstack, Vstack, "tensors", Function) \
  OP(dstack, Dstack, "tensors", Function) \
  OP(column_stack, ColumnStack, "tensors", Function) \
  OP(tensor_split, TensorSplit, "input, sections, dim=0", Method) \
  OP(unbind, Unbind, "input, dim=0", Method) \
  OP(select, Select, "input, dim, index", Method) \
  OP(unflatten, Unflatten, "input, dim, sizes", Method) \
  OP(diagonal, Diagonal, "input, offset=0, dim1=0, dim2=1", Method) \
  OP(diag_embed, DiagEmbed, "input, offset=0, dim1=-2, dim2=-1", Method) \
  OP(diag, Diag, "input, diagonal=0", Method) \
  OP(flip, Flip, "input, dims", Method) \
  OP(fliplr, Fliplr, "input", Method) \
  OP(flipud, Flipud, "input", Method) \
  OP(roll, Roll, "input, shifts, dims=None", Method) \
  OP(rot90, Rot90, "input, k=1, dims=(0,1)", Method) \
  OP(movedim, Movedim, "input, source, destination", Method) \
  OP(broadcast_to, BroadcastTo, "input, shape", Method) \
  OP(broadcast_tensors, BroadcastTensors, "tensors", Function) \
  OP(expand_as, ExpandAs, "input, other", MethodOnly) \
  OP(meshgrid, Meshgrid, "tensors, indexing='ij'", Function) \
  OP(tile, Tile, "input, dims", Method) \
  OP(repeat, Repeat, "input, repeats", MethodOnly) \
  OP(repeat_interleave, RepeatInterleave, "input, repeats, dim=None", Method) \
  OP(unfold, Unfold, "input, dimension, size, step", MethodOnly) \
  OP(pad, Pad, "input, pad, value=0.0", Function) \
  OP(one_hot, OneHot, "input, num_classes=-1", Function) \
  OP(clone, Clone, "input", Method) \
  OP(contiguous, Contiguous, "input", MethodOnly) \
  OP(to, To, "input, dtype", MethodOnly) \
  OP(detach, Detach, "input", MethodOnly) \
  OP(matmul, Matmul, "input, other", Method) \
  OP(mm, Mm, "input, other", Method) \
  OP(bmm, Bmm, "input, other", Method) \
  OP(mv, Mv, "input, vec", Method) \
  OP(dot, Dot, "input, other", Method) \
  OP(inner, Inner, "input, other", Method) \
  OP(outer, Outer, "input, vec2", Method) \
  OP(addmm, Addmm, "input, mat1, mat2, beta=1.0, alpha=1.0", Method) \
  OP(addmv, Addmv, "input, mat, vec, beta=1.0, alpha=1.0", Method) \
  OP(addr, Addr, "input, vec1, vec2, beta=1.0, alpha=1.0", Method) \
  OP(baddbmm, Baddbmm, "input, batch1, batch2, beta=1.0, alpha=1.0", Method) \
  OP(addbmm, Addbmm, "input, batch1, batch2, beta=1.0, alpha=1.0", Method) \
  OP(kron, Kron, "input, other", Method) \
  OP(tensordot, Tensordot, "a, b, dims=2", Function) \
  OP(einsum, Einsum, "equation, operands", Function) \
  OP(scatter, Scatter, "input, dim, index, src", Method) \
  OP(scatter_add, ScatterAddOp, "input, dim, index, src", Method) \
  OP(index_add, IndexAddOp, "input, dim, index, source, alpha=1.0", Method) \
  OP(index_copy, IndexCopy, "input, dim, index, source", Method) \
  OP(index_fill, IndexFill, "input, dim, index, value", Method) \
  OP(index_put, IndexPut, "input, indices, values, accumulate=False", Method) \
  OP(take, Take, "input, index", Method) \
  OP(take_along_dim, TakeAlongDim, "input, indices, dim=None", Method) \
  OP(masked_select, MaskedSelect, "input, mask", Method) \
  OP(masked_scatter, MaskedScatter, "input, mask, source", Method) \
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
  OP(mse_loss, MseLoss, "input, target, reduction='mean'", Function) \
  OP(l1_loss, L1Loss, "input, target, reduction='mean'", Function) \
  OP(huber_loss, HuberLoss, "input, target, reduction='mean', delta=1.0", Function) \
  OP(smooth_l1_loss, SmoothL1Loss, "input, target, reduction='mean', beta=1.0", Function) \
  OP(binary_cross_entropy, BinaryCrossEntropy, "input, target, reduction='mean'", Function) \
  OP(binary_cross_entropy_with_logits, BceWithLogits, "input, target, reduction='mean'", Function) \
  OP(kl_div, KlDiv, "input, target, reduction='mean', log_target=False", Function) \
  OP(nll_loss, NllLoss, "input, target, ignore_index=-100, reduction='mean'", Function) \
  OP(cosine_similarity, CosineSimilarity, "x1, x2, dim=1, eps=1e-08", Function) \
  OP(normalize, Normalize, "input, p=2.0, dim=1, eps=1e-12", Function) \
  OP(pairwise_distance, PairwiseDistance, "x1, x2, p=2.0, eps=1e-06, keepdim=False", Function) \
  OP(group_norm, GroupNorm, "input, num_groups, weight=None, bias=None, eps=1e-5", Function) \
  OP(attention, Attention, "q, k, v, causal=False, scale=None", Function) \
  OP(rope, Rope, "input, cos, sin", Function) \
  OP(conv1d, Conv1d, "input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1", Function) \
  OP(conv2d, Conv2d, "input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1", Function) \
  OP(dropout, Dropout, "input, p=0.5, training=True", Function) \
  OP(add_, AddInPlace, "input, other", MethodOnly) \
  OP(sub_, SubInPlace, "input, other", MethodOnly) \
  OP(mul_, MulInPlace, "input, other", MethodOnly) \
  OP(div_, DivInPlace, "input, other", MethodOnly) \
  OP(copy_, CopyInPlace, "input, other", MethodOnly) \
  OP(fill_, FillInPlace, "input, value", MethodOnly) \
  OP(zero_, ZeroInPlace, "input", MethodOnly)
// clang-format on
