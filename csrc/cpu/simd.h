// A vector of lanes and what the attention kernel does with it, in the compilers' vector extension.
//
// To be included inside the target region of an instruction set: all is in an anonymous namespace,
// so no function of one set can stand in for that of another.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace impure_fast {
namespace {

struct Bfloat16 {
  uint16_t bits;
};

inline float widen(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

inline Bfloat16 narrow(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

constexpr float kShift = 12582912;  // 1.5 * 2^23: a number added to it is rounded to an integer

// kSums: how many vectors of running sums the registers hold beside the factors.
template <class RealT, int kLanesT, int kSumsT>
struct Simd {
  using Real = RealT;
  using Integer = std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>;
  typedef Real Vector __attribute__((vector_size(sizeof(Real) * kLanesT)));
  typedef Integer Integers __attribute__((vector_size(sizeof(Real) * kLanesT)));
  static constexpr int kLanes = kLanesT, kSums = kSumsT;
  static constexpr int kPair = 1;        // elements in a word, the unit of a factor
  static constexpr bool kTiled = false;  // true: has its own product, between Shapes' life
  struct Shapes {};
  static constexpr bool kSplits = false;  // true: has fraction, times_power(p, x) = p 2^floor(x)

  static Vector load(const void* from) {
    Vector x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
  }
  static void store(void* to, Vector x) { __builtin_memcpy(to, &x, sizeof x); }

  // The first bytes of a vector, the rest zero.
  static Vector load_part(const void* from, int64_t bytes) {
    Vector x{};
    __builtin_memcpy(&x, from, bytes);
    return x;
  }
  static void store_part(void* to, Vector x, int64_t bytes) { __builtin_memcpy(to, &x, bytes); }

  static Vector multiply_add(Vector sum, Real factor, Vector x) { return sum + factor * x; }
  static Vector max(Vector a, Vector b) { return a > b ? a : b; }
  static Vector min(Vector a, Vector b) { return a < b ? a : b; }

  // a0 b0 a1 b1 ... of the lower or the upper halves.
  template <int kUpper>
  static Vector interleave(Vector a, Vector b) {
    return interleave<kUpper>(a, b, std::make_integer_sequence<int, kLanes>());
  }

  // p 2^n, where n lies in the low bits of shifted = n + 1.5 * 2^23.
  static Vector scale_by_power(Vector p, Vector shifted) {
    p = (Vector)((Integers)p + ((Integers)shifted << 23));
    return shifted < kShift - 126 ? Vector{} : p;
  }

  static void store_narrow(Bfloat16* to, Vector x) {
    for (int i = 0; i < kLanes; ++i) to[i] = narrow(x[i]);
  }

  // A word of (low, high) in every lane; only where kPair is 2.
  static Vector pack(Vector low, Vector) { return low; }

 private:
  template <int kUpper, int... kIndex>
  static Vector interleave(Vector a, Vector b, std::integer_sequence<int, kIndex...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b,
                                   (kUpper * kLanes / 2 + kIndex / 2 + kIndex % 2 * kLanes)...);
#else
    return __builtin_shuffle(a, b,
                             Integers{(kUpper * kLanes / 2 + kIndex / 2 + kIndex % 2 * kLanes)...});
#endif
  }
};

// 2^(x c), for x c <= 0 up to rounding.
template <class S>
inline typename S::Vector exp2(typename S::Vector x, typename S::Real c) {
  if constexpr (sizeof(c) == 8) {
    for (int i = 0; i < S::kLanes; ++i) x[i] = __builtin_exp2(x[i] * c);
    return x;
  } else if constexpr (S::kSplits) {  // 2^0 is 1, as of the largest score
    const auto t = x * c, f = S::fraction(t), f2 = f * f;
    if constexpr (S::kPair == 2) {  // relative error 3e-6, for results that will be bf16
      const auto p = 0.0134266844f * f2 + (0.0522424740f * f + 0.2412802049f);
      return S::times_power(p * f2 + (0.6930448449f * f + 1), t);
    } else {  // 1e-7
      const auto p = (0.0018671301f * f + 0.0090170303f) * f2 + (0.0557999131f * f + 0.2401644502f);
      return S::times_power(p * f2 + (0.6931513118f * f + 1), t);
    }
  } else {  // 2^n polynomial(f), x c = n + f; in short chains, whose length is what they cost
    const auto shifted = x * c + kShift, f = x * c - (shifted - kShift), f2 = f * f;
    auto p = (0.0013276472f * f + 0.0096755405f) * f2 + (0.0555071309f * f + 0.2402212024f);
    p = p * f2 + (0.6931469440f * f + 1.0000001192f);  // relative error 1e-7
    return S::scale_by_power(p, shifted);
  }
}

template <class S>
inline typename S::Vector log(typename S::Vector x) {  // x > 0, normal
  if constexpr (sizeof(typename S::Real) == 8) {
    for (int i = 0; i < S::kLanes; ++i) x[i] = __builtin_log(x[i]);
    return x;
  } else {  // x = 2^n m, m in [sqrt(1/2), sqrt(2)); log m = 2 atanh((m - 1) / (m + 1))
    using Vector = typename S::Vector;
    using Integers = typename S::Integers;
    const Integers n = ((Integers)x - 0x3f3504f3) >> 23;
    const Vector m = (Vector)((Integers)x - (n << 23));
    const Vector z = (m - 1) / (m + 1), z2 = z * z;
    const Vector series = (((z2 / 9 + 1 / 7.f) * z2 + 1 / 5.f) * z2 + 1 / 3.f) * z2 + 1;
    return __builtin_convertvector(n, Vector) * 0.693147181f + 2 * z * series;
  }
}

}  // namespace
}  // namespace impure_fast
