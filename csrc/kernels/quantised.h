// The layout of quantised weights in memory.
//
// 16 rows of w (a group: one column block of the output) lie together, one block of 32 along k after the other:
//   d[16] in float16, m[16] in float16 where the type has a minimum, then the codes four along k at a time:
//   64 bytes hold for each of the 16 rows the codes of 4 neighbours; of 4-bit codes the low halves of the bytes are
//   those of k = 4 v .. 4 v + 3, the high halves those of 16 more.
// Missing rows of the last group are zero. The codes are unsigned; the offset of the signed types is taken off the sum.
#pragma once

#include <stdint.h>
#include <string.h>

namespace mainspring {

constexpr int kBlock = 32, kGroup = 16;

struct Q4_0 {  // w = d (code - 8)
  static constexpr int kBits = 4, kOffset = 8, kCodes = 32, kBytes = kCodes + 256, kFileBytes = 18;
  static constexpr bool kHasMinimum = false;
};
struct Q4_1 {  // w = d code + m
  static constexpr int kBits = 4, kOffset = 0, kCodes = 64, kBytes = kCodes + 256, kFileBytes = 20;
  static constexpr bool kHasMinimum = true;
};
struct Q8_0 {  // w = d (code - 128)
  static constexpr int kBits = 8, kOffset = 128, kCodes = 32, kBytes = kCodes + 512, kFileBytes = 34;
  static constexpr bool kHasMinimum = false;
};

namespace MAINSPRING_ISA {

inline __attribute__((always_inline)) float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7fffu;
  uint32_t bits = sign | (rest << 13) | 0x7f800000u;
  if (rest < 0x7c00u) {  // the exponent is moved by a product, which is right for subnormal numbers too
    const uint32_t small = rest << 13;
    float magnitude;
    memcpy(&magnitude, &small, sizeof magnitude);
    magnitude *= 0x1p112f;
    memcpy(&bits, &magnitude, sizeof bits);
    bits |= sign;
  }
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

}  // namespace MAINSPRING_ISA
}  // namespace mainspring
