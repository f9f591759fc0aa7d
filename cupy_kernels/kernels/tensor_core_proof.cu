// Products of 64 x DEPTH and DEPTH x COLUMNS with everything given, sums included: what
// simattn/arithmetic/tensor_cores.py models. A thread block of four warps computes one product.
//
// Macros:
//   STORAGE            float16 or bfloat16
//   COLUMNS            columns of a product
//   BY_WARP            whether a warp's products are proven, 16 x 16 by 16 x 8 (mma.sync), or a warpgroup's (wgmma)
//   LEFT_IN_REGISTERS  whether the left matrix is in registers; a warp's always is
//   RIGHT_TRANSPOSED   whether the right matrix lies with its rows along the contracted axis; a warp's never does
#if BY_WARP
#include "counters.cuh"
#include "tensor_cores.cuh"
#else
#include "hopper.cuh"
#endif

using Stored = STORAGE;

constexpr int ROWS = 64;
constexpr int DEPTH = 128;
constexpr int STEP = 16;
constexpr int STEPS = DEPTH / STEP;
constexpr int THREADS = 128;
constexpr int SUMS = COLUMNS / 2;  // of a thread

// Product b is that of left matrix b / matrices and right matrix b % matrices, added to the sums of number
// (b / matrices + b % matrices) % matrices, or to none.
struct ProofParameters {
  const Stored* left;
  const Stored* right;
  const float* before;
  float* after;
  int matrices, adds;
};

// Where a thread's numbers are: rows `row` and 8 further on, columns 2 * quad and the next of every eight.
struct Place {
  int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  int quad = threadIdx.x % 4;
};

// Two neighbours of a matrix whose rows have DEPTH columns.
DEVICE unsigned pair_at(const Stored* matrix, int row, int column) {
  return load_4_bytes(matrix + row * DEPTH + column);
}

DEVICE void load_left(unsigned (&left)[4], const Stored* matrix, const Place& place, int step) {
#pragma unroll
  for (int part = 0; part < 4; part++) {
    left[part] = pair_at(matrix, place.row + part % 2 * 8, step * STEP + part / 2 * 8 + 2 * place.quad);
  }
}

#if BY_WARP

constexpr int SHARED_BYTES = 0;

static_assert(SHARED_BYTES == 0 && !RIGHT_TRANSPOSED && LEFT_IN_REGISTERS, "matrices come from memory");

DEVICE void multiply(float (&sums)[SUMS], const Stored* left, const Stored* right, const Place& place, bool adds) {
  for (int step = 0; step < STEPS; step++) {
    unsigned words[4];
    load_left(words, left, place, step);
#pragma unroll
    for (int column = 0; column < COLUMNS; column += 8) {
      const int row = column + threadIdx.x % 32 / 4, first = step * STEP + 2 * place.quad;
      float part[4];
#pragma unroll
      for (int i = 0; i < 4; i++) part[i] = adds || step > 0 ? sums[column / 2 + i] : 0.0f;
      multiply_add<Stored>(part, words, pair_at(right, row, first), pair_at(right, row, first + 8));
#pragma unroll
      for (int i = 0; i < 4; i++) sums[column / 2 + i] = part[i];
    }
  }
}

#else

constexpr int LEFT_SLAB = ROWS * SLAB_ROW_BYTES;
constexpr int LEFT_BYTES = DEPTH / SLAB_COLUMNS * LEFT_SLAB;
constexpr int RIGHT_ROWS = RIGHT_TRANSPOSED ? DEPTH : COLUMNS, RIGHT_COLUMNS = RIGHT_TRANSPOSED ? COLUMNS : DEPTH;
constexpr int RIGHT_SLAB = RIGHT_ROWS * SLAB_ROW_BYTES;
constexpr int SHARED_BYTES = LEFT_BYTES + (RIGHT_COLUMNS + SLAB_COLUMNS - 1) / SLAB_COLUMNS * RIGHT_SLAB;

static_assert(SHARED_BYTES <= 232448, "shared memory of a multiprocessor");

// Copy a matrix to slabs in shared memory, its chunks of 16 bytes in swizzled places.
template <int COPIED_ROWS, int COPIED_COLUMNS>
DEVICE void place_matrix(char* shared, const Stored* matrix) {
  constexpr int CHUNKS = COPIED_COLUMNS / 8;
  for (int index = threadIdx.x; index < COPIED_ROWS * CHUNKS; index += THREADS) {
    const int row = index / CHUNKS, chunk = index % CHUNKS;
    const int slab = chunk / 8, swizzled = chunk % 8 ^ row % 8;
    char* to = shared + slab * COPIED_ROWS * SLAB_ROW_BYTES + row * SLAB_ROW_BYTES + 16 * swizzled;
    *reinterpret_cast<Four*>(to) = load_16_bytes(matrix + row * COPIED_COLUMNS + 8 * chunk);
  }
}

DEVICE void multiply(float (&sums)[SUMS], const Stored* left, const Stored* right, const Place& place, bool adds) {
  char* shared = reinterpret_cast<char*>(shared_memory());
  place_matrix<ROWS, DEPTH>(shared, left);
  place_matrix<RIGHT_ROWS, RIGHT_COLUMNS>(shared + LEFT_BYTES, right);
  publish_to_copies();
  __syncthreads();
  unsigned words[STEPS][4];
#pragma unroll
  for (int step = 0; step < STEPS; step++) load_left(words[step], left, place, step);
  const unsigned long long in_left = describe_matrix(shared_address(shared), 0);
  const unsigned long long in_right = describe_matrix(shared_address(shared) + LEFT_BYTES, RIGHT_SLAB);
  fence_products();
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const int slab = step * STEP / SLAB_COLUMNS, within = step * STEP % SLAB_COLUMNS * static_cast<int>(sizeof(Stored));
    const unsigned long long right_step =
        moved_on(in_right, RIGHT_TRANSPOSED ? step * STEP * SLAB_ROW_BYTES : slab * RIGHT_SLAB + within);
    if (LEFT_IN_REGISTERS) {
      Product<Stored, COLUMNS, RIGHT_TRANSPOSED>::start(sums, words[step], right_step, adds || step > 0);
    } else {
      const unsigned long long left_step = moved_on(in_left, slab * LEFT_SLAB + within);
      Product<Stored, COLUMNS, RIGHT_TRANSPOSED>::start(sums, left_step, right_step, adds || step > 0);
    }
  }
  commit_products();
  wait_for_products<0>();
  settle(sums);
}

#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) prove_products(ProofParameters parameters) {
  const Place place;
  const int first = blockIdx.x / parameters.matrices, second = blockIdx.x % parameters.matrices;
  const float* before = parameters.before + (first + second) % parameters.matrices * ROWS * COLUMNS;
  float* after = parameters.after + static_cast<long long>(blockIdx.x) * ROWS * COLUMNS;
  const auto offset = [&](int i) {
    return (place.row + i / 2 % 2 * 8) * COLUMNS + i / 4 * 8 + 2 * place.quad + i % 2;
  };
  float sums[SUMS];
#pragma unroll
  for (int i = 0; i < SUMS; i++) sums[i] = float_of_bits(load_4_bytes(before + offset(i)));
  multiply(
      sums, parameters.left + first * ROWS * DEPTH, parameters.right + second * DEPTH * COLUMNS, place,
      parameters.adds);
#pragma unroll
  for (int i = 0; i < SUMS; i++) store_4_bytes(after + offset(i), bits_of_float(sums[i]));
}
