// The vectors of AVX-512.  To be included inside its target region, after <immintrin.h>.
#pragma once

#include "cpu/simd.h"

namespace impure_fast {
namespace {

struct Float8 : Simd<float, 8, 24> {
  static Vector load_part(const void* from, int64_t bytes) {
    return (Vector)_mm256_maskz_loadu_epi8(_bzhi_u32(~0u, bytes), from);
  }
  static constexpr bool kSplits = true;
  static Vector fraction(Vector x) {
    return (Vector)_mm256_maskz_reduce_ps(0xff, (__m256)x, _MM_FROUND_TO_NEG_INF);
  }
  static Vector times_power(Vector p, Vector x) {
    return (Vector)_mm256_maskz_scalef_ps(0xff, (__m256)p, (__m256)x);
  }
};

struct Float16 : Simd<float, 16, 24> {
  using Half = Float8;
  static Vector load_part(const void* from, int64_t bytes) {
    return (Vector)_mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, bytes), from);
  }
  static void store_part(void* to, Vector x, int64_t bytes) {
    _mm512_mask_storeu_epi8(to, _bzhi_u64(~0ull, bytes), (__m512i)x);
  }
  static constexpr bool kSplits = true;
  static Vector fraction(Vector x) {
    return (Vector)_mm512_maskz_reduce_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEG_INF);
  }
  static Vector times_power(Vector p, Vector x) {
    return (Vector)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)x);
  }
};

}  // namespace
}  // namespace impure_fast
