// result = factor * weights operand, a row for every query: the output of standard attention, P V, and dQ = dS K
// (simattn/algorithms/standard.py, rows_kernel). A thread block for every tile of the result; hidden keys take no part,
// but the tiles of weights that they fill are read all the same.
//
// Macros: those of products.cuh, and
//   STORAGE        float32, float16 or bfloat16
//   COUNT_TRAFFIC  if defined, bytes moved are added to `counters`
// operand.columns are the columns of the result.
#include "products.cuh"

using Stored = STORAGE;

struct StandardRowsParameters {
  const Stored* weights;
  const Stored* operand_rows;  // of the KV heads
  Stored* result;
  unsigned long long* counters;
  Strides weights_strides, operand_rows_strides, result_strides;
  Problem problem;
  Operand operand;
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) standard_rows(const StandardRowsParameters parameters) {
  const Problem& problem = parameters.problem;
  // Blocks of the last queries come first: under a causal mask they take longest.
  const int matrices = problem.batch * problem.heads;
  const int column_tiles = (parameters.operand.columns + RESULT_COLUMNS - 1) / RESULT_COLUMNS;
  const int matrix = blockIdx.x % matrices, tile = (gridDim.x - 1 - blockIdx.x) / matrices;
  const int batch = matrix / problem.heads, head = matrix % problem.heads;
  const int query = tile / column_tiles * RESULT_ROWS, column = tile % column_tiles * RESULT_COLUMNS;
  const int query_stop = min(query + RESULT_ROWS, problem.q_len), columns = parameters.operand.columns - column;

  using Left = OperandChunk<Stored, RESULT_ROWS, true>;
  using Right = OperandChunk<Stored, RESULT_COLUMNS, false>;
  const Stored* const weights = row_of(parameters.weights, parameters.weights_strides, batch, head, query);
  const Stored* const operand_rows =
      row_of(parameters.operand_rows, parameters.operand_rows_strides, batch, head / problem.group_size, 0) + column;
  const auto left_source = [&](int key) {
    return Source<Stored>{weights + key, parameters.weights_strides.row, query_stop - query, problem.kv_len - key};
  };
  const auto right_source = [&](int key) {
    const long long stride = parameters.operand_rows_strides.row;
    return Source<Stored>{operand_rows + key * stride, stride, problem.kv_len - key, columns};
  };
  const int shift = problem.kv_len - problem.q_len;
  const auto band_of = [&](int key) {
    return Band(
        shift - problem.window_left, shift + problem.window_right, query, query_stop, key, problem.kv_len);
  };
  Total total;
  clear(total);
  multiply<true, Left, Right>(
      total, problem.kv_len, left_source, right_source, band_of, parameters.counters,
      parameters.counters + 1);
  // finish
  finish_tile<false>(
      total, row_of(parameters.result, parameters.result_strides, batch, head, query) + column,
      parameters.result_strides.row, query_stop - query, columns, parameters.operand.factor, parameters.counters + 2);
}
