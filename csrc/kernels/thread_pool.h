// One fork-join thread pool for all kernels. Tasks are independent outputs, so which thread runs which
// task never changes a bit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mainspring {

int num_threads();
void set_num_threads(int count);

// Calls task(context, i) once for every i < num_tasks and returns when all are done. The calling thread
// takes part. Inside a task, or while another thread is using the pool, the tasks run on the caller alone.
void run_tasks(int64_t num_tasks, void (*task)(void* context, int64_t index), void* context);

template <class Body>
void parallel_for(int64_t num_tasks, const Body& body) {
  if (num_tasks == 1) return body(int64_t{0});
  auto call = [](void* context, int64_t index) { (*static_cast<const Body*>(context))(index); };
  run_tasks(num_tasks, call, const_cast<Body*>(&body));
}

// Calls body(begin, end) over pieces of [0, count), each of at least `grain`: use it for cheap rows.
template <class Body>
void parallel_ranges(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  int64_t pieces = count / (grain > 1 ? grain : 1);
  const int64_t most = 4 * num_threads();
  pieces = pieces < 1 ? 1 : pieces > most ? most : pieces;
  parallel_for(pieces, [&](int64_t i) { body(count * i / pieces, count * (i + 1) / pieces); });
}

// Memory of the calling thread, 64-byte aligned, kept for its next call: valid until that call.
void* thread_scratch(size_t bytes);

}  // namespace mainspring
