// What the host decides about FlashAttention-2's forward kernel: tiles at compile time, the problem at run time.
//
// Macros:
//   STORAGE          float32, float16 or bfloat16
//   COLUMNS          smallest of 16, 32, 64, 96, 128, 192, 256 that holds head_dim and value_dim
//   QUERY_ROWS       query rows of a thread block's tile
//   KEY_ROWS         keys of a tile, a multiple of 16; sets the order of sums
//   LANES            lanes that share a query row: 8 or 16
//   ROWS_PER_THREAD  query rows of a thread: 4 or 8
//   STAGED_KEYS      keys whose probabilities pass through shared memory at a time; divides KEY_ROWS
//   BLOCKS           thread blocks that a multiprocessor is to hold at once
//   COUNT_TRAFFIC    if defined, bytes moved are added to `counters`
#pragma once

#include "tiles.cuh"

using Stored = STORAGE;

struct Flash2Parameters {
  const Stored* q;                                         // offset 0
  const Stored* k;                                         // 8
  const Stored* v;                                         // 16
  Stored* out;                                             // 24
  float* lse;                                              // 32: (batch, heads, q_len), adjacent
  unsigned long long* counters;                            // 40: bytes of q, k, v, out, lse
  Strides q_strides, k_strides, v_strides, out_strides;    // 48, 72, 96, 120
  int batch, heads;                                        // 144, 148
  int group_size;                                          // 152: query heads of a KV head
  int q_len, kv_len;                                       // 156, 160: at most 2^29
  int head_dim, value_dim;                                 // 164, 168: multiples of 8
  int window_left, window_right;                           // 172, 176: keys seen on either side; no limit is 2^30
  float scale_log2;                                        // 180: scale * log2(e)
};

enum Flash2Counter { COUNT_Q, COUNT_K, COUNT_V, COUNT_OUT, COUNT_LSE };

constexpr int WARP = 32;
constexpr int GROUPS = WARP / LANES;                   // query rows that a warp handles at once
constexpr int WARP_ROWS = GROUPS * ROWS_PER_THREAD;    // query rows of a warp
constexpr int THREADS = QUERY_ROWS / ROWS_PER_THREAD * LANES;
constexpr int SCORES = KEY_ROWS / LANES;               // scores of a thread in each of its rows
constexpr int OUTPUTS = COLUMNS / LANES;               // output columns of a thread
constexpr int WIDTH = OUTPUTS % 4 == 0 ? 4 : 2;        // adjacent ones among them
constexpr int SUM_LANES = 16;                          // partial sums of a row; part of the order of sums
constexpr int PARTS = SUM_LANES / LANES;               // of which a thread has this many

// Columns of q and k that a loop iteration takes: 8 where registers allow to load four while four are multiplied.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int COLUMNS_AT_ONCE = 4;
#else
constexpr int COLUMNS_AT_ONCE = 8;
#endif

// Shared memory in floats. Rows are padded by one vector, so that 8 lanes that read vectors of 8 adjacent rows meet no
// bank twice.
constexpr int ROW_STRIDE = COLUMNS + 4;
constexpr int STAGED_STRIDE = QUERY_ROWS + 4;
constexpr int K_OFFSET = QUERY_ROWS * ROW_STRIDE;
constexpr int V_OFFSET = K_OFFSET + KEY_ROWS * ROW_STRIDE;
constexpr int STAGED_OFFSET = V_OFFSET + KEY_ROWS * COLUMNS;
constexpr int SHARED_BYTES = 4 * (STAGED_OFFSET + STAGED_KEYS * STAGED_STRIDE);

static_assert(LANES == 8 || LANES == 16, "8 or 16 lanes share a row");
static_assert(ROWS_PER_THREAD % 4 == 0, "probabilities pass four rows at a time");
static_assert(QUERY_ROWS % WARP_ROWS == 0, "warps have whole rows");
static_assert(KEY_ROWS % SUM_LANES == 0, "partial sums have equally many keys");
static_assert(KEY_ROWS % STAGED_KEYS == 0 && STAGED_KEYS % LANES == 0, "staged keys divide the tile");
static_assert(OUTPUTS % WIDTH == 0, "lanes share the columns evenly");
