#include "parallel/mappings.h"

#include <limits>

#include "core/blocking.h"
#include "ops/loops.h"
#include "ops/ops.h"

namespace mainspring::tensor::parallel {
namespace {

// In turn with the group's other collectives, outside the interpreter lock: a peer may be late.
template <class Body>
void collect(const GroupPtr& group, Body body) {
  BlockingRegion region(std::numeric_limits<int64_t>::max());
  group->collectives.run(body);
}

int64_t share(const char* op, const Tensor& x, const GroupPtr& group, int64_t dim) {
  if (x.ndim() == 0) fail(ErrorKind::Shape, op, ": needs at least one dimension, not ", x);
  const int64_t size = x.size(static_cast<int>(dim));
  if (size % group->size() != 0)
    fail(ErrorKind::Shape, op, ": dimension ", dim, " of ", x, " is not divisible by ", group->size(), " ranks");
  return size / group->size();
}

}  // namespace

Tensor all_reduced(const Tensor& x, const GroupPtr& group, Reduction op) {
  const Tensor out = copy_of(x);
  collect(group, [&] { group->all_reduce(out, op); });
  return out;
}

Tensor gathered(const Tensor& given, const GroupPtr& group, bool last) {
  if (group->size() == 1) return alias(given);
  if (given.ndim() == 0) fail(ErrorKind::Shape, "all_gather: needs at least one dimension, not ", given);
  const Tensor x = contiguous(given);
  Dims stacked = x.shape();
  stacked.insert(0, group->size());
  const Tensor parts = empty(stacked, x.dtype());
  collect(group, [&] { group->all_gather(x, parts); });
  Dims whole = x.shape();
  const int end = x.ndim() - 1;
  whole[last ? end : 0] *= group->size();
  if (!last || end == 0) return ops::reshape(parts, whole);
  Dims order;  // the ranks' dimension goes before the last
  for (int d = 1; d <= end; ++d) order.push_back(d);
  order.push_back(0);
  order.push_back(end + 1);
  return ops::reshape(ops::permute(parts, order), whole);
}

Tensor reduce_scattered(const Tensor& given, const GroupPtr& group) {
  if (group->size() == 1) return alias(given);
  Dims shape = given.shape();
  const int64_t part = share("reduce_scatter", given, group, 0);
  shape[0] = part;
  const Tensor x = contiguous(given), out = empty(shape, x.dtype());
  collect(group, [&] { group->reduce_scatter(x, out, Reduction::Sum); });
  return out;
}

Tensor own_part(const Tensor& x, const GroupPtr& group, int64_t dim) {
  const int64_t at = dim < 0 ? dim + x.ndim() : dim;
  if (x.ndim() > 0 && (at < 0 || at >= x.ndim()))
    fail(ErrorKind::Index, "own_part: dimension ", dim, " of ", x, " does not exist");
  const int64_t part = share("own_part", x, group, at);
  Dims shape = x.shape();
  shape[static_cast<int>(at)] = part;
  return copy_of(make_view(x, shape, x.strides(), group->rank() * part * x.stride(static_cast<int>(at))));
}

Tensor CopyToTensorParallel::forward(const Tensor& x, const GroupPtr& group) {
  Tensor out = alias(x);
  if (recording(x)) record<CopyToTensorParallel>(out, {group}, x);
  return out;
}
void CopyToTensorParallel::backward(const Saved& s, const Tensor& g, Grads& grads) {
  grads[0] = ReduceFromTensorParallel::forward(g, s.group);
}

Tensor ReduceFromTensorParallel::forward(const Tensor& x, const GroupPtr& group) {
  Tensor out = all_reduced(x, group);
  if (recording(x)) record<ReduceFromTensorParallel>(out, {group}, x);
  return out;
}
void ReduceFromTensorParallel::backward(const Saved& s, const Tensor& g, Grads& grads) {
  grads[0] = CopyToTensorParallel::forward(g, s.group);
}

Tensor Scatter::forward(const Tensor& x, const GroupPtr& group, bool last) {
  Tensor out = own_part(x, group, last ? -1 : 0);
  if (recording(x)) record<Scatter>(out, {group, last}, x);
  return out;
}
void Scatter::backward(const Saved& s, const Tensor& g, Grads& grads) {
  grads[0] = Gather::forward(g, s.group, s.last, false);
}

Tensor Gather::forward(const Tensor& x, const GroupPtr& group, bool last, bool sums) {
  Tensor out = gathered(x, group, last);
  if (recording(x)) record<Gather>(out, {group, last, sums}, x);
  return out;
}
void Gather::backward(const Saved& s, const Tensor& g, Grads& grads) {
  grads[0] = s.sums ? ReduceScatter::forward(g, s.group) : Scatter::forward(g, s.group, s.last);
}

Tensor ReduceScatter::forward(const Tensor& x, const GroupPtr& group) {
  Tensor out = reduce_scattered(x, group);
  if (recording(x)) record<ReduceScatter>(out, {group}, x);
  return out;
}
void ReduceScatter::backward(const Saved& s, const Tensor& g, Grads& grads) {
  grads[0] = Gather::forward(g, s.group, false, true);
}

Tensor AllToAll::forward(const Tensor& given, const GroupPtr& group) {
  share("all_to_all", given, group, 0);
  const Tensor x = contiguous(given);
  Tensor out = empty(x.shape(), x.dtype());
  collect(group, [&] { group->all_to_all(x, out); });
  if (recording(given)) record<AllToAll>(out, {group}, given);
  return out;
}
void AllToAll::backward(const Saved& s, const Tensor& g, Grads& grads) { grads[0] = AllToAll::forward(g, s.group); }

}  // namespace mainspring::tensor::parallel
