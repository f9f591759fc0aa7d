// What every kernel is told. A kernel's parameter struct holds, in this order: the addresses of its arrays, the address
// of its counters, the strides of its arrays in the same order, a Problem and an Operand. `parameters.py` writes it.
//
// There is a counter for each access that a kernel makes to an array: arrays in their order, reading before writing
// before adding up.
#pragma once

#include "device.cuh"

// Elements from one row to the next along each axis; the columns of a row are adjacent. Arrays of (batch, length,
// heads, columns) have their rows apart by `row`; those of one number a row, (batch, heads, q_len), by 1; scores and
// their like, (batch, heads, q_len, kv_len), by at least kv_len, a multiple of 8.
struct Strides {
  long long batch, row, head;
};

struct Problem {
  int batch, heads;
  int group_size;                 // query heads of a KV head
  int q_len, kv_len;              // at most 2^29
  int head_dim, value_dim;        // multiples of 8
  int window_left, window_right;  // keys seen on either side; no limit is 2^30, causal is 0 on the right
  float scale, scale_log2;        // scale * log2(e)
};

// What a kernel that serves several arrays is told about the one at hand.
struct Operand {
  int rows, columns, heads;
  float factor;
};

// First element of a row.
template <class Element>
DEVICE Element* row_of(Element* array, const Strides& strides, int batch, int head, int row) {
  return array + batch * strides.batch + head * strides.head + row * strides.row;
}
