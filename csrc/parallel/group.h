// A group of ranks and its collectives. Sums are taken in the order of ranks, so that every rank gets the same bits,
// whatever the timing.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "core/tensor.h"
#include "transport.h"

namespace mainspring::tensor::parallel {

enum class Reduction : uint8_t { Sum, Prod, Max, Min, Avg };

// The result of an asynchronous call.
class Work {
 public:
  void wait();  // throws what the call threw
  bool done() const;
  void finish(std::exception_ptr error);

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
  std::exception_ptr error_;
};

// Runs tasks one after the other: on the caller where nothing waits, else on a thread of its own.
class Queue {
 public:
  ~Queue();
  void run(const std::function<void()>& task);
  std::shared_ptr<Work> submit(std::function<void()> task);

 private:
  void loop();
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::pair<std::function<void()>, std::shared_ptr<Work>>> tasks_;
  bool running_ = false, ending_ = false;
  std::thread thread_;
};

class Group {
 public:
  // All ranks of the world call this in the same order; one that is not in `ranks` gets no group.
  static std::shared_ptr<Group> create(const std::shared_ptr<World>& world, std::vector<int> ranks, const std::string& transport);

  int rank() const { return mesh_.rank; }
  int size() const { return mesh_.size(); }
  const std::vector<int>& ranks() const { return mesh_.names; }
  const std::string& transport() const { return kind_; }

  // Tensors are contiguous, on all ranks of the same size and dtype. These run at once; submit() them for later.
  void all_reduce(const Tensor& t, Reduction op);                            // in place
  void all_gather(const Tensor& in, const Tensor& out);                      // out: size times in, in the order of ranks
  void reduce_scatter(const Tensor& in, const Tensor& out, Reduction op);    // in: size times out
  void all_to_all(const Tensor& in, const Tensor& out);                      // piece r of in becomes piece `rank` of r's out
  void broadcast(const Tensor& t, int root);
  void barrier();
  void send(const Tensor& t, int to);
  void receive(const Tensor& t, int from);

 private:
  Group() = default;
  void check_open() const;
  template <class Body> void guarded(Body body);

  std::shared_ptr<World> world_;
  Mesh mesh_, letters_;  // letters: send and receive, apart from the collectives
  std::unique_ptr<Transport> transport_;
  std::string kind_;
  std::atomic<bool> broken_{false};

 public:
  Queue collectives, sends, receives;  // last: they end their tasks before what these use goes
};

}  // namespace mainspring::tensor::parallel
