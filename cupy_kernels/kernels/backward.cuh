// What the backward kernels share: how the threads of a block share a tile of queries and a tile of keys, and the
// stages that recompute its probabilities and take it into the gradients.
//
// The order of every sum is fixed and depends on no tile but where it says so:
//   scores  one chain of fused multiply-adds per element, columns ascending, from +0; times scale * log2(e)
//   dP      one such chain over the columns of dO and V
//   dV, dK  one chain per element, queries ascending, the heads of a group one after the other
//   dQ      one chain per element and tile of keys, keys ascending
// Hidden elements take no part: they are computed like the others, and never read.
//
// Macros:
//   GRID_HEADS     for kernels of dK and dV, 0: a thread block serves a KV head, all its query heads in turn; 1: one
//                  query head, which has gradients of its own; 2: one query head, and adds to its KV head's sums in
//                  float32
//   STORAGE        float32, float16 or bfloat16
//   COLUMNS        smallest of 16, 32, 64, 96, 128, 192, 256 that holds head_dim and value_dim
//   QUERY_ROWS     query rows of a tile
//   KEY_ROWS       keys of a tile
//   WARPS          of a thread block: 4 or 8
//   BLOCKS         thread blocks that a multiprocessor is to hold at once
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
constexpr int THREADS = WARP * WARPS;

// Scores: 16 threads share a row. A thread has groups of adjacent rows and of adjacent keys.
constexpr int SCORES_ACROSS = 16;
constexpr int SCORES_DOWN = THREADS / SCORES_ACROSS;
constexpr int SCORE_ROWS = QUERY_ROWS / SCORES_DOWN;
constexpr int SCORE_KEYS = KEY_ROWS / SCORES_ACROSS;

constexpr int vector_of(int numbers) { return numbers % 4 == 0 ? 4 : numbers % 2 == 0 ? 2 : 1; }

constexpr int ROW_GROUP = vector_of(SCORE_ROWS);
constexpr int KEY_GROUP = vector_of(SCORE_KEYS);

// Gradients: a thread has vectors of four columns of some rows.
constexpr int ACROSS = COLUMNS == 96 ? 8 : COLUMNS % 64 ? COLUMNS / 4 : COLUMNS == 256 ? 32 : 16;
constexpr int DOWN = THREADS / ACROSS;
constexpr int WIDTH = COLUMNS / ACROSS;
constexpr int THREAD_KEYS = KEY_ROWS / DOWN;
constexpr int THREAD_QUERIES = QUERY_ROWS / DOWN;

// Columns that a loop of the scores takes, and query rows or keys that one of the gradients takes, at a time: enough
// for some 256 products of a thread.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int COLUMNS_AT_ONCE = 4;  // there the compiler loads more of them ahead than registers hold
#else
constexpr int COLUMNS_AT_ONCE = SCORE_ROWS * SCORE_KEYS < 64 ? 8 : 4;
#endif
constexpr int ROWS_AT_ONCE = THREAD_KEYS * WIDTH < 64 ? 8 : 4;
constexpr int KEYS_AT_ONCE = THREAD_QUERIES * WIDTH < 64 ? 8 : 4;

// Shared memory in floats. Vectors of four columns change places, so that lanes that read vectors of rows four apart
// meet no bank twice; there is no room for padding. Rows of scores are padded for lanes that read rows one apart, or
// write rows four apart.
constexpr int SWIZZLE = COLUMNS < 32 ? COLUMNS / 4 : 8;
constexpr int SCORE_STRIDE = KEY_ROWS + 4;
constexpr int K_OFFSET = 0;
constexpr int V_OFFSET = K_OFFSET + KEY_ROWS * COLUMNS;
constexpr int Q_OFFSET = V_OFFSET + KEY_ROWS * COLUMNS;
constexpr int DOUT_OFFSET = Q_OFFSET + QUERY_ROWS * COLUMNS;
constexpr int SCORES_OFFSET = DOUT_OFFSET + QUERY_ROWS * COLUMNS;
constexpr int BASE_OFFSET = SCORES_OFFSET + QUERY_ROWS * SCORE_STRIDE;  // of the exponents, one for each query row
constexpr int DELTA_OFFSET = BASE_OFFSET + QUERY_ROWS;
constexpr int DIVISOR_OFFSET = DELTA_OFFSET + QUERY_ROWS;
constexpr int SHARED_BYTES = 4 * (DIVISOR_OFFSET + QUERY_ROWS);

static_assert(WARPS == 4 || WARPS == 8, "scores have 8 or 16 threads down");
static_assert(QUERY_ROWS % SCORES_DOWN == 0 && KEY_ROWS % SCORES_ACROSS == 0, "threads share the scores evenly");
static_assert(SCORE_ROWS == ROW_GROUP || ROW_GROUP == 4, "a thread's rows have one swizzle");
static_assert(SCORE_KEYS == KEY_GROUP || KEY_GROUP == 4, "a thread's keys have one swizzle");
static_assert(QUERY_ROWS % DOWN == 0 && KEY_ROWS % DOWN == 0, "threads share the gradients evenly");
static_assert(QUERY_ROWS % ROWS_AT_ONCE == 0 && KEY_ROWS % KEYS_AT_ONCE == 0, "loops take whole tiles");
static_assert(QUERY_ROWS <= THREADS, "a thread has the statistics of one row");

// What a thread block has in shared memory.
struct SharedTiles {
  float* const shared = shared_memory();
  float* const k = shared + K_OFFSET;
  float* const v = shared + V_OFFSET;
  float* const q = shared + Q_OFFSET;
  float* const dout = shared + DOUT_OFFSET;
  float* const scores = shared + SCORES_OFFSET;
};

using Scores = float[SCORE_ROWS][SCORE_KEYS];

template <int ROWS>
using Gradient = float[ROWS][WIDTH];

// Where a thread stands among those that share a tile, `TILE_ACROSS` of them side by side. The lanes of a warp are in
// such an order that lanes 1 apart read the same of one operand and lanes 2 apart the same of the other: then shared
// memory serves vectors of 16 lanes at once, else of 8.
template <int TILE_ACROSS>
struct Place {
  static constexpr int LANES_ACROSS = TILE_ACROSS < 8 ? TILE_ACROSS : 8;
  static constexpr int LANES_DOWN = WARP / LANES_ACROSS;
  static constexpr int WARPS_ACROSS = TILE_ACROSS / LANES_ACROSS;
  int across, down;
  int warp_down, lane_down;

  DEVICE Place() {
    const int lane = threadIdx.x % WARP, warp = warp_index();
    across = warp % WARPS_ACROSS * LANES_ACROSS + lane / 2 % LANES_ACROSS;
    warp_down = warp / WARPS_ACROSS;
    lane_down = lane % 2 + lane / (2 * LANES_ACROSS) * 2;
    down = warp_down * LANES_DOWN + lane_down;
  }
};

using ScorePlace = Place<SCORES_ACROSS>;
using GradientPlace = Place<ACROSS>;

// A thread's i-th row of the scores, and its j-th key.
DEVICE int score_row(int down, int i) {
  return i / ROW_GROUP * (ROW_GROUP * SCORES_DOWN) + ROW_GROUP * down + i % ROW_GROUP;
}

DEVICE int score_key(int across, int j) {
  return j / KEY_GROUP * (KEY_GROUP * SCORES_ACROSS) + KEY_GROUP * across + j % KEY_GROUP;
}

// A thread's i-th row of a gradient of the queries. Of the keys' gradients it has adjacent rows.
DEVICE int query_of(const GradientPlace& place, int i) {
  return place.warp_down * (GradientPlace::LANES_DOWN * THREAD_QUERIES) + GradientPlace::LANES_DOWN * i +
         place.lane_down;
}

struct Range {
  int begin, stop;
};

// Query rows or keys that are in sight of any of some keys or rows, and those in sight of all of them, in multiples of
// AT_ONCE; these begin at -1 if there are none.
template <int AT_ONCE>
struct Visible {
  Range any, all;

  DEVICE Visible(Range any, Range seen) : any(any) {
    all.begin = (max(seen.begin, any.begin) + AT_ONCE - 1) & -AT_ONCE, all.stop = min(seen.stop, any.stop) & -AT_ONCE;
    if (all.begin >= all.stop) all.begin = -1;
  }
};

// Which elements of a tile are seen; rows and keys count from its first.
struct Band {
  int first, last;  // key minus row
  int rows, keys;   // of the tile that there are

  // `position` is the key at which row 0 stands.
  DEVICE Band(const Problem& problem, int position, int rows_left, int keys_left) {
    first = position - problem.window_left, last = position + problem.window_right;
    rows = min(QUERY_ROWS, rows_left), keys = min(KEY_ROWS, keys_left);
  }

  DEVICE bool sees(int row, int key) const { return key - row >= first && key - row <= last; }

  // What sees or is seen by the keys, or rows, from `begin` to `end` inclusive.
  DEVICE Visible<ROWS_AT_ONCE> rows_of_keys(int begin, int end) const {
    return {{max(0, begin - last), min(rows, end - first + 1)}, {end - last, begin - first + 1}};
  }

  DEVICE Visible<KEYS_AT_ONCE> keys_of_rows(int begin, int end) const {
    return {{max(0, begin + first), min(keys, end + last + 1)}, {end + first, begin + last + 1}};
  }
};

template <int COUNT>
DEVICE void load_adjacent(float* numbers, const float* from) {
  if constexpr (COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      const float4 four = load_4(from + i);
      numbers[i] = four.x, numbers[i + 1] = four.y, numbers[i + 2] = four.z, numbers[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++) numbers[i] = from[i];
  }
}

template <int COUNT>
DEVICE void store_adjacent(float* to, const float* numbers) {
  if constexpr (COUNT == 4) {
    store_4(to, make_float4(numbers[0], numbers[1], numbers[2], numbers[3]));
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++) to[i] = numbers[i];
  }
}

template <int SIZE, int COUNT>
DEVICE void clear(float (&numbers)[SIZE][COUNT]) {
#pragma unroll
  for (int i = 0; i < SIZE; i++)
#pragma unroll
    for (int j = 0; j < COUNT; j++) numbers[i][j] = 0.0f;
}

// Start to copy a tile of a matrix; `rows` are those it has from there on.
template <int ROWS>
DEVICE void start_tile(
    float* tile, const Stored* from, const Strides& strides, int rows, int columns, unsigned long long* counter) {
  TileCopy<ROWS, COLUMNS, COLUMNS, THREADS, SWIZZLE>::start(tile, from, strides.row, rows, columns, counter);
}

// scores = rows keys^T over the columns, which are a multiple of 8.
DEVICE void multiply_rows(Scores& scores, const float* rows, const float* keys, const ScorePlace& place, int columns) {
  const int row = score_row(place.down, 0), key = score_key(place.across, 0);
  const float* const a = rows + row * COLUMNS;
  const float* const b = keys + key * COLUMNS;
  clear(scores);
#pragma unroll 1
  for (int begin = 0; begin < columns; begin += COLUMNS_AT_ONCE) {
#pragma unroll
    for (int column = begin; column < begin + COLUMNS_AT_ONCE; column += 4) {
      const float* const left_column = a + swizzled<SWIZZLE>(row, column);
      const float* const right_column = b + swizzled<SWIZZLE>(key, column);
      float left[SCORE_ROWS][4];
#pragma unroll
      for (int i = 0; i < SCORE_ROWS; i++) load_vector(left[i], left_column + score_row(0, i) * COLUMNS);
#pragma unroll
      for (int j = 0; j < SCORE_KEYS; j++) {
        float right[4];
        load_vector(right, right_column + score_key(0, j) * COLUMNS);
#pragma unroll
        for (int e = 0; e < 4; e++)
#pragma unroll
          for (int i = 0; i < SCORE_ROWS; i++) scores[i][j] = __fmaf_rn(left[i][e], right[e], scores[i][j]);
      }
    }
  }
}

// Replace scores by their probabilities 2^(scores * scale_log2 - base), over the row's divisor if DIVIDED.
template <bool DIVIDED>
DEVICE void exponentiate(Scores& scores, const float* shared, float scale_log2, const ScorePlace& place) {
#pragma unroll
  for (int i = 0; i < SCORE_ROWS; i++) {
    const int row = score_row(place.down, i);
    const float base = shared[BASE_OFFSET + row], divisor = DIVIDED ? shared[DIVISOR_OFFSET + row] : 1.0f;
#pragma unroll
    for (int j = 0; j < SCORE_KEYS; j++) {
      // A modification of the scores would go here.
      const float power = exp2_polynomial(__fsub_rn(__fmul_rn(scores[i][j], scale_log2), base));
      scores[i][j] = DIVIDED ? __fdiv_rn(power, divisor) : power;
    }
  }
}

DEVICE void store_scores(float* tile, const Scores& scores, const ScorePlace& place) {
  float* const to = tile + score_row(place.down, 0) * SCORE_STRIDE + score_key(place.across, 0);
#pragma unroll
  for (int i = 0; i < SCORE_ROWS; i++)
#pragma unroll
    for (int j = 0; j < SCORE_KEYS; j += KEY_GROUP) {
      store_adjacent<KEY_GROUP>(to + score_row(0, i) * SCORE_STRIDE + score_key(0, j), &scores[i][j]);
    }
}

// Replace dP by dS = P (dP - delta), times the factor if SCALED. P is what this thread has stored.
template <bool SCALED>
DEVICE void differentiate(Scores& dscores, const float* shared, float factor, const ScorePlace& place) {
  const float* const probabilities =
      shared + SCORES_OFFSET + score_row(place.down, 0) * SCORE_STRIDE + score_key(place.across, 0);
#pragma unroll
  for (int i = 0; i < SCORE_ROWS; i++) {
    const float delta = shared[DELTA_OFFSET + score_row(place.down, i)];
#pragma unroll
    for (int j = 0; j < SCORE_KEYS; j += KEY_GROUP) {
      float weights[KEY_GROUP];
      load_adjacent<KEY_GROUP>(weights, probabilities + score_row(0, i) * SCORE_STRIDE + score_key(0, j));
#pragma unroll
      for (int e = 0; e < KEY_GROUP; e++) {
        const float gradient = __fmul_rn(weights[e], __fsub_rn(dscores[i][j + e], delta));
        dscores[i][j + e] = SCALED ? __fmul_rn(gradient, factor) : gradient;
      }
    }
  }
}

// A thread's columns of a row; the first vector begins at `from`.
DEVICE void load_columns(float (&values)[WIDTH], const float* from) {
#pragma unroll
  for (int c = 0; c < WIDTH; c += 4) load_adjacent<4>(values + c, from + c * ACROSS);
}

// Gradient of the keys += weights^T rows: dV from P and dO, dK from dS and Q.
DEVICE void add_to_keys(
    Gradient<THREAD_KEYS>& gradient, const float* weights, const float* rows, const GradientPlace& place,
    const Band& band) {
  constexpr int WARP_KEYS = GradientPlace::LANES_DOWN * THREAD_KEYS;
  const int first_key = place.down * THREAD_KEYS, first_column = 4 * place.across;
  const auto visible = band.rows_of_keys(place.warp_down * WARP_KEYS, (place.warp_down + 1) * WARP_KEYS - 1);
  weights += first_key;
  for (int row = visible.any.begin; row < visible.any.stop;) {
    if (row == visible.all.begin) {
#pragma unroll 1
      for (; row < visible.all.stop; row += ROWS_AT_ONCE) {
#pragma unroll
        for (int r = 0; r < ROWS_AT_ONCE; r++) {
          float left[THREAD_KEYS], right[WIDTH];
          load_adjacent<THREAD_KEYS>(left, weights + (row + r) * SCORE_STRIDE);
          load_columns(right, rows + (row + r) * COLUMNS + swizzled<SWIZZLE>(row + r / 4 * 4, first_column));
#pragma unroll
          for (int i = 0; i < THREAD_KEYS; i++)
#pragma unroll
            for (int c = 0; c < WIDTH; c++) gradient[i][c] = __fmaf_rn(left[i], right[c], gradient[i][c]);
        }
      }
    } else {
      float left[THREAD_KEYS], right[WIDTH];
      load_adjacent<THREAD_KEYS>(left, weights + row * SCORE_STRIDE);
      load_columns(right, rows + row * COLUMNS + swizzled<SWIZZLE>(row, first_column));
#pragma unroll
      for (int i = 0; i < THREAD_KEYS; i++) {
        if (band.sees(row, first_key + i)) {
#pragma unroll
          for (int c = 0; c < WIDTH; c++) gradient[i][c] = __fmaf_rn(left[i], right[c], gradient[i][c]);
        }
      }
      row++;
    }
  }
}

// Gradient of the queries += weights keys: dQ from dS and K.
DEVICE void add_to_queries(
    Gradient<THREAD_QUERIES>& gradient, const float* weights, const float* keys, const GradientPlace& place,
    const Band& band) {
  constexpr int LANES_DOWN = GradientPlace::LANES_DOWN, WARP_QUERIES = LANES_DOWN * THREAD_QUERIES;
  const int first_row = query_of(place, 0), first_column = 4 * place.across;
  const auto visible = band.keys_of_rows(place.warp_down * WARP_QUERIES, (place.warp_down + 1) * WARP_QUERIES - 1);
  weights += first_row * SCORE_STRIDE;
  for (int key = visible.any.begin; key < visible.any.stop;) {
    if (key == visible.all.begin) {
#pragma unroll 1
      for (; key < visible.all.stop; key += KEYS_AT_ONCE) {
#pragma unroll
        for (int begin = key; begin < key + KEYS_AT_ONCE; begin += 4) {
          const float* const from = keys + begin * COLUMNS + swizzled<SWIZZLE>(begin, first_column);
          float left[THREAD_QUERIES][4];
#pragma unroll
          for (int i = 0; i < THREAD_QUERIES; i++) {
            load_vector(left[i], weights + LANES_DOWN * i * SCORE_STRIDE + begin);
          }
#pragma unroll
          for (int e = 0; e < 4; e++) {
            float right[WIDTH];
            load_columns(right, from + e * COLUMNS);
#pragma unroll
            for (int i = 0; i < THREAD_QUERIES; i++)
#pragma unroll
              for (int c = 0; c < WIDTH; c++) gradient[i][c] = __fmaf_rn(left[i][e], right[c], gradient[i][c]);
          }
        }
      }
    } else {
      float right[WIDTH];
      load_columns(right, keys + key * COLUMNS + swizzled<SWIZZLE>(key, first_column));
#pragma unroll
      for (int i = 0; i < THREAD_QUERIES; i++) {
        const float left = weights[LANES_DOWN * i * SCORE_STRIDE + key];
        if (band.sees(first_row + LANES_DOWN * i, key)) {
#pragma unroll
          for (int c = 0; c < WIDTH; c++) gradient[i][c] = __fmaf_rn(left, right[c], gradient[i][c]);
        }
      }
      key++;
    }
  }
}

template <int ROWS>
DEVICE void multiply(Gradient<ROWS>& gradient, float factor) {
#pragma unroll
  for (int i = 0; i < ROWS; i++)
#pragma unroll
    for (int c = 0; c < WIDTH; c++) gradient[i][c] = __fmul_rn(gradient[i][c], factor);
}

// A thread's rows of a gradient in memory, `row_step` apart; `rows` and `columns` are what there is from its first
// number on.
template <class Element>
struct GradientRows {
  Element* first;
  long long row_stride;
  int rows, columns, row_step;

  // Take each vector of four that there is; `take(i, c, address)` has its place in the thread's gradient.
  template <int ROWS, class Take>
  DEVICE void visit(const Take& take) const {
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      if (i * row_step < rows) {
#pragma unroll
        for (int c = 0; c < WIDTH; c += 4) {
          if (c * ACROSS < columns) take(i, c, first + i * row_step * row_stride + c * ACROSS);
        }
      }
    }
  }

  // Store the gradient, rounded to the format, or add it to what is there.
  template <bool ADDS, int ROWS>
  DEVICE void hand_in(const Gradient<ROWS>& gradient, unsigned long long* total) const {
    ByteCounter counter(total);
    visit<ROWS>([&](int i, int c, Element* address) {
      const float values[4] = {gradient[i][c], gradient[i][c + 1], gradient[i][c + 2], gradient[i][c + 3]};
      if constexpr (ADDS) {
        add_vector(address, values, counter);
      } else {
        store_vector(address, values, counter);
      }
    });
    counter.flush();
  }

  // Add the gradient to what this block has stored, and store that.
  template <int ROWS>
  DEVICE void add_in_place(
      const Gradient<ROWS>& gradient, unsigned long long* read_total, unsigned long long* written_total) const {
    ByteCounter read_counter(read_total), written_counter(written_total);
    visit<ROWS>([&](int i, int c, Element* address) {
      float values[4];
      reload_vector(values, address, read_counter);
#pragma unroll
      for (int e = 0; e < 4; e++) values[e] = __fadd_rn(gradient[i][c + e], values[e]);
      store_vector(address, values, written_counter);
    });
    read_counter.flush();
    written_counter.flush();
  }

  // Load what this block has stored; 0 where there is nothing.
  template <int ROWS>
  DEVICE void load(Gradient<ROWS>& gradient, unsigned long long* total) const {
    ByteCounter counter(total);
    clear(gradient);
    visit<ROWS>([&](int i, int c, const Element* address) {
      float values[4];
      reload_vector(values, address, counter);
#pragma unroll
      for (int e = 0; e < 4; e++) gradient[i][c + e] = values[e];
    });
    counter.flush();
  }
};

template <class Element>
DEVICE GradientRows<Element> gradient_rows(
    Element* array, const Strides& strides, int batch, int head, int row, int rows, int columns, int row_step,
    const GradientPlace& place) {
  const int first_column = 4 * place.across;
  return {row_of(array, strides, batch, head, row) + first_column, strides.row, rows - row, columns - first_column,
          row_step};
}

// A key tile of a KV head or of one of its query heads, and the query heads that its thread block walks.
struct KeyBlock {
  int batch, first_head, stop_head, kv_head;

  // Thread blocks of one tile are those of all matrices.
  DEVICE KeyBlock(const Problem& problem, int matrix) {
    const int group_size = GRID_HEADS == 0 ? problem.group_size : 1, heads = problem.heads / group_size;
    batch = matrix / heads, first_head = matrix % heads * group_size, stop_head = first_head + group_size;
    kv_head = first_head / problem.group_size;
  }

  DEVICE int result_head() const { return GRID_HEADS == 1 ? first_head : kv_head; }

  DEVICE static int matrices(const Problem& problem) {
    return problem.batch * (GRID_HEADS == 0 ? problem.heads / problem.group_size : problem.heads);
  }
};

// Tiles of queries of which any row sees any of a tile of keys, one query head after the other.
struct QueryTile {
  int first_row, stop_row, stop_head;
  int head, row;  // of the tile at hand

  DEVICE QueryTile(const Problem& problem, const KeyBlock& block, int key) {
    const int shift = problem.kv_len - problem.q_len, stop_key = min(key + KEY_ROWS, problem.kv_len);
    const int first_query = max(0, key - shift - problem.window_right);
    stop_row = min(problem.q_len, stop_key - shift + problem.window_left);
    stop_head = first_query < stop_row ? block.stop_head : block.first_head;
    first_row = first_query / QUERY_ROWS * QUERY_ROWS;
    head = block.first_head, row = first_row;
  }

  DEVICE bool exists() const { return head < stop_head; }

  DEVICE void advance() {
    row += QUERY_ROWS;
    if (row >= stop_row) head++, row = first_row;
  }
};
