// Writes in place: recorded by no tape, refused where a tape would need them, counted by the version.
#pragma once

#include "ops/elementwise.h"

namespace mainspring::tensor::ops {

inline Tensor write_in_place(BinaryKernel kernel, const char* op, const Tensor& x, const Tensor& other) {
  check_in_place(op, x);
  check_in_place(op, other);
  binary_in_place(kernel, op, x, other);
  return x;
}

struct AddInPlace {
  static constexpr auto name = "add_";
  static Tensor forward(const Tensor& x, const Tensor& other) { return write_in_place(BinaryKernel::Add, name, x, other); }
};
struct SubInPlace {
  static constexpr auto name = "sub_";
  static Tensor forward(const Tensor& x, const Tensor& other) { return write_in_place(BinaryKernel::Sub, name, x, other); }
};
struct MulInPlace {
  static constexpr auto name = "mul_";
  static Tensor forward(const Tensor& x, const Tensor& other) { return write_in_place(BinaryKernel::Mul, name, x, other); }
};
struct DivInPlace {
  static constexpr auto name = "div_";
  static Tensor forward(const Tensor& x, const Tensor& other) { return write_in_place(BinaryKernel::Div, name, x, other); }
};
struct CopyInPlace {
  static constexpr auto name = "copy_";
  static Tensor forward(const Tensor& x, const Tensor& other) {
    check_in_place(name, x);
    check_in_place(name, other);
    if (!(broadcast_shapes(name, x.shape(), other.shape()) == x.shape()))
      fail(ErrorKind::Shape, "copy_: ", other, " does not fit into ", x);
    // Views of one storage may overlap: then the source is read whole first.
    copy_into(x, other->storage == x->storage ? copy_of(other) : other);
    x.bump_version();
    return x;
  }
};
struct FillInPlace {
  static constexpr auto name = "fill_";
  static Tensor forward(const Tensor& x, double value) {
    check_in_place(name, x);
    copy_into(x, full({}, value, x.dtype()));
    x.bump_version();
    return x;
  }
};
struct ZeroInPlace {
  static constexpr auto name = "zero_";
  static Tensor forward(const Tensor& x) { return FillInPlace::forward(x, 0); }
};

}  // namespace mainspring::tensor::ops
