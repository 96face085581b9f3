#include "core/random.h"

#include <cmath>

#include "core/blocking.h"

namespace mainspring::tensor {

std::array<uint32_t, 4> philox(uint64_t seed, uint64_t block) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 0};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[0] = n0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = n2;
    c[3] = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c[0], c[1], c[2], c[3]};
}

namespace {

double unit24(uint32_t x) { return (x >> 8) * 0x1p-24; }
double unit53(uint32_t a, uint32_t b) { return ((uint64_t{a} << 32 | b) >> 11) * 0x1p-53; }

// Calls body(index, numbers) with `per_block` elements for each block of the stream.
template <int per_block, class Body>
void draw(Generator& g, int64_t n, Body body) {
  BlockingRegion region(8 * n);
  int64_t i = 0;
  for (; i < n; i += per_block) body(i, philox(g.seed, g.position++));
}

}  // namespace

void Generator::uniform(const Tensor& out, double low, double high) {
  const int64_t n = out.numel();
  const DType t = out.dtype();
  char* data = out.data<char>();
  const int item = itemsize(t);
  auto put = [&](int64_t i, double u) {
    if (i < n) write_double(data + i * item, t, low + (high - low) * u);
  };
  if (t == DType::Float64) {
    draw<2>(*this, n, [&](int64_t i, auto r) {
      put(i, unit53(r[0], r[1]));
      put(i + 1, unit53(r[2], r[3]));
    });
  } else {
    draw<4>(*this, n, [&](int64_t i, auto r) {
      for (int j = 0; j < 4; ++j) put(i + j, unit24(r[j]));
    });
  }
}

void Generator::normal(const Tensor& out, double mean, double std) {
  const int64_t n = out.numel();
  const DType t = out.dtype();
  char* data = out.data<char>();
  const int item = itemsize(t);
  draw<2>(*this, n, [&](int64_t i, auto r) {
    const double u = 1.0 - unit53(r[0], r[1]), angle = 6.283185307179586 * unit53(r[2], r[3]);
    const double radius = std * std::sqrt(-2.0 * std::log(u));
    write_double(data + i * item, t, mean + radius * std::cos(angle));
    if (i + 1 < n) write_double(data + (i + 1) * item, t, mean + radius * std::sin(angle));
  });
}

void Generator::integers(const Tensor& out, int64_t low, int64_t high) {
  const uint64_t range = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);
  const int64_t n = out.numel();
  int64_t* data = out.data<int64_t>();
  draw<2>(*this, n, [&](int64_t i, auto r) {
    for (int j = 0; j < 2 && i + j < n; ++j) {
      const uint64_t x = uint64_t{r[2 * j]} << 32 | r[2 * j + 1];
      const auto scaled = static_cast<uint64_t>((static_cast<unsigned __int128>(x) * range) >> 64);
      data[i + j] = static_cast<int64_t>(static_cast<uint64_t>(low) + scaled);
    }
  });
}

void Generator::bernoulli(const Tensor& out, double p) {
  const int64_t n = out.numel();
  uint8_t* data = out.data<uint8_t>();
  draw<4>(*this, n, [&](int64_t i, auto r) {
    for (int j = 0; j < 4 && i + j < n; ++j) data[i + j] = unit24(r[j]) < p;
  });
}

}  // namespace mainspring::tensor
