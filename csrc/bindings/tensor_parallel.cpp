// Groups of processes, their collectives, and what csrc/parallel builds on them.
#include <nanobind/stl/shared_ptr.h>

#include "ops/loops.h"
#include "parallel/buckets.h"
#include "parallel/cross_entropy.h"
#include "parallel/indices.h"
#include "parallel/softmax.h"
#include "tensor_object.h"

using nanobind::literals::operator""_a;

namespace mainspring::tensor::python {
namespace {

using parallel::Group;
using parallel::GroupPtr;
using parallel::Queue;
using parallel::Reduction;
using parallel::Work;
using parallel::World;

Reduction reduction(const std::string& name) {
  static constexpr std::pair<const char*, Reduction> kNames[] = {{"sum", Reduction::Sum}, {"prod", Reduction::Prod},
      {"max", Reduction::Max}, {"min", Reduction::Min}, {"avg", Reduction::Avg}};
  for (const auto& [known, op] : kNames)
    if (name == known) return op;
  fail(ErrorKind::Value, "the reduction '", name, "' is not one of sum, prod, max, min, avg");
}

// Now, without the interpreter lock, or later on the queue's thread.
nb::object run(Queue& queue, bool async_op, std::function<void()> task) {
  if (async_op) return nb::cast(queue.submit(std::move(task)));
  {
    const nb::gil_scoped_release release;
    queue.run(task);
  }
  return nb::none();
}

void check_flat(const char* op, const Tensor& t) {
  if (!t.contiguous()) fail(ErrorKind::Shape, op, ": needs a contiguous tensor, not ", t, " with strides ", t.strides());
}
Dims stacked(const char* op, const Tensor& t, int64_t factor, bool grows) {
  if (t.ndim() == 0) fail(ErrorKind::Shape, op, ": needs at least one dimension, not ", t);
  Dims shape = t.shape();
  if (!grows && shape[0] % factor != 0)
    fail(ErrorKind::Shape, op, ": the first dimension of ", t, " is not divisible by ", factor, " ranks");
  shape[0] = grows ? shape[0] * factor : shape[0] / factor;
  return shape;
}

// (out, work): the result at once, filled when the work is done.
nb::object with_result(const Tensor& out, nb::object work) {
  if (work.is_none()) return nb::cast(out);
  return nb::make_tuple(out, work);
}

}  // namespace

void bind_parallel(nb::module_& m) {
  nb::class_<Work>(m, "Work", "An asynchronous collective.")
      .def("wait", &Work::wait, nb::call_guard<nb::gil_scoped_release>(), "Returns when it is done; raises what it raised.")
      .def("done", &Work::done);

  nb::class_<World>(m, "World", "All ranks of a job; rank 0 listens at address (host:port).")
      .def("__init__", [](World* w, int rank, int size, const std::string& address, double timeout) {
        const nb::gil_scoped_release release;
        new (w) World(rank, size, address, timeout);
      }, "rank"_a, "size"_a, "address"_a, "timeout"_a = 60.0)
      .def_prop_ro("rank", &World::rank)
      .def_prop_ro("size", &World::size);

  nb::class_<Group>(m, "Group", "Some ranks of a world, numbered anew from 0.")
      .def_prop_ro("rank", &Group::rank)
      .def_prop_ro("size", &Group::size)
      .def_prop_ro("ranks", [](const Group& g) { return nb::tuple(nb::cast(g.ranks())); })
      .def_prop_ro("transport", &Group::transport)
      .def("all_reduce", [](std::shared_ptr<Group> g, const Tensor& t, const std::string& op, bool async_op) {
        check_flat("all_reduce", t);
        const Reduction kind = reduction(op);
        t.bump_version();
        return run(g->collectives, async_op, [g = g.get(), t, kind] { g->all_reduce(t, kind); });
      }, "tensor"_a, "op"_a = "sum", "async_op"_a = false, "In place, the same bits on every rank.")
      .def("all_gather", [](std::shared_ptr<Group> g, const Tensor& given, bool async_op) {
        const Tensor t = contiguous(given), out = empty(stacked("all_gather", t, g->size(), true), t.dtype());
        return with_result(out, run(g->collectives, async_op, [g = g.get(), t, out] { g->all_gather(t, out); }));
      }, "tensor"_a, "async_op"_a = false, "The ranks' tensors below each other: [size * n, ...].")
      .def("reduce_scatter", [](std::shared_ptr<Group> g, const Tensor& given, const std::string& op, bool async_op) {
        const Tensor t = contiguous(given), out = empty(stacked("reduce_scatter", t, g->size(), false), t.dtype());
        const Reduction kind = reduction(op);
        return with_result(out, run(g->collectives, async_op, [g = g.get(), t, out, kind] { g->reduce_scatter(t, out, kind); }));
      }, "tensor"_a, "op"_a = "sum", "async_op"_a = false, "This rank's part of the reduced tensor: [n / size, ...].")
      .def("all_to_all", [](std::shared_ptr<Group> g, const Tensor& given, bool async_op) {
        const Tensor t = contiguous(given), out = empty(t.shape(), t.dtype());
        stacked("all_to_all", t, g->size(), false);
        return with_result(out, run(g->collectives, async_op, [g = g.get(), t, out] { g->all_to_all(t, out); }));
      }, "tensor"_a, "async_op"_a = false, "Piece r goes to rank r; the result holds the pieces in the order of ranks.")
      .def("broadcast", [](std::shared_ptr<Group> g, const Tensor& t, int root, bool async_op) {
        check_flat("broadcast", t);
        if (g->rank() != root) t.bump_version();
        return run(g->collectives, async_op, [g = g.get(), t, root] { g->broadcast(t, root); });
      }, "tensor"_a, "root"_a, "async_op"_a = false, "In place, from rank `root` of the group.")
      .def("barrier", [](std::shared_ptr<Group> g) {
        run(g->collectives, false, [g = g.get()] { g->barrier(); });
      }, "Returns when every rank has come.")
      .def("send", [](std::shared_ptr<Group> g, const Tensor& given, int to, bool async_op) {
        const Tensor t = contiguous(given);
        return run(g->sends, async_op, [g = g.get(), t, to] { g->send(t, to); });
      }, "tensor"_a, "to"_a, "async_op"_a = false)
      .def("recv", [](std::shared_ptr<Group> g, const Tensor& t, int from, bool async_op) {
        check_flat("recv", t);
        t.bump_version();
        return run(g->receives, async_op, [g = g.get(), t, from] { g->receive(t, from); });
      }, "tensor"_a, "source"_a, "async_op"_a = false, "Into the tensor.");

  m.def("new_group", [](std::shared_ptr<World> world, std::vector<int> ranks, const std::string& transport) {
    const nb::gil_scoped_release release;
    return Group::create(world, std::move(ranks), transport);
  }, "world"_a, "ranks"_a, "transport"_a = "auto",
     "All ranks of the world call this in one order; None where this rank is not in it.");

  m.def("_all_reduced", [](const Tensor& x, const GroupPtr& g) { return parallel::all_reduced(x, g); }, "x"_a, "group"_a);
  m.def("_gathered", &parallel::gathered, "x"_a, "group"_a, "last"_a);
  m.def("_reduce_scattered", &parallel::reduce_scattered, "x"_a, "group"_a);
  m.def("_own_part", &parallel::own_part, "x"_a, "group"_a, "dim"_a);
  m.def("_copy_to_ranks", &parallel::CopyToTensorParallel::forward, "x"_a, "group"_a);
  m.def("_reduce_from_ranks", &parallel::ReduceFromTensorParallel::forward, "x"_a, "group"_a);
  m.def("_scatter_to_ranks", &parallel::Scatter::forward, "x"_a, "group"_a, "last"_a);
  m.def("_gather_from_ranks", &parallel::Gather::forward, "x"_a, "group"_a, "last"_a, "sums"_a);
  m.def("_reduce_scatter_to_ranks", &parallel::ReduceScatter::forward, "x"_a, "group"_a);
  m.def("_all_to_all", &parallel::AllToAll::forward, "x"_a, "group"_a);
  m.def("_vocab_parallel_cross_entropy", &parallel::VocabParallelCrossEntropy::forward, "logits"_a, "target"_a, "group"_a,
        "label_smoothing"_a);
  m.def("_scaled_masked_softmax", &parallel::ScaledMaskedSoftmax::forward, "scores"_a, "mask"_a = nb::none(), "scale"_a = 1.0,
        "causal"_a = false);

  using parallel::GradientBuckets;
  nb::class_<GradientBuckets>(m, "_GradientBuckets", "Gradients averaged over a group while the backward pass goes on.")
      .def(nb::init<const std::vector<Tensor>&, const GroupPtr&, int64_t>(), "params"_a, "group"_a, "bucket_elements"_a)
      .def_prop_ro("size", &GradientBuckets::size)
      .def("finish", [](GradientBuckets& b) {
        {
          const nb::gil_scoped_release release;
          b.wait();
        }
        b.store_gradients();
      })
      .def("remove_hooks", &GradientBuckets::remove_hooks);

  m.def("_build_sample_idx", [](const Tensor& sizes, const Tensor& document_idx, int64_t seq_length, int64_t num_epochs,
                                int64_t tokens_per_epoch, bool drop_last, bool extra) {
    return parallel::build_sample_idx(sizes, document_idx, {seq_length, num_epochs, tokens_per_epoch, drop_last, extra});
  }, "sizes"_a, "document_idx"_a, "seq_length"_a, "num_epochs"_a, "tokens_per_epoch"_a, "drop_last_partial_sequence"_a,
     "add_extra_token_to_sequence"_a);
  m.def("_build_blending_indices", [](const std::vector<double>& weights, int64_t size) {
    const parallel::Blending out = parallel::build_blending_indices(weights, size);
    return nb::make_tuple(out.dataset, out.sample);
  }, "weights"_a, "size"_a);
}

}  // namespace mainspring::tensor::python
