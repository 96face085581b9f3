#include "nn/conv.h"

#include "thread_pool.h"

namespace mainspring::tensor {
namespace {

// Calls body(row of the columns, its input row or null, first x, pieces) for each (channel, tap, output row).
template <class T, bool gather>
void move_columns(const ConvShape& s, T* image, T* columns) {
  const int64_t area = s.kernel[0] * s.kernel[1], places = s.out[0] * s.out[1];
  parallel_ranges(s.batch * s.channels, 16 * 1024 / (area * places + 1), [&](int64_t begin, int64_t end) {
    for (int64_t nc = begin; nc < end; ++nc) {
      T* plane = image + nc * s.in[0] * s.in[1];
      for (int64_t tap = 0; tap < area; ++tap) {
        T* column = columns + (nc * area + tap) * places;
        for (int64_t oy = 0; oy < s.out[0]; ++oy) {
          const int64_t y = oy * s.stride[0] - s.padding[0] + tap / s.kernel[1] * s.dilation[0];
          const bool inside = y >= 0 && y < s.in[0];
          for (int64_t ox = 0; ox < s.out[1]; ++ox) {
            const int64_t x = ox * s.stride[1] - s.padding[1] + tap % s.kernel[1] * s.dilation[1];
            T& place = column[oy * s.out[1] + ox];
            if constexpr (gather) place = inside && x >= 0 && x < s.in[1] ? plane[y * s.in[1] + x] : T{};
            else if (inside && x >= 0 && x < s.in[1]) plane[y * s.in[1] + x] += place;
          }
        }
      }
    }
  });
}

}  // namespace

Tensor to_columns(const ConvShape& s, const Tensor& x) {
  Tensor out = empty({s.batch, s.channels * s.kernel[0] * s.kernel[1], s.out[0] * s.out[1]}, x.dtype());
  BlockingRegion region(out.numel());
  switch (itemsize(x.dtype())) {
    case 2: move_columns<uint16_t, true>(s, x.data<uint16_t>(), out.data<uint16_t>()); break;
    case 4: move_columns<uint32_t, true>(s, x.data<uint32_t>(), out.data<uint32_t>()); break;
    default: move_columns<uint64_t, true>(s, x.data<uint64_t>(), out.data<uint64_t>());
  }
  return out;
}

Tensor from_columns(const ConvShape& s, const Tensor& columns) {
  const DType acc = columns.dtype() == DType::Float64 ? DType::Float64 : DType::Float32;
  const Tensor from = contiguous(cast(columns, acc));
  Tensor out = zeros({s.batch, s.channels, s.in[0], s.in[1]}, acc);
  {
    BlockingRegion region(from.numel());
    if (acc == DType::Float64) move_columns<double, false>(s, out.data<double>(), from.data<double>());
    else move_columns<float, false>(s, out.data<float>(), from.data<float>());
  }
  return cast(out, columns.dtype());
}

}  // namespace mainspring::tensor
