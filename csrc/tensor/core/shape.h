// A short list of sizes, strides or dimensions, held in place.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/error.h"

namespace mainspring::tensor {

constexpr int kMaxDims = 8;

class Dims {
 public:
  Dims() = default;
  Dims(std::initializer_list<int64_t> values) {
    for (int64_t v : values) push_back(v);
  }
  Dims(const int64_t* values, int count) : count_(count) {
    for (int i = 0; i < count; ++i) values_[i] = values[i];
  }
  Dims(const Dims& other) : Dims(other.values_, other.count_) {}
  Dims& operator=(const Dims& other) {
    count_ = other.count_;
    for (int i = 0; i < count_; ++i) values_[i] = other.values_[i];
    return *this;
  }

  int size() const { return count_; }
  int64_t operator[](int i) const { return values_[i]; }
  int64_t& operator[](int i) { return values_[i]; }
  const int64_t* begin() const { return values_; }
  const int64_t* end() const { return values_ + count_; }
  int64_t* data() { return values_; }
  void resize(int count) { count_ = count; }

  void push_back(int64_t value) {
    if (count_ == kMaxDims) fail(ErrorKind::Shape, "a tensor has at most ", kMaxDims, " dimensions");
    values_[count_++] = value;
  }
  void insert(int at, int64_t value) {
    push_back(value);
    for (int i = count_ - 1; i > at; --i) values_[i] = values_[i - 1];
    values_[at] = value;
  }
  void erase(int at) {
    for (int i = at; i + 1 < count_; ++i) values_[i] = values_[i + 1];
    --count_;
  }

  int64_t product() const {
    int64_t n = 1;
    for (int i = 0; i < count_; ++i) n *= values_[i];
    return n;
  }

  friend bool operator==(const Dims& a, const Dims& b) {
    if (a.count_ != b.count_) return false;
    for (int i = 0; i < a.count_; ++i)
      if (a.values_[i] != b.values_[i]) return false;
    return true;
  }

 private:
  int count_ = 0;
  int64_t values_[kMaxDims];
};

std::string to_string(const Dims& dims);  // "[2, 3]"
inline void append(std::string& out, const Dims& dims) { out += to_string(dims); }

// The shape that both broadcast to; `op` is named in the error.
Dims broadcast_shapes(const char* op, const Dims& a, const Dims& b);

// dim in [-ndim, ndim) to [0, ndim); a zero-dimensional tensor counts as one-dimensional.
int wrap_dim(const char* op, int64_t dim, int ndim);

Dims contiguous_strides(const Dims& shape);

}  // namespace mainspring::tensor
