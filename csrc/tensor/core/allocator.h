// Memory of tensors, storages and tape nodes: freed blocks are kept by size and handed out again.
//
// Blocks up to 1 KB are kept for each thread and cost a few nanoseconds; larger ones are shared under a lock.
// Every block is 64-byte aligned. A block may be freed on another thread than the one that took it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mainspring::tensor {

void* allocate(size_t bytes);
void deallocate(void* block, size_t bytes);  // `bytes` as given to allocate()

struct MemoryStats {
  int64_t used_bytes;    // handed out, in rounded block sizes (large blocks only)
  int64_t cached_bytes;  // kept for reuse (large blocks only)
  int64_t peak_bytes;    // the most of used_bytes so far
};
MemoryStats memory_stats();
void empty_cache();  // gives the shared blocks, and this thread's own, back to the system

// Base of reference-counted objects made by the thousand.
struct Pooled {
  static void* operator new(size_t bytes) { return allocate(bytes); }
  static void operator delete(void* p, size_t bytes) { deallocate(p, bytes); }
};

}  // namespace mainspring::tensor
