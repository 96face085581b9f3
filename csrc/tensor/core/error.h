// Errors of the framework. The bindings turn each kind into its Python class.
#pragma once

#include <stdexcept>
#include <string>

namespace mainspring::tensor {

enum class ErrorKind { Shape, DType, Index, Value, Autograd, Communication };

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind(kind) {}
  ErrorKind kind;
};

inline void append(std::string& out, const char* part) { out += part; }
inline void append(std::string& out, const std::string& part) { out += part; }
inline void append(std::string& out, long long part) { out += std::to_string(part); }
inline void append(std::string& out, long part) { out += std::to_string(part); }
inline void append(std::string& out, int part) { out += std::to_string(part); }
inline void append(std::string& out, unsigned part) { out += std::to_string(part); }
inline void append(std::string& out, unsigned long part) { out += std::to_string(part); }
inline void append(std::string& out, double part) { out += std::to_string(part); }

template <class... Parts>
std::string text(const Parts&... parts) {
  std::string out;
  (append(out, parts), ...);
  return out;
}

template <class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void fail(ErrorKind kind, const Parts&... parts) {
  throw Error(kind, text(parts...));
}

}  // namespace mainspring::tensor
