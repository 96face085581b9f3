#include "core/allocator.h"

#include <bit>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace mainspring::tensor {
namespace {

constexpr size_t kAlign = 64;
constexpr size_t kSmallLimit = 1024;
constexpr int kSmallClasses = kSmallLimit / kAlign;
constexpr int kKeepPerClass = 512;                    // small blocks that a thread keeps of each size
constexpr int64_t kKeepBytes = int64_t{1} << 30;      // large blocks that are kept in all
constexpr int kLargeClasses = 4 * 48;

void* system_allocate(size_t bytes) {
  void* p = std::aligned_alloc(kAlign, bytes);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

struct FreeBlock {
  FreeBlock* next;
};

// Plain data, so that blocks freed while the thread (or the process) is going down still find it.
struct ThreadCache {
  FreeBlock* head[kSmallClasses];
  int count[kSmallClasses];
  bool watched;  // by a CloseAtExit
  bool closed;
};
thread_local ThreadCache cache;

void drain(ThreadCache& c) {
  for (int i = 0; i < kSmallClasses; ++i) {
    for (FreeBlock* block = c.head[i]; block != nullptr;) {
      FreeBlock* next = block->next;
      std::free(block);
      block = next;
    }
    c.head[i] = nullptr;
    c.count[i] = 0;
  }
}

struct CloseAtExit {
  ~CloseAtExit() {
    cache.closed = true;
    drain(cache);
  }
};

// A thread that only frees what others took has a cache to give back too.
__attribute__((noinline)) void watch_exit() {
  thread_local CloseAtExit close;
  (void)close;
  cache.watched = true;
}


// Four sizes for each doubling: at most a fifth of a block is unused.
size_t round_large(size_t bytes, int& index) {
  const int log = std::bit_width(bytes - 1) - 1;  // bytes in (2^log, 2^(log + 1)]
  const size_t step = size_t{1} << (log - 2);
  const size_t rounded = (bytes + step - 1) / step * step;
  index = 4 * log + static_cast<int>((rounded - (size_t{1} << log)) / step) - 1;
  return rounded;
}

struct Shared {
  std::mutex lock;
  std::vector<void*> blocks[kLargeClasses];
  MemoryStats stats = {0, 0, 0};
};

Shared& shared() {
  static Shared* s = new Shared;  // never destroyed: tensors may die after static objects
  return *s;
}

void* large_allocate(size_t bytes) {
  int index;
  const size_t size = round_large(bytes, index);
  Shared& s = shared();
  {
    std::lock_guard guard(s.lock);
    s.stats.used_bytes += static_cast<int64_t>(size);
    if (s.stats.used_bytes > s.stats.peak_bytes) s.stats.peak_bytes = s.stats.used_bytes;
    if (!s.blocks[index].empty()) {
      void* block = s.blocks[index].back();
      s.blocks[index].pop_back();
      s.stats.cached_bytes -= static_cast<int64_t>(size);
      return block;
    }
  }
  void* block = std::aligned_alloc(kAlign, size);
  if (block == nullptr) {
    empty_cache();
    block = std::aligned_alloc(kAlign, size);
  }
  if (block == nullptr) {
    std::lock_guard guard(s.lock);
    s.stats.used_bytes -= static_cast<int64_t>(size);
    throw std::bad_alloc();
  }
  return block;
}

void large_deallocate(void* block, size_t bytes) {
  int index;
  const size_t size = round_large(bytes, index);
  Shared& s = shared();
  {
    std::lock_guard guard(s.lock);
    s.stats.used_bytes -= static_cast<int64_t>(size);
    if (s.stats.cached_bytes + static_cast<int64_t>(size) <= kKeepBytes) {
      s.stats.cached_bytes += static_cast<int64_t>(size);
      s.blocks[index].push_back(block);
      return;
    }
  }
  std::free(block);
}

}  // namespace

void* allocate(size_t bytes) {
  if (bytes == 0) bytes = 1;
  if (bytes > kSmallLimit) return large_allocate(bytes);
  const size_t index = (bytes - 1) / kAlign;
  FreeBlock* block = cache.head[index];
  if (block == nullptr) return system_allocate((index + 1) * kAlign);
  cache.head[index] = block->next;
  --cache.count[index];
  return block;
}

void deallocate(void* p, size_t bytes) {
  if (bytes == 0) bytes = 1;
  if (bytes > kSmallLimit) return large_deallocate(p, bytes);
  const size_t index = (bytes - 1) / kAlign;
  if (cache.count[index] >= kKeepPerClass || cache.closed) return std::free(p);
  if (!cache.watched) watch_exit();
  auto* block = static_cast<FreeBlock*>(p);
  block->next = cache.head[index];
  cache.head[index] = block;
  ++cache.count[index];
}

MemoryStats memory_stats() {
  Shared& s = shared();
  std::lock_guard guard(s.lock);
  return s.stats;
}

void empty_cache() {
  drain(cache);
  Shared& s = shared();
  std::lock_guard guard(s.lock);
  for (auto& blocks : s.blocks) {
    for (void* block : blocks) std::free(block);
    blocks.clear();
  }
  s.stats.cached_bytes = 0;
}

}  // namespace mainspring::tensor
