// Ranks of several hosts: every rank sends to every other directly, all connections at once.
#include <cstring>

#include "transport.h"

namespace mainspring::tensor::parallel {
namespace {

class Tcp final : public Transport {
 public:
  Tcp(const Mesh& mesh, double timeout) : mesh_(mesh), timeout_(timeout) {}
  size_t capacity() const override { return 4 << 20; }

  void share(uint64_t fingerprint, const void* mine, size_t bytes, const std::vector<size_t>& all, const Visit& visit) override {
    agree(fingerprint);
    std::vector<size_t> starts(all.size());
    size_t total = 0;
    for (size_t r = 0; r < all.size(); ++r) {
      starts[r] = total;
      total += all[r];
    }
    received_.resize(total);
    std::vector<Mesh::Piece> pieces(all.size());
    for (size_t r = 0; r < all.size(); ++r)
      pieces[r] = {static_cast<const char*>(mine), bytes, received_.data() + starts[r], all[r]};
    mesh_.exchange(pieces, Deadline(timeout_));
    for (size_t r = 0; r < all.size(); ++r) {
      const bool own = static_cast<int>(r) == mesh_.rank;
      visit(static_cast<int>(r), own ? static_cast<const char*>(mine) : received_.data() + starts[r]);
    }
  }
  void scatter(uint64_t fingerprint, const void* given, size_t bytes, const Visit& visit) override {
    agree(fingerprint);
    const size_t size = static_cast<size_t>(mesh_.size());
    received_.resize(bytes * size);
    std::vector<Mesh::Piece> pieces(size);
    const char* from = static_cast<const char*>(given);
    for (size_t r = 0; r < size; ++r) pieces[r] = {from + r * bytes, bytes, received_.data() + r * bytes, bytes};
    mesh_.exchange(pieces, Deadline(timeout_));
    for (size_t r = 0; r < size; ++r)
      visit(static_cast<int>(r), static_cast<int>(r) == mesh_.rank ? from + r * bytes : received_.data() + r * bytes);
  }

 private:
  void agree(uint64_t fingerprint) {
    const size_t size = static_cast<size_t>(mesh_.size());
    std::vector<uint64_t> theirs(size, fingerprint);
    std::vector<Mesh::Piece> pieces(size);
    for (size_t r = 0; r < size; ++r)
      pieces[r] = {reinterpret_cast<const char*>(&fingerprint), sizeof fingerprint, reinterpret_cast<char*>(&theirs[r]), sizeof(uint64_t)};
    mesh_.exchange(pieces, Deadline(timeout_));
    for (size_t r = 0; r < size; ++r)
      if (theirs[r] != fingerprint)
        fail(ErrorKind::Communication, "rank ", mesh_.names[r], " calls another collective, or with another size, than rank ",
             mesh_.names[static_cast<size_t>(mesh_.rank)]);
  }

  const Mesh& mesh_;
  double timeout_;
  std::vector<char> received_;
};

}  // namespace

std::unique_ptr<Transport> make_tcp(const Mesh& mesh, double timeout) { return std::make_unique<Tcp>(mesh, timeout); }

}  // namespace mainspring::tensor::parallel
