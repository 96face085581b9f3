// The element types, and which type the result of two operands has.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace mainspring::tensor {

// Ordered so that, within one category, the larger value is the wider type.
enum class DType : uint8_t { Bool, UInt8, Int32, Int64, BFloat16, Float32, Float64 };
constexpr int kNumDTypes = 7;

enum class Category : uint8_t { Bool, Integer, Float };

struct DTypeInfo {
  const char* name;
  int itemsize;
  Category category;
};

inline constexpr DTypeInfo kDTypes[kNumDTypes] = {
    {"bool", 1, Category::Bool},     {"uint8", 1, Category::Integer},  {"int32", 4, Category::Integer},
    {"int64", 8, Category::Integer}, {"bfloat16", 2, Category::Float}, {"float32", 4, Category::Float},
    {"float64", 8, Category::Float},
};

constexpr const DTypeInfo& info(DType t) { return kDTypes[static_cast<int>(t)]; }
constexpr const char* name(DType t) { return info(t).name; }
constexpr int itemsize(DType t) { return info(t).itemsize; }
constexpr bool is_float(DType t) { return info(t).category == Category::Float; }

constexpr DType promote(DType a, DType b) { return a > b ? a : b; }  // uint8 < int32 < int64 < floats, as in torch

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// To nearest even; NaN stays NaN.
inline BFloat16 to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((bits | 0x400000u) >> 16)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// Calls body.operator()<T>() with the C++ type of `t`; bool is stored as uint8_t holding 0 or 1.
template <class Body>
decltype(auto) with_type(DType t, Body&& body) {
  switch (t) {
    case DType::Bool:
    case DType::UInt8: return body.template operator()<uint8_t>();
    case DType::Int32: return body.template operator()<int32_t>();
    case DType::Int64: return body.template operator()<int64_t>();
    case DType::BFloat16: return body.template operator()<BFloat16>();
    case DType::Float32: return body.template operator()<float>();
    default: return body.template operator()<double>();
  }
}

// One element as double or int64 and back, for scalars and printing.
double read_double(const void* p, DType t);
int64_t read_int(const void* p, DType t);
void write_double(void* p, DType t, double value);
void write_int(void* p, DType t, int64_t value);

}  // namespace mainspring::tensor
