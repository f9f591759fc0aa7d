// The small kernels before and after the main ones (simattn/algorithms/kernels.py): one number or one row at a time.
//
// A thread block takes BLOCK_ROWS rows of one matrix, or BLOCK_STATISTICS where a row is one number; the matrices are
// batch * operand.heads. Grid: their number, fastest, times the blocks of a matrix.
//
// Macros:
//   STORAGE        float32, float16 or bfloat16
//   COUNT_TRAFFIC  if defined, bytes moved are added to `counters`
#include "rows.cuh"
#include "tiles.cuh"

using Stored = STORAGE;

constexpr int THREADS = 256;
constexpr int SHARED_BYTES = 0;
constexpr int BLOCKS = 2;  // of a multiprocessor at once, at least
constexpr int BLOCK_ROWS = 64;
constexpr int BLOCK_STATISTICS = 1024;

static_assert(SHARED_BYTES == 0, "everything stays in registers");

struct FillParameters {  // target = operand.factor
  Stored* target;
  unsigned long long* counters;
  Strides target_strides;
  Problem problem;
  Operand operand;
};

struct ConvertParameters {  // target = source, in another format
  const float* source;
  Stored* target;
  unsigned long long* counters;
  Strides source_strides, target_strides;
  Problem problem;
  Operand operand;
};

struct RowDotsParameters {  // target = sum of a * b along each row
  const Stored* a;
  const Stored* b;
  float* target;
  unsigned long long* counters;
  Strides a_strides, b_strides, target_strides;
  Problem problem;
  Operand operand;
};

struct SumHeadsParameters {  // target = sum of the query heads of each KV head, of which there are operand.heads
  const Stored* expanded;
  Stored* target;
  unsigned long long* counters;
  Strides expanded_strides, target_strides;
  Problem problem;
  Operand operand;
};

struct LogSumExpParameters {  // lse = natural logarithm of row_sum * 2^row_max
  const float* row_max;
  const float* row_sum;
  float* lse;
  unsigned long long* counters;
  Strides row_max_strides, row_sum_strides, lse_strides;
  Problem problem;
  Operand operand;
};

// The matrix of a thread block and its first row.
struct Position {
  int batch, head, row;

  DEVICE Position(const Problem& problem, const Operand& operand, int block_rows) {
    const int matrices = problem.batch * operand.heads, matrix = blockIdx.x % matrices;
    batch = matrix / operand.heads, head = matrix % operand.heads, row = blockIdx.x / matrices * block_rows;
  }
};

// Call `take(row, column)` for every fourth column of the block's rows, threads across the columns first.
template <class Take>
DEVICE void for_vectors(const Position& position, const Operand& operand, const Take& take) {
  const unsigned across = operand.columns / 4;
  const unsigned vectors = min(BLOCK_ROWS, operand.rows - position.row) * across;
#pragma unroll 4
  for (unsigned vector = threadIdx.x; vector < vectors; vector += THREADS) {
    const unsigned row = vector / across;
    take(position.row + static_cast<int>(row), static_cast<int>(vector - row * across) * 4);
  }
}

// Call `take(row)` for the block's rows of one number.
template <class Take>
DEVICE void for_statistics(const Position& position, const Operand& operand, const Take& take) {
  const int stop = min(BLOCK_STATISTICS, operand.rows - position.row);
#pragma unroll 4
  for (int row = threadIdx.x; row < stop; row += THREADS) take(position.row + row);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fill(const FillParameters parameters) {
  const Operand& operand = parameters.operand;
  const bool statistic = operand.columns == 1;
  const Position position(parameters.problem, operand, statistic ? BLOCK_STATISTICS : BLOCK_ROWS);
  ByteCounter counter(parameters.counters);
  Stored* const target = row_of(parameters.target, parameters.target_strides, position.batch, position.head, 0);
  const long long stride = parameters.target_strides.row;
  const float values[4] = {operand.factor, operand.factor, operand.factor, operand.factor};
  // finish
  if (statistic) {
    for_statistics(position, operand, [&](int row) { store_number(target + row * stride, values[0], counter); });
  } else {
    for_vectors(position, operand, [&](int row, int column) {
      store_vector(target + row * stride + column, values, counter);
    });
  }
  counter.flush();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) convert(const ConvertParameters parameters) {
  const Position position(parameters.problem, parameters.operand, BLOCK_ROWS);
  ByteCounter source_counter(parameters.counters), target_counter(parameters.counters + 1);
  const float* const source = row_of(parameters.source, parameters.source_strides, position.batch, position.head, 0);
  Stored* const target = row_of(parameters.target, parameters.target_strides, position.batch, position.head, 0);
  for_vectors(position, parameters.operand, [&](int row, int column) {
    // load
    float values[4];
    fetch_vector(values, source + row * parameters.source_strides.row + column, source_counter);
    // finish
    store_vector(target + row * parameters.target_strides.row + column, values, target_counter);
  });
  source_counter.flush();
  target_counter.flush();
}

// Four threads share a row, each with 4 of the 16 partial sums.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) row_dots(const RowDotsParameters parameters) {
  const Operand& operand = parameters.operand;
  const Position position(parameters.problem, operand, BLOCK_ROWS);
  const int row = position.row + static_cast<int>(threadIdx.x / 4), first_column = threadIdx.x % 4 * 4;
  ByteCounter a_counter(parameters.counters), b_counter(parameters.counters + 1);
  ByteCounter target_counter(parameters.counters + 2);
  float sums[4] = {};
  if (row < operand.rows) {
    const Stored* const a = row_of(parameters.a, parameters.a_strides, position.batch, position.head, row);
    const Stored* const b = row_of(parameters.b, parameters.b_strides, position.batch, position.head, row);
#pragma unroll 4
    for (int column = first_column; column < operand.columns; column += 16) {
      // load
      float left[4], right[4];
      fetch_vector(left, a + column, a_counter);
      fetch_vector(right, b + column, b_counter);
      // compute
#pragma unroll
      for (int i = 0; i < 4; i++) sums[i] = __fmaf_rn(left[i], right[i], sums[i]);
    }
  }
  const float sum = sum_of_partial_sums(sums);
  // finish
  if (row < operand.rows && first_column == 0) {
    store_number(
        row_of(parameters.target, parameters.target_strides, position.batch, position.head, row), sum, target_counter);
  }
  a_counter.flush();
  b_counter.flush();
  target_counter.flush();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) sum_heads(const SumHeadsParameters parameters) {
  const Position position(parameters.problem, parameters.operand, BLOCK_ROWS);
  const int group_size = parameters.problem.group_size;
  ByteCounter expanded_counter(parameters.counters), target_counter(parameters.counters + 1);
  const Stored* const expanded =
      row_of(parameters.expanded, parameters.expanded_strides, position.batch, position.head * group_size, 0);
  Stored* const target = row_of(parameters.target, parameters.target_strides, position.batch, position.head, 0);
  for_vectors(position, parameters.operand, [&](int row, int column) {
    float total[4] = {};
    const Stored* from = expanded + row * parameters.expanded_strides.row + column;
#pragma unroll 4
    for (int head = 0; head < group_size; head++, from += parameters.expanded_strides.head) {
      // load
      float values[4];
      fetch_vector(values, from, expanded_counter);
      // compute
#pragma unroll
      for (int i = 0; i < 4; i++) total[i] = __fadd_rn(total[i], values[i]);
    }
    // finish
    store_vector(target + row * parameters.target_strides.row + column, total, target_counter);
  });
  expanded_counter.flush();
  target_counter.flush();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) log_sum_exp(const LogSumExpParameters parameters) {
  const Position position(parameters.problem, parameters.operand, BLOCK_STATISTICS);
  const int batch = position.batch, head = position.head;
  ByteCounter max_counter(parameters.counters), sum_counter(parameters.counters + 1);
  ByteCounter lse_counter(parameters.counters + 2);
  for_statistics(position, parameters.operand, [&](int row) {
    // load
    const float row_max =
        load_number(row_of(parameters.row_max, parameters.row_max_strides, batch, head, row), max_counter);
    const float row_sum =
        load_number(row_of(parameters.row_sum, parameters.row_sum_strides, batch, head, row), sum_counter);
    // finish
    store_number(
        row_of(parameters.lse, parameters.lse_strides, batch, head, row), log_sum_exp_of(row_max, row_sum),
        lse_counter);
  });
  max_counter.flush();
  sum_counter.flush();
  lse_counter.flush();
}
