// result = factor * weights^T operand, a row for every key: dV = P^T dO and dK = dS^T Q of standard attention
// (simattn/algorithms/standard.py, keys_kernel). A thread block for every tile of the result; hidden queries take no
// part, but the tiles of weights that they fill are read all the same. The query heads of a KV head follow one another
// in one chain.
//
// Macros: those of products.cuh, and
//   STORAGE        float32, float16 or bfloat16
//   GRID_HEADS     0: a thread block serves a KV head, all its query heads in turn; 1: one query head, which has a
//                  result of its own; 2: one query head, and adds to its KV head's sum in float32
//   COUNT_TRAFFIC  if defined, bytes moved are added to `counters`
// operand.columns are the columns of the result.
#include "products.cuh"

using Stored = STORAGE;

#if GRID_HEADS == 2
using Result = float;
#else
using Result = Stored;
#endif

struct StandardKeysParameters {
  const Stored* weights;
  const Stored* operand_rows;  // of the query heads
  Result* result;
  unsigned long long* counters;
  Strides weights_strides, operand_rows_strides, result_strides;
  Problem problem;
  Operand operand;
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) standard_keys(const StandardKeysParameters parameters) {
  const Problem& problem = parameters.problem;
  const int group_size = GRID_HEADS == 0 ? problem.group_size : 1;  // query heads of the block
  const int heads = problem.heads / group_size;
  // Blocks of the first keys come first: under a causal mask they take longest.
  const int matrices = problem.batch * heads;
  const int column_tiles = (parameters.operand.columns + RESULT_COLUMNS - 1) / RESULT_COLUMNS;
  const int matrix = blockIdx.x % matrices, tile = blockIdx.x / matrices;
  const int batch = matrix / heads, head = matrix % heads;
  const int key = tile / column_tiles * RESULT_ROWS, column = tile % column_tiles * RESULT_COLUMNS;
  const int key_stop = min(key + RESULT_ROWS, problem.kv_len), columns = parameters.operand.columns - column;

  using Left = OperandChunk<Stored, RESULT_ROWS, false>;
  using Right = OperandChunk<Stored, RESULT_COLUMNS, false>;
  const int shift = problem.kv_len - problem.q_len;
  const auto band_of = [&](int query) {
    return Band(
        -shift - problem.window_right, problem.window_left - shift, key, key_stop, query, problem.q_len);
  };
  const Stored* weights = row_of(parameters.weights, parameters.weights_strides, batch, head * group_size, 0) + key;
  const Stored* operand_rows =
      row_of(parameters.operand_rows, parameters.operand_rows_strides, batch, head * group_size, 0) + column;
  const auto left_source = [&](int query) {
    const long long stride = parameters.weights_strides.row;
    return Source<Stored>{weights + query * stride, stride, problem.q_len - query, problem.kv_len - key};
  };
  const auto right_source = [&](int query) {
    const long long stride = parameters.operand_rows_strides.row;
    return Source<Stored>{operand_rows + query * stride, stride, problem.q_len - query, columns};
  };
  Total total;
  clear(total);
#pragma unroll 1
  for (int heads_left = group_size; heads_left > 0; heads_left--) {
    multiply<true, Left, Right>(
        total, problem.q_len, left_source, right_source, band_of, parameters.counters, parameters.counters + 1);
    weights += parameters.weights_strides.head, operand_rows += parameters.operand_rows_strides.head;
    __syncthreads();  // the last chunk has been read
  }
  // finish
  const int result_head = GRID_HEADS == 2 ? head / problem.group_size : head;
  finish_tile<GRID_HEADS == 2>(
      total, row_of(parameters.result, parameters.result_strides, batch, result_head, key) + column,
      parameters.result_strides.row, key_stop - key, columns, parameters.operand.factor, parameters.counters + 2);
}
