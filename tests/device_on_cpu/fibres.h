// Runs a block of CUDA threads as fibres of one CPU thread: barriers, warp instructions, faults.
//
// What it makes visible:
//   a missing barrier: shared memory holds NaN before each block, and a warp runs on until it meets
//     a block barrier, so that what another warp should have written is not there, or what it
//     should have read is overwritten (REVERSE=1 runs the last warp first);
//   a missing wait: a background copy happens at its wait;
//   a divergent warp: a barrier or warp instruction that not all reach ends the program with names;
//   a bank conflict of ldmatrix, where 8 rows do not lie in 8 different 16-byte columns;
//   a stray address: shared memory and (in the driver) tensors are allocations of their exact size,
//     for AddressSanitizer; alignment is checked where the GPU wants it.
#pragma once

#if !defined(__x86_64__)
#error "the fibre switch below is written for x86-64"
#endif

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  int x, y;
};
inline Index threadIdx, blockIdx, blockDim;

namespace impure_fast {
namespace on_cpu {

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "device_on_cpu: %s\n", what.c_str());
  std::_Exit(3);  // no destructors: this may be a fibre
}

// FAULT=name:n plants a fault: true for a thread's n-th call, from 0, of
//   barrier, warp_barrier, wait: which then does nothing;   lane: a shuffle, which reads another
//   lane; index: a background copy, which reads 16 bytes further on;   absent: a warp instruction,
//   which lane 5 leaves out.
inline bool fault(const char* name) {
  static const char* wish = std::getenv("FAULT");
  static const size_t colon = wish ? std::strcspn(wish, ":") : 0;
  if (!wish || std::strlen(name) != colon || std::strncmp(wish, name, colon)) return false;
  static std::vector<int> calls(1024);
  return calls[threadIdx.x]++ == std::atoi(wish + colon + 1);
}

// Saves the stack pointer and the registers a call must keep, and goes on where `to` was left.
extern "C" void impure_fast_switch(void** from, void* to);
asm(R"(
.text
.weak impure_fast_switch
impure_fast_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");

constexpr int kLanes = 32, kStackBytes = 1 << 18;
enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Fibre {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* stack_pointer;
  State state;
  const char* waits_for;
  std::vector<std::function<void()>> copies;  // in the background
};

struct Warp {
  // Operands of two collectives: a lane may be at the next one before all have left the last.
  alignas(16) char operands[2][kLanes * 64];
  const char* name[2];
  int arrived[2], turn[kLanes];
};

struct Block {
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> shared;
  std::function<void()> body;
  void* scheduler;
};
inline Block block;

inline void wait(State state, const char* what) {
  Fibre& self = block.fibres[threadIdx.x];
  self.state = state;
  self.waits_for = what;
  impure_fast_switch(&self.stack_pointer, block.scheduler);
}

inline void start() {
  block.body();
  wait(State::kDone, "nothing");
}

inline void resume(int thread) {
  threadIdx.x = thread;
  impure_fast_switch(&block.scheduler, block.fibres[thread].stack_pointer);
}

inline bool runnable(int thread) {
  const Fibre& fibre = block.fibres[thread];
  const Warp& warp = block.warps[thread / kLanes];
  return fibre.state == State::kReady ||
         (fibre.state == State::kAtWarp && warp.arrived[warp.turn[thread % kLanes] & 1] == kLanes);
}

inline void run_block(int threads) {
  block.warps.assign(threads / kLanes, Warp{});
  block.fibres.resize(threads);
  for (Fibre& fibre : block.fibres) {
    void** top = reinterpret_cast<void**>(fibre.stack.get() + kStackBytes - 16);
    *--top = nullptr;  // where a return address would be: the stack is aligned as after a call
    *--top = reinterpret_cast<void*>(start);
    fibre.stack_pointer = top - 6;
    fibre.state = State::kReady;
  }
  static const bool reverse = std::getenv("REVERSE");
  for (;;) {
    for (int i = 0; i < threads; i += kLanes)
      for (bool moved = true; moved;) {
        const int warp = reverse ? threads - kLanes - i : i;
        moved = false;
        for (int thread = warp; thread < warp + kLanes; ++thread)
          if (runnable(thread)) resume(thread), moved = true;
      }
    const auto in = [](State state) {
      return [state](const Fibre& fibre) { return fibre.state == state; };
    };
    if (std::all_of(block.fibres.begin(), block.fibres.end(), in(State::kDone))) {
      for (const Fibre& fibre : block.fibres)
        if (!fibre.copies.empty()) fail("a background copy is never waited for");
      return;
    }
    if (!std::all_of(block.fibres.begin(), block.fibres.end(), in(State::kAtBlock))) {
      std::string stuck;
      for (int thread = 0; thread < threads; ++thread)
        stuck +=
            "\n  thread " + std::to_string(thread) + " waits for " + block.fibres[thread].waits_for;
      fail("not all threads arrive:" + stuck);
    }
    for (Fibre& fibre : block.fibres) fibre.state = State::kReady;
  }
}

// A warp instruction: once all lanes have brought theirs, `work` turns 32 operands into 32 results.
template <class T, class Work>
T collective(const char* name, T mine, Work work) {
  static_assert(sizeof(T) <= 64);
  if (threadIdx.x % kLanes == 5 && fault("absent")) return mine;
  Warp& warp = block.warps[threadIdx.x / kLanes];
  const int lane = threadIdx.x % kLanes, slot = ++warp.turn[lane] & 1;
  if (warp.arrived[slot] == kLanes) warp.arrived[slot] = 0;
  if (warp.arrived[slot]++ == 0) warp.name[slot] = name;
  if (std::strcmp(warp.name[slot], name))
    fail(std::string("lanes of a warp meet at ") + warp.name[slot] + " and at " + name);
  T* all = reinterpret_cast<T*>(warp.operands[slot]);
  all[lane] = mine;
  if (warp.arrived[slot] == kLanes)
    work(all);
  else
    wait(State::kAtWarp, name);
  return all[lane];
}

}  // namespace on_cpu
}  // namespace impure_fast
