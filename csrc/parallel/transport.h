// How the ranks of a group show each other their bytes: through memory that they share, or through TCP.
//
// Both primitives are collective. A call carries a fingerprint (which collective, how many bytes): where ranks
// disagree, each gets an error instead of somebody else's bytes.
#pragma once

#include <functional>

#include "sockets.h"

namespace mainspring::tensor::parallel {

using Visit = std::function<void(int rank, const char* data)>;

class Transport {
 public:
  virtual ~Transport() = default;
  virtual size_t capacity() const = 0;  // of bytes that one call may take from a rank
  // Everyone's bytes to everyone; visit(rank, bytes) is called in the order of ranks, this one included. A rank that
  // nobody needs to hear may give 0 bytes.
  virtual void share(uint64_t fingerprint, const void* mine, size_t bytes, const std::vector<size_t>& all, const Visit& visit) = 0;
  // Piece r of `pieces` to rank r; visit(rank, its piece for this rank) in the order of ranks.
  virtual void scatter(uint64_t fingerprint, const void* pieces, size_t bytes, const Visit& visit) = 0;
};

std::unique_ptr<Transport> make_shared_memory(const Mesh& mesh, const std::string& name, double timeout);
std::unique_ptr<Transport> make_tcp(const Mesh& mesh, double timeout);

}  // namespace mainspring::tensor::parallel
