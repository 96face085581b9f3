// Long work outside the interpreter lock. The bindings set the two hooks; without them nothing happens.
#pragma once

#include <cstdint>

namespace mainspring::tensor {

struct BlockingHooks {
  void* (*leave)() = nullptr;       // gives the lock up, returns what enter() needs
  void (*enter)(void*) = nullptr;   // takes it again
};
inline BlockingHooks blocking_hooks;

// Around a kernel of about `work` element operations. Only raw memory may be touched inside: no tensor is
// made, dropped or returned.
class BlockingRegion {
 public:
  explicit BlockingRegion(int64_t work) {
    constexpr int64_t kWorth = 100'000;  // some tens of microseconds: a hand-over costs about one
    if (work >= kWorth && blocking_hooks.leave != nullptr) state_ = blocking_hooks.leave();
  }
  ~BlockingRegion() {
    if (state_ != nullptr) blocking_hooks.enter(state_);
  }
  BlockingRegion(const BlockingRegion&) = delete;
  BlockingRegion& operator=(const BlockingRegion&) = delete;

 private:
  void* state_ = nullptr;
};

}  // namespace mainspring::tensor
