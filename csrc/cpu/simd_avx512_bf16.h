// The vectors of AVX-512 BF16, whose words are pairs.  To be included inside its target region.
#pragma once

#include "cpu/simd_avx512.h"

namespace impure_fast {
namespace {

struct Pair8 : Float8 {
  static constexpr int kPair = 2;
  static Vector multiply_add(Vector sum, float factor, Vector x) {
    return (Vector)_mm256_dpbf16_ps((__m256)sum, (__m256bh)_mm256_set1_ps(factor), (__m256bh)x);
  }
  static void store_narrow(Bfloat16* to, Vector x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), (__m128i)_mm256_cvtneps_pbh((__m256)x));
  }
  static Vector pack(Vector low, Vector high) {
    const __m256i order = _mm256_set_epi16(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
    const __m256i packed = (__m256i)_mm256_cvtne2ps_pbh((__m256)high, (__m256)low);
    return (Vector)_mm256_permutexvar_epi16(order, packed);
  }
};

struct Pair16 : Float16 {
  using Half = Pair8;
  static constexpr int kPair = 2;
  static Vector multiply_add(Vector sum, float factor, Vector x) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(factor), (__m512bh)x);
  }
  static void store_narrow(Bfloat16* to, Vector x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
  }
  static Vector pack(Vector low, Vector high) {
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i packed = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    return (Vector)_mm512_permutexvar_epi16(order, packed);
  }
};

}  // namespace
}  // namespace impure_fast
