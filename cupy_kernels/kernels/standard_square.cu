// result = factor * left right^T, a number for every query and key: the scores of standard attention, in units of log2,
// and the gradients of its probabilities (simattn/algorithms/standard.py, square_kernel). A thread block for every tile
// of the result, masked ones too.
//
// Macros: those of products.cuh, and
//   STORAGE        float32, float16 or bfloat16
//   COUNT_TRAFFIC  if defined, bytes moved are added to `counters`
// operand.columns is the depth of the product.
#include "products.cuh"

using Stored = STORAGE;

struct StandardSquareParameters {
  const Stored* left;   // of the query heads
  const Stored* right;  // of the KV heads
  Stored* result;
  unsigned long long* counters;
  Strides left_strides, right_strides, result_strides;
  Problem problem;
  Operand operand;
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    standard_square(const StandardSquareParameters parameters) {
  const Problem& problem = parameters.problem;
  const int matrices = problem.batch * problem.heads;
  const int key_tiles = (problem.kv_len + RESULT_COLUMNS - 1) / RESULT_COLUMNS;
  const int matrix = blockIdx.x % matrices, tile = blockIdx.x / matrices;
  const int batch = matrix / problem.heads, head = matrix % problem.heads;
  const int query = tile / key_tiles * RESULT_ROWS, key = tile % key_tiles * RESULT_COLUMNS;

  using Left = OperandChunk<Stored, RESULT_ROWS, true>;
  using Right = OperandChunk<Stored, RESULT_COLUMNS, true>;
  const Stored* const left = row_of(parameters.left, parameters.left_strides, batch, head, query);
  const Stored* const right =
      row_of(parameters.right, parameters.right_strides, batch, head / problem.group_size, key);
  const int depth = parameters.operand.columns;
  const auto left_source = [&](int first) {
    return Source<Stored>{left + first, parameters.left_strides.row, problem.q_len - query, depth - first};
  };
  const auto right_source = [&](int first) {
    return Source<Stored>{right + first, parameters.right_strides.row, problem.kv_len - key, depth - first};
  };
  const auto band_of = [&](int first) { return Band(0, 0, 0, 1, first, depth); };
  Total total;
  clear(total);
  multiply<false, Left, Right>(
      total, depth, left_source, right_source, band_of, parameters.counters,
      parameters.counters + 1);
  // finish
  finish_tile<false>(
      total, row_of(parameters.result, parameters.result_strides, batch, head, query) + key,
      parameters.result_strides.row, problem.q_len - query, problem.kv_len - key, parameters.operand.factor,
      parameters.counters + 2);
}
