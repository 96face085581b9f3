// The cosines and sines of rotary position embeddings, once per forward pass for all layers.
//
// The angle is formed in float32, as Hugging Face does; its sine and cosine are taken in double precision
// and rounded once, one scalar at a time, so that no vector length can change them.
#include <cmath>

#include "kernels.h"
#include "thread_pool.h"

void ms_rope_angles(const ms_rope_angles_args* args) {
  const ms_rope_angles_args& a = *args;
  constexpr int64_t kGrain = 1024;  // angles that make a task worth its hand-over
  mainspring::parallel_ranges(a.t, kGrain / (a.half > 0 ? a.half : 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = 0; i < a.half; ++i) {
        const float angle = static_cast<float>(a.positions[t]) * a.inv_freq[i];
        a.cos[t * a.half + i] = static_cast<float>(std::cos(static_cast<double>(angle))) * a.scale;
        a.sin[t * a.half + i] = static_cast<float>(std::sin(static_cast<double>(angle))) * a.scale;
      }
  });
}
