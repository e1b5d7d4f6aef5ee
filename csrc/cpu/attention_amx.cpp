// The bf16 kernels with their products in AMX tiles; packing and softmax in AVX-512 BF16.
#include "cpu/attention.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#include <immintrin.h>

#include <type_traits>
#include <utility>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,bmi2,prefer-vector-width=512")
#pragma GCC target("amx-tile,amx-bf16")
#include "cpu/attention_kernel.h"
#include "cpu/simd_avx512_bf16.h"

namespace impure_fast {
namespace {

struct Tile16 : Pair16 {
  using Half = Tile16;  // a tile of half vectors is multiplied no faster
  static constexpr bool kTiled = true;
  static constexpr int64_t kSide = 16;  // of a tile, in rows and in words

  // All tiles 16 x 16 words, for as long as it lives; other libraries find their own shapes again.
  class Shapes {
   public:
    Shapes() {
      alignas(64) Config own = {};
      own.palette = 1;
      for (int i = 0; i < 8; ++i) own.bytes[i] = 4 * kSide, own.rows[i] = kSide;
      _tile_storeconfig(&before_);
      _tile_loadconfig(&own);
    }
    ~Shapes() { _tile_loadconfig(&before_); }
    Shapes(const Shapes&) = delete;

   private:
    struct Config {
      uint8_t palette, start, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    };
    alignas(64) Config before_;
  };

  // Rows of A and C and rows of B are taken in whole tiles: what lies between ``rows`` and the next
  // 16 is memory of the matrix, and B's rows from ``length`` on are zero.  A's columns adjoin.
  __attribute__((noinline)) static void multiply(int64_t rows, int64_t lanes, int64_t length,
                                                 Factor<float> a, Rows2D<float> b, Rows2D<float> c,
                                                 bool add) {
    for (int64_t i = 0; i < rows; i += kSide) {
      for (int64_t at = 0; at < lanes; at += 4 * kSide) {
        const int64_t tiles = smaller(4, (lanes - at) / kSide);
        const auto go = tiles == 1   ? row_of_tiles<1>
                        : tiles == 2 ? row_of_tiles<2>
                        : tiles == 3 ? row_of_tiles<3>
                                     : row_of_tiles<4>;
        go(length, {a.data + i * a.row, a.row, a.column}, {b.data + at, b.row}, {c[i] + at, c.row},
           add);
      }
    }
  }

 private:
  // Sums in tiles 0 to 3, A in 4, B in 5 and 6.
  template <int kTiles>
  static void row_of_tiles(int64_t length, Factor<float> a, Rows2D<float> b, Rows2D<float> c,
                           bool add) {
    asm volatile("" ::: "memory");  // the intrinsics do not say that they read
    each<kTiles>(
        [&](auto tile) { add ? load_sums(tile, c.data + tile * kSide, c.row) : zero_sums(tile); });
    alignas(64) float part[kSide][kSide];
    for (int64_t j = 0; j < length; j += kSide, a.data += kSide, b.data += kSide * b.row) {
      const bool whole = j + kSide <= length;
      for (int64_t i = 0; !whole && i < kSide; ++i) {
        store(part[i], load_part(a.data + i * a.row, (length - j) * sizeof(float)));
      }
      asm volatile("" ::: "memory");
      _tile_loadd(4, whole ? a.data : part[0], 4 * (whole ? a.row : kSide));
      each<kTiles>([&](auto tile) { add_product(tile, b.data + tile * kSide, b.row); });
    }
    each<kTiles>([&](auto tile) { store_sums(tile, c.data + tile * kSide, c.row); });
  }

  template <int kTiles, class Work>
  static void each(Work work) {
    work(std::integral_constant<int, 0>());
    if constexpr (kTiles > 1) work(std::integral_constant<int, 1>());
    if constexpr (kTiles > 2) work(std::integral_constant<int, 2>());
    if constexpr (kTiles > 3) work(std::integral_constant<int, 3>());
  }

  // A tile's number is part of its instructions.
  template <int kTile>
  static void zero_sums(std::integral_constant<int, kTile>) {
    if constexpr (kTile == 0) _tile_zero(0);
    if constexpr (kTile == 1) _tile_zero(1);
    if constexpr (kTile == 2) _tile_zero(2);
    if constexpr (kTile == 3) _tile_zero(3);
  }
  template <int kTile>
  static void load_sums(std::integral_constant<int, kTile>, const float* from, int64_t row) {
    if constexpr (kTile == 0) _tile_loadd(0, from, 4 * row);
    if constexpr (kTile == 1) _tile_loadd(1, from, 4 * row);
    if constexpr (kTile == 2) _tile_loadd(2, from, 4 * row);
    if constexpr (kTile == 3) _tile_loadd(3, from, 4 * row);
  }
  template <int kTile>
  static void store_sums(std::integral_constant<int, kTile>, float* to, int64_t row) {
    if constexpr (kTile == 0) _tile_stored(0, to, 4 * row);
    if constexpr (kTile == 1) _tile_stored(1, to, 4 * row);
    if constexpr (kTile == 2) _tile_stored(2, to, 4 * row);
    if constexpr (kTile == 3) _tile_stored(3, to, 4 * row);
  }
  template <int kTile>
  static void add_product(std::integral_constant<int, kTile>, const float* from, int64_t row) {
    if constexpr (kTile % 2 == 0) {
      _tile_loadd(5, from, 4 * row);
    } else {
      _tile_loadd(6, from, 4 * row);
    }
    if constexpr (kTile == 0) _tile_dpbf16ps(0, 4, 5);
    if constexpr (kTile == 1) _tile_dpbf16ps(1, 4, 6);
    if constexpr (kTile == 2) _tile_dpbf16ps(2, 4, 5);
    if constexpr (kTile == 3) _tile_dpbf16ps(3, 4, 6);
  }
};

}  // namespace

const AttentionKernels kAttentionAmx = {{nullptr, Head<Tile16, Bfloat16>::forward, nullptr},
                                        {nullptr, Head<Tile16, Bfloat16>::backward, nullptr}};

}  // namespace impure_fast
#pragma GCC pop_options
#else
namespace impure_fast {
const AttentionKernels kAttentionAmx = {};
}
#endif
