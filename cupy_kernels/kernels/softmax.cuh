// Rows of scores and their like, of as many columns as there are keys. Adjacent threads share a row, vectors of four
// columns dealt out among them in turn.
//
// Macros:
//   STORAGE        float32, float16 or bfloat16
//   PASSES         how often a row is read; in the first of several its statistics are found
//   KEY_ROWS       PASSES > 1: columns of a tile, a multiple of 16 up to 256; sets the order of sums
//   ROW_COLUMNS    PASSES == 1: columns of the buffer that keeps a whole row on chip, a multiple of 32, at least kv_len
//   BLOCK_ROWS     rows of a thread block
//   ROW_THREADS    threads that share a row: 4, or in one pass 4, 8, 16 or 32
//   COUNT_TRAFFIC  if defined, bytes moved are added to `counters`
#pragma once

#include "rows.cuh"
#include "tiles.cuh"

using Stored = STORAGE;

constexpr int THREADS = BLOCK_ROWS * ROW_THREADS;

static_assert(THREADS % 32 == 0, "warps are whole");
static_assert(ROW_THREADS >= SUM_THREADS && 32 % ROW_THREADS == 0, "a warp has whole rows");

// Adjacent rows begin 16 banks apart: two are read at once where four threads share a row.
#if PASSES == 1
constexpr int RESIDENT_THREADS = 1024;  // of a multiprocessor, which fixes their registers
constexpr int BUFFER_STRIDE = ROW_COLUMNS + 16;
constexpr int BUFFER_BYTES = 4 * BLOCK_ROWS * BUFFER_STRIDE;
static_assert(ROW_COLUMNS % 32 == 0, "rows begin 16 banks apart");
#else
constexpr int RESIDENT_THREADS = KEY_ROWS <= 128 ? 512 : 256;
constexpr int BUFFER_BYTES = 0;
constexpr int TILE_VECTORS = KEY_ROWS / SUM_COLUMNS;  // of a thread
static_assert(ROW_THREADS == SUM_THREADS, "each thread has a fourth of the partial sums");
static_assert(KEY_ROWS % SUM_COLUMNS == 0, "partial sums have equally many columns");
static_assert(KEY_ROWS <= 256, "tiles stay in registers");
#endif

constexpr int BLOCKS = THREADS < RESIDENT_THREADS ? RESIDENT_THREADS / THREADS : 1;

// The row of a thread, and the keys that it sees.
struct RowPlace {
  int batch, head, row;
  int lane;            // among the threads of the row
  bool exists;         // false beyond the last row
  unsigned first_key;  // may lie before the first
  unsigned keys;       // seen, from there on, less one

  DEVICE explicit RowPlace(const Problem& problem) {
    const int matrices = problem.batch * problem.heads, matrix = blockIdx.x % matrices;
    batch = matrix / problem.heads, head = matrix % problem.heads;
    row = blockIdx.x / matrices * BLOCK_ROWS + static_cast<int>(threadIdx.x / ROW_THREADS);
    lane = threadIdx.x % ROW_THREADS;
    exists = row < problem.q_len;
    first_key = static_cast<unsigned>(row + problem.kv_len - problem.q_len) - problem.window_left;
    keys = static_cast<unsigned>(problem.window_left) + problem.window_right;
  }

  DEVICE bool sees(int key) const { return key - first_key <= keys; }

  // Replace what is hidden among the four numbers from a column on.
  DEVICE void hide(float (&values)[4], int column, float by) const {
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = sees(column + i) ? values[i] : by;
  }
};

#if PASSES > 1
// A thread's vectors of a tile, of which the row has `columns` columns left.
using Tile = float[TILE_VECTORS][4];

DEVICE void fetch_tile(Tile& tile, const Stored* from, int lane, int columns, float rest, ByteCounter& counter) {
  if (columns >= KEY_ROWS) {
#pragma unroll
    for (int i = 0; i < TILE_VECTORS; i++) fetch_vector(tile[i], from + (i * SUM_THREADS + lane) * 4, counter);
  } else {
#pragma unroll
    for (int i = 0; i < TILE_VECTORS; i++) {
      const int column = (i * SUM_THREADS + lane) * 4;
      fetch_columns(tile[i], from + column, columns - column, rest, counter);
    }
  }
}

DEVICE void store_tile(Stored* to, const Tile& tile, int lane, int columns, ByteCounter& counter) {
  if (columns >= KEY_ROWS) {
#pragma unroll
    for (int i = 0; i < TILE_VECTORS; i++) store_vector(to + (i * SUM_THREADS + lane) * 4, tile[i], counter);
  } else {
#pragma unroll
    for (int i = 0; i < TILE_VECTORS; i++) {
      const int column = (i * SUM_THREADS + lane) * 4;
      store_columns(to + column, tile[i], columns - column, counter);
    }
  }
}
#endif

// What the first four threads of a row have, in all of them.
DEVICE float share_with_row(float value, int lane) {
#pragma unroll
  for (int distance = SUM_THREADS; distance < ROW_THREADS; distance *= 2) {
    const float other = shuffle_xor(value, distance);
    value = lane & distance ? other : value;
  }
  return value;
}

DEVICE float maximum_of_row(float value) {
#pragma unroll
  for (int distance = ROW_THREADS / 2; distance; distance /= 2) value = maximum(value, shuffle_xor(value, distance));
  return value;
}
