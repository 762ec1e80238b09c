// One optimiser step of a cohort in two launches (one without clipping): penalty, global-norm clip, SGD, new scores and masks.
//
// The arithmetic is that of these PyTorch steps, operation by operation, for every client on its own:
//   thresholds' gradient  g = g - penalty * exp(-tau)                      (the gradient of penalty * sum exp(-tau))
//   clip_grad_norm_       g = g * min(1, max_norm / (norm + 1e-6))         (one norm over all parameters; NaN stays NaN)
//   SGD                   g = g + weight_decay * p;  buf = momentum * buf + g;  p = p - learning_rate * buf
// A momentum buffer starts at zero, which is SGD's first step (buf = g) as long as there is no dampening. Gradients are not changed.
//
// Why two launches. The norm needs all gradients before any update, and its sum must not depend on the order of blocks: so each
// block of the first launch leaves one fp64 partial, and each block of the second adds all of them in the same order. That re-read
// is (filters / 8) x 8 bytes per block from L2: for ResNet-18 about 600 partials, 5 KB, beside the 5 x fan_in x 8 elements that
// a block moves anyway (3 reads and 2 writes per weight). Scores cost no further traffic: the new weights are in registers.
#include "numeric.cuh"

namespace spafl {
namespace {

constexpr int STEP_ROWS = WARPS;          // rows of a block: one per warp

struct Rates {
  const double* learning_rate;
  const double* penalty;
  int64_t learning_rate_stride, penalty_stride;
};

inline int64_t rows_of(const SpaflParameter& p) { return divide_up(p.size, p.length); }

template <typename T>
__device__ __forceinline__ T penalised(T grad, T tau, T penalty) {
  return penalty == T(0) ? grad : add(grad, -multiply(exponential(-tau), penalty));  // exp(-tau) may be infinite
}

template <bool ALIGNED, typename T>
__device__ __forceinline__ T row_square_sum(const T* row, int64_t length, int lane) {
  constexpr int N = LANE_ELEMENTS<T>, UNROLL = 8;
  const int64_t chunks = length / N;
  T part[4] = {0, 0, 0, 0};
  for (int64_t first = lane; first < chunks; first += UNROLL * WARP) {
    T x[UNROLL][N];
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
      if (first + u * WARP < chunks) load_chunk<ALIGNED>(row, first + u * WARP, x[u]);
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
      if (first + u * WARP < chunks) {
#pragma unroll
        for (int e = 0; e < N; e++) part[u % 4] = multiply_add(x[u][e], x[u][e], part[u % 4]);
      }
  }
  if (lane < length - chunks * N) {
    const T x = row[chunks * N + lane];
    part[0] = multiply_add(x, x, part[0]);
  }
  return add(add(part[0], part[1]), add(part[2], part[3]));
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    square_sum_kernel(const Table<SpaflParameter> __grid_constant__ table, unsigned tiles, int64_t base, int64_t all_tiles, Rates rates,
                      double* __restrict__ partials) {
  KERNEL_SHARED(double, scratch, WARPS);
  const int64_t client = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int owner = owner_of(table, tile);
  const SpaflParameter& p = table.entry[owner];
  const int lane = threadIdx.x % WARP;
  const int64_t row = (tile - table.first_tile[owner]) * STEP_ROWS + threadIdx.x / WARP, start = row * p.length;
  double sum = 0;
  if (start < p.size) {
    const int64_t length = p.size - start < p.length ? p.size - start : p.length;
    const T* grad = (const T*)p.grad + client * p.grad_stride + start;
    sum = aligned16(grad) ? row_square_sum<true>(grad, length, lane) : row_square_sum<false>(grad, length, lane);
    if (p.threshold && lane == 0) {
      const T tau = ((const T*)p.threshold)[client * p.threshold_stride + row];
      const T g = penalised(((const T*)p.threshold_grad)[client * p.threshold_grad_stride + row], tau,
                            (T)rates.penalty[client * rates.penalty_stride]);
      sum += (double)multiply(g, g);
    }
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) partials[client * all_tiles + base + tile] = sum;
}

template <typename T>
struct Step {
  T learning_rate, momentum, weight_decay, clip_factor;

  // p is replaced by its next value, buf too if there is one. Without branches: with them the compiler splits the loop over chunks
  // and breaks up some of its 128-bit stores. A factor of 1 changes nothing; a decay of 0 must not turn an infinite weight into NaN.
  __device__ __forceinline__ void operator()(T& p, T g, T* buf) const {
    g = multiply(g, clip_factor);
    const T decayed = multiply_add(p, weight_decay, g);
    g = weight_decay != 0 ? decayed : g;
    if (buf) g = *buf = add(multiply(*buf, momentum), g);
    p = multiply_add(g, -learning_rate, p);
  }
};

// Updates a row with one warp and returns this lane's share of sum |p|, in the order of RowSum.
template <bool ALIGNED, bool MOMENTUM, typename T>
__device__ __forceinline__ RowSum<T> update_row(const Step<T>& step, T* value, const T* grad, T* momentum, int64_t length, int lane) {
  constexpr int N = LANE_ELEMENTS<T>, UNROLL = 4;             // a multiple of 4 keeps part[u % 4] the accumulator of RowSum
  const int64_t chunks = length / N;
  RowSum<T> sum;
  for (int64_t first = lane; first < chunks; first += UNROLL * WARP) {
    T p[UNROLL][N], g[UNROLL][N], buf[UNROLL][N];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int64_t chunk = first + u * WARP;
      if (chunk < chunks) {
        load_chunk<ALIGNED>(value, chunk, p[u]);
        load_chunk<ALIGNED>(grad, chunk, g[u]);
        if (MOMENTUM) load_chunk<ALIGNED>(momentum, chunk, buf[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int64_t chunk = first + u * WARP;
      if (chunk < chunks) {
#pragma unroll
        for (int e = 0; e < N; e++) {
          step(p[u][e], g[u][e], MOMENTUM ? &buf[u][e] : nullptr);
          sum.part[u] = add(sum.part[u], absolute(p[u][e]));
        }
        store_chunk<ALIGNED>(value, chunk, p[u]);
        if (MOMENTUM) store_chunk<ALIGNED>(momentum, chunk, buf[u]);
      }
    }
  }
  if (lane < length - chunks * N) {
    const int64_t i = chunks * N + lane;
    T p = value[i];
    step(p, grad[i], MOMENTUM ? momentum + i : nullptr);
    value[i] = p;
    sum.part[0] = add(sum.part[0], absolute(p));
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    update_kernel(const Table<SpaflParameter> __grid_constant__ table, unsigned tiles, int64_t base, int64_t all_tiles, int64_t columns,
                  Rates rates, T momentum, T weight_decay, int clip, T max_norm, const double* __restrict__ partials,
                  double* __restrict__ norms, T* __restrict__ scores, uint8_t* __restrict__ mask, uint8_t* __restrict__ flipped) {
  KERNEL_SHARED(double, scratch, WARPS);
  const int64_t client = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  Step<T> step{(T)rates.learning_rate[client * rates.learning_rate_stride], momentum, weight_decay, 1};
  if (clip) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < all_tiles; i += THREADS) sum += partials[client * all_tiles + i];
    const double norm = sqrt(block_sum(sum, scratch));
    const T factor = max_norm / add((T)norm, (T)1e-6);
    step.clip_factor = factor > 1 ? (T)1 : factor;            // NaN stays NaN, as in torch.clamp
    if (threadIdx.x == 0 && base + tile == 0) norms[client] = norm;
  }
  const int owner = owner_of(table, tile);
  const SpaflParameter& p = table.entry[owner];
  const int lane = threadIdx.x % WARP;
  const int64_t row = (tile - table.first_tile[owner]) * STEP_ROWS + threadIdx.x / WARP, start = row * p.length;
  if (start >= p.size) return;                                // a whole warp; no barrier follows
  const int64_t length = p.size - start < p.length ? p.size - start : p.length;
  T* value = (T*)p.value + client * p.value_stride + start;
  const T* grad = (const T*)p.grad + client * p.grad_stride + start;
  T* buf = p.momentum ? (T*)p.momentum + client * p.momentum_stride + start : nullptr;
  const bool aligned = aligned16(value) && aligned16(grad) && aligned16(buf);
  RowSum<T> sum;
  if (buf) sum = aligned ? update_row<true, true>(step, value, grad, buf, length, lane)
                         : update_row<false, true>(step, value, grad, buf, length, lane);
  else sum = aligned ? update_row<true, false>(step, value, grad, buf, length, lane)
                     : update_row<false, false>(step, value, grad, buf, length, lane);
  if (!p.threshold) return;
  const T total = sum.finish();
  if (lane == 0) {
    T& tau = ((T*)p.threshold)[client * p.threshold_stride + row];
    const T g = penalised(((const T*)p.threshold_grad)[client * p.threshold_grad_stride + row], tau,
                          (T)rates.penalty[client * rates.penalty_stride]);
    step(tau, g, p.threshold_momentum ? (T*)p.threshold_momentum + client * p.threshold_momentum_stride + row : nullptr);
    const int64_t column = client * columns + p.offset + row;
    decide(total, length, tau, true, scores[column], mask[column], flipped[column]);
  }
}

template <typename T>
int launch_step(const SpaflParameter* parameters, int parameter_count, int64_t clients, int64_t columns, Rates rates, double momentum,
                double weight_decay, int clip, double max_norm, double* partials, double* norms, void* scores, uint8_t* mask,
                uint8_t* flipped, void* stream) {
  const int64_t all_tiles = spafl_step_partials(parameters, parameter_count);
  if (all_tiles * clients > MAX_GRID) return (int)cudaErrorInvalidConfiguration;
  auto tiles_of = [](const SpaflParameter& p) { return divide_up(rows_of(p), STEP_ROWS); };
  if (clip) {
    const int error =
        for_each_table(parameters, parameter_count, tiles_of, [&](const Table<SpaflParameter>& table, int64_t tiles, int64_t base) {
          KERNEL_LAUNCH(square_sum_kernel<T>, dim3((unsigned)(tiles * clients)), dim3(THREADS), stream, table, (unsigned)tiles, base, all_tiles,
                        rates, partials);
          return (int)cudaGetLastError();
        });
    if (error) return error;
  }
  return for_each_table(parameters, parameter_count, tiles_of, [&](const Table<SpaflParameter>& table, int64_t tiles, int64_t base) {
    KERNEL_LAUNCH(update_kernel<T>, dim3((unsigned)(tiles * clients)), dim3(THREADS), stream, table, (unsigned)tiles, base, all_tiles, columns, rates,
                  (T)momentum, (T)weight_decay, clip, (T)max_norm, partials, norms, (T*)scores, mask, flipped);
    return (int)cudaGetLastError();
  });
}

}  // namespace
}  // namespace spafl

extern "C" int64_t spafl_step_partials(const SpaflParameter* parameters, int parameter_count) {
  int64_t tiles = 0;
  for (int i = 0; i < parameter_count; i++) tiles += spafl::divide_up(spafl::rows_of(parameters[i]), spafl::STEP_ROWS);
  return tiles;
}

extern "C" int spafl_fused_step(const SpaflParameter* parameters, int parameter_count, int64_t clients, int64_t columns, int dtype,
                                const double* learning_rate, int64_t learning_rate_stride, const double* penalty,
                                int64_t penalty_stride, double momentum, double weight_decay, int clip, double max_norm,
                                double* partials, double* norms, void* scores, uint8_t* mask, uint8_t* flipped, void* stream) {
  using namespace spafl;
  const Rates rates{learning_rate, penalty, learning_rate_stride, penalty_stride};
#define SPAFL_CASE(code, T)                                                                                                         \
  case code: return launch_step<T>(parameters, parameter_count, clients, columns, rates, momentum, weight_decay, clip, max_norm,    \
                                   partials, norms, scores, mask, flipped, stream);
  switch (dtype) {
    SPAFL_CASE(SPAFL_FLOAT64, double)
    SPAFL_CASE(SPAFL_FLOAT32, float)
  }
#undef SPAFL_CASE
  return (int)cudaErrorInvalidValue;
}
