// FlashAttention-2 forward (Dao 2023, arXiv 2307.08691) on CUDA cores, the program of simattn/algorithms/flash2.py:
// each thread block keeps one query tile and its output on chip and streams the keys and values past it.
//
// A tile that hides all its keys from a row changes no bit of it, so warps skip such tiles.
#include "forward.cuh"

struct Flash2ForwardParameters {
  const Stored* q;
  const Stored* k;
  const Stored* v;
  Stored* out;
  float* lse;
  unsigned long long* counters;
  Strides q_strides, k_strides, v_strides, out_strides, lse_strides;
  Problem problem;
  Operand operand;
};

enum Flash2ForwardCounter { COUNT_Q, COUNT_K, COUNT_V, COUNT_OUT, COUNT_LSE };

// Normalise the output and store it with its log-sum-exp, which is -Inf in a row that saw no key.
DEVICE void finish_softmax(
    const SoftmaxState& state, const Flash2ForwardParameters& parameters, const Place& place, int tile_row, int batch,
    int head) {
  const float ln2 = 0x1.62e43p-1f;
  ByteCounter counter(parameters.counters + COUNT_OUT);
  ByteCounter lse_counter(parameters.counters + COUNT_LSE);
  Stored* out = row_of(parameters.out, parameters.out_strides, batch, head, 0);
  float* lse = row_of(parameters.lse, parameters.lse_strides, batch, head, 0);
#pragma unroll
  for (int i = 0; i < ROWS_PER_THREAD; i++) {
    const int row = tile_row + place.row + GROUPS * i;
    if (row < parameters.problem.q_len) {
      store_normalised(out + row * parameters.out_strides.row, state, i, parameters.problem.value_dim, place, counter);
      if (place.lane == 0) {
        const float row_sum = state.row_sum[i];
        const float log_sum = __fmul_rn(__fadd_rn(state.row_max[i], log2_polynomial(row_sum)), ln2);
        store_number(lse + row * parameters.lse_strides.row, row_sum == 0.0f ? -infinity() : log_sum, lse_counter);
      }
    }
  }
  counter.flush();
  lse_counter.flush();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    flash2_forward(const Flash2ForwardParameters parameters) {
  float* const shared = shared_memory();
  float* const q = shared;
  float* const k = shared + K_OFFSET;
  float* const v = shared + V_OFFSET;
  float* const staged = shared + STAGED_OFFSET;
  const Problem& problem = parameters.problem;
  const Place place;

  // Blocks of the last query tiles come first: under a causal mask they take longest.
  const int matrices = problem.batch * problem.heads;
  const int matrix = blockIdx.x % matrices, tile = (gridDim.x - 1 - blockIdx.x) / matrices;
  const int batch = matrix / problem.heads, head = matrix % problem.heads;
  const int kv_head = head / problem.group_size;
  const int tile_row = tile * QUERY_ROWS, tile_stop = min(tile_row + QUERY_ROWS, problem.q_len);
  const Stored* k_matrix = row_of(parameters.k, parameters.k_strides, batch, kv_head, 0);
  const Stored* v_matrix = row_of(parameters.v, parameters.v_strides, batch, kv_head, 0);

  // Tiles of keys that any row of the query tile sees.
  const int shift = problem.kv_len - problem.q_len;
  const int first_key = max(0, tile_row + shift - problem.window_left);
  const int stop_key = min(problem.kv_len, tile_stop + shift + problem.window_right);
  const int first_tile = first_key / KEY_ROWS;
  const int stop_tile = first_key < stop_key ? (stop_key + KEY_ROWS - 1) / KEY_ROWS : first_tile;

  // load
  TileCopy<QUERY_ROWS, COLUMNS, ROW_STRIDE, THREADS>::start(
      q, row_of(parameters.q, parameters.q_strides, batch, head, tile_row), parameters.q_strides.row,
      problem.q_len - tile_row, problem.head_dim, parameters.counters + COUNT_Q);
  commit_copies();
  const auto load_keys = [&](int key_tile) {
    const int key = key_tile * KEY_ROWS;
    TileCopy<KEY_ROWS, COLUMNS, ROW_STRIDE, THREADS>::start(
        k, k_matrix + key * parameters.k_strides.row, parameters.k_strides.row, problem.kv_len - key,
        problem.head_dim, parameters.counters + COUNT_K);
    commit_copies();
  };
  if (first_tile < stop_tile) load_keys(first_tile);
  SoftmaxState state;

  for (int key_tile = first_tile; key_tile < stop_tile; key_tile++) {
    const int key = key_tile * KEY_ROWS;
    // load
    wait_for_copies<0>();
    __syncthreads();  // K is there, and V has been read
    TileCopy<KEY_ROWS, COLUMNS, COLUMNS, THREADS>::start(
        v, v_matrix + key * parameters.v_strides.row, parameters.v_strides.row, problem.kv_len - key,
        problem.value_dim, parameters.counters + COUNT_V);
    commit_copies();
    // compute
    const Band band(place, tile_row + shift - key, problem.window_left, problem.window_right, problem.kv_len - key);
    Scores scores;
    if (!band.empty()) {
      multiply_scores(scores, q + place.row * ROW_STRIDE, k + place.lane * ROW_STRIDE, problem.head_dim);
      if (!band.full) hide(scores, band, place.lane);
      update_softmax(state, scores, problem.scale_log2);
    }
    // load
    wait_for_copies<0>();
    __syncthreads();  // V is there, and K has been read
    if (key_tile + 1 < stop_tile) load_keys(key_tile + 1);
    // compute
    if (band.full) {
      add_values<false>(state, scores, staged, v, place, band);
    } else if (!band.empty()) {
      add_values<true>(state, scores, staged, v, place, band);
    }
  }
  // finish
  wait_for_copies<0>();
  finish_softmax(state, parameters, place, tile_row, batch, head);
}
