// Indexing by tensors with NumPy's rules: the index tensors broadcast against each other; what they name stands
// where they stand if they stand together, else in front.
#pragma once

#include "ops/scatter.h"

namespace mainspring::tensor::ops {

// One entry for each leading dimension of x: an int64 tensor, or an empty handle where the dimension is kept whole.
struct IndexPlan {
  Dims dims;             // the indexed dimensions, in order
  bool together = true;  // without a whole dimension in between
  Dims shape;            // to which the index tensors broadcast
  std::vector<Tensor> indices;  // of that shape, contiguous, within range

  IndexPlan(const char* op, const Tensor& x, const std::vector<Tensor>& given) {
    if (static_cast<int>(given.size()) > x.ndim())
      fail(ErrorKind::Index, op, ": ", static_cast<int>(given.size()), " indices for ", x);
    for (size_t d = 0; d < given.size(); ++d)
      if (given[d]) {
        if (dims.size() > 0 && dims[dims.size() - 1] != static_cast<int64_t>(d) - 1) together = false;
        dims.push_back(static_cast<int64_t>(d));
        shape = broadcast_shapes(op, shape, given[d].shape());
      }
    for (const int64_t d : dims) {
      const Tensor wide = contiguous(expand_to(given[static_cast<size_t>(d)], shape));
      indices.push_back(checked_index(op, wide, x.size(static_cast<int>(d))));
    }
  }

  // Where the named elements stand in the result.
  int place() const { return together && dims.size() > 0 ? static_cast<int>(dims[0]) : 0; }
  Dims kept(const Tensor& x) const {
    Dims out;
    for (int d = 0; d < x.ndim(); ++d) {
      bool indexed = false;
      for (const int64_t i : dims) indexed |= i == d;
      if (!indexed) out.push_back(d);
    }
    return out;
  }
  Dims result_shape(const Tensor& x) const {
    Dims out;
    const Dims rest = kept(x);
    for (int i = 0; i < rest.size(); ++i) {
      if (i == place()) for (const int64_t n : shape) out.push_back(n);
      out.push_back(x.size(static_cast<int>(rest[i])));
    }
    if (place() == rest.size()) for (const int64_t n : shape) out.push_back(n);
    return out;
  }
  // Position i of the index, weighed by the given strides of the indexed dimensions.
  int64_t offset(int64_t i, const Dims& strides) const {
    int64_t at = 0;
    for (size_t k = 0; k < indices.size(); ++k) at += indices[k].data<int64_t>()[i] * strides[static_cast<int>(k)];
    return at;
  }
};

struct AdvancedIndex {
  static constexpr auto name = "index";
  static Tensor forward(const Tensor& x, const std::vector<Tensor>& given) {
    const IndexPlan plan(name, x, given);
    if (plan.dims.size() == 0) return x;
    Tensor base = x;
    if (!plan.together) {
      Dims order = plan.dims;
      for (const int64_t d : plan.kept(x)) order.push_back(d);
      base = permute(x, order);
    }
    // The indexed dimensions become one.
    const int first = plan.place(), count = plan.dims.size();
    Dims merged, sizes(base->sizes + first, count);
    for (int d = 0; d < base.ndim(); ++d) {
      if (d == first) merged.push_back(sizes.product());
      if (d < first || d >= first + count) merged.push_back(base.size(d));
    }
    const Tensor linear = empty({plan.shape.product()}, DType::Int64);
    const Dims steps = contiguous_strides(sizes);
    for (int64_t i = 0; i < linear.numel(); ++i) linear.data<int64_t>()[i] = plan.offset(i, steps);
    return reshape(IndexSelect::forward(reshape(base, merged), first, linear), plan.result_shape(x));
  }
};

// values, broadcast, into x in place. Of several for one place the last counts.
inline void index_put_in_place(const char* op, const Tensor& x, const std::vector<Tensor>& given, const Tensor& values) {
  const IndexPlan plan(op, x, given);
  const Dims shape = plan.result_shape(x);
  if (!(broadcast_shapes(op, shape, values.shape()) == shape))
    fail(ErrorKind::Shape, op, ": ", values, " does not fit into the ", shape, " indexed elements");
  const Dims rest = plan.kept(x);
  const int first = plan.place(), count = plan.shape.size();
  Dims order, row_shape, row_strides, steps;
  for (int i = 0; i < count; ++i) order.push_back(first + i);
  for (int i = 0; i < shape.size(); ++i)
    if (i < first || i >= first + count) order.push_back(i);
  for (const int64_t d : rest) {
    row_shape.push_back(x.size(static_cast<int>(d)));
    row_strides.push_back(x.stride(static_cast<int>(d)));
  }
  for (const int64_t d : plan.dims) steps.push_back(x.stride(static_cast<int>(d)));
  GradMode off(false);
  const bool overlaps = values->storage == x->storage;
  const Tensor wide = expand_to(cast(overlaps ? copy_of(values) : values, x.dtype()), shape);
  const Tensor from = contiguous(permute(wide, order));
  const int64_t row = row_shape.product(), item = itemsize(x.dtype());
  if (row == 0) return;
  for (int64_t i = 0; i < plan.shape.product(); ++i) {
    const int64_t to = plan.offset(i, steps);
    if (row == 1) std::memcpy(x.data<char>() + to * item, from.data<char>() + i * item, static_cast<size_t>(item));
    else copy_into(make_view(x, row_shape, row_strides, to), make_view(from, row_shape, contiguous_strides(row_shape), i * row));
  }
  x.bump_version();
}

struct IndexPut {
  static constexpr auto name = "index_put";
  static Tensor forward(const Tensor& x, const std::vector<Tensor>& indices, const Tensor& values, bool accumulate) {
    if (values.dtype() != x.dtype()) fail(ErrorKind::DType, "index_put: ", values, " and ", x, " differ in dtype");
    // The positions of the indexed elements in the flattened x; all else follows from ops with gradients.
    const Tensor numbers = empty(x.shape(), DType::Int64);
    for (int64_t i = 0; i < x.numel(); ++i) numbers.data<int64_t>()[i] = i;
    std::vector<Tensor> given;
    for (const Tensor& t : indices) {
      if (t.dtype() != DType::Bool) {
        given.push_back(t);
        continue;
      }
      const Tensor at = nonzero_positions(contiguous(t));
      for (int d = 0; d < t.ndim(); ++d) given.push_back(contiguous(make_view(at, {at.size(0)}, {at.stride(0)}, d)));
    }
    const Tensor at = AdvancedIndex::forward(numbers, given);
    const Tensor from = reshape(expand(values, at.shape()), {at.numel()}), flat = reshape(x, {x.numel()});
    const Tensor place = reshape(at, {at.numel()});
    return reshape(accumulate ? ScatterAddOp::forward(flat, 0, place, from) : Scatter::forward(flat, 0, place, from), x.shape());
  }
};

}  // namespace mainspring::tensor::ops
