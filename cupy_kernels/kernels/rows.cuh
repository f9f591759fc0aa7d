// Sums of rows that four adjacent threads share, each with every fourth vector of four columns; statistics of rows.
#pragma once

#include "arithmetic.cuh"

constexpr int SUM_THREADS = 4;                // threads that add up a row
constexpr int SUM_COLUMNS = 4 * SUM_THREADS;  // partial sums of a row; part of the order of sums

// Sum of a row: the partial sums pairwise 8, 4, 2 and 1 apart. Thread t has those of columns 4 t + i, modulo 16.
DEVICE float sum_of_partial_sums(const float (&partial)[4]) {
  float sums[4];
#pragma unroll
  for (int i = 0; i < 4; i++) sums[i] = __fadd_rn(partial[i], shuffle_xor(partial[i], 2));
#pragma unroll
  for (int i = 0; i < 4; i++) sums[i] = __fadd_rn(sums[i], shuffle_xor(sums[i], 1));
  return __fadd_rn(__fadd_rn(sums[0], sums[2]), __fadd_rn(sums[1], sums[3]));
}

// What scores are taken from in exponents: 0 in a row that saw no key.
DEVICE float base_of(float row_max) { return row_max == -infinity() ? 0.0f : row_max; }

// Natural logarithm of row_sum * 2^row_max; -Inf in a row that saw no key.
DEVICE float log_sum_exp_of(float row_max, float row_sum) {
  const float ln2 = 0x1.62e43p-1f;
  const float logarithm = __fmul_rn(__fadd_rn(row_max, log2_polynomial(row_sum)), ln2);
  return row_sum == 0.0f ? -infinity() : logarithm;
}
