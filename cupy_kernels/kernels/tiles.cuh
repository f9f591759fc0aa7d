// Tiles: copies between global memory, in a storage format, and shared memory or registers, in float32. Every access
// to global memory is here, and names the counter of its bytes.
#pragma once

#include "arithmetic.cuh"
#include "counters.cuh"
#include "problem.cuh"

DEVICE float4 load_4(const float* from) { return *reinterpret_cast<const float4*>(from); }

DEVICE void store_4(float* to, float4 values) { *reinterpret_cast<float4*>(to) = values; }

template <int WIDTH>
DEVICE void load_vector(float (&values)[WIDTH], const float* from) {
  static_assert(WIDTH == 2 || WIDTH == 4, "a vector has 2 or 4 numbers");
  if constexpr (WIDTH == 4) {
    const float4 loaded = load_4(from);
    values[0] = loaded.x, values[1] = loaded.y, values[2] = loaded.z, values[3] = loaded.w;
  } else {
    const float2 loaded = *reinterpret_cast<const float2*>(from);
    values[0] = loaded.x, values[1] = loaded.y;
  }
}

// Copy four columns to shared memory, asynchronously where no conversion is needed.
DEVICE void start_load_4(float* tile, int offset, const float32* from, ByteCounter& counter) {
  counter.add(16);
  start_copy_of_16_bytes(tile, offset, from);
}

template <class Stored>
DEVICE void start_load_4(float* tile, int offset, const Stored* from, ByteCounter& counter) {
  counter.add(8);
  const Two words = load_8_bytes(from);
  const float2 low = unpacked<Stored>(words.x), high = unpacked<Stored>(words.y);
  store_4(tile + offset, make_float4(low.x, low.y, high.x, high.y));
}

// Where a column of a row stands in a tile whose vectors of four columns change places, in turns of SWIZZLE every four
// rows, so that lanes that read vectors of rows four apart meet no bank twice.
template <int SWIZZLE>
DEVICE int swizzled(int row, int column) {
  return column ^ (row & 4 * (SWIZZLE - 1));
}

// How the threads of a block, or of each of its warps, share a tile that is copied: up to 8 vectors of four columns
// across, so that they read 128 adjacent bytes of float32, and rows down. Where SWIZZLE is more than 1, vectors change
// places as `swizzled` says.
template <int TILE_ROWS, int TILE_COLUMNS, int STRIDE, int THREADS, int SWIZZLE = 1>
struct TileCopy {
  static constexpr int ACROSS = TILE_COLUMNS / 4 < 8 ? TILE_COLUMNS / 4 : 8;
  static constexpr int DOWN = THREADS / ACROSS;
  static constexpr int VECTORS = TILE_COLUMNS / (4 * ACROSS);  // of a thread in each of its rows
  static constexpr int ROWS_AT_ONCE = VECTORS < 8 ? 8 / VECTORS : 1;  // under way before any is waited for
  static_assert(TILE_COLUMNS % (4 * ACROSS) == 0, "threads cover whole rows");
  static constexpr bool SPARE = TILE_ROWS % DOWN != 0;  // threads without a row in the last round

  // Copy `rows` and `columns` of a matrix to shared memory, or the whole tile if WHOLE. What lies beyond them in the
  // tile is left as it is: what is computed from it is hidden or not stored.
  template <bool WHOLE, class Stored>
  DEVICE static void start_part(
      float* tile, const Stored* matrix, long long row_stride, int rows, int columns, unsigned long long* total) {
    ByteCounter counter(total);
    const int thread = threadIdx.x % THREADS;
    const int first_row = thread / ACROSS, first_column = thread % ACROSS * 4;
    const Stored* from = matrix + first_row * row_stride + first_column;
    const int to = first_row * STRIDE + first_column;
#pragma unroll ROWS_AT_ONCE
    for (int row = 0; row < TILE_ROWS; row += DOWN, from += DOWN * row_stride) {
      if ((!SPARE || first_row + row < TILE_ROWS) && (WHOLE || first_row + row < rows)) {
        const int moved = swizzled<SWIZZLE>(first_row + row, first_column) - first_column;
#pragma unroll
        for (int column = 0; column < TILE_COLUMNS; column += 4 * ACROSS) {
          if (WHOLE || first_column + column < columns) {
            start_load_4(tile, to + row * STRIDE + column + moved, from + column, counter);
          }
        }
      }
    }
    counter.flush();
  }

  template <class Stored>
  DEVICE static void start(
      float* tile, const Stored* matrix, long long row_stride, int rows, int columns, unsigned long long* total) {
    if (rows >= TILE_ROWS && columns == TILE_COLUMNS) {
      start_part<true>(tile, matrix, row_stride, rows, columns, total);
    } else {
      start_part<false>(tile, matrix, row_stride, rows, columns, total);
    }
  }
};

template <int WIDTH>
DEVICE void store_vector(float32* to, const float (&values)[WIDTH], ByteCounter& counter) {
  counter.add(4 * WIDTH);
  unsigned words[WIDTH];
#pragma unroll
  for (int i = 0; i < WIDTH; i++) words[i] = bits_of_float(values[i]);
  if constexpr (WIDTH == 4) {
    store_16_bytes(to, {words[0], words[1], words[2], words[3]});
  } else {
    store_8_bytes(to, {words[0], words[1]});
  }
}

// Round to the storage format, to nearest even, and store.
template <int WIDTH, class Stored>
DEVICE void store_vector(Stored* to, const float (&values)[WIDTH], ByteCounter& counter) {
  counter.add(2 * WIDTH);
  const unsigned low = packed<Stored>(values[0], values[1]);
  if constexpr (WIDTH == 4) {
    store_8_bytes(to, {low, packed<Stored>(values[2], values[3])});
  } else {
    store_4_bytes(to, low);
  }
}

DEVICE void store_number(float* to, float value, ByteCounter& counter) {
  counter.add(4);
  store_4_bytes(to, bits_of_float(value));
}

DEVICE float load_number(const float* from, ByteCounter& counter) {
  counter.add(4);
  return float_of_bits(load_4_bytes(from));
}

// Load adjacent columns into registers.
DEVICE void fetch_vector(float (&values)[4], const float32* from, ByteCounter& counter) {
  counter.add(16);
  const Four words = load_16_bytes(from);
  values[0] = float_of_bits(words.x), values[1] = float_of_bits(words.y);
  values[2] = float_of_bits(words.z), values[3] = float_of_bits(words.w);
}

template <class Stored>
DEVICE void fetch_vector(float (&values)[4], const Stored* from, ByteCounter& counter) {
  counter.add(8);
  const Two words = load_8_bytes(from);
  const float2 low = unpacked<Stored>(words.x), high = unpacked<Stored>(words.y);
  values[0] = low.x, values[1] = low.y, values[2] = high.x, values[3] = high.y;
}

// The same for one number of any format.
template <class Stored>
DEVICE float load_number(const Stored* from, ByteCounter& counter) {
  counter.add(2);
  return to_float(Stored{load_2_bytes(from)});
}

template <class Stored>
DEVICE void store_number(Stored* to, float value, ByteCounter& counter) {
  counter.add(2);
  store_2_bytes(to, rounded<Stored>(value).bits);
}

// Load adjacent columns of what this block has written into registers.
template <int WIDTH>
DEVICE void reload_vector(float (&values)[WIDTH], const float32* from, ByteCounter& counter) {
  counter.add(4 * WIDTH);
  if constexpr (WIDTH == 4) {
    const Four words = reload_16_bytes(from);
    values[0] = float_of_bits(words.x), values[1] = float_of_bits(words.y);
    values[2] = float_of_bits(words.z), values[3] = float_of_bits(words.w);
  } else {
    const Two words = reload_8_bytes(from);
    values[0] = float_of_bits(words.x), values[1] = float_of_bits(words.y);
  }
}

template <int WIDTH, class Stored>
DEVICE void reload_vector(float (&values)[WIDTH], const Stored* from, ByteCounter& counter) {
  counter.add(2 * WIDTH);
  Two words = {};
  if constexpr (WIDTH == 4) {
    words = reload_8_bytes(from);
    const float2 high = unpacked<Stored>(words.y);
    values[2] = high.x, values[3] = high.y;
  } else {
    words.x = reload_4_bytes(from);
  }
  const float2 low = unpacked<Stored>(words.x);
  values[0] = low.x, values[1] = low.y;
}

// A number that several lanes load together from what this block has written; one of them counts it.
DEVICE float reload_number(const float* from, bool counts, ByteCounter& counter) {
  if (counts) counter.add(4);
  return float_of_bits(reload_4_bytes(from));
}

DEVICE void add_vector(float* to, const float (&values)[4], ByteCounter& counter) {
  counter.add(16);
  add_4_floats(to, make_float4(values[0], values[1], values[2], values[3]));
}

// Load or store those of four adjacent columns of which a row has `columns` left; what is not loaded is `rest`.
template <class Stored>
DEVICE void fetch_columns(float (&values)[4], const Stored* from, int columns, float rest, ByteCounter& counter) {
  if (columns >= 4) return fetch_vector(values, from, counter);
#pragma unroll
  for (int i = 0; i < 4; i++) values[i] = i < columns ? load_number(from + i, counter) : rest;
}

template <class Stored>
DEVICE void store_columns(Stored* to, const float (&values)[4], int columns, ByteCounter& counter) {
  if (columns >= 4) return store_vector(to, values, counter);
#pragma unroll
  for (int i = 0; i < 3; i++) {
    if (i < columns) store_number(to + i, values[i], counter);
  }
}
