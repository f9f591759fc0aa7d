// Hopper's asynchronous instructions (sm_90a), one function each: barriers in shared memory, the tensor memory
// accelerator (TMA), matrix products of a warpgroup (wgmma). The CPU build supplies models under the same names.
//
// Tiles in shared memory are slabs of 64 columns of 16 bits: rows of 128 bytes, whose eight 16-byte chunks change places
// by the row's number modulo 8 ("128-byte swizzle"). Slabs start at multiples of 1024 bytes.
#pragma once

#include "tensor_cores.cuh"

constexpr int SLAB_COLUMNS = 64;
constexpr int SLAB_ROW_BYTES = 128;

#ifdef CPU_BUILD
#include "cpu_hopper.h"
#else

// A barrier in shared memory that counts arrivals and bytes.
using Barrier = unsigned long long;

// How a box of an array is copied; made by the driver, passed in a __grid_constant__ parameter.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

// Barriers

DEVICE void init_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Make initialised barriers known to the TMA; a __syncthreads makes them known to the block.
DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrive, and expect bytes besides.
DEVICE void arrive_expecting(Barrier* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Wait for the end of the phase of this parity, 0 for the first.
DEVICE void wait(Barrier* barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A barrier of some of the block's warps, by number 1 to 15.

DEVICE void sync_named(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

DEVICE void arrive_named(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Copies of boxes

enum class Reuse : unsigned long long { ONCE = 0x12f0000000000000ull, OFTEN = 0x14f0000000000000ull };

DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copy the box at these coordinates (columns first) to shared memory; what lies outside the array arrives as zeros. The
// barrier is told of the whole box's bytes when they are there. One thread calls it.
DEVICE void start_box_load(
    void* shared, const TensorMap* map, Barrier* barrier, Reuse reuse, int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch),
      "l"(static_cast<unsigned long long>(reuse))
      : "memory");
}

DEVICE void start_box_load(
    void* shared, const TensorMap* map, Barrier* barrier, Reuse reuse, int column, int first, int second, int third,
    int fourth) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(first), "r"(second), "r"(third), "r"(fourth),
      "l"(static_cast<unsigned long long>(reuse))
      : "memory");
}

// Copy a box from shared memory; what lies outside the array is left out. One thread calls it, after what was stored to
// shared memory has been made known by `publish_to_copies`.
DEVICE void start_box_store(const TensorMap* map, const void* shared, int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(shared_address(shared)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

DEVICE void start_box_store(
    const TensorMap* map, const void* shared, int column, int first, int second, int third, int fourth) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
      "r"(shared_address(shared)), "r"(column), "r"(first), "r"(second), "r"(third), "r"(fourth)
      : "memory");
}

// End a group of this thread's stores.
DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Wait until at most `PENDING` groups of this thread's stores still read shared memory.
template <int PENDING>
DEVICE void wait_for_store_reads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Wait until this thread's stores are in memory.
DEVICE void wait_for_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Make this thread's stores to shared memory known to copies and products that start after a barrier.
DEVICE void publish_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers

// The calling warpgroup gives registers back, or waits for more.
template <int REGISTERS>
DEVICE void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
DEVICE void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// A number that is the same in all lanes, in a register of which the compiler knows that.
DEVICE int uniform(int number) { return __reduce_or_sync(ALL_LANES, number); }

DEVICE bool any_lane(bool condition) { return __any_sync(ALL_LANES, condition); }

// Matrices of 8 x 8 numbers of 16 bits

// Store four matrices: lane l gives the address of row l % 8 of matrix l / 8, and of each matrix its elements 2 (l % 4)
// and 2 (l % 4) + 1 of row l / 4.
DEVICE void store_matrices(void* shared, unsigned first, unsigned second, unsigned third, unsigned fourth) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)),
               "r"(first), "r"(second), "r"(third), "r"(fourth)
               : "memory");
}

// Products of a warpgroup, 64 rows

// Order what this warpgroup wrote to registers and shared memory before the products that follow.
DEVICE void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// End a group of products.
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most `PENDING` groups of products are under way.
template <int PENDING>
DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Have numbers computed before what is waited for next.
template <int COUNT>
DEVICE void settle(float (&numbers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(numbers[i])::"memory");
}

#define WGMMA_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_NAMES_16 WGMMA_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_NAMES_24 WGMMA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_NAMES_32 WGMMA_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_40 WGMMA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_NAMES_48 WGMMA_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_NAMES_56 WGMMA_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_NAMES_64 WGMMA_NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_NAMES_72 WGMMA_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_NAMES_80 WGMMA_NAMES_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_NAMES_88 WGMMA_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_NAMES_96 WGMMA_NAMES_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_NAMES_104 WGMMA_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_NAMES_112 WGMMA_NAMES_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_NAMES_120 WGMMA_NAMES_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define WGMMA_NAMES_128 WGMMA_NAMES_120 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define WGMMA_EIGHT(c, i) \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
      "+f"(c[i + 7])
#define WGMMA_SUMS_8(c) WGMMA_EIGHT(c, 0)
#define WGMMA_SUMS_16(c) WGMMA_SUMS_8(c), WGMMA_EIGHT(c, 8)
#define WGMMA_SUMS_24(c) WGMMA_SUMS_16(c), WGMMA_EIGHT(c, 16)
#define WGMMA_SUMS_32(c) WGMMA_SUMS_24(c), WGMMA_EIGHT(c, 24)
#define WGMMA_SUMS_40(c) WGMMA_SUMS_32(c), WGMMA_EIGHT(c, 32)
#define WGMMA_SUMS_48(c) WGMMA_SUMS_40(c), WGMMA_EIGHT(c, 40)
#define WGMMA_SUMS_56(c) WGMMA_SUMS_48(c), WGMMA_EIGHT(c, 48)
#define WGMMA_SUMS_64(c) WGMMA_SUMS_56(c), WGMMA_EIGHT(c, 56)
#define WGMMA_SUMS_72(c) WGMMA_SUMS_64(c), WGMMA_EIGHT(c, 64)
#define WGMMA_SUMS_80(c) WGMMA_SUMS_72(c), WGMMA_EIGHT(c, 72)
#define WGMMA_SUMS_88(c) WGMMA_SUMS_80(c), WGMMA_EIGHT(c, 80)
#define WGMMA_SUMS_96(c) WGMMA_SUMS_88(c), WGMMA_EIGHT(c, 88)
#define WGMMA_SUMS_104(c) WGMMA_SUMS_96(c), WGMMA_EIGHT(c, 96)
#define WGMMA_SUMS_112(c) WGMMA_SUMS_104(c), WGMMA_EIGHT(c, 104)
#define WGMMA_SUMS_120(c) WGMMA_SUMS_112(c), WGMMA_EIGHT(c, 112)
#define WGMMA_SUMS_128(c) WGMMA_SUMS_120(c), WGMMA_EIGHT(c, 120)

// One product of 64 x 16 and 16 x N, added to `sums` or, where `accumulates` is false, put there. Thread t of the
// warpgroup holds rows 16 (t / 32) + t % 32 / 4 (sums 0, 1 of every four) and eight more (2, 3), columns 8 j + 2 (t % 4)
// and the next. The right matrix is described in shared memory, its rows along columns of the product, or with
// TRANSPOSED along the contracted axis; so is the left one, or thread t has its elements of the same rows and columns in
// registers: those of columns 0 to 7, row by row, then of columns 8 to 15.
template <class Stored, int N, bool TRANSPOSED>
struct Product;

// What follows the sums among the operands, by number: A to D the left registers, E the right matrix, F whether it
// accumulates, G whether the right matrix is transposed; of two matrices A and B, C whether it accumulates, D.
#define DEFINE_PRODUCT(STORED, TYPE, N, SUMS, A, B, C, D, E, F, G)                                               \
  template <bool TRANSPOSED>                                                                                     \
  struct Product<STORED, N, TRANSPOSED> {                                                                        \
    DEVICE static void start(                                                                                    \
        float (&sums)[SUMS], unsigned long long left, unsigned long long right, bool accumulates) {              \
      asm volatile(                                                                                              \
          "{\n.reg .pred accumulates;\nsetp.ne.b32 accumulates, %" #C ", 0;\n"                                   \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" WGMMA_NAMES_##SUMS "}, %" #A      \
          ", %" #B ", accumulates, 1, 1, 0, %" #D ";\n}\n"                                                       \
          : WGMMA_SUMS_##SUMS(sums)                                                                              \
          : "l"(left), "l"(right), "r"(static_cast<int>(accumulates)), "n"(TRANSPOSED ? 1 : 0));                 \
    }                                                                                                            \
    DEVICE static void start(                                                                                    \
        float (&sums)[SUMS], const unsigned* left, unsigned long long right, bool accumulates) {                 \
      asm volatile(                                                                                              \
          "{\n.reg .pred accumulates;\nsetp.ne.b32 accumulates, %" #F ", 0;\n"                                   \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" WGMMA_NAMES_##SUMS "}, {%" #A     \
          ", %" #B ", %" #C ", %" #D "}, %" #E ", accumulates, 1, 1, %" #G ";\n}\n"                              \
          : WGMMA_SUMS_##SUMS(sums)                                                                              \
          : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right),                                  \
            "r"(static_cast<int>(accumulates)), "n"(TRANSPOSED ? 1 : 0));                                        \
    }                                                                                                            \
  };

#define DEFINE_PRODUCTS(STORED, TYPE)                                      \
  DEFINE_PRODUCT(STORED, TYPE, 64, 32, 32, 33, 34, 35, 36, 37, 38) \
  DEFINE_PRODUCT(STORED, TYPE, 80, 40, 40, 41, 42, 43, 44, 45, 46) \
  DEFINE_PRODUCT(STORED, TYPE, 96, 48, 48, 49, 50, 51, 52, 53, 54) \
  DEFINE_PRODUCT(STORED, TYPE, 112, 56, 56, 57, 58, 59, 60, 61, 62) \
  DEFINE_PRODUCT(STORED, TYPE, 128, 64, 64, 65, 66, 67, 68, 69, 70) \
  DEFINE_PRODUCT(STORED, TYPE, 144, 72, 72, 73, 74, 75, 76, 77, 78) \
  DEFINE_PRODUCT(STORED, TYPE, 160, 80, 80, 81, 82, 83, 84, 85, 86) \
  DEFINE_PRODUCT(STORED, TYPE, 176, 88, 88, 89, 90, 91, 92, 93, 94) \
  DEFINE_PRODUCT(STORED, TYPE, 192, 96, 96, 97, 98, 99, 100, 101, 102) \
  DEFINE_PRODUCT(STORED, TYPE, 208, 104, 104, 105, 106, 107, 108, 109, 110) \
  DEFINE_PRODUCT(STORED, TYPE, 224, 112, 112, 113, 114, 115, 116, 117, 118) \
  DEFINE_PRODUCT(STORED, TYPE, 240, 120, 120, 121, 122, 123, 124, 125, 126) \
  DEFINE_PRODUCT(STORED, TYPE, 256, 128, 128, 129, 130, 131, 132, 133, 134)

DEFINE_PRODUCTS(float16, "f16")
DEFINE_PRODUCTS(bfloat16, "bf16")

#endif

// Describe a matrix in shared memory for a product: slabs of rows, from a multiple of 16 columns or of 8 rows on. Rows
// along the contracted axis' other side (Q, K): `next_slab` is not used. Transposed (V): `next_slab` bytes lie between
// slabs.
DEVICE unsigned long long describe_matrix(unsigned address, unsigned next_slab) {
  const unsigned long long eight_rows = 8 * SLAB_ROW_BYTES;
  return static_cast<unsigned long long>((address & 0x3ffff) >> 4) |
         static_cast<unsigned long long>((next_slab & 0x3ffff) >> 4) << 16 | (eight_rows >> 4) << 32 | 1ull << 62;
}

// The same matrix some bytes further on; the address lies in the lower half.
DEVICE unsigned long long moved_on(unsigned long long matrix, unsigned bytes) {
  const unsigned low = static_cast<unsigned>(matrix) + (bytes >> 4);
  return (matrix >> 32) << 32 | low;
}
