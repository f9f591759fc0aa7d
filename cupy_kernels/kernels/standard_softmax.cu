// probabilities = softmax(scores) and the log-sum-exp of standard attention (simattn/algorithms/standard.py,
// softmax_kernel). Scores are in units of log2. All of them are read in every pass, hidden ones too; hidden
// probabilities are 0.
//
// Macros: those of softmax.cuh, with PASSES 1, whole rows on chip; 2, maximum and sum together, corrected as the
// maximum grows; or 3, one after the other.
#include "softmax.cuh"

constexpr int SHARED_BYTES = BUFFER_BYTES;

static_assert(SHARED_BYTES <= 227 << 10, "no GPU gives a thread block more");

struct StandardSoftmaxParameters {
  const Stored* scores;
  Stored* probabilities;
  float* lse;
  unsigned long long* counters;
  Strides scores_strides, probabilities_strides, lse_strides;
  Problem problem;
  Operand operand;
};

// What to add to the sum of a row's exponentials: NaN where its maximum is NaN or Inf, else 0. The exponentials
// themselves need not care: they are divided by the sum.
DEVICE float poison_of(float base) { return __fsub_rn(base, base); }

#if PASSES == 1

// Find a whole row's probabilities in `row_buffer`, of `kv_len` columns, and store them.
DEVICE void softmax_of_row(
    float& row_max, float& row_sum, float* row_buffer, const Stored* scores, Stored* probabilities,
    const RowPlace& place, int kv_len, ByteCounter& scores_counter, ByteCounter& probabilities_counter) {
  const int stop = place.exists ? kv_len : 0;
  // load
  row_max = -infinity();
#pragma unroll 4
  for (int column = 4 * place.lane; column < stop; column += 4 * ROW_THREADS) {
    float values[4];
    fetch_columns(values, scores + column, kv_len - column, -infinity(), scores_counter);
    place.hide(values, column, -infinity());
#pragma unroll
    for (int i = 0; i < 4; i++) row_max = maximum(row_max, values[i]);
    store_4(row_buffer + column, make_float4(values[0], values[1], values[2], values[3]));
  }
  // compute
  row_max = maximum_of_row(row_max);
  const float base = base_of(row_max);
#pragma unroll 4
  for (int column = 4 * place.lane; column < stop; column += 4 * ROW_THREADS) {
    float values[4];
    load_vector(values, row_buffer + column);
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = exp2_of_nonpositive(__fsub_rn(values[i], base));
    store_4(row_buffer + column, make_float4(values[0], values[1], values[2], values[3]));
  }
  __syncwarp();
  float sums[4] = {};
  if (place.lane < SUM_THREADS) {
#pragma unroll 4
    for (int column = 4 * place.lane; column < stop; column += SUM_COLUMNS) {
      float values[4];
      load_vector(values, row_buffer + column);
#pragma unroll
      for (int i = 0; i < 4; i++) sums[i] = __fadd_rn(sums[i], values[i]);
    }
  }
  row_sum = __fadd_rn(share_with_row(sum_of_partial_sums(sums), place.lane), poison_of(base));
  // finish
  const float divisor = row_sum == 0.0f ? 1.0f : row_sum;
#pragma unroll 2
  for (int column = 4 * place.lane; column < stop; column += 4 * ROW_THREADS) {
    float values[4];
    load_vector(values, row_buffer + column);
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = __fdiv_rn(values[i], divisor);
    place.hide(values, column, 0.0f);
    store_columns(probabilities + column, values, kv_len - column, probabilities_counter);
  }
}

#else

// Take one tile of scores into the row maximum, the row sum or both.
template <bool MAXIMUM, bool SUM>
DEVICE void update_statistics(float& row_max, float& row_sum, const Tile& scores) {
  const float old_max = row_max;
  if (MAXIMUM) {
#pragma unroll
    for (int i = 0; i < TILE_VECTORS; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) row_max = maximum(row_max, scores[i][j]);
    row_max = maximum_of_row(row_max);
  }
  if (SUM) {
    const float base = base_of(row_max);
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < TILE_VECTORS; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) sums[j] = __fadd_rn(sums[j], exp2_of_nonpositive(__fsub_rn(scores[i][j], base)));
    const float sum = __fadd_rn(sum_of_partial_sums(sums), poison_of(base));
    if (MAXIMUM) {
      const float correction = exp2_polynomial(__fsub_rn(old_max, base));
      row_sum = __fmaf_rn(row_sum, correction, sum);
    } else {
      row_sum = __fadd_rn(row_sum, sum);
    }
  }
}

// Read a row once, and take it into its statistics.
template <bool MAXIMUM, bool SUM>
DEVICE void find_statistics(
    float& row_max, float& row_sum, const Stored* scores, const RowPlace& place, int kv_len, ByteCounter& counter) {
#pragma unroll 1
  for (int key = 0; key < kv_len; key += KEY_ROWS) {
    // load
    Tile tile = {};
    if (place.exists) fetch_tile(tile, scores + key, place.lane, kv_len - key, -infinity(), counter);
#pragma unroll
    for (int i = 0; i < TILE_VECTORS; i++) place.hide(tile[i], key + (i * SUM_THREADS + place.lane) * 4, -infinity());
    // compute
    update_statistics<MAXIMUM, SUM>(row_max, row_sum, tile);
  }
}

// Read it again, and store its probabilities.
DEVICE void finish_row(
    float row_max, float row_sum, const Stored* scores, Stored* probabilities, const RowPlace& place, int kv_len,
    ByteCounter& scores_counter, ByteCounter& probabilities_counter) {
  const float base = base_of(row_max), divisor = row_sum == 0.0f ? 1.0f : row_sum;
#pragma unroll 1
  for (int key = 0; key < kv_len; key += KEY_ROWS) {
    // load
    Tile tile;
    fetch_tile(tile, scores + key, place.lane, kv_len - key, -infinity(), scores_counter);
#pragma unroll
    for (int i = 0; i < TILE_VECTORS; i++) {
      // compute
#pragma unroll
      for (int j = 0; j < 4; j++) {
        tile[i][j] = __fdiv_rn(exp2_of_nonpositive(__fsub_rn(tile[i][j], base)), divisor);
      }
      place.hide(tile[i], key + (i * SUM_THREADS + place.lane) * 4, 0.0f);
    }
    // finish
    store_tile(probabilities + key, tile, place.lane, kv_len - key, probabilities_counter);
  }
}

#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    standard_softmax(const StandardSoftmaxParameters parameters) {
  const Problem& problem = parameters.problem;
  const RowPlace place(problem);
  ByteCounter scores_counter(parameters.counters), probabilities_counter(parameters.counters + 1);
  ByteCounter lse_counter(parameters.counters + 2);
  const Stored* const scores =
      row_of(parameters.scores, parameters.scores_strides, place.batch, place.head, place.row);
  Stored* const probabilities =
      row_of(parameters.probabilities, parameters.probabilities_strides, place.batch, place.head, place.row);
  float row_max = -infinity(), row_sum = 0.0f;
#if PASSES == 1
  float* const row_buffer = shared_memory() + threadIdx.x / ROW_THREADS * BUFFER_STRIDE;
  softmax_of_row(
      row_max, row_sum, row_buffer, scores, probabilities, place, problem.kv_len, scores_counter,
      probabilities_counter);
#elif PASSES == 2
  find_statistics<true, true>(row_max, row_sum, scores, place, problem.kv_len, scores_counter);
#else
  find_statistics<true, false>(row_max, row_sum, scores, place, problem.kv_len, scores_counter);
  find_statistics<false, true>(row_max, row_sum, scores, place, problem.kv_len, scores_counter);
#endif
  if (place.exists) {
#if PASSES > 1
    finish_row(
        row_max, row_sum, scores, probabilities, place, problem.kv_len, scores_counter, probabilities_counter);
#endif
    // finish
    if (place.lane == 0) {
      store_number(
          row_of(parameters.lse, parameters.lse_strides, place.batch, place.head, place.row),
          log_sum_exp_of(row_max, row_sum), lse_counter);
    }
  }
  scores_counter.flush();
  probabilities_counter.flush();
  lse_counter.flush();
}
