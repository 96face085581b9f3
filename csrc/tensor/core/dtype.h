// The element types, and which type the result of two operands has.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace mainspring::tensor {

// Ordered so that, within one category, the larger value is the wider type.
enum class DType : uint8_t { Bool, UInt8, Int8, Int16, Int32, Int64, Float16, BFloat16, Float32, Float64 };
constexpr int kNumDTypes = 10;

enum class Category : uint8_t { Bool, Integer, Float };

struct DTypeInfo {
  const char* name;
  int itemsize;
  Category category;
};

inline constexpr DTypeInfo kDTypes[kNumDTypes] = {
    {"bool", 1, Category::Bool},     {"uint8", 1, Category::Integer},  {"int8", 1, Category::Integer},
    {"int16", 2, Category::Integer}, {"int32", 4, Category::Integer},  {"int64", 8, Category::Integer},
    {"float16", 2, Category::Float}, {"bfloat16", 2, Category::Float}, {"float32", 4, Category::Float},
    {"float64", 8, Category::Float},
};

constexpr const DTypeInfo& info(DType t) { return kDTypes[static_cast<int>(t)]; }
constexpr const char* name(DType t) { return info(t).name; }
constexpr int itemsize(DType t) { return info(t).itemsize; }
constexpr bool is_float(DType t) { return info(t).category == Category::Float; }

constexpr bool is_half(DType t) { return t == DType::Float16 || t == DType::BFloat16; }

// The least type that holds both, as in PyTorch: of two that do not hold each other, the next wider one.
constexpr DType promote(DType a, DType b) {
  const DType low = a < b ? a : b, high = a < b ? b : a;
  if (low == DType::UInt8 && high == DType::Int8) return DType::Int16;
  if (low == DType::Float16 && high == DType::BFloat16) return DType::Float32;
  return high;
}

struct Float16 {  // IEEE 754 binary16
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Always inlined: the loops of wider instruction sets use these too, and must not emit functions of their own.
#define MAINSPRING_INLINE inline __attribute__((always_inline))

MAINSPRING_INLINE float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // The exponent is moved by a product, which is right for subnormal numbers too.
  const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

// To nearest even; beyond 65504 infinity; NaN stays NaN.
MAINSPRING_INLINE Float16 to_float16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u;
  const float size = std::bit_cast<float>(bits & 0x7fffffffu);
  if (x != x) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (size < 0x1p-14f)  // subnormal: adding 2^10 ulp leaves the rounded count of units of 2^-24 in the low bits
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(size + 0.5f) - 0x3f000000u))};
  const uint32_t magnitude = (bits & 0x7fffffffu) - 0x38000000u;  // the exponent's bias goes from 127 to 15
  return {static_cast<uint16_t>(sign | (magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13)};
}

inline float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// To nearest even; NaN stays NaN.
inline BFloat16 to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((bits | 0x400000u) >> 16)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <class T>
constexpr bool kIsHalf = std::is_same_v<T, Float16> || std::is_same_v<T, BFloat16>;

// The value to compute with, and back.
template <class T>
auto value_of(T x) {
  if constexpr (kIsHalf<T>) return to_float(x);
  else return x;
}
template <class T, class Value>
T from_value(Value x) {
  if constexpr (std::is_same_v<T, Float16>) return to_float16(static_cast<float>(x));
  else if constexpr (std::is_same_v<T, BFloat16>) return to_bfloat16(static_cast<float>(x));
  else if constexpr (std::is_integral_v<T> && std::is_floating_point_v<Value>)
    return static_cast<T>(static_cast<int64_t>(x));
  else return static_cast<T>(x);
}

// Calls body.operator()<T>() with the C++ type of `t`; bool is stored as uint8_t holding 0 or 1.
template <class Body>
decltype(auto) with_type(DType t, Body&& body) {
  switch (t) {
    case DType::Bool:
    case DType::UInt8: return body.template operator()<uint8_t>();
    case DType::Int8: return body.template operator()<int8_t>();
    case DType::Int16: return body.template operator()<int16_t>();
    case DType::Int32: return body.template operator()<int32_t>();
    case DType::Int64: return body.template operator()<int64_t>();
    case DType::Float16: return body.template operator()<Float16>();
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
