// Models of Hopper's asynchronous instructions under the names of hopper.cuh: barriers in shared memory, copies of boxes,
// products of a warpgroup, registers that change hands.
//
// Addresses, swizzles and descriptors are decoded to the byte. Copies and products complete as early or as late as they
// may: at their start, or when a thread waits for them and none can run (copies to shared memory), or at the wait that
// needs them (products, which read registers and shared memory then, and copies from shared memory); in random order by
// chance in between. What is under way is NaN: destinations of copies, sums of products. What is checked: barriers used before
// they are initialised and published, too many arrivals, bytes that were not expected, boxes beside an array or not
// aligned, stored matrices that were not published to whoever reads them, products that not all of a warpgroup starts,
// that were not fenced off from their registers, or whose sums are touched, counts of threads at named barriers,
// registers that do not exist, numbers that are not the same in all lanes, anything under way at the end.
#pragma once

#include <math.h>

#include <deque>
#include <list>
#include <map>

#include "cpu_tensor_cores.h"

#define __grid_constant__

using Barrier = unsigned long long;

struct alignas(64) TensorMap {
  unsigned char record[128];
};

enum class Reuse { ONCE, OFTEN };

namespace cpu {

constexpr int WARPGROUP_WARPS = 4;
constexpr int WARPGROUP_LANES = WARPGROUP_WARPS * WARP_LANES;
constexpr int BOX_ROW_BYTES = 128;    // the width of the swizzle
constexpr int SWIZZLE_BYTES = 1024;   // after which its pattern repeats
constexpr int CHUNK_BYTES = 16;       // that it moves as a whole
constexpr int NAMED_BARRIERS = 16;
constexpr int REGISTERS = 65536;      // of a multiprocessor
constexpr int MOST_AXES = 5;

// TensorMap.cpu_record of tensor_map.py
struct TensorMapRecord {
  char mark[4];
  int unused;
  char* address;
  int item_bytes, axes;
  unsigned extents[MOST_AXES], box[MOST_AXES];
  unsigned long long strides[MOST_AXES - 1];  // bytes along each axis but the first
};

struct BarrierState {
  int arrivals;          // that end a phase
  int pending;           // of them, in this phase
  long long bytes;       // still to come in this phase
  unsigned phase;
  unsigned maker;        // thread
  bool published;
  unsigned barriers;     // of the block that had been passed then
};

// A box, and where it lies in shared memory.
struct BoxCopy {
  TensorMapRecord map;
  long long at[MOST_AXES];
  unsigned shared;
  unsigned barrier;      // of a load
  Thread* thread;
  bool done;
};

// Lanes of a warp that stored to 16 bytes of shared memory and have not made that known to copies and products.
struct Unpublished {
  unsigned warp, lanes;
};

struct NamedBarrier {
  int threads, arrived;
  unsigned phase;
};

// The registers of a thread that products under way add to. What is in them meanwhile is poison.
struct Sums {
  float* registers;
  std::vector<float> values;
  int products;          // under way
};

// Registers that a product has taken, as they were at the last fence or as a product left them.
struct FencedRegisters {
  const void* address;
  std::vector<unsigned char> bytes;
};

struct Lane {
  std::list<Sums> sums;
  std::vector<FencedRegisters> registers;
  bool fenced;
  unsigned products, waited_for;  // how many it has started, and waited for
  std::vector<unsigned> groups;   // products started at the end of each
  std::vector<unsigned> stored;   // chunks of shared memory, not published
  std::vector<BoxCopy> open_stores;
  std::vector<std::vector<BoxCopy>> store_groups;  // whose source may still be read, oldest first
  unsigned named_phase;
};

struct Warp {
  int registers, wanted;
  std::vector<int> changes;
};

struct Operands {
  unsigned long long left, right;  // descriptors; `left` is 0 where it is in registers
  bool accumulates;
};

struct StartedProduct {
  void (*compute)(StartedProduct&, int warp);
  Operands operands;
  size_t group;
  int lanes;                       // that have started it
  bool done[WARPGROUP_WARPS];
  struct {
    Lane* lane;
    Sums* sums;
    const unsigned* left;
  } of[WARPGROUP_LANES];
};

struct Warpgroup {
  std::deque<StartedProduct> products;
  unsigned first;  // number of the first of them
};

struct Hopper {
  std::map<unsigned, BarrierState> barriers;  // by address
  std::vector<BoxCopy> loads;                 // under way
  std::vector<Unpublished> unpublished;       // by chunk
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  NamedBarrier named[NAMED_BARRIERS];
  int free_registers;
};

inline Hopper hopper;

inline unsigned thread_number() { return block.running->index.x; }
inline Lane& own_lane() { return hopper.lanes[thread_number()]; }
inline Warpgroup& own_warpgroup() { return hopper.warpgroups[thread_number() / WARPGROUP_LANES]; }

inline char* shared_bytes() { return reinterpret_cast<char*>(block.shared.data()); }

// Whether what starts now is left for later; in random order by chance.
inline bool is_late() {
  return block.copies == Copies::late && (block.order != Order::random || next_random() % 2);
}

// Barriers in shared memory. Their bytes there follow their state, so that stray writes show.

inline unsigned long long barrier_bytes(unsigned address, const BarrierState& state) {
  const unsigned long long numbers[] = {address, static_cast<unsigned>(state.pending),
                                        static_cast<unsigned long long>(state.bytes), state.phase};
  unsigned long long mixed = 0x9e3779b97f4a7c15ull;
  for (unsigned long long number : numbers) mixed = (mixed ^ number) * 0xbf58476d1ce4e5b9ull;
  return mixed;
}

inline void keep_barrier(unsigned address, const BarrierState& state) {
  const unsigned long long bytes = barrier_bytes(address, state);
  memcpy(shared_bytes() + address, &bytes, sizeof bytes);
}

inline BarrierState& barrier_at(unsigned address, const char* what) {
  const auto found = hopper.barriers.find(address);
  if (found == hopper.barriers.end()) fail("%s at byte %u, where no barrier was initialised", what, address);
  const BarrierState& state = found->second;
  if (!state.published || block.barriers == state.barriers) {
    fail("%s at the barrier of byte %u before it was published and a barrier of the block passed", what, address);
  }
  const unsigned long long bytes = barrier_bytes(address, state);
  if (memcmp(shared_bytes() + address, &bytes, sizeof bytes)) fail("the barrier of byte %u was overwritten", address);
  return found->second;
}

inline void end_phase_if_due(unsigned address, BarrierState& state) {
  if (!state.pending && !state.bytes) state.phase++, state.pending = state.arrivals;
  keep_barrier(address, state);
}

inline void arrive_at(unsigned address, unsigned bytes) {
  BarrierState& state = barrier_at(address, "arrives");
  if (!state.pending) {
    fail("arrives at the barrier of byte %u, whose %d arrivals of this phase are complete", address, state.arrivals);
  }
  state.bytes += bytes;
  if (state.bytes >= 1 << 20) fail("the barrier of byte %u expects %lld bytes", address, state.bytes);
  state.pending--;
  end_phase_if_due(address, state);
}

inline bool phase_is_over(const Thread& thread) {
  const BarrierState& state = hopper.barriers.find(thread.which >> 1)->second;
  return (state.phase & 1) != (thread.which & 1);
}

inline void complain_of_phase(const Thread& thread) {
  const unsigned address = thread.which >> 1, parity = thread.which & 1;
  const BarrierState& state = hopper.barriers.find(address)->second;
  record("waits for a phase of parity %u of the barrier at byte %u, whose phase lacks %d arrivals and %lld bytes", parity,
         address, state.pending, state.bytes);
}

// Boxes

inline unsigned swizzled(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

inline TensorMapRecord read_map(const TensorMap* map) {
  TensorMapRecord record;
  memcpy(&record, map, sizeof record);
  if (reinterpret_cast<uintptr_t>(map) % 64 || memcmp(record.mark, "BOX", 4)) fail("%p is no tensor map", map);
  return record;
}

// Call for every row of a box with its number, the address of its first element inside the array and the bytes before
// and of those inside. Addresses are taken modulo 2^64, as the hardware does.
template <class Function>
inline void for_each_row(const BoxCopy& copy, Function function) {
  const TensorMapRecord& map = copy.map;
  const long long first = copy.at[0] < 0 ? -copy.at[0] : 0;
  const long long stop = copy.at[0] + map.box[0] > map.extents[0] ? map.extents[0] - copy.at[0] : map.box[0];
  unsigned place[MOST_AXES] = {};
  for (int row = 0;; row++) {
    bool inside = first < stop;
    uint64_t offset = static_cast<uint64_t>(copy.at[0] + first) * map.item_bytes;
    for (int axis = 1; axis < map.axes; axis++) {
      const long long index = copy.at[axis] + place[axis];
      inside = inside && index >= 0 && index < map.extents[axis];
      offset += static_cast<uint64_t>(index) * map.strides[axis - 1];
    }
    const int bytes = inside ? static_cast<int>(stop - first) * map.item_bytes : 0;
    char* const address = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(map.address) + offset);
    function(row, address, static_cast<int>(first) * map.item_bytes, bytes);
    int axis = 1;
    while (axis < map.axes && ++place[axis] == map.box[axis]) place[axis++] = 0;
    if (axis == map.axes) return;
  }
}

inline void check_row(const char* from, int bytes, void (*check)(const void*, int)) {
  const int step = reinterpret_cast<uintptr_t>(from) % CHUNK_BYTES || bytes % CHUNK_BYTES ? 2 : CHUNK_BYTES;
  for (int i = 0; i < bytes; i += step) check(from + i, step);
}

inline int box_rows(const TensorMapRecord& map) {
  int rows = 1;
  for (int axis = 1; axis < map.axes; axis++) rows *= map.box[axis];
  return rows;
}

inline BoxCopy make_copy(const TensorMap* map, unsigned shared, std::initializer_list<int> at, const char* what) {
  BoxCopy copy = {read_map(map), {}, shared, 0, block.running, false};
  if (static_cast<int>(at.size()) != copy.map.axes) {
    fail("%s of a box at %zu coordinates, of an array of %d axes", what, at.size(), copy.map.axes);
  }
  int axis = 0;
  for (int index : at) copy.at[axis++] = index;
  const int bytes = box_rows(copy.map) * BOX_ROW_BYTES;
  if (copy.map.box[0] * copy.map.item_bytes != BOX_ROW_BYTES) fail("%s of a box whose rows are not 128 bytes", what);
  if (shared % SWIZZLE_BYTES) fail("%s of a box at byte %u of shared memory, no multiple of 1024", what, shared);
  if (shared + bytes > block.shared_bytes) fail("%s of a box past shared memory, at byte %u", what, shared);
  return copy;
}

inline void check_published(unsigned address, const char* what) {
  const Unpublished& mark = hopper.unpublished[address / CHUNK_BYTES];
  if (mark.lanes) {
    fail("%s byte %u of shared memory, which thread %u stored and did not publish", what, address,
         mark.warp * WARP_LANES + __builtin_ctz(mark.lanes));
  }
}

inline void land_box(const BoxCopy& copy) {
  for_each_row(copy, [&](int row, const char* from, int before, int bytes) {
    char values[BOX_ROW_BYTES] = {};
    memcpy(values + before, from, bytes);
    for (int i = 0; i < BOX_ROW_BYTES; i += CHUNK_BYTES) {
      memcpy(shared_bytes() + swizzled(copy.shared + row * BOX_ROW_BYTES + i), values + i, CHUNK_BYTES);
    }
  });
  BarrierState& state = hopper.barriers.find(copy.barrier)->second;
  const long long bytes = box_rows(copy.map) * BOX_ROW_BYTES;
  if (state.bytes < bytes) {
    block.running = copy.thread;
    record("%lld bytes come to the barrier of byte %u, which expects %lld", bytes, copy.barrier, state.bytes);
    return;
  }
  state.bytes -= bytes;
  end_phase_if_due(copy.barrier, state);
}

inline void start_load(void* shared, const TensorMap* map, Barrier* barrier, std::initializer_list<int> at) {
  BoxCopy copy = make_copy(map, shared_address(shared), at, "load");
  copy.barrier = shared_address(barrier);
  barrier_at(copy.barrier, "a copy arrives");
  for_each_row(copy, [&](int row, const char* from, int before, int bytes) {
    check_row(from, bytes, check_read);
    const unsigned to = copy.shared + row * BOX_ROW_BYTES;
    for (int i = 0; i < BOX_ROW_BYTES; i += CHUNK_BYTES) check_published(to + i, "a copy overwrites");
    memset(shared_bytes() + to, POISON, BOX_ROW_BYTES);
  });
  if (is_late()) {
    hopper.loads.push_back(copy);
  } else {
    land_box(copy);
  }
}

inline void store_box(const BoxCopy& copy) {
  for_each_row(copy, [&](int row, char* to, int before, int bytes) {
    char values[BOX_ROW_BYTES];
    for (int i = 0; i < BOX_ROW_BYTES; i += CHUNK_BYTES) {
      memcpy(values + i, shared_bytes() + swizzled(copy.shared + row * BOX_ROW_BYTES + i), CHUNK_BYTES);
    }
    memcpy(to, values + before, bytes);
  });
}

inline void start_store(const TensorMap* map, const void* shared, std::initializer_list<int> at) {
  BoxCopy copy = make_copy(map, shared_address(shared), at, "store");
  for_each_row(copy, [&](int row, const char* to, int before, int bytes) {
    check_row(to, bytes, check_write);
    const unsigned from = copy.shared + row * BOX_ROW_BYTES;
    for (int i = 0; i < BOX_ROW_BYTES; i += CHUNK_BYTES) check_published(from + i, "a copy reads");
  });
  copy.done = !is_late();
  if (copy.done) store_box(copy);
  own_lane().open_stores.push_back(copy);
}

inline void wait_for_stores_but(size_t pending) {
  std::vector<std::vector<BoxCopy>>& groups = own_lane().store_groups;
  while (groups.size() > pending) {
    for (const BoxCopy& copy : groups[0]) {
      if (!copy.done) store_box(copy);
    }
    groups.erase(groups.begin());
  }
}

// Named barriers: warps arrive, and some wait.

inline void arrive_at_named(Thread* lanes, unsigned number, int threads) {
  NamedBarrier& barrier = hopper.named[number];
  for (int lane = 0; lane < WARP_LANES; lane++) hopper.lanes[lanes[lane].index.x].named_phase = barrier.phase;
  block.running = lanes;
  if (barrier.arrived && barrier.threads != threads) {
    return record("counts %d threads at named barrier %u, others %d", threads, number, barrier.threads);
  }
  barrier.threads = threads, barrier.arrived += WARP_LANES;
  if (barrier.arrived > threads) return record("comes to named barrier %u beyond its %d threads", number, threads);
  if (barrier.arrived == threads) barrier.arrived = 0, barrier.phase++;
}

inline void meet_named(int number, int threads) {
  if (number < 1 || number >= NAMED_BARRIERS) fail("named barrier %d: expected 1 to 15", number);
  if (threads < WARP_LANES || threads % WARP_LANES || threads > static_cast<int>(block.threads.size())) {
    fail("%d threads at named barrier %d: expected whole warps of the block", threads, number);
  }
  together(nullptr, number | threads << 8, [](Thread* lanes) {
    arrive_at_named(lanes, lanes[0].variant & 255, lanes[0].variant >> 8);
  });
}

inline bool named_is_over(const Thread& thread) {
  return hopper.named[thread.which].phase != hopper.lanes[thread.index.x].named_phase;
}

inline void wait_for_named(int number) {
  wait_until(
      named_is_over,
      [](const Thread& thread) {
        const NamedBarrier& barrier = hopper.named[thread.which];
        const int number = thread.which;
        record("waits at named barrier %d, to which %d of %d threads come", number, barrier.arrived, barrier.threads);
      },
      number);
}

// Registers

inline void change_registers(int registers, bool more) {
  if (registers < 24 || registers > 256 || registers % 8) fail("%d registers: expected multiples of 8", registers);
  Warp& warp = hopper.warps[thread_number() / WARP_LANES];
  if (more ? registers < warp.registers : registers > warp.registers) {
    fail("%s from %d to %d registers", more ? "grows" : "shrinks", warp.registers, registers);
  }
  together(nullptr, registers, [](Thread* lanes) {
    Warp& warp = hopper.warps[lanes[0].index.x / WARP_LANES];
    warp.wanted = lanes[0].variant;
    warp.changes.push_back(warp.wanted);
  });
  wait_until(
      [](const Thread& thread) {
        const Warp& warp = hopper.warps[thread.index.x / WARP_LANES];
        return hopper.free_registers >= (warp.wanted - warp.registers) * WARP_LANES;
      },
      [](const Thread& thread) {
        const Warp& warp = hopper.warps[thread.index.x / WARP_LANES];
        record("waits for %d registers instead of %d, and %d are free for its warp", warp.wanted, warp.registers,
               hopper.free_registers);
      },
      0);
  hopper.free_registers -= (warp.wanted - warp.registers) * WARP_LANES;
  warp.registers = warp.wanted;
}

// Products

// A matrix of 16-bit numbers in shared memory, as a descriptor has it: rows of 128 bytes, swizzled, eight rows `stride`
// bytes after the eight before.
struct Matrix {
  unsigned start, leading, stride;

  explicit Matrix(unsigned long long descriptor)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4) {
    const unsigned long long fields = 0x00003fff3fff3fffull, swizzled_by_128 = 1ull << 62;
    if ((descriptor & ~fields) != swizzled_by_128) fail("descriptor %llx of a matrix", descriptor);
    if (start % SWIZZLE_BYTES >= BOX_ROW_BYTES) fail("a matrix starts at byte %u, inside a swizzled pattern", start);
  }

  // Elements of a row are contracted.
  unsigned across(int row, int element) const {
    return swizzled(start + row / 8 * stride + row % 8 * BOX_ROW_BYTES + 2 * element);
  }

  // Elements of a column are contracted; 64 columns lie `leading` bytes after the 64 before.
  unsigned along(int element, int column) const {
    return swizzled(
        start + column / 64 * leading + column % 64 * 2 + element / 8 * stride + element % 8 * BOX_ROW_BYTES);
  }

  unsigned place(int outer, int element, bool transposed) const {
    return transposed ? along(element, outer) : across(outer, element);
  }
};

inline void check_matrix(unsigned long long descriptor, int rows, bool transposed) {
  const Matrix matrix(descriptor);
  const unsigned within = matrix.start % BOX_ROW_BYTES;
  if (transposed ? within != 0 : within + 2 * DEPTH > BOX_ROW_BYTES) {
    fail("a matrix of a product starts %u bytes into a row of 128", within);
  }
  for (int outer = 0; outer < rows; outer += transposed ? 8 : 1) {
    for (int element = 0; element < DEPTH; element += transposed ? 1 : 8) {
      const unsigned address = matrix.place(outer, element, transposed);
      if (address + CHUNK_BYTES > block.shared_bytes) fail("a product reads past shared memory, at byte %u", address);
      check_published(address, "a product reads");
    }
  }
}

template <class Stored>
inline Factor factor_at(unsigned address) {
  unsigned short bits;
  memcpy(&bits, shared_bytes() + address, sizeof bits);
  return Format<Stored>::factor(bits);
}

inline bool is_zero(const Factor (&factors)[DEPTH]) {
  bool zero = true;
  for (const Factor& factor : factors) zero = zero && !factor.significand;  // Inf and NaN have one
  return zero;
}

inline bool is_finite(const Factor (&factors)[DEPTH]) {
  bool finite = true;
  for (const Factor& factor : factors) finite = finite && !factor.infinite && !factor.nan;
  return finite;
}

// The rows of a warp.
template <class Stored, int N, bool TRANSPOSED>
inline void compute_product(StartedProduct& product, int warp) {
  static Factor left[16][DEPTH], right[N][DEPTH];
  const Matrix matrix(product.operands.right);
  for (int column = 0; column < N; column++) {
    for (int i = 0; i < DEPTH; i++) right[column][i] = factor_at<Stored>(matrix.place(column, i, TRANSPOSED));
  }
  const auto* lanes = &product.of[warp * WARP_LANES];
  if (product.operands.left) {
    const Matrix rows(product.operands.left);
    for (int row = 0; row < 16; row++) {
      for (int i = 0; i < DEPTH; i++) left[row][i] = factor_at<Stored>(rows.across(16 * warp + row, i));
    }
  } else {
    for (int lane = 0; lane < WARP_LANES; lane++) {
      for (int i = 0; i < 8; i++) {
        const int row = lane / 4 + i / 2 % 2 * 8, column = lane % 4 * 2 + i % 2 + i / 4 * 8;
        left[row][column] = Format<Stored>::factor(lanes[lane].left[i / 2] >> 16 * (i % 2));
      }
    }
  }
  bool left_is_zero[16], right_is_zero[N], finite = true;
  for (int row = 0; row < 16; row++) left_is_zero[row] = is_zero(left[row]), finite = finite && is_finite(left[row]);
  for (int i = 0; i < N; i++) right_is_zero[i] = is_zero(right[i]), finite = finite && is_finite(right[i]);
  for (int lane = 0; lane < WARP_LANES; lane++) {
    std::vector<float>& sums = lanes[lane].sums->values;
    for (int i = 0; i < N / 2; i++) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (!product.operands.accumulates) sums[i] = 0.0f;
      // What padding and hidden keys add is known; the sum may still become +0, or the one NaN there is.
      const bool adds_nothing = finite && (left_is_zero[row] || right_is_zero[column]) && sums[i] - sums[i] == 0.0f;
      if (adds_nothing) {
        sums[i] = sums[i] == 0.0f ? 0.0f : sums[i];
      } else {
        sums[i] = dot_add<Stored>(sums[i], left[row], right[column]);
      }
    }
  }
}

inline FencedRegisters* fenced_registers(Lane& lane, const void* address) {
  for (FencedRegisters& registers : lane.registers) {
    if (registers.address == address) return &registers;
  }
  return nullptr;
}

// Give a thread the sums of its products, unless more are under way.
inline void finish_sums(Lane& lane, Sums& sums) {
  if (--sums.products) return;
  const size_t bytes = sums.values.size() * sizeof(float);
  for (size_t i = 0; i < bytes; i++) {
    if (reinterpret_cast<unsigned char*>(sums.registers)[i] != POISON) fail("sums of a product under way were touched");
  }
  memcpy(sums.registers, sums.values.data(), bytes);
  if (FencedRegisters* known = fenced_registers(lane, sums.registers)) {
    memcpy(known->bytes.data(), sums.registers, bytes);
  }
  for (auto place = lane.sums.begin(); place != lane.sums.end(); ++place) {
    if (&*place == &sums) {
      lane.sums.erase(place);
      return;
    }
  }
}

// Complete a warp's part of the warpgroup's products up to a number.
inline void complete_products(Warpgroup& warpgroup, unsigned stop, int warp) {
  for (unsigned number = warpgroup.first; number < stop; number++) {
    StartedProduct& product = warpgroup.products[number - warpgroup.first];
    if (product.done[warp]) continue;
    product.compute(product, warp);
    product.done[warp] = true;
    for (int lane = 0; lane < WARP_LANES; lane++) {
      auto& part = product.of[warp * WARP_LANES + lane];
      finish_sums(*part.lane, *part.sums);
    }
  }
  const auto is_done = [](const StartedProduct& product) {
    bool done = true;
    for (bool part : product.done) done = done && part;
    return done;
  };
  while (!warpgroup.products.empty() && is_done(warpgroup.products.front())) {
    warpgroup.products.pop_front();
    warpgroup.first++;
  }
}

inline void check_fenced(Lane& lane, const void* address, size_t bytes) {
  if (const FencedRegisters* known = fenced_registers(lane, address)) {
    if (memcmp(known->bytes.data(), address, bytes)) fail("registers of a product changed after the last fence");
  } else {
    const unsigned char* first = static_cast<const unsigned char*>(address);
    lane.registers.push_back({address, std::vector<unsigned char>(first, first + bytes)});
  }
}

inline Sums& sums_of(Lane& lane, float* registers, size_t count, bool accumulates) {
  for (Sums& sums : lane.sums) {
    if (sums.registers == registers) {
      if (sums.values.size() != count) fail("sums of another shape are under way in the same registers");
      return sums;
    }
  }
  if (accumulates) check_fenced(lane, registers, count * sizeof(float));
  lane.sums.push_back({registers, std::vector<float>(registers, registers + count), 0});
  memset(registers, POISON, count * sizeof(float));
  return lane.sums.back();
}

template <class Stored, int N, bool TRANSPOSED>
inline void start_product(float* registers, const unsigned* left, const Operands& operands) {
  Lane& lane = own_lane();
  Warpgroup& warpgroup = own_warpgroup();
  if (!lane.fenced) fail("starts a product with no fence since the last wait for products");
  const unsigned place = lane.products++ - warpgroup.first;
  if (place == warpgroup.products.size()) {
    if (operands.left) check_matrix(operands.left, 64, false);
    check_matrix(operands.right, N, TRANSPOSED);
    warpgroup.products.emplace_back();
    StartedProduct& made = warpgroup.products.back();
    made.compute = compute_product<Stored, N, TRANSPOSED>, made.operands = operands, made.group = lane.groups.size();
  }
  StartedProduct& product = warpgroup.products[place];
  const Operands& others = product.operands;
  if (product.compute != compute_product<Stored, N, TRANSPOSED> || others.left != operands.left ||
      others.right != operands.right || others.accumulates != operands.accumulates ||
      product.group != lane.groups.size()) {
    fail("starts another product than other threads of its warpgroup");
  }
  if (left) check_fenced(lane, left, 4 * sizeof(unsigned));
  Sums& sums = sums_of(lane, registers, N / 2, operands.accumulates);
  sums.products++;
  product.of[thread_number() % WARPGROUP_LANES] = {&lane, &sums, left};
  if (++product.lanes == WARPGROUP_LANES && !is_late()) {
    for (int warp = 0; warp < WARPGROUP_WARPS; warp++) complete_products(warpgroup, lane.products, warp);
  }
}

inline void fence_registers() {
  Lane& lane = own_lane();
  lane.fenced = true;
  for (FencedRegisters& registers : lane.registers) {
    memcpy(registers.bytes.data(), registers.address, registers.bytes.size());
  }
}

inline bool products_are_started(const Thread& thread) {
  const Warpgroup& warpgroup = hopper.warpgroups[thread.index.x / WARPGROUP_LANES];
  if (thread.which <= warpgroup.first) return true;
  const unsigned last = thread.which - 1 - warpgroup.first;
  return last < warpgroup.products.size() && warpgroup.products[last].lanes == WARPGROUP_LANES;
}

inline void wait_for_products_but(int pending) {
  together(nullptr, pending, [](Thread*) {});
  Lane& lane = own_lane();
  const size_t groups = lane.groups.size();
  const unsigned stop = groups > static_cast<size_t>(pending) ? lane.groups[groups - 1 - pending] : 0;
  if (stop <= lane.waited_for) return;
  wait_until(
      products_are_started,
      [](const Thread&) { record("waits for products that the rest of its warpgroup does not start"); }, stop);
  complete_products(own_warpgroup(), stop, thread_number() % WARPGROUP_LANES / WARP_LANES);
  lane.waited_for = stop;
  lane.fenced = false;
}

struct Uniform {
  int given;
  int* taken;
};

// Stored matrices

struct MatrixStore {
  unsigned address;
  unsigned words[4];
};

inline void resolve_matrix_store(Thread* lanes) {
  const auto of = [&](int lane) { return static_cast<const MatrixStore*>(lanes[lane].operands); };
  for (int lane = 0; lane < WARP_LANES; lane++) {
    const unsigned address = of(lane)->address;
    block.running = &lanes[lane];
    if (address % CHUNK_BYTES || address + CHUNK_BYTES > block.shared_bytes) {
      return record("store of a matrix's row at byte %u of shared memory", address);
    }
    unsigned row[4];
    for (int i = 0; i < 4; i++) row[i] = of(lane % 8 * 4 + i)->words[lane / 8];
    memcpy(shared_bytes() + address, row, sizeof row);
    const unsigned chunk = address / CHUNK_BYTES, warp = lanes[0].index.x / WARP_LANES;
    Unpublished& mark = hopper.unpublished[chunk];
    mark = {warp, (mark.warp == warp ? mark.lanes : 0) | 15u << lane % 8 * 4};
    for (int i = 0; i < 4; i++) hopper.lanes[lanes[lane % 8 * 4 + i].index.x].stored.push_back(chunk);
  }
}

inline void publish_stored() {
  Lane& lane = own_lane();
  for (unsigned chunk : lane.stored) {
    Unpublished& mark = hopper.unpublished[chunk];
    if (mark.warp == thread_number() / WARP_LANES) mark.lanes &= ~(1u << thread_number() % WARP_LANES);
  }
  lane.stored.clear();
}

// The block

inline void start_hopper_block() {
  const size_t threads = block.threads.size();
  hopper = Hopper();
  hopper.unpublished.resize(block.shared.size() * sizeof(float4) / CHUNK_BYTES);
  hopper.lanes.resize(threads);
  // As many registers as the launch gives every thread, all of them given out.
  hopper.warps.resize(threads / WARP_LANES);
  for (Warp& warp : hopper.warps) warp.registers = min(256, REGISTERS / static_cast<int>(threads) / 8 * 8);
  hopper.warpgroups.resize((threads + WARPGROUP_LANES - 1) / WARPGROUP_LANES);
}

inline bool is_awaited(const BoxCopy& copy) {
  for (const Thread& thread : block.threads) {
    const bool waits = thread.state == State::waiting && thread.is_over == phase_is_over;
    if (waits && thread.which >> 1 == copy.barrier) return true;
  }
  return false;
}

// Complete a copy to shared memory: one that a thread waits for, when no thread can run; in random order also others,
// now and then.
inline bool go_on_with_hopper(bool starved) {
  std::vector<BoxCopy>& loads = hopper.loads;
  if (!starved && (block.order != Order::random || next_random() % 8)) return false;
  std::vector<size_t> candidates;
  for (size_t i = 0; i < loads.size(); i++) {
    if (!starved || is_awaited(loads[i])) candidates.push_back(i);
  }
  if (candidates.empty()) return false;
  const size_t count = candidates.size();
  const size_t last = block.order == Order::forward ? 0 : block.order == Order::reverse ? count - 1 : next_random() % count;
  const BoxCopy copy = loads[candidates[last]];
  loads.erase(loads.begin() + candidates[last]);
  land_box(copy);
  return true;
}

inline void end_hopper_thread() {
  const Lane& lane = own_lane();
  if (!lane.sums.empty()) fail("ends with products under way");
  if (!lane.open_stores.empty() || !lane.store_groups.empty()) fail("ends with stores that may still read");
}

inline void end_hopper_block() {
  if (!hopper.loads.empty()) record("the block ends with %zu copies under way", hopper.loads.size());
  for (size_t i = 0; i < hopper.warps.size(); i++) {
    block.running = &block.threads[i * WARP_LANES];
    if (hopper.warps[i].changes != hopper.warps[i / WARPGROUP_WARPS * WARPGROUP_WARPS].changes) {
      return record("its warp changes its registers otherwise than the first of its warpgroup");
    }
  }
}

constexpr Extension HOPPER = {start_hopper_block, go_on_with_hopper, end_hopper_thread, end_hopper_block};
inline const bool hopper_is_extension = (extension = &HOPPER, true);

}  // namespace cpu

// The functions of hopper.cuh

inline void init_barrier(Barrier* barrier, int arrivals) {
  const unsigned address = shared_address(barrier);
  if (address % sizeof(Barrier) || address + sizeof(Barrier) > cpu::block.shared_bytes || arrivals < 1) {
    cpu::fail("a barrier of %d arrivals at byte %u of shared memory", arrivals, address);
  }
  const cpu::BarrierState state = {arrivals, arrivals, 0, 0, cpu::thread_number(), false, 0};
  if (!cpu::hopper.barriers.insert({address, state}).second) {
    cpu::fail("the barrier of byte %u is initialised twice", address);
  }
  cpu::keep_barrier(address, state);
}

inline void publish_barriers() {
  for (auto& barrier : cpu::hopper.barriers) {
    cpu::BarrierState& state = barrier.second;
    if (state.maker == cpu::thread_number() && !state.published) {
      state.published = true, state.barriers = cpu::block.barriers;
    }
  }
}

inline void arrive(Barrier* barrier) { cpu::arrive_at(shared_address(barrier), 0); }

inline void arrive_expecting(Barrier* barrier, unsigned bytes) { cpu::arrive_at(shared_address(barrier), bytes); }

inline void wait(Barrier* barrier, unsigned parity) {
  const uint64_t address = shared_address(barrier);
  cpu::barrier_at(address, "waits");
  cpu::wait_until(cpu::phase_is_over, cpu::complain_of_phase, address << 1 | (parity & 1));
}

inline void sync_named(int number, int threads) {
  cpu::meet_named(number, threads);
  cpu::wait_for_named(number);
}

inline void arrive_named(int number, int threads) { cpu::meet_named(number, threads); }

inline int uniform(int number) {
  int taken;
  const cpu::Uniform given = {number, &taken};
  cpu::together(&given, 0, [](cpu::Thread* lanes) {
    const auto of = [&](int lane) { return static_cast<const cpu::Uniform*>(lanes[lane].operands); };
    for (int lane = 0; lane < cpu::WARP_LANES; lane++) {
      *of(lane)->taken = of(0)->given;
      cpu::block.running = &lanes[lane];
      if (of(lane)->given != of(0)->given) return cpu::record("has a number that other lanes do not have");
    }
  });
  return taken;
}

inline void prefetch_map(const TensorMap* map) { cpu::read_map(map); }

inline void start_box_load(
    void* shared, const TensorMap* map, Barrier* barrier, Reuse, int column, int row, int head, int batch) {
  cpu::start_load(shared, map, barrier, {column, row, head, batch});
}

inline void start_box_load(
    void* shared, const TensorMap* map, Barrier* barrier, Reuse, int column, int first, int second, int third,
    int fourth) {
  cpu::start_load(shared, map, barrier, {column, first, second, third, fourth});
}

inline void start_box_store(const TensorMap* map, const void* shared, int column, int row, int head, int batch) {
  cpu::start_store(map, shared, {column, row, head, batch});
}

inline void start_box_store(
    const TensorMap* map, const void* shared, int column, int first, int second, int third, int fourth) {
  cpu::start_store(map, shared, {column, first, second, third, fourth});
}

inline void commit_stores() {
  cpu::Lane& lane = cpu::own_lane();
  lane.store_groups.push_back(lane.open_stores);
  lane.open_stores.clear();
}

template <int PENDING>
inline void wait_for_store_reads() {
  cpu::wait_for_stores_but(PENDING);
}

inline void wait_for_stores() { cpu::wait_for_stores_but(0); }

inline void publish_to_copies() { cpu::publish_stored(); }

template <int REGISTERS>
inline void shrink_registers() {
  cpu::change_registers(REGISTERS, false);
}

template <int REGISTERS>
inline void grow_registers() {
  cpu::change_registers(REGISTERS, true);
}

inline void store_matrices(void* shared, unsigned first, unsigned second, unsigned third, unsigned fourth) {
  const cpu::MatrixStore given = {shared_address(shared), {first, second, third, fourth}};
  cpu::together(&given, 0, cpu::resolve_matrix_store);
}

inline void fence_products() { cpu::fence_registers(); }

inline void commit_products() {
  cpu::Lane& lane = cpu::own_lane();
  lane.groups.push_back(lane.products);
}

template <int PENDING>
inline void wait_for_products() {
  cpu::wait_for_products_but(PENDING);
}

inline bool any_lane(bool given) {
  cpu::block.running->given = given;
  cpu::together(nullptr, 0, [](cpu::Thread* lanes) {
    float any = 0.0f;
    for (int lane = 0; lane < cpu::WARP_LANES; lane++) any = lanes[lane].given != 0.0f ? 1.0f : any;
    for (int lane = 0; lane < cpu::WARP_LANES; lane++) lanes[lane].taken = any;
  });
  return cpu::block.running->taken != 0.0f;
}

template <int COUNT>
inline void settle(float (&)[COUNT]) {}

template <class Stored, int N, bool TRANSPOSED>
struct Product {
  static_assert(N % 16 == 0 && N >= 64 && N <= 256, "hopper.cuh has these products");

  static void start(float (&sums)[N / 2], unsigned long long left, unsigned long long right, bool accumulates) {
    cpu::start_product<Stored, N, TRANSPOSED>(sums, nullptr, {left, right, accumulates});
  }

  static void start(float (&sums)[N / 2], const unsigned* left, unsigned long long right, bool accumulates) {
    cpu::start_product<Stored, N, TRANSPOSED>(sums, left, {0, right, accumulates});
  }
};
