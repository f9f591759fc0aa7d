// What the forward kernels of FlashAttention and FlashAttention-2 share: how the threads of a block share a tile, and
// the stages that take a tile of keys into the running softmax of a tile of queries.
//
// The order of every sum is fixed; the tile of keys is the only size it depends on:
//   scores   one chain of fused multiply-adds per element, columns ascending, from +0; times scale * log2(e)
//   row sum  16 partial sums, the x-th of the tile's keys x, x + 16, ... ascending, added pairwise 8, 4, 2, 1 apart
//   out      times the correction, then one chain of fused multiply-adds per element, keys ascending
// Hidden keys take no part.
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

// Normalise the output of the thread's row i and store it. A row that saw no key is 0.
template <class Element>
DEVICE void store_normalised(
    Element* out_row, const SoftmaxState& state, int i, int value_dim, const Place& place, ByteCounter& counter) {
  const float divisor = state.row_sum[i] == 0.0f ? 1.0f : state.row_sum[i];
#pragma unroll
  for (int column = 0; column < OUTPUTS; column += WIDTH) {
    const int first = column * LANES + place.lane * WIDTH;
    if (first < value_dim) {
      float values[WIDTH];
#pragma unroll
      for (int c = 0; c < WIDTH; c++) values[c] = __fdiv_rn(state.out[i][column + c], divisor);
      store_vector(out_row + first, values, counter);
    }
  }
}
