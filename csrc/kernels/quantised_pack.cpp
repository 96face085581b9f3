// Weights from the layout of GGML's files to that of quantised.h: the same bits, other places.
#define MAINSPRING_ISA plain
#include "quantised.h"

#include "kernels.h"
#include "thread_pool.h"

namespace mainspring {
namespace {

// A block of the file: d, perhaps m, then 16 bytes with the codes of i in the low and of i + 16 in the high half, or 32
// signed codes.
template <class Type>
void pack_row(const uint8_t* file, int64_t blocks, uint8_t* group, int row) {
  constexpr int kScales = Type::kHasMinimum ? 4 : 2;
  for (int64_t b = 0; b < blocks; ++b, file += Type::kFileBytes, group += Type::kBytes) {
    memcpy(group + 2 * row, file, 2);
    if (Type::kHasMinimum) memcpy(group + 32 + 2 * row, file + 2, 2);
    const uint8_t* from = file + kScales;
    uint8_t* to = group + Type::kCodes + 4 * row;
    if (Type::kBits == 4) {
      for (int v = 0; v < 4; ++v) memcpy(to + 64 * v, from + 4 * v, 4);
    } else {
      for (int i = 0; i < kBlock; ++i) to[64 * (i / 4) + i % 4] = static_cast<uint8_t>(from[i] ^ 0x80);
    }
  }
}

template <class Type>
void pack(const ms_quantised_pack_args& a) {
  const int64_t blocks = a.k / kBlock, groups = (a.n + kGroup - 1) / kGroup, bytes = blocks * Type::kBytes;
  parallel_ranges(groups, 8, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      uint8_t* group = static_cast<uint8_t*>(a.packed) + g * bytes;
      memset(group, 0, static_cast<size_t>(bytes));
      for (int row = 0; row < kGroup && g * kGroup + row < a.n; ++row)
        pack_row<Type>(static_cast<const uint8_t*>(a.rows) + (g * kGroup + row) * a.row_stride, blocks, group, row);
    }
  });
}

}  // namespace
}  // namespace mainspring

using namespace mainspring;

void ms_quantised_pack(const ms_quantised_pack_args* args) {
  switch (args->type) {
    case MS_Q4_0: return pack<Q4_0>(*args);
    case MS_Q4_1: return pack<Q4_1>(*args);
    case MS_Q8_0: return pack<Q8_0>(*args);
  }
}

int64_t ms_quantised_bytes(ms_quantised_type type, int64_t n, int64_t k) {
  const int64_t bytes = type == MS_Q4_0 ? Q4_0::kBytes : type == MS_Q4_1 ? Q4_1::kBytes : Q8_0::kBytes;
  return (n + kGroup - 1) / kGroup * (k / kBlock) * bytes;
}
