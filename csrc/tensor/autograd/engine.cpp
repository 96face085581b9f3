#include "autograd/engine.h"

#include <algorithm>
#include <unordered_map>
#include <unordered_set>

#include "ops/ops.h"

namespace mainspring::tensor {

extern constinit thread_local const Node* running_node;

namespace {

// A gradient on its way to a node. Several may be waiting for one node; they are summed when it runs.
struct Entry {
  Node* node;  // kept alive by a consumer's edge or by the root
  uint64_t order;
  Tensor grad;
};

struct Later {
  bool operator()(const Entry& a, const Entry& b) const {
    if (a.node->number != b.node->number) return a.node->number < b.node->number;
    return a.order > b.order;
  }
};

Tensor run_hooks(const Hooks* hooks, Tensor grad) {
  if (hooks == nullptr) return grad;
  const auto entries = hooks->entries;  // a hook may remove itself
  for (const auto& [id, hook] : entries) {
    Tensor changed = hook(grad);
    if (!changed) continue;
    if (!changed.same_shape(grad))
      fail(ErrorKind::Autograd, "a gradient hook returned ", changed, " for a gradient ", grad);
    grad = std::move(changed);
  }
  return grad;
}

Tensor plus(const Tensor& a, Tensor b) { return a ? ops::add(a, b) : std::move(b); }

bool sole_owner(const Tensor& t) {
  return t->refs.load() == 1 && t->storage->refs.load() == 1 && t->storage->release == nullptr && t.contiguous();
}

void accumulate(TensorImpl* leaf, Tensor grad, bool create_graph) {
  if (leaf->grad == nullptr) {
    if (!create_graph && !sole_owner(grad)) grad = ops::clone(grad);
    leaf->grad = grad.release();
    return;
  }
  if (create_graph) {
    Tensor sum = ops::add(Tensor::borrow(leaf->grad), grad);
    std::exchange(leaf->grad, sum.release())->drop();
  } else {
    ops::add_(Tensor::borrow(leaf->grad), grad);
  }
}

class Pass {
 public:
  Pass(const std::vector<Tensor>* captures, BackwardOptions options) : captures_(captures), options_(options) {
    if (captures_ != nullptr) captured.resize(captures_->size());
  }

  void run(const Tensor& root, Tensor grad) {
    GradMode mode(options_.create_graph);
    root_ = root->grad_fn;
    if (root->grad_fn != nullptr) push(root->grad_fn, std::move(grad));
    else give_leaf(root.get(), std::move(grad));
    while (!heap_.empty()) step();
    for (auto& [leaf, sum] : leaves_) finish_leaf(leaf.get(), std::move(sum));
  }

  std::vector<Tensor> captured;

 private:
  void push(Node* node, Tensor grad) {
    heap_.push_back({node, order_++, std::move(grad)});
    std::push_heap(heap_.begin(), heap_.end(), Later{});
  }

  Entry pop() {
    std::pop_heap(heap_.begin(), heap_.end(), Later{});
    Entry entry = std::move(heap_.back());
    heap_.pop_back();
    return entry;
  }

  void step() {
    Entry entry = pop();
    Node* node = entry.node;
    Tensor grad = std::move(entry.grad);
    while (!heap_.empty() && heap_.front().node == node) grad = plus(grad, pop().grad);
    grad = run_hooks(node->hooks.get(), std::move(grad));
    if (node->retain_into != nullptr) accumulate(node->retain_into, grad, options_.create_graph);
    if (captures_ != nullptr)
      for (size_t i = 0; i < captures_->size(); ++i)
        if ((*captures_)[i]->grad_fn == node) captured[i] = grad;
    if (node->released)
      fail(ErrorKind::Autograd, node->name, ": this part of the tape was used by an earlier backward pass and is gone; "
           "pass retain_graph=True to that pass");
    call(node, grad);
  }

  void call(Node* node, const Tensor& grad) {
    constexpr int kInline = 4;
    Tensor few[kInline];
    std::vector<Tensor> many;
    Tensor* values = few;
    if (node->num_inputs > kInline) {
      many.resize(static_cast<size_t>(node->num_inputs));
      values = many.data();
    }
    Grads grads = {node->edges, values};
    struct Running {
      const Node* before = running_node;
      ~Running() { running_node = before; }
    } running;
    running_node = node;
    node->backward(grad, grads);
    if (!options_.retain_graph) node->release();
    for (int i = 0; i < node->num_inputs; ++i) {
      const Edge& edge = node->edges[i];
      if (edge.leaf != nullptr && !values[i] && !expected_.empty()) arrived(edge.leaf);
      if (!edge.wanted() || !values[i]) continue;
      Tensor g = std::move(values[i]);
      if (!(g.shape() == edge.shape())) g = sum_to(g, edge.shape());
      if (g.dtype() != edge.dtype) g = ops::to(g, edge.dtype);
      if (edge.node != nullptr) push(edge.node, std::move(g));
      else give_leaf(edge.leaf, std::move(g));
    }
  }

  // A leaf with hooks, or whose gradient is asked for, needs the whole of it before it is passed on.
  void give_leaf(TensorImpl* leaf, Tensor grad) {
    if (leaf->hooks == nullptr && captures_ == nullptr) return accumulate(leaf, std::move(grad), options_.create_graph);
    if (captures_ != nullptr && !captured_leaf(leaf)) return;
    if (captures_ == nullptr && expected_.empty()) count_edges();
    bool known_already = false;
    for (auto& [known, sum] : leaves_)
      if (known.get() == leaf) {
        sum = plus(sum, std::move(grad));
        known_already = true;
      }
    if (!known_already) leaves_.emplace_back(Tensor::borrow(leaf), std::move(grad));
    if (captures_ == nullptr) arrived(leaf);
  }

  // How many gradients each leaf with hooks will get, so that its hooks run as soon as the last one is there: who
  // sends gradients to other processes need not wait for the end of the pass.
  void count_edges() {
    std::unordered_set<const Node*> seen;
    std::vector<const Node*> open;
    if (root_ != nullptr) open.push_back(root_);
    while (!open.empty()) {
      const Node* node = open.back();
      open.pop_back();
      if (!seen.insert(node).second) continue;
      for (int i = 0; i < node->num_inputs; ++i) {
        const Edge& edge = node->edges[i];
        if (edge.node != nullptr) open.push_back(edge.node);
        if (edge.leaf != nullptr && edge.leaf->hooks != nullptr) ++expected_[edge.leaf];
      }
    }
  }

  void arrived(TensorImpl* leaf) {
    const auto left = expected_.find(leaf);
    if (left == expected_.end() || --left->second > 0) return;
    for (auto it = leaves_.begin(); it != leaves_.end(); ++it)
      if (it->first.get() == leaf) {
        auto [kept, sum] = std::move(*it);
        leaves_.erase(it);
        return finish_leaf(leaf, std::move(sum));
      }
  }

  bool captured_leaf(const TensorImpl* leaf) const {
    for (const Tensor& t : *captures_)
      if (t.get() == leaf) return true;
    return false;
  }

  void finish_leaf(TensorImpl* leaf, Tensor grad) {
    grad = run_hooks(leaf->hooks, std::move(grad));
    if (captures_ == nullptr) return accumulate(leaf, std::move(grad), options_.create_graph);
    for (size_t i = 0; i < captures_->size(); ++i)
      if ((*captures_)[i].get() == leaf) captured[i] = grad;
  }

  const std::vector<Tensor>* captures_;
  BackwardOptions options_;
  std::vector<Entry> heap_;
  std::vector<std::pair<Tensor, Tensor>> leaves_;
  std::unordered_map<const TensorImpl*, int> expected_;
  const Node* root_ = nullptr;
  uint64_t order_ = 0;
};

Tensor first_grad(const Tensor& root, const Tensor& grad) {
  if (!root.requires_grad())
    fail(ErrorKind::Autograd, "backward: ", root, " does not depend on a tensor with requires_grad=True");
  if (!grad) {
    if (root.numel() != 1)
      fail(ErrorKind::Autograd, "backward: pass a gradient for ", root, "; only a single element has one by itself");
    return full(root.shape(), 1.0, root.dtype());
  }
  if (!grad.same_shape(root))
    fail(ErrorKind::Shape, "backward: the gradient is ", grad, " but the tensor is ", root);
  return grad.dtype() == root.dtype() ? grad : ops::to(grad, root.dtype());
}

}  // namespace

void backward(const Tensor& root, const Tensor& grad, BackwardOptions options) {
  options.retain_graph |= options.create_graph;
  Tensor first = first_grad(root, grad);
  Pass(nullptr, options).run(root, std::move(first));
}

std::vector<Tensor> gradients(const Tensor& root, const Tensor& grad, const std::vector<Tensor>& inputs,
                              BackwardOptions options) {
  options.retain_graph |= options.create_graph;
  for (const Tensor& t : inputs)
    if (!t.requires_grad()) fail(ErrorKind::Autograd, "grad: an input ", t, " does not require a gradient");
  Pass pass(&inputs, options);
  pass.run(root, first_grad(root, grad));
  return std::move(pass.captured);
}

int64_t add_hook(const Tensor& t, Hook hook) {
  if (!t.requires_grad()) fail(ErrorKind::Autograd, "register_hook: ", t, " does not require a gradient");
  static std::atomic<int64_t> next{1};
  const int64_t id = next++;
  Hooks* hooks;
  if (t->grad_fn != nullptr) {
    if (!t->grad_fn->hooks) t->grad_fn->hooks = std::make_unique<Hooks>();
    hooks = t->grad_fn->hooks.get();
  } else {
    if (t->hooks == nullptr) t->hooks = new Hooks;
    hooks = t->hooks;
  }
  hooks->entries.emplace_back(id, std::move(hook));
  return id;
}

void remove_hook(const Tensor& t, int64_t id) {
  Hooks* hooks = t->grad_fn != nullptr ? t->grad_fn->hooks.get() : t->hooks;
  if (hooks != nullptr) std::erase_if(hooks->entries, [&](const auto& entry) { return entry.first == id; });
}

void retain_grad(const Tensor& t) {
  if (!t.requires_grad()) fail(ErrorKind::Autograd, "retain_grad: ", t, " does not require a gradient");
  if (t->grad_fn == nullptr) return;  // a leaf keeps it anyway
  t->retains_grad = true;
  t->grad_fn->retain_into = t.get();
}

void set_requires_grad(const Tensor& t, bool value) {
  if (t->grad_fn != nullptr && !value)
    fail(ErrorKind::Autograd, "requires_grad: ", t, " was computed by `", t->grad_fn->name, "`; use detach()");
  if (value && !is_float(t.dtype()))
    fail(ErrorKind::DType, "requires_grad: only floating-point tensors have gradients, not ", t);
  t->requires_grad = value;
}

void check_in_place(const char* op, const Tensor& t) {
  if (t.requires_grad() && grad_enabled())
    fail(ErrorKind::Autograd, op, ": ", t, " requires a gradient and cannot be written in place here; "
         "write under no_grad(), or use the op that returns a new tensor");
}

Tensor sum_to(const Tensor& t, const Dims& shape) {
  const int extra = t.ndim() - shape.size();
  Dims dims;
  for (int i = 0; i < t.ndim(); ++i)
    if (i < extra || (shape[i - extra] == 1 && t.size(i) != 1)) dims.push_back(i);
  Tensor out = dims.size() == 0 ? t : ops::sum(t, dims, true);
  return extra == 0 ? out : ops::reshape(out, shape);
}

}  // namespace mainspring::tensor
