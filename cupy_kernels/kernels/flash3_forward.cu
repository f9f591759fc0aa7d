// FlashAttention-3 forward (Shah et al. 2024, arXiv 2407.08608) on Hopper's tensor cores, the program of
// simattn/algorithms/flash3.py: each thread block keeps one query tile and its output on chip and streams the keys and
// values past it.
//
// One warp loads: queries, keys and values arrive in shared memory by TMA, keys and values through a ring of STAGES
// tiles each. Warpgroups of 64 query rows compute. While the exponentials of one tile of keys are taken, the tensor
// cores work on the scores of the next one and on the output of the one before; with TAKE_TURNS the warpgroups issue
// their products one after the other, so that one's exponentials fall into another's products.
//
// The order of every sum is fixed; the tile of keys is the only size it depends on:
//   scores   one chain of fused dot products of 16 columns per element, columns ascending
//   row sum  8 partial sums, of the tile's keys 8 j + x, j ascending; 0 + 1, 2 + 3, ..., then pairwise 1, 2 apart
//   out      times the correction, then one chain of fused dot products of 16 keys per element, keys ascending
// Tiles that hide all their keys from a row change no bit of it.
//
// Macros:
//   STORAGE       float16 or bfloat16
//   COLUMNS       64, 96, 128, 192 or 256, at least head_dim and value_dim
//   QUERY_ROWS    query rows of a thread block's tile, a multiple of 64
//   KEY_ROWS      keys of a tile, a multiple of 16; sets the order of sums
//   QUERY_STAGES  query tiles in shared memory
//   PACKED_HEADS  query heads of a KV head whose rows share a tile, position by position; divides 64
//   MASKED        whether keys are hidden by a causal mask or a window
//   TAKE_TURNS    whether the warpgroups issue their products in turns
//   NEGATED       whether the scale is negative
//   COUNT_TRAFFIC if defined, bytes moved are added to `counters`
#include "counters.cuh"
#include "hopper.cuh"
#include "problem.cuh"

using Stored = STORAGE;

constexpr int WARP = 32;
constexpr int WARPGROUP = 128;
constexpr int GROUP_ROWS = 64;  // query rows of a warpgroup
constexpr int WARP_ROWS = 16;
constexpr int CONSUMERS = QUERY_ROWS / GROUP_ROWS;
constexpr int THREADS = WARPGROUP * (CONSUMERS + 1);
constexpr int STAGES = 2;
constexpr int SLABS = (COLUMNS + SLAB_COLUMNS - 1) / SLAB_COLUMNS;
constexpr int SCORES = KEY_ROWS / 2;   // of a thread, in two rows
constexpr int OUTPUTS = COLUMNS / 2;
constexpr int STEP = 16;               // contracted elements of a product
constexpr int PRODUCER_REGISTERS = CONSUMERS == 1 ? 56 : CONSUMERS == 2 ? 24 : 32;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 1 ? 256 : CONSUMERS == 2 ? 240 : 160;

// Shared memory in bytes: queries (stage, warpgroup, slab), keys and values (stage, slab), barriers, the query tiles'
// places (stage).
constexpr int QUERY_SLAB_BYTES = GROUP_ROWS * SLAB_ROW_BYTES;
constexpr int QUERY_GROUP_BYTES = SLABS * QUERY_SLAB_BYTES;
constexpr int QUERY_BYTES = CONSUMERS * QUERY_GROUP_BYTES;
constexpr int KEY_SLAB_BYTES = KEY_ROWS * SLAB_ROW_BYTES;
constexpr int KEY_BYTES = SLABS * KEY_SLAB_BYTES;
constexpr int K_OFFSET = QUERY_STAGES * QUERY_BYTES;
constexpr int V_OFFSET = K_OFFSET + STAGES * KEY_BYTES;
constexpr int BARRIERS_OFFSET = V_OFFSET + STAGES * KEY_BYTES;
constexpr int BARRIERS_BYTES = 192;
constexpr int WORK_OFFSET = BARRIERS_OFFSET + BARRIERS_BYTES;
constexpr int SHARED_BYTES = WORK_OFFSET + QUERY_STAGES * 32;

static_assert(SHARED_BYTES <= 232448, "shared memory of a multiprocessor");
static_assert(QUERY_ROWS % GROUP_ROWS == 0 && CONSUMERS <= 3, "one to three warpgroups compute");
static_assert(KEY_ROWS % STEP == 0 && COLUMNS % STEP == 0, "products contract 16 at a time");
static_assert(GROUP_ROWS % PACKED_HEADS == 0, "packed heads share a warpgroup's rows evenly");

struct Flash3ForwardParameters {
  const Stored* q;
  const Stored* k;
  const Stored* v;
  Stored* out;
  float* lse;
  const int* schedule;  // the query tiles in the order in which they are handed to the blocks in turn, under a mask
  unsigned long long* counters;
  Strides q_strides, k_strides, v_strides, out_strides, lse_strides, schedule_strides;
  Problem problem;
  Operand operand;
  TensorMap q_map, k_map, v_map, out_map;
};

enum Flash3ForwardCounter { COUNT_Q, COUNT_K, COUNT_V, COUNT_OUT, COUNT_LSE, COUNT_SCHEDULE };

struct Barriers {
  Barrier q_full[QUERY_STAGES][CONSUMERS], q_empty[QUERY_STAGES][CONSUMERS];
  Barrier k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

static_assert(sizeof(Barriers) <= BARRIERS_BYTES, "barriers fit");

template <bool VALUE>
struct Constant {
  static constexpr bool value = VALUE;
};

// A stage of a ring and the parity of its present phase.
template <int LENGTH>
struct Ring {
  int stage = 0;
  unsigned parity = 0;

  DEVICE void advance() {
    stage++;
    if (stage == LENGTH) stage = 0, parity ^= 1;
  }
};

// One query tile. The loading thread works it out and hands it on with the queries.
struct Work {
  int batch, head;            // KV head if heads are packed
  int row;                    // first packed row; there is none after the last tile
  int first_tile, stop_tile;  // tiles of keys that any of its rows sees
};

constexpr int NO_ROW = -1;

DEVICE int packed_rows(const Problem& problem) { return problem.q_len * PACKED_HEADS; }

DEVICE int tiles_of_matrix(const Problem& problem) { return (packed_rows(problem) + QUERY_ROWS - 1) / QUERY_ROWS; }

DEVICE int tiles_of(const Problem& problem) {
  return problem.batch * (problem.heads / PACKED_HEADS) * tiles_of_matrix(problem);
}

// The query tile of this number, matrix by matrix.
DEVICE Work work_of(const Problem& problem, int number) {
  const int tiles = tiles_of_matrix(problem), heads = problem.heads / PACKED_HEADS;
  const int matrix = number / tiles;
  Work work;
  work.batch = matrix / heads;
  work.head = matrix - work.batch * heads;
  work.row = (number - matrix * tiles) * QUERY_ROWS;
  const int first = work.row / PACKED_HEADS;
  const int last = (min(work.row + QUERY_ROWS, packed_rows(problem)) - 1) / PACKED_HEADS;
  const int shift = problem.kv_len - problem.q_len;
  const int first_key = MASKED ? max(0, first + shift - problem.window_left) : 0;
  const int stop_key = MASKED ? min(problem.kv_len, last + shift + problem.window_right + 1) : problem.kv_len;
  work.first_tile = first_key / KEY_ROWS;
  work.stop_tile = first_key < stop_key ? (stop_key + KEY_ROWS - 1) / KEY_ROWS : work.first_tile;
  return work;
}

// load

struct alignas(32) WorkPlace : Work {};

DEVICE WorkPlace* work_places(char* shared) { return reinterpret_cast<WorkPlace*>(shared + WORK_OFFSET); }

// Bytes of a box that lie inside an array.
DEVICE unsigned inside(int rows, int most_rows, int columns) {
  return max(0, min(rows, most_rows)) * max(0, columns) * static_cast<int>(sizeof(Stored));
}

DEVICE void load_queries(
    char* shared, Barriers* barriers, const Flash3ForwardParameters& parameters, const Work& work,
    const Ring<QUERY_STAGES>& ring, ByteCounter& counter) {
  const Problem& problem = parameters.problem;
  for (int group = 0; group < CONSUMERS; group++) wait(&barriers->q_empty[ring.stage][group], ring.parity ^ 1);
  static_cast<Work&>(work_places(shared)[ring.stage]) = work;
  for (int group = 0; group < CONSUMERS; group++) {
    Barrier* full = &barriers->q_full[ring.stage][group];
    if (work.row == NO_ROW) {
      arrive(full);
      continue;
    }
    arrive_expecting(full, QUERY_GROUP_BYTES);
    const int row = work.row + group * GROUP_ROWS, position = row / PACKED_HEADS;
    char* to = shared + ring.stage * QUERY_BYTES + group * QUERY_GROUP_BYTES;
    for (int slab = 0; slab < SLABS; slab++) {
      start_box_load(
          to + slab * QUERY_SLAB_BYTES, &parameters.q_map, full, Reuse::ONCE, slab * SLAB_COLUMNS, 0, position,
          work.head, work.batch);
    }
    counter.add(inside(GROUP_ROWS, packed_rows(problem) - row, problem.head_dim));
  }
}

DEVICE void load_keys(
    char* shared, Barrier* full, Barrier* empty, const TensorMap* map, const Problem& problem, int columns,
    const Work& work, int tile, unsigned parity, ByteCounter& counter) {
  wait(empty, parity ^ 1);
  arrive_expecting(full, KEY_BYTES);
  const int head = PACKED_HEADS == 1 ? work.head / problem.group_size : work.head * PACKED_HEADS / problem.group_size;
  for (int slab = 0; slab < SLABS; slab++) {
    start_box_load(
        shared + slab * KEY_SLAB_BYTES, map, full, Reuse::OFTEN, slab * SLAB_COLUMNS, tile * KEY_ROWS, head,
        work.batch);
  }
  counter.add(inside(KEY_ROWS, problem.kv_len - tile * KEY_ROWS, columns));
}

DEVICE void load(char* shared, Barriers* barriers, const Flash3ForwardParameters& parameters) {
  const Problem& problem = parameters.problem;
  const int stop = tiles_of(problem);
  ByteCounter q_bytes(parameters.counters + COUNT_Q), k_bytes(parameters.counters + COUNT_K);
  ByteCounter v_bytes(parameters.counters + COUNT_V), schedule_bytes(parameters.counters + COUNT_SCHEDULE);
  Ring<QUERY_STAGES> queries;
  Ring<STAGES> keys, values;
  const auto load_k = [&](const Work& work, int tile) {
    load_keys(
        shared + K_OFFSET + keys.stage * KEY_BYTES, &barriers->k_full[keys.stage], &barriers->k_empty[keys.stage],
        &parameters.k_map, problem, problem.head_dim, work, tile, keys.parity, k_bytes);
    keys.advance();
  };
  const auto load_v = [&](const Work& work, int tile) {
    load_keys(
        shared + V_OFFSET + values.stage * KEY_BYTES, &barriers->v_full[values.stage],
        &barriers->v_empty[values.stage], &parameters.v_map, problem, problem.value_dim, work, tile, values.parity,
        v_bytes);
    values.advance();
  };
  for (int turn = blockIdx.x; turn < stop; turn += gridDim.x) {
    int number = turn;
    if (MASKED) {
      schedule_bytes.add(4);
      number = load_4_bytes(parameters.schedule + turn);
    }
    const Work work = work_of(problem, number);
    if (work.first_tile < work.stop_tile) load_k(work, work.first_tile);
    load_queries(shared, barriers, parameters, work, queries, q_bytes);
    queries.advance();
    for (int tile = work.first_tile; tile < work.stop_tile; tile++) {
      if (tile + 1 < work.stop_tile) load_k(work, tile + 1);
      load_v(work, tile);
    }
  }
  load_queries(shared, barriers, parameters, {0, 0, NO_ROW, 0, 0}, queries, q_bytes);
  q_bytes.flush(), k_bytes.flush(), v_bytes.flush(), schedule_bytes.flush();
}

// compute

struct Place {
  int group;     // warpgroup among those that compute
  int warp;      // warp in the warpgroup
  int lane;
  int row;       // first row of the thread in its warpgroup; the other follows 8 further on
  int quad;      // lane among the four that share a row

  DEVICE Place() {
    const int warp_of_block = warp_index();
    group = warp_of_block / 4 - 1;
    warp = warp_of_block % 4;
    lane = threadIdx.x % WARP;
    row = warp * WARP_ROWS + lane / 4;
    quad = lane % 4;
  }
};

DEVICE float higher(float a, float b) { return NEGATED ? fminf(a, b) : fmaxf(a, b); }

// Running softmax of two rows.
struct SoftmaxState {
  float row_max[2];      // of unscaled scores; the minimum if the scale is negative
  float row_sum[2][2];   // of the thread's even and odd columns
  float correction[2];
};

DEVICE float lowest() { return NEGATED ? infinity() : -infinity(); }

// Hide what rows do not see: keys before `first` and from `stop` on, counted from the thread's first.
DEVICE void hide(float (&scores)[SCORES], const int (&first)[2], const int (&stop)[2]) {
#pragma unroll
  for (int i = 0; i < SCORES; i++) {
    const int key = i / 4 * 8 + i % 2, row = i / 2 % 2;
    const bool seen = MASKED ? key >= first[row] && key < stop[row] : key < stop[row];
    scores[i] = seen ? scores[i] : lowest();
  }
}

// Take a tile of scores into the running softmax, and replace them by probabilities.
template <bool FIRST>
DEVICE void update_softmax(SoftmaxState& state, float (&scores)[SCORES], float scale_log2) {
#pragma unroll
  for (int row = 0; row < 2; row++) {
    float even = scores[2 * row], odd = scores[2 * row + 1];
#pragma unroll
    for (int i = 4 + 2 * row; i < SCORES; i += 4) {
      even = higher(even, scores[i]);
      odd = higher(odd, scores[i + 1]);
    }
    float row_max = higher(even, odd);
    if (!FIRST) row_max = higher(row_max, state.row_max[row]);
    row_max = higher(row_max, shuffle_xor(row_max, 1));
    row_max = higher(row_max, shuffle_xor(row_max, 2));
    const float used = row_max == lowest() ? 0.0f : row_max;
    if (!FIRST) state.correction[row] = exp2_approximate(__fmul_rn(__fsub_rn(state.row_max[row], used), scale_log2));
    state.row_max[row] = row_max;
    const float offset = -__fmul_rn(used, scale_log2);
#pragma unroll
    for (int i = 2 * row; i < SCORES; i += 4) {
      scores[i] = exp2_approximate(__fmaf_rn(scores[i], scale_log2, offset));
      scores[i + 1] = exp2_approximate(__fmaf_rn(scores[i + 1], scale_log2, offset));
      if (i == 2 * row) {
#pragma unroll
        for (int side = 0; side < 2; side++) {
          float& sum = state.row_sum[row][side];
          sum = FIRST ? scores[i + side] : __fmaf_rn(sum, state.correction[row], scores[i + side]);
        }
      } else {
        state.row_sum[row][0] = __fadd_rn(state.row_sum[row][0], scores[i]);
        state.row_sum[row][1] = __fadd_rn(state.row_sum[row][1], scores[i + 1]);
      }
    }
  }
}

DEVICE void round_probabilities(unsigned (&rounded_pairs)[SCORES / 2], const float (&scores)[SCORES]) {
#pragma unroll
  for (int i = 0; i < SCORES / 2; i++) rounded_pairs[i] = round_pair<Stored>(scores[2 * i], scores[2 * i + 1]);
}

// Start the scores of a tile.
DEVICE void start_scores(float (&scores)[SCORES], unsigned long long q, unsigned long long k) {
#pragma unroll
  for (int step = 0; step < COLUMNS / STEP; step++) {
    const int slab = step * STEP / SLAB_COLUMNS, within = step * STEP % SLAB_COLUMNS * static_cast<int>(sizeof(Stored));
    Product<Stored, KEY_ROWS, false>::start(
        scores, moved_on(q, slab * QUERY_SLAB_BYTES + within), moved_on(k, slab * KEY_SLAB_BYTES + within), step > 0);
  }
}

// Start to add the values of a tile, weighted by probabilities.
DEVICE void start_values(float (&out)[OUTPUTS], const unsigned (&probabilities)[SCORES / 2], unsigned long long v, bool adds) {
#pragma unroll
  for (int step = 0; step < KEY_ROWS / STEP; step++) {
    Product<Stored, COLUMNS, true>::start(
        out, probabilities + 4 * step, moved_on(v, step * STEP * SLAB_ROW_BYTES), adds || step > 0);
  }
}

// Which turn it is: the warpgroups' products are issued in turns.
DEVICE void await_turn(int group) {
  if (TAKE_TURNS) sync_named(2 + group, 2 * WARPGROUP);
}

DEVICE void end_turn(int group) {
  if (TAKE_TURNS) arrive_named(2 + (group + 1 == CONSUMERS ? 0 : group + 1), 2 * WARPGROUP);
}

// finish

DEVICE void finish(
    float (&out)[OUTPUTS], const SoftmaxState& state, char* staged, const Flash3ForwardParameters& parameters,
    const Work& work, const Place& place, ByteCounter& out_bytes, ByteCounter& lse_bytes) {
  const Problem& problem = parameters.problem;
  const int group_row = work.row + place.group * GROUP_ROWS;
  float inverse[2];
#pragma unroll
  for (int row = 0; row < 2; row++) {
    float sum = __fadd_rn(state.row_sum[row][0], state.row_sum[row][1]);
    sum = __fadd_rn(sum, shuffle_xor(sum, 1));
    sum = __fadd_rn(sum, shuffle_xor(sum, 2));
    inverse[row] = sum == 0.0f ? 0.0f : reciprocal_approximate(sum);
    const int packed = group_row + place.row + 8 * row, position = packed / PACKED_HEADS;
    if (place.quad == 0 && position < problem.q_len) {
      const int head = work.head * PACKED_HEADS + packed % PACKED_HEADS;
      const float used = state.row_max[row] == lowest() ? 0.0f : state.row_max[row];
      const float logarithm = __fmul_rn(__fmaf_rn(used, problem.scale_log2, log2_approximate(sum)), 0x1.62e43p-1f);
      float* lse = row_of(parameters.lse, parameters.lse_strides, work.batch, head, position);
      lse_bytes.add(4);
      store_4_bytes(lse, bits_of_float(sum == 0.0f ? -infinity() : logarithm));
    }
  }
  // The rows of a warp take the place of its queries, which its warpgroup has read.
  sync_named(2 + CONSUMERS + place.group, WARPGROUP);
  char* rows = staged + place.warp * WARP_ROWS * SLAB_ROW_BYTES;
  const int matrix_row = place.lane % 16, chunk = place.lane / 16;
#pragma unroll
  for (int i = 0; i < OUTPUTS; i += 8) {
    const int column = 2 * i + 8 * chunk, slab = column / SLAB_COLUMNS;
    const int place_in_row = (column % SLAB_COLUMNS / 8 ^ matrix_row % 8) * 16;
    store_matrices(
        rows + slab * QUERY_SLAB_BYTES + matrix_row * SLAB_ROW_BYTES + place_in_row,
        round_pair<Stored>(__fmul_rn(out[i], inverse[0]), __fmul_rn(out[i + 1], inverse[0])),
        round_pair<Stored>(__fmul_rn(out[i + 2], inverse[1]), __fmul_rn(out[i + 3], inverse[1])),
        round_pair<Stored>(__fmul_rn(out[i + 4], inverse[0]), __fmul_rn(out[i + 5], inverse[0])),
        round_pair<Stored>(__fmul_rn(out[i + 6], inverse[1]), __fmul_rn(out[i + 7], inverse[1])));
  }
  publish_to_copies();
  __syncwarp();
  const int warp_row = group_row + place.warp * WARP_ROWS;
  if (place.lane == 0) {
    for (int slab = 0; slab < SLABS; slab++) {
      start_box_store(
          &parameters.out_map, rows + slab * QUERY_SLAB_BYTES, slab * SLAB_COLUMNS, warp_row % PACKED_HEADS,
          warp_row / PACKED_HEADS, work.head, work.batch);
    }
    commit_stores();
    out_bytes.add(inside(WARP_ROWS, packed_rows(problem) - warp_row, problem.value_dim));
    wait_for_store_reads<0>();
  }
  __syncwarp();
}

DEVICE void compute(char* shared, Barriers* barriers, const Flash3ForwardParameters& parameters) {
  const Problem& problem = parameters.problem;
  const Place place;
  const float scale_log2 = problem.scale_log2;
  ByteCounter out_bytes(parameters.counters + COUNT_OUT), lse_bytes(parameters.counters + COUNT_LSE);
  const unsigned long long k = describe_matrix(shared_address(shared) + K_OFFSET, 0);
  const unsigned long long v = describe_matrix(shared_address(shared) + V_OFFSET, KEY_SLAB_BYTES);
  const auto release = [&](Barrier* barrier) {
    if (place.lane == 0) arrive(barrier);
  };
  if (place.group == CONSUMERS - 1) end_turn(place.group);  // the first warpgroup begins
  Ring<QUERY_STAGES> queries;
  Ring<STAGES> keys, values;
  for (;;) {
    wait(&barriers->q_full[queries.stage][place.group], queries.parity);
    const Work work = work_places(shared)[queries.stage];
    if (work.row == NO_ROW) break;
    // Keys that the thread's rows see, and those that all rows of the warpgroup see
    const int group_row = work.row + place.group * GROUP_ROWS, shift = problem.kv_len - problem.q_len;
    int first_key[2], stop_key[2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const int position = (group_row + place.row + 8 * row) / PACKED_HEADS + shift;
      first_key[row] = position - problem.window_left;
      stop_key[row] = MASKED ? min(problem.kv_len, position + problem.window_right + 1) : problem.kv_len;
    }
    const int first_full = (group_row + GROUP_ROWS - 1) / PACKED_HEADS + shift - problem.window_left;
    const int stop_full =
        MASKED ? min(problem.kv_len, group_row / PACKED_HEADS + shift + problem.window_right + 1) : problem.kv_len;
    const int first_whole = (max(0, first_full) + KEY_ROWS - 1) / KEY_ROWS, stop_whole = max(0, stop_full) / KEY_ROWS;
    const auto hide_keys = [&](float (&scores)[SCORES], int tile) {
      const int key = tile * KEY_ROWS;
      if ((MASKED && key < first_full) || key + KEY_ROWS > stop_full) {
        const int before = key + 2 * place.quad;
        const int first[2] = {first_key[0] - before, first_key[1] - before};
        const int stop[2] = {stop_key[0] - before, stop_key[1] - before};
        hide(scores, first, stop);
      }
    };

    char* q_tile = shared + queries.stage * QUERY_BYTES + place.group * QUERY_GROUP_BYTES;
    const unsigned long long q = describe_matrix(shared_address(q_tile), 0);
    SoftmaxState state = {{lowest(), lowest()}, {{0.0f, 0.0f}, {0.0f, 0.0f}}, {1.0f, 1.0f}};
    if (work.first_tile == work.stop_tile) {
      float out[OUTPUTS] = {};
      finish(out, state, q_tile, parameters, work, place, out_bytes, lse_bytes);
    } else {
      float out[OUTPUTS], scores[SCORES];
      unsigned probabilities[SCORES / 2];
      wait(&barriers->k_full[keys.stage], keys.parity);
      fence_products();
      start_scores(scores, q, moved_on(k, keys.stage * KEY_BYTES));
      commit_products();
      wait_for_products<0>();
      release(&barriers->k_empty[keys.stage]);
      keys.advance();
      hide_keys(scores, work.first_tile);
      update_softmax<true>(state, scores, scale_log2);
      round_probabilities(probabilities, scores);
      if (work.first_tile + 1 < work.stop_tile) wait(&barriers->k_full[keys.stage], keys.parity);

      const auto take_tile = [&](int tile, auto hides) {
        constexpr bool HIDES = decltype(hides)::value;
        await_turn(place.group);
        fence_products();
        start_scores(scores, q, moved_on(k, keys.stage * KEY_BYTES));
        commit_products();
        wait(&barriers->v_full[values.stage], values.parity);
        start_values(out, probabilities, moved_on(v, values.stage * KEY_BYTES), tile > work.first_tile + 1);
        commit_products();
        end_turn(place.group);
        wait_for_products<1>();
        release(&barriers->k_empty[keys.stage]);
        keys.advance();
        if constexpr (HIDES) hide_keys(scores, tile);
        update_softmax<false>(state, scores, scale_log2);
        // The compiler moves no exponential past this wait, so that they overlap with the products under way.
        settle(scores), settle(state.row_sum[0]), settle(state.row_sum[1]);
        if (tile + 1 < work.stop_tile) wait(&barriers->k_full[keys.stage], keys.parity);
        wait_for_products<0>();
        release(&barriers->v_empty[values.stage]);
        values.advance();
        round_probabilities(probabilities, scores);
        // Most tiles raise no maximum of a warp's rows: a correction by 1 changes no bit.
        if (any_lane(state.correction[0] != 1.0f || state.correction[1] != 1.0f)) {
#pragma unroll
          for (int i = 0; i < OUTPUTS; i++) out[i] = __fmul_rn(out[i], state.correction[i / 2 % 2]);
        }
      };
      int tile = work.first_tile + 1;
      if (MASKED) {
        for (; tile < min(work.stop_tile, first_whole); tile++) take_tile(tile, Constant<true>());
      }
      for (; tile < min(work.stop_tile, stop_whole); tile++) take_tile(tile, Constant<false>());
      for (; tile < work.stop_tile; tile++) take_tile(tile, Constant<true>());
      wait(&barriers->v_full[values.stage], values.parity);
      fence_products();
      start_values(out, probabilities, moved_on(v, values.stage * KEY_BYTES), work.first_tile + 1 < work.stop_tile);
      commit_products();
      wait_for_products<0>();
      release(&barriers->v_empty[values.stage]);
      values.advance();
      finish(out, state, q_tile, parameters, work, place, out_bytes, lse_bytes);
    }
    release(&barriers->q_empty[queries.stage][place.group]);
    queries.advance();
  }
  out_bytes.flush(), lse_bytes.flush();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    flash3_forward(const __grid_constant__ Flash3ForwardParameters parameters) {
  char* const shared = reinterpret_cast<char*>(shared_memory());
  Barriers* const barriers = reinterpret_cast<Barriers*>(shared + BARRIERS_OFFSET);
  if (threadIdx.x == 0) {
    for (int group = 0; group < CONSUMERS; group++) {
      for (int stage = 0; stage < QUERY_STAGES; stage++) {
        init_barrier(&barriers->q_full[stage][group], 1);
        init_barrier(&barriers->q_empty[stage][group], 4);
      }
    }
    for (int stage = 0; stage < STAGES; stage++) {
      init_barrier(&barriers->k_full[stage], 1);
      init_barrier(&barriers->v_full[stage], 1);
      init_barrier(&barriers->k_empty[stage], 4 * CONSUMERS);
      init_barrier(&barriers->v_empty[stage], 4 * CONSUMERS);
    }
    publish_barriers();
  }
  __syncthreads();
  if (warp_index() < 4) {
    shrink_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) load(shared, barriers, parameters);
  } else {
    grow_registers<CONSUMER_REGISTERS>();
    compute(shared, barriers, parameters);
  }
}
