// Element types, 128-bit access, and the one order in which a row is summed.
#pragma once
#include "kernels.h"
#include "launch.cuh"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif
#include <string.h>

namespace spafl {

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

// Sums are fp32 for 16- and 32-bit elements, fp64 for fp64.
template <typename T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
template <typename T> using acc_t = typename Accumulator<T>::type;

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
#ifdef __CUDACC__
__device__ __forceinline__ float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float widen(BFloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ __forceinline__ void narrow(float x, Half& y) { y.bits = __half_as_ushort(__float2half_rn(x)); }
__device__ __forceinline__ void narrow(float x, BFloat16& y) { y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
#else
inline float widen(Half x) { return emu::half_to_float(x.bits); }
inline float widen(BFloat16 x) { return emu::bfloat16_to_float(x.bits); }
inline void narrow(float x, Half& y) { y.bits = emu::float_to_half(x); }
inline void narrow(float x, BFloat16& y) { y.bits = emu::float_to_bfloat16(x); }
#endif
__device__ __forceinline__ void narrow(float x, float& y) { y = x; }
__device__ __forceinline__ void narrow(double x, double& y) { y = x; }

// Explicit roundings: what the compiler may contract must not depend on the build.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ __forceinline__ float absolute(float x) { return fabsf(x); }
__device__ __forceinline__ double absolute(double x) { return fabs(x); }
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

template <typename T> constexpr int LANE_ELEMENTS = 16 / sizeof(T);      // of one 128-bit access

__device__ __forceinline__ bool aligned16(const void* p) { return ((uintptr_t)p & 15) == 0; }

// The chunk-th group of LANE_ELEMENTS elements of a row. Without 16-byte alignment the same elements come one by one, so that
// the value of a sum never depends on where a tensor lies in memory.
template <bool ALIGNED, typename T>
__device__ __forceinline__ void load_chunk(const T* row, int64_t chunk, T (&x)[LANE_ELEMENTS<T>]) {
  const T* p = row + chunk * LANE_ELEMENTS<T>;
  if (ALIGNED) {
    const uint4 raw = *(const uint4*)p;
    memcpy(x, &raw, 16);
  } else {
#pragma unroll
    for (int e = 0; e < LANE_ELEMENTS<T>; e++) x[e] = p[e];
  }
}

template <bool ALIGNED, typename T>
__device__ __forceinline__ void store_chunk(T* row, int64_t chunk, const T (&x)[LANE_ELEMENTS<T>]) {
  T* p = row + chunk * LANE_ELEMENTS<T>;
  if (ALIGNED) {
    uint4 raw;
    memcpy(&raw, x, 16);
    __stwb((uint4*)p, raw);               // by name: the compiler broke some plain uint4 stores into four (seen in the SASS, nvcc 13.0)
  } else {
#pragma unroll
    for (int e = 0; e < LANE_ELEMENTS<T>; e++) p[e] = x[e];
  }
}

// The order of a row sum, shared by every kernel that makes scores, so that equal weights have bitwise equal scores:
// chunk c goes to lane c % 32 and, there, to accumulator (c / 32) % 4, element by element; the elements after the last whole chunk
// go to lanes 0, 1, ..., accumulator 0; then (0 + 1) + (2 + 3), then lanes in a butterfly.
template <typename A>
struct RowSum {
  A part[4] = {0, 0, 0, 0};

  __device__ __forceinline__ A finish() const {
    A sum = add(add(part[0], part[1]), add(part[2], part[3]));
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) sum = add(sum, __shfl_xor_sync(ALL_LANES, sum, step));
    return sum;
  }
};

// What a filter's sum of |w| decides; for one thread. The comparison is made in the dtype of the weights, as the definition makes
// it, is strict, and false for NaN. Without `compare` the former mask is not read, and every filter counts as flipped.
template <typename T>
__device__ __forceinline__ void decide(acc_t<T> sum, int64_t fan_in, T tau, bool compare, T& score, uint8_t& mask, uint8_t& flipped) {
  T mean;
  narrow(sum / (acc_t<T>)fan_in, mean);
  const uint8_t active = widen(mean) > widen(tau);
  score = mean;
  flipped = compare ? active != mask : 1;
  mask = active;
}

// Sum over a block of THREADS threads in a fixed order; every thread gets it. `scratch` has WARPS entries.
template <typename A>
__device__ __forceinline__ A block_sum(A x, A* scratch) {
#pragma unroll
  for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  __syncthreads();                        // scratch may still be read by a former call
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
  __syncthreads();
  A sum = scratch[0];
#pragma unroll
  for (int w = 1; w < WARPS; w++) sum += scratch[w];
  return sum;
}

// Copies (or, without a source, zeroes) one row with one warp. Unit has the size of an element.
template <typename Unit>
__device__ __forceinline__ void write_row(Unit* target, const Unit* source, int64_t length, int lane) {
  constexpr int N = LANE_ELEMENTS<Unit>, UNROLL = 4;
  int64_t copied = 0;
  if (aligned16(target) && aligned16(source)) {               // null counts as aligned
    const int64_t chunks = length / N;
    for (int64_t first = lane; first < chunks; first += UNROLL * WARP) {
      uint4 x[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        x[u] = make_uint4(0, 0, 0, 0);
        if (source && first + u * WARP < chunks) x[u] = ((const uint4*)source)[first + u * WARP];
      }
#pragma unroll
      for (int u = 0; u < UNROLL; u++)
        if (first + u * WARP < chunks) __stwb((uint4*)target + first + u * WARP, x[u]);
    }
    copied = chunks * N;
  }
  for (int64_t i = copied + lane; i < length; i += WARP) target[i] = source ? source[i] : (Unit)0;
}

}  // namespace spafl
