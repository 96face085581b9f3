#include "parallel/indices.h"

#include <cmath>

#include "ops/loops.h"

namespace mainspring::tensor::parallel {
namespace {

using Wide = __int128;

}  // namespace

Tensor build_sample_idx(const Tensor& given_sizes, const Tensor& given_order, const SampleOptions& o) {
  constexpr auto op = "build_sample_idx";
  for (const Tensor* t : {&given_sizes, &given_order})
    if (t->dtype() != DType::Int64 || t->ndim() != 1) fail(ErrorKind::Shape, op, ": needs int64 vectors, not ", *t);
  if (o.seq_length < 1 || o.num_epochs < 1 || o.tokens_per_epoch < 1)
    fail(ErrorKind::Value, op, ": seq_length ", o.seq_length, ", num_epochs ", o.num_epochs, " and tokens_per_epoch ",
         o.tokens_per_epoch, " must be positive");
  const Tensor sizes = contiguous(given_sizes), order = contiguous(given_order);
  const int64_t *size = sizes.data<int64_t>(), *document = order.data<int64_t>();
  const int64_t entries = order.numel(), extra = o.add_extra_token_to_sequence;
  Wide held = 0;
  for (int64_t i = 0; i < entries; ++i) {
    if (document[i] < 0 || document[i] >= sizes.numel())
      fail(ErrorKind::Index, op, ": document ", document[i], " at ", i, " does not exist; there are ", sizes.numel());
    if (size[document[i]] < 0) fail(ErrorKind::Value, op, ": document ", document[i], " has ", size[document[i]], " tokens");
    held += size[document[i]];
  }
  const Wide total = static_cast<Wide>(o.num_epochs) * o.tokens_per_epoch - extra;
  const Wide samples = o.drop_last_partial_sequence ? total / o.seq_length : (total + o.seq_length - 1) / o.seq_length;
  Wide last = samples * o.seq_length;
  if (!o.drop_last_partial_sequence && last > total) last = total;
  if (samples > 0 && last + extra > held)
    fail(ErrorKind::Value, op, ": ", static_cast<int64_t>(last + extra), " tokens are needed, the documents hold ",
         static_cast<int64_t>(held));
  const int64_t count = static_cast<int64_t>(samples);
  Tensor out = empty({count + 1, 2}, DType::Int64);
  int64_t* to = out.data<int64_t>();
  int64_t place = 0, before = 0;  // tokens in the documents before `place`
  for (int64_t i = 0; i <= count; ++i) {
    const int64_t start = i == count ? static_cast<int64_t>(last) : i * o.seq_length;
    // A start at a document's very end belongs to the next one, unless it is the shared extra token's place.
    while (place + 1 < entries && before + size[document[place]] < start + extra) before += size[document[place++]];
    to[2 * i] = place;
    to[2 * i + 1] = start - before;
  }
  return out;
}

Blending build_blending_indices(const std::vector<double>& weights, int64_t size) {
  constexpr auto op = "build_blending_indices";
  double sum = 0, least = INFINITY, most = 0;
  for (const double w : weights) {
    if (!(w >= 0) || std::isinf(w)) fail(ErrorKind::Value, op, ": weight ", w, " is not a finite number that is at least 0");
    sum += w;
    if (w > 0) least = std::min(least, w), most = std::max(most, w);
  }
  if (sum == 0) fail(ErrorKind::Value, op, ": ", static_cast<long>(weights.size()), " weights without a positive one cannot be shared out");
  if (size < 0) fail(ErrorKind::Value, op, ": the size is ", size, "; it must be at least 0");
  // Every weight is an integer times 2^(exponent of the least - 53): so far apart that the products below fit 127 bits.
  const int low = std::ilogb(least) - 52;
  const int bits = std::ilogb(most) - low + 2 + std::ilogb(static_cast<double>(weights.size()) + 1) + std::ilogb(static_cast<double>(size) + 2) + 2;
  if (bits > 126 || weights.size() >= (size_t{1} << 31))
    fail(ErrorKind::Value, op, ": weights from ", least, " to ", most, " are too far apart for exact shares of ", size, " samples");
  const size_t sets = weights.size();
  std::vector<Wide> part(sets), lag(sets);
  std::vector<int64_t> taken(sets, 0);
  Wide total = 0;
  for (size_t d = 0; d < sets; ++d) {
    const double scaled = std::ldexp(weights[d], -low);  // an integer below 2^(127 - ...)
    part[d] = static_cast<Wide>(scaled);
    total += part[d];
  }
  Blending out = {empty({size}, DType::Int32), empty({size}, DType::Int64)};
  // lag = max(i, 1) weight - taken, times the total of all weights.
  for (int64_t i = 0; i < size; ++i) {
    size_t best = 0;
    for (size_t d = 0; d < sets; ++d) {
      lag[d] = static_cast<Wide>(i > 1 ? i : 1) * part[d] - static_cast<Wide>(taken[d]) * total;
      if (lag[d] > lag[best]) best = d;
    }
    out.dataset.data<int32_t>()[i] = static_cast<int32_t>(best);
    out.sample.data<int64_t>()[i] = taken[best]++;
  }
  return out;
}

}  // namespace mainspring::tensor::parallel
