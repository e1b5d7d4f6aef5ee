// Which instruction set runs: the best this machine has, or the one IMPURE_FAST_CPU_ISA names.
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/attention.h"

namespace impure_fast {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512+bf16", "amx"};

// Linux lends a process the tiles when it asks.
bool amx_granted() {
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;  // leaf 7, edx
  constexpr long kAskFor = 0x1023, kTileData = 18;        // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kTile) && (edx & kBf16) &&
         syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
#else
  return false;
#endif
}

// Index into kNames of the best this machine has.
int best_level() {
#if defined(__x86_64__) && !defined(__clang__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("bmi2")) {
    return 1;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return 2;
  return amx_granted() ? 4 : 3;
#else
  return 0;
#endif
}

// A wish for less than the best is granted.
int chosen_level() {
  const int best = best_level();
  const char* const wish = std::getenv("IMPURE_FAST_CPU_ISA");
  for (int level = 0; wish && level < best; ++level) {
    if (!std::strcmp(wish, kNames[level])) return level;
  }
  return best;
}

const int level = chosen_level();

}  // namespace

const char* attention_isa() { return kNames[level]; }

const AttentionKernels& attention_kernels() {
  static const AttentionKernels kernels = [] {
    const AttentionKernels* const sets[] = {&kAttentionScalar, &kAttentionAvx2, &kAttentionAvx512,
                                            &kAttentionAvx512Bf16, &kAttentionAmx};
    AttentionKernels best = {};
    for (int i = 0; i <= level; ++i) {
      for (int format = 0; format < kFormats; ++format) {
        if (sets[i]->forward[format]) best.forward[format] = sets[i]->forward[format];
        if (sets[i]->backward[format]) best.backward[format] = sets[i]->backward[format];
      }
    }
    return best;
  }();
  return kernels;
}

void* attention_scratch(size_t bytes) {
  thread_local std::vector<char> block;
  if (block.size() < bytes + 64) {
    block.clear();
    block.resize(bytes + 64);
  }
  const auto address = reinterpret_cast<uintptr_t>(block.data());
  return reinterpret_cast<void*>((address + 63) / 64 * 64);
}

}  // namespace impure_fast
