// Allocator, views, tape, pool, collectives and what is built on them, without Python: what the sanitizers watch.
//
// The port of the collectives comes from MAINSPRING_TEST_PORT (and the next two).
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <cmath>
#include <cstdlib>
#include <thread>

#include "autograd/engine.h"
#include "ops/ops.h"
#include "ops/table.h"
#include "parallel/buckets.h"
#include "parallel/cross_entropy.h"
#include "parallel/indices.h"
#include "thread_pool.h"

using namespace mainspring;
using namespace mainspring::tensor;

namespace {

template <class Body>
bool throws(ErrorKind kind, Body body) {
  try {
    body();
  } catch (const Error& e) {
    return e.kind == kind;
  }
  return false;
}

double at(const Tensor& t, int64_t i) { return read_double(contiguous(t).data<char>() + i * itemsize(t.dtype()), t.dtype()); }

Tensor ramp(const Dims& shape, DType t = DType::Float32) {
  const Tensor x = empty(shape, t);
  for (int64_t i = 0; i < x.numel(); ++i) write_double(x.data<char>() + i * itemsize(t), t, static_cast<double>(i));
  return x;
}

TEST_CASE("the allocator gives aligned blocks, gives them again, and counts them") {
  empty_cache();
  for (const size_t bytes : {size_t{1}, size_t{64}, size_t{1000}, size_t{1025}, size_t{1} << 20}) {
    char* first = static_cast<char*>(allocate(bytes));
    CHECK(reinterpret_cast<uintptr_t>(first) % 64 == 0);
    first[0] = first[bytes - 1] = 1;
    deallocate(first, bytes);
    void* again = allocate(bytes);
    CHECK(again == first);
    deallocate(again, bytes);
  }
  void* block = allocate(100);  // freed on another thread than the one that took it
  std::thread([block] { deallocate(block, 100); }).join();
  const MemoryStats before = memory_stats();
  { const Tensor big = zeros({1 << 18}, DType::Float32); CHECK(memory_stats().used_bytes > before.used_bytes); }
  CHECK(memory_stats().used_bytes == before.used_bytes);
  empty_cache();
  CHECK(memory_stats().cached_bytes == 0);
}

TEST_CASE("views share storage, versions and errors") {
  const Tensor x = ramp({3, 4});
  const Tensor turned = ops::transpose(x, 0, 1);
  CHECK(turned->storage == x->storage);
  CHECK_FALSE(turned.contiguous());
  CHECK(at(turned, 1) == 4);
  const Tensor back = ops::strided(x, {2, 3}, {-1, -2}, {3, 2});
  CHECK(at(back, 0) == 11);
  CHECK(at(back, 1) == 9);
  CHECK(at(back, 5) == 1);
  const uint32_t version = x.version();
  ops::add_(back, ops::number(100));
  CHECK(x.version() == version + 1);
  CHECK(at(x, 11) == 111);
  CHECK(at(x, 0) == 0);
  CHECK(throws(ErrorKind::Shape, [&] { ops::reshape(x, {5}); }));
  CHECK(throws(ErrorKind::Index, [&] { ops::index_select(x, 0, full_int({1}, 3, DType::Int64)); }));
  CHECK(at(ops::Diagonal::forward(x, 1, 0, 1), 2) == 111);
  for (const DType t : {DType::Int8, DType::Int16, DType::Float16, DType::BFloat16, DType::Float64})
    CHECK(at(cast(ramp({2, 5}, t), DType::Float32), 7) == 7);
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {  // every float16 survives the way through float32
    const Float16 h = {static_cast<uint16_t>(bits)};
    const float f = to_float(h);
    if (f == f && to_float16(f).bits != h.bits) FAIL_CHECK("float16 with the bits " << bits);
  }
}

TEST_CASE("the tape gives gradients, refuses stale values, and leaves no tensor behind") {
  const int64_t live = live_tensors();
  {
    const Tensor x = ramp({4, 5}, DType::Float64);
    set_requires_grad(x, true);
    const Tensor y = ops::sum(ops::mul(ops::softmax(ops::matmul(x, ops::transpose(x, 0, 1)), 1), ops::number(2)), {}, false);
    backward(y, Tensor(), {});
    REQUIRE(x->grad != nullptr);
    CHECK(x->grad->numel == 20);
    CHECK(throws(ErrorKind::Autograd, [&] { backward(y, Tensor(), {}); }));
    const Tensor z = ops::square(x);
    {
      const GradMode off(false);
      ops::add_(ops::detach(x), ops::number(1));
    }
    CHECK(throws(ErrorKind::Autograd, [&] { backward(ops::sum(z, {}, false), Tensor(), {}); }));
    Tensor deep = ops::detach(x);
    set_requires_grad(deep, true);
    const Tensor leaf = deep;
    for (int i = 0; i < 20'000; ++i) deep = ops::add(deep, ops::number(1));  // let go of without recursion
    const auto grads = gradients(ops::sum(deep, {}, false), Tensor(), {leaf}, {});
    CHECK(at(grads[0], 0) == 1);
    const Tensor q = ramp({1, 70, 2, 4});
    set_requires_grad(q, true);
    backward(ops::sum(ops::Attention::forward(q, q, q, true, std::nullopt), {}, false), Tensor(), {});
    CHECK(q->grad != nullptr);
  }
  CHECK(live_tensors() == live);
}

TEST_CASE("the pool serves several callers at once") {
  set_num_threads(4);
  std::vector<std::thread> callers;
  for (int c = 0; c < 3; ++c)
    callers.emplace_back([] {
      for (int round = 0; round < 20; ++round) {
        const Tensor a = full({300, 200}, 1, DType::Float32), b = full({200, 100}, 2, DType::Float32);
        const Tensor product = ops::matmul(a, b);
        CHECK(at(product, 0) == 400);
        CHECK(at(product, product.numel() - 1) == 400);
        CHECK(at(ops::sum(full({200'000}, 1, DType::Float32), {}, false), 0) == 200'000);
      }
    });
  for (std::thread& t : callers) t.join();
  set_num_threads(1);
}

// Ranks as threads of this process: they share nothing but what the transports share.
void test_collectives(const char* transport, int size, int port) {
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < size; ++rank)
    ranks.emplace_back([=] {
      auto world = std::make_shared<parallel::World>(rank, size, "127.0.0.1:" + std::to_string(port), 60.0);
      std::vector<int> all;
      for (int r = 0; r < size; ++r) all.push_back(r);
      const auto group = parallel::Group::create(world, all, transport);
      for (const int64_t n : {int64_t{1}, int64_t{1000}, int64_t{200'000}}) {
        const Tensor x = full({n}, rank + 1, DType::Float32);
        auto work = group->collectives.submit([&] { group->all_reduce(x, parallel::Reduction::Sum); });
        work->wait();
        CHECK(at(x, n - 1) == size * (size + 1) / 2);
        const Tensor out = empty({size * n}, DType::Float32);
        group->collectives.run([&] { group->all_gather(full({n}, rank, DType::Float32), out); });
        for (int r = 0; r < size; ++r) CHECK(at(out, r * n) == r);
      }
      const Tensor mine = full({100'000}, rank, DType::Float64), got = empty({100'000}, DType::Float64);
      auto sent = group->sends.submit([&] { group->send(mine, (rank + 1) % size); });
      auto received = group->receives.submit([&] { group->receive(got, (rank + size - 1) % size); });
      sent->wait();
      received->wait();
      CHECK(at(got, 5) == (rank + size - 1) % size);
      group->barrier();
      const bool refused = throws(ErrorKind::Communication, [&] {
        group->all_reduce(full({rank == 0 ? 3 : 4}, 1, DType::Float32), parallel::Reduction::Sum);
      });
      CHECK(refused);
      CHECK(throws(ErrorKind::Communication, [&] { group->barrier(); }));  // the group is of no more use
    });
  for (std::thread& t : ranks) t.join();
}

int first_port() {
  const char* given = std::getenv("MAINSPRING_TEST_PORT");
  return given == nullptr ? 29'777 : std::atoi(given);
}

TEST_CASE("collectives through shared memory") { test_collectives("shared_memory", 3, first_port()); }
TEST_CASE("collectives through sockets") { test_collectives("tcp", 3, first_port() + 1); }

TEST_CASE("mappings, the split loss and gradient buckets among ranks") {
  const int64_t live = live_tensors();
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < 2; ++rank)
    ranks.emplace_back([=] {
      auto world = std::make_shared<parallel::World>(rank, 2, "127.0.0.1:" + std::to_string(first_port() + 2), 60.0);
      const auto group = parallel::Group::create(world, {0, 1}, "shared_memory");
      const Tensor x = ramp({2, 4}, DType::Float64);
      set_requires_grad(x, true);
      const Tensor part = parallel::Scatter::forward(x, group, true);
      CHECK(at(part, 0) == 2 * rank);
      const Tensor whole = parallel::Gather::forward(ops::square(part), group, true, false);
      CHECK(at(whole, 7) == 49);
      backward(ops::sum(whole, {}, false), Tensor(), {});
      CHECK(at(Tensor::borrow(x->grad), 3) == 6);

      const Tensor logits = full({3, 4}, 1, DType::Float64), targets = full_int({3}, 5, DType::Int64);
      set_requires_grad(logits, true);
      const Tensor losses = parallel::VocabParallelCrossEntropy::forward(logits, targets, group, 0.1);
      CHECK(at(losses, 2) == doctest::Approx(std::log(8.0)));
      backward(ops::sum(losses, {}, false), Tensor(), {});

      const Tensor a = ramp({5}), b = ramp({3});
      for (const Tensor& p : {a, b}) set_requires_grad(p, true);
      parallel::GradientBuckets buckets({a, b}, group, 3);
      CHECK(buckets.size() == 2);
      for (int round = 0; round < 2; ++round) {
        backward(ops::sum(ops::mul(a, ops::number(rank + 1)), {}, false), Tensor(), {});  // b has no gradient
        buckets.wait();
        buckets.store_gradients();
        CHECK(at(Tensor::borrow(a->grad), 4) == 1.5);
        CHECK(at(Tensor::borrow(b->grad), 0) == 0);
      }
      group->barrier();
    });
  for (std::thread& t : ranks) t.join();
  CHECK(live_tensors() == live);
}

TEST_CASE("sample and blending indices") {
  const Tensor sizes = full_int({3}, 4, DType::Int64), order = full_int({3}, 1, DType::Int64);
  const Tensor samples = parallel::build_sample_idx(sizes, order, {5, 1, 12, true, true});
  CHECK(samples.size(0) == 3);
  CHECK(at(samples, 2) == 1);  // token 5 is the second of the second document
  CHECK(at(samples, 3) == 1);
  const parallel::Blending mixed = parallel::build_blending_indices({0.75, 0.25}, 8);
  CHECK(at(ops::sum(mixed.dataset, {}, false), 0) == 2);
  CHECK(throws(ErrorKind::Value, [] { parallel::build_blending_indices({0, 0}, 8); }));
}

}  // namespace
