// Einstein's summation: "bij,bjk->bik". Two operands at a time become one batched matrix product.
#pragma once

#include <string>

#include "ops/matmul.h"

namespace mainspring::tensor::ops {

struct Einsum {
  static constexpr auto name = "einsum";

  static Tensor forward(const std::string& equation, const std::vector<Tensor>& operands);

 private:
  // A tensor whose dimensions carry labels; '.' and below stand for the dimensions of an ellipsis.
  struct Labelled {
    Tensor tensor;
    std::string labels;
  };
  static Labelled parse_operand(const std::string& labels, const Tensor& x, int ellipsis);
  static Labelled multiply(const Labelled& a, const Labelled& b, const std::string& needed);
  static Tensor arrange(const Labelled& x, const std::string& labels);
};

}  // namespace mainspring::tensor::ops
