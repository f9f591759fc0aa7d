// dscores = P (dP - rowsum(P dP)), element by element: the gradient of standard attention's softmax
// (simattn/algorithms/standard.py, softmax_gradient_kernel). All is read in every pass, hidden elements too; theirs are
// taken as dP = 0, and their gradients are 0.
//
// Macros: those of softmax.cuh, with PASSES 1, whole rows on chip, or 2, the sums first.
#include "softmax.cuh"

constexpr int SHARED_BYTES = 2 * BUFFER_BYTES;

static_assert(SHARED_BYTES <= 227 << 10, "no GPU gives a thread block more");

struct StandardSoftmaxGradientParameters {
  const Stored* probabilities;
  const Stored* dprobabilities;
  Stored* dscores;
  unsigned long long* counters;
  Strides probabilities_strides, dprobabilities_strides, dscores_strides;
  Problem problem;
  Operand operand;
};

// Replace dP by dS.
DEVICE void differentiate(
    float (&dprobabilities)[4], const float (&probabilities)[4], float delta, const RowPlace& place, int column) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    dprobabilities[i] = __fmul_rn(__fsub_rn(dprobabilities[i], delta), probabilities[i]);
  }
  place.hide(dprobabilities, column, 0.0f);
}

// The arrays of one row.
struct Row {
  const Stored* probabilities;
  const Stored* dprobabilities;
  Stored* dscores;
  int columns;
};

#if PASSES == 1

DEVICE void gradient_of_row(
    const Row& row, float* p_buffer, float* dp_buffer, const RowPlace& place, ByteCounter& p_counter,
    ByteCounter& dp_counter, ByteCounter& ds_counter) {
  const int stop = place.exists ? row.columns : 0;
  // load
#pragma unroll 4
  for (int column = 4 * place.lane; column < stop; column += 4 * ROW_THREADS) {
    float p[4], dp[4];
    fetch_columns(p, row.probabilities + column, row.columns - column, 0.0f, p_counter);
    fetch_columns(dp, row.dprobabilities + column, row.columns - column, 0.0f, dp_counter);
    place.hide(dp, column, 0.0f);
    store_4(p_buffer + column, make_float4(p[0], p[1], p[2], p[3]));
    store_4(dp_buffer + column, make_float4(dp[0], dp[1], dp[2], dp[3]));
  }
  __syncwarp();
  // compute
  float sums[4] = {};
  if (place.lane < SUM_THREADS) {
#pragma unroll 4
    for (int column = 4 * place.lane; column < stop; column += SUM_COLUMNS) {
      float p[4], dp[4];
      load_vector(p, p_buffer + column);
      load_vector(dp, dp_buffer + column);
#pragma unroll
      for (int i = 0; i < 4; i++) sums[i] = __fmaf_rn(p[i], dp[i], sums[i]);
    }
  }
  const float delta = share_with_row(sum_of_partial_sums(sums), place.lane);
  // finish
#pragma unroll 2
  for (int column = 4 * place.lane; column < stop; column += 4 * ROW_THREADS) {
    float p[4], dp[4];
    load_vector(p, p_buffer + column);
    load_vector(dp, dp_buffer + column);
    differentiate(dp, p, delta, place, column);
    store_columns(row.dscores + column, dp, row.columns - column, ds_counter);
  }
}

#else

// Read the row once, and return the sum of P dP.
DEVICE float find_delta(const Row& row, const RowPlace& place, ByteCounter& p_counter, ByteCounter& dp_counter) {
  float delta = 0.0f;
#pragma unroll 1
  for (int key = 0; key < row.columns; key += KEY_ROWS) {
    // load
    Tile p = {}, dp = {};
    if (place.exists) {
      fetch_tile(p, row.probabilities + key, place.lane, row.columns - key, 0.0f, p_counter);
      fetch_tile(dp, row.dprobabilities + key, place.lane, row.columns - key, 0.0f, dp_counter);
    }
    // compute
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < TILE_VECTORS; i++) {
      place.hide(dp[i], key + (i * SUM_THREADS + place.lane) * 4, 0.0f);
#pragma unroll
      for (int j = 0; j < 4; j++) sums[j] = __fmaf_rn(p[i][j], dp[i][j], sums[j]);
    }
    delta = __fadd_rn(delta, sum_of_partial_sums(sums));
  }
  return delta;
}

// Read it again, and store its gradients.
DEVICE void finish_row(
    const Row& row, float delta, const RowPlace& place, ByteCounter& p_counter, ByteCounter& dp_counter,
    ByteCounter& ds_counter) {
#pragma unroll 1
  for (int key = 0; key < row.columns; key += KEY_ROWS) {
    // load
    Tile p, dp;
    fetch_tile(p, row.probabilities + key, place.lane, row.columns - key, 0.0f, p_counter);
    fetch_tile(dp, row.dprobabilities + key, place.lane, row.columns - key, 0.0f, dp_counter);
    // compute
#pragma unroll
    for (int i = 0; i < TILE_VECTORS; i++) {
      const int column = key + (i * SUM_THREADS + place.lane) * 4;
      place.hide(dp[i], column, 0.0f);
      differentiate(dp[i], p[i], delta, place, column);
    }
    // finish
    store_tile(row.dscores + key, dp, place.lane, row.columns - key, ds_counter);
  }
}

#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    standard_softmax_gradient(const StandardSoftmaxGradientParameters parameters) {
  const RowPlace place(parameters.problem);
  ByteCounter p_counter(parameters.counters), dp_counter(parameters.counters + 1);
  ByteCounter ds_counter(parameters.counters + 2);
  const Row row = {
      row_of(parameters.probabilities, parameters.probabilities_strides, place.batch, place.head, place.row),
      row_of(parameters.dprobabilities, parameters.dprobabilities_strides, place.batch, place.head, place.row),
      row_of(parameters.dscores, parameters.dscores_strides, place.batch, place.head, place.row),
      parameters.problem.kv_len};
#if PASSES == 1
  float* const p_buffer = shared_memory() + threadIdx.x / ROW_THREADS * BUFFER_STRIDE;
  gradient_of_row(row, p_buffer, p_buffer + BLOCK_ROWS * BUFFER_STRIDE, place, p_counter, dp_counter, ds_counter);
#else
  const float delta = find_delta(row, place, p_counter, dp_counter);
  if (place.exists) finish_row(row, delta, place, p_counter, dp_counter, ds_counter);
#endif
  p_counter.flush();
  dp_counter.flush();
  ds_counter.flush();
}
