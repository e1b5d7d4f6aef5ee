// The bf16 kernels with their products in AMX tiles; packing and softmax in AVX-512 BF16.
//
// Backward is the general one.  Forward has lanes over keys, so that queries, weights and
// sums lie as tiles take and give them.  The tiles' unit falls asleep when it rests, wakes slowly,
// and while awake takes a port of the vectors' arithmetic: so a strip's values and the next one's
// scores are multiplied in one go.
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
        const Factor<float> part{a.data + i * a.row, a.row, 1};
        const Rows2D<float> right{b.data + at, b.row}, to{c[i] + at, c.row};
        if (tall) {
          wide ? block<2, 2>(length, part, right, to, add)
               : block<2, 1>(length, part, right, to, add);
        } else {
          wide ? block<1, 2>(length, part, right, to, add)
               : block<1, 1>(length, part, right, to, add);
        }
      }
    }
  }

 private:
  // Up to 2 x 2 tiles of C, so that every tile of A and of B is used twice: C in tiles 0 to 3,
  // A in 4 and 5, B in 6 and 7.
  template <int kTall, int kWide>
  __attribute__((always_inline)) static void block(int64_t length, Factor<float> a, Rows2D<float> b,
                                                   Rows2D<float> c, bool add) {
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

// Forward, by strips of 32 queries: as many as the product takes at once.
class Strips : Head<Tile16, Bfloat16> {
 public:
  static void forward(const AttentionProblem& p, const AttentionArrays& x, int64_t begin,
                      int64_t end) {
    Strips strips(p, x);
    const Tile16::Shapes shapes;
    strips.run(begin, end);
  }

 private:
  using Tile = Tile16;
  static constexpr int64_t kSide = Tile::kSide, kStrip = 2 * kSide;

  struct Strip {
    int64_t task, first, queries;  // no queries: no strip
    float norm[kStrip];            // 1 / the sum of a query's weights
  };

  Strips(const AttentionProblem& problem, const AttentionArrays& arrays) : Head(problem, arrays) {
    carve(reinterpret_cast<uintptr_t>(attention_scratch(carve(0))));
  }

  uintptr_t carve(uintptr_t base) {
    Carver block{base};
    const auto take = [&](int64_t rows, int64_t row) {
      return Matrix{block.take<Real>(rows * row), row};
    };
    const int64_t keys = round_up(p_.keys, kUnit), row = keys + kSide;  // an odd number of lines
    scores_ = take(kStrip, row);
    for (Matrix& values : values_) values = take(keys / 2, 2 * words_);
    k_lanes_ = take(words_, row);
    v_ = take(keys, words_);
    q_ = take(kStrip, words_);
    sums_ = take(kStrip, 2 * words_);
    return block.at;
  }

  void run(int64_t begin, int64_t end) {
    const int64_t in_task = (p_.queries + kStrip - 1) / kStrip, count = (end - begin) * in_task;
    Strip last = {}, now = {};
    for (int64_t i = 0; i <= count; ++i, last = now) {
      now.queries = 0;
      if (i < count) {
        const int64_t task = begin + i / in_task, strip = i % in_task;
        if (strip == 0) touch(task, begin, end, false), open(task);
        now.task = task, now.first = strip * kStrip;
        now.queries = smaller(kStrip, p_.queries - now.first);
        pack(tokens(x_.q, p_.q, task / p_.heads, task % p_.heads), now.queries, q_, now.first);
      }
      if (last.queries) {
        Tile::multiply(last.queries, sums_.row, round_up(p_.keys, kUnit) / 2,
                       {scores_.data, scores_.row, 1}, values_[last.task % 2], sums_, false);
      }
      if (now.queries) {
        Tile::multiply(now.queries, p_.keys, words_, {q_.data, q_.row, 1}, k_lanes_, scores_,
                       false);
      }
      if (last.queries) write(last);
      if (now.queries) weigh(now);
    }
  }

  // Packs a task's keys and values.
  void open(int64_t task) {
    const int64_t sequence = task / p_.heads, head = task % p_.heads;
    pack_lanes<Tile>(tokens(x_.k, p_.k, sequence, head), 0, p_.keys, k_lanes_);
    pack(tokens(x_.v, p_.v, sequence, head), p_.keys, v_);
    pair_rows(v_, p_.keys, values_[task % 2]);
  }

  // Scores -> unnormalised weights in their place, as words of keys; norm and log-sum-exp.
  void weigh(Strip& strip) {
    const bool negative = p_.scale < 0;
    const auto pick = [&](auto a, auto b) { return negative ? Tile::min(a, b) : Tile::max(a, b); };
    const int64_t whole = p_.keys / kSide * kSide, rest = p_.keys % kSide;
    for (int64_t first = 0; first < strip.queries; first += kSide) {
      const int64_t rows = smaller(kSide, strip.queries - first);
      Vector peaks[kSide] = {}, sums[kSide] = {};
      for (int64_t row = 0; row < rows; ++row) {
        const float* const scores = scores_[first + row];
        Vector most = Vector{} + scores[0];
        for (int64_t at = 0; at < whole; at += kSide) most = pick(most, Tile::load(scores + at));
        if (rest) most = pick(most, inside(Tile::load(scores + whole), rest, scores[0]));
        peaks[row] = most;
      }
      const Vector peak = across(peaks, pick);
      for (int64_t row = 0; row < rows; ++row) sums[row] = weigh(scores_[first + row], peak[row]);
      const Vector sum = across(sums, [](auto a, auto b) { return a + b; });
      Tile::store(strip.norm + first, 1 / sum);
      const int64_t query = strip.task * p_.queries + strip.first + first;
      const Vector value = peak * static_cast<float>(p_.scale) + log<Tile>(sum);
      store_elements<Tile>(static_cast<float*>(x_.lse) + query, value, rows);
    }
  }

  // One row's; the sums of its weights by lane.
  Vector weigh(float* scores, float peak) const {
    const float scale2 = static_cast<float>(p_.scale * kLog2E);
    Vector sum{};
    const auto weight = [&](int64_t at) {
      return exp2<Tile>(Tile::load(scores + at) - peak, scale2);
    };
    const auto store = [&](int64_t at, Vector low, Vector high) {
      sum += low + high;
      const auto pairs = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      Tile::store(scores + at / 2, (Vector)pairs);
    };
    int64_t at = 0;
    for (; at + kUnit <= p_.keys; at += kUnit) store(at, weight(at), weight(at + kSide));
    if (const int64_t left = p_.keys - at; left > 0) {
      const Vector low = inside(weight(at), left, 0);
      store(at, low, left > kSide ? inside(weight(at + kSide), left - kSide, 0) : Vector{});
    }
    return sum;
  }

  void write(const Strip& strip) const {
    const int64_t row = p_.heads * p_.width, sequence = strip.task / p_.heads;
    Bfloat16* to = static_cast<Bfloat16*>(x_.out) + strip.task % p_.heads * p_.width +
                   (sequence * p_.queries + strip.first) * row;
    for (int64_t i = 0; i < strip.queries; ++i, to += row) store_row(sums_[i], strip.norm[i], to);
  }

  // The first lanes of x, the others ``rest``.
  static Vector inside(Vector x, int64_t lanes, float rest) {
    const auto mask = static_cast<__mmask16>(_bzhi_u32(0xffff, lanes));
    return (Vector)_mm512_mask_blend_ps(mask, _mm512_set1_ps(rest), (__m512)x);
  }

  // Lane i: the lanes of x[i] joined.
  template <class Join>
  static Vector across(Vector (&x)[kSide], Join join) {
#pragma GCC unroll 4
    for (int n = kSide / 2; n; n /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) {
        x[i] = join(Tile::interleave<0>(x[i], x[i + n]), Tile::interleave<1>(x[i], x[i + n]));
      }
    }
    return x[0];
  }

  Matrix values_[2];  // [key word][width], of a task and of the next
  Matrix k_lanes_;    // [width word][key]
};

}  // namespace

const AttentionKernels kAttentionAmx = {{nullptr, Strips::forward, nullptr},
                                        {nullptr, Head<Tile16, Bfloat16>::backward, nullptr}};

}  // namespace impure_fast
#pragma GCC pop_options
#else
namespace impure_fast {
const AttentionKernels kAttentionAmx = {};
}
#endif
