// Arithmetic whose bits the simulated machine repeats: every operation rounds once, to nearest even, and none is
// contracted or reordered. Polynomials name their operations one by one.
#pragma once

#include "device.cuh"

DEVICE float float_of_bits(unsigned bits) { return __uint_as_float(bits); }

DEVICE unsigned bits_of_float(float value) { return __float_as_uint(value); }

DEVICE float infinity() { return float_of_bits(0x7f800000u); }

// 2^x where x is at most 0; 0 below -126. NaN gives an unspecified number: the caller's row is NaN already.
//
// Cody-Waite: t = x + 1.5 * 2^23 holds the nearest integer in its low bits, f = x - (t - 1.5 * 2^23) lies in
// [-1/2, 1/2], a polynomial of degree 6 gives 2^f within 0.95 units in the last place, and t is added to its exponent.
DEVICE float exp2_of_nonpositive(float x) {
  const float t = __fadd_rn(x, 12582912.0f);
  const float f = __fsub_rn(x, __fsub_rn(t, 12582912.0f));
  float p = 0x1.41fbbcp-13f;
  p = __fmaf_rn(p, f, 0x1.5f3e54p-10f);
  p = __fmaf_rn(p, f, 0x1.3b2d4cp-7f);
  p = __fmaf_rn(p, f, 0x1.c6aee8p-5f);
  p = __fmaf_rn(p, f, 0x1.ebfbdcp-3f);
  p = __fmaf_rn(p, f, 0x1.62e43p-1f);
  p = __fmaf_rn(p, f, 1.0f);
  const float power = float_of_bits(bits_of_float(p) + (bits_of_float(t) << 23));
  return x < -126.0f ? 0.0f : power;
}

// 2^x: 0 below -126, Inf from 128 on, NaN of NaN.
DEVICE float exp2_polynomial(float x) {
  float power = exp2_of_nonpositive(x);
  power = x >= 128.0f ? infinity() : power;
  return x != x ? x : power;
}

// log2(x) of a positive normal number; Inf of Inf, NaN of NaN.
//
// x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), whose smallest float has the bits 0x3f3504f3; the result is
// e + f P(f) in one fused operation, P of degree 8 by Horner's rule.
DEVICE float log2_polynomial(float x) {
  const int i = static_cast<int>(bits_of_float(x) - 0x3f3504f3u);
  const float e = static_cast<float>(i >> 23);
  const float f = __fsub_rn(float_of_bits((i & 0x007fffff) + 0x3f3504f3u), 1.0f);
  float p = 0x1.025a2p-3f;
  p = __fmaf_rn(p, f, -0x1.a8cc5cp-3f);
  p = __fmaf_rn(p, f, 0x1.b9b11ep-3f);
  p = __fmaf_rn(p, f, -0x1.e94f12p-3f);
  p = __fmaf_rn(p, f, 0x1.26d41p-2f);
  p = __fmaf_rn(p, f, -0x1.715c9cp-2f);
  p = __fmaf_rn(p, f, 0x1.ec73d4p-2f);
  p = __fmaf_rn(p, f, -0x1.71547p-1f);
  p = __fmaf_rn(p, f, 0x1.715476p+0f);
  const float logarithm = __fmaf_rn(f, p, e);
  return x < infinity() ? logarithm : x;
}

// Storage formats. Tiles are float32 in shared memory whatever they are in global memory.

using float32 = float;

struct float16 {
  unsigned short bits;
};

struct bfloat16 {
  unsigned short bits;
};

DEVICE float to_float(float16 stored) { return float_of_half(stored.bits); }

DEVICE float to_float(bfloat16 stored) { return float_of_bits(static_cast<unsigned>(stored.bits) << 16); }

template <class Stored>
DEVICE Stored rounded(float value);

template <>
DEVICE float16 rounded<float16>(float value) {
  return {half_of_float(value)};
}

// To the nearest, ties to even: carry into the upper half what the lower half rounds to.
template <>
DEVICE bfloat16 rounded<bfloat16>(float value) {
  const unsigned bits = bits_of_float(value);
  const unsigned upper = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<unsigned short>(value != value ? 0x7fffu : upper)};
}

// Two numbers in one word, the first in its lower half.
template <class Stored>
DEVICE unsigned packed(float first, float second) {
  return rounded<Stored>(first).bits | static_cast<unsigned>(rounded<Stored>(second).bits) << 16;
}

template <class Stored>
DEVICE float2 unpacked(unsigned word) {
  const Stored first = {static_cast<unsigned short>(word & 0xffffu)};
  const Stored second = {static_cast<unsigned short>(word >> 16)};
  return make_float2(to_float(first), to_float(second));
}
