// FlashAttention backward (Dao et al. 2022, arXiv 2205.14135) on CUDA cores, the main program of
// simattn/algorithms/flash1.py: each thread block walks the key tiles in order, keeps the gradients of one on chip, and
// adds to dQ of every query tile that sees any of it, which waits in memory.
//
// Macros besides those of backward.cuh:
//   SUMS  float32, or STORAGE: how dQ is stored in between
#include "backward.cuh"

using Sums = SUMS;

struct Flash1BackwardParameters {
  const Stored* q;
  const Stored* k;
  const Stored* v;
  const Stored* out;
  const Stored* dout;
  const float* row_max;
  const float* row_sum;
  Sums* dq_sums;
  KeyGradient* dk;
  KeyGradient* dv;
  unsigned long long* counters;
  Strides q_strides, k_strides, v_strides, out_strides, dout_strides, row_max_strides, row_sum_strides;
  Strides dq_sums_strides, dk_strides, dv_strides;
  Problem problem;
  Operand operand;
};

enum Flash1BackwardCounter {
  COUNT_Q,
  COUNT_K,
  COUNT_V,
  COUNT_OUT,
  COUNT_DOUT,
  COUNT_ROW_MAX,
  COUNT_ROW_SUM,
  COUNT_DQ_READ,
  COUNT_DQ_WRITTEN,
  COUNT_DK,
  COUNT_DV,
};

// Load row maximum and sum of a tile's rows, and compute delta = rowsum(dO O); dO is in shared memory.
DEVICE void load_statistics(
    float* shared, const Flash1BackwardParameters& parameters, int batch, int head, int tile_row) {
  const Problem& problem = parameters.problem;
  ByteCounter max_counter(parameters.counters + COUNT_ROW_MAX), sum_counter(parameters.counters + COUNT_ROW_SUM);
  const int own = tile_row + static_cast<int>(threadIdx.x);
  if (threadIdx.x < QUERY_ROWS && own < problem.q_len) {
    const float row_max = load_number(row_of(parameters.row_max, parameters.row_max_strides, batch, head, own),
                                      max_counter);
    const float row_sum = load_number(row_of(parameters.row_sum, parameters.row_sum_strides, batch, head, own),
                                      sum_counter);
    shared[BASE_OFFSET + threadIdx.x] = base_of(row_max);
    shared[DIVISOR_OFFSET + threadIdx.x] = row_sum == 0.0f ? 1.0f : row_sum;
  }
  max_counter.flush();
  sum_counter.flush();

  ByteCounter out_counter(parameters.counters + COUNT_OUT);
  const int first_column = threadIdx.x % SUM_THREADS * 4;
#pragma unroll 1
  for (int first = 0; first < QUERY_ROWS; first += THREADS / SUM_THREADS) {
    const int row = first + static_cast<int>(threadIdx.x) / SUM_THREADS;
    const bool there = row < QUERY_ROWS && tile_row + row < problem.q_len;
    float sums[4] = {};
    if (there) {
      const Stored* const out = row_of(parameters.out, parameters.out_strides, batch, head, tile_row + row);
      for (int column = first_column; column < problem.value_dim; column += SUM_COLUMNS) {
        float left[4], right[4];
        fetch_vector(left, out + column, out_counter);
        load_vector(right, shared + DOUT_OFFSET + row * COLUMNS + swizzled<SWIZZLE>(row, column));
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] = __fmaf_rn(left[i], right[i], sums[i]);
      }
    }
    const float delta = sum_of_partial_sums(sums);
    if (there && first_column == 0) shared[DELTA_OFFSET + row] = delta;
  }
  out_counter.flush();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    flash1_backward(const Flash1BackwardParameters parameters) {
  const SharedTiles tiles;
  const Problem& problem = parameters.problem;
  const ScorePlace score_place;
  const GradientPlace place;
  const KeyBlock block(problem, blockIdx.x);
  const int batch = block.batch, shift = problem.kv_len - problem.q_len;

  for (int key = 0; key < problem.kv_len; key += KEY_ROWS) {
    // load
    __syncthreads();  // all tiles have been read
    start_tile<KEY_ROWS>(
        tiles.k, row_of(parameters.k, parameters.k_strides, batch, block.kv_head, key), parameters.k_strides,
        problem.kv_len - key, problem.head_dim, parameters.counters + COUNT_K);
    start_tile<KEY_ROWS>(
        tiles.v, row_of(parameters.v, parameters.v_strides, batch, block.kv_head, key), parameters.v_strides,
        problem.kv_len - key, problem.value_dim, parameters.counters + COUNT_V);
    commit_copies();
    Gradient<THREAD_KEYS> dk, dv;
    clear(dk);
    clear(dv);

    for (QueryTile tile(problem, block, key); tile.exists(); tile.advance()) {
      const int head = tile.head, row = tile.row;
      const Band band(problem, row + shift - key, problem.q_len - row, problem.kv_len - key);
      // load
      __syncthreads();  // Q, dO and dS have been read
      start_tile<QUERY_ROWS>(
          tiles.q, row_of(parameters.q, parameters.q_strides, batch, head, row), parameters.q_strides,
          problem.q_len - row, problem.head_dim, parameters.counters + COUNT_Q);
      start_tile<QUERY_ROWS>(
          tiles.dout, row_of(parameters.dout, parameters.dout_strides, batch, head, row), parameters.dout_strides,
          problem.q_len - row, problem.value_dim, parameters.counters + COUNT_DOUT);
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();  // Q and dO are there, and K and V
      load_statistics(tiles.shared, parameters, batch, head, row);
      __syncthreads();  // statistics are there
      // compute
      Scores scores;
      multiply_rows(scores, tiles.q, tiles.k, score_place, problem.head_dim);
      exponentiate<true>(scores, tiles.shared, problem.scale_log2, score_place);
      store_scores(tiles.scores, scores, score_place);
      __syncthreads();  // P is there
      add_to_keys(dv, tiles.scores, tiles.dout, place, band);
      multiply_rows(scores, tiles.dout, tiles.v, score_place, problem.value_dim);
      differentiate<true>(scores, tiles.shared, problem.scale, score_place);
      __syncthreads();  // P has been read
      store_scores(tiles.scores, scores, score_place);
      __syncthreads();  // dS is there
      add_to_keys(dk, tiles.scores, tiles.q, place, band);
      // The part of dQ that a thread loads is the one that it stored itself.
      const auto dq_rows = gradient_rows(
          parameters.dq_sums, parameters.dq_sums_strides, batch, head, row + query_of(place, 0), problem.q_len,
          problem.head_dim, GradientPlace::LANES_DOWN, place);
      Gradient<THREAD_QUERIES> dq;
      dq_rows.load(dq, parameters.counters + COUNT_DQ_READ);
      add_to_queries(dq, tiles.scores, tiles.k, place, band);
      // finish
      dq_rows.hand_in<false>(dq, parameters.counters + COUNT_DQ_WRITTEN);
    }
    // finish
    const int result_head = block.result_head(), first_key = key + place.down * THREAD_KEYS;
    gradient_rows(
        parameters.dk, parameters.dk_strides, batch, result_head, first_key, problem.kv_len, problem.head_dim, 1, place)
        .hand_in<GRID_HEADS == 2>(dk, parameters.counters + COUNT_DK);
    gradient_rows(
        parameters.dv, parameters.dv_strides, batch, result_head, first_key, problem.kv_len, problem.value_dim, 1,
        place)
        .hand_in<GRID_HEADS == 2>(dv, parameters.counters + COUNT_DV);
    wait_for_copies<0>();
  }
}
