// Sockets between ranks: every wait has a deadline, every failure is an Error that names the rank.
#pragma once

#include <chrono>
#include <cstdint>
#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"

namespace mainspring::tensor::parallel {

using Clock = std::chrono::steady_clock;

class Deadline {
 public:
  explicit Deadline(double seconds) : seconds_(seconds), end_(Clock::now() + std::chrono::microseconds(static_cast<int64_t>(seconds * 1e6))) {}
  bool passed() const { return Clock::now() >= end_; }
  int poll_milliseconds() const;  // until the end, at most 100
  double seconds() const { return seconds_; }

 private:
  double seconds_;
  Clock::time_point end_;
};

class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket();
  int fd() const { return fd_; }
  bool open() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

// One connection to every other rank of a group. Index: rank within the group; the own place stays closed.
struct Mesh {
  int rank = 0;
  std::vector<Socket> peers;
  std::vector<int> names;  // rank in the world, for messages

  int size() const { return static_cast<int>(peers.size()); }
  void send(int to, const void* data, size_t bytes, const Deadline& deadline) const;
  void receive(int from, void* data, size_t bytes, const Deadline& deadline) const;
  // All at once, so that no order of calls can block: piece r of `out` to rank r, `bytes` from each into piece r of `in`.
  struct Piece {
    const char* out;
    size_t out_bytes;
    char* in;
    size_t in_bytes;
  };
  void exchange(const std::vector<Piece>& pieces, const Deadline& deadline) const;
  void check_alive() const;  // an Error if the process behind a connection has ended
};

// All ranks of a job, found through rank 0.
class World {
 public:
  // `address` is host:port of rank 0, which listens there.
  World(int rank, int size, const std::string& address, double timeout);
  // Connections among `ranks` (of the world, ascending, this one included); all of them call it, in the same order.
  Mesh connect(const std::vector<int>& ranks, uint32_t id);

  int rank() const { return rank_; }
  int size() const { return size_; }
  double timeout() const { return timeout_; }
  uint64_t token() const { return token_; }
  bool same_host(const std::vector<int>& ranks) const;
  uint32_t next_id() { return next_id_++; }  // the same on all ranks, which make groups in one order

 private:
  struct Address {
    std::string ip;
    uint16_t port = 0;
    std::string host;  // what tells machines apart
  };
  void meet_as_first(const std::string& port);
  void meet_as_other(const std::string& host, const std::string& port);

  int rank_, size_;
  double timeout_;
  uint64_t token_ = 0;
  uint32_t next_id_ = 0;
  Socket listener_;
  std::vector<Address> addresses_;
  std::map<std::pair<uint32_t, int>, Socket> early_;  // connections for a later connect(), by id and rank
};

}  // namespace mainspring::tensor::parallel
