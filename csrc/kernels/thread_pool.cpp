// A fork-join pool whose workers spin briefly for the next call (a decode step makes hundreds, a few
// microseconds apart) and then sleep, so that an idle process burns nothing.
#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

namespace mainspring {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);

thread_local bool in_task = false;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until ready() or the time is over; says whether it is ready.
template <class Ready>
bool spin_until(Ready ready) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

class Pool {
 public:
  explicit Pool(int num_threads) {
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { work(); });
  }

  ~Pool() {
    stop_ = true;
    wake_workers();
    for (auto& worker : workers_) worker.join();
  }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  void run(int64_t num_tasks, void (*task)(void*, int64_t), void* context) {
    // No task of the last call is running (done_ said so) and none can be claimed (its count is 0):
    // these fields are ours until the ticket is published.
    task_ = task;
    context_ = context;
    total_ = num_tasks;
    done_.store(0, std::memory_order_relaxed);
    ticket_.store((++call_ << 32) | static_cast<uint64_t>(num_tasks), std::memory_order_release);
    wake_workers();
    take_tasks();
    const int64_t total = num_tasks;
    if (spin_until([&] { return done_.load(std::memory_order_acquire) == total; })) return;
    for (int64_t done; (done = done_.load(std::memory_order_acquire)) != total;) done_.wait(done);
  }

 private:
  void wake_workers() {
    signal_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) signal_.notify_all();
  }

  // The ticket holds the call's number and how many tasks are still unclaimed. A worker that comes late
  // finds 0 left, or claims a task of the present call: either way it never sees fields of a dead call,
  // because run() cannot return while a claimed task is unfinished.
  void take_tasks() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while ((ticket & 0xffffffffu) != 0) {
      if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) continue;
      const int64_t total = total_;
      in_task = true;
      task_(context_, total - static_cast<int64_t>(ticket & 0xffffffffu));
      in_task = false;
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == total) done_.notify_one();
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  void work() {
    int seen = 0;
    while (!stop_) {
      auto signalled = [&] { return signal_.load(std::memory_order_seq_cst) != seen; };
      if (!spin_until(signalled)) {
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        signal_.wait(seen, std::memory_order_seq_cst);
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      }
      seen = signal_.load(std::memory_order_seq_cst);
      take_tasks();
    }
  }

  void (*task_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t total_ = 0;
  uint64_t call_ = 0;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int> signal_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

int usable_cpus() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count > 0 ? static_cast<int>(count) : 1;
}

// The pool is made at first use. A forked child has none of its threads, so the child forgets it (the
// parent's memory is left as it is: its locks may be held) and makes its own.
struct State {
  std::mutex lock;
  Pool* pool = nullptr;
  std::atomic<int> count{usable_cpus()};
};

State*& state() {
  static State* current = [] {
    pthread_atfork(nullptr, nullptr, [] {
      const int count = state()->count;
      in_task = false;
      state() = new State;
      state()->count = count;
    });
    return new State;
  }();
  return current;
}

}  // namespace

int num_threads() { return state()->count.load(std::memory_order_relaxed); }

void set_num_threads(int count) {
  State& s = *state();
  std::lock_guard guard(s.lock);
  s.count = count < 1 ? 1 : count;
  if (s.pool != nullptr && s.pool->size() != s.count) {
    delete s.pool;
    s.pool = nullptr;
  }
}

void run_tasks(int64_t num_tasks, void (*task)(void*, int64_t), void* context) {
  if (num_tasks <= 0) return;
  State& s = *state();
  if (num_tasks > 1 && !in_task && num_threads() > 1) {
    std::unique_lock guard(s.lock, std::try_to_lock);
    if (guard.owns_lock()) {
      if (s.pool == nullptr) s.pool = new Pool(s.count);
      return s.pool->run(num_tasks, task, context);
    }
  }
  for (int64_t i = 0; i < num_tasks; ++i) task(context, i);
}

void* thread_scratch(size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  if (bytes > buffer.size) {
    std::free(buffer.data);
    buffer.size = 0;
    const size_t size = (bytes + 63) / 64 * 64;
    buffer.data = std::aligned_alloc(64, size);
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.size = size;
  }
  return buffer.data;
}

}  // namespace mainspring
