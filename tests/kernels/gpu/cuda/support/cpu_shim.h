// Runs the CUDA kernels of csrc/cuda on the CPU. The same source is compiled by nvcc and by g++ (-x c++ -include cpu_shim.h).
//
// Every thread of a block is a fiber; it runs until a barrier or a warp operation, so a missing barrier shows as a wrong result.
// Blocks run one after another. emu_seed(s > 0) shuffles the order of blocks, and of threads between barriers: run each test
// with several seeds. Shared memory (KERNEL_SHARED) is filled with 0xCB at the start of each block.
//
// Aborts with a message: a barrier that some live threads never reach; warp operations of different kinds met by one warp; a
// warp operation with a mask other than all lanes, or after some lanes of the warp have ended; a shuffle width other than 32.
// Not modelled: memory order, blocks that run at the same time, bank conflicts, time, launch limits, textures, wgmma, TMA.
#pragma once
#ifdef __CUDACC__
#error "cpu_shim.h is for g++ only"
#endif
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__ &                       // one copy per launch, not one per thread

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

typedef void* cudaStream_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

namespace emu {
enum Wait { NOTHING, BLOCK, BALLOT, SHUFFLE };    // what a fiber waits for
constexpr size_t STACK = 64 << 10;

struct Fiber {
#ifdef __x86_64__
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  std::unique_ptr<char[]> stack{new char[STACK]};
  uint3 tid;
  bool done;
  Wait wait;
  unsigned long long value;                       // what this lane offers to a warp operation
};

inline std::vector<std::unique_ptr<Fiber>> fibers;   // the threads of the running block, reused by the next one
inline void* scheduler_pointer;
inline int current = -1;                          // linear index of the running thread
inline uint3 block_id;
inline dim3 grid_dim, block_dim;
inline std::function<void()> body;
inline unsigned seed = 0;
inline unsigned long long block_serial = 0;       // counts blocks over the whole process
inline unsigned long long launches = 0;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "cpu_shim: %s in block (%u, %u, %u)\n", what, block_id.x, block_id.y, block_id.z);
  abort();
}

inline void entry();

// Switches between fibers. swapcontext makes a system call each time, and AddressSanitizer takes longjmp for an unwinding of the
// stack: so a few instructions of our own where they are known.
#ifdef __x86_64__
__attribute__((naked, noinline)) inline void switch_stack(void** /*save*/, void* /*load*/) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}
inline void prepare(Fiber& f) {
  void** top = (void**)((uintptr_t)(f.stack.get() + STACK) & ~(uintptr_t)15);
  *--top = nullptr;                               // as if entry had been called: keeps the stack aligned
  *--top = (void*)entry;
  f.stack_pointer = top - 6;                      // the registers that switch_stack loads, any values
}
inline void resume(Fiber& f) { switch_stack(&scheduler_pointer, f.stack_pointer); }
inline void to_scheduler(Fiber& f) { switch_stack(&f.stack_pointer, scheduler_pointer); }
#else
inline ucontext_t scheduler;
inline void prepare(Fiber& f) {
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = STACK;
  f.context.uc_link = nullptr;
  makecontext(&f.context, (void (*)())entry, 0);
}
inline void resume(Fiber& f) { swapcontext(&scheduler, &f.context); }
inline void to_scheduler(Fiber& f) { swapcontext(&f.context, &scheduler); }
#endif

inline void yield(Wait why) {
  fibers[current]->wait = why;
  to_scheduler(*fibers[current]);
}

inline void entry() {
  for (;;) {                                      // one round per block
    body();
    fibers[current]->done = true;
    fibers[current]->wait = NOTHING;
    to_scheduler(*fibers[current]);
  }
}

// Lets the warps go on whose lanes have all arrived at one warp operation. Returns whether any did.
inline bool release_warps(int threads) {
  bool progress = false;
  for (int first = 0; first < threads; first += 32) {
    const int end = std::min(threads, first + 32);
    int arrived = 0, ended = 0;
    Wait kind = NOTHING;
    for (int i = first; i < end; i++) {
      ended += fibers[i]->done;
      if (fibers[i]->wait < BALLOT) continue;
      arrived++;
      if (kind != NOTHING && kind != fibers[i]->wait) fail("lanes of a warp meet in different warp operations");
      kind = fibers[i]->wait;
    }
    if (arrived && arrived + ended == end - first) {
      if (ended) fail("warp operation after some lanes of the warp have ended");
      for (int i = first; i < end; i++) fibers[i]->wait = NOTHING;
      progress = true;
    }
  }
  return progress;
}

inline void run_block() {
  const int n = block_dim.x * block_dim.y * block_dim.z;
  block_serial++;
  while ((int)fibers.size() < n) {
    fibers.emplace_back(new Fiber);
    prepare(*fibers.back());
  }
  std::mt19937 random(seed + block_id.x * 7919 + block_id.y * 104729);
  std::vector<int> order(n);
  for (int i = 0; i < n; i++) {
    order[i] = i;
    fibers[i]->tid = {i % block_dim.x, (i / block_dim.x) % block_dim.y, i / (block_dim.x * block_dim.y)};
    fibers[i]->done = false;
    fibers[i]->wait = NOTHING;
  }
  for (;;) {
    bool progress = false;
    if (seed) std::shuffle(order.begin(), order.end(), random);
    for (int i : order)
      if (!fibers[i]->done && fibers[i]->wait == NOTHING) {
        progress = true;
        current = i;
        resume(*fibers[i]);
      }
    progress |= release_warps(n);
    int live = 0, waiting = 0;                    // threads that ended count as arrived, as on the device
    for (int i = 0; i < n; i++)
      if (!fibers[i]->done) { live++; waiting += fibers[i]->wait == BLOCK; }
    if (!live) return;
    if (waiting == live) {
      for (int i = 0; i < n; i++) fibers[i]->wait = NOTHING;
      progress = true;
    }
    if (!progress) fail("deadlock: some threads wait at a barrier that the others never reach");
  }
}

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, Args... args) {
  grid_dim = grid;
  block_dim = block;
  launches++;
  body = [=] { kernel(args...); };
  std::vector<uint64_t> order(uint64_t(grid.x) * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); i++) order[i] = i;
  if (seed) {
    std::mt19937 random(seed);
    std::shuffle(order.begin(), order.end(), random);
  }
  for (uint64_t i : order) {
    block_id = {unsigned(i % grid.x), unsigned((i / grid.x) % grid.y), unsigned(i / (uint64_t(grid.x) * grid.y))};
    run_block();
  }
}

template <class T, int N>
struct Shared {
  T data[N];
  unsigned long long serial = 0;
  T* get() {
    if (serial != block_serial) memset((void*)data, 0xCB, sizeof data);
    serial = block_serial;
    return data;
  }
};

inline void check_mask(unsigned mask) {
  if (mask != ~0u) fail("warp operation with a mask other than all lanes");
}

template <class T> T shuffle(unsigned mask, T v, int source, int width) {
  static_assert(sizeof(T) <= 8);
  check_mask(mask);
  if (width != 32) fail("shuffle width other than 32");
  fibers[current]->value = 0;
  memcpy(&fibers[current]->value, &v, sizeof v);
  yield(SHUFFLE);
  T r;
  memcpy(&r, &fibers[(current & ~31) + (source & 31)]->value, sizeof r);
  yield(SHUFFLE);                                 // nobody may offer a new value before all have read
  return r;
}

inline float bits_to_float(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }
inline uint32_t float_to_bits(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
inline float bfloat16_to_float(uint16_t b) { return bits_to_float(uint32_t(b) << 16); }
inline uint16_t float_to_bfloat16(float x) {      // round to nearest, ties to even
  const uint32_t b = float_to_bits(x);
  return x != x ? 0x7fff : uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
inline float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const float x = exponent == 31 ? (fraction ? NAN : INFINITY)
                  : exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
  return h >> 15 ? -x : x;
}
inline uint16_t float_to_half(float x) {          // round to nearest, ties to even
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return 0x7fff;
  const float a = std::fabs(x);
  if (a >= 65520.f) return sign | 0x7c00;         // halfway between the largest half and the next power of two
  int exponent = 0;
  std::frexp(a, &exponent);
  const int unit = std::max(exponent, -13) - 11;  // exponent of the last kept bit
  const float rounded = std::ldexp(std::nearbyint(std::ldexp(a, -unit)), unit);
  if (rounded < 6.103515625e-05f) return sign | uint16_t(std::ldexp(rounded, 24));
  std::frexp(rounded, &exponent);
  return sign | uint16_t((exponent + 14) << 10 | (int(std::ldexp(rounded, 11 - exponent)) & 1023));
}
}  // namespace emu

#define threadIdx (emu::fibers[emu::current]->tid)
#define blockIdx (emu::block_id)
#define gridDim (emu::grid_dim)
#define blockDim (emu::block_dim)

inline int cudaGetLastError() { return 0; }
inline void __syncthreads() { emu::yield(emu::BLOCK); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  using namespace emu;
  check_mask(mask);
  fibers[current]->value = predicate != 0;
  yield(BALLOT);
  unsigned votes = 0, first = current & ~31;
  for (unsigned lane = 0; lane < 32; lane++) votes |= unsigned(fibers[first + lane]->value) << lane;
  yield(BALLOT);
  return votes;
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32) {
  return emu::shuffle(mask, v, (emu::current & 31) ^ lanes, width);
}

inline void __stwb(uint4* p, uint4 v) { *p = v; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

#define KERNEL_LAUNCH(kernel, grid, block, stream, ...) ((void)(stream), emu::launch(kernel, grid, block, __VA_ARGS__))
#define KERNEL_SHARED(T, name, size)       \
  static emu::Shared<T, size> name##_emu; \
  T* const name = name##_emu.get()

// One copy per library: the inline variables above are shared by all files linked together.
extern "C" {
inline __attribute__((used)) void emu_seed(unsigned s) { emu::seed = s; }
inline __attribute__((used)) unsigned long long emu_launches() { return emu::launches; }
}
