// Two blocks of threads that divide the queries of a tile, and add up what each has of dV and dK.
//
// Each has every other query block. The first one ends with dV and the second with dK, so each
// sends the other half as much as it keeps. It goes where Q and dO were: those of the next tile are
// not fetched before its K is, which waits for the end of this one.
#pragma once
#include "sm90/bwd/consumer.cuh"
#include "sm90/ptx/cluster.cuh"

namespace flashcore::sm90::bwd {

template <class T>
struct Halves {
  // When this warp is past its last step.
  FC_DEVICE static void make_room(const Consumer<T>& c) {
    if (threadIdx.x == 128) c.sh.sums_ready.arrive_expect(T::kConsumers * T::kSumBytes);
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive_in(c.sh.peer_has_room, c.rank ^ 1);
  }

  // mine += what the other block has of it, which gets `others`. parity: of how many such sums
  // there have been.
  FC_DEVICE static void add_up(const Consumer<T>& c, typename T::GradientTile& mine,
                               const typename T::GradientTile& others, uint32_t parity) {
    constexpr int kQuads = T::kHeadDim / 8, kQuadBytes = 128 * 16;  // of a thread; of a consumer
    typename T::Shared& sh = c.sh;
    int const peer = c.rank ^ 1;
    sh.peer_has_room.wait(parity);
    char* const at = sh.q[0] + c.index * T::kSumBytes + threadIdx.x % 128 * 16;
    uint32_t const to = address_in(smem_address(at), peer);
    uint32_t const ready = address_in(smem_address(&sh.sums_ready), peer);
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
      store_x4_to(to + i * kQuadBytes, others[4 * i], others[4 * i + 1], others[4 * i + 2],
                  others[4 * i + 3], ready);
    sh.sums_ready.wait(parity);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      float4 const x = *reinterpret_cast<const float4*>(at + i * kQuadBytes);
      mine[4 * i] += x.x;
      mine[4 * i + 1] += x.y;
      mine[4 * i + 2] += x.z;
      mine[4 * i + 3] += x.w;
    }
    fence_async_shared();  // the copy engine writes here next
  }
};

}  // namespace flashcore::sm90::bwd
