// Kernels that see whole rows: softmax, the norms, cross-entropy.
#include "kernels/kernel_set.h"
#include "kernels/vec.h"
#include "thread_pool.h"

namespace mainspring::MAINSPRING_ISA {
namespace {

using tensor::RowKernel;

constexpr int64_t kGrain = 16 * 1024;  // elements that make a task worth its hand-over

// v in the first `lanes` lanes, `other` in the rest.
template <class V>
MS_INLINE V first_or(V v, int lanes, Lane<V> other) {
  if (lanes == kLanes) return v;
  Lane<V> values[kLanes];
  store(values, v);
  for (int i = lanes; i < kLanes; ++i) values[i] = other;
  return load(values);
}

// The sum of term(i, lanes) over a row, in two accumulators.
template <class V, class Term>
MS_INLINE Lane<V> row_sum(int64_t n, Term term) {
  V acc[2] = {V{}, V{}};
  int which = 0;
  for_lanes(n, [&](int64_t i, int l) {
    acc[which] = acc[which] + first_or(term(i, l), l, 0);
    which ^= 1;
  });
  return sum_lanes(acc[0] + acc[1]);
}

template <class V, class T>
MS_INLINE Lane<V> row_max(int64_t n, const T* x) {
  V most = splat<V>(-INFINITY);
  for_lanes(n, [&](int64_t i, int l) {
    const V v = first_or(load_lanes(x + i, l), l, -INFINITY);
    most = select(most > v, most, v);  // a NaN may be lost here; it comes back with the sum of exponentials
  });
  Lane<V> lanes[kLanes];
  store(lanes, most);
  for (int i = 1; i < kLanes; ++i) lanes[0] = lanes[0] > lanes[i] ? lanes[0] : lanes[i];
  return lanes[0];
}

template <class V, class T>
MS_INLINE Lane<V> log_sum_exp(int64_t n, const T* x) {
  const Lane<V> most = row_max<V>(n, x);
  const V shift = splat<V>(most);
  const Lane<V> sum = row_sum<V>(n, [&](int64_t i, int l) { return exp(load_lanes(x + i, l) - shift); });
  return most + (sizeof sum == 4 ? ::logf(static_cast<float>(sum)) : ::log(sum));
}

template <class T>
void softmax(RowKernel kind, int64_t rows, int64_t n, const void* x_, void* out_) {
  using V = typename Traits<T>::V;
  parallel_ranges(rows, kGrain / max_of(1, n), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(x_) + r * n;
      T* out = static_cast<T*>(out_) + r * n;
      if (kind == RowKernel::LogSoftmax) {
        const V lse = splat<V>(log_sum_exp<V>(n, x));
        for_lanes(n, [&](int64_t i, int l) { store_lanes(out + i, load_lanes(x + i, l) - lse, l); });
        continue;
      }
      const V shift = splat<V>(row_max<V>(n, x));
      auto term = [&](int64_t i, int l) { return exp(load_lanes(x + i, l) - shift); };
      if constexpr (sizeof(T) == 2) {  // not stored in between: that would round twice
        const V scale = splat<V>(1 / row_sum<V>(n, term));
        for_lanes(n, [&](int64_t i, int l) { store_lanes(out + i, term(i, l) * scale, l); });
      } else {
        const Lane<V> sum = row_sum<V>(n, [&](int64_t i, int l) {
          const V e = term(i, l);
          store_lanes(out + i, e, l);
          return e;
        });
        const V scale = splat<V>(1 / sum);
        for_lanes(n, [&](int64_t i, int l) { store_lanes(out + i, load_lanes(out + i, l) * scale, l); });
      }
    }
  });
}

// y (g - sum(g y)) for softmax, g - exp(y) sum(g) for log_softmax.
template <class T>
void softmax_grad(RowKernel kind, int64_t rows, int64_t n, const void* y_, const void* g_, void* out_) {
  using V = typename Traits<T>::V;
  parallel_ranges(rows, kGrain / max_of(1, n), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* y = static_cast<const T*>(y_) + r * n;
      const T* g = static_cast<const T*>(g_) + r * n;
      T* out = static_cast<T*>(out_) + r * n;
      if (kind == RowKernel::Softmax) {
        const V dot = splat<V>(row_sum<V>(n, [&](int64_t i, int l) { return load_lanes(y + i, l) * load_lanes(g + i, l); }));
        for_lanes(n, [&](int64_t i, int l) {
          store_lanes(out + i, load_lanes(y + i, l) * (load_lanes(g + i, l) - dot), l);
        });
      } else {
        const V sum = splat<V>(row_sum<V>(n, [&](int64_t i, int l) { return load_lanes(g + i, l); }));
        for_lanes(n, [&](int64_t i, int l) {
          store_lanes(out + i, load_lanes(g + i, l) - exp(load_lanes(y + i, l)) * sum, l);
        });
      }
    }
  });
}

// LayerNorm where args.mean is given, else RMSNorm.
template <class T>
void norm(const tensor::NormArgs& a) {
  using V = typename Traits<T>::V;
  using A = typename Traits<T>::A;
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  parallel_ranges(a.rows, kGrain / max_of(1, a.n), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(a.x) + r * a.n;
      T* out = static_cast<T*>(a.out) + r * a.n;
      A mean = 0;
      if (a.mean != nullptr) {
        mean = row_sum<V>(a.n, [&](int64_t i, int l) { return load_lanes(x + i, l); }) / static_cast<A>(a.n);
        static_cast<A*>(a.mean)[r] = mean;
      }
      const V shift = splat<V>(mean);
      const A square = row_sum<V>(a.n, [&](int64_t i, int l) {
        const V v = load_lanes(x + i, l) - shift;
        return v * v;
      });
      const double variance = static_cast<double>(square) / static_cast<double>(a.n);
      const A rstd = static_cast<A>(1 / __builtin_sqrt(variance + a.eps));
      static_cast<A*>(a.rstd)[r] = rstd;
      const V scale = splat<V>(rstd);
      for_lanes(a.n, [&](int64_t i, int l) {
        V v = (load_lanes(x + i, l) - shift) * scale;
        if (weight != nullptr) v = v * load_lanes(weight + i, l);
        if (bias != nullptr) v = v + load_lanes(bias + i, l);
        store_lanes(out + i, v, l);
      });
    }
  });
}

// With h = (x - mean) rstd and u = grad weight: grad_x = rstd (u - mean(u) - h mean(u h)), without mean(u) for RMSNorm.
template <class T>
void norm_grad(const tensor::NormGradArgs& a) {
  using V = typename Traits<T>::V;
  using A = typename Traits<T>::A;
  const T* x_all = static_cast<const T*>(a.x);
  const T* grad_all = static_cast<const T*>(a.grad);
  const T* weight = static_cast<const T*>(a.weight);
  const A* means = static_cast<const A*>(a.mean);
  const A* rstds = static_cast<const A*>(a.rstd);
  if (a.grad_x != nullptr) parallel_ranges(a.rows, kGrain / max_of(1, a.n), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = x_all + r * a.n;
      const T* g = grad_all + r * a.n;
      T* out = static_cast<T*>(a.grad_x) + r * a.n;
      const V shift = splat<V>(means != nullptr ? means[r] : 0), scale = splat<V>(rstds[r]);
      auto weighted = [&](int64_t i, int l) {
        const V v = load_lanes(g + i, l);
        return weight != nullptr ? v * load_lanes(weight + i, l) : v;
      };
      auto normed = [&](int64_t i, int l) { return (load_lanes(x + i, l) - shift) * scale; };
      const A count = static_cast<A>(a.n);
      const V dot = splat<V>(row_sum<V>(a.n, [&](int64_t i, int l) { return weighted(i, l) * normed(i, l); }) / count);
      const V mean = splat<V>(means == nullptr ? 0 : row_sum<V>(a.n, weighted) / count);
      for_lanes(a.n, [&](int64_t i, int l) {
        store_lanes(out + i, scale * (weighted(i, l) - mean - normed(i, l) * dot), l);
      });
    }
  });
  if (a.grad_weight == nullptr && a.grad_bias == nullptr) return;
  // Columns are shared out, so that each is summed over the rows in one order.
  A* grad_weight = static_cast<A*>(a.grad_weight);
  A* grad_bias = static_cast<A*>(a.grad_bias);
  const int64_t blocks = (a.n + kLanes - 1) / kLanes;
  parallel_ranges(blocks, kGrain / max_of(1, a.rows * kLanes), [&](int64_t begin, int64_t end) {
    const int64_t c0 = begin * kLanes, c1 = min_of(a.n, end * kLanes);
    for (int64_t r = 0; r < a.rows; ++r) {
      const T* x = x_all + r * a.n + c0;
      const T* g = grad_all + r * a.n + c0;
      const V shift = splat<V>(means != nullptr ? means[r] : 0), scale = splat<V>(rstds[r]);
      for_lanes(c1 - c0, [&](int64_t i, int l) {
        const V v = load_lanes(g + i, l);
        if (grad_weight != nullptr) {
          A* to = grad_weight + c0 + i;
          store_lanes(to, fma(v, (load_lanes(x + i, l) - shift) * scale, load_lanes(to, l)), l);
        }
        if (grad_bias != nullptr) {
          A* to = grad_bias + c0 + i;
          store_lanes(to, load_lanes(to, l) + v, l);
        }
      });
    }
  });
}

// loss = (1 - s) (lse - x[target]) + s (lse - mean(x)), s being the smoothing; 0 for an ignored row.
template <class T>
void cross_entropy(const tensor::CrossEntropyArgs& a) {
  using V = typename Traits<T>::V;
  using A = typename Traits<T>::A;
  parallel_ranges(a.rows, kGrain / max_of(1, a.n), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(a.logits) + r * a.n;
      const int64_t target = a.targets[r];
      A loss = 0, lse = 0;
      if (target != a.ignore_index) {
        lse = log_sum_exp<V>(a.n, x);
        A picked[kLanes];
        store(picked, load_n(x + target, 1));
        loss = lse - picked[0];
        if (a.smoothing != 0) {
          const A mean = row_sum<V>(a.n, [&](int64_t i, int l) { return load_lanes(x + i, l); }) / static_cast<A>(a.n);
          const A s = static_cast<A>(a.smoothing);
          loss = (1 - s) * loss + s * (lse - mean);
        }
      }
      static_cast<A*>(a.losses)[r] = loss;
      static_cast<A*>(a.lse)[r] = lse;
    }
  });
}

// scale (softmax(x) - (1 - s) onehot - s / n)
template <class T>
void cross_entropy_grad(const tensor::CrossEntropyGradArgs& a) {
  using V = typename Traits<T>::V;
  using A = typename Traits<T>::A;
  parallel_ranges(a.rows, kGrain / max_of(1, a.n), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(a.logits) + r * a.n;
      T* out = static_cast<T*>(a.grad) + r * a.n;
      const int64_t target = a.targets[r];
      const bool ignored = target == a.ignore_index;
      const A row_scale = ignored ? 0 : static_cast<const A*>(a.scale)[r];
      const V scale = splat<V>(row_scale), lse = splat<V>(static_cast<const A*>(a.lse)[r]);
      const V even = splat<V>(a.smoothing / static_cast<double>(a.n));
      if (ignored) {
        for_lanes(a.n, [&](int64_t i, int l) { store_lanes(out + i, V{}, l); });
        continue;
      }
      for_lanes(a.n, [&](int64_t i, int l) {
        store_lanes(out + i, scale * (exp(load_lanes(x + i, l) - lse) - even), l);
      });
      const V at = exp(load_n(x + target, 1) - lse) - even - splat<V>(1 - a.smoothing);
      store_n(out + target, scale * at, 1);
    }
  });
}

}  // namespace

void fill_rows(tensor::KernelSet& set) {
#define EACH(table, fn) set.table[1] = fn<bf16>; set.table[2] = fn<float>; set.table[3] = fn<double>;
  EACH(softmax, softmax)
  EACH(softmax_grad, softmax_grad)
  EACH(norm, norm)
  EACH(norm_grad, norm_grad)
  EACH(cross_entropy, cross_entropy)
  EACH(cross_entropy_grad, cross_entropy_grad)
}

}  // namespace mainspring::MAINSPRING_ISA
