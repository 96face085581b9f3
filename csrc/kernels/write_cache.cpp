// New keys and values into their slots of the paged cache: a copy, the same for every instruction set.
#include <cstring>

#include "kernels.h"
#include "thread_pool.h"

void ms_write_cache(const ms_write_cache_args* args) {
  const ms_write_cache_args& a = *args;
  const int64_t size = a.dtype == MS_FLOAT32 ? 4 : 2;
  const int64_t row = a.row * size;
  const char* k = static_cast<const char*>(a.k);
  const char* v = static_cast<const char*>(a.v);
  char* k_cache = static_cast<char*>(a.k_cache);
  char* v_cache = static_cast<char*>(a.v_cache);
  constexpr int64_t kGrain = 64 * 1024;  // bytes that make a task worth its hand-over
  mainspring::parallel_ranges(a.t, kGrain / (row > 0 ? row : 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (a.slots[t] < 0) continue;
      std::memcpy(k_cache + a.slots[t] * row, k + t * a.k_stride * size, static_cast<size_t>(row));
      std::memcpy(v_cache + a.slots[t] * row, v + t * a.v_stride * size, static_cast<size_t>(row));
    }
  });
}
