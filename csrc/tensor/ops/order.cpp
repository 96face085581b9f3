// The loops of ops/order.h.
#include "ops/order.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "thread_pool.h"

namespace mainspring::tensor {
namespace {

template <class Value>
bool less(Value a, Value b) {
  return a < b || (b != b && a == a);
}

int64_t rows_of(const Tensor& x, int64_t n) { return n == 0 ? 0 : x.numel() / n; }

}  // namespace

void sort_rows(const Tensor& x, bool descending, bool stable, int64_t keep, const Tensor& values, const Tensor& indices) {
  const int64_t n = ops::line_length(x), rows = rows_of(x, n);
  (void)stable;  // equal elements keep their order in any case: the index decides
  with_type(x.dtype(), [&]<class T>() {
    parallel_ranges(rows, 4096 / (n > 0 ? n : 1), [&](int64_t begin, int64_t end) {
      std::vector<int64_t> order(static_cast<size_t>(n));
      for (int64_t r = begin; r < end; ++r) {
        const T* row = x.data<T>() + r * n;
        std::iota(order.begin(), order.end(), 0);
        auto before = [&](int64_t a, int64_t b) {
          const auto u = value_of(row[a]), v = value_of(row[b]);
          if (descending ? less(v, u) : less(u, v)) return true;
          return !(descending ? less(u, v) : less(v, u)) && a < b;
        };
        if (keep < n) std::partial_sort(order.begin(), order.begin() + keep, order.end(), before);
        else std::sort(order.begin(), order.end(), before);
        for (int64_t i = 0; i < keep; ++i) {
          values.data<T>()[r * keep + i] = row[order[static_cast<size_t>(i)]];
          indices.data<int64_t>()[r * keep + i] = order[static_cast<size_t>(i)];
        }
      }
    });
  });
}

void running_rows(Running kind, const Tensor& x, const Tensor& out, const Tensor* indices) {
  const int64_t n = ops::line_length(x), rows = rows_of(x, n);
  with_type(x.dtype(), [&]<class T>() {
    using Value = decltype(value_of(T{}));
    // Sums of floats are kept in double, so that a long line stays accurate.
    using Sum = std::conditional_t<std::is_floating_point_v<Value>, double, Value>;
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = x.data<T>() + r * n;
      T* to = out.data<T>() + r * n;
      Sum sum = kind == Running::Prod ? Sum{1} : Sum{0};
      double most = -INFINITY;
      Value best = value_of(from[0]);
      int64_t at = 0;
      for (int64_t i = 0; i < n; ++i) {
        const Value v = value_of(from[i]);
        switch (kind) {
          case Running::Sum:
            if constexpr (std::is_integral_v<Sum>) sum = static_cast<Sum>(static_cast<uint64_t>(sum) + static_cast<uint64_t>(v));
            else sum += static_cast<Sum>(v);
            to[i] = from_value<T>(sum);
            break;
          case Running::Prod:
            if constexpr (std::is_integral_v<Sum>) sum = static_cast<Sum>(static_cast<uint64_t>(sum) * static_cast<uint64_t>(v));
            else sum *= static_cast<Sum>(v);
            to[i] = from_value<T>(sum);
            break;
          case Running::LogSumExp: {  // log(sum of exp), kept as most + log(sum of exp(. - most))
            const double value = static_cast<double>(v);
            if (i == 0 || value > most) {
              sum = static_cast<Sum>(i == 0 || most == -INFINITY ? 1 : static_cast<double>(sum) * std::exp(most - value) + 1);
              most = value;
            } else if (value != -INFINITY || value != value) {
              sum += static_cast<Sum>(value == most ? 1 : std::exp(value - most));
            }
            to[i] = from_value<T>(most == -INFINITY ? most : most + std::log(static_cast<double>(sum)));
            break;
          }
          case Running::Max:
          case Running::Min:
            if (v != v || (best == best && (kind == Running::Max ? v >= best : v <= best))) best = v, at = i;
            to[i] = from_value<T>(best);
            indices->data<int64_t>()[r * n + i] = at;
            break;
        }
      }
    }
  });
}

void search_rows(const Tensor& sorted, const Tensor& values, bool right, const Tensor& out) {
  const int64_t n = sorted.size(sorted.ndim() - 1);
  const int64_t width = sorted.ndim() == 1 ? values.numel() : values.size(values.ndim() - 1);
  const int64_t rows = width == 0 ? 0 : values.numel() / width;
  with_type(sorted.dtype(), [&]<class T>() {
    for (int64_t r = 0; r < rows; ++r) {
      const T* line = sorted.data<T>() + (sorted.ndim() == 1 ? 0 : r * n);
      for (int64_t i = r * width; i < (r + 1) * width; ++i) {
        const auto v = value_of(values.data<T>()[i]);
        const T* at = right ? std::upper_bound(line, line + n, v, [](auto a, T b) { return less(a, value_of(b)); })
                            : std::lower_bound(line, line + n, v, [](T a, auto b) { return less(value_of(a), b); });
        out.data<int64_t>()[i] = at - line;
      }
    }
  });
}

Tensor nonzero_positions(const Tensor& x) {
  const Tensor hit = cast(x, DType::Bool);
  const uint8_t* p = hit.data<uint8_t>();
  std::vector<int64_t> found;
  for (int64_t i = 0; i < x.numel(); ++i)
    if (p[i]) found.push_back(i);
  const int64_t count = static_cast<int64_t>(found.size());
  Tensor out = empty({count, x.ndim()}, DType::Int64);
  for (int64_t i = 0; i < count; ++i) {
    int64_t rest = found[static_cast<size_t>(i)];
    for (int d = x.ndim() - 1; d >= 0; --d) {
      out.data<int64_t>()[i * x.ndim() + d] = rest % x.size(d);
      rest /= x.size(d);
    }
  }
  return out;
}

}  // namespace mainspring::tensor
