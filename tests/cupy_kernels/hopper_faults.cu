// Two products of a warpgroup on tiles that TMA brings, stored by TMA, for the tests of cpu_hopper.h:
// out = P B + P B with P = A B^T rounded, 64 x 64 each. Each fault is one misuse of the instructions.
#include "hopper.cuh"

constexpr int THREADS = 384;
constexpr int TILE_BYTES = 64 * SLAB_ROW_BYTES;
constexpr int BARRIERS_OFFSET = 3 * TILE_BYTES;
constexpr int SHARED_BYTES = BARRIERS_OFFSET + 64;
constexpr int WARPGROUP = 128;

struct Parameters {
  const bfloat16* a;
  const bfloat16* b;
  bfloat16* out;
  int fault;
  TensorMap a_map, b_map, out_map;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) faults(const __grid_constant__ Parameters parameters) {
  const int fault = parameters.fault;
  char* const shared = reinterpret_cast<char*>(shared_memory());
  char* const staged = shared + 2 * TILE_BYTES;
  Barrier* const full = reinterpret_cast<Barrier*>(shared + BARRIERS_OFFSET);
  Barrier* const spare = full + 1;
  const int warp = warp_index(), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    init_barrier(full, fault == NEVER_FULL ? 2 : 1);
    init_barrier(spare, 1);
    if (fault == INITIALISED_TWICE) init_barrier(full, 1);
    if (fault != NOT_PUBLISHED) publish_barriers();
    if (fault == USED_BEFORE_BARRIER) arrive(spare);
    if (fault == OVERWRITTEN) *spare = 0;
  }
  __syncthreads();

  if (warp < 4) {
    if (fault == TOO_FEW_REGISTERS) {
      shrink_registers<56>();
    } else if (fault != ONE_WARP_KEEPS_REGISTERS || warp != 2) {
      shrink_registers<24>();
    }
    if (threadIdx.x) return;
    prefetch_map(fault == NO_MAP ? reinterpret_cast<const TensorMap*>(&parameters) : &parameters.a_map);
    if (fault == OVERWRITTEN) arrive(spare);
    arrive_expecting(full, 2 * TILE_BYTES + (fault == TOO_MANY_BYTES ? 16 : fault == TOO_FEW_BYTES ? -16 : 0));
    if (fault == TOO_MANY_ARRIVALS) arrive(full);
    start_box_load(shared, &parameters.a_map, full, Reuse::ONCE, fault == OTHER_COLUMNS ? -8 : 0, 0, 0, 0);
    char* const to = shared + TILE_BYTES + (fault == NOT_ALIGNED ? 512 : fault == PAST_THE_END ? 2 * TILE_BYTES : 0);
    if (fault == OTHER_AXES) {
      start_box_load(to, &parameters.b_map, full, Reuse::ONCE, 0, 0, 0, 0, 0);
    } else {
      start_box_load(to, &parameters.b_map, full, Reuse::ONCE, 0, 0, 0, 0);
    }
    if (fault == STILL_LOADING) {
      arrive_expecting(spare, TILE_BYTES);
      start_box_load(staged, &parameters.a_map, spare, Reuse::ONCE, 0, 0, 0, 0);
    }
    return;
  }

  grow_registers<240>();
  if (warp >= 8) return;
  if (fault != NOT_AWAITED) wait(fault == NO_BARRIER ? spare + 1 : full, fault == OTHER_PARITY ? 1 : 0);
  const auto named = [&](int number) {
    sync_named(number, fault == PART_OF_A_WARP ? 48 : fault == OTHER_COUNT && warp == 5 ? 96 : WARPGROUP);
  };
  named(1);
  const int warp_row = uniform(warp % 4 * 16 + (fault == NOT_UNIFORM && warp == 7 && lane == 5));
  unsigned long long a = describe_matrix(shared_address(shared), 0);
  unsigned long long b = describe_matrix(shared_address(shared + TILE_BYTES), 0);
  if (fault == NO_SWIZZLE) a &= ~(3ull << 62);
  if (fault == INSIDE_A_PATTERN) a = moved_on(a, 128);
  if (fault == OTHER_STRIDE) b += 64ull << 32;
  if (fault == ANOTHER_MATRIX && warp == 6) b = a;

  float scores[32], out[32];
  unsigned p[16];
  if (fault == READS_STORED) store_matrices(shared + lane * SLAB_ROW_BYTES + warp % 4 * 16, 0, 0, 0, 0);
  if (fault != NO_FENCE) fence_products();
  for (int step = 0; step < 4; step++) {
    if (fault == ONE_WARP_MISSES && warp == 7 && step == 3) continue;
    Product<bfloat16, 64, false>::start(scores, moved_on(a, 32 * step), moved_on(b, 32 * step), step > 0);
  }
  commit_products();
  if (fault == SUMS_TOUCHED) scores[3] = 0.0f;
  if (fault == READ_TOO_EARLY) {
    for (int i = 0; i < 16; i++) p[i] = round_pair<bfloat16>(scores[2 * i], scores[2 * i + 1]);
  }
  wait_for_products<0>();
  if (fault != READ_TOO_EARLY) {
    for (int i = 0; i < 16; i++) p[i] = round_pair<bfloat16>(scores[2 * i], scores[2 * i + 1]);
  }
  const unsigned long long values = describe_matrix(shared_address(shared + TILE_BYTES), TILE_BYTES);
  for (int turn = 0; turn < 2; turn++) {
    if (fault != NO_SECOND_FENCE || turn == 0) fence_products();
    if (fault == CHANGED_AFTER_FENCE && turn == 1) p[5] ^= 1;
    for (int step = 0; step < 4; step++) {
      Product<bfloat16, 64, true>::start(
          out, p + 4 * step, moved_on(values, step * 16 * SLAB_ROW_BYTES), turn > 0 || step > 0);
    }
    commit_products();
    if (fault == CHANGED_UNDER_WAY && turn == 1) p[5] = 0;
    if (turn == 0) wait_for_products<0>();
  }
  if (fault != NOT_FINISHED) wait_for_products<0>();

  for (int i = 0; i < 32; i += 8) {
    const int row = warp_row + lane % 16, chunk = i / 4 + lane / 16;
    store_matrices(
        staged + row * SLAB_ROW_BYTES + (chunk ^ row % 8) * 16, round_pair<bfloat16>(out[i], out[i + 1]),
        round_pair<bfloat16>(out[i + 2], out[i + 3]), round_pair<bfloat16>(out[i + 4], out[i + 5]),
        round_pair<bfloat16>(out[i + 6], out[i + 7]));
  }
  if (fault != RESULT_NOT_PUBLISHED) publish_to_copies();
  named(2);
  if (threadIdx.x == 128) {
    start_box_store(&parameters.out_map, staged, 0, 0, 0, 0);
    if (fault == STORED_TWICE) start_box_store(&parameters.out_map, staged, 0, 0, 0, 0);
    if (fault != STORE_NOT_COMMITTED) commit_stores();
  }
  if (fault == OVERWRITTEN_UNDER_WAY) {
    named(3);
    store_matrices(staged + (warp % 4 * 16 + lane % 16) * SLAB_ROW_BYTES + lane / 16 * 16, 0, 0, 0, 0);
    named(4);
  }
  if (threadIdx.x == 128 && fault != STORE_NOT_AWAITED) wait_for_store_reads<0>();
}
