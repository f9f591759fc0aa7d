// Tiles of 16-bit matrices in shared memory, for tensor cores: their layout, and copies between them and global memory.
// Every access to global memory is here or in tiles.cuh, and names the counter of its bytes.
#pragma once

#include "counters.cuh"
#include "tensor_cores.cuh"

// A tile in shared memory, in chunks of 16 bytes. The chunks of a row change places within groups, so that eight rows'
// chunks of the same columns, which are loaded together, meet no bank twice. It starts at a multiple of 128 bytes.
template <int TILE_ROWS, int WIDTH>
struct MatrixTile {
  static constexpr int ROWS = TILE_ROWS, CHUNKS = WIDTH / 8;
  static constexpr int ROW_BYTES = 16 * CHUNKS, BYTES = ROWS * ROW_BYTES;
  static constexpr int GROUP = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;
  static_assert(CHUNKS % GROUP == 0, "groups divide a row");

  DEVICE static unsigned offset(unsigned row, unsigned chunk) {
    return row * ROW_BYTES + 16 * (chunk ^ row / (8 / GROUP) % GROUP);
  }

  // Address of the chunk an even number of chunks to the right of the first or second of a row.
  DEVICE static unsigned right_of(unsigned address, int chunks) {
    return (address ^ 16 * (chunks % GROUP)) + 16 * (chunks - chunks % GROUP);
  }
};

// How the threads of a block share a tile that is copied: up to 8 chunks across, so that they read 128 adjacent bytes,
// and rows down.
template <class Tile, int THREADS>
struct MatrixCopy {
  static constexpr int ACROSS = Tile::GROUP, DOWN = THREADS / ACROSS;
  static constexpr bool SPARE = Tile::ROWS % DOWN != 0;  // threads without a row in the last round
  static_assert(DOWN % 8 == 0, "a thread's chunks keep their places");

  // Call something for each of the thread's chunks, with its offset in the tile, row and first column.
  template <class Use>
  DEVICE static void for_each(unsigned thread, const Use& use) {
    const unsigned row = thread / ACROSS, chunk = thread % ACROSS;
    const unsigned offset = Tile::offset(row, chunk);
#pragma unroll
    for (int down = 0; down < Tile::ROWS; down += DOWN) {
      if (!SPARE || row + down < Tile::ROWS) {
#pragma unroll
        for (int right = 0; right < Tile::CHUNKS; right += ACROSS) {
          use(offset + down * Tile::ROW_BYTES + 16 * right, row, down, 8 * chunk, 8 * right);
        }
      }
    }
  }

  // Copy a matrix of so many rows and columns to the tile, asynchronously. Beyond them the tile is 0.
  template <class Stored>
  DEVICE static void start(
      unsigned tile, const Stored* matrix, long long row_stride, int rows, int columns, unsigned long long* total) {
    ByteCounter counter(total);
    const unsigned thread = fresh_thread_index();
    const Stored* first = matrix + thread / ACROSS * row_stride + thread % ACROSS * 8;
    if (rows >= Tile::ROWS && columns == 8 * Tile::CHUNKS) {
      for_each(thread, [&](unsigned offset, int, int down, int, int right) {
        counter.add(16);
        start_copy(tile + offset, first + down * row_stride + right);
      });
    } else {
      for_each(thread, [&](unsigned offset, int row, int down, int column, int right) {
        const bool exists = row + down < rows && column + right < columns;
        if (exists) counter.add(16);
        start_copy_or_zeros(tile + offset, exists ? first + down * row_stride + right : matrix, exists);
      });
    }
    counter.flush();
  }
};
