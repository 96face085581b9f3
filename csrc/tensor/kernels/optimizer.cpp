// One pass over a parameter for each optimizer step. bfloat16 parameters keep float32 moments.
#include "kernels/kernel_set.h"
#include "kernels/vec.h"
#include "thread_pool.h"

namespace mainspring::MAINSPRING_ISA {
namespace {

constexpr int64_t kGrain = 16 * 1024;

// Kingma and Ba, "Adam", algorithm 1; with decay Loshchilov and Hutter's AdamW, algorithm 2.
template <class T>
void adam(const tensor::AdamArgs& a) {
  using V = typename Traits<T>::V;
  using A = typename Traits<T>::A;
  const V beta1 = splat<V>(a.beta1), beta2 = splat<V>(a.beta2), eps = splat<V>(a.eps), l2 = splat<V>(a.l2);
  const V keep = splat<V>(1 - a.lr * a.decay), rate = splat<V>(a.lr / a.correction1);
  const V root = splat<V>(1 / __builtin_sqrt(a.correction2));
  const V rest1 = splat<V>(1 - a.beta1), rest2 = splat<V>(1 - a.beta2);
  parallel_ranges(a.n, kGrain, [&](int64_t begin, int64_t end) {
    T* param = static_cast<T*>(a.param) + begin;
    const T* grad = static_cast<const T*>(a.grad) + begin;
    A* m_all = static_cast<A*>(a.m) + begin;
    A* v_all = static_cast<A*>(a.v) + begin;
    for_lanes(end - begin, [&](int64_t i, int l) {
      const V p = load_lanes(param + i, l) * keep;
      const V g = fma(l2, p, load_lanes(grad + i, l));
      const V m = fma(beta1, load_lanes(m_all + i, l), rest1 * g);
      const V v = fma(beta2, load_lanes(v_all + i, l), rest2 * g * g);
      store_lanes(m_all + i, m, l);
      store_lanes(v_all + i, v, l);
      store_lanes(param + i, p - rate * m / (sqrt(v) * root + eps), l);
    });
  });
}

// Sutskever's momentum as PyTorch writes it: v = momentum v + (1 - dampening) g.
template <class T>
void sgd(const tensor::SgdArgs& a) {
  using V = typename Traits<T>::V;
  using A = typename Traits<T>::A;
  const V lr = splat<V>(a.lr), l2 = splat<V>(a.l2), momentum = splat<V>(a.momentum), part = splat<V>(1 - a.dampening);
  parallel_ranges(a.n, kGrain, [&](int64_t begin, int64_t end) {
    T* param = static_cast<T*>(a.param) + begin;
    const T* grad = static_cast<const T*>(a.grad) + begin;
    A* velocity = a.velocity == nullptr ? nullptr : static_cast<A*>(a.velocity) + begin;
    for_lanes(end - begin, [&](int64_t i, int l) {
      const V p = load_lanes(param + i, l);
      V g = fma(l2, p, load_lanes(grad + i, l));
      if (velocity != nullptr) {
        const V v = a.first ? g : fma(momentum, load_lanes(velocity + i, l), part * g);
        store_lanes(velocity + i, v, l);
        g = a.nesterov ? fma(momentum, v, g) : v;
      }
      store_lanes(param + i, p - lr * g, l);
    });
  });
}

}  // namespace

void fill_optimizer(tensor::KernelSet& set) {
  set.adam[1] = adam<bf16>;
  set.adam[2] = adam<float>;
  set.adam[3] = adam<double>;
  set.sgd[1] = sgd<bf16>;
  set.sgd[2] = sgd<float>;
  set.sgd[3] = sgd<double>;
}

}  // namespace mainspring::MAINSPRING_ISA
