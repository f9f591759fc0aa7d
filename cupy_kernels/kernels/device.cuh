// Instructions that C++ has no name for, one function each. The CPU build supplies the same names for g++.
#pragma once

#ifdef CPU_BUILD
#include "cpu_device.h"
#else

#define DEVICE __device__ __forceinline__

constexpr unsigned ALL_LANES = 0xffffffffu;

struct Four {
  unsigned x, y, z, w;
};

struct Two {
  unsigned x, y;
};

// Dynamic shared memory of the thread block, 16-byte aligned.
DEVICE float* shared_memory() {
  extern __shared__ float4 bytes_of_the_block[];
  return reinterpret_cast<float*>(bytes_of_the_block);
}

// The larger operand, +0 of zeros; NaN if either is NaN.
DEVICE float maximum(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  if (a == b) return __uint_as_float(__float_as_uint(a) & __float_as_uint(b));
  return a != a || a > b ? a : b;
#endif
}

DEVICE float shuffle_xor(float value, int distance) { return __shfl_xor_sync(ALL_LANES, value, distance); }

// Index of the thread's warp in its block, in a way that tells the compiler that it is the same in all lanes.
DEVICE int warp_index() { return __shfl_sync(ALL_LANES, threadIdx.x / 32, 0); }

// Copy 16 bytes from global memory to an offset in shared memory; they arrive at the latest when their group is waited
// for.
DEVICE void start_copy_of_16_bytes(float* shared, int offset, const void* from) {
#if __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared)) + 4 * offset;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#else
  *reinterpret_cast<float4*>(shared + offset) = __ldg(static_cast<const float4*>(from));
#endif
}

// End a group of this thread's copies.
DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most `PENDING` groups of this thread are under way. Others see the bytes after a barrier.
template <int PENDING>
DEVICE void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// Loads of what no thread writes during the launch.

DEVICE unsigned short load_2_bytes(const void* from) { return __ldg(static_cast<const unsigned short*>(from)); }

DEVICE unsigned load_4_bytes(const void* from) { return __ldg(static_cast<const unsigned*>(from)); }

DEVICE Two load_8_bytes(const void* from) {
  const uint2 loaded = __ldg(static_cast<const uint2*>(from));
  return {loaded.x, loaded.y};
}

DEVICE Four load_16_bytes(const void* from) {
  const uint4 loaded = __ldg(static_cast<const uint4*>(from));
  return {loaded.x, loaded.y, loaded.z, loaded.w};
}

// Loads of what this thread block has written before its last barrier.

DEVICE unsigned reload_4_bytes(const void* from) { return *static_cast<const unsigned*>(from); }

DEVICE Two reload_8_bytes(const void* from) {
  const uint2 loaded = *static_cast<const uint2*>(from);
  return {loaded.x, loaded.y};
}

DEVICE Four reload_16_bytes(const void* from) {
  const uint4 loaded = *static_cast<const uint4*>(from);
  return {loaded.x, loaded.y, loaded.z, loaded.w};
}

DEVICE void store_16_bytes(void* to, Four words) {
  *static_cast<uint4*>(to) = make_uint4(words.x, words.y, words.z, words.w);
}

DEVICE void store_8_bytes(void* to, Two words) { *static_cast<uint2*>(to) = make_uint2(words.x, words.y); }

DEVICE void store_4_bytes(void* to, unsigned word) { *static_cast<unsigned*>(to) = word; }

DEVICE void store_2_bytes(void* to, unsigned short word) { *static_cast<unsigned short*>(to) = word; }

// Add to a number in global memory, in no fixed order among threads.
DEVICE void add_float(float* to, float value) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
}

// The same for four adjacent ones, 16-byte aligned.
DEVICE void add_4_floats(float* to, float4 values) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(values.x), "f"(values.y), "f"(values.z),
               "f"(values.w)
               : "memory");
#else
  add_float(to, values.x), add_float(to + 1, values.y), add_float(to + 2, values.z), add_float(to + 3, values.w);
#endif
}

DEVICE void add_to_counter(unsigned long long* counter, unsigned long long amount) { atomicAdd(counter, amount); }

DEVICE float float_of_half(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Round to the nearest half, ties to even.
DEVICE unsigned short half_of_float(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

#endif
