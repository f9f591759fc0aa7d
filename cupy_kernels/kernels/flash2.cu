// FlashAttention-2 forward (Dao 2023, arXiv 2307.08691) on CUDA cores, the program of simattn/algorithms/flash2.py:
// each thread block keeps one query tile and its output on chip and streams the keys and values past it.
//
// The order of every sum is fixed; the tile of keys is the only size it depends on:
//   scores   one chain of fused multiply-adds per element, columns ascending, from +0; times scale * log2(e)
//   row sum  16 partial sums, the x-th of the tile's keys x, x + 16, ... ascending, added pairwise 8, 4, 2, 1 apart
//   out      times the correction, then one chain of fused multiply-adds per element, keys ascending
// Hidden keys take no part. A tile that hides all its keys from a row changes no bit of it, so warps skip such tiles.
#include "flash2.cuh"

struct Place {
  int lane;      // among those that share a row
  int warp_row;  // first row of the warp in the tile
  int row;       // first row of the thread in the tile; its others follow GROUPS apart
  int stage;     // where the thread's rows begin among the staged probabilities

  DEVICE Place() {
    const int group = threadIdx.x % WARP / LANES;
    lane = threadIdx.x % LANES;
    warp_row = warp_index() * WARP_ROWS;
    row = warp_row + group;
    stage = warp_row + group * ROWS_PER_THREAD;
  }
};

// Which keys of a tile are seen; keys count from the first of the tile.
struct Band {
  int first, last;  // by row 0 of the thread; row i sees those GROUPS * i further on
  int begin, stop;  // by any row of the warp, clipped at the ends of the tile and of the keys
  bool full;        // all of them, by all rows of the warp

  // `position` is the key at which row 0 of the query tile stands.
  DEVICE Band(const Place& place, int position, int left, int right, int keys) {
    first = position + place.row - left, last = position + place.row + right;
    const int lowest = position + place.warp_row, highest = lowest + WARP_ROWS - 1;
    begin = max(0, lowest - left), stop = min(min(KEY_ROWS, keys), highest + right + 1);
    full = highest <= left && lowest + right >= KEY_ROWS - 1 && keys >= KEY_ROWS;
  }

  DEVICE bool empty() const { return begin >= stop; }

  DEVICE bool sees(int i, int key) const { return key - first >= GROUPS * i && key - last <= GROUPS * i; }
};

struct SoftmaxState {
  float out[ROWS_PER_THREAD][OUTPUTS];
  float row_max[ROWS_PER_THREAD], row_sum[ROWS_PER_THREAD];

  DEVICE SoftmaxState() {
#pragma unroll
    for (int i = 0; i < ROWS_PER_THREAD; i++) {
      row_max[i] = -infinity(), row_sum[i] = 0.0f;
#pragma unroll
      for (int c = 0; c < OUTPUTS; c++) out[i][c] = 0.0f;
    }
  }
};

using Scores = float[ROWS_PER_THREAD][SCORES];

// scores = q k^T; element (i, j) is that of the thread's row i and key lane + LANES * j.
DEVICE void multiply_scores(Scores& scores, const float* q, const float* k, int head_dim) {
#pragma unroll
  for (int i = 0; i < ROWS_PER_THREAD; i++)
#pragma unroll
    for (int j = 0; j < SCORES; j++) scores[i][j] = 0.0f;
  for (int begin = 0; begin < head_dim; begin += COLUMNS_AT_ONCE) {
#pragma unroll
    for (int column = begin; column < begin + COLUMNS_AT_ONCE; column += 4) {
      float4 a[ROWS_PER_THREAD];
#pragma unroll
      for (int i = 0; i < ROWS_PER_THREAD; i++) a[i] = load_4(q + GROUPS * i * ROW_STRIDE + column);
#pragma unroll
      for (int j = 0; j < SCORES; j++) {
        const float4 b = load_4(k + LANES * j * ROW_STRIDE + column);
#pragma unroll
        for (int i = 0; i < ROWS_PER_THREAD; i++) scores[i][j] = __fmaf_rn(a[i].x, b.x, scores[i][j]);
#pragma unroll
        for (int i = 0; i < ROWS_PER_THREAD; i++) scores[i][j] = __fmaf_rn(a[i].y, b.y, scores[i][j]);
#pragma unroll
        for (int i = 0; i < ROWS_PER_THREAD; i++) scores[i][j] = __fmaf_rn(a[i].z, b.z, scores[i][j]);
#pragma unroll
        for (int i = 0; i < ROWS_PER_THREAD; i++) scores[i][j] = __fmaf_rn(a[i].w, b.w, scores[i][j]);
      }
    }
  }
}

DEVICE void hide(Scores& scores, const Band& band, int lane) {
#pragma unroll
  for (int i = 0; i < ROWS_PER_THREAD; i++)
#pragma unroll
    for (int j = 0; j < SCORES; j++) {
      const int key = lane + LANES * j;
      if (!band.sees(i, key) || key >= band.stop) scores[i][j] = -infinity();
    }
}

// Take a tile of scores into the row maximum and sum, and replace it by its probabilities.
DEVICE void update_softmax(SoftmaxState& state, Scores& scores, float scale_log2) {
#pragma unroll
  for (int i = 0; i < ROWS_PER_THREAD; i++) {
    float row_max = state.row_max[i];
#pragma unroll
    for (int j = 0; j < SCORES; j++) {
      // A modification of the scores would go here.
      scores[i][j] = __fmul_rn(scores[i][j], scale_log2);
      row_max = maximum(row_max, scores[i][j]);
    }
#pragma unroll
    for (int distance = LANES / 2; distance; distance /= 2) row_max = maximum(row_max, shuffle_xor(row_max, distance));
    const float base = row_max == -infinity() ? 0.0f : row_max;
    // A maximum of NaN or Inf makes the whole row NaN, through the correction; the probabilities need not care.
    const float correction = __fadd_rn(exp2_polynomial(__fsub_rn(state.row_max[i], base)), __fsub_rn(base, base));
    state.row_max[i] = row_max;
    float sums[PARTS] = {};
#pragma unroll
    for (int j = 0; j < SCORES; j++) {
      scores[i][j] = exp2_of_nonpositive(__fsub_rn(scores[i][j], base));
      sums[j % PARTS] = __fadd_rn(sums[j % PARTS], scores[i][j]);
    }
#pragma unroll
    for (int distance = PARTS / 2; distance; distance /= 2)
#pragma unroll
      for (int part = 0; part < distance; part++) sums[part] = __fadd_rn(sums[part], sums[part + distance]);
    float sum = sums[0];
#pragma unroll
    for (int distance = LANES / 2; distance; distance /= 2) sum = __fadd_rn(sum, shuffle_xor(sum, distance));
    state.row_sum[i] = __fmaf_rn(state.row_sum[i], correction, sum);
#pragma unroll
    for (int c = 0; c < OUTPUTS; c++) state.out[i][c] = __fmul_rn(state.out[i][c], correction);
  }
}

// out += probabilities v, without hidden elements. The probabilities of a warp's rows pass to its other lanes through
// shared memory that no other warp touches.
template <bool MASKED>
DEVICE void add_values(
    SoftmaxState& state, const Scores& probabilities, float* staged, const float* v, const Place& place,
    const Band& band) {
#pragma unroll
  for (int begin = 0; begin < KEY_ROWS; begin += STAGED_KEYS) {
    if (begin > 0) __syncwarp();
#pragma unroll
    for (int j = begin / LANES; j < (begin + STAGED_KEYS) / LANES; j++)
#pragma unroll
      for (int i = 0; i < ROWS_PER_THREAD; i += 4) {
        const auto& p = probabilities;
        store_4(
            staged + (place.lane + LANES * j - begin) * STAGED_STRIDE + place.stage + i,
            make_float4(p[i][j], p[i + 1][j], p[i + 2][j], p[i + 3][j]));
      }
    __syncwarp();
    const int first = MASKED ? max(begin, band.begin) : begin;
    const int stop = MASKED ? min(begin + STAGED_KEYS, band.stop) : begin + STAGED_KEYS;
#pragma unroll MASKED ? 1 : 4
    for (int key = first; key < stop; key++) {
      float weights[ROWS_PER_THREAD];
#pragma unroll
      for (int i = 0; i < ROWS_PER_THREAD; i += 4) {
        const float4 four = load_4(staged + (key - begin) * STAGED_STRIDE + place.stage + i);
        weights[i] = four.x, weights[i + 1] = four.y, weights[i + 2] = four.z, weights[i + 3] = four.w;
      }
#pragma unroll
      for (int column = 0; column < OUTPUTS; column += WIDTH) {
        float values[WIDTH];
        load_vector(values, v + key * COLUMNS + (column * LANES + place.lane * WIDTH));
#pragma unroll
        for (int i = 0; i < ROWS_PER_THREAD; i++) {
          if (!MASKED || band.sees(i, key)) {
#pragma unroll
            for (int c = 0; c < WIDTH; c++) {
              state.out[i][column + c] = __fmaf_rn(weights[i], values[c], state.out[i][column + c]);
            }
          }
        }
      }
    }
  }
}

// Normalise the output and store it with its log-sum-exp. A row that saw no key is 0, its log-sum-exp -Inf.
DEVICE void finish_softmax(
    SoftmaxState& state, const Flash2Parameters& parameters, const Place& place, int tile_row, int batch, int head) {
  const float ln2 = 0x1.62e43p-1f;
  ByteCounter counter(parameters.counters + COUNT_OUT);
  ByteCounter lse_counter(parameters.counters + COUNT_LSE);
  Stored* out = parameters.out + batch * parameters.out_strides.batch + head * parameters.out_strides.head;
  float* lse = parameters.lse + (static_cast<long long>(batch) * parameters.heads + head) * parameters.q_len;
#pragma unroll
  for (int i = 0; i < ROWS_PER_THREAD; i++) {
    const int row = tile_row + place.row + GROUPS * i;
    if (row < parameters.q_len) {
      const float row_sum = state.row_sum[i], divisor = row_sum == 0.0f ? 1.0f : row_sum;
#pragma unroll
      for (int column = 0; column < OUTPUTS; column += WIDTH) {
        const int first = column * LANES + place.lane * WIDTH;
        if (first < parameters.value_dim) {
          float values[WIDTH];
#pragma unroll
          for (int c = 0; c < WIDTH; c++) values[c] = __fdiv_rn(state.out[i][column + c], divisor);
          store_vector(out + row * parameters.out_strides.row + first, values, counter);
        }
      }
      if (place.lane == 0) {
        const float log_sum = __fmul_rn(__fadd_rn(state.row_max[i], log2_polynomial(row_sum)), ln2);
        store_number(lse + row, row_sum == 0.0f ? -infinity() : log_sum, lse_counter);
      }
    }
  }
  counter.flush();
  lse_counter.flush();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) flash2_forward(const Flash2Parameters parameters) {
  float* const shared = shared_memory();
  float* const q = shared;
  float* const k = shared + K_OFFSET;
  float* const v = shared + V_OFFSET;
  float* const staged = shared + STAGED_OFFSET;
  const Place place;

  // Blocks of the last query tiles come first: under a causal mask they take longest.
  const int matrices = parameters.batch * parameters.heads;
  const int matrix = blockIdx.x % matrices, tile = (gridDim.x - 1 - blockIdx.x) / matrices;
  const int batch = matrix / parameters.heads, head = matrix % parameters.heads;
  const int kv_head = head / parameters.group_size;
  const int tile_row = tile * QUERY_ROWS, tile_stop = min(tile_row + QUERY_ROWS, parameters.q_len);
  const Stored* q_matrix = parameters.q + batch * parameters.q_strides.batch + head * parameters.q_strides.head;
  const Stored* k_matrix = parameters.k + batch * parameters.k_strides.batch + kv_head * parameters.k_strides.head;
  const Stored* v_matrix = parameters.v + batch * parameters.v_strides.batch + kv_head * parameters.v_strides.head;

  // Tiles of keys that any row of the query tile sees.
  const int shift = parameters.kv_len - parameters.q_len;
  const int first_key = max(0, tile_row + shift - parameters.window_left);
  const int stop_key = min(parameters.kv_len, tile_stop + shift + parameters.window_right);
  const int first_tile = first_key / KEY_ROWS;
  const int stop_tile = first_key < stop_key ? (stop_key + KEY_ROWS - 1) / KEY_ROWS : first_tile;

  // load
  TileCopy<QUERY_ROWS, COLUMNS, ROW_STRIDE, THREADS>::start(
      q, q_matrix + tile_row * parameters.q_strides.row, parameters.q_strides.row, parameters.q_len - tile_row,
      parameters.head_dim, parameters.counters + COUNT_Q);
  commit_copies();
  const auto load_keys = [&](int key_tile) {
    const int key = key_tile * KEY_ROWS;
    TileCopy<KEY_ROWS, COLUMNS, ROW_STRIDE, THREADS>::start(
        k, k_matrix + key * parameters.k_strides.row, parameters.k_strides.row, parameters.kv_len - key,
        parameters.head_dim, parameters.counters + COUNT_K);
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
        v, v_matrix + key * parameters.v_strides.row, parameters.v_strides.row, parameters.kv_len - key,
        parameters.value_dim, parameters.counters + COUNT_V);
    commit_copies();
    // compute
    const Band band(
        place, tile_row + shift - key, parameters.window_left, parameters.window_right, parameters.kv_len - key);
    Scores scores;
    if (!band.empty()) {
      multiply_scores(scores, q + place.row * ROW_STRIDE, k + place.lane * ROW_STRIDE, parameters.head_dim);
      if (!band.full) hide(scores, band, place.lane);
      update_softmax(state, scores, parameters.scale_log2);
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
