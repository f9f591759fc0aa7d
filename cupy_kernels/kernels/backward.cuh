// What the backward kernels share: how the threads of a block share a tile of queries and a tile of keys, and the
// stages that recompute its probabilities and take it into the gradients.
//
// The order of every sum is fixed and depends on no tile:
//   scores     one chain of fused multiply-adds per element, columns ascending, from +0; times scale * log2(e)
//   dP         one such chain over the columns of dO and V
//   dV, dK     one chain per element, queries ascending, the heads of a group one after the other
//   dQ         one chain per element, keys ascending
// Hidden elements take no part.
//
// Macros:
//   STORAGE        float32, float16 or bfloat16
//   COLUMNS        smallest of 16, 32, 64, 96, 128, 192, 256 that holds head_dim and value_dim
//   QUERY_ROWS     query rows of a tile
//   KEY_ROWS       keys of a tile
//   BLOCKS         thread blocks that a multiprocessor is to hold at once
//   GRID_HEADS     for kernels of dK and dV, 0: a thread block serves a KV head, all its query heads in turn; 1: one query
//                  head, which has gradients of its own; 2: one query head, and adds to its KV head's sums in float32
//   COUNT_TRAFFIC  if defined, bytes moved are added to `counters`
#pragma once

#include "rows.cuh"
#include "tiles.cuh"

using Stored = STORAGE;

#if GRID_HEADS == 2
using KeyGradient = float;
#else
using KeyGradient = Stored;
#endif

constexpr int WARP = 32;
constexpr int THREADS = 256;

// Scores: a thread has rows GRID apart and keys GRID apart. Warps are 4 by 8 threads.
constexpr int GRID = 16;
constexpr int SCORE_ROWS = QUERY_ROWS / GRID;
constexpr int SCORE_KEYS = KEY_ROWS / GRID;

// Gradients: threads across the columns, each with vectors of four, and down the rows.
constexpr int ACROSS = COLUMNS == 16 ? 4 : COLUMNS % 64 == 0 ? 16 : 8;
constexpr int DOWN = THREADS / ACROSS;
constexpr int WIDTH = COLUMNS / ACROSS;  // columns of a thread
constexpr int THREAD_KEYS = KEY_ROWS / DOWN;
constexpr int THREAD_QUERIES = QUERY_ROWS / DOWN;
constexpr int KEY_VECTOR = THREAD_KEYS % 4 == 0 ? 4 : THREAD_KEYS % 2 == 0 ? 2 : 1;  // adjacent keys of a thread

// Shared memory in floats. Rows are padded, so that lanes that read vectors of adjacent rows meet no bank twice.
constexpr int ROW_STRIDE = COLUMNS + 4;
constexpr int SCORE_STRIDE = KEY_ROWS + 8;
constexpr int K_OFFSET = 0;
constexpr int V_OFFSET = K_OFFSET + KEY_ROWS * ROW_STRIDE;
constexpr int Q_OFFSET = V_OFFSET + KEY_ROWS * ROW_STRIDE;
constexpr int DOUT_OFFSET = Q_OFFSET + QUERY_ROWS * ROW_STRIDE;
constexpr int SCORES_OFFSET = DOUT_OFFSET + QUERY_ROWS * ROW_STRIDE;
constexpr int BASE_OFFSET = SCORES_OFFSET + QUERY_ROWS * SCORE_STRIDE;  // of the exponents, one for each query row
constexpr int DELTA_OFFSET = BASE_OFFSET + QUERY_ROWS;
constexpr int DIVISOR_OFFSET = DELTA_OFFSET + QUERY_ROWS;
constexpr int SHARED_BYTES = 4 * (DIVISOR_OFFSET + QUERY_ROWS);

static_assert(QUERY_ROWS % GRID == 0 && KEY_ROWS % GRID == 0, "threads share the scores evenly");
static_assert(QUERY_ROWS % DOWN == 0 && KEY_ROWS % DOWN == 0, "threads share the gradients evenly");
static_assert(QUERY_ROWS <= THREADS, "a thread has the statistics of one row");

using Scores = float[SCORE_ROWS][SCORE_KEYS];

template <int ROWS>
using Gradient = float[ROWS][WIDTH];

// Where a thread stands among those that share a tile `across` threads wide.
template <int THREADS_ACROSS>
struct Place {
  static constexpr int LANES_ACROSS = THREADS_ACROSS < 8 ? THREADS_ACROSS : 8;
  static constexpr int LANES_DOWN = WARP / LANES_ACROSS;
  static constexpr int WARPS_ACROSS = THREADS_ACROSS / LANES_ACROSS;
  int across, down;

  DEVICE Place() {
    const int lane = threadIdx.x % WARP, warp = warp_index();
    across = warp % WARPS_ACROSS * LANES_ACROSS + lane % LANES_ACROSS;
    down = warp / WARPS_ACROSS * LANES_DOWN + lane / LANES_ACROSS;
  }
};

using ScorePlace = Place<GRID>;
using GradientPlace = Place<ACROSS>;

// The i-th key of a thread.
DEVICE int key_of(int down, int i) { return i / KEY_VECTOR * (DOWN * KEY_VECTOR) + down * KEY_VECTOR + i % KEY_VECTOR; }

// Which elements of a tile are seen; rows and keys count from its first.
struct Band {
  int first, last;  // key minus row
  int rows, keys;   // of the tile that there are
  bool full;        // all of it

  // `position` is the key at which row 0 stands.
  DEVICE Band(const Problem& problem, int position, int rows_left, int keys_left) {
    first = position - problem.window_left, last = position + problem.window_right;
    rows = min(QUERY_ROWS, rows_left), keys = min(KEY_ROWS, keys_left);
    full = rows == QUERY_ROWS && keys == KEY_ROWS && first + QUERY_ROWS - 1 <= 0 && last >= KEY_ROWS - 1;
  }

  DEVICE bool sees(int row, int key) const {
    return row < rows && key < keys && key - row >= first && key - row <= last;
  }
};

template <int SIZE, int COUNT>
DEVICE void clear(float (&numbers)[SIZE][COUNT]) {
#pragma unroll
  for (int i = 0; i < SIZE; i++)
#pragma unroll
    for (int j = 0; j < COUNT; j++) numbers[i][j] = 0.0f;
}

// scores = rows keys^T over the columns.
DEVICE void multiply_rows(Scores& scores, const float* rows, const float* keys, const ScorePlace& place, int columns) {
  const float* const a = rows + place.down * ROW_STRIDE;
  const float* const b = keys + place.across * ROW_STRIDE;
  clear(scores);
#pragma unroll 1
  for (int column = 0; column < columns; column += 4) {
    float4 left[SCORE_ROWS];
#pragma unroll
    for (int i = 0; i < SCORE_ROWS; i++) left[i] = load_4(a + GRID * i * ROW_STRIDE + column);
#pragma unroll
    for (int j = 0; j < SCORE_KEYS; j++) {
      const float4 right = load_4(b + GRID * j * ROW_STRIDE + column);
#pragma unroll
      for (int i = 0; i < SCORE_ROWS; i++) scores[i][j] = __fmaf_rn(left[i].x, right.x, scores[i][j]);
#pragma unroll
      for (int i = 0; i < SCORE_ROWS; i++) scores[i][j] = __fmaf_rn(left[i].y, right.y, scores[i][j]);
#pragma unroll
      for (int i = 0; i < SCORE_ROWS; i++) scores[i][j] = __fmaf_rn(left[i].z, right.z, scores[i][j]);
#pragma unroll
      for (int i = 0; i < SCORE_ROWS; i++) scores[i][j] = __fmaf_rn(left[i].w, right.w, scores[i][j]);
    }
  }
}

// Replace scores by their probabilities 2^(scores - base), over the row's divisor if DIVIDED; hidden ones by 0.
template <bool DIVIDED>
DEVICE void exponentiate(
    Scores& scores, const float* shared, float scale_log2, const ScorePlace& place, const Band& band) {
#pragma unroll
  for (int i = 0; i < SCORE_ROWS; i++) {
    const int row = place.down + GRID * i;
    const float base = shared[BASE_OFFSET + row], divisor = DIVIDED ? shared[DIVISOR_OFFSET + row] : 1.0f;
#pragma unroll
    for (int j = 0; j < SCORE_KEYS; j++) {
      // A modification of the scores would go here.
      const float power = exp2_polynomial(__fsub_rn(__fmul_rn(scores[i][j], scale_log2), base));
      const bool seen = band.full || band.sees(row, place.across + GRID * j);
      scores[i][j] = !seen ? 0.0f : DIVIDED ? __fdiv_rn(power, divisor) : power;
    }
  }
}

DEVICE void store_scores(float* tile, const Scores& scores, const ScorePlace& place) {
#pragma unroll
  for (int i = 0; i < SCORE_ROWS; i++)
#pragma unroll
    for (int j = 0; j < SCORE_KEYS; j++) {
      tile[(place.down + GRID * i) * SCORE_STRIDE + place.across + GRID * j] = scores[i][j];
    }
}

// Replace dP by dS = P (dP - delta), times the factor if SCALED; hidden elements by 0. P is in shared memory.
template <bool SCALED>
DEVICE void differentiate(
    Scores& dscores, const float* shared, float factor, const ScorePlace& place, const Band& band) {
#pragma unroll
  for (int i = 0; i < SCORE_ROWS; i++) {
    const int row = place.down + GRID * i;
    const float delta = shared[DELTA_OFFSET + row];
#pragma unroll
    for (int j = 0; j < SCORE_KEYS; j++) {
      const int key = place.across + GRID * j;
      const float probability = shared[SCORES_OFFSET + row * SCORE_STRIDE + key];
      const float gradient = __fmul_rn(probability, __fsub_rn(dscores[i][j], delta));
      const bool seen = band.full || band.sees(row, key);
      dscores[i][j] = !seen ? 0.0f : SCALED ? __fmul_rn(gradient, factor) : gradient;
    }
  }
}

// A thread's vectors of four columns of one row.
DEVICE void load_columns(float (&values)[WIDTH], const float* row, int across) {
#pragma unroll
  for (int c = 0; c < WIDTH; c += 4) {
    const float4 four = load_4(row + c * ACROSS + 4 * across);
    values[c] = four.x, values[c + 1] = four.y, values[c + 2] = four.z, values[c + 3] = four.w;
  }
}

// Gradient of the keys += weights^T rows, over the tile's query rows: dV from P and dO, dK from dS and Q.
template <bool MASKED>
DEVICE void add_part_to_keys(
    Gradient<THREAD_KEYS>& gradient, const float* weights, const float* rows, const GradientPlace& place,
    const Band& band) {
  const int stop = MASKED ? band.rows : QUERY_ROWS;
#pragma unroll MASKED ? 1 : 8
  for (int row = 0; row < stop; row++) {
    float left[THREAD_KEYS], right[WIDTH];
#pragma unroll
    for (int i = 0; i < THREAD_KEYS; i += KEY_VECTOR) {
      const float* const from = weights + row * SCORE_STRIDE + key_of(place.down, i);
      if constexpr (KEY_VECTOR == 4) {
        const float4 four = load_4(from);
        left[i] = four.x, left[i + 1] = four.y, left[i + 2] = four.z, left[i + 3] = four.w;
      } else {
#pragma unroll
        for (int e = 0; e < KEY_VECTOR; e++) left[i + e] = from[e];
      }
    }
    load_columns(right, rows + row * ROW_STRIDE, place.across);
#pragma unroll
    for (int i = 0; i < THREAD_KEYS; i++) {
      if (!MASKED || band.sees(row, key_of(place.down, i))) {
#pragma unroll
        for (int c = 0; c < WIDTH; c++) gradient[i][c] = __fmaf_rn(left[i], right[c], gradient[i][c]);
      }
    }
  }
}

// Gradient of the queries += weights keys, over the tile's keys: dQ from dS and K.
template <bool MASKED>
DEVICE void add_part_to_queries(
    Gradient<THREAD_QUERIES>& gradient, const float* weights, const float* keys, const GradientPlace& place,
    const Band& band) {
  const int stop = MASKED ? band.keys : KEY_ROWS;
#pragma unroll MASKED ? 1 : 2
  for (int begin = 0; begin < stop; begin += 4) {
    float4 left[THREAD_QUERIES];
#pragma unroll
    for (int i = 0; i < THREAD_QUERIES; i++) {
      left[i] = load_4(weights + (place.down + DOWN * i) * SCORE_STRIDE + begin);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int key = begin + e;
      if (MASKED && key >= stop) break;
      float right[WIDTH];
      load_columns(right, keys + key * ROW_STRIDE, place.across);
#pragma unroll
      for (int i = 0; i < THREAD_QUERIES; i++) {
        if (!MASKED || band.sees(place.down + DOWN * i, key)) {
          const float weight = e == 0 ? left[i].x : e == 1 ? left[i].y : e == 2 ? left[i].z : left[i].w;
#pragma unroll
          for (int c = 0; c < WIDTH; c++) gradient[i][c] = __fmaf_rn(weight, right[c], gradient[i][c]);
        }
      }
    }
  }
}

DEVICE void add_to_keys(
    Gradient<THREAD_KEYS>& gradient, const float* weights, const float* rows, const GradientPlace& place,
    const Band& band) {
  if (band.full) {
    add_part_to_keys<false>(gradient, weights, rows, place, band);
  } else {
    add_part_to_keys<true>(gradient, weights, rows, place, band);
  }
}

DEVICE void add_to_queries(
    Gradient<THREAD_QUERIES>& gradient, const float* weights, const float* keys, const GradientPlace& place,
    const Band& band) {
  if (band.full) {
    add_part_to_queries<false>(gradient, weights, keys, place, band);
  } else {
    add_part_to_queries<true>(gradient, weights, keys, place, band);
  }
}

// A key tile of a KV head or of one of its query heads, and the query heads that its thread block walks.
struct KeyBlock {
  int batch, first_head, group_size, kv_head;

  // Thread blocks of one tile are those of all matrices.
  DEVICE KeyBlock(const Problem& problem, int matrix) {
    group_size = GRID_HEADS == 0 ? problem.group_size : 1;
    const int heads = problem.heads / group_size;
    batch = matrix / heads, first_head = matrix % heads * group_size, kv_head = first_head / problem.group_size;
  }

  DEVICE int result_head() const { return GRID_HEADS == 1 ? first_head : kv_head; }

  DEVICE static int matrices(const Problem& problem) {
    return problem.batch * (GRID_HEADS == 0 ? problem.heads / problem.group_size : problem.heads);
  }
};

// Tiles of queries of which any row sees any of a tile of keys.
struct QueryTiles {
  int first, count;

  DEVICE QueryTiles(const Problem& problem, int key) {
    const int shift = problem.kv_len - problem.q_len, stop_key = min(key + KEY_ROWS, problem.kv_len);
    const int first_query = max(0, key - shift - problem.window_right);
    const int stop_query = min(problem.q_len, stop_key - shift + problem.window_left);
    first = first_query / QUERY_ROWS;
    count = first_query < stop_query ? (stop_query + QUERY_ROWS - 1) / QUERY_ROWS - first : 0;
  }
};

// Multiply a gradient and store it, or add it, where there are rows and columns for it; `row_in_tile` gives the row of
// a thread's i-th.
template <bool ADDS, int ROWS, class Element, class RowInTile>
DEVICE void hand_out(
    const Gradient<ROWS>& gradient, Element* to, long long stride, int rows, int columns, float factor, bool scaled,
    const GradientPlace& place, unsigned long long* total, const RowInTile& row_in_tile) {
  ByteCounter counter(total);
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int row = row_in_tile(i);
    if (row < rows) {
#pragma unroll
      for (int c = 0; c < WIDTH; c += 4) {
        const int column = c * ACROSS + 4 * place.across;
        if (column < columns) {
          float values[4];
#pragma unroll
          for (int e = 0; e < 4; e++) values[e] = scaled ? __fmul_rn(gradient[i][c + e], factor) : gradient[i][c + e];
          if constexpr (ADDS) {
            add_vector(to + row * stride + column, values, counter);
          } else {
            store_vector(to + row * stride + column, values, counter);
          }
        }
      }
    }
  }
  counter.flush();
}
