// FlashAttention forward (Dao et al. 2022, arXiv 2205.14135) on CUDA cores, the inner program of
// simattn/algorithms/flash1.py: each thread block walks the key tiles of one head and, for each, takes it into the
// output, row maximum and row sum of every query tile that sees any of it, which wait in memory.
//
// The output in memory is normalised: it is multiplied by the row sum when it is loaded and divided by it when it is
// stored. Both round, so all rows of a query tile go through every step of their tile, also those that see no key.
//
// Macros besides those of forward.cuh:
//   SUMS  float32, or STORAGE: how the output is stored in between
#include "forward.cuh"

using Sums = SUMS;

struct Flash1ForwardParameters {
  const Stored* q;
  const Stored* k;
  const Stored* v;
  Sums* out_sums;
  float* row_max;
  float* row_sum;
  unsigned long long* counters;
  Strides q_strides, k_strides, v_strides, out_sums_strides, row_max_strides, row_sum_strides;
  Problem problem;
  Operand operand;
};

enum Flash1ForwardCounter {
  COUNT_Q,
  COUNT_K,
  COUNT_V,
  COUNT_OUT_READ,
  COUNT_OUT_WRITTEN,
  COUNT_ROW_MAX_READ,
  COUNT_ROW_MAX_WRITTEN,
  COUNT_ROW_SUM_READ,
  COUNT_ROW_SUM_WRITTEN,
};

// The thread's rows of out, row maximum and row sum in memory.
struct StateRows {
  Sums* out;
  float* row_max;
  float* row_sum;
  int rows;  // from the thread's first to the end of the sequence

  DEVICE StateRows(const Flash1ForwardParameters& parameters, int batch, int head, int row) {
    out = row_of(parameters.out_sums, parameters.out_sums_strides, batch, head, row);
    row_max = row_of(parameters.row_max, parameters.row_max_strides, batch, head, row);
    row_sum = row_of(parameters.row_sum, parameters.row_sum_strides, batch, head, row);
    rows = parameters.problem.q_len - row;
  }
};

// Load the state of the thread's rows, the output times the row sum.
DEVICE void load_state(
    SoftmaxState& state, const StateRows& from, const Flash1ForwardParameters& parameters, const Place& place) {
  ByteCounter counter(parameters.counters + COUNT_OUT_READ);
  ByteCounter max_counter(parameters.counters + COUNT_ROW_MAX_READ);
  ByteCounter sum_counter(parameters.counters + COUNT_ROW_SUM_READ);
#pragma unroll
  for (int i = 0; i < ROWS_PER_THREAD; i++) {
    if (GROUPS * i < from.rows) {
      const bool counts = place.lane == 0;
      const Sums* out = from.out + GROUPS * i * parameters.out_sums_strides.row;
      state.row_max[i] = reload_number(from.row_max + GROUPS * i * parameters.row_max_strides.row, counts, max_counter);
      state.row_sum[i] = reload_number(from.row_sum + GROUPS * i * parameters.row_sum_strides.row, counts, sum_counter);
#pragma unroll
      for (int column = 0; column < OUTPUTS; column += WIDTH) {
        const int first = column * LANES + place.lane * WIDTH;
        if (first < parameters.problem.value_dim) {
          float values[WIDTH];
          reload_vector(values, out + first, counter);
#pragma unroll
          for (int c = 0; c < WIDTH; c++) state.out[i][column + c] = values[c];
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < ROWS_PER_THREAD; i++)
#pragma unroll
    for (int c = 0; c < OUTPUTS; c++) state.out[i][c] = __fmul_rn(state.out[i][c], state.row_sum[i]);
  counter.flush();
  max_counter.flush();
  sum_counter.flush();
}

DEVICE void store_state(
    const StateRows& to, const SoftmaxState& state, const Flash1ForwardParameters& parameters, const Place& place) {
  ByteCounter counter(parameters.counters + COUNT_OUT_WRITTEN);
  ByteCounter max_counter(parameters.counters + COUNT_ROW_MAX_WRITTEN);
  ByteCounter sum_counter(parameters.counters + COUNT_ROW_SUM_WRITTEN);
#pragma unroll
  for (int i = 0; i < ROWS_PER_THREAD; i++) {
    if (GROUPS * i < to.rows) {
      Sums* const out = to.out + GROUPS * i * parameters.out_sums_strides.row;
      store_normalised(out, state, i, parameters.problem.value_dim, place, counter);
      if (place.lane == 0) {
        store_number(to.row_max + GROUPS * i * parameters.row_max_strides.row, state.row_max[i], max_counter);
        store_number(to.row_sum + GROUPS * i * parameters.row_sum_strides.row, state.row_sum[i], sum_counter);
      }
    }
  }
  counter.flush();
  max_counter.flush();
  sum_counter.flush();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    flash1_forward(const Flash1ForwardParameters parameters) {
  float* const shared = shared_memory();
  float* const k = shared + K_OFFSET;
  float* const v = shared + V_OFFSET;
  float* const staged = shared + STAGED_OFFSET;
  const Problem& problem = parameters.problem;
  const Place place;
  float* const q = shared + place.warp_row * ROW_STRIDE;

  const int batch = blockIdx.x / problem.heads, head = blockIdx.x % problem.heads;
  const int kv_head = head / problem.group_size;
  const int shift = problem.kv_len - problem.q_len;

  // Warps share no row of q, so each copies its own and waits for itself alone.
  const auto load_queries = [&](int query_tile) {
    const int row = query_tile * QUERY_ROWS + place.warp_row;
    TileCopy<WARP_ROWS, COLUMNS, ROW_STRIDE, WARP>::start(
        q, row_of(parameters.q, parameters.q_strides, batch, head, row), parameters.q_strides.row, problem.q_len - row,
        problem.head_dim, parameters.counters + COUNT_Q);
    commit_copies();
  };

  for (int key = 0; key < problem.kv_len; key += KEY_ROWS) {
    // Tiles of queries of which any row sees any of the keys.
    const int stop_key = min(key + KEY_ROWS, problem.kv_len);
    const int first_query = max(0, key - shift - problem.window_right);
    const int stop_query = min(problem.q_len, stop_key - shift + problem.window_left);
    const int first_tile = first_query / QUERY_ROWS;
    const int stop_tile = first_query < stop_query ? (stop_query + QUERY_ROWS - 1) / QUERY_ROWS : first_tile;

    // load
    __syncthreads();  // K and V have been read
    TileCopy<KEY_ROWS, COLUMNS, ROW_STRIDE, THREADS>::start(
        k, row_of(parameters.k, parameters.k_strides, batch, kv_head, key), parameters.k_strides.row,
        problem.kv_len - key, problem.head_dim, parameters.counters + COUNT_K);
    TileCopy<KEY_ROWS, COLUMNS, COLUMNS, THREADS>::start(
        v, row_of(parameters.v, parameters.v_strides, batch, kv_head, key), parameters.v_strides.row,
        problem.kv_len - key, problem.value_dim, parameters.counters + COUNT_V);
    commit_copies();
    if (first_tile < stop_tile) load_queries(first_tile);
    wait_for_copies<0>();
    __syncthreads();  // K and V are there, and the state of all rows has been stored

    for (int query_tile = first_tile; query_tile < stop_tile; query_tile++) {
      const int tile_row = query_tile * QUERY_ROWS;
      if (tile_row + place.warp_row >= problem.q_len) break;
      // load
      wait_for_copies<0>();
      __syncwarp();  // Q is there, and the staged probabilities have been read
      // compute
      const Band band(place, tile_row + shift - key, problem.window_left, problem.window_right, problem.kv_len - key);
      Scores scores;
      multiply_scores(
          scores, shared + place.row * ROW_STRIDE, k + place.lane * ROW_STRIDE, band.empty() ? 0 : problem.head_dim);
      // load
      __syncwarp();  // Q has been read
      if (query_tile + 1 < stop_tile) load_queries(query_tile + 1);
      SoftmaxState state;
      load_state(state, StateRows(parameters, batch, head, tile_row + place.row), parameters, place);
      // compute
      if (!band.full) hide(scores, band, place.lane);
      update_softmax(state, scores, problem.scale_log2);
      if (band.full) {
        add_values<false>(state, scores, staged, v, place, band);
      } else if (!band.empty()) {
        add_values<true>(state, scores, staged, v, place, band);
      }
      // finish
      // The place is found anew, so that no addresses wait in registers.
      store_state(StateRows(parameters, batch, head, tile_row + Place().row), state, parameters, place);
    }
  }
}
