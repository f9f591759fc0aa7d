// FlashAttention-2 backward (Dao 2023, arXiv 2307.08691) on CUDA cores, the programs of simattn/algorithms/flash2.py.
//
// flash2_key_gradients: each thread block keeps one key tile and its gradients on chip and streams the queries past it.
// flash2_query_gradients: each keeps one query tile and its gradient, so that no block adds to another's sum.
//
// Macros besides those of backward.cuh:
//   DQ_MODE  0: flash2_key_gradients computes no dQ; 1: dQ is added up in memory, in no fixed order; 2: a thread block
//            walks the key tiles in order, and loads dQ, adds to it and stores it
#include "backward.cuh"

struct Flash2KeyGradientsParameters {
  const Stored* q;
  const Stored* k;
  const Stored* v;
  const Stored* dout;
  const float* lse;
  const float* delta;
  float* dq_accumulator;
  KeyGradient* dk;
  KeyGradient* dv;
  unsigned long long* counters;
  Strides q_strides, k_strides, v_strides, dout_strides, lse_strides, delta_strides, dq_accumulator_strides;
  Strides dk_strides, dv_strides;
  Problem problem;
  Operand operand;
};

struct Flash2QueryGradientsParameters {
  const Stored* q;
  const Stored* k;
  const Stored* v;
  const Stored* dout;
  const float* lse;
  const float* delta;
  Stored* dq;
  unsigned long long* counters;
  Strides q_strides, k_strides, v_strides, dout_strides, lse_strides, delta_strides, dq_strides;
  Problem problem;
  Operand operand;
};

enum Flash2BackwardCounter { COUNT_Q, COUNT_K, COUNT_V, COUNT_DOUT, COUNT_LSE, COUNT_DELTA, COUNT_DQ };

constexpr int COUNT_DK = COUNT_DQ + DQ_MODE;  // dQ has as many counters as accesses
constexpr int COUNT_DV = COUNT_DK + 1;

// Log-sum-exp and delta of a thread's row of a query tile, on their way to shared memory.
struct Statistics {
  float lse, delta;

  template <class Parameters>
  DEVICE void load(const Parameters& parameters, int batch, int head, int tile_row) {
    ByteCounter lse_counter(parameters.counters + COUNT_LSE), delta_counter(parameters.counters + COUNT_DELTA);
    const int row = tile_row + static_cast<int>(threadIdx.x);
    if (threadIdx.x < QUERY_ROWS && row < parameters.problem.q_len) {
      lse = load_number(row_of(parameters.lse, parameters.lse_strides, batch, head, row), lse_counter);
      delta = load_number(row_of(parameters.delta, parameters.delta_strides, batch, head, row), delta_counter);
    }
    lse_counter.flush();
    delta_counter.flush();
  }

  DEVICE void store(float* shared) const {
    const float log2_e = 0x1.715476p+0f;
    if (threadIdx.x < QUERY_ROWS) {
      shared[BASE_OFFSET + threadIdx.x] = base_of(__fmul_rn(lse, log2_e));
      shared[DELTA_OFFSET + threadIdx.x] = delta;
    }
  }
};

// The gradients of the keys from `key` on.
DEVICE void add_key_tile(const Flash2KeyGradientsParameters& parameters, const KeyBlock& block, int key) {
  const SharedTiles tiles;
  const Problem& problem = parameters.problem;
  const ScorePlace score_place;
  const GradientPlace place;

  const int batch = block.batch, shift = problem.kv_len - problem.q_len;

  const auto load_queries = [&](const QueryTile& tile) {
    start_tile<QUERY_ROWS>(
        tiles.q, row_of(parameters.q, parameters.q_strides, batch, tile.head, tile.row), parameters.q_strides,
        problem.q_len - tile.row, problem.head_dim, parameters.counters + COUNT_Q);
    commit_copies();
  };
  const auto load_gradients = [&](const QueryTile& tile) {
    start_tile<QUERY_ROWS>(
        tiles.dout, row_of(parameters.dout, parameters.dout_strides, batch, tile.head, tile.row),
        parameters.dout_strides, problem.q_len - tile.row, problem.value_dim, parameters.counters + COUNT_DOUT);
    commit_copies();
  };

  // load
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
  Statistics statistics = {};
  QueryTile tile(problem, block, key);
  if (tile.exists()) {
    load_queries(tile);
    load_gradients(tile);
    statistics.load(parameters, batch, tile.head, tile.row);
    statistics.store(tiles.shared);
  }

  while (tile.exists()) {
    const QueryTile present = tile;
    const Band band(problem, present.row + shift - key, problem.q_len - present.row, problem.kv_len - key);
    tile.advance();
    // load
    wait_for_copies<0>();
    __syncthreads();  // Q, dO and statistics are there
    // compute
    Scores scores;
    multiply_rows(scores, tiles.q, tiles.k, score_place, problem.head_dim);
    exponentiate<false>(scores, tiles.shared, problem.scale_log2, score_place);
    store_scores(tiles.scores, scores, score_place);
    __syncthreads();  // P is there
    add_to_keys(dv, tiles.scores, tiles.dout, place, band);
    multiply_rows(scores, tiles.dout, tiles.v, score_place, problem.value_dim);
    differentiate<false>(scores, tiles.shared, 1.0f, score_place);
    __syncthreads();  // P and dO have been read
    // load
    if (tile.exists()) load_gradients(tile);
    // compute
    store_scores(tiles.scores, scores, score_place);
    __syncthreads();  // dS is there
    add_to_keys(dk, tiles.scores, tiles.q, place, band);
    // load
    __syncthreads();  // Q has been read
    if (tile.exists()) {
      load_queries(tile);
      statistics.load(parameters, batch, tile.head, tile.row);
    }
#if DQ_MODE != 0
    // compute
    Gradient<THREAD_QUERIES> dq;
    clear(dq);
    add_to_queries(dq, tiles.scores, tiles.k, place, band);
    multiply(dq, problem.scale);
    const auto dq_rows = gradient_rows(
        parameters.dq_accumulator, parameters.dq_accumulator_strides, batch, present.head,
        present.row + query_of(place, 0), problem.q_len, problem.head_dim, GradientPlace::LANES_DOWN, place);
#if DQ_MODE == 1
    dq_rows.hand_in<true>(dq, parameters.counters + COUNT_DQ);
#else
    dq_rows.add_in_place(dq, parameters.counters + COUNT_DQ, parameters.counters + COUNT_DQ + 1);
#endif
#endif
    if (tile.exists()) statistics.store(tiles.shared);
  }
  // finish
  wait_for_copies<0>();
  multiply(dk, problem.scale);
  const int result_head = block.result_head(), first_key = key + place.down * THREAD_KEYS;
  gradient_rows(
      parameters.dk, parameters.dk_strides, batch, result_head, first_key, problem.kv_len, problem.head_dim, 1, place)
      .hand_in<GRID_HEADS == 2>(dk, parameters.counters + COUNT_DK);
  gradient_rows(
      parameters.dv, parameters.dv_strides, batch, result_head, first_key, problem.kv_len, problem.value_dim, 1, place)
      .hand_in<GRID_HEADS == 2>(dv, parameters.counters + COUNT_DV);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    flash2_key_gradients(const Flash2KeyGradientsParameters parameters) {
  const int matrices = KeyBlock::matrices(parameters.problem);
  const KeyBlock block(parameters.problem, blockIdx.x % matrices);
#if DQ_MODE == 2
  for (int key = 0; key < parameters.problem.kv_len; key += KEY_ROWS) {
    add_key_tile(parameters, block, key);
    __syncthreads();  // all tiles have been read
  }
#else
  // Blocks of the first keys come first: under a causal mask they take longest.
  add_key_tile(parameters, block, blockIdx.x / matrices * KEY_ROWS);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    flash2_query_gradients(const Flash2QueryGradientsParameters parameters) {
  const SharedTiles tiles;
  const Problem& problem = parameters.problem;
  const ScorePlace score_place;
  const GradientPlace place;

  // Blocks of the last query tiles come first: under a causal mask they take longest.
  const int matrices = problem.batch * problem.heads;
  const int matrix = blockIdx.x % matrices, row = (gridDim.x - 1 - blockIdx.x) / matrices * QUERY_ROWS;
  const int batch = matrix / problem.heads, head = matrix % problem.heads;
  const int kv_head = head / problem.group_size;

  // Tiles of keys that any row of the query tile sees.
  const int shift = problem.kv_len - problem.q_len;
  const int first_key = max(0, row + shift - problem.window_left);
  const int stop_key = min(problem.kv_len, min(row + QUERY_ROWS, problem.q_len) + shift + problem.window_right);

  const auto load_keys = [&](int key) {
    start_tile<KEY_ROWS>(
        tiles.k, row_of(parameters.k, parameters.k_strides, batch, kv_head, key), parameters.k_strides,
        problem.kv_len - key, problem.head_dim, parameters.counters + COUNT_K);
    commit_copies();
  };
  const auto load_values = [&](int key) {
    start_tile<KEY_ROWS>(
        tiles.v, row_of(parameters.v, parameters.v_strides, batch, kv_head, key), parameters.v_strides,
        problem.kv_len - key, problem.value_dim, parameters.counters + COUNT_V);
    commit_copies();
  };

  // load
  start_tile<QUERY_ROWS>(
      tiles.q, row_of(parameters.q, parameters.q_strides, batch, head, row), parameters.q_strides, problem.q_len - row,
      problem.head_dim, parameters.counters + COUNT_Q);
  start_tile<QUERY_ROWS>(
      tiles.dout, row_of(parameters.dout, parameters.dout_strides, batch, head, row), parameters.dout_strides,
      problem.q_len - row, problem.value_dim, parameters.counters + COUNT_DOUT);
  commit_copies();
  Statistics statistics = {};
  statistics.load(parameters, batch, head, row);
  statistics.store(tiles.shared);
  int key = first_key / KEY_ROWS * KEY_ROWS;
  if (first_key < stop_key) load_keys(key), load_values(key);
  Gradient<THREAD_QUERIES> dq;
  clear(dq);

  for (; first_key < stop_key && key < stop_key; key += KEY_ROWS) {
    const Band band(problem, row + shift - key, problem.q_len - row, problem.kv_len - key);
    const int next_key = key + KEY_ROWS;
    // load
    wait_for_copies<0>();
    __syncthreads();  // K and V are there, and dS has been read
    // compute
    Scores scores;
    multiply_rows(scores, tiles.q, tiles.k, score_place, problem.head_dim);
    exponentiate<false>(scores, tiles.shared, problem.scale_log2, score_place);
    store_scores(tiles.scores, scores, score_place);
    multiply_rows(scores, tiles.dout, tiles.v, score_place, problem.value_dim);
    differentiate<false>(scores, tiles.shared, 1.0f, score_place);
    store_scores(tiles.scores, scores, score_place);
    __syncthreads();  // dS is there, and V has been read
    // load
    if (next_key < stop_key) load_values(next_key);
    // compute
    add_to_queries(dq, tiles.scores, tiles.k, place, band);
    __syncthreads();  // K has been read
    // load
    if (next_key < stop_key) load_keys(next_key);
  }
  // finish
  wait_for_copies<0>();
  multiply(dq, problem.scale);
  gradient_rows(
      parameters.dq, parameters.dq_strides, batch, head, row + query_of(place, 0), problem.q_len, problem.head_dim,
      GradientPlace::LANES_DOWN, place)
      .hand_in<false>(dq, parameters.counters + COUNT_DQ);
}
