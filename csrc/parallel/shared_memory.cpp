// Ranks of one host: two slots of memory for each rank, used in turns.
//
// In round s a rank writes slot s % 2 and then its counter. It writes a slot again in round s + 2, and by then every
// rank has counted s + 1, which it does only after it has read all of round s: two slots need no further waiting.
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "transport.h"

namespace mainspring::tensor::parallel {
namespace {

constexpr size_t kSlot = 1 << 19;

struct alignas(64) Head {
  std::atomic<uint64_t> round;
  uint64_t fingerprint[2];
};

class SharedMemory final : public Transport {
 public:
  SharedMemory(const Mesh& mesh, const std::string& name, double timeout) : mesh_(mesh), timeout_(timeout) {
    const Deadline deadline(timeout);
    size_ = static_cast<size_t>(mesh.size());
    bytes_ = size_ * (sizeof(Head) + 2 * kSlot);
    char ready = 1;
    if (mesh.rank == 0) {
      open_segment(name, O_CREAT | O_EXCL | O_RDWR);
      for (int r = 1; r < mesh.size(); ++r) mesh.send(r, &ready, 1, deadline);
      try {
        for (int r = 1; r < mesh.size(); ++r) mesh.receive(r, &ready, 1, deadline);
      } catch (...) {
        shm_unlink(name.c_str());
        throw;
      }
      shm_unlink(name.c_str());  // it lives until the last rank has unmapped it
    } else {
      mesh.receive(0, &ready, 1, deadline);
      open_segment(name, O_RDWR);
      mesh.send(0, &ready, 1, deadline);
    }
  }
  ~SharedMemory() override {
    if (base_ != nullptr) munmap(base_, bytes_);
  }

  size_t capacity() const override { return kSlot; }

  void share(uint64_t fingerprint, const void* mine, size_t bytes, const std::vector<size_t>&, const Visit& visit) override {
    const size_t turn = begin(mine, bytes);
    finish(fingerprint, turn);
    for (size_t r = 0; r < size_; ++r) visit(static_cast<int>(r), slot(r, turn));
  }
  void scatter(uint64_t fingerprint, const void* pieces, size_t bytes, const Visit& visit) override {
    const size_t turn = begin(pieces, bytes * size_);
    finish(fingerprint, turn);
    for (size_t r = 0; r < size_; ++r) visit(static_cast<int>(r), slot(r, turn) + static_cast<size_t>(mesh_.rank) * bytes);
  }

 private:
  void open_segment(const std::string& name, int flags) {
    const int fd = shm_open(name.c_str(), flags, 0600);
    const bool sized = fd >= 0 && ((flags & O_CREAT) == 0 || ftruncate(fd, static_cast<off_t>(bytes_)) == 0);
    void* at = sized ? mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;
    const int problem = errno;
    if (fd >= 0) close(fd);
    if (at == MAP_FAILED)
      fail(ErrorKind::Communication, "cannot share ", static_cast<unsigned long>(bytes_), " bytes of memory: ", std::string(std::strerror(problem)));
    base_ = static_cast<char*>(at);  // fresh pages are zero: every counter starts at round 0
  }
  Head& head(size_t r) const { return *reinterpret_cast<Head*>(base_ + r * sizeof(Head)); }
  char* slot(size_t r, size_t turn) const { return base_ + size_ * sizeof(Head) + (2 * r + turn) * kSlot; }

  size_t begin(const void* mine, size_t bytes) {
    ++round_;
    const size_t turn = round_ % 2;
    if (bytes > 0) std::memcpy(slot(static_cast<size_t>(mesh_.rank), turn), mine, bytes);
    return turn;
  }
  void finish(uint64_t fingerprint, size_t turn) {
    Head& own = head(static_cast<size_t>(mesh_.rank));
    own.fingerprint[turn] = fingerprint;
    own.round.store(round_, std::memory_order_release);
    for (size_t r = 0; r < size_; ++r) {
      wait_for(r);
      if (head(r).fingerprint[turn] != fingerprint)
        fail(ErrorKind::Communication, "rank ", mesh_.names[r], " calls another collective, or with another size, than rank ",
             mesh_.names[static_cast<size_t>(mesh_.rank)]);
    }
  }
  // First eagerly, then giving the processor away, then asleep; with a look at the peers now and then.
  void wait_for(size_t r) const {
    const Head& other = head(r);
    auto there = [&] { return other.round.load(std::memory_order_acquire) >= round_; };
    for (int i = 0; i < 300; ++i) {
      if (there()) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    const Deadline deadline(timeout_);
    for (int64_t i = 0;; ++i) {
      if (there()) return;
      if (i < 2000) sched_yield();
      else std::this_thread::sleep_for(std::chrono::microseconds(100));
      if (i >= 2000 && i % 200 == 0) mesh_.check_alive();
      if (i % 64 == 0 && deadline.passed())
        fail(ErrorKind::Communication, "rank ", mesh_.names[r], " did not take part within ", timeout_, " seconds");
    }
  }

  const Mesh& mesh_;
  double timeout_;
  size_t size_ = 0, bytes_ = 0;
  char* base_ = nullptr;
  uint64_t round_ = 0;
};

}  // namespace

std::unique_ptr<Transport> make_shared_memory(const Mesh& mesh, const std::string& name, double timeout) {
  return std::make_unique<SharedMemory>(mesh, name, timeout);
}

}  // namespace mainspring::tensor::parallel
