#include "ops/einsum.h"

#include <algorithm>

namespace mainspring::tensor::ops {
namespace {

bool has(const std::string& labels, char c) { return labels.find(c) != std::string::npos; }

// Label i of an ellipsis, counted from its end: characters that no equation can name.
char dot(int i) { return static_cast<char>(1 + i); }

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == ',') parts.emplace_back();
    else parts.back() += c;
  }
  return parts;
}

void check_letters(const std::string& equation, const std::string& part) {
  for (size_t i = 0; i < part.size(); ++i) {
    if (part.compare(i, 3, "...") == 0) {
      i += 2;
      continue;
    }
    if (!std::isalpha(static_cast<unsigned char>(part[i])))
      fail(ErrorKind::Value, "einsum: '", std::string(1, part[i]), "' in the equation '", equation, "' is no letter");
  }
}

// "...ij" with `count` dimensions in the ellipsis, as labels.
std::string expand_dots(const std::string& part, int count) {
  const size_t at = part.find("...");
  if (at == std::string::npos) return part;
  std::string dots;
  for (int i = count - 1; i >= 0; --i) dots += dot(i);
  return part.substr(0, at) + dots + part.substr(at + 3);
}

}  // namespace

// Repeated labels of one operand become its diagonal.
Einsum::Labelled Einsum::parse_operand(const std::string& labels, const Tensor& x, int) {
  Labelled out = {x, labels};
  for (size_t i = 0; i < out.labels.size(); ++i) {
    const size_t other = out.labels.find(out.labels[i], i + 1);
    if (other == std::string::npos) continue;
    const int a = static_cast<int>(i), b = static_cast<int>(other);
    if (out.tensor.size(a) != out.tensor.size(b))
      fail(ErrorKind::Shape, "einsum: one label for the different sizes ", out.tensor.size(a), " and ", out.tensor.size(b), " of ", x);
    const char label = out.labels[i];
    out.tensor = Diagonal::forward(out.tensor, 0, a, b);
    out.labels.erase(other, 1);
    out.labels.erase(i, 1);
    out.labels += label;
    --i;
  }
  return out;
}

// The tensor with its dimensions in the order of `labels`; one that it lacks has size 1.
Tensor Einsum::arrange(const Labelled& x, const std::string& labels) {
  Dims order, shape;
  for (const char c : labels) {
    const size_t at = x.labels.find(c);
    if (at != std::string::npos) order.push_back(static_cast<int64_t>(at));
  }
  Tensor out = permute(x.tensor, order);
  int i = 0;
  for (const char c : labels) shape.push_back(has(x.labels, c) ? out.size(i++) : 1);
  return out.shape() == shape ? out : reshape(out, shape);
}

// Sums over the labels of both that nobody needs any more.
Einsum::Labelled Einsum::multiply(const Labelled& a, const Labelled& b, const std::string& needed) {
  std::string batch, left, right, summed;
  for (const char c : a.labels) (has(b.labels, c) ? (has(needed, c) ? batch : summed) : left) += c;
  for (const char c : b.labels)
    if (!has(a.labels, c)) right += c;
  auto size = [](const Labelled& x, char c) {
    const size_t at = x.labels.find(c);
    return at == std::string::npos ? 1 : x.tensor.size(static_cast<int>(at));
  };
  // A size of 1 stands against any other: such labels are multiplied element by element.
  bool broadcasts = !is_float(a.tensor.dtype());
  for (const char c : batch + summed) {
    const int64_t p = size(a, c), q = size(b, c);
    if (p != q && p != 1 && q != 1)
      fail(ErrorKind::Shape, "einsum: a label has size ", p, " in ", a.tensor, " and ", q, " in ", b.tensor);
    broadcasts |= p != q && has(summed, c);
  }
  if (broadcasts || summed.empty()) {
    const std::string all = batch + left + right + summed;
    Tensor out = mul(arrange(a, all), arrange(b, all));
    Dims dims;
    for (size_t i = 0; i < summed.size(); ++i) dims.push_back(static_cast<int64_t>(all.size() - 1 - i));
    if (dims.size() > 0) out = sum(out, dims, false);
    return {out, batch + left + right};
  }
  const Tensor x = arrange(a, batch + left + summed), y = arrange(b, batch + summed + right);
  const int nb = static_cast<int>(batch.size()), ns = static_cast<int>(summed.size());
  const Dims before(x->sizes, nb), rows(x->sizes + nb, static_cast<int>(left.size()));
  const Dims depth(y->sizes + nb, ns), cols(y->sizes + nb + ns, static_cast<int>(right.size()));
  Dims p = before, q(y->sizes, nb);
  p.push_back(rows.product());
  p.push_back(depth.product());
  q.push_back(depth.product());
  q.push_back(cols.product());
  const Tensor product = BatchedMatmul::forward(reshape(x, p), reshape(y, q));
  Dims shape(product->sizes, nb);
  for (const int64_t n : rows) shape.push_back(n);
  for (const int64_t n : cols) shape.push_back(n);
  return {reshape(product, shape), batch + left + right};
}

Tensor Einsum::forward(const std::string& given, const std::vector<Tensor>& operands) {
  std::string equation = given;
  std::erase(equation, ' ');
  const size_t arrow = equation.find("->");
  const std::vector<std::string> parts = split(equation.substr(0, arrow));
  if (parts.size() != operands.size())
    fail(ErrorKind::Value, "einsum: '", given, "' names ", parts.size(), " operands, ", operands.size(), " were given");
  int ellipsis = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    check_letters(given, parts[i]);
    const bool dots = parts[i].find("...") != std::string::npos;
    const int named = static_cast<int>(parts[i].size()) - (dots ? 3 : 0);
    if (operands[i].ndim() < named || (!dots && operands[i].ndim() > named))
      fail(ErrorKind::Shape, "einsum: '", parts[i], "' does not fit ", operands[i]);
    if (dots) ellipsis = std::max(ellipsis, operands[i].ndim() - named);
  }
  std::vector<Labelled> terms;
  std::string all, output;
  for (size_t i = 0; i < parts.size(); ++i) {
    const bool dots = parts[i].find("...") != std::string::npos;
    const int own = operands[i].ndim() - static_cast<int>(parts[i].size()) + 3;
    const std::string labels = expand_dots(parts[i], dots ? own : 0);
    all += labels;
    terms.push_back(parse_operand(labels, operands[i], ellipsis));
  }
  if (arrow == std::string::npos) {  // the labels that stand once, in order, behind the ellipsis
    output = expand_dots("...", ellipsis);
    std::string letters = all;
    std::sort(letters.begin(), letters.end());
    for (const char c : letters)
      if (std::isalpha(static_cast<unsigned char>(c)) && std::count(all.begin(), all.end(), c) == 1) output += c;
  } else {
    const std::string behind = equation.substr(arrow + 2);
    check_letters(given, behind);
    output = expand_dots(behind, ellipsis);
    for (size_t i = 0; i < output.size(); ++i)
      if (!has(all, output[i]) || has(output.substr(i + 1), output[i]))
        fail(ErrorKind::Value, "einsum: the output of '", given, "' holds a label that no operand has, or one twice");
  }
  // A label of one operand alone, not in the output, is summed at once.
  auto reduce_own = [&](Labelled& x, size_t index) {
    Dims dims;
    std::string kept;
    for (size_t d = 0; d < x.labels.size(); ++d) {
      bool wanted = has(output, x.labels[d]);
      for (size_t j = index + 1; j < terms.size(); ++j) wanted |= has(terms[j].labels, x.labels[d]);
      if (wanted) kept += x.labels[d];
      else dims.push_back(static_cast<int64_t>(d));
    }
    if (dims.size() > 0) x = {sum(x.tensor, dims, false), kept};
  };
  Labelled result = terms[0];
  reduce_own(result, 0);
  for (size_t i = 1; i < terms.size(); ++i) {
    std::string needed = output;
    for (size_t j = i + 1; j < terms.size(); ++j) needed += terms[j].labels;
    Labelled term = terms[i];
    Dims dims;
    std::string kept;
    for (size_t d = 0; d < term.labels.size(); ++d) {
      if (has(needed, term.labels[d]) || has(result.labels, term.labels[d])) kept += term.labels[d];
      else dims.push_back(static_cast<int64_t>(d));
    }
    if (dims.size() > 0) term = {sum(term.tensor, dims, false), kept};
    result = multiply(result, term, needed);
    reduce_own(result, i);
  }
  DType t = operands[0].dtype();
  for (const Tensor& x : operands) t = promote(t, x.dtype());
  const Tensor out = arrange(result, output);
  return is_float(t) ? out : cast(out, t);  // sums of integers are wider
}

}  // namespace mainspring::tensor::ops
