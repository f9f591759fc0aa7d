// FlashAttention-3 forward (Shah et al. 2024, arXiv 2407.08608) on Hopper's tensor cores, the program of
// simattn/algorithms/flash3.py: each thread block keeps one query tile and its output on chip and streams the keys and
// values past it.
//
// One warp loads: queries, keys and values arrive in shared memory by TMA, each through a ring of tiles. Warpgroups of
// 64 query rows compute, each for the keys that its rows see. While the exponentials of one tile of keys are taken, the
// tensor cores work on the scores of the next one and on the output of the one before; with TAKE_TURNS the warpgroups
// issue their products one after the other, so that one's exponentials fall into another's products.
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
//   KEY_STAGES    tiles of keys in shared memory
//   VALUE_STAGES  tiles of values in shared memory
//   PACKED_HEADS  query heads of a KV head whose rows share a tile, position by position; divides 64
//   MASKED        whether keys are hidden by a causal mask or a window
//   RAGGED        whether sequences have lengths of their own and follow one another, with no batch axis
//   TAKE_TURNS    whether the warpgroups issue their products in turns
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
constexpr int SLABS = (COLUMNS + SLAB_COLUMNS - 1) / SLAB_COLUMNS;
constexpr int SCORES = KEY_ROWS / 2;   // of a thread, in two rows
constexpr int OUTPUTS = COLUMNS / 2;
constexpr int STEP = 16;               // contracted elements of a product
// What was faster on an H100: a vote on whether any row's maximum was raised, and maxima in one chain instead of two; a
// wait for the next keys among the exponentials instead of before the turn.
constexpr bool SKIPS_CORRECTIONS = COLUMNS > 128 || (COLUMNS == 128 && !MASKED);
constexpr bool IN_ONE_CHAIN = SKIPS_CORRECTIONS;
constexpr bool WAITS_AMONG_EXPONENTIALS = CONSUMERS < 3;
// Its schedule takes more than 24 registers only where the order of ragged tiles is not turned round.
constexpr bool SPARES_PRODUCER = COLUMNS > 192 && (MASKED || !RAGGED);
constexpr int PRODUCER_REGISTERS = CONSUMERS == 1 ? 56 : CONSUMERS == 2 ? (SPARES_PRODUCER ? 24 : 40) : 32;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 1 ? 256 : CONSUMERS == 2 ? (SPARES_PRODUCER ? 240 : 232) : 160;

// Shared memory in bytes: queries (stage, warpgroup, slab), keys and values (stage, slab), barriers, the query tiles'
// places (stage).
constexpr int QUERY_SLAB_BYTES = GROUP_ROWS * SLAB_ROW_BYTES;
constexpr int QUERY_GROUP_BYTES = SLABS * QUERY_SLAB_BYTES;
constexpr int QUERY_BYTES = CONSUMERS * QUERY_GROUP_BYTES;
constexpr int KEY_SLAB_BYTES = KEY_ROWS * SLAB_ROW_BYTES;
constexpr int KEY_BYTES = SLABS * KEY_SLAB_BYTES;
constexpr int K_OFFSET = QUERY_STAGES * QUERY_BYTES;
constexpr int V_OFFSET = K_OFFSET + KEY_STAGES * KEY_BYTES;
constexpr int BARRIERS_OFFSET = V_OFFSET + VALUE_STAGES * KEY_BYTES;
constexpr int BARRIERS_BYTES = 256;
constexpr int WORK_OFFSET = BARRIERS_OFFSET + BARRIERS_BYTES;
constexpr int WORK_STAGES = QUERY_STAGES > 2 ? QUERY_STAGES : 2;
constexpr int SHARED_BYTES = WORK_OFFSET + WORK_STAGES * 32;

// A warp's results are staged for their copy to memory, a slab at a time or several. Where there is room for one query
// tile alone, its queries give way to the next ones before, and results lie where the last keys lay.
constexpr int STAGED_SLAB_BYTES = WARP_ROWS * SLAB_ROW_BYTES;
constexpr int SLABS_IN_KEYS = KEY_BYTES / (CONSUMERS * GROUP_ROWS / WARP_ROWS * STAGED_SLAB_BYTES);
constexpr bool STAGES_IN_KEYS = QUERY_STAGES == 1 && SLABS_IN_KEYS > 0;

static_assert(SHARED_BYTES <= 232448, "shared memory of a multiprocessor");
static_assert(QUERY_ROWS % GROUP_ROWS == 0 && CONSUMERS <= 3, "one to three warpgroups compute");
static_assert(KEY_ROWS % STEP == 0 && COLUMNS % STEP == 0, "products contract 16 at a time");
static_assert(GROUP_ROWS % PACKED_HEADS == 0, "packed heads share a warpgroup's rows evenly");
static_assert(!RAGGED || PACKED_HEADS == 1, "a tensor map has no axis left for packed heads");

struct Flash3ForwardParameters {
  const Stored* q;
  const Stored* k;
  const Stored* v;
  Stored* out;
  float* lse;
#if RAGGED
  const int *cu_seqlens_q, *cu_seqlens_k;  // where every sequence starts, and after them where the last one ends
#else
  const unsigned* schedule;  // under a mask: the first tile of every block, then their second ones, ...
#endif
  unsigned long long* counters;
  Strides q_strides, k_strides, v_strides, out_strides, lse_strides;
#if RAGGED
  Strides cu_seqlens_q_strides, cu_seqlens_k_strides;
#else
  Strides schedule_strides;
#endif
  Problem problem;
  Operand operand;
  TensorMap q_map, k_map, v_map, out_map;
};

#if RAGGED
enum Flash3ForwardCounter {
  COUNT_Q, COUNT_K, COUNT_V, COUNT_OUT, COUNT_LSE, COUNT_QUERY_OFFSETS, COUNT_KEY_OFFSETS, COUNT_REPAIRS
};
#else
enum Flash3ForwardCounter { COUNT_Q, COUNT_K, COUNT_V, COUNT_OUT, COUNT_LSE, COUNT_SCHEDULE, COUNT_REPAIRS };
#endif

struct Barriers {
  Barrier q_full[QUERY_STAGES][CONSUMERS], q_empty[QUERY_STAGES][CONSUMERS];
  Barrier k_full[KEY_STAGES], k_empty[KEY_STAGES];
  Barrier v_full[VALUE_STAGES], v_empty[VALUE_STAGES];
  Barrier k_read;  // the last keys of a query tile, by all
};

static_assert(sizeof(Barriers) <= BARRIERS_BYTES, "barriers fit");

template <bool VALUE>
struct Constant {
  static constexpr bool value = VALUE;
};

// A place in a ring of tiles in shared memory: the stage and the parity of its present phase.
template <int LENGTH>
class Ring {
 public:
  DEVICE int stage() const { return turn_ % LENGTH; }
  DEVICE unsigned parity() const { return turn_ / LENGTH & 1; }
  DEVICE int stage_before() const { return (turn_ - 1) % LENGTH; }
  DEVICE void advance() { turn_++; }
  // Go to the turn before another ring's.
  template <int OTHER_LENGTH>
  DEVICE void follow(const Ring<OTHER_LENGTH>& other) {
    turn_ = other.turn_ - 1;
  }

 private:
  template <int>
  friend class Ring;
  unsigned turn_ = 0;
};

// Rows of a sequence in an array.
struct Rows {
  int start, length;
};

// One query tile. The loading thread works it out and hands it on with the queries.
struct Work {
#if !RAGGED
  int batch;
#endif
  int head;                   // KV head if heads are packed
  int row;                    // first packed row; there is none after the last tile
  int first_tile, stop_tile;  // tiles of keys that any of its rows sees
#if RAGGED
  Rows queries, keys;         // of its sequence
#endif
};

constexpr int NO_ROW = -1;

// How many queries and keys the sequence of a tile has.

DEVICE int query_count(const Problem& problem, const Work& work) {
#if RAGGED
  return work.queries.length;
#else
  return problem.q_len;
#endif
}

DEVICE int key_count(const Problem& problem, const Work& work) {
#if RAGGED
  return work.keys.length;
#else
  return problem.kv_len;
#endif
}

DEVICE int packed_rows(const Problem& problem, const Work& work) { return query_count(problem, work) * PACKED_HEADS; }

DEVICE int key_head(const Problem& problem, const Work& work) {
  return work.head * PACKED_HEADS / problem.group_size;
}

// Find the tiles of keys that a query tile visits.
DEVICE void choose_keys(const Problem& problem, Work& work) {
  const int keys = key_count(problem, work), first = work.row / PACKED_HEADS;
  const int last = (min(work.row + QUERY_ROWS, packed_rows(problem, work)) - 1) / PACKED_HEADS;
  const int shift = keys - query_count(problem, work);
  const int first_key = MASKED ? max(0, first + shift - problem.window_left) : 0;
  const int stop_key = MASKED ? min(keys, last + shift + problem.window_right + 1) : keys;
  work.first_tile = first_key / KEY_ROWS;
  work.stop_tile = first_key < stop_key ? (stop_key + KEY_ROWS - 1) / KEY_ROWS : work.first_tile;
}

#if RAGGED

// The query tiles of a thread block. How many there are is not known before the offsets are read: sequence i owns the
// slots from start_i / QUERY_ROWS + i on, up to those of the next one, at least as many as it has tiles.
class Schedule {
 public:
  DEVICE explicit Schedule(const Flash3ForwardParameters& parameters)
      : parameters_(parameters),
        query_bytes_(parameters.counters + COUNT_QUERY_OFFSETS),
        key_bytes_(parameters.counters + COUNT_KEY_OFFSETS) {}

  DEVICE Work next() {
    const Problem& problem = parameters_.problem;
    const int slots = problem.q_len / QUERY_ROWS + problem.batch;  // of each head
    Work work = {};
    while (turn_ < slots * problem.heads) {
      work.head = turn_ / slots;
      const int place = turn_ - work.head * slots;
      turn_ += here(gridDim.x);
      // The last tiles of a sequence see most keys under a causal mask.
      const int slot = MASKED ? slots - 1 - place : place;
      const int sequence = sequence_of(slot);
      const int first = query_offset(sequence);
      work.queries = rows_of(first, query_offset(sequence + 1), problem.q_len);
      work.keys = rows_of(key_offset(sequence), key_offset(sequence + 1), problem.kv_len);
      work.row = (slot - sequence - first / QUERY_ROWS) * QUERY_ROWS;
      if (work.row < 0 || work.row >= work.queries.length) continue;
      choose_keys(problem, work);
      return work;
    }
    work.row = NO_ROW, work.first_tile = work.stop_tile = 0;
    return work;
  }

  DEVICE void flush() { query_bytes_.flush(), key_bytes_.flush(); }

 private:
  // The last sequence whose slots start at a slot or before.
  DEVICE int sequence_of(int slot) {
    const int batch = parameters_.problem.batch;
    int bit = 1, sequence = 0;
    while (bit < batch) bit *= 2;
    while (bit /= 2) {
      const int later = sequence + bit;
      const int offset = query_offset(min(later, batch));
      if (later < batch && offset / QUERY_ROWS + later <= slot) sequence = later;
    }
    return sequence;
  }

  // Rows between two offsets, inside the array whatever they are.
  DEVICE static Rows rows_of(int start, int stop, int rows) {
    start = max(0, min(start, rows));
    return {start, max(0, min(stop, rows) - start)};
  }

  DEVICE int query_offset(int sequence) { return offset(parameters_.cu_seqlens_q + sequence, query_bytes_); }

  DEVICE int key_offset(int sequence) { return offset(parameters_.cu_seqlens_k + sequence, key_bytes_); }

  DEVICE static int offset(const int* from, ByteCounter& counter) {
    counter.add(4);
    return static_cast<int>(load_4_bytes(from));
  }

  const Flash3ForwardParameters& parameters_;
  ByteCounter query_bytes_, key_bytes_;
  int turn_ = blockIdx.x;
};

#else

constexpr unsigned LAST_OF_BLOCK = 1u << 31;  // marks a block's last tile in the schedule

// The query tiles of a thread block.
class Schedule {
 public:
  DEVICE explicit Schedule(const Flash3ForwardParameters& parameters)
      : parameters_(parameters), bytes_(parameters.counters + COUNT_SCHEDULE) {}

  DEVICE Work next() {
    const Problem& problem = parameters_.problem;
    const int heads = problem.heads / PACKED_HEADS;
    const int tiles = (problem.q_len * PACKED_HEADS + QUERY_ROWS - 1) / QUERY_ROWS;  // of each matrix
    if (MASKED ? is_last_ : turn_ >= problem.batch * heads * tiles) return {0, 0, NO_ROW, 0, 0};
    int number = turn_;
    if (MASKED) {
      const unsigned word = load_4_bytes(parameters_.schedule + turn_);
      bytes_.add(4);
      is_last_ = word & LAST_OF_BLOCK;
      number = word & ~LAST_OF_BLOCK;
    }
    turn_ += here(gridDim.x);
    const int matrix = number / tiles;
    Work work;
    work.batch = matrix / heads;
    work.head = matrix - work.batch * heads;
    work.row = (number - matrix * tiles) * QUERY_ROWS;
    choose_keys(problem, work);
    return work;
  }

  DEVICE void flush() { bytes_.flush(); }

 private:
  const Flash3ForwardParameters& parameters_;
  ByteCounter bytes_;
  int turn_ = blockIdx.x;
  bool is_last_ = false;
};

#endif

// load

struct alignas(32) WorkPlace : Work {};
static_assert(sizeof(WorkPlace) == 32, "places have their room");

// The box from a row of a ragged array's sequence on. Its tensor map has three axes for the rows, of which the second
// and third only move the first one: a sequence ends where the first axis does, and the address comes out right modulo
// 2^64 (tensor_map.py). What lies behind the sequence is outside the array, whoever's it is.
constexpr int RAGGED_ROWS = 1 << 30;

DEVICE int ragged_row(const Rows& rows, int row) { return RAGGED_ROWS - rows.length + row; }

DEVICE int ragged_end(const Rows& rows) { return rows.start + rows.length; }

DEVICE WorkPlace* work_places(char* shared) { return reinterpret_cast<WorkPlace*>(shared + WORK_OFFSET); }

// Bytes of a box that lie inside an array.
DEVICE unsigned inside(int rows, int most_rows, int columns) {
  return max(0, min(rows, most_rows)) * max(0, columns) * static_cast<int>(sizeof(Stored));
}

DEVICE void load_queries(
    char* shared, Barriers* barriers, const Flash3ForwardParameters& parameters, const Work& work,
    const Ring<QUERY_STAGES>& ring, WorkPlace* place, LargeByteCounter& counter) {
  const Problem& problem = parameters.problem;
  for (int group = 0; group < CONSUMERS; group++) wait(&barriers->q_empty[ring.stage()][group], ring.parity() ^ 1);
  static_cast<Work&>(*place) = work;
  for (int group = 0; group < CONSUMERS; group++) {
    Barrier* full = &barriers->q_full[ring.stage()][group];
    if (work.row == NO_ROW) {
      arrive(full);
      continue;
    }
    arrive_expecting(full, QUERY_GROUP_BYTES);
    const int row = work.row + group * GROUP_ROWS;
    char* to = shared + ring.stage() * QUERY_BYTES + group * QUERY_GROUP_BYTES;
    for (int slab = 0; slab < SLABS; slab++) {
#if RAGGED
      start_box_load(
          to + slab * QUERY_SLAB_BYTES, &parameters.q_map, full, Reuse::ONCE, slab * SLAB_COLUMNS,
          ragged_row(work.queries, row), ragged_end(work.queries), RAGGED_ROWS, work.head);
#else
      start_box_load(
          to + slab * QUERY_SLAB_BYTES, &parameters.q_map, full, Reuse::ONCE, slab * SLAB_COLUMNS, 0,
          row / PACKED_HEADS, work.head, work.batch);
#endif
    }
    counter.add(inside(GROUP_ROWS, packed_rows(problem, work) - row, problem.head_dim));
  }
}

DEVICE void load_keys(
    char* shared, Barrier* full, Barrier* empty, const TensorMap* map, const Problem& problem, int columns,
    const Work& work, int tile, unsigned parity, LargeByteCounter& counter) {
  wait(empty, parity ^ 1);
  arrive_expecting(full, KEY_BYTES);
  const int head = key_head(problem, work);
  for (int slab = 0; slab < SLABS; slab++) {
#if RAGGED
    start_box_load(
        shared + slab * KEY_SLAB_BYTES, map, full, Reuse::OFTEN, slab * SLAB_COLUMNS,
        ragged_row(work.keys, tile * KEY_ROWS), ragged_end(work.keys), RAGGED_ROWS, head);
#else
    start_box_load(
        shared + slab * KEY_SLAB_BYTES, map, full, Reuse::OFTEN, slab * SLAB_COLUMNS, tile * KEY_ROWS, head,
        work.batch);
#endif
  }
  counter.add(inside(KEY_ROWS, key_count(problem, work) - tile * KEY_ROWS, columns));
}

DEVICE void load(char* shared, Barriers* barriers, const Flash3ForwardParameters& parameters) {
  const Problem& problem = parameters.problem;
  LargeByteCounter q_bytes(parameters.counters + COUNT_Q), k_bytes(parameters.counters + COUNT_K);
  LargeByteCounter v_bytes(parameters.counters + COUNT_V);
  Ring<QUERY_STAGES> queries;
  Ring<WORK_STAGES> places;
  Ring<KEY_STAGES> keys;
  Ring<VALUE_STAGES> values;
  const auto load_k = [&](const Work& work, int tile) {
    load_keys(
        shared + K_OFFSET + keys.stage() * KEY_BYTES, &barriers->k_full[keys.stage()], &barriers->k_empty[keys.stage()],
        &parameters.k_map, problem, problem.head_dim, work, tile, keys.parity(), k_bytes);
    keys.advance();
  };
  const auto load_v = [&](const Work& work, int tile) {
    load_keys(
        shared + V_OFFSET + values.stage() * KEY_BYTES, &barriers->v_full[values.stage()],
        &barriers->v_empty[values.stage()], &parameters.v_map, problem, problem.value_dim, work, tile, values.parity(),
        v_bytes);
    values.advance();
  };
  Schedule schedule(parameters);
  Work work;
  do {
    work = schedule.next();
    if (work.first_tile < work.stop_tile) load_k(work, work.first_tile);
    load_queries(shared, barriers, parameters, work, queries, work_places(shared) + places.stage(), q_bytes);
    queries.advance(), places.advance();
    for (int tile = work.first_tile; tile < work.stop_tile; tile++) {
      if (tile + 1 < work.stop_tile) load_k(work, tile + 1);
      load_v(work, tile);
    }
  } while (work.row != NO_ROW);
  q_bytes.flush(), k_bytes.flush(), v_bytes.flush(), schedule.flush();
}

// compute

// Where a thread stands in its warpgroup; read anew where it is used, to take no registers in between.
struct Place {
  int warp;  // in the warpgroup
  int lane;
  int row;   // first row of the thread in its warpgroup; the other follows 8 further on
  int quad;  // lane among the four that share a row

  DEVICE Place() {
    const int thread = fresh_thread_index() % WARPGROUP;
    warp = thread / WARP;
    lane = thread % WARP;
    row = warp * WARP_ROWS + lane / 4;
    quad = lane % 4;
  }
};

// Running softmax of two rows.
struct SoftmaxState {
  float row_max[2];      // of unscaled scores
  float row_sum[2][2];   // of the thread's even and odd columns
  float correction[2];
};

// Which keys the rows of a warpgroup see.
class Sight {
 public:
  DEVICE Sight(const Problem& problem, const Work& work, int group) : problem_(problem), work_(work), group_(group) {}

  // Of a row of the warpgroup.
  DEVICE int first_key(int row) const { return position(row) - problem_.window_left; }
  DEVICE int stop_key(int row) const {
    return MASKED ? min(keys(), position(row) + problem_.window_right + 1) : keys();
  }

  // Tiles of keys that the warpgroup takes, of those of the query tile at least one: others hide all keys from it.
  DEVICE int first_tile() const {
    if (!MASKED) return work_.first_tile;
    return max(work_.first_tile, min(work_.stop_tile - 1, first_key(0) / KEY_ROWS));
  }
  DEVICE int stop_tile(int first_tile) const {
    if (!MASKED) return work_.stop_tile;
    return max(first_tile + 1, min(work_.stop_tile, (stop_key(GROUP_ROWS - 1) + KEY_ROWS - 1) / KEY_ROWS));
  }

  // Tiles of keys before the first and from the second on hide keys from rows of the warpgroup.
  DEVICE int first_whole() const {
    return MASKED ? (max(0, first_key(GROUP_ROWS - 1)) + KEY_ROWS - 1) / KEY_ROWS : 0;
  }
  DEVICE int stop_whole() const { return max(0, stop_key(0)) / KEY_ROWS; }

 private:
  DEVICE int keys() const { return key_count(problem_, work_); }

  // Key at which a row stands.
  DEVICE int position(int row) const {
    return (work_.row + group_ * GROUP_ROWS + row) / PACKED_HEADS + keys() - query_count(problem_, work_);
  }

  const Problem& problem_;
  const Work& work_;
  int group_;
};

// How many of the thread's keys in a tile come before one, 2 of every 8.
DEVICE int keys_before(int key) { return key <= 0 ? 0 : key / 8 * 2 + min(key % 8, 2); }

// The bits from a number on, of 32.
DEVICE unsigned bits_from(int bit) { return bit >= 32 ? 0 : ~0u << max(bit, 0); }

// Hide the keys of a tile that rows do not see, before the first ones and from the last ones on.
template <bool BEFORE>
DEVICE void hide(float (&scores)[SCORES], const Sight& sight, int tile) {
  const Place place;
  const int before = tile * KEY_ROWS + 2 * place.quad;
#pragma unroll
  for (int row = 0; row < 2; row++) {
    const int first = keys_before(sight.first_key(place.row + 8 * row) - before);
    const int stop = keys_before(sight.stop_key(place.row + 8 * row) - before);
#pragma unroll
    for (int word = 0; word < SCORES / 2; word += 32) {
      // A bit for each key: the compiler moves several at a time to predicates.
      const unsigned seen = (BEFORE ? bits_from(first - word) : ~0u) & ~bits_from(stop - word);
#pragma unroll
      for (int bit = 0; bit < 32 && word + bit < SCORES / 2; bit++) {
        float& score = scores[(word + bit) / 2 * 4 + 2 * row + bit % 2];
        score = seen >> bit & 1 ? score : -infinity();
      }
    }
  }
}

// Largest of the thread's scores of a row, or a number if that is larger.
DEVICE float largest(const float (&scores)[SCORES], int row, float number) {
  float even = number, odd = number;
#pragma unroll
  for (int i = 2 * row; i < SCORES; i += 4) {
    even = maximum_number(even, scores[i]);
    float& chain = IN_ONE_CHAIN ? even : odd;
    chain = maximum_number(chain, scores[i + 1]);
  }
  return IN_ONE_CHAIN ? even : maximum_number(even, odd);
}

// Raise the maximum of a row to the largest number of the threads that share it. Returns what its scores are taken
// relative to, scaled.
template <bool FIRST>
DEVICE float raise_maximum(SoftmaxState& state, int row, float row_max, float scale_log2) {
  row_max = maximum_number(row_max, shuffle_xor(row_max, 1));
  row_max = maximum_number(row_max, shuffle_xor(row_max, 2));
  const float reference = reference_of(row_max, scale_log2);
  if (!FIRST) {
    state.correction[row] = exp2_approximate(__fmul_rn(__fsub_rn(state.row_max[row], reference), scale_log2));
  }
  state.row_max[row] = row_max;
  return __fmul_rn(reference, scale_log2);
}

// Replace the scores of a row by probabilities, and add these to its sum.
template <bool FIRST>
DEVICE void take_exponentials(
    SoftmaxState& state, int row, float (&scores)[SCORES], float scale_log2, float scaled_reference) {
#pragma unroll
  for (int i = 2 * row; i < SCORES; i += 4) {
    scores[i] = exp2_approximate(__fmaf_rn(scores[i], scale_log2, -scaled_reference));
    scores[i + 1] = exp2_approximate(__fmaf_rn(scores[i + 1], scale_log2, -scaled_reference));
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
DEVICE void start_values(
    float (&out)[OUTPUTS], const unsigned (&probabilities)[SCORES / 2], unsigned long long v, bool adds) {
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

// Whether an output of one of the thread's rows is NaN.
DEVICE bool holds_nan(const float (&out)[OUTPUTS], int row) {
  bool found = false;
#pragma unroll
  for (int i = 2 * row; i < OUTPUTS; i += 4) found |= is_either_nan(out[i], out[i + 1]);
  return found;
}

// Sum of a row, of the thread's even and odd columns and those of the others that share the row.
DEVICE float total_of(const float (&row_sum)[2]) {
  float sum = __fadd_rn(row_sum[0], row_sum[1]);
  sum = __fadd_rn(sum, shuffle_xor(sum, 1));
  return __fadd_rn(sum, shuffle_xor(sum, 2));
}

DEVICE float inverse_of(float sum) { return sum == 0.0f ? 0.0f : reciprocal_approximate(sum); }

// Two numbers of a row of a matrix in memory, 0 where there are none.
DEVICE unsigned pair_of_row(const Stored* row, int column, int columns, ByteCounter& counter) {
  if (row == nullptr || column >= columns) return 0;
  counter.add(4);
  return load_4_bytes(row + column);
}

// Compute the output of a row anew, all by this warp, and store it. A hidden key has a probability of 0, which times a
// value that is Inf or NaN is NaN; here the values that the row does not see are taken for 0. The warp's tensor core
// instructions add up as the warpgroup's do; all rows of their left matrix are this one. `scratch` is for this warp.
// All lanes take the same way, so that the compiler keeps what is the same for a warp in uniform registers elsewhere.
DEVICE void repair_row(
    float* scratch, const Flash3ForwardParameters& parameters, const Work& work, const Sight& sight, int row,
    int group_row, ByteCounter& out_bytes, ByteCounter& repair_bytes) {
  static_assert((KEY_ROWS + COLUMNS) * sizeof(float) <= STAGED_SLAB_BYTES, "scratch has room");
  float* const probabilities = scratch;  // of a tile of keys; first their scores; then pairs in the places of even keys
  float* const out = scratch + KEY_ROWS;
  const Problem& problem = parameters.problem;
  const Place place;
  const bool is_first_row = place.lane / 4 == 0;
  const int packed = group_row + row, position = packed / PACKED_HEADS;
  if (position >= query_count(problem, work)) return;
  const int head = work.head * PACKED_HEADS + packed % PACKED_HEADS;
#if RAGGED
  const int batch = 0, first_query = work.queries.start, first_of_keys = work.keys.start;
#else
  const int batch = work.batch, first_query = 0, first_of_keys = 0;
#endif
  const Stored* query = row_of(parameters.q, parameters.q_strides, batch, head, first_query + position);
  const int first = max(0, sight.first_key(row)), stop = sight.stop_key(row);
  const auto sees = [&](int key) { return key >= first && key < stop; };
  const auto row_of_key = [&](const Stored* matrix, const Strides& strides, int key) -> const Stored* {
    if (!sees(key)) return nullptr;
    return row_of(matrix, strides, batch, key_head(problem, work), first_of_keys + key);
  };
  float row_max = -infinity(), row_sum[2] = {0.0f, 0.0f};
  for (int column = 0; column < COLUMNS; column += WARP) {
    if (column + place.lane < COLUMNS) out[column + place.lane] = 0.0f;
  }
#pragma unroll 1
  for (int first_of_tile = first / KEY_ROWS * KEY_ROWS; first_of_tile < stop; first_of_tile += KEY_ROWS) {
    const float last_max = row_max;
#pragma unroll 1
    for (int of_tile = 0; of_tile < KEY_ROWS; of_tile += 16) {
      float sums[2][4] = {};
#pragma unroll 1
      for (int step = 0; step < COLUMNS; step += STEP) {
        const int column = step + 2 * place.quad;
        unsigned left[4];
        left[0] = left[1] = pair_of_row(query, column, problem.head_dim, repair_bytes);
        left[2] = left[3] = pair_of_row(query, column + 8, problem.head_dim, repair_bytes);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int key = first_of_tile + of_tile + 8 * half + place.lane / 4;
          const Stored* of_key = row_of_key(parameters.k, parameters.k_strides, key);
          const unsigned low = pair_of_row(of_key, column, problem.head_dim, repair_bytes);
          const unsigned high = pair_of_row(of_key, column + 8, problem.head_dim, repair_bytes);
          multiply_add<Stored>(sums[half], left, low, high);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int key = of_tile + i / 2 * 8 + 2 * place.quad + i % 2;
        const float score = sees(first_of_tile + key) ? sums[i / 2][i % 2] : -infinity();
        row_max = maximum_number(row_max, score);
        if (is_first_row) probabilities[key] = score;
      }
    }
    __syncwarp();
    row_max = maximum_number(row_max, shuffle_xor(row_max, 1));
    row_max = maximum_number(row_max, shuffle_xor(row_max, 2));
    const float reference = reference_of(row_max, problem.scale_log2);
    const float offset = -__fmul_rn(reference, problem.scale_log2);
    const float correction = exp2_approximate(__fmul_rn(__fsub_rn(last_max, reference), problem.scale_log2));
#pragma unroll 1
    for (int of_tile = 0; of_tile < KEY_ROWS; of_tile += 8) {
      float* const pair = probabilities + of_tile + 2 * place.quad;
      float powers[2];
#pragma unroll
      for (int side = 0; side < 2; side++) {
        powers[side] = exp2_approximate(__fmaf_rn(pair[side], problem.scale_log2, offset));
        row_sum[side] = __fmaf_rn(row_sum[side], of_tile == 0 ? correction : 1.0f, powers[side]);
      }
      __syncwarp();
      if (is_first_row) pair[0] = float_of_bits(round_pair<Stored>(powers[0], powers[1]));
    }
    __syncwarp();
#pragma unroll 1
    for (int block = 0; block < COLUMNS; block += 16) {
      float sums[2][4];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        sums[i / 4][i % 4] = __fmul_rn(out[block + i / 4 * 8 + 2 * place.quad + i % 2], correction);
      }
#pragma unroll 1
      for (int of_tile = 0; of_tile < KEY_ROWS; of_tile += STEP) {
        const int mine = of_tile + 2 * place.quad;
        unsigned left[4];
        left[0] = left[1] = bits_of_float(probabilities[mine]);
        left[2] = left[3] = bits_of_float(probabilities[mine + 8]);
        unsigned values[2][2] = {};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int key = first_of_tile + mine + i / 2 * 8 + i % 2;
          const Stored* of_key = row_of_key(parameters.v, parameters.v_strides, key);
#pragma unroll
          for (int right = 0; right < 2; right++) {
            const int column = block + 8 * right + place.lane / 4;
            if (of_key == nullptr || column >= problem.value_dim) continue;
            repair_bytes.add(2);
            values[right][i / 2] |= static_cast<unsigned>(load_2_bytes(of_key + column)) << 16 * (i % 2);
          }
        }
        multiply_add<Stored>(sums[0], left, values[0][0], values[0][1]);
        multiply_add<Stored>(sums[1], left, values[1][0], values[1][1]);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (is_first_row) out[block + i / 2 * 8 + 2 * place.quad + i % 2] = sums[i / 2][i % 2];
      }
    }
    __syncwarp();
  }
  const float inverse = inverse_of(total_of(row_sum));
  Stored* to = row_of(parameters.out, parameters.out_strides, batch, head, first_query + position);
  for (int first_column = 0; first_column < COLUMNS; first_column += 2 * WARP) {
    const int column = first_column + 2 * place.lane;
    if (column >= problem.value_dim) continue;
    out_bytes.add(4);
    store_4_bytes(
        to + column, round_pair<Stored>(__fmul_rn(out[column], inverse), __fmul_rn(out[column + 1], inverse)));
  }
  __syncwarp();
}

// Wait until the warp's stores have read what was staged for them.
DEVICE void finish_stores() {
  if (fresh_thread_index() % WARP == 0) wait_for_store_reads<0>();
  __syncwarp();
}

// Start to store the results of a warp. `staged` has room for some slabs of its rows, `next_slab` bytes apart.
template <int SLABS_AT_ONCE>
DEVICE void store_rows(
    const float (&out)[OUTPUTS], const float (&inverse)[2], char* staged, int next_slab,
    const Flash3ForwardParameters& parameters, const Work& work, int warp_row) {
  const int lane = fresh_thread_index() % WARP, matrix_row = lane % 16, chunk = lane / 16;
#pragma unroll
  for (int first = 0; first < SLABS; first += SLABS_AT_ONCE) {
    const int stop = min(SLABS, first + SLABS_AT_ONCE);
#pragma unroll
    for (int i = first * SLAB_COLUMNS / 2; i < OUTPUTS && i < stop * SLAB_COLUMNS / 2; i += 8) {
      const int column = 2 * i - first * SLAB_COLUMNS + 8 * chunk, slab = column / SLAB_COLUMNS;
      const int place_in_row = (column % SLAB_COLUMNS / 8 ^ matrix_row % 8) * 16;
      store_matrices(
          staged + slab * next_slab + matrix_row * SLAB_ROW_BYTES + place_in_row,
          round_pair<Stored>(__fmul_rn(out[i], inverse[0]), __fmul_rn(out[i + 1], inverse[0])),
          round_pair<Stored>(__fmul_rn(out[i + 2], inverse[1]), __fmul_rn(out[i + 3], inverse[1])),
          round_pair<Stored>(__fmul_rn(out[i + 4], inverse[0]), __fmul_rn(out[i + 5], inverse[0])),
          round_pair<Stored>(__fmul_rn(out[i + 6], inverse[1]), __fmul_rn(out[i + 7], inverse[1])));
    }
    publish_to_copies();
    __syncwarp();
    if (lane == 0) {
      for (int slab = first; slab < stop; slab++) {
#if RAGGED
        start_box_store(
            &parameters.out_map, staged + (slab - first) * next_slab, slab * SLAB_COLUMNS,
            ragged_row(work.queries, warp_row), ragged_end(work.queries), RAGGED_ROWS, work.head);
#else
        start_box_store(
            &parameters.out_map, staged + (slab - first) * next_slab, slab * SLAB_COLUMNS, warp_row % PACKED_HEADS,
            warp_row / PACKED_HEADS, work.head, work.batch);
#endif
      }
      commit_stores();
    }
    if (stop < SLABS) finish_stores();
  }
}

// Write the log-sum-exps and the output of a warp. `in_keys` is where the last keys lay, or null if there were none;
// `in_queries` is where the warpgroup's queries lie.
DEVICE void finish(
    float (&out)[OUTPUTS], const SoftmaxState& state, char* in_queries, char* in_keys, Barrier* k_read, unsigned parity,
    const Flash3ForwardParameters& parameters, const Work& work, int group, ByteCounter& out_bytes,
    ByteCounter& lse_bytes, ByteCounter& repair_bytes) {
  const Problem& problem = parameters.problem;
  const Place place;
  const int group_row = work.row + group * GROUP_ROWS;
  float inverse[2];
  bool needs_repair = false;
#pragma unroll
  for (int row = 0; row < 2; row++) {
    const float sum = total_of(state.row_sum[row]);
    inverse[row] = inverse_of(sum);
    const int packed = group_row + place.row + 8 * row, position = packed / PACKED_HEADS;
    // By the values alone: a probability that is NaN makes the sum NaN.
    needs_repair |= position < query_count(problem, work) && sum == sum && holds_nan(out, row);
    if (place.quad == 0 && position < query_count(problem, work)) {
      const int head = work.head * PACKED_HEADS + packed % PACKED_HEADS;
      const float reference = reference_of(state.row_max[row], problem.scale_log2);
      const float logarithm = __fmul_rn(__fmaf_rn(reference, problem.scale_log2, log2_approximate(sum)), 0x1.62e43p-1f);
#if RAGGED
      float* lse = row_of(parameters.lse, parameters.lse_strides, 0, head, work.queries.start + position);
#else
      float* lse = row_of(parameters.lse, parameters.lse_strides, work.batch, head, position);
#endif
      lse_bytes.add(4);
      store_4_bytes(lse, bits_of_float(sum == 0.0f ? -infinity() : logarithm));
    }
  }
  const int warp_row = group_row + place.warp * WARP_ROWS;
  const bool is_in_keys = STAGES_IN_KEYS && in_keys != nullptr;
  // What the rows take the place of has been read.
  if (is_in_keys) {
    wait(k_read, parity);
  } else {
    sync_named(2 + CONSUMERS + group, WARPGROUP);
  }
  char* const staged = is_in_keys
      ? in_keys + (4 * group + place.warp) * SLABS_IN_KEYS * STAGED_SLAB_BYTES
      : in_queries + place.warp * STAGED_SLAB_BYTES;
  if (MASKED && any_lane(needs_repair)) {
    const Sight sight(problem, work, group);
#pragma unroll 1
    for (int row = 0; row < WARP_ROWS; row++) {
      repair_row(
          reinterpret_cast<float*>(staged), parameters, work, sight, uniform(place.warp) * WARP_ROWS + row, group_row,
          out_bytes, repair_bytes);
    }
    publish_to_copies();
    return;
  }
  if (is_in_keys) {
    store_rows<(STAGES_IN_KEYS ? SLABS_IN_KEYS : SLABS)>(
        out, inverse, staged, STAGED_SLAB_BYTES, parameters, work, warp_row);
  } else {
    store_rows<SLABS>(out, inverse, staged, QUERY_SLAB_BYTES, parameters, work, warp_row);
  }
  if (place.lane == 0) out_bytes.add(inside(WARP_ROWS, packed_rows(problem, work) - warp_row, problem.value_dim));
}

DEVICE void compute(char* shared, Barriers* barriers, const Flash3ForwardParameters& parameters) {
  const Problem& problem = parameters.problem;
  const int group = uniform(threadIdx.x / WARPGROUP) - 1;
  const bool is_first_lane = threadIdx.x % WARP == 0;
  const float scale_log2 = problem.scale_log2;
  ByteCounter out_bytes(parameters.counters + COUNT_OUT), lse_bytes(parameters.counters + COUNT_LSE);
  ByteCounter repair_bytes(parameters.counters + COUNT_REPAIRS);
  const unsigned long long k = describe_matrix(shared_address(shared) + K_OFFSET, 0);
  const unsigned long long v = describe_matrix(shared_address(shared) + V_OFFSET, KEY_SLAB_BYTES);
  Ring<QUERY_STAGES> queries;
  Ring<WORK_STAGES> places;
  Ring<KEY_STAGES> keys;
  Ring<VALUE_STAGES> values;
  Ring<1> last_keys;
  bool is_storing = false;  // results of the last query tile, from where its queries lay
  const auto release = [&](Barrier* barrier) {
    if (is_first_lane) arrive(barrier);
  };
  const auto queries_of = [&](int stage) {
    return shared + stage * QUERY_BYTES + group * QUERY_GROUP_BYTES;
  };
  const auto await_work = [&]() -> Work {
    wait(&barriers->q_full[queries.stage()][group], queries.parity());
    const Work work = work_places(shared)[places.stage()];
    // The same in all lanes, as the compiler would not know.
#if RAGGED
    return {uniform(work.head), uniform(work.row), uniform(work.first_tile), uniform(work.stop_tile),
            {0, uniform(work.queries.length)}, {0, uniform(work.keys.length)}};
#else
    return {uniform(work.batch), uniform(work.head), uniform(work.row), uniform(work.first_tile),
            uniform(work.stop_tile)};
#endif
  };
  const auto await_keys = [&] { wait(&barriers->k_full[keys.stage()], keys.parity()); };
  const auto start_next_scores = [&](float (&scores)[SCORES]) {
    fence_products();
    start_scores(
        scores, describe_matrix(shared_address(queries_of(queries.stage())), 0), moved_on(k, keys.stage() * KEY_BYTES));
    commit_products();
  };
  const auto start_next_values = [&](
      float (&out)[OUTPUTS], const unsigned (&probabilities)[SCORES / 2], bool adds) {
    wait(&barriers->v_full[values.stage()], values.parity());
    fence_products();
    start_values(out, probabilities, moved_on(v, values.stage() * KEY_BYTES), adds);
    commit_products();
  };
  const auto release_keys = [&](bool is_last) {
    release(STAGES_IN_KEYS && is_last ? &barriers->k_read : &barriers->k_empty[keys.stage()]);
    keys.advance();
  };
  const auto release_values = [&] {
    release(&barriers->v_empty[values.stage()]);
    values.advance();
  };
  // Tiles of keys that hide all keys from the warpgroup, but not from others.
  const auto skip_keys = [&](bool is_last) {
    await_turn(group);
    end_turn(group);
    await_keys();
    release_keys(is_last);
  };
  const auto skip_values = [&] {
    wait(&barriers->v_full[values.stage()], values.parity());
    release_values();
  };
  // Give the room of the last query tile's results to the queries that come there.
  const auto release_staged = [&] {
    if (!is_storing) return;
    finish_stores();
    release(&barriers->q_empty[queries.stage_before()][group]);
    is_storing = false;
  };
  const auto store_result = [&](float (&out)[OUTPUTS], const SoftmaxState& state, bool has_keys) {
    const Work work = work_places(shared)[places.stage()];
    const int stage = keys.stage_before();
    finish(
        out, state, queries_of(queries.stage()), has_keys ? shared + K_OFFSET + stage * KEY_BYTES : nullptr,
        &barriers->k_read, last_keys.parity(), parameters, work, group, out_bytes, lse_bytes, repair_bytes);
    places.advance();
    if (STAGES_IN_KEYS && has_keys) {
      finish_stores();
      release(&barriers->k_empty[stage]);
      last_keys.advance();
    } else {
      queries.advance();
      is_storing = true;
      if (QUERY_STAGES == 1) release_staged();
    }
  };

  if (group == CONSUMERS - 1) end_turn(group);  // the first warpgroup begins
  for (;;) {
    const Work work = await_work();
    if (work.row == NO_ROW) break;
    SoftmaxState state = {{-infinity(), -infinity()}, {{0.0f, 0.0f}, {0.0f, 0.0f}}, {1.0f, 1.0f}};
    if (work.first_tile == work.stop_tile) {
      release_staged();
      float out[OUTPUTS] = {};
      store_result(out, state, false);
      continue;
    }
    float out[OUTPUTS], scores[SCORES];
    unsigned probabilities[SCORES / 2];
    const Sight sight(problem, work, group);
    const int first_tile = sight.first_tile(), stop_tile = sight.stop_tile(first_tile);
    const int first_whole = sight.first_whole(), stop_whole = sight.stop_whole();
    // Take the scores of a tile into the softmax, one row and then the other: while the exponentials of the first are
    // taken, there is the second's maximum to find; meanwhile of those of the second, the output to correct and
    // probabilities to round. The compiler would wait for the products under way before any of it, and it moves nothing
    // past a wait for keys; with three warpgroups there are enough other products to overlap with.
    const auto take_scores = [&](int tile, auto is_first, auto hides_before, auto hides_after) {
      constexpr bool FIRST = decltype(is_first)::value, BEFORE = decltype(hides_before)::value;
      const auto end_values = [&] {
        if (FIRST) return;
        wait_for_products<0>();
        release_values();
      };
      release_keys(tile + 1 == work.stop_tile);
      if (STAGES_IN_KEYS && tile + 1 == stop_tile) {
        release(&barriers->q_empty[queries.stage()][group]);
        queries.advance();
      }
      if (FIRST) {
        if (tile < first_whole || tile >= stop_whole) hide<MASKED>(scores, sight, tile);
      } else if (BEFORE || decltype(hides_after)::value) {
        hide<BEFORE>(scores, sight, tile);
      }
      const float first_max = largest(scores, 0, state.row_max[0]);
      const float first_reference = raise_maximum<FIRST>(state, 0, first_max, scale_log2);
      take_exponentials<FIRST>(state, 0, scores, scale_log2, first_reference);
      const float second_max = largest(scores, 1, number_after(state.row_max[1], first_reference));
      if (WAITS_AMONG_EXPONENTIALS) {
        settle(scores);
        if (tile + 1 < stop_tile) await_keys();
        end_values();
      }
      const float second_reference = raise_maximum<FIRST>(state, 1, second_max, scale_log2);
      take_exponentials<FIRST>(state, 1, scores, scale_log2, second_reference);
      if (!WAITS_AMONG_EXPONENTIALS) end_values();
      round_probabilities(probabilities, scores);
    };
    for (int tile = work.first_tile; tile < first_tile; tile++) {
      skip_keys(false);
      values.follow(keys);
      skip_values();
    }
    await_keys();
    start_next_scores(scores);
    release_staged();
    wait_for_products<0>();
    take_scores(first_tile, Constant<true>(), Constant<true>(), Constant<true>());

    bool adds = false;  // whether the output holds the values of a tile
    // The scores of a tile, and meanwhile the values of the one before.
    const auto take_tile = [&](int tile, auto hides_before, auto hides_after) {
      if (!WAITS_AMONG_EXPONENTIALS) await_keys();
      await_turn(group);
      start_next_scores(scores);
      values.follow(keys);  // not kept beside them, so that one number is left to carry from tile to tile
      start_next_values(out, probabilities, adds);
      end_turn(group);
      wait_for_products<1>();
      take_scores(tile, Constant<false>(), hides_before, hides_after);
      adds = true;
      // A correction by 1 changes no bit.
      if (!SKIPS_CORRECTIONS || any_lane(state.correction[0] != 1.0f || state.correction[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++) out[i] = __fmul_rn(out[i], state.correction[i / 2 % 2]);
      }
    };
    int tile = first_tile + 1;
    if (MASKED) {
      for (; tile < min(stop_tile, first_whole); tile++) take_tile(tile, Constant<true>(), Constant<true>());
    }
    for (; tile < min(stop_tile, stop_whole); tile++) take_tile(tile, Constant<false>(), Constant<false>());
    for (; tile < stop_tile; tile++) take_tile(tile, Constant<false>(), Constant<true>());

    values.follow(keys);
    start_next_values(out, probabilities, adds);
    // The other warpgroups wait for this one's turn.
    if (tile < work.stop_tile) skip_keys(tile + 1 == work.stop_tile);
    wait_for_products<0>();
    release_values();
    for (; tile < work.stop_tile; tile++) {
      if (tile > stop_tile) skip_keys(tile + 1 == work.stop_tile);
      skip_values();
    }
    store_result(out, state, true);
  }
  release_staged();
  out_bytes.flush(), lse_bytes.flush(), repair_bytes.flush();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    flash3_forward(const __grid_constant__ Flash3ForwardParameters parameters) {
  char* const shared = reinterpret_cast<char*>(shared_memory());
  Barriers* const barriers = reinterpret_cast<Barriers*>(shared + BARRIERS_OFFSET);
  if (threadIdx.x == 0) {
    prefetch_map(&parameters.q_map), prefetch_map(&parameters.k_map);
    prefetch_map(&parameters.v_map), prefetch_map(&parameters.out_map);
    for (int group = 0; group < CONSUMERS; group++) {
      for (int stage = 0; stage < QUERY_STAGES; stage++) {
        init_barrier(&barriers->q_full[stage][group], 1);
        init_barrier(&barriers->q_empty[stage][group], 4);
      }
    }
    for (int stage = 0; stage < KEY_STAGES; stage++) {
      init_barrier(&barriers->k_full[stage], 1);
      init_barrier(&barriers->k_empty[stage], 4 * CONSUMERS);
    }
    for (int stage = 0; stage < VALUE_STAGES; stage++) {
      init_barrier(&barriers->v_full[stage], 1);
      init_barrier(&barriers->v_empty[stage], 4 * CONSUMERS);
    }
    if (STAGES_IN_KEYS) init_barrier(&barriers->k_read, 4 * CONSUMERS);
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
