// csrc/cuda/device.cuh for a CPU: the kernels' source, unchanged, one fibre a CUDA thread.
//
// Found first on the include path.  Rounding inside mma differs from a GPU's (here it is fp32, in
// order); there is no memory model and no speed.
#pragma once

#include <bit>
#include <cmath>

#include "fibres.h"

using std::max;
using std::min;

namespace impure_fast {
namespace on_cpu {

inline void check_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) fail("an address is no multiple of 16");
}

inline float from_bf16(uint32_t x) { return std::bit_cast<float>(x << 16); }
inline float from_f16(uint32_t x) {
  return static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(x)));
}
inline uint32_t to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t to_f16(float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }

// c += a b of the fragments in device.cuh's head, `depth` elements of 32 / depth bytes deep.
template <int kDepth, class Convert>
void mma(const char* name, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         Convert convert) {
  struct Operands {
    float c[4];
    uint32_t a[4], b[2];
  } mine;
  std::copy_n(c, 4, mine.c), std::copy_n(a, 4, mine.a), std::copy_n(b, 2, mine.b);
  mine = collective(name, mine, [&](Operands* lanes) {
    constexpr int kPack = kDepth / 8;  // elements of a register
    float left[16][kDepth], right[kDepth][8], product[16][8];
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int g = lane / 4, t = lane % 4;
        product[g + i / 2 * 8][2 * t + i % 2] = lanes[lane].c[i];
        for (int e = 0; e < kPack; ++e) {
          const int k = t * kPack + e;
          left[g + i % 2 * 8][k + i / 2 * 4 * kPack] = convert(lanes[lane].a[i], e);
          if (i < 2) right[k + i * 4 * kPack][g] = convert(lanes[lane].b[i], e);
        }
      }
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < kDepth; ++k)
        for (int column = 0; column < 8; ++column)
          product[row][column] += left[row][k] * right[k][column];
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < 4; ++i)
        lanes[lane].c[i] = product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  });
  std::copy_n(mine.c, 4, c);
}

inline void load_matrices(const char* name, uint32_t (&x)[4], const void* row, bool transposed) {
  union Operands {
    const uint16_t* row;
    uint32_t x[4];
  } mine{static_cast<const uint16_t*>(row)};
  check_aligned(row);
  mine = collective(name, mine, [&](Operands* lanes) {
    uint16_t matrix[4][8][8];
    int columns[4] = {};  // of the 32 banks, in use
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto offset = reinterpret_cast<const char*>(lanes[lane].row) - block.shared.get();
      columns[lane / 8] |= 1 << offset / 16 % 8;
      std::memcpy(matrix[lane / 8][lane % 8], lanes[lane].row, 16);
    }
    if (std::count(columns, columns + 4, 0xff) != 4) fail("ldmatrix meets a bank twice");
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int g = lane / 4, t = lane % 4 * 2;
        const auto& m = matrix[i];
        lanes[lane].x[i] = transposed ? m[t][g] | m[t + 1][g] << 16 : m[g][t] | m[g][t + 1] << 16;
      }
  });
  std::copy_n(mine.x, 4, x);
}

}  // namespace on_cpu

inline char* dynamic_shared() { return on_cpu::block.shared.get(); }

inline float shuffle(float x, int source) {
  struct Operands {
    float x;
    int source;
  };
  const int from = on_cpu::fault("lane") ? source ^ 4 : source;
  return on_cpu::collective("shuffle", Operands{x, from},
                            [](Operands* lanes) {
                              float values[on_cpu::kLanes];
                              for (int lane = 0; lane < on_cpu::kLanes; ++lane)
                                values[lane] = lanes[lane].x;
                              for (int lane = 0; lane < on_cpu::kLanes; ++lane)
                                lanes[lane].x = values[lanes[lane].source % on_cpu::kLanes];
                            })
      .x;
}
inline float shuffle_xor(float x, int mask) { return shuffle(x, threadIdx.x % 32 ^ mask); }

inline void copy_async(void* shared, const void* global, bool valid) {
  on_cpu::check_aligned(shared), on_cpu::check_aligned(global);
  const char* from = static_cast<const char*>(global);
  if (valid && on_cpu::fault("index")) from += 16;
  on_cpu::block.fibres[threadIdx.x].copies.push_back([=] {
    if (valid)
      std::memcpy(shared, from, 16);
    else
      std::memset(shared, 0, 16);
  });
}
inline void copy_wait() {
  if (on_cpu::fault("wait")) return;
  auto& copies = on_cpu::block.fibres[threadIdx.x].copies;
  for (const auto& copy : copies) copy();
  copies.clear();
}

inline void load_matrices(uint32_t (&x)[4], const void* row) {
  on_cpu::load_matrices("load_matrices", x, row, false);
}
inline void load_matrices_transposed(uint32_t (&x)[4], const void* row) {
  on_cpu::load_matrices("load_matrices_transposed", x, row, true);
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  on_cpu::mma<16>("mma_bf16", c, a, b,
                  [](uint32_t x, int e) { return on_cpu::from_bf16(x >> 16 * e & 0xffff); });
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  on_cpu::mma<16>("mma_f16", c, a, b,
                  [](uint32_t x, int e) { return on_cpu::from_f16(x >> 16 * e); });
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  on_cpu::mma<8>("mma_tf32", c, a, b, [](uint32_t x, int) { return std::bit_cast<float>(x); });
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline uint32_t pack_bf16(float low, float high) {
  return on_cpu::to_bf16(low) | on_cpu::to_bf16(high) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return on_cpu::to_f16(low) | on_cpu::to_f16(high) << 16;
}
inline float2 unpack_bf16(uint32_t x) {
  return {on_cpu::from_bf16(x & 0xffff), on_cpu::from_bf16(x >> 16)};
}
inline float2 unpack_f16(uint32_t x) { return {on_cpu::from_f16(x), on_cpu::from_f16(x >> 16)}; }
inline uint32_t round_tf32(uint32_t x) { return (x + 0x1000) & ~0x1fffu; }
inline float as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t as_bits(float x) { return std::bit_cast<uint32_t>(x); }

struct Device {
  int arch, shared_bytes, multiprocessors;
};
inline Device current_device() {  // ARCH=80, 86 or 90
  const char* wish = std::getenv("ARCH");
  const int arch = wish ? std::atoi(wish) : 90;
  return {arch, (arch == 80 ? 163 : arch == 86 ? 99 : 227) * 1024, 4};
}

template <class Arguments>
const char* launch(void (*kernel)(Arguments), int64_t blocks_x, int blocks_y, int threads,
                   int shared_bytes, void*, const Arguments& arguments) {
  if (shared_bytes > current_device().shared_bytes) return "too much shared memory is asked for";
  on_cpu::block.body = [&] { kernel(arguments); };
  blockDim = {threads, 1};
  for (blockIdx.y = 0; blockIdx.y < blocks_y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < blocks_x; ++blockIdx.x) {
      on_cpu::block.shared.reset(new char[shared_bytes]);
      std::memset(on_cpu::block.shared.get(), 0xff, shared_bytes);  // NaN in every format
      on_cpu::run_block(threads);
    }
  return nullptr;
}

}  // namespace impure_fast

inline void __syncthreads() {
  if (!impure_fast::on_cpu::fault("barrier"))
    impure_fast::on_cpu::wait(impure_fast::on_cpu::State::kAtBlock, "the block");
}
inline void __syncwarp() {
  if (!impure_fast::on_cpu::fault("warp_barrier"))
    impure_fast::on_cpu::collective("the warp barrier", 0, [](int*) {});
}
