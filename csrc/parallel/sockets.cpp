#include "sockets.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <thread>

namespace mainspring::tensor::parallel {
namespace {

constexpr uint32_t kMagic = 0x4d53504c;

[[noreturn]] void lost(int rank, const char* what) {
  fail(ErrorKind::Communication, "rank ", rank, " ", what);
}

void prepare(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
  fcntl(fd, F_SETFD, FD_CLOEXEC);
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

struct Resolved {
  addrinfo* list = nullptr;
  Resolved(const std::string& host, const std::string& port) {
    addrinfo hints = {};
    hints.ai_family = AF_INET;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = host.empty() ? AI_PASSIVE : 0;
    if (getaddrinfo(host.empty() ? nullptr : host.c_str(), port.c_str(), &hints, &list) != 0 || list == nullptr)
      fail(ErrorKind::Communication, "cannot resolve ", host, ":", port);
  }
  ~Resolved() { freeaddrinfo(list); }
};

Socket listen_on(const std::string& port) {
  const Resolved at("", port);
  Socket s(socket(AF_INET, SOCK_STREAM, 0));
  const int on = 1;
  setsockopt(s.fd(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (!s.open() || bind(s.fd(), at.list->ai_addr, at.list->ai_addrlen) != 0 || listen(s.fd(), 1024) != 0)
    fail(ErrorKind::Communication, "cannot listen on port ", port, ": ", std::string(std::strerror(errno)));
  prepare(s.fd());
  return s;
}

uint16_t port_of(const Socket& s) {
  sockaddr_in at = {};
  socklen_t size = sizeof at;
  getsockname(s.fd(), reinterpret_cast<sockaddr*>(&at), &size);
  return ntohs(at.sin_port);
}

Socket connect_to(const std::string& host, const std::string& port, const Deadline& deadline) {
  const Resolved at(host, port);
  while (true) {
    Socket s(socket(AF_INET, SOCK_STREAM, 0));
    if (connect(s.fd(), at.list->ai_addr, at.list->ai_addrlen) == 0) {
      prepare(s.fd());
      return s;
    }
    if (deadline.passed())
      fail(ErrorKind::Communication, "nobody listened on ", host, ":", port, " for ", deadline.seconds(), " seconds");
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

Socket accept_from(const Socket& listener, const Deadline& deadline, std::string* ip) {
  while (true) {
    pollfd p = {listener.fd(), POLLIN, 0};
    poll(&p, 1, deadline.poll_milliseconds());
    sockaddr_in from = {};
    socklen_t size = sizeof from;
    Socket s(accept(listener.fd(), reinterpret_cast<sockaddr*>(&from), &size));
    if (s.open()) {
      prepare(s.fd());
      char text[INET_ADDRSTRLEN];
      if (ip != nullptr) *ip = inet_ntop(AF_INET, &from.sin_addr, text, sizeof text);
      return s;
    }
    if (deadline.passed())
      fail(ErrorKind::Communication, "a rank did not connect within ", deadline.seconds(), " seconds");
  }
}

bool would_block() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

void send_all(int fd, int rank, const char* data, size_t bytes, const Deadline& deadline) {
  while (bytes > 0) {
    const ssize_t n = ::send(fd, data, bytes, MSG_NOSIGNAL);
    if (n > 0) {
      data += n;
      bytes -= static_cast<size_t>(n);
    } else if (!would_block()) {
      lost(rank, "is gone");
    } else if (deadline.passed()) {
      lost(rank, "took nothing before the time-out");
    } else {
      pollfd p = {fd, POLLOUT, 0};
      poll(&p, 1, deadline.poll_milliseconds());
    }
  }
}

void receive_all(int fd, int rank, char* data, size_t bytes, const Deadline& deadline) {
  while (bytes > 0) {
    const ssize_t n = ::recv(fd, data, bytes, 0);
    if (n > 0) {
      data += n;
      bytes -= static_cast<size_t>(n);
    } else if (n == 0 || !would_block()) {
      lost(rank, "is gone");
    } else if (deadline.passed()) {
      lost(rank, "sent nothing before the time-out");
    } else {
      pollfd p = {fd, POLLIN, 0};
      poll(&p, 1, deadline.poll_milliseconds());
    }
  }
}

// The machine's own identity: the host's name alone may be shared by containers of different machines.
std::string host_identity() {
  char name[256] = {};
  gethostname(name, sizeof name - 1);
  std::string out = name;
  if (FILE* f = std::fopen("/proc/sys/kernel/random/boot_id", "r")) {
    char id[64] = {};
    if (std::fgets(id, sizeof id, f) != nullptr) out += std::string("/") + id;
    std::fclose(f);
  }
  return out;
}

struct Hello {
  uint32_t magic = kMagic;
  int32_t rank = 0, size = 0;
  uint16_t port = 0;
  char host[300] = {};
};
struct Entry {
  char ip[INET_ADDRSTRLEN] = {};
  uint16_t port = 0;
  char host[300] = {};
};
struct Greeting {
  uint64_t token = 0;
  uint32_t id = 0;
  int32_t rank = 0;
};

}  // namespace

int Deadline::poll_milliseconds() const {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end_ - Clock::now()).count();
  return static_cast<int>(left < 1 ? 1 : left > 100 ? 100 : left);
}

Socket::~Socket() {
  if (fd_ >= 0) close(fd_);
}

void Mesh::send(int to, const void* data, size_t bytes, const Deadline& deadline) const {
  send_all(peers[static_cast<size_t>(to)].fd(), names[static_cast<size_t>(to)], static_cast<const char*>(data), bytes, deadline);
}
void Mesh::receive(int from, void* data, size_t bytes, const Deadline& deadline) const {
  receive_all(peers[static_cast<size_t>(from)].fd(), names[static_cast<size_t>(from)], static_cast<char*>(data), bytes, deadline);
}

void Mesh::exchange(const std::vector<Piece>& pieces, const Deadline& deadline) const {
  std::vector<Piece> left = pieces;
  left[static_cast<size_t>(rank)] = {};
  std::vector<pollfd> waiting;
  std::vector<size_t> who;
  while (true) {
    waiting.clear();
    who.clear();
    for (size_t r = 0; r < left.size(); ++r) {
      Piece& p = left[r];
      const int fd = peers[r].fd();
      while (p.out_bytes > 0) {
        const ssize_t n = ::send(fd, p.out, p.out_bytes, MSG_NOSIGNAL);
        if (n <= 0) {
          if (!would_block()) lost(names[r], "is gone");
          break;
        }
        p.out += n;
        p.out_bytes -= static_cast<size_t>(n);
      }
      while (p.in_bytes > 0) {
        const ssize_t n = ::recv(fd, p.in, p.in_bytes, 0);
        if (n <= 0) {
          if (n == 0 || !would_block()) lost(names[r], "is gone");
          break;
        }
        p.in += n;
        p.in_bytes -= static_cast<size_t>(n);
      }
      if (p.out_bytes == 0 && p.in_bytes == 0) continue;
      waiting.push_back({fd, static_cast<short>((p.out_bytes ? POLLOUT : 0) | (p.in_bytes ? POLLIN : 0)), 0});
      who.push_back(r);
    }
    if (waiting.empty()) return;
    if (deadline.passed()) lost(names[who[0]], "did not take part before the time-out");
    poll(waiting.data(), waiting.size(), deadline.poll_milliseconds());
  }
}

void Mesh::check_alive() const {
  for (size_t r = 0; r < peers.size(); ++r) {
    if (!peers[r].open()) continue;
    pollfd p = {peers[r].fd(), POLLRDHUP, 0};
    if (poll(&p, 1, 0) > 0 && (p.revents & (POLLRDHUP | POLLHUP | POLLERR))) lost(names[r], "is gone");
  }
}

World::World(int rank, int size, const std::string& address, double timeout) : rank_(rank), size_(size), timeout_(timeout) {
  if (size < 1 || rank < 0 || rank >= size) fail(ErrorKind::Value, "rank ", rank, " does not lie in a world of ", size);
  if (!(timeout > 0)) fail(ErrorKind::Value, "the time-out is ", timeout, " seconds; it must be positive");
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos) fail(ErrorKind::Value, "the address '", address, "' is not host:port");
  addresses_.resize(static_cast<size_t>(size));
  const std::string host = address.substr(0, colon), port = address.substr(colon + 1);
  if (size == 1) return;
  if (rank == 0) meet_as_first(port);
  else meet_as_other(host, port);
}

void World::meet_as_first(const std::string& port) {
  const Deadline deadline(timeout_);
  const Socket door = listen_on(port);
  listener_ = listen_on("0");
  if (getrandom(&token_, sizeof token_, 0) != static_cast<ssize_t>(sizeof token_)) fail(ErrorKind::Communication, "no random numbers");
  std::vector<Socket> others(static_cast<size_t>(size_));
  addresses_[0] = {"", port_of(listener_), host_identity()};
  for (int i = 1; i < size_; ++i) {
    std::string ip;
    Socket s = accept_from(door, deadline, &ip);
    Hello hello;
    receive_all(s.fd(), -1, reinterpret_cast<char*>(&hello), sizeof hello, deadline);
    if (hello.magic != kMagic || hello.size != size_ || hello.rank < 1 || hello.rank >= size_ ||
        others[static_cast<size_t>(hello.rank)].open())
      fail(ErrorKind::Communication, "rank ", hello.rank, " of ", hello.size, " came to a meeting of ", size_, " different ranks");
    hello.host[sizeof hello.host - 1] = 0;
    addresses_[static_cast<size_t>(hello.rank)] = {ip, hello.port, hello.host};
    others[static_cast<size_t>(hello.rank)] = std::move(s);
  }
  std::vector<Entry> table(static_cast<size_t>(size_));
  for (size_t r = 0; r < table.size(); ++r) {
    std::snprintf(table[r].ip, sizeof table[r].ip, "%s", addresses_[r].ip.c_str());
    std::snprintf(table[r].host, sizeof table[r].host, "%s", addresses_[r].host.c_str());
    table[r].port = addresses_[r].port;
  }
  for (int r = 1; r < size_; ++r) {
    const int fd = others[static_cast<size_t>(r)].fd();
    send_all(fd, r, reinterpret_cast<const char*>(&token_), sizeof token_, deadline);
    send_all(fd, r, reinterpret_cast<const char*>(table.data()), table.size() * sizeof(Entry), deadline);
  }
}

void World::meet_as_other(const std::string& host, const std::string& port) {
  const Deadline deadline(timeout_);
  listener_ = listen_on("0");
  const Socket s = connect_to(host, port, deadline);
  Hello hello;
  hello.rank = rank_;
  hello.size = size_;
  hello.port = port_of(listener_);
  std::snprintf(hello.host, sizeof hello.host, "%s", host_identity().c_str());
  send_all(s.fd(), 0, reinterpret_cast<const char*>(&hello), sizeof hello, deadline);
  std::vector<Entry> table(static_cast<size_t>(size_));
  receive_all(s.fd(), 0, reinterpret_cast<char*>(&token_), sizeof token_, deadline);
  receive_all(s.fd(), 0, reinterpret_cast<char*>(table.data()), table.size() * sizeof(Entry), deadline);
  for (size_t r = 0; r < table.size(); ++r) addresses_[r] = {r == 0 ? host : table[r].ip, table[r].port, table[r].host};
}

bool World::same_host(const std::vector<int>& ranks) const {
  for (const int r : ranks)
    if (addresses_[static_cast<size_t>(r)].host != addresses_[static_cast<size_t>(ranks[0])].host) return false;
  return true;
}

Mesh World::connect(const std::vector<int>& ranks, uint32_t id) {
  const Deadline deadline(timeout_);
  Mesh mesh;
  mesh.names = ranks;
  mesh.peers.resize(ranks.size());
  for (size_t i = 0; i < ranks.size(); ++i)
    if (ranks[i] == rank_) mesh.rank = static_cast<int>(i);
  for (int i = 0; i < mesh.rank; ++i) {
    const Address& to = addresses_[static_cast<size_t>(ranks[static_cast<size_t>(i)])];
    Socket s = connect_to(to.ip, std::to_string(to.port), deadline);
    const Greeting greeting = {token_, id, rank_};
    send_all(s.fd(), ranks[static_cast<size_t>(i)], reinterpret_cast<const char*>(&greeting), sizeof greeting, deadline);
    mesh.peers[static_cast<size_t>(i)] = std::move(s);
  }
  for (size_t i = static_cast<size_t>(mesh.rank) + 1; i < ranks.size(); ++i) {
    while (early_.find({id, ranks[i]}) == early_.end()) {
      Socket s = accept_from(listener_, deadline, nullptr);
      Greeting greeting;
      receive_all(s.fd(), -1, reinterpret_cast<char*>(&greeting), sizeof greeting, deadline);
      if (greeting.token == token_) early_.emplace(std::pair(greeting.id, static_cast<int>(greeting.rank)), std::move(s));
    }
    auto found = early_.find({id, ranks[i]});
    mesh.peers[i] = std::move(found->second);
    early_.erase(found);
  }
  return mesh;
}

}  // namespace mainspring::tensor::parallel
