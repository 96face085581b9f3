#include "autograd/node.h"

namespace mainspring::tensor {
namespace {

thread_local bool enabled = true;
std::atomic<uint64_t> next_number{1};

// Nodes whose last owner is gone, waiting for the loop that is already running on this thread.
thread_local std::vector<Node*>* doomed = nullptr;

}  // namespace

constinit thread_local const Node* running_node = nullptr;

bool grad_enabled() { return enabled; }
void set_grad_enabled(bool value) { enabled = value; }

Node::Node(const char* n) : number(next_number.fetch_add(1, std::memory_order_relaxed)), name(n) {}

void Node::destroy(Node* node) {
  if (doomed != nullptr) return doomed->push_back(node);
  std::vector<Node*> list;
  doomed = &list;
  delete node;
  while (!list.empty()) {
    Node* next = list.back();
    list.pop_back();
    delete next;
  }
  doomed = nullptr;
}

void Edge::point_to(const Tensor& input) {
  if (!input) return;
  dtype = input.dtype();
  ndim = static_cast<uint8_t>(input.ndim());
  for (int i = 0; i < ndim; ++i) sizes[i] = input.size(i);
  if (!input.requires_grad()) return;
  if (input->grad_fn != nullptr) {
    node = input->grad_fn;
    node->retain();
  } else {
    leaf = input.get();
    leaf->retain();
  }
}

void Edge::clear() {
  if (node != nullptr) std::exchange(node, nullptr)->drop();
  if (leaf != nullptr) std::exchange(leaf, nullptr)->drop();
}

const Tensor& SavedTensor::get() const {
  if (tensor_ && tensor_.version() != version_)
    fail(ErrorKind::Autograd, running_node ? running_node->name : "backward", ": a ", tensor_,
         " that its backward pass needs was changed in place (version ", tensor_.version(), ", saved at ", version_,
         "); change a clone() instead, or write before the forward pass");
  return tensor_;
}

Tensor SavedOutput::get() const {
  const Tensor& t = saved_.get();
  if (!grad_enabled() || running_node == nullptr) return t;
  Tensor out = alias(t);
  out->grad_fn = const_cast<Node*>(running_node);
  out->grad_fn->retain();
  out->requires_grad = true;
  return out;
}

}  // namespace mainspring::tensor
