// FlashAttention-2 forward (Dao 2023, arXiv 2307.08691) on tensor cores (sm_80 and later), the program of
// simattn/algorithms/flash2.py: each thread block keeps one query tile and its output on chip and streams the keys and
// values past it.
//
// A warp has whole query rows: its scores, probabilities and outputs stay in its registers.
//
// The order of every sum is fixed; the tile of keys is the only size it depends on:
//   scores   one chain of fused dot products of 16 columns per element, columns ascending
//   row sum  8 partial sums, of the tile's keys 8 j + x, j ascending; 0 + 1, 2 + 3, ..., then pairwise 1, 2 apart
//   out      times the correction, then one chain of fused dot products of 16 keys per element, keys ascending
// Tiles that hide all their keys from a row change no bit of it, so warps skip them.
//
// Macros:
//   STORAGE         float16 or bfloat16
//   COLUMNS         smallest of 16, 32, 64, 96, 128, 192, 256 that holds head_dim and value_dim
//   VALUE_COLUMNS   the same, or fewer that hold value_dim
//   QUERY_ROWS      query rows of a thread block's tile
//   KEY_ROWS        keys of a tile, a multiple of 16; sets the order of sums
//   WARP_ROWS       query rows of a warp, a multiple of 16
//   STAGES          tiles of keys and values in shared memory
//   RESIDENT_STEPS  of the query tile's columns, so many times 16 stay in registers
//   BLOCKS          thread blocks that a multiprocessor is to hold at once
//   COUNT_TRAFFIC   if defined, bytes moved are added to `counters`
#include "matrix_tiles.cuh"
#include "problem.cuh"
#include "tiles.cuh"

using Stored = STORAGE;

constexpr int WARP = 32;
constexpr int STEP = 16;                           // contracted elements of a product
constexpr int WARPS = QUERY_ROWS / WARP_ROWS;
constexpr int THREADS = WARP * WARPS;
constexpr int ROW_TILES = WARP_ROWS / 16;          // of a warp; each has two rows of a thread, 8 apart
constexpr int KEY_PAIRS = KEY_ROWS / 16;           // pairs of tiles of 8 keys; steps of the second product
constexpr int STEPS = COLUMNS / STEP;              // of the first product
constexpr int VALUE_PAIRS = VALUE_COLUMNS / 16;    // pairs of tiles of 8 columns of the output

constexpr bool SKIPS_CORRECTIONS = STAGES == 1 && VALUE_COLUMNS >= 3 * KEY_ROWS;

using QueryTile = MatrixTile<QUERY_ROWS, COLUMNS>;
using KeyTile = MatrixTile<KEY_ROWS, COLUMNS>;
using ValueTile = MatrixTile<KEY_ROWS, VALUE_COLUMNS>;
using OutputTile = MatrixTile<QUERY_ROWS, VALUE_COLUMNS>;

// Shared memory in bytes: queries, then output; keys and values of each stage.
constexpr int K_OFFSET = QueryTile::BYTES > OutputTile::BYTES ? QueryTile::BYTES : OutputTile::BYTES;
constexpr int V_OFFSET = K_OFFSET + STAGES * KeyTile::BYTES;
constexpr int SHARED_BYTES = V_OFFSET + STAGES * ValueTile::BYTES;

static_assert(WARP_ROWS % 16 == 0 && QUERY_ROWS % WARP_ROWS == 0, "warps have whole tiles of rows");
static_assert(KEY_ROWS % 16 == 0 && COLUMNS % 16 == 0 && VALUE_COLUMNS % 16 == 0, "products take 16 at a time");
static_assert(STAGES == 1 || STAGES == 2, "one tile of keys and values is loaded ahead at most");
static_assert(RESIDENT_STEPS <= STEPS, "the query tile has so many columns");
static_assert(SHARED_BYTES <= 232448, "no multiprocessor has more shared memory");

struct Flash2TensorForwardParameters {
  const Stored* q;
  const Stored* k;
  const Stored* v;
  Stored* out;
  float* lse;
  unsigned long long* counters;
  Strides q_strides, k_strides, v_strides, out_strides, lse_strides;
  Problem problem;
  Operand operand;  // `heads`: query matrices whose keys and values are worked on at a time
};

enum Flash2TensorForwardCounter { COUNT_Q, COUNT_K, COUNT_V, COUNT_OUT, COUNT_LSE };

// The query tile of a thread block.
struct Work {
  unsigned batch, head;
  int row;  // first of the tile

  DEVICE Work(const Problem& problem, unsigned together, unsigned block) {
    // Matrices take turns that many at a time, so that their keys and values stay in the cache. Blocks of the last query
    // tiles come first: under a causal mask they take longest.
    const unsigned heads = problem.heads, matrices = problem.batch * heads;
    const unsigned tiles = (problem.q_len + QUERY_ROWS - 1u) / QUERY_ROWS;
    const unsigned turn = block / (together * tiles), first = turn * together, within = block - first * tiles;
    const unsigned present = min(together, matrices - first), tile = within / present;
    const unsigned matrix = first + within - tile * present;
    batch = matrix / heads, head = matrix - batch * heads;
    row = (tiles - 1 - tile) * QUERY_ROWS;
  }
};

// Where a thread's numbers lie in a tile of 16 rows or 8 columns: in row `group` and the row 8 further on, in column 2
// `quad` and the next.
struct Place {
  int lane, group, quad;

  DEVICE Place() {
    lane = fresh_thread_index() % WARP;
    group = lane / 4, quad = lane % 4;
  }
};

// Offsets of the rows whose addresses a lane gives to loads of matrices.
struct Offsets {
  unsigned q, k, v;

  DEVICE explicit Offsets(int warp_row) {
    const unsigned lane = threadIdx.x % WARP;
    q = QueryTile::offset(warp_row + lane % 16, lane / 16);
    k = KeyTile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    v = ValueTile::offset(lane % 16, lane / 16);
  }
};

// Tiles of keys that any row of a query tile sees, and those of which all rows see all keys.
struct KeyTiles {
  int first, stop;
  int first_full, stop_full;

  DEVICE KeyTiles(const Problem& problem, int row) {
    const int first_position = row + problem.kv_len - problem.q_len;
    const int last_position = first_position + min(QUERY_ROWS, problem.q_len - row) - 1;
    const int first_key = max(0, first_position - problem.window_left);
    const int stop_key = min(problem.kv_len, last_position + problem.window_right + 1);
    first = first_key / KEY_ROWS, stop = first_key < stop_key ? (stop_key + KEY_ROWS - 1) / KEY_ROWS : first;
    first_full = (max(0, last_position - problem.window_left) + KEY_ROWS - 1) / KEY_ROWS;
    stop_full = max(0, min(problem.kv_len, first_position + problem.window_right + 1)) / KEY_ROWS;
  }
};

// Which keys the rows of a warp see; the warp's row i sees those from first + i to last + i, and before `stop`.
struct Band {
  int first, last, stop;
  int begin, end;  // keys that any of its rows sees

  DEVICE Band(const Problem& problem, int row) {
    const int position = row + problem.kv_len - problem.q_len, rows = min(WARP_ROWS, problem.q_len - row);
    first = position - problem.window_left, last = position + problem.window_right, stop = problem.kv_len;
    begin = rows > 0 ? max(0, first) : stop, end = min(stop, last + rows);
  }

  DEVICE bool empty(int key) const { return begin >= key + KEY_ROWS || end <= key; }
};

// Of the thread: two rows of each row tile, two columns of each tile of 8 columns.
struct SoftmaxState {
  float out[ROW_TILES][2 * VALUE_PAIRS][4];
  float row_max[ROW_TILES][2], row_sum[ROW_TILES][2][2];

  DEVICE SoftmaxState() {
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        row_max[m][half] = -infinity(), row_sum[m][half][0] = row_sum[m][half][1] = 0.0f;
      }
#pragma unroll
      for (int n = 0; n < 2 * VALUE_PAIRS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) out[m][n][i] = 0.0f;
    }
  }
};

using Scores = float[ROW_TILES][2 * KEY_PAIRS][4];
using Probabilities = unsigned[ROW_TILES][KEY_PAIRS][4];  // as left matrices of the second product
using Queries = unsigned[ROW_TILES][4];                   // of one step

// `first` is the address that the lane gives for the first columns.
DEVICE void load_queries(Queries& queries, unsigned first, int step) {
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++) {
    load_matrices(queries[m], QueryTile::right_of(first, 2 * step) + m * 16 * QueryTile::ROW_BYTES);
  }
}

// scores = q k^T; each load is under way while the product before it is computed.
DEVICE void multiply_scores(
    Scores& scores, const Queries (&resident)[RESIDENT_STEPS + 1], unsigned first_query, unsigned first_key) {
  unsigned keys[2][4];
  Queries queries[2];
  const auto& loaded = queries;
  const auto load_keys = [&](unsigned(&words)[4], int step, int n) {
    load_matrices(words, KeyTile::right_of(first_key, 2 * step) + n * 16 * KeyTile::ROW_BYTES);
  };
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
    for (int n = 0; n < 2 * KEY_PAIRS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) scores[m][n][i] = 0.0f;
  if (RESIDENT_STEPS == 0) load_queries(queries[0], first_query, 0);
  load_keys(keys[0], 0, 0);
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    if (step + 1 < STEPS && step + 1 >= RESIDENT_STEPS) {
      load_queries(queries[(step + 1) % 2], first_query, step + 1);
    }
    const Queries& left = step < RESIDENT_STEPS ? resident[min(step, RESIDENT_STEPS)] : loaded[step % 2];
#pragma unroll
    for (int n = 0; n < KEY_PAIRS; n++) {
      const int next = step * KEY_PAIRS + n + 1;
      const auto& right = keys[(next - 1) % 2];
      if (next < STEPS * KEY_PAIRS) load_keys(keys[next % 2], next / KEY_PAIRS, next % KEY_PAIRS);
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++) {
        multiply_add<Stored>(scores[m][2 * n], left[m], right[0], right[1]);
        multiply_add<Stored>(scores[m][2 * n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// Hide the scores of keys that a row does not see; `key` is the first of the tile.
DEVICE void hide(Scores& scores, const Band& band, int key) {
  const Place place;
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      // Relative to the thread's first column
      const int row = 16 * m + 8 * half + place.group, before = key + 2 * place.quad;
      const int first = band.first + row - before, last = min(band.last + row, band.stop - 1) - before;
#pragma unroll
      for (int n = 0; n < 2 * KEY_PAIRS; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int column = 8 * n + i;
          if (column < first || column > last) scores[m][n][2 * half + i] = -infinity();
        }
    }
}

// Take a tile of scores into the row maxima and sums, and return its probabilities.
DEVICE void update_softmax(SoftmaxState& state, Probabilities& probabilities, Scores& scores, float scale_log2) {
  float corrections[ROW_TILES][2];
  bool changes = false;
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float row_max = state.row_max[m][half];
#pragma unroll
      for (int n = 0; n < 2 * KEY_PAIRS; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) row_max = maximum_number(row_max, scores[m][n][2 * half + i]);
      row_max = maximum_number(row_max, shuffle_xor(row_max, 1));
      row_max = maximum_number(row_max, shuffle_xor(row_max, 2));
      const float reference = reference_of(row_max, scale_log2);
      const float base = __fmul_rn(reference, scale_log2);
      const float correction = exp2_approximate(__fmul_rn(__fsub_rn(state.row_max[m][half], reference), scale_log2));
      state.row_max[m][half] = row_max;
      float(&row_sum)[2] = state.row_sum[m][half];
#pragma unroll
      for (int n = 0; n < 2 * KEY_PAIRS; n++) {
        float weights[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          // A modification of the scores would go here.
          weights[i] = exp2_approximate(__fmaf_rn(scores[m][n][2 * half + i], scale_log2, -base));
          row_sum[i] = n == 0 ? __fmaf_rn(row_sum[i], correction, weights[i]) : __fadd_rn(row_sum[i], weights[i]);
        }
        probabilities[m][n / 2][n % 2 * 2 + half] = round_pair<Stored>(weights[0], weights[1]);
      }
      corrections[m][half] = correction;
      changes |= correction != 1.0f;
    }
  // Times 1 changes no bit: a warp whose maxima all stay leaves the output alone, where that is most of the work.
  if (!SKIPS_CORRECTIONS || any_of_warp(changes)) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
      for (int n = 0; n < 2 * VALUE_PAIRS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) state.out[m][n][i] = __fmul_rn(state.out[m][n][i], corrections[m][i / 2]);
  }
}

DEVICE void load_value_matrices(unsigned (&values)[4], unsigned first, int step, int n) {
  load_transposed_matrices(values, ValueTile::right_of(first, 2 * n) + step * 16 * ValueTile::ROW_BYTES);
}

// out += probabilities v
DEVICE void add_values(SoftmaxState& state, const Probabilities& probabilities, unsigned first_value) {
  unsigned values[2][4];
  load_value_matrices(values[0], first_value, 0, 0);
#pragma unroll
  for (int step = 0; step < KEY_PAIRS; step++)
#pragma unroll
    for (int n = 0; n < VALUE_PAIRS; n++) {
      const int next = step * VALUE_PAIRS + n + 1;
      const auto& right = values[(next - 1) % 2];
      if (next < KEY_PAIRS * VALUE_PAIRS) {
        load_value_matrices(values[next % 2], first_value, next / VALUE_PAIRS, next % VALUE_PAIRS);
      }
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++) {
        multiply_add<Stored>(state.out[m][2 * n], probabilities[m][step], right[0], right[1]);
        multiply_add<Stored>(state.out[m][2 * n + 1], probabilities[m][step], right[2], right[3]);
      }
    }
}

// The same where values of hidden keys are infinite or NaN, whose product with a probability of 0 is NaN: row by row,
// the values that the row does not see taken for 0. It is rare; loops that are not unrolled keep it out of the way.
DEVICE void add_seen_values(
    SoftmaxState& state, const Probabilities& probabilities, unsigned first_value, const Band& band, int key) {
  const Place place;
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll 1
    for (int row = 0; row < 16; row++) {
#pragma unroll
      for (int n = 0; n < VALUE_PAIRS; n++) {
        float sums[2][4];
#pragma unroll
        for (int i = 0; i < 8; i++) sums[i / 4][i % 4] = state.out[m][2 * n + i / 4][i % 4];
#pragma unroll 1
        for (int step = 0; step < KEY_PAIRS; step++) {
          unsigned left[4], right[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            left[i] = probabilities[m][0][i];
#pragma unroll
            for (int other = 1; other < KEY_PAIRS; other++) left[i] = step == other ? probabilities[m][other][i] : left[i];
          }
          load_value_matrices(right, first_value, step, n);
          const int first = key + 16 * step + 2 * place.quad - (16 * m + row);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int at = first + 8 * (i % 2);
            if (at < band.first || at > band.last) right[i] &= 0xffff0000u;
            if (at + 1 < band.first || at + 1 > band.last) right[i] &= 0x0000ffffu;
          }
          multiply_add<Stored>(sums[0], left, right[0], right[1]);
          multiply_add<Stored>(sums[1], left, right[2], right[3]);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
          if (place.group + i % 4 / 2 * 8 == row) state.out[m][2 * n + i / 4][i % 4] = sums[i / 4][i % 4];
        }
      }
    }
  }
}

// Fields of the exponents of two numbers in a word.
template <class Stored>
constexpr unsigned EXPONENTS = 0x7f807f80u;
template <>
constexpr unsigned EXPONENTS<float16> = 0x7c007c00u;

// Whether the thread's part of a tile of values holds Inf or NaN.
DEVICE bool holds_special(unsigned v_tile) {
  constexpr unsigned UNITS = 0x80008000u - EXPONENTS<Stored>;  // what carries a field of all ones into the sign's place
  unsigned carried = 0;
  MatrixCopy<ValueTile, THREADS>::for_each(fresh_thread_index(), [&](unsigned offset, int, int, int, int) {
    const Four words = load_shared(v_tile + offset);
    const unsigned four[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) carried |= (four[i] & EXPONENTS<Stored>) + UNITS;
  });
  return carried & 0x80008000u;
}

// Normalise the output and store it with its log-sum-exp, which is -Inf in a row that saw no key. A warp's rows pass
// through its part of the output tile, so that they are stored 16 bytes at a time.
DEVICE void finish_softmax(
    const SoftmaxState& state, const Flash2TensorForwardParameters& parameters, unsigned out_tile) {
  const Problem& problem = parameters.problem;
  const Work work(problem, parameters.operand.heads, fresh_block_index());
  const Place place;
  const int warp_row = fresh_thread_index() / WARP * WARP_ROWS;
  const float ln2 = 0x1.62e43p-1f;
  ByteCounter counter(parameters.counters + COUNT_OUT);
  ByteCounter lse_counter(parameters.counters + COUNT_LSE);
  float* lse = row_of(parameters.lse, parameters.lse_strides, work.batch, work.head, 0);
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = __fadd_rn(state.row_sum[m][half][0], state.row_sum[m][half][1]);
      sum = __fadd_rn(sum, shuffle_xor(sum, 1));
      sum = __fadd_rn(sum, shuffle_xor(sum, 2));
      const float inverse = sum == 0.0f ? 0.0f : reciprocal_approximate(sum);
      const int row = warp_row + 16 * m + 8 * half + place.group;
#pragma unroll
      for (int n = 0; n < 2 * VALUE_PAIRS; n++) {
        const float(&out)[4] = state.out[m][n];
        store_shared(
            out_tile + OutputTile::offset(row, n) + 4 * place.quad,
            round_pair<Stored>(__fmul_rn(out[2 * half], inverse), __fmul_rn(out[2 * half + 1], inverse)));
      }
      if (place.quad == 0 && work.row + row < problem.q_len) {
        const float reference = reference_of(state.row_max[m][half], problem.scale_log2);
        const float log_sum = __fmul_rn(__fmaf_rn(reference, problem.scale_log2, log2_approximate(sum)), ln2);
        const long long at = (work.row + row) * parameters.lse_strides.row;
        store_number(lse + at, sum == 0.0f ? -infinity() : log_sum, lse_counter);
      }
    }
  __syncwarp();
  Stored* out = row_of(parameters.out, parameters.out_strides, work.batch, work.head, work.row);
#pragma unroll
  for (int index = 0; index < WARP_ROWS * OutputTile::CHUNKS; index += WARP) {
    const int row = warp_row + (index + place.lane) / OutputTile::CHUNKS;
    const int chunk = (index + place.lane) % OutputTile::CHUNKS;
    if (work.row + row < problem.q_len && 8 * chunk < problem.value_dim) {
      counter.add(16);
      store_16_bytes(
          out + row * parameters.out_strides.row + 8 * chunk, load_shared(out_tile + OutputTile::offset(row, chunk)));
    }
  }
  counter.flush();
  lse_counter.flush();
}

template <bool VALUE>
struct Flag {
  static constexpr bool value = VALUE;
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    flash2_tensor_forward(const Flash2TensorForwardParameters parameters) {
  const unsigned q_tile = shared_start();
  const Problem& problem = parameters.problem;
  const Work work(problem, parameters.operand.heads, blockIdx.x);
  const unsigned kv_head = work.head / problem.group_size;
  const int warp_row = warp_index() * WARP_ROWS, row = work.row + warp_row;
  const Offsets offsets(warp_row);
  const KeyTiles key_tiles(problem, work.row);
  const int first_tile = key_tiles.first, stop_tile = key_tiles.stop;

  // load
  // The addresses move on with the tiles; in one stage they are computed anew, which the compiler finds registers for.
  const int loaded_row = STAGES == 1 ? 0 : first_tile * KEY_ROWS;
  const Stored* k = row_of(parameters.k, parameters.k_strides, work.batch, kv_head, loaded_row);
  const Stored* v = row_of(parameters.v, parameters.v_strides, work.batch, kv_head, loaded_row);
  const auto k_tile = [&](int tile) { return q_tile + K_OFFSET + tile % STAGES * KeyTile::BYTES; };
  const auto v_tile = [&](int tile) { return q_tile + V_OFFSET + tile % STAGES * ValueTile::BYTES; };
  const auto load_keys = [&](int tile) {
    const int key = tile * KEY_ROWS;
    const long long stride = parameters.k_strides.row;
    MatrixCopy<KeyTile, THREADS>::start(
        k_tile(tile), STAGES == 1 ? k + key * stride : k, stride, problem.kv_len - key, problem.head_dim,
        parameters.counters + COUNT_K);
    if (STAGES > 1) k += KEY_ROWS * stride;
  };
  const auto load_values = [&](int tile) {
    const int key = tile * KEY_ROWS;
    const long long stride = parameters.v_strides.row;
    MatrixCopy<ValueTile, THREADS>::start(
        v_tile(tile), STAGES == 1 ? v + key * stride : v, stride, problem.kv_len - key, problem.value_dim,
        parameters.counters + COUNT_V);
    if (STAGES > 1) v += KEY_ROWS * stride;
  };
  MatrixCopy<QueryTile, THREADS>::start(
      q_tile, row_of(parameters.q, parameters.q_strides, work.batch, work.head, work.row), parameters.q_strides.row,
      problem.q_len - work.row, problem.head_dim, parameters.counters + COUNT_Q);
  commit_copies();
  if (first_tile < stop_tile) {
    load_keys(first_tile);
    if (STAGES == 2) load_values(first_tile);
  }
  commit_copies();
  Queries resident[RESIDENT_STEPS + 1];
  if (RESIDENT_STEPS > 0) {
    wait_for_copies<1>();
    __syncthreads();  // Q is there
#pragma unroll
    for (int step = 0; step < RESIDENT_STEPS; step++) load_queries(resident[step], q_tile + offsets.q, step);
  }
  SoftmaxState state;

  const auto take_tile = [&](int tile, auto masked) {
    constexpr bool MASKED = decltype(masked)::value;
    const int key = tile * KEY_ROWS, next = tile + 1;
    bool special = false;
    Probabilities probabilities;
    const Band band(problem, here(row));
    const bool seen = MASKED ? !band.empty(key) : row < problem.q_len;
    // load
    wait_for_copies<0>();
    if (STAGES == 2) {
      if (MASKED) {
        special = synchronise_any(holds_special(v_tile(tile)));
      } else {
        __syncthreads();  // this tile is there, and the one before has been read
      }
      if (next < stop_tile) load_keys(next), load_values(next);
    } else {
      __syncthreads();  // K is there, and V has been read
      load_values(tile);
    }
    commit_copies();
    // compute
    if (seen) {
      Scores scores;
      multiply_scores(scores, resident, q_tile + offsets.q, k_tile(tile) + offsets.k);
      if (MASKED) hide(scores, band, key);
      update_softmax(state, probabilities, scores, problem.scale_log2);
    }
    if (STAGES == 1) {
      // load
      wait_for_copies<0>();
      if (MASKED) {
        special = synchronise_any(holds_special(v_tile(tile)));
      } else {
        __syncthreads();  // V is there, and K has been read
      }
      if (next < stop_tile) load_keys(next);
      commit_copies();
    }
    // compute
    if (seen) {
      if (MASKED && special) {
        add_seen_values(state, probabilities, v_tile(tile) + offsets.v, band, key);
      } else {
        add_values(state, probabilities, v_tile(tile) + offsets.v);
      }
    }
  };
  for (int tile = first_tile; tile < stop_tile;) {
    const KeyTiles tiles(problem, here(row) / QUERY_ROWS * QUERY_ROWS);
    if (tile >= tiles.first_full && tile < tiles.stop_full) {
      for (; tile < tiles.stop_full; tile++) take_tile(tile, Flag<false>());
    } else {
      take_tile(tile++, Flag<true>());
    }
  }
  // finish
  const KeyTiles tiles(problem, here(row) / QUERY_ROWS * QUERY_ROWS);
  if (tiles.first == tiles.stop || COLUMNS != VALUE_COLUMNS) {
    wait_for_copies<0>();
    __syncthreads();  // all warps have read Q, whose place the output takes
  }
  finish_softmax(state, parameters, q_tile);
}
