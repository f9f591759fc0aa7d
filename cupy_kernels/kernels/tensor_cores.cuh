// Instructions that feed the tensor cores of sm_80 and later from shared memory and registers, and the approximate
// functions of the hardware, one function each. The CPU build supplies models under the same names.
#pragma once

#include "arithmetic.cuh"

#ifdef CPU_BUILD
#include "cpu_tensor_cores.h"
#else

// Indices that are read anew, so that what follows from them need not stay in registers in between.

DEVICE unsigned fresh_thread_index() {
  unsigned index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

DEVICE unsigned fresh_block_index() {
  unsigned index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

// The same number, of which the compiler knows nothing: what follows from it is computed here, and not once before a
// loop.
DEVICE int here(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

// Address in shared memory.
DEVICE unsigned shared_address(const void* shared) { return static_cast<unsigned>(__cvta_generic_to_shared(shared)); }

// Start of the dynamic shared memory, a multiple of 1024.
DEVICE unsigned shared_start() {
  extern __shared__ __align__(1024) char aligned_bytes_of_the_block[];
  return shared_address(aligned_bytes_of_the_block);
}

// Copy 16 bytes from global memory to shared memory, or zeros if there are none to copy; they arrive at the latest when
// their group is waited for.
DEVICE void start_copy_or_zeros(unsigned to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

DEVICE void start_copy(unsigned to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

DEVICE Four load_shared(unsigned from) {
  Four words;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(from)
               : "memory");
  return words;
}

DEVICE void store_shared(unsigned to, Four words) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}

DEVICE void store_shared(unsigned to, unsigned word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}

// Load four matrices of 8 x 8 numbers of 16 bits from shared memory: lane l gives the address of row l % 8 of matrix
// l / 8, and gets of each matrix elements 2 (l % 4) and the next, in one word, of row l / 4.
DEVICE void load_matrices(unsigned (&words)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// The same, of column l / 4.
DEVICE void load_transposed_matrices(unsigned (&words)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// sums += left right, 16 x 16 times 16 x 8. Lane l has columns 2 (l % 4) and the next of row l / 4 of the sums, then of
// the row 8 further on; of the left matrix too, of columns 0 to 7, then of 8 to 15; of the right one these rows of column
// l / 4, of rows 0 to 7, then of 8 to 15.
template <class Stored>
DEVICE void multiply_add(float (&sums)[4], const unsigned (&left)[4], unsigned first, unsigned second);

template <>
DEVICE void multiply_add<float16>(float (&sums)[4], const unsigned (&left)[4], unsigned first, unsigned second) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(first), "r"(second));
}

template <>
DEVICE void multiply_add<bfloat16>(float (&sums)[4], const unsigned (&left)[4], unsigned first, unsigned second) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(first), "r"(second));
}

// Round two numbers to a storage format, to nearest even; the first goes to the lower half.
template <class Stored>
DEVICE unsigned round_pair(float first, float second);

template <>
DEVICE unsigned round_pair<float16>(float first, float second) {
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

template <>
DEVICE unsigned round_pair<bfloat16>(float first, float second) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// The larger number; NaN only if both are.
DEVICE float maximum_number(float a, float b) {
  float larger;
  asm("max.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// A number that is not NaN, as it is. To the compiler it depends on another, so that what is made of it comes later.
DEVICE float number_after(float number, float other) {
  float none;  // -Inf, whatever the other is
  asm("min.f32 %0, %1, %2;" : "=f"(none) : "f"(other), "f"(-infinity()));
  return maximum_number(number, none);
}

DEVICE bool is_either_nan(float a, float b) {
  int either;
  asm("{\n.reg .pred either;\nsetp.nan.f32 either, %1, %2;\nselp.b32 %0, 1, 0, either;\n}\n"
      : "=r"(either)
      : "f"(a), "f"(b));
  return either;
}

// Functions of the hardware, subnormal numbers taken for 0

DEVICE float exp2_approximate(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

DEVICE float reciprocal_approximate(float x) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}

DEVICE float log2_approximate(float x) {
  float logarithm;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(logarithm) : "f"(x));
  return logarithm;
}

DEVICE bool any_of_warp(bool given) { return __any_sync(ALL_LANES, given); }

// A barrier of the block that tells whether any thread says so.
DEVICE bool synchronise_any(bool given) { return __syncthreads_or(given); }

#endif

// What the scores of a row are taken relative to: their maximum, or 0 where all are -Inf in units of log2.
DEVICE float reference_of(float row_max, float scale_log2) {
  return __fmul_rn(row_max, scale_log2) == -infinity() ? 0.0f : row_max;
}
