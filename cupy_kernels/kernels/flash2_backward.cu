// FlashAttention-2 backward (Dao 2023, arXiv 2307.08691) on CUDA cores, the programs of simattn/algorithms/flash2.py.
//
// flash2_key_gradients: each thread block keeps one key tile and its gradients on chip and streams the queries past it.
// flash2_query_gradients: each keeps one query tile and its gradient, so that no block adds to another's sum.
//
// Macros besides those of backward.cuh:
//   REDUCE_DQ  if defined, dQ is added up in memory
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
#ifdef REDUCE_DQ
enum { COUNT_DK = COUNT_DQ + 1, COUNT_DV };
#else
enum { COUNT_DK = COUNT_DQ, COUNT_DV };
#endif

// Log-sum-exp and delta of a thread's row of the tile, on their way to shared memory.
struct Statistics {
  float lse, delta;

  template <class Parameters>
  DEVICE void load(const Parameters& parameters, int batch, int head, int tile_row) {
    ByteCounter lse_counter(parameters.counters + COUNT_LSE), delta_counter(parameters.counters + COUNT_DELTA);
    const int row = tile_row + static_cast<int>(threadIdx.x);
    lse = delta = 0.0f;
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

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    flash2_key_gradients(const Flash2KeyGradientsParameters parameters) {
  float* const shared = shared_memory();
  float* const k = shared + K_OFFSET;
  float* const v = shared + V_OFFSET;
  float* const q = shared + Q_OFFSET;
  float* const dout = shared + DOUT_OFFSET;
  float* const scores_tile = shared + SCORES_OFFSET;
  const Problem& problem = parameters.problem;
  const ScorePlace score_place;
  const GradientPlace place;

  // Blocks of the first keys come first: under a causal mask they take longest.
  const int matrices = KeyBlock::matrices(problem);
  const KeyBlock block(problem, blockIdx.x % matrices);
  const int key = blockIdx.x / matrices * KEY_ROWS, batch = block.batch;
  const QueryTiles tiles(problem, key);
  const int shift = problem.kv_len - problem.q_len, steps = block.group_size * tiles.count;
  const auto head_of = [&](int step) { return block.first_head + step / tiles.count; };
  const auto row_at = [&](int step) { return (tiles.first + step % tiles.count) * QUERY_ROWS; };

  // load
  const auto load_queries = [&](int step) {
    const int row = row_at(step);
    TileCopy<QUERY_ROWS, COLUMNS, ROW_STRIDE, THREADS>::start(
        q, row_of(parameters.q, parameters.q_strides, batch, head_of(step), row), parameters.q_strides.row,
        problem.q_len - row, problem.head_dim, parameters.counters + COUNT_Q);
    commit_copies();
  };
  const auto load_gradients = [&](int step) {
    const int row = row_at(step);
    TileCopy<QUERY_ROWS, COLUMNS, ROW_STRIDE, THREADS>::start(
        dout, row_of(parameters.dout, parameters.dout_strides, batch, head_of(step), row), parameters.dout_strides.row,
        problem.q_len - row, problem.value_dim, parameters.counters + COUNT_DOUT);
    commit_copies();
  };
  TileCopy<KEY_ROWS, COLUMNS, ROW_STRIDE, THREADS>::start(
      k, row_of(parameters.k, parameters.k_strides, batch, block.kv_head, key), parameters.k_strides.row,
      problem.kv_len - key, problem.head_dim, parameters.counters + COUNT_K);
  TileCopy<KEY_ROWS, COLUMNS, ROW_STRIDE, THREADS>::start(
      v, row_of(parameters.v, parameters.v_strides, batch, block.kv_head, key), parameters.v_strides.row,
      problem.kv_len - key, problem.value_dim, parameters.counters + COUNT_V);
  commit_copies();
  Statistics statistics;
  if (steps > 0) {
    load_queries(0);
    load_gradients(0);
    statistics.load(parameters, batch, head_of(0), row_at(0));
    statistics.store(shared);
  }
  Gradient<THREAD_KEYS> dk, dv;
  clear(dk);
  clear(dv);

  for (int step = 0; step < steps; step++) {
    const int row = row_at(step);
    const Band band(problem, row + shift - key, problem.q_len - row, problem.kv_len - key);
    const bool more = step + 1 < steps;
    // load
    wait_for_copies<0>();
    __syncthreads();  // Q, dO and statistics are there
    // compute
    Scores scores;
    multiply_rows(scores, q, k, score_place, problem.head_dim);
    exponentiate<false>(scores, shared, problem.scale_log2, score_place, band);
    store_scores(scores_tile, scores, score_place);
    __syncthreads();  // P is there
    add_to_keys(dv, scores_tile, dout, place, band);
    multiply_rows(scores, dout, v, score_place, problem.value_dim);
    differentiate<false>(scores, shared, 1.0f, score_place, band);
    __syncthreads();  // P and dO have been read
    // load
    if (more) load_gradients(step + 1);
    // compute
    store_scores(scores_tile, scores, score_place);
    __syncthreads();  // dS is there
    add_to_keys(dk, scores_tile, q, place, band);
    // load
    __syncthreads();  // Q has been read
    if (more) {
      load_queries(step + 1);
      statistics.load(parameters, batch, head_of(step + 1), row_at(step + 1));
    }
#ifdef REDUCE_DQ
    // compute
    Gradient<THREAD_QUERIES> dq;
    clear(dq);
    add_to_queries(dq, scores_tile, k, place, band);
    hand_out<true>(
        dq, row_of(parameters.dq_accumulator, parameters.dq_accumulator_strides, batch, head_of(step), row),
        parameters.dq_accumulator_strides.row, problem.q_len - row, problem.head_dim, problem.scale, true, place,
        parameters.counters + COUNT_DQ, [&](int i) { return place.down + DOWN * i; });
#endif
    if (more) statistics.store(shared);
  }
  // finish
  wait_for_copies<0>();
  const auto key_in_tile = [&](int i) { return key_of(place.down, i); };
  hand_out<GRID_HEADS == 2>(
      dk, row_of(parameters.dk, parameters.dk_strides, batch, block.result_head(), key), parameters.dk_strides.row,
      problem.kv_len - key, problem.head_dim, problem.scale, true, place, parameters.counters + COUNT_DK, key_in_tile);
  hand_out<GRID_HEADS == 2>(
      dv, row_of(parameters.dv, parameters.dv_strides, batch, block.result_head(), key), parameters.dv_strides.row,
      problem.kv_len - key, problem.value_dim, 1.0f, false, place, parameters.counters + COUNT_DV, key_in_tile);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    flash2_query_gradients(const Flash2QueryGradientsParameters parameters) {
  float* const shared = shared_memory();
  float* const k = shared + K_OFFSET;
  float* const v = shared + V_OFFSET;
  float* const q = shared + Q_OFFSET;
  float* const dout = shared + DOUT_OFFSET;
  float* const scores_tile = shared + SCORES_OFFSET;
  const Problem& problem = parameters.problem;
  const ScorePlace score_place;
  const GradientPlace place;

  // Blocks of the last queries come first: under a causal mask they take longest.
  const int matrices = problem.batch * problem.heads;
  const int matrix = blockIdx.x % matrices, row = (gridDim.x - 1 - blockIdx.x) / matrices * QUERY_ROWS;
  const int batch = matrix / problem.heads, head = matrix % problem.heads, kv_head = head / problem.group_size;

  // Tiles of keys that any row of the query tile sees.
  const int shift = problem.kv_len - problem.q_len;
  const int first_key = max(0, row + shift - problem.window_left);
  const int stop_key = min(problem.kv_len, min(row + QUERY_ROWS, problem.q_len) + shift + problem.window_right);
  const int first_tile = first_key / KEY_ROWS;
  const int stop_tile = first_key < stop_key ? (stop_key + KEY_ROWS - 1) / KEY_ROWS : first_tile;

  // load
  const auto load_keys = [&](int tile) {
    const int key = tile * KEY_ROWS;
    TileCopy<KEY_ROWS, COLUMNS, ROW_STRIDE, THREADS>::start(
        k, row_of(parameters.k, parameters.k_strides, batch, kv_head, key), parameters.k_strides.row,
        problem.kv_len - key, problem.head_dim, parameters.counters + COUNT_K);
    commit_copies();
  };
  const auto load_values = [&](int tile) {
    const int key = tile * KEY_ROWS;
    TileCopy<KEY_ROWS, COLUMNS, ROW_STRIDE, THREADS>::start(
        v, row_of(parameters.v, parameters.v_strides, batch, kv_head, key), parameters.v_strides.row,
        problem.kv_len - key, problem.value_dim, parameters.counters + COUNT_V);
    commit_copies();
  };
  TileCopy<QUERY_ROWS, COLUMNS, ROW_STRIDE, THREADS>::start(
      q, row_of(parameters.q, parameters.q_strides, batch, head, row), parameters.q_strides.row, problem.q_len - row,
      problem.head_dim, parameters.counters + COUNT_Q);
  TileCopy<QUERY_ROWS, COLUMNS, ROW_STRIDE, THREADS>::start(
      dout, row_of(parameters.dout, parameters.dout_strides, batch, head, row), parameters.dout_strides.row,
      problem.q_len - row, problem.value_dim, parameters.counters + COUNT_DOUT);
  commit_copies();
  Statistics statistics;
  statistics.load(parameters, batch, head, row);
  statistics.store(shared);
  if (first_tile < stop_tile) {
    load_keys(first_tile);
    load_values(first_tile);
  }
  Gradient<THREAD_QUERIES> dq;
  clear(dq);

  for (int tile = first_tile; tile < stop_tile; tile++) {
    const int key = tile * KEY_ROWS;
    const Band band(problem, row + shift - key, problem.q_len - row, problem.kv_len - key);
    const bool more = tile + 1 < stop_tile;
    // load
    wait_for_copies<0>();
    __syncthreads();  // K and V are there, and dS has been read
    // compute
    Scores scores;
    multiply_rows(scores, q, k, score_place, problem.head_dim);
    exponentiate<false>(scores, shared, problem.scale_log2, score_place, band);
    store_scores(scores_tile, scores, score_place);
    multiply_rows(scores, dout, v, score_place, problem.value_dim);
    differentiate<false>(scores, shared, 1.0f, score_place, band);
    store_scores(scores_tile, scores, score_place);
    __syncthreads();  // dS is there, and V has been read
    // load
    if (more) load_values(tile + 1);
    // compute
    add_to_queries(dq, scores_tile, k, place, band);
    // load
    if (more) {
      __syncthreads();  // K has been read
      load_keys(tile + 1);
    }
  }
  // finish
  wait_for_copies<0>();
  hand_out<false>(
      dq, row_of(parameters.dq, parameters.dq_strides, batch, head, row), parameters.dq_strides.row,
      problem.q_len - row, problem.head_dim, problem.scale, true, place, parameters.counters + COUNT_DQ,
      [&](int i) { return place.down + DOWN * i; });
}
