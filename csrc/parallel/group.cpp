#include "group.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "core/blocking.h"
#include "ops/loops.h"

namespace mainspring::tensor::parallel {
namespace {

uint64_t fingerprint(int what, size_t bytes, DType t = DType::UInt8, int extra = 0) {
  uint64_t h = 0x9e3779b97f4a7c15ull * (bytes + 1);
  for (const int x : {what, static_cast<int>(t), extra}) h = (h ^ static_cast<uint64_t>(x + 1)) * 0x100000001b3ull;
  return h;
}

size_t bytes_of(const Tensor& t) { return static_cast<size_t>(t.numel()) * static_cast<size_t>(itemsize(t.dtype())); }

// Joins the ranks' values one after the other; halves are added in float32 and rounded once.
class Reducer {
 public:
  Reducer(Reduction op, DType t, int ranks) : op_(op), type_(t), ranks_(ranks) {
    const auto kernel = op == Reduction::Prod  ? BinaryKernel::Mul
                        : op == Reduction::Max ? BinaryKernel::Maximum
                        : op == Reduction::Min ? BinaryKernel::Minimum
                                               : BinaryKernel::Add;
    wide_ = is_half(t) ? DType::Float32 : t;
    join_ = kernels().binary[static_cast<int>(kernel)][static_cast<int>(wide_)];
    if (join_ == nullptr || (op == Reduction::Avg && !is_float(t)))
      fail(ErrorKind::DType, "all_reduce: this reduction is not defined for ", name(t));
  }
  void add(int rank, const char* from, int64_t count, char* out) {
    if (wide_ == type_) {
      if (rank == 0) std::memmove(out, from, static_cast<size_t>(count * itemsize(type_)));
      else join_(count, out, 1, from, 1, out);
      return;
    }
    sum_.resize(static_cast<size_t>(count));
    piece_.resize(static_cast<size_t>(count));
    float* to = rank == 0 ? sum_.data() : piece_.data();
    (type_ == DType::BFloat16 ? kernels().widen : kernels().widen_half)(count, from, to);
    if (rank > 0) join_(count, sum_.data(), 1, to, 1, sum_.data());
  }
  void finish(int64_t count, char* out) {
    char* at = wide_ == type_ ? out : reinterpret_cast<char*>(sum_.data());
    if (op_ == Reduction::Avg) {
      double scale[1] = {};
      write_double(scale, wide_, static_cast<double>(ranks_));
      kernels().binary[static_cast<int>(BinaryKernel::Div)][static_cast<int>(wide_)](count, at, 1, scale, 0, at);
    }
    if (wide_ != type_) (type_ == DType::BFloat16 ? kernels().narrow : kernels().narrow_half)(count, at, out);
  }

 private:
  Reduction op_;
  DType type_, wide_;
  int ranks_;
  BinaryFn join_;
  std::vector<float> sum_, piece_;
};

}  // namespace

// ---- Work and Queue ----

void Work::wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return done_; });
  if (error_) std::rethrow_exception(error_);
}
bool Work::done() const {
  const std::lock_guard lock(mutex_);
  return done_;
}
void Work::finish(std::exception_ptr error) {
  {
    const std::lock_guard lock(mutex_);
    done_ = true;
    error_ = std::move(error);
  }
  changed_.notify_all();
}

Queue::~Queue() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  if (!thread_.joinable()) return;
  void* state = blocking_hooks.leave != nullptr ? blocking_hooks.leave() : nullptr;  // a task's tensors may need the lock
  thread_.join();
  if (state != nullptr) blocking_hooks.enter(state);
}

void Queue::run(const std::function<void()>& task) {
  {
    std::unique_lock lock(mutex_);
    if (running_ || !tasks_.empty()) {
      lock.unlock();
      submit(task)->wait();
      return;
    }
    running_ = true;
  }
  struct Done {
    Queue* queue;
    ~Done() {
      {
        const std::lock_guard lock(queue->mutex_);
        queue->running_ = false;
      }
      queue->changed_.notify_all();
    }
  } done{this};
  task();
}

std::shared_ptr<Work> Queue::submit(std::function<void()> task) {
  auto work = std::make_shared<Work>();
  {
    const std::lock_guard lock(mutex_);
    tasks_.emplace_back(std::move(task), work);
    if (!thread_.joinable()) thread_ = std::thread([this] { loop(); });
  }
  changed_.notify_all();
  return work;
}

void Queue::loop() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return !running_ && (ending_ || !tasks_.empty()); });
    if (tasks_.empty()) return;
    auto [task, work] = std::move(tasks_.front());
    tasks_.pop_front();
    running_ = true;
    lock.unlock();
    std::exception_ptr error;
    try {
      task();
    } catch (...) {
      error = std::current_exception();
    }
    task = nullptr;  // its tensors go before the caller hears of the end
    work->finish(std::move(error));
    lock.lock();
    running_ = false;
    changed_.notify_all();
  }
}

// ---- Group ----

std::shared_ptr<Group> Group::create(const std::shared_ptr<World>& world, std::vector<int> ranks, const std::string& transport) {
  if (transport != "auto" && transport != "shared_memory" && transport != "tcp")
    fail(ErrorKind::Value, "the transport '", transport, "' is not one of auto, shared_memory, tcp");
  for (size_t i = 0; i < ranks.size(); ++i)
    if (ranks[i] < 0 || ranks[i] >= world->size() || (i > 0 && ranks[i] <= ranks[i - 1]))
      fail(ErrorKind::Value, "a group needs ascending ranks of the world, not rank ", ranks[i]);
  const uint32_t id = world->next_id();
  bool member = false;
  for (const int r : ranks) member |= r == world->rank();
  if (!member) return nullptr;
  std::shared_ptr<Group> group(new Group);
  group->world_ = world;
  group->mesh_ = world->connect(ranks, 2 * id);
  group->letters_ = world->connect(ranks, 2 * id + 1);
  const bool local = world->same_host(ranks);
  if (transport == "shared_memory" && !local) fail(ErrorKind::Value, "the ranks of this group lie on several hosts: they share no memory");
  if (local && transport != "tcp") {
    char name[64];
    std::snprintf(name, sizeof name, "/mainspring-%016llx-%u-%d", static_cast<unsigned long long>(world->token()), id, ranks[0]);
    group->transport_ = make_shared_memory(group->mesh_, name, world->timeout());
    group->kind_ = "shared_memory";
  } else {
    group->transport_ = make_tcp(group->mesh_, world->timeout());
    group->kind_ = "tcp";
  }
  return group;
}

void Group::check_open() const {
  if (broken_) fail(ErrorKind::Communication, "an earlier call of this group failed: make a new one");
}

template <class Body>
void Group::guarded(Body body) {
  check_open();
  try {
    body();
  } catch (...) {
    broken_ = true;  // the ranks may stand at different calls now
    throw;
  }
}

void Group::all_reduce(const Tensor& t, Reduction op) {
  if (size() == 1) return;
  const int64_t item = itemsize(t.dtype()), n = t.numel();
  const uint64_t print = fingerprint(1, bytes_of(t), t.dtype(), static_cast<int>(op));
  Reducer reducer(op, t.dtype(), size());
  char* data = t.data<char>();
  guarded([&] {
    const int64_t capacity = static_cast<int64_t>(transport_->capacity()) / item;
    if (n == 0) return transport_->share(print, nullptr, 0, std::vector<size_t>(static_cast<size_t>(size())), [](int, const char*) {});
    if (size() == 2 || n * item <= 16 * 1024) {  // everyone adds everything: one round
      for (int64_t i = 0; i < n; i += capacity) {
        const int64_t count = std::min(capacity, n - i);
        const std::vector<size_t> all(static_cast<size_t>(size()), static_cast<size_t>(count * item));
        // Over TCP the own piece is visited in place, and rank 0's value is written first: add from a copy.
        std::vector<char> own;
        if (kind_ == "tcp" && rank() > 0) own.assign(data + i * item, data + (i + count) * item);
        transport_->share(print, data + i * item, static_cast<size_t>(count * item), all, [&](int r, const char* from) {
          reducer.add(r, r == rank() && !own.empty() ? own.data() : from, count, data + i * item);
        });
        reducer.finish(count, data + i * item);
      }
      return;
    }
    // Every rank adds one part of each chunk and hands it round.
    const int64_t ranks = size(), part = std::max<int64_t>(1, capacity / ranks);
    std::vector<char> pieces(static_cast<size_t>(ranks * part * item)), sum(static_cast<size_t>(part * item));
    for (int64_t i = 0; i < n; i += ranks * part) {
      const int64_t left = std::min(ranks * part, n - i), each = (left + ranks - 1) / ranks;
      std::memcpy(pieces.data(), data + i * item, static_cast<size_t>(left * item));
      std::memset(pieces.data() + left * item, 0, static_cast<size_t>((ranks * each - left) * item));
      transport_->scatter(print, pieces.data(), static_cast<size_t>(each * item),
                          [&](int r, const char* from) { reducer.add(r, from, each, sum.data()); });
      reducer.finish(each, sum.data());
      const std::vector<size_t> all(static_cast<size_t>(ranks), static_cast<size_t>(each * item));
      transport_->share(print, sum.data(), static_cast<size_t>(each * item), all, [&](int r, const char* from) {
        const int64_t begin = r * each, end = std::min(left, begin + each);
        if (begin < end) std::memcpy(data + (i + begin) * item, from, static_cast<size_t>((end - begin) * item));
      });
    }
  });
}

void Group::all_gather(const Tensor& in, const Tensor& out) {
  const size_t n = bytes_of(in), capacity = transport_->capacity();
  const uint64_t print = fingerprint(2, n, in.dtype());
  guarded([&] {
    for (size_t i = 0; i < n || i == 0; i += capacity) {
      const size_t count = std::min(capacity, n - i);
      const std::vector<size_t> all(static_cast<size_t>(size()), count);
      transport_->share(print, in.data<char>() + i, count, all, [&](int r, const char* from) {
        std::memcpy(out.data<char>() + static_cast<size_t>(r) * n + i, from, count);
      });
    }
  });
}

void Group::reduce_scatter(const Tensor& in, const Tensor& out, Reduction op) {
  const int64_t item = itemsize(in.dtype()), n = out.numel(), ranks = size();
  const uint64_t print = fingerprint(3, bytes_of(in), in.dtype(), static_cast<int>(op));
  Reducer reducer(op, in.dtype(), size());
  guarded([&] {
    const int64_t part = std::max<int64_t>(1, static_cast<int64_t>(transport_->capacity()) / item / ranks);
    std::vector<char> pieces(static_cast<size_t>(ranks * std::min(part, std::max<int64_t>(n, 1)) * item));
    for (int64_t i = 0; i < n || i == 0; i += part) {
      const int64_t count = std::min(part, n - i);
      for (int64_t r = 0; r < ranks; ++r)
        std::memcpy(pieces.data() + r * count * item, in.data<char>() + (r * n + i) * item, static_cast<size_t>(count * item));
      char* to = out.data<char>() + i * item;
      transport_->scatter(print, pieces.data(), static_cast<size_t>(count * item),
                          [&](int r, const char* from) { reducer.add(r, from, count, to); });
      reducer.finish(count, to);
    }
  });
}

void Group::all_to_all(const Tensor& in, const Tensor& out) {
  const size_t ranks = static_cast<size_t>(size()), n = bytes_of(in) / ranks;
  const uint64_t print = fingerprint(4, bytes_of(in), in.dtype());
  guarded([&] {
    const size_t part = transport_->capacity() / ranks;
    std::vector<char> pieces(ranks * std::min(part, n));
    for (size_t i = 0; i < n || i == 0; i += part) {
      const size_t count = std::min(part, n - i);
      for (size_t r = 0; r < ranks; ++r) std::memcpy(pieces.data() + r * count, in.data<char>() + r * n + i, count);
      transport_->scatter(print, pieces.data(), count, [&](int r, const char* from) {
        std::memcpy(out.data<char>() + static_cast<size_t>(r) * n + i, from, count);
      });
    }
  });
}

void Group::broadcast(const Tensor& t, int root) {
  if (root < 0 || root >= size()) fail(ErrorKind::Value, "broadcast: rank ", root, " is not in a group of ", size());
  const size_t n = bytes_of(t), capacity = transport_->capacity();
  const uint64_t print = fingerprint(5, n, t.dtype(), root);
  guarded([&] {
    for (size_t i = 0; i < n || i == 0; i += capacity) {
      const size_t count = std::min(capacity, n - i);
      std::vector<size_t> all(static_cast<size_t>(size()));
      all[static_cast<size_t>(root)] = count;
      transport_->share(print, t.data<char>() + i, rank() == root ? count : 0, all, [&](int r, const char* from) {
        if (r == root && rank() != root) std::memcpy(t.data<char>() + i, from, count);
      });
    }
  });
}

void Group::barrier() {
  guarded([&] {
    transport_->share(fingerprint(6, 0), nullptr, 0, std::vector<size_t>(static_cast<size_t>(size())), [](int, const char*) {});
  });
}

void Group::send(const Tensor& t, int to) {
  if (to < 0 || to >= size() || to == rank()) fail(ErrorKind::Value, "send: rank ", to, " is not another one of a group of ", size());
  guarded([&] {
    const Deadline deadline(world_->timeout());
    const uint64_t print = fingerprint(7, bytes_of(t), t.dtype());
    letters_.send(to, &print, sizeof print, deadline);
    letters_.send(to, t.data(), bytes_of(t), deadline);
  });
}

void Group::receive(const Tensor& t, int from) {
  if (from < 0 || from >= size() || from == rank()) fail(ErrorKind::Value, "recv: rank ", from, " is not another one of a group of ", size());
  guarded([&] {
    const Deadline deadline(world_->timeout());
    uint64_t print = 0;
    letters_.receive(from, &print, sizeof print, deadline);
    if (print != fingerprint(7, bytes_of(t), t.dtype()))
      fail(ErrorKind::Communication, "recv: rank ", ranks()[static_cast<size_t>(from)], " sent another size or dtype than ", t);
    letters_.receive(from, t.data(), bytes_of(t), deadline);
  });
}

}  // namespace mainspring::tensor::parallel
