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
        load_vector(right, shared + DOUT_OFFSET + row * ROW_STRIDE + column);
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] = __fmaf_rn(left[i], right[i], sums[i]);
      }
    }
    const float delta = sum_of_partial_sums(sums);
    if (there && first_column == 0) shared[DELTA_OFFSET + row] = delta;
  }
  out_counter.flush();
}

// dQ of a thread's rows, from where it waits in memory.
DEVICE void load_gradient(
    Gradient<THREAD_QUERIES>& dq, const Sums* from, long long stride, int rows, int columns, const GradientPlace& place,
    unsigned long long* total) {
  ByteCounter counter(total);
  clear(dq);
#pragma unroll
  for (int i = 0; i < THREAD_QUERIES; i++) {
    const int row = place.down + DOWN * i;
    if (row < rows) {
#pragma unroll
      for (int c = 0; c < WIDTH; c += 4) {
        const int column = c * ACROSS + 4 * place.across;
        if (column < columns) {
          float values[4];
          reload_vector(values, from + row * stride + column, counter);
#pragma unroll
          for (int e = 0; e < 4; e++) dq[i][c + e] = values[e];
        }
      }
    }
  }
  counter.flush();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    flash1_backward(const Flash1BackwardParameters parameters) {
  float* const shared = shared_memory();
  float* const k = shared + K_OFFSET;
  float* const v = shared + V_OFFSET;
  float* const q = shared + Q_OFFSET;
  float* const dout = shared + DOUT_OFFSET;
  float* const scores_tile = shared + SCORES_OFFSET;
  const Problem& problem = parameters.problem;
  const ScorePlace score_place;
  const GradientPlace place;
  const KeyBlock block(problem, blockIdx.x);
  const int batch = block.batch, shift = problem.kv_len - problem.q_len;

  for (int key = 0; key < problem.kv_len; key += KEY_ROWS) {
    // load
    __syncthreads();  // K and V have been read
    TileCopy<KEY_ROWS, COLUMNS, ROW_STRIDE, THREADS>::start(
        k, row_of(parameters.k, parameters.k_strides, batch, block.kv_head, key), parameters.k_strides.row,
        problem.kv_len - key, problem.head_dim, parameters.counters + COUNT_K);
    TileCopy<KEY_ROWS, COLUMNS, ROW_STRIDE, THREADS>::start(
        v, row_of(parameters.v, parameters.v_strides, batch, block.kv_head, key), parameters.v_strides.row,
        problem.kv_len - key, problem.value_dim, parameters.counters + COUNT_V);
    commit_copies();
    const QueryTiles tiles(problem, key);
    Gradient<THREAD_KEYS> dk, dv;
    clear(dk);
    clear(dv);

    for (int step = 0; step < block.group_size * tiles.count; step++) {
      const int head = block.first_head + step / tiles.count;
      const int row = (tiles.first + step % tiles.count) * QUERY_ROWS;
      const Band band(problem, row + shift - key, problem.q_len - row, problem.kv_len - key);
      // load
      if (step > 0) __syncthreads();  // Q, dO and dS have been read
      TileCopy<QUERY_ROWS, COLUMNS, ROW_STRIDE, THREADS>::start(
          q, row_of(parameters.q, parameters.q_strides, batch, head, row), parameters.q_strides.row,
          problem.q_len - row, problem.head_dim, parameters.counters + COUNT_Q);
      TileCopy<QUERY_ROWS, COLUMNS, ROW_STRIDE, THREADS>::start(
          dout, row_of(parameters.dout, parameters.dout_strides, batch, head, row), parameters.dout_strides.row,
          problem.q_len - row, problem.value_dim, parameters.counters + COUNT_DOUT);
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();  // Q and dO are there, and K and V
      load_statistics(shared, parameters, batch, head, row);
      __syncthreads();  // statistics are there
      // compute
      Scores scores;
      multiply_rows(scores, q, k, score_place, problem.head_dim);
      exponentiate<true>(scores, shared, problem.scale_log2, score_place, band);
      store_scores(scores_tile, scores, score_place);
      __syncthreads();  // P is there
      add_to_keys(dv, scores_tile, dout, place, band);
      multiply_rows(scores, dout, v, score_place, problem.value_dim);
      differentiate<true>(scores, shared, problem.scale, score_place, band);
      __syncthreads();  // P has been read
      store_scores(scores_tile, scores, score_place);
      __syncthreads();  // dS is there
      add_to_keys(dk, scores_tile, q, place, band);
      // The part of dQ that a thread loads is the one that it stored itself.
      Sums* const sums = row_of(parameters.dq_sums, parameters.dq_sums_strides, batch, head, row);
      const long long stride = parameters.dq_sums_strides.row;
      Gradient<THREAD_QUERIES> dq;
      load_gradient(
          dq, sums, stride, problem.q_len - row, problem.head_dim, place, parameters.counters + COUNT_DQ_READ);
      add_to_queries(dq, scores_tile, k, place, band);
      // finish
      hand_out<false>(
          dq, sums, stride, problem.q_len - row, problem.head_dim, 1.0f, false, place,
          parameters.counters + COUNT_DQ_WRITTEN, [&](int i) { return place.down + DOWN * i; });
    }
    // finish
    const auto key_in_tile = [&](int i) { return key_of(place.down, i); };
    hand_out<GRID_HEADS == 2>(
        dk, row_of(parameters.dk, parameters.dk_strides, batch, block.result_head(), key), parameters.dk_strides.row,
        problem.kv_len - key, problem.head_dim, 1.0f, false, place, parameters.counters + COUNT_DK, key_in_tile);
    hand_out<GRID_HEADS == 2>(
        dv, row_of(parameters.dv, parameters.dv_strides, batch, block.result_head(), key), parameters.dv_strides.row,
        problem.kv_len - key, problem.value_dim, 1.0f, false, place, parameters.counters + COUNT_DV, key_in_tile);
  }
  wait_for_copies<0>();
}
