// CUDA for g++: each thread of a block is a fiber, so that a kernel's source runs unchanged on the CPU, and is watched.
//
// A fiber runs until it reaches a barrier or an operation of its warp, and goes on when all that take part are there.
// What is checked: barriers and warp operations reached by some threads only, global accesses outside an array, into
// the gaps of a strided one, misaligned or against its direction, output written twice, writes past shared memory,
// copies still under way at the end. What is made visible: shared memory starts as NaN, and so do the destinations of
// copies under way; the order in which fibers run is the caller's choice.
#pragma once

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DEVICE inline

struct Index {
  unsigned x, y, z;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct Two {
  unsigned x, y;
};

struct Four {
  unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

namespace cpu {

constexpr int WARP_LANES = 32;
constexpr int GUARD_BYTES = 4096;       // after shared memory; a write there is caught
constexpr unsigned char POISON = 0xff;  // NaN in every format

enum class Order { forward, reverse, random };
enum class Copies { early, late };

enum Access { READ = 1, WRITE = 2, ADD = 4 };

// A matrix of `extents` rows in global memory, and the bytes between them along each axis, the largest first.
struct Array {
  const char* name;
  char* base;
  long long extents[3], strides[3];
  long long row_bytes;
  unsigned char* written;  // one flag per byte from the base on; null where the array is not written
  int access;              // what the kernel may do to it
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

enum class State { ready, waiting, at_barrier, at_warp, finished };

struct Thread {
  ucontext_t context;
  State state;
  Index index;
  int line;                    // of the barrier at which it waits
  void (*resolve)(Thread*);    // what the warp does together when all its lanes, from the first on, wait for it
  int variant;                 // of that, the same in all lanes
  const void* operands;        // of this lane
  float given, taken;          // by a shuffle
  unsigned votes;              // taken part in
  bool (*is_over)(const Thread&);   // whether what it waits for has come
  void (*complain)(const Thread&);  // that it does not
  uint64_t which;                   // of its kind it is
  std::vector<Copy> open;                 // copies of no group yet
  std::vector<std::vector<Copy>> groups;  // groups under way, oldest first
};

struct Block {
  Index index, blocks, threads_of_block;
  std::vector<Thread> threads;
  std::unique_ptr<char[]> stacks;  // touched only as far as they grow
  std::vector<float4> shared;
  size_t shared_bytes;
  ucontext_t scheduler;
  Thread* running;
  Order order;
  Copies copies;
  uint64_t random_state;
  bool marks[3];  // of votes
  unsigned barriers;  // of all threads, passed
  const Array* arrays;
  int array_count;
  void (*kernel)(const void*);
  const void* parameters;
  char message[512];
};

inline Block block;

// What a header of further instructions does while a block runs.
struct Extension {
  void (*start_block)();
  bool (*go_on)(bool starved);  // complete what is under way; all wait for something if starved; whether it did
  void (*end_thread)();
  void (*end_block)();
};

inline const Extension* extension = nullptr;

constexpr size_t STACK_BYTES = 128 << 10;

inline void return_to_scheduler() { swapcontext(&block.running->context, &block.scheduler); }

inline void vrecord(const char* format, va_list arguments) {
  const int used = snprintf(
      block.message, sizeof block.message, "thread %u of block %u: ", block.running->index.x, block.index.x);
  vsnprintf(block.message + used, sizeof block.message - used, format, arguments);
}

// Note what is wrong with the running thread; the scheduler ends the launch.
inline void record(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vrecord(format, arguments);
  va_end(arguments);
}

// The same from inside the thread, which does not go on.
[[noreturn]] inline void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vrecord(format, arguments);
  va_end(arguments);
  return_to_scheduler();
  abort();
}

inline uint64_t next_random() {  // xorshift64*
  uint64_t& state = block.random_state;
  state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
  return state * 2685821657736338717ull;
}

inline std::vector<int> permutation(int count, Order order) {
  std::vector<int> result(count);
  for (int i = 0; i < count; i++) result[i] = order == Order::reverse ? count - 1 - i : i;
  if (order == Order::random) {
    for (int i = count - 1; i > 0; i--) {
      const int j = next_random() % (i + 1), kept = result[i];
      result[i] = result[j], result[j] = kept;
    }
  }
  return result;
}

// Global memory

inline const Array& checked_access(const void* address, int bytes, const char* what) {
  const char* at = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail("misaligned %s of %d bytes at %p", what, bytes, address);
  for (int i = 0; i < block.array_count; i++) {
    const Array& array = block.arrays[i];
    long long rest = at - array.base;
    bool inside = rest >= 0;
    for (int axis = 0; axis < 3; axis++) {
      inside = inside && rest / array.strides[axis] < array.extents[axis];
      rest %= array.strides[axis];
    }
    if (inside && rest + bytes <= array.row_bytes) return array;
  }
  const Array* nearest = nullptr;
  for (int i = 0; i < block.array_count; i++) {
    if (at >= block.arrays[i].base && (!nearest || block.arrays[i].base > nearest->base)) nearest = &block.arrays[i];
  }
  fail("%s of %d bytes outside every array, %lld bytes after the start of %s", what, bytes,
       nearest ? static_cast<long long>(at - nearest->base) : 0LL, nearest ? nearest->name : "none");
}

inline void check_read(const void* address, int bytes) {
  const Array& array = checked_access(address, bytes, "read");
  if (!(array.access & READ)) fail("read of %s, which is only written", array.name);
  if (array.access & WRITE) fail("read of %s past the cache that its writes go to", array.name);
}

inline void check_reload(const void* address, int bytes) {
  const Array& array = checked_access(address, bytes, "read");
  if (!(array.access & READ)) fail("read of %s, which is only written", array.name);
}

inline void check_write(const void* address, int bytes) {
  const Array& array = checked_access(address, bytes, "write");
  if (!(array.access & WRITE)) fail("write to %s, which is only read", array.name);
  unsigned char* flags = array.written + (static_cast<const char*>(address) - array.base);
  for (int i = 0; i < bytes; i++) {
    const bool again = flags[i];
    flags[i] = 1;
    if (again && !(array.access & READ)) {
      const long long distance = flags - array.written;
      fail("%s is written twice, %lld bytes after its start", array.name, distance);
    }
  }
}

inline void check_add(const void* address, int bytes) {
  const Array& array = checked_access(address, bytes, "addition");
  if (!(array.access & ADD)) fail("addition to %s, which is not added to", array.name);
}

// Barriers and warps

inline void barrier(int line) {
  block.running->line = line;
  block.running->state = State::at_barrier;
  return_to_scheduler();
}

// Wait for the other lanes of the warp, and have done what they do together.
inline void together(const void* operands, int variant, void (*resolve)(Thread*)) {
  block.running->operands = operands;
  block.running->variant = variant;
  block.running->resolve = resolve;
  block.running->state = State::at_warp;
  return_to_scheduler();
}

// Shuffle by a distance; 0 is a barrier of the warp.
inline void resolve_shuffle(Thread* lanes) {
  for (int lane = 0; lane < WARP_LANES; lane++) lanes[lane].taken = lanes[lane ^ lanes[lane].variant].given;
}

inline float warp_operation(float given, int distance) {
  block.running->given = given;
  together(nullptr, distance, resolve_shuffle);
  return block.running->taken;
}

inline void resolve_warp(Thread* lanes) {
  for (int lane = 0; lane < WARP_LANES; lane++) {
    if (lanes[lane].state != State::at_warp) return;
  }
  for (int lane = 0; lane < WARP_LANES; lane++) {
    block.running = &lanes[lane];
    if (lanes[lane].resolve != lanes[0].resolve || lanes[lane].variant != lanes[0].variant) {
      record("lanes of a warp meet different warp operations");
    }
    lanes[lane].state = State::ready;
  }
  if (!block.message[0]) lanes[0].resolve(lanes);
}

inline void resolve_barrier() {
  for (Thread& thread : block.threads) {
    if (thread.state != State::at_barrier) return;
  }
  for (Thread& thread : block.threads) {
    block.running = &thread;
    if (thread.line != block.threads[0].line) {
      record("waits at the barrier of line %d, thread 0 at that of line %d", thread.line, block.threads[0].line);
    }
    thread.state = State::ready;
  }
  block.barriers++;
}

// Wait for something that other threads or the scheduler bring about.
inline void wait_until(bool (*is_over)(const Thread&), void (*complain)(const Thread&), uint64_t which) {
  Thread& thread = *block.running;
  thread.is_over = is_over, thread.complain = complain, thread.which = which;
  if (is_over(thread)) return;
  thread.state = State::waiting;
  return_to_scheduler();
}

inline bool can_run(const Thread& thread) {
  return thread.state == State::ready || (thread.state == State::waiting && thread.is_over(thread));
}

// Whether any thread of the block says so, by what all of them meet together.
inline bool barrier_any(bool given, int line) {
  // Of three marks in turn, one is set, one may still be read, and one is cleared.
  bool(&marks)[3] = block.marks;
  const unsigned vote = block.running->votes++;
  if (given) marks[vote % 3] = true;
  barrier(line);
  marks[(vote + 2) % 3] = false;
  return marks[vote % 3];
}

// Asynchronous copies

inline void land(const std::vector<Copy>& group) {
  for (const Copy& copy : group) memcpy(copy.to, copy.from, copy.bytes);
}

inline void start_trusted_copy(void* to, const void* from, int bytes) {
  if (block.copies == Copies::early) {
    memcpy(to, from, bytes);
  } else {
    memset(to, POISON, bytes);
  }
  block.running->open.push_back({to, from, bytes});
}

inline void start_copy(void* to, const void* from, int bytes) {
  check_read(from, bytes);
  start_trusted_copy(to, from, bytes);
}

inline void commit() {
  block.running->groups.push_back(block.running->open);
  block.running->open.clear();
}

inline void wait(size_t pending) {
  std::vector<std::vector<Copy>>& groups = block.running->groups;
  while (groups.size() > pending) {
    if (block.copies == Copies::late) land(groups[0]);
    groups.erase(groups.begin());
  }
}

// Blocks

inline void fiber() {
  block.kernel(block.parameters);
  Thread& thread = *block.running;
  size_t unfinished = thread.open.size();
  for (const std::vector<Copy>& group : thread.groups) unfinished += group.size();
  if (unfinished) fail("ends with %zu copies under way", unfinished);
  if (extension) extension->end_thread();
  thread.state = State::finished;
  return_to_scheduler();
}

inline void start_block() {
  memset(block.shared.data(), POISON, block.shared.size() * sizeof(float4));
  memset(block.marks, 0, sizeof block.marks);
  block.barriers = 0;
  for (size_t i = 0; i < block.threads.size(); i++) {
    Thread& thread = block.threads[i];
    thread.state = State::ready;
    thread.index = {static_cast<unsigned>(i), 0, 0};
    thread.open.clear(), thread.groups.clear();
    thread.votes = 0;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = block.stacks.get() + i * STACK_BYTES;
    thread.context.uc_stack.ss_size = STACK_BYTES;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, fiber, 0);
  }
  if (extension) extension->start_block();
}

inline void check_progress() {
  for (Thread& thread : block.threads) {
    if (can_run(thread)) return;
  }
  for (Thread& thread : block.threads) {
    block.running = &thread;
    if (thread.state == State::waiting) return thread.complain(thread);
    if (thread.state == State::at_barrier) {
      return record("waits at the barrier of line %d, which others do not reach", thread.line);
    }
    if (thread.state == State::at_warp) return record("waits for lanes of its warp that do not come");
  }
}

inline void check_guard() {
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(block.shared.data());
  for (size_t i = block.shared_bytes; i < block.shared.size() * sizeof(float4); i++) {
    if (bytes[i] != POISON) {
      return record("a thread of this block wrote %zu bytes past shared memory", i - block.shared_bytes);
    }
  }
}

// Whether a warp goes on before others have their turn: never in forward order, so that warps stay together; always in
// reverse order, so that they are as far apart as barriers let them; by chance in random order.
inline bool goes_on(const Thread* lanes, Order order) {
  bool ready = false;
  for (int lane = 0; lane < WARP_LANES; lane++) ready = ready || can_run(lanes[lane]);
  return ready && (order == Order::reverse || (order == Order::random && next_random() % 4));
}

inline void run_block(Order order) {
  block.order = order;
  start_block();
  const int warps = block.threads.size() / WARP_LANES;
  for (bool unfinished = true; unfinished;) {
    bool progressed = unfinished = false;
    for (int warp : permutation(warps, order)) {
      Thread* lanes = &block.threads[warp * WARP_LANES];
      do {
        for (int lane : permutation(WARP_LANES, order)) {
          if (!can_run(lanes[lane])) continue;
          lanes[lane].state = State::ready;
          block.running = &lanes[lane];
          swapcontext(&block.scheduler, &block.running->context);
          if (block.message[0]) return;
          progressed = true;
        }
        resolve_warp(lanes);
        if (block.message[0]) return;
      } while (goes_on(lanes, order));
    }
    resolve_barrier();
    const bool completed = extension && extension->go_on(!progressed);
    if (!progressed && !completed) check_progress();
    if (block.message[0]) return;
    for (const Thread& thread : block.threads) unfinished = unfinished || thread.state != State::finished;
  }
  block.running = &block.threads[0];
  check_guard();
  if (extension && !block.message[0]) extension->end_block();
}

}  // namespace cpu

// The functions of device.cuh

inline float* shared_memory() { return reinterpret_cast<float*>(cpu::block.shared.data()); }

inline float maximum(float a, float b) {
  if (a == b) return __uint_as_float(__float_as_uint(a) & __float_as_uint(b));  // +0 is larger than -0
  return a != a || a > b ? a : b;
}

inline float shuffle_xor(float value, int distance) { return cpu::warp_operation(value, distance); }

inline int warp_index() { return cpu::block.running->index.x / cpu::WARP_LANES; }

inline void start_copy_of_16_bytes(float* shared, int offset, const void* from) {
  cpu::start_copy(shared + offset, from, 16);
}

inline void commit_copies() { cpu::commit(); }

template <int PENDING>
inline void wait_for_copies() {
  cpu::wait(PENDING);
}

// Copy a number of type T from global memory.
template <class T, void (*CHECK)(const void*, int) = cpu::check_read>
inline T load_as(const void* from) {
  CHECK(from, sizeof(T));
  T loaded;
  memcpy(&loaded, from, sizeof(T));
  return loaded;
}

inline unsigned short load_2_bytes(const void* from) { return load_as<unsigned short>(from); }
inline unsigned load_4_bytes(const void* from) { return load_as<unsigned>(from); }
inline Two load_8_bytes(const void* from) { return load_as<Two>(from); }
inline Four load_16_bytes(const void* from) { return load_as<Four>(from); }
inline unsigned reload_4_bytes(const void* from) { return load_as<unsigned, cpu::check_reload>(from); }
inline Two reload_8_bytes(const void* from) { return load_as<Two, cpu::check_reload>(from); }
inline Four reload_16_bytes(const void* from) { return load_as<Four, cpu::check_reload>(from); }

inline void store_16_bytes(void* to, Four words) {
  cpu::check_write(to, 16);
  memcpy(to, &words, 16);
}

inline void store_8_bytes(void* to, Two words) {
  cpu::check_write(to, 8);
  memcpy(to, &words, 8);
}

inline void store_4_bytes(void* to, unsigned word) {
  cpu::check_write(to, 4);
  memcpy(to, &word, 4);
}

inline void store_2_bytes(void* to, unsigned short word) {
  cpu::check_write(to, 2);
  memcpy(to, &word, 2);
}

inline void add_float(float* to, float value) {
  cpu::check_add(to, 4);
  *to += value;
}

inline void add_4_floats(float* to, float4 values) {
  cpu::check_add(to, 16);
  to[0] += values.x, to[1] += values.y, to[2] += values.z, to[3] += values.w;
}

inline void add_to_counter(unsigned long long* counter, unsigned long long amount) { *counter += amount; }

inline float float_of_half(unsigned short bits) {
  const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, fraction = bits & 1023u;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = fraction * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

// To nearest, ties to even. Added to 1/2, a subnormal half has its last bit where that of the sum is.
inline unsigned short half_of_float(float value) {
  const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x47800000u) return sign | 0x7c00;  // 2^16 and more
  if (magnitude < 0x38800000u) {                       // below 2^-14
    const float sum = __uint_as_float(magnitude) + 0.5f;
    return sign | (__float_as_uint(sum) - 0x3f000000u);
  }
  return sign | (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
}

#define threadIdx (cpu::block.running->index)
#define blockIdx (cpu::block.index)
#define gridDim (cpu::block.blocks)
#define __syncthreads() cpu::barrier(__LINE__)
#define __syncwarp() cpu::warp_operation(0.0f, 0)
