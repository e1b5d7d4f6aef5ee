// Philox words and Box-Muller, some blocks at a time in plain loops: the compiler makes vectors of
// them for each instruction set, and the loader chooses the set.
#include "cpu/noise.h"

#include <bit>
#include <cmath>

#include "cpu/clones.h"

namespace impure_fast {
namespace {

constexpr int kBlocks = 64;  // of four words: what a loop works on stays in the first cache

IMPURE_FAST_INLINE void philox(uint64_t seed, int64_t stream, uint32_t purpose, int64_t first,
                               uint32_t (&words)[4][kBlocks]) {
  for (int i = 0; i < kBlocks; ++i) {
    words[0][i] = static_cast<uint32_t>(first + i);
    words[1][i] = static_cast<uint32_t>(stream);
    words[2][i] = static_cast<uint32_t>(static_cast<uint64_t>(stream) >> 32);
    words[3][i] = purpose;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    for (int i = 0; i < kBlocks; ++i) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * words[0][i];
      const uint64_t p1 = uint64_t{0xCD9E8D57u} * words[2][i];
      words[0][i] = static_cast<uint32_t>(p1 >> 32) ^ words[1][i] ^ k0;
      words[1][i] = static_cast<uint32_t>(p1);
      words[2][i] = static_cast<uint32_t>(p0 >> 32) ^ words[3][i] ^ k1;
      words[3][i] = static_cast<uint32_t>(p0);
    }
  }
}

// x in (0, 1]: x = 2^n m, m in [sqrt(1/2), sqrt(2)); log m = 2 atanh((m - 1) / (m + 1)).
IMPURE_FAST_INLINE float log(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x), n = (bits - 0x3f3504f3) >> 23;
  const float m = std::bit_cast<float>(bits - n * (1 << 23));
  const float z = (m - 1) / (m + 1), z2 = z * z;
  const float series = (((z2 / 9 + 1 / 7.f) * z2 + 1 / 5.f) * z2 + 1 / 3.f) * z2 + 1;
  return n * 0.693359375f + (n * -2.12194440e-4f + 2 * z * series);  // log 2 in two parts
}

// Exact, and so is 1 - u.
IMPURE_FAST_INLINE float uniform(uint32_t word) {
  return static_cast<int32_t>(word >> 8) * 0x1p-24f;
}

// Two normals of two words.
IMPURE_FAST_INLINE void normals(uint32_t first, uint32_t second, float* even, float* odd) {
  const float radius = std::sqrt(-2 * log(1 - uniform(first)));
  const float turn = uniform(second), angle = turn * 6.283185307179586f;
  const int32_t q = static_cast<int32_t>(turn * 4 + 0.5f);
  // pi / 2 in parts whose products with q are exact.
  const float r = ((angle - q * 1.5703125f) - q * 4.837512969970703e-4f) - q * 7.54978995489e-8f;
  const float z = r * r;
  const float c =
      ((2.4438379114e-5f * z - 0.00138873665f) * z + 0.0416666456f) * (z * z) - 0.5f * z + 1;
  const float s = ((-1.9495567540e-4f * z + 0.00833197776f) * z - 0.166666508f) * (z * r) + r;
  const float cosine = q & 1 ? s : c, sine = q & 1 ? c : s;
  *even = radius * ((q + 1) & 2 ? -cosine : cosine);
  *odd = radius * (q & 2 ? -sine : sine);
}

}  // namespace

IMPURE_FAST_CLONES void fill_noise(const NoiseProblem& problem, int64_t begin, int64_t end) {
  const NoiseProblem p = problem;
  uint32_t words[4][kBlocks];
  float parts[4][kBlocks];
  for (int64_t row = begin; row < end; ++row) {
    float* const out = p.out + row * p.count;
    for (int64_t first = 0; 4 * first < p.count; first += kBlocks) {
      philox(static_cast<uint64_t>(p.seeds[row * p.seed_step]), p.streams[row], p.purpose, first,
             words);
      for (int j = 0; j < 4; j += p.gaussian ? 2 : 1) {
        if (p.gaussian) {
          for (int i = 0; i < kBlocks; ++i)
            normals(words[j][i], words[j + 1][i], &parts[j][i], &parts[j + 1][i]);
        } else {
          for (int i = 0; i < kBlocks; ++i) parts[j][i] = uniform(words[j][i]);
        }
      }
      const int64_t left = p.count - 4 * first;
      if (left >= 4 * kBlocks) {
        for (int i = 0; i < kBlocks; ++i) {
          for (int j = 0; j < 4; ++j) out[4 * (first + i) + j] = parts[j][i];
        }
      } else {
        for (int64_t e = 0; e < left; ++e) out[4 * first + e] = parts[e % 4][e / 4];
      }
    }
  }
}

}  // namespace impure_fast
