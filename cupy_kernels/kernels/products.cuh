// A tile of a matrix product, kept in registers by the threads of a block, while chunks of both operands pass through
// shared memory: one is multiplied while the next is copied.
//
// Every element of the result is one chain of fused multiply-adds from +0, ascending along the contracted index; what
// lies beyond the operands, and what a mask hides, takes no part.
//
// Macros:
//   RESULT_ROWS, RESULT_COLUMNS  tile of the result: 32, or multiples of 64; columns also 16, and 96 where the columns
//                                of the right operand are not contracted
//   SCALED                       if defined, the result is multiplied by operand.factor at the end
#pragma once

#include "tiles.cuh"

constexpr int WARP = 32;
constexpr int CHUNK = 32;  // contracted numbers on chip at once
constexpr int THREAD_ROWS = RESULT_ROWS < 64 ? 4 : 8;
constexpr int THREAD_COLUMNS = RESULT_COLUMNS < 64 ? 4 : 8;
constexpr int THREADS_ACROSS = RESULT_COLUMNS / THREAD_COLUMNS;
constexpr int THREADS = RESULT_ROWS / THREAD_ROWS * THREADS_ACROSS;
constexpr int LANES_ACROSS = THREADS_ACROSS % 8 == 0 ? 8 : 4;  // of a warp
constexpr int LANES_DOWN = WARP / LANES_ACROSS;
constexpr int WARPS_ACROSS = THREADS_ACROSS / LANES_ACROSS;
constexpr int BLOCKS = THREADS > 256 ? 1 : THREADS == 256 ? 2 : 384 / THREADS;  // of a multiprocessor at once
constexpr int BUFFER_FLOATS = CHUNK * (RESULT_ROWS + RESULT_COLUMNS);
constexpr int SHARED_BYTES = 4 * 2 * BUFFER_FLOATS;

static_assert(THREADS_ACROSS % LANES_ACROSS == 0, "warps have whole rows of threads");
static_assert(THREADS % WARP == 0 && THREADS / THREADS_ACROSS % LANES_DOWN == 0, "warps are whole");

// Where a thread stands in the tile.
struct Place {
  int across, down;

  DEVICE Place() {
    const int lane = threadIdx.x % WARP, warp = warp_index();
    across = warp % WARPS_ACROSS * LANES_ACROSS + lane % LANES_ACROSS;
    down = warp / WARPS_ACROSS * LANES_DOWN + lane / LANES_ACROSS;
  }
};

// The i-th row or column of a thread: vectors of four adjacent ones, in each half of the tile.
template <int SIZE>
DEVICE int position_of(int thread, int i) {
  return 4 * thread + i % 4 + SIZE / 2 * (i / 4);
}

// The part of an operand that a chunk copies; `rows` and `columns` are what the matrix has from there on.
template <class Stored>
struct Source {
  const Stored* from;
  long long row_stride;
  int rows, columns;
};

// A chunk of an operand: what SIZE rows or columns of the result need of CHUNK contracted numbers, which lie along the
// columns of the operand or along its rows. In shared memory it is as in global memory.
template <class Stored, int SIZE, bool COLUMNS_ARE_CONTRACTED>
struct OperandChunk {
  static constexpr bool CONTRACTED_COLUMNS = COLUMNS_ARE_CONTRACTED;
  static constexpr int FLOATS = SIZE * CHUNK;
  static constexpr int GROUP = CONTRACTED_COLUMNS ? 2 : 1;  // contracted numbers that a thread takes at a time
  static constexpr int ROWS = CONTRACTED_COLUMNS ? SIZE : CHUNK;
  static constexpr int COLUMNS_HERE = CONTRACTED_COLUMNS ? CHUNK : SIZE;
  static constexpr int VECTORS = COLUMNS_HERE / 4;  // of a row
  static constexpr int DOWN = THREADS / VECTORS;      // rows copied at once
  static constexpr int COPIES = (ROWS + DOWN - 1) / DOWN;
  static constexpr int PART_COPIES = (COPIES + 1) / 2;  // in each of two parts
  static constexpr bool SPARE = 2 * PART_COPIES * DOWN != ROWS;
  static constexpr int PER_THREAD = SIZE < 64 ? 4 : 8;
  static constexpr bool CONVERTS = sizeof(Stored) == 2;
  static_assert(THREADS % VECTORS == 0, "threads copy whole rows");
  static_assert(!CONTRACTED_COLUMNS || SIZE == 32 || SIZE % 64 == 0, "a thread's rows have one place of a group");

  // Rows of contracted numbers begin at other banks every four rows, which eight lanes read at once.
  DEVICE static int offset(int row, int column) {
    return row * COLUMNS_HERE + (CONTRACTED_COLUMNS ? column ^ row / 4 % VECTORS * 4 : column);
  }

  Two held[CONVERTS ? PART_COPIES : 1];  // numbers on their way to shared memory

  // Begin to copy part 0 or 1 of a chunk; numbers of vectors that the end of a row cuts arrive at once.
  template <int PART>
  DEVICE void start(float* tile, const Source<Stored>& source, unsigned long long* total) {
    ByteCounter counter(total);
    if (source.rows >= ROWS && source.columns >= COLUMNS_HERE) {
      start_vectors<PART, true>(tile, source, counter);
    } else {
      start_vectors<PART, false>(tile, source, counter);
      if (PART == 0) copy_cut_vector(tile, source, counter);
    }
    counter.flush();
  }

  // Hand on what is not on its way by itself.
  template <int PART>
  DEVICE void finish(float* tile, const Source<Stored>& source) const {
    if constexpr (CONVERTS) {
      const int first_row = threadIdx.x / VECTORS, column = threadIdx.x % VECTORS * 4;
#pragma unroll
      for (int copy = 0; copy < PART_COPIES; copy++) {
        const int row = first_row + (PART * PART_COPIES + copy) * DOWN;
        if ((!SPARE || row < ROWS) && row < source.rows && column + 4 <= source.columns) {
          const float2 low = unpacked<Stored>(held[copy].x), high = unpacked<Stored>(held[copy].y);
          store_4(tile + offset(row, column), make_float4(low.x, low.y, high.x, high.y));
        }
      }
    }
  }

  template <int PART, bool WHOLE>
  DEVICE void start_vectors(float* tile, const Source<Stored>& source, ByteCounter& counter) {
    const int first_row = threadIdx.x / VECTORS + PART * PART_COPIES * DOWN, column = threadIdx.x % VECTORS * 4;
    const Stored* from = source.from + first_row * source.row_stride + column;
#pragma unroll
    for (int copy = 0; copy < PART_COPIES; copy++, from += DOWN * source.row_stride) {
      const int row = first_row + copy * DOWN;
      if ((!SPARE || row < ROWS) && (WHOLE || (row < source.rows && column + 4 <= source.columns))) {
        counter.add(4 * sizeof(Stored));
        if constexpr (CONVERTS) {
          held[copy] = load_8_bytes(from);
        } else {
          start_copy_of_16_bytes(tile, offset(row, column), from);
        }
      }
    }
  }

  DEVICE static void copy_cut_vector(float* tile, const Source<Stored>& source, ByteCounter& counter) {
    const int column = threadIdx.x % VECTORS * 4, cut = source.columns - column;
    if (cut <= 0 || cut >= 4) return;
#pragma unroll 1
    for (int row = threadIdx.x / VECTORS; row < min(ROWS, source.rows); row += DOWN) {
#pragma unroll 1
      for (int i = 0; i < cut; i++) {
        tile[offset(row, column) + i] = load_number(source.from + row * source.row_stride + column + i, counter);
      }
    }
  }

  // What a thread multiplies at one contracted number.
  DEVICE static void load(float (&numbers)[PER_THREAD], const float* tile, int thread, int index) {
    if constexpr (CONTRACTED_COLUMNS) {
#pragma unroll
      for (int i = 0; i < PER_THREAD; i++) {
        numbers[i] = tile[position_of<SIZE>(thread, i) * COLUMNS_HERE + (index ^ thread % VECTORS * 4)];
      }
    } else {
#pragma unroll
      for (int i = 0; i < PER_THREAD; i += 4) {
        const float4 four = load_4(tile + index * COLUMNS_HERE + position_of<SIZE>(thread, i));
        numbers[i] = four.x, numbers[i + 1] = four.y, numbers[i + 2] = four.z, numbers[i + 3] = four.w;
      }
    }
  }

  // A thread's i-th row at GROUP contracted numbers.
  DEVICE static void load_group(float (&numbers)[GROUP], const float* tile, int thread, int i, int index) {
    load_vector(numbers, tile + position_of<SIZE>(thread, i) * COLUMNS_HERE + (index ^ thread % VECTORS * 4));
  }
};

using Total = float[THREAD_ROWS][THREAD_COLUMNS];

DEVICE void clear(Total& total) {
#pragma unroll
  for (int i = 0; i < THREAD_ROWS; i++)
#pragma unroll
    for (int j = 0; j < THREAD_COLUMNS; j++) total[i][j] = 0.0f;
}

// Which contracted numbers of a chunk take part, counted from its first: row r of the tile takes those from r + low to
// r + high.
struct Band {
  int low, high;
  int stop;          // end of those that the operands have
  bool full, empty;  // for all rows of the tile

  // `low` and `high` count from the first row of the matrix and its first contracted number; the tile has the rows from
  // `row` to `row_stop`, the chunk the numbers from `first` to `end`.
  DEVICE Band(int low, int high, int row, int row_stop, int first, int end)
      : low(row + low - first), high(row + high - first), stop(min(CHUNK, end - first)) {
    const int last_row = row_stop - row - 1;
    full = this->low + last_row <= 0 && this->high >= CHUNK - 1 && stop == CHUNK;
    empty = this->low >= stop || this->high + last_row < 0;
  }

  DEVICE bool sees(int row, int index) const { return index - row >= low && index - row <= high; }
};

// Add the products at a group of contracted numbers.
template <class Left, class Right>
DEVICE void add_group(Total& total, const float* left, const float* right, const Place& place, int index) {
  if constexpr (Left::CONTRACTED_COLUMNS) {
    float rows[THREAD_ROWS][Left::GROUP];
#pragma unroll
    for (int i = 0; i < THREAD_ROWS; i++) Left::load_group(rows[i], left, place.down, i, index);
    if constexpr (Right::CONTRACTED_COLUMNS) {
#pragma unroll
      for (int j = 0; j < THREAD_COLUMNS; j++) {
        float column[Left::GROUP];
        Right::load_group(column, right, place.across, j, index);
#pragma unroll
        for (int k = 0; k < Left::GROUP; k++)
#pragma unroll
          for (int i = 0; i < THREAD_ROWS; i++) total[i][j] = __fmaf_rn(rows[i][k], column[k], total[i][j]);
      }
    } else {
#pragma unroll
      for (int k = 0; k < Left::GROUP; k++) {
        float columns[THREAD_COLUMNS];
        Right::load(columns, right, place.across, index + k);
#pragma unroll
        for (int i = 0; i < THREAD_ROWS; i++)
#pragma unroll
          for (int j = 0; j < THREAD_COLUMNS; j++) total[i][j] = __fmaf_rn(rows[i][k], columns[j], total[i][j]);
      }
    }
  } else {
    float rows[THREAD_ROWS], columns[THREAD_COLUMNS];
    Left::load(rows, left, place.down, index);
    Right::load(columns, right, place.across, index);
#pragma unroll
    for (int i = 0; i < THREAD_ROWS; i++)
#pragma unroll
      for (int j = 0; j < THREAD_COLUMNS; j++) total[i][j] = __fmaf_rn(rows[i], columns[j], total[i][j]);
  }
}

// Add what takes part of a chunk.
template <class Left, class Right>
DEVICE void add_visible(
    Total& total, const float* left, const float* right, const Place& place, const Band& band) {
#pragma unroll 1
  for (int index = 0; index < band.stop; index++) {
    float rows[THREAD_ROWS], columns[THREAD_COLUMNS];
    Left::load(rows, left, place.down, index);
    Right::load(columns, right, place.across, index);
#pragma unroll
    for (int i = 0; i < THREAD_ROWS; i++) {
      if (band.sees(position_of<RESULT_ROWS>(place.down, i), index)) {
#pragma unroll
        for (int j = 0; j < THREAD_COLUMNS; j++) total[i][j] = __fmaf_rn(rows[i], columns[j], total[i][j]);
      }
    }
  }
}

// Multiply a quarter of a chunk, of which all that is below `stop`, a multiple of 8, takes part.
template <class Left, class Right>
DEVICE void multiply_quarter(
    Total& total, const float* left, const float* right, const Place& place, int quarter, int stop) {
  const int begin = quarter * CHUNK / 4;
#pragma unroll 1
  for (int index = begin; index < min(begin + CHUNK / 4, stop); index += Left::GROUP) {
    add_group<Left, Right>(total, left, right, place, index);
  }
}

// Multiply two operands whose contracted numbers are `contracted`. `left_source(first)` and `right_source(first)` say
// what is copied of them from a contracted number on, `band_of(first)` what takes part; the counters are those of the
// bytes of both operands.
template <bool MASKED, class Left, class Right, class LeftSource, class RightSource, class BandOf>
DEVICE void multiply(
    Total& total, int contracted, const LeftSource& left_source, const RightSource& right_source,
    const BandOf& band_of, unsigned long long* left_counter, unsigned long long* right_counter) {
  const Place place;
  float* const shared = shared_memory();
  const auto buffer_of = [&](int first) { return shared + first / CHUNK % 2 * BUFFER_FLOATS; };
  Left left;
  Right right;
  // load
  left.template start<0>(shared, left_source(0), left_counter);
  right.template start<0>(shared + Left::FLOATS, right_source(0), right_counter);
  left.template finish<0>(shared, left_source(0));
  right.template finish<0>(shared + Left::FLOATS, right_source(0));
  left.template start<1>(shared, left_source(0), left_counter);
  right.template start<1>(shared + Left::FLOATS, right_source(0), right_counter);
  left.template finish<1>(shared, left_source(0));
  right.template finish<1>(shared + Left::FLOATS, right_source(0));
  commit_copies();
#pragma unroll 1
  for (int first = 0; first < contracted; first += CHUNK) {
    const int following = first + CHUNK;
    const bool more = following < contracted;
    // Chunks that a mask or the end of the operands cuts are multiplied at the end, number by number.
    const int stop = !MASKED ? contracted - first : band_of(first).full ? CHUNK : 0;
    const float* const here = buffer_of(first);
    float* const next = buffer_of(following);
    wait_for_copies<0>();
    __syncthreads();  // this chunk is there, and the one before has been read
    // load and compute
    if (more) left.template start<0>(next, left_source(following), left_counter);
    multiply_quarter<Left, Right>(total, here, here + Left::FLOATS, place, 0, stop);
    if (more) {
      left.template finish<0>(next, left_source(following));
      left.template start<1>(next, left_source(following), left_counter);
    }
    multiply_quarter<Left, Right>(total, here, here + Left::FLOATS, place, 1, stop);
    if (more) {
      left.template finish<1>(next, left_source(following));
      right.template start<0>(next + Left::FLOATS, right_source(following), right_counter);
    }
    multiply_quarter<Left, Right>(total, here, here + Left::FLOATS, place, 2, stop);
    if (more) {
      right.template finish<0>(next + Left::FLOATS, right_source(following));
      right.template start<1>(next + Left::FLOATS, right_source(following), right_counter);
    }
    multiply_quarter<Left, Right>(total, here, here + Left::FLOATS, place, 3, stop);
    if (more) right.template finish<1>(next + Left::FLOATS, right_source(following));
    commit_copies();
    if (MASKED && stop == 0) {
      const Band band = band_of(first);
      if (!band.empty) add_visible<Left, Right>(total, here, here + Left::FLOATS, place, band);
    }
  }
  wait_for_copies<0>();
}

// Multiply by the factor, and store the tile, or add it to what is there. `result` is its first element; the matrix has
// `rows` and `columns` from there on.
template <bool ADDS, class Result>
DEVICE void finish_tile(
    const Total& total, Result* result, long long row_stride, int rows, int columns, float factor,
    unsigned long long* counts) {
  const Place place;
  ByteCounter counter(counts);
#pragma unroll
  for (int i = 0; i < THREAD_ROWS; i++) {
    const int row = position_of<RESULT_ROWS>(place.down, i);
    if (row >= rows) continue;
#pragma unroll
    for (int j = 0; j < THREAD_COLUMNS; j += 4) {
      const int column = position_of<RESULT_COLUMNS>(place.across, j);
      Result* const to = result + row * row_stride + column;
      float values[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
#ifdef SCALED
        values[k] = __fmul_rn(total[i][j + k], factor);
#else
        values[k] = total[i][j + k];
#endif
      }
      if constexpr (ADDS) {
        if (column < columns) add_vector(to, values, counter);
      } else {
        store_columns(to, values, columns - column, counter);
      }
    }
  }
  counter.flush();
}
