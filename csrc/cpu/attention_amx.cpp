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
    for (int64_t at = 0; at < lanes; at += 2 * kSide) {
      const bool wide = lanes - at > kSide;
      for (int64_t i = 0; i < rows; i += 2 * kSide) {
        const bool tall = rows - i > kSide;
        const auto go = tall   ? (wide ? block<2, 2> : block<2, 1>)
                        : wide ? block<1, 2>
                               : block<1, 1>;
        go(length, {a.data + i * a.row, a.row, 1}, {b.data + at, b.row}, {c[i] + at, c.row}, add);
      }
    }
  }

 private:
  // Up to 2 x 2 tiles of C, so that every tile of A and of B is used twice: C in tiles 0 to 3,
  // A in 4 and 5, B in 6 and 7.
  template <int kTall, int kWide>
  static void block(int64_t length, Factor<float> a, Rows2D<float> b, Rows2D<float> c, bool add) {
    const auto each = [](auto work) {
      work(Number<0>(), Number<0>());
      if constexpr (kWide > 1) work(Number<0>(), Number<1>());
      if constexpr (kTall > 1) work(Number<1>(), Number<0>());
      if constexpr (kTall * kWide > 3) work(Number<1>(), Number<1>());
    };
    const auto sums = [&](int i, int j) { return c[i * kSide] + j * kSide; };
    each([&](auto i, auto j) {
      add ? load_tile<2 * i + j>(sums(i, j), c.row) : zero_tile<2 * i + j>();
    });
    for (int64_t j = 0; j < length; j += kSide, a.data += kSide, b.data += kSide * b.row) {
      load_factor<4>(a, length - j);
      if constexpr (kTall > 1) load_factor<5>({a.data + kSide * a.row, a.row, 1}, length - j);
      load_tile<6>(b.data, b.row);
      if constexpr (kWide > 1) load_tile<7>(b.data + kSide, b.row);
      each([](auto i, auto j) { add_product<2 * i + j, 4 + i, 6 + j>(); });
    }
    each([&](auto i, auto j) { store_tile<2 * i + j>(sums(i, j), c.row); });
  }

  template <int kNumber>
  using Number = std::integral_constant<int, kNumber>;

  template <int kTile>
  static void load_factor(Factor<float> a, int64_t words) {
    words < kSide ? load_part_factor<kTile>(a, words) : load_tile<kTile>(a.data, a.row);
  }
  template <int kTile>
  __attribute__((noinline)) static void load_part_factor(Factor<float> a, int64_t words) {
    alignas(64) float part[kSide][kSide];
    for (int64_t i = 0; i < kSide; ++i) {
      store(part[i], load_part(a.data + i * a.row, words * sizeof(float)));
    }
    load_tile<kTile>(part[0], kSide);
  }

  // The intrinsics take a tile's number as text alone, and do not say that they touch memory.
  template <int kTile>
  static void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  static void load_tile(const float* from, int64_t row) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(4 * row), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store_tile(float* to, int64_t row) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(4 * row), "i"(kTile) : "memory");
  }
  template <int kSum, int kA, int kB>
  static void add_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
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
