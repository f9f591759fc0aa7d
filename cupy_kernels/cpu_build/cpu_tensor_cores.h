// Models of what tensor cores and special function units compute, exact to the bit, and of the instructions of a warp
// that feed them.
//
// simattn/arithmetic has the same models, and their sources. The build makes special_functions.h of its tables.
#pragma once

#include "cpu_device.h"

namespace cpu {

// How ex2 makes integer and fraction of a negative number of its magnitude.
enum class Reduction { complement, negative, floor };

#include "special_functions.h"

// A number of a 16-bit format as a product's factor: significand * 2^(exponent - FRACTION_BITS). Subnormal numbers have
// the exponent of the smallest normal one.
struct Factor {
  int significand, exponent;
  bool infinite, nan;
};

template <int EXPONENT_BITS>
inline Factor factor_of(unsigned short bits) {
  constexpr int FRACTION_BITS = 15 - EXPONENT_BITS, BIAS = (1 << (EXPONENT_BITS - 1)) - 1;
  const int field = bits >> FRACTION_BITS & ((1 << EXPONENT_BITS) - 1), fraction = bits & ((1 << FRACTION_BITS) - 1);
  const bool special = field == (1 << EXPONENT_BITS) - 1;
  const int significand = field ? fraction | 1 << FRACTION_BITS : fraction;
  return {bits >> 15 ? -significand : significand, max(field, 1) - BIAS, special && !fraction, special && fraction};
}

template <class Stored>
struct Format;

template <>
struct Format<float16> {
  static constexpr int FRACTION_BITS = 10;
  static Factor factor(unsigned short bits) { return factor_of<5>(bits); }
};

template <>
struct Format<bfloat16> {
  static constexpr int FRACTION_BITS = 7;
  static Factor factor(unsigned short bits) { return factor_of<8>(bits); }
};

constexpr unsigned NAN_BITS = 0x7fffffff;
constexpr int DEPTH = 16;              // products in one fused dot-add
constexpr int TERM_BITS = 25;          // that a term keeps below the highest exponent
constexpr int LOWEST_EXPONENT = -133;  // floor of the highest exponent

// A fused dot-add with Inf or NaN among its terms.
inline float dot_add_special(float sum, const Factor (&a)[DEPTH], const Factor (&b)[DEPTH]) {
  const bool unlimited = (__float_as_uint(sum) & 0x7f800000u) == 0x7f800000u;
  bool nan = sum != sum, plus = unlimited && sum > 0.0f, minus = unlimited && sum < 0.0f;
  for (int i = 0; i < DEPTH; i++) {
    const bool infinite = a[i].infinite || b[i].infinite, negative = (a[i].significand < 0) != (b[i].significand < 0);
    nan |= a[i].nan || b[i].nan || (infinite && (!a[i].significand || !b[i].significand));
    plus |= infinite && !negative, minus |= infinite && negative;
  }
  if (nan || (plus && minus)) return __uint_as_float(NAN_BITS);
  return __uint_as_float(minus ? 0xff800000u : 0x7f800000u);
}

// A fused dot-add, sum + a . b: terms truncated toward zero to a multiple of 2^(highest exponent - TERM_BITS), added
// exactly, the result truncated toward zero. A product's exponent is the sum of its factors', not renormalised.
template <class Stored>
inline float dot_add(float sum, const Factor (&a)[DEPTH], const Factor (&b)[DEPTH]) {
  constexpr int PRODUCT_BITS = 2 * Format<Stored>::FRACTION_BITS;
  const unsigned bits = __float_as_uint(sum);
  const int field = bits >> 23 & 255, exponent = max(field, 1) - 127;
  const long long significand = field ? (bits & 0x7fffff) | 0x800000 : bits & 0x7fffff;
  int products[DEPTH], exponents[DEPTH];
  int highest = significand ? max(exponent, LOWEST_EXPONENT) : LOWEST_EXPONENT;
  bool special = field == 255;
  for (int i = 0; i < DEPTH; i++) {
    products[i] = a[i].significand * b[i].significand;
    exponents[i] = a[i].exponent + b[i].exponent;
    special |= a[i].infinite | a[i].nan | b[i].infinite | b[i].nan;
    highest = max(highest, products[i] ? exponents[i] : LOWEST_EXPONENT);
  }
  if (special) return dot_add_special(sum, a, b);
  // The part of a term that is kept: its magnitude is shifted.
  const auto kept_of = [](long long magnitude, int right, bool negative) {
    const long long kept = magnitude >> min(right, 63);
    return negative ? -kept : kept;
  };
  long long total = kept_of(significand << (TERM_BITS - 23), highest - exponent, bits >> 31);
  for (int i = 0; i < DEPTH; i++) {
    const long long magnitude = products[i] < 0 ? -products[i] : products[i];
    total += kept_of(magnitude << (TERM_BITS - PRODUCT_BITS), max(0, highest - exponents[i]), products[i] < 0);
  }
  if (!total) return 0.0f;
  const unsigned long long magnitude = total < 0 ? -total : total;
  const unsigned sign = total < 0 ? 0x80000000u : 0;
  const int top = 63 - __builtin_clzll(magnitude), result = top + highest - TERM_BITS;
  if (result >= 128) return __uint_as_float(sign | 0x7f800000u);
  // Units of the last place: of a normal number, or of float32's smallest one.
  const int unit = result >= -126 ? result - 23 : -149, left = highest - TERM_BITS - unit;
  const unsigned kept = left >= 0 ? magnitude << left : magnitude >> -left;
  if (!kept) return 0.0f;
  return __uint_as_float(sign | (result >= -126 ? kept + (static_cast<unsigned>(result + 126) << 23) : kept));
}

// Special function units: c0 + c1 r + c2 r^2 with coefficients by the upper bits of the argument's fraction, r the
// lower ones. The square leaves out the partial products below bit 19.

inline unsigned long long truncated_square(unsigned r) {
  unsigned long long square = static_cast<unsigned long long>(r) * r;
  for (int i = 0; i < 10; i++) {
    if (r >> i & 1) square -= 1ull << (2 * i);
  }
  for (int i = 0; i < 9; i++) {
    if (r >> i & 1) square -= (r << (i + 1)) & 0x7ffff & ~((1u << (2 * i + 2)) - 1);
  }
  return square;
}

}  // namespace cpu

// 2^x, subnormal numbers taken for 0.
inline float exp2_approximate(float x) {
  if (x != x) return __uint_as_float(cpu::NAN_BITS);
  if (x >= 128.0f) return __uint_as_float(0x7f800000u);
  if (x < -126.0f) return 0.0f;
  const unsigned bits = __float_as_uint(x);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 127;
  const long long significand = (bits & 0x7fffff) | 0x800000;
  // 23 fraction bits, the magnitude truncated; negative numbers are reduced as the table says.
  const int places = max(exponent, -25);
  long long fixed = places < 0 ? significand >> -places : significand << places;
  if (bits >> 31) {
    if (cpu::EX2_REDUCTION == cpu::Reduction::complement) {
      fixed = fixed & 0x7fffff ? ~fixed : -fixed;
    } else {
      const bool up = cpu::EX2_REDUCTION == cpu::Reduction::floor && places < 0;
      fixed = -(up ? (significand + (1ll << -places) - 1) >> -places : fixed);
    }
  }
  if (exponent == -127) fixed = 0;
  const unsigned r = fixed & 0x1ffff;
  const unsigned* c = cpu::EX2_ROWS[fixed >> 17 & 63];
  const unsigned long long sum = (static_cast<unsigned long long>(c[0]) << 32) +
                                 (static_cast<unsigned long long>(c[1]) * r << 19) + c[2] * cpu::truncated_square(r) +
                                 cpu::EX2_BIAS;
  return __uint_as_float(static_cast<unsigned>((fixed >> 23) + 127) << 23 | (sum >> 34 & 0x7fffff));
}

// 1 / x, subnormal numbers taken for 0.
inline float reciprocal_approximate(float x) {
  const unsigned bits = __float_as_uint(x), sign = bits & 0x80000000u;
  const int exponent = static_cast<int>(bits >> 23 & 255) - 127;
  if (x != x) return __uint_as_float(cpu::NAN_BITS);
  if (exponent == -127) return __uint_as_float(sign | 0x7f800000u);
  if (exponent == 128) return __uint_as_float(sign);
  const unsigned r = bits & 0xffff;
  const unsigned* c = cpu::RCP_ROWS[bits >> 16 & 127];
  unsigned long long sum = (static_cast<unsigned long long>(c[0]) << 30) -
                           (static_cast<unsigned long long>(c[1]) * r << 17) +
                           c[2] * (cpu::truncated_square(r << 1) >> 2) + cpu::RCP_BIAS;
  int result = -exponent;
  if (!(sum >> 56)) result--, sum <<= 1;
  if (result < -126) return __uint_as_float(sign);
  return __uint_as_float(sign | static_cast<unsigned>(result + 127) << 23 | (sum >> 33 & 0x7fffff));
}

// log2(x), subnormal numbers taken for 0.
inline float log2_approximate(float x) {
  const unsigned bits = __float_as_uint(x);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 127;
  if (x != x) return __uint_as_float(cpu::NAN_BITS);
  if (exponent == -127) return __uint_as_float(0xff800000u);
  if (bits >> 31) return __uint_as_float(cpu::NAN_BITS);
  if (exponent == 128) return x;
  if (x == 1.0f) return 0.0f;
  const unsigned r = bits & 0x1ffff;
  const unsigned* c = cpu::LG2_ROWS[bits >> 17 & 63];
  const long long fraction = (static_cast<long long>(c[0]) << 30) + (static_cast<long long>(c[1]) * r << 18) -
                             static_cast<long long>(c[2] * cpu::truncated_square(r)) + cpu::LG2_BIAS;
  const long long sum = fraction + (static_cast<long long>(exponent) << 56);
  unsigned long long magnitude = (sum < 0 ? -sum : sum) & ~0xfffffull;
  const int top = 63 - __builtin_clzll(magnitude);
  const unsigned kept = top > 23 ? magnitude >> (top - 23) : magnitude << (23 - top);
  const unsigned sign = x < 1.0f ? 0x80000000u : 0;
  return __uint_as_float(sign | static_cast<unsigned>(top - 56 + 127) << 23 | (kept & 0x7fffff));
}

// Round two numbers to a storage format, to nearest even; the first goes to the lower half.
template <class Stored>
inline unsigned round_pair(float first, float second) {
  return packed<Stored>(first, second);
}

// The larger number; NaN only if both are.
inline float maximum_number(float a, float b) {
  if (a != a) return b;
  return b != b ? a : maximum(a, b);
}

inline float number_after(float number, float) { return maximum_number(number, -infinity()); }

inline bool is_either_nan(float a, float b) { return a != a || b != b; }

inline unsigned fresh_thread_index() { return cpu::block.running->index.x; }
inline unsigned fresh_block_index() { return cpu::block.index.x; }
inline int here(int number) { return number; }

// Shared memory by the number of its byte

inline unsigned shared_address(const void* shared) {
  return static_cast<const char*>(shared) - reinterpret_cast<const char*>(cpu::block.shared.data());
}

namespace cpu {

inline char* shared_bytes(unsigned address, int bytes, const char* what) {
  if (address % bytes) fail("misaligned %s of %d bytes at byte %u of shared memory", what, bytes, address);
  if (address + bytes > block.shared_bytes) fail("%s past shared memory, at byte %u", what, address);
  return reinterpret_cast<char*>(block.shared.data()) + address;
}

constexpr Four ZEROS = {};

}  // namespace cpu

inline unsigned shared_start() { return 0; }

inline void start_copy(unsigned to, const void* from) { cpu::start_copy(cpu::shared_bytes(to, 16, "copy"), from, 16); }

// Copy 16 bytes from global memory to shared memory, or zeros.
inline void start_copy_or_zeros(unsigned to, const void* from, bool exists) {
  char* shared = cpu::shared_bytes(to, 16, "copy");
  if (exists) {
    cpu::start_copy(shared, from, 16);
  } else {
    cpu::start_trusted_copy(shared, &cpu::ZEROS, 16);
  }
}

inline Four load_shared(unsigned from) {
  Four words;
  memcpy(&words, cpu::shared_bytes(from, 16, "read"), 16);
  return words;
}

inline void store_shared(unsigned to, Four words) { memcpy(cpu::shared_bytes(to, 16, "write"), &words, 16); }

inline void store_shared(unsigned to, unsigned word) { memcpy(cpu::shared_bytes(to, 4, "write"), &word, 4); }

// Instructions of a warp

namespace cpu {

struct MatrixLoad {
  unsigned address;
  unsigned* words;
  bool transposed;
};

// Lane l has the address of row l % 8 of matrix l / 8, and takes elements 2 (l % 4) and the next of row l / 4 of each,
// or of column l / 4.
inline void resolve_matrix_load(Thread* lanes) {
  const auto of = [&](int lane) { return static_cast<const MatrixLoad*>(lanes[lane].operands); };
  unsigned short rows[32][8];
  for (int lane = 0; lane < 32; lane++) {
    block.running = &lanes[lane];
    const unsigned address = of(lane)->address;
    if (address % 16 || address + 16 > block.shared_bytes) {
      return record("load of a matrix's row at byte %u of shared memory", address);
    }
    memcpy(rows[lane], reinterpret_cast<char*>(block.shared.data()) + address, 16);
  }
  for (int lane = 0; lane < 32; lane++) {
    for (int matrix = 0; matrix < 4; matrix++) {
      const int row = lane / 4, column = lane % 4 * 2;
      const auto* first = rows[8 * matrix];
      const auto element = [&](int i, int j) { return static_cast<unsigned>(first[8 * i + j]); };
      of(lane)->words[matrix] = of(lane)->transposed ? element(column, row) | element(column + 1, row) << 16
                                                     : element(row, column) | element(row, column + 1) << 16;
    }
  }
}

inline void load_matrices(unsigned (&words)[4], unsigned address, bool transposed) {
  const MatrixLoad given = {address, words, transposed};
  together(&given, transposed, resolve_matrix_load);
}

struct Multiplication {
  float* sums;
  const unsigned* left;
  unsigned right[2];
};

template <class Stored>
inline void resolve_multiplication(Thread* lanes) {
  const auto of = [&](int lane) { return static_cast<const Multiplication*>(lanes[lane].operands); };
  static Factor left[16][DEPTH], right[8][DEPTH];
  for (int lane = 0; lane < 32; lane++) {
    const int row = lane / 4, column = lane % 4 * 2;
    for (int half = 0; half < 2; half++) {
      for (int i = 0; i < 4; i++) {
        left[row + i % 2 * 8][column + half + i / 2 * 8] = Format<Stored>::factor(of(lane)->left[i] >> 16 * half);
      }
      for (int i = 0; i < 2; i++) {
        right[row][column + half + i * 8] = Format<Stored>::factor(of(lane)->right[i] >> 16 * half);
      }
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    for (int i = 0; i < 4; i++) {
      float& sum = of(lane)->sums[i];
      sum = dot_add<Stored>(sum, left[lane / 4 + i / 2 * 8], right[lane % 4 * 2 + i % 2]);
    }
  }
}

}  // namespace cpu

inline void load_matrices(unsigned (&words)[4], unsigned address) { cpu::load_matrices(words, address, false); }

inline void load_transposed_matrices(unsigned (&words)[4], unsigned address) {
  cpu::load_matrices(words, address, true);
}

template <class Stored>
inline void multiply_add(float (&sums)[4], const unsigned (&left)[4], unsigned first, unsigned second) {
  const cpu::Multiplication given = {sums, left, {first, second}};
  cpu::together(&given, 0, cpu::resolve_multiplication<Stored>);
}

inline bool any_of_warp(bool given) {
  float sayers = given;
  for (int distance = 16; distance; distance /= 2) sayers += shuffle_xor(sayers, distance);
  return sayers > 0;
}

// A barrier of the block that tells whether any thread says so.
#define synchronise_any(given) cpu::barrier_any(given, __LINE__)
