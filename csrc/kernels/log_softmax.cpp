// logsumexp of rows of logits and log-probabilities of chosen tokens: the one routine behind the engine's
// reported log-probabilities and the trainer's.
#include <math.h>

#include "exp.h"
#include "kernels.h"
#include "simd.h"
#include "thread_pool.h"

namespace mainspring::MAINSPRING_ISA {
namespace {

float row_max(const float* row, int64_t v) {
  vf most = all(-INFINITY);
  for_lanes(v, [&](int64_t i, int lanes) {
    const vf x = lanes == kLanes ? load(row + i) : select_range(load_n(row + i, lanes), 0, 0, lanes, all(-INFINITY));
    most = vmax(most, x);
  });
  return max_lanes(most);
}

// log of the sum of exp(row / t), formed relative to the maximum. Vector i goes to accumulator i % 4; the lanes are joined in double precision.
float log_sum_exp(const float* row, int64_t v, float temperature) {
  float most = row_max(row, v) / temperature;
  if (isinf(most)) most = 0;  // all -inf gives -inf, a +inf gives +inf, and a NaN still shows
  vf acc[4] = {zero(), zero(), zero(), zero()};
  int which = 0;
  for_lanes(v, [&](int64_t i, int lanes) {
    const vf x = temperature == 1.0f ? load_lanes(row + i, lanes) : div(load_lanes(row + i, lanes), all(temperature));
    vf e = exp(sub(x, all(most)));
    if (lanes != kLanes) e = select_range(e, 0, 0, lanes, zero());
    acc[which] = add(acc[which], e);
    which = (which + 1) & 3;
  });
  double total = 0;
  for (const vf& part : acc) {
    float lanes[kLanes];
    store(lanes, part);
    for (float lane : lanes) total += static_cast<double>(lane);
  }
  return static_cast<float>(static_cast<double>(most) + ::log(total));
}

}  // namespace

void log_softmax(const ms_log_softmax_args& a) {
  constexpr int64_t kGrain = 8 * 1024;  // logits that make a task worth its hand-over
  parallel_ranges(a.m, kGrain / max_of(1, a.v), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row = a.logits + r * a.stride;
      const float lse = log_sum_exp(row, a.v, a.temperature);
      if (a.lse != nullptr) a.lse[r] = lse;
      if (a.targets != nullptr) a.log_probs[r] = row[a.targets[r]] / a.temperature - lse;
    }
  });
}

}  // namespace mainspring::MAINSPRING_ISA
