// The tape. A node stands for one call of an op: where the gradients of its inputs go, and what the op saved.
//
// Every node has one output. Numbers grow in the order of the forward pass, so running nodes from the highest
// number down never meets a node before all its consumers have run.
#pragma once

#include <memory>
#include <utility>

#include "core/tensor.h"

namespace mainspring::tensor {

bool grad_enabled();
void set_grad_enabled(bool enabled);  // of this thread

class GradMode {
 public:
  explicit GradMode(bool enabled) : before_(grad_enabled()) { set_grad_enabled(enabled); }
  ~GradMode() { set_grad_enabled(before_); }
  GradMode(const GradMode&) = delete;
  GradMode& operator=(const GradMode&) = delete;

 private:
  bool before_;
};

// Where the gradient of one input goes: to the node that made it, or into a leaf, or nowhere. The gradient
// is summed to the input's shape and cast to its dtype on the way, so ops need not undo broadcasting.
struct Edge {
  Node* node = nullptr;        // owned
  TensorImpl* leaf = nullptr;  // owned
  DType dtype = DType::Float32;
  uint8_t ndim = 0;
  int64_t sizes[kMaxDims];

  Edge() = default;
  Edge(const Edge&) = delete;
  Edge& operator=(const Edge&) = delete;
  ~Edge() { clear(); }
  void point_to(const Tensor& input);
  void clear();
  bool wanted() const { return node != nullptr || leaf != nullptr; }
  Dims shape() const { return Dims(sizes, ndim); }
};

// The gradients that a backward gives, one for each input of its node.
struct Grads {
  const Edge* edges;
  Tensor* values;
  bool wanted(int i) const { return edges[i].wanted(); }
  Dims shape(int i) const { return edges[i].shape(); }
  Tensor& operator[](int i) const { return values[i]; }
};

struct Node : Pooled {
  std::atomic<uint32_t> refs{1};
  bool released = false;
  int num_inputs = 0;
  uint64_t number;
  const char* name;
  Edge* edges = nullptr;                // in the derived node
  std::unique_ptr<Hooks> hooks;
  TensorImpl* retain_into = nullptr;    // not owned: the tensor, while it lives, whose .grad is wanted too

  explicit Node(const char* name);
  virtual ~Node() = default;
  virtual void backward(const Tensor& grad, Grads& grads) = 0;
  virtual void release() = 0;  // lets go of what was saved
  void retain() { refs.fetch_add(1, std::memory_order_relaxed); }
  void drop() {
    if (refs.fetch_sub(1, std::memory_order_acq_rel) == 1) destroy(this);
  }
  static void destroy(Node* node);  // without recursion, however long the tape
};

// An input kept for the backward pass. Reading it fails if it was written in place since.
class SavedTensor {
 public:
  SavedTensor() = default;
  SavedTensor(const Tensor& t) : tensor_(t), version_(t ? t.version() : 0) {}
  static SavedTensor when(bool wanted, const Tensor& t) { return wanted ? SavedTensor(t) : SavedTensor(); }
  const Tensor& get() const;
  explicit operator bool() const { return static_cast<bool>(tensor_); }

 private:
  friend class SavedOutput;
  Tensor tensor_;
  uint32_t version_ = 0;
};

// The op's own output. It is kept without its node, which would own itself, and gets it back when read.
class SavedOutput {
 public:
  SavedOutput() = default;
  SavedOutput(const Tensor& t) : saved_(alias(t)) {}
  Tensor get() const;

 private:
  SavedTensor saved_;
};

template <class Op, int N>
struct OpNode final : Node {
  typename Op::Saved saved;
  Edge inputs[N];
  OpNode(typename Op::Saved&& s) : Node(Op::name), saved(std::move(s)) {
    edges = inputs;
    num_inputs = N;
  }
  void backward(const Tensor& grad, Grads& grads) override { Op::backward(saved, grad, grads); }
  void release() override {
    saved = typename Op::Saved();
    released = true;
  }
};

template <class Op>
struct ListNode final : Node {
  typename Op::Saved saved;
  std::unique_ptr<Edge[]> inputs;
  ListNode(typename Op::Saved&& s, int count)
      : Node(Op::name), saved(std::move(s)), inputs(new Edge[static_cast<size_t>(count)]) {
    edges = inputs.get();
    num_inputs = count;
  }
  void backward(const Tensor& grad, Grads& grads) override { Op::backward(saved, grad, grads); }
  void release() override {
    saved = typename Op::Saved();
    released = true;
  }
};

inline bool wants_grad(const Tensor& t) { return t && t.requires_grad(); }

template <class... Inputs>
bool recording(const Inputs&... inputs) {
  return (wants_grad(inputs) || ...) && grad_enabled();
}

// Hangs `out` on a new node of the tape.
template <class Op, class... Inputs>
void record(const Tensor& out, typename Op::Saved saved, const Inputs&... inputs) {
  auto* node = new OpNode<Op, sizeof...(Inputs)>(std::move(saved));
  int i = 0;
  (node->inputs[i++].point_to(inputs), ...);
  out->grad_fn = node;
  out->requires_grad = true;
}

template <class Op>
void record_list(const Tensor& out, typename Op::Saved saved, const std::vector<Tensor>& inputs) {
  auto* node = new ListNode<Op>(std::move(saved), static_cast<int>(inputs.size()));
  for (size_t i = 0; i < inputs.size(); ++i) node->inputs[i].point_to(inputs[i]);
  out->grad_fn = node;
  out->requires_grad = true;
}

}  // namespace mainspring::tensor
