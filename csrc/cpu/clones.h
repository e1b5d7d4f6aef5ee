// A function compiled once for each instruction set, chosen when the library is loaded.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#define IMPURE_FAST_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define IMPURE_FAST_CLONES
#endif
// What such a function calls must become part of it.
#define IMPURE_FAST_INLINE __attribute__((always_inline)) inline
