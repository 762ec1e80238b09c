// The threshold pass: scores, masks, active lists and packed weights of all layers and all clients in two launches.
//
// Why two. The scores read every weight once: that is the whole cost, and it needs all multiprocessors. A list needs the masks of
// a whole layer. One launch would have to either give a (layer, client) to one block, which leaves a 512 x 4608 layer to 1 of
// 132 multiprocessors (at 1/132 of 4.3 TB/s its 9.4 MB take about 0.3 ms instead of a few us: arithmetic, not measured), or make
// blocks wait for one another. The kernel boundary is the wait that needs no memory-order argument, costs no atomics, and leaves
// nothing to reset between calls. The second launch reads one byte per filter and tile, and copies the active rows: a re-read
// of density x bytes, which for models below the 50 MB of L2 mostly comes from there, and a write of density x bytes.
//
// Deterministic: every output element has one writer, and every sum one order.
#include "numeric.cuh"

namespace spafl {
namespace {

constexpr int SCORE_ROWS = WARPS;         // filters of a block: one per warp
constexpr int LIST_ROWS = WARP;           // filters of a block: one ballot

template <bool ALIGNED, typename T>
__device__ __forceinline__ acc_t<T> row_abs_sum(const T* row, int64_t length, int lane) {
  constexpr int N = LANE_ELEMENTS<T>, UNROLL = 8;            // 8 x 16 bytes in flight per lane hide the latency of a long row
  const int64_t chunks = length / N;
  RowSum<acc_t<T>> sum;
  for (int64_t first = lane; first < chunks; first += UNROLL * WARP) {
    T x[UNROLL][N];
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
      if (first + u * WARP < chunks) load_chunk<ALIGNED>(row, first + u * WARP, x[u]);
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
      if (first + u * WARP < chunks) {
#pragma unroll
        for (int e = 0; e < N; e++) sum.part[u % 4] = add(sum.part[u % 4], absolute(widen(x[u][e])));
      }
  }
  if (lane < length - chunks * N) sum.part[0] = add(sum.part[0], absolute(widen(row[chunks * N + lane])));
  return sum.finish();
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    score_kernel(const Table<SpaflLayer> __grid_constant__ table, unsigned tiles, int64_t columns, T* __restrict__ scores,
                 uint8_t* __restrict__ mask, uint8_t* __restrict__ flipped, int compare) {
  const int64_t client = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int owner = owner_of(table, tile);
  const SpaflLayer& layer = table.entry[owner];
  const int lane = threadIdx.x % WARP;
  const int64_t filter = (tile - table.first_tile[owner]) * SCORE_ROWS + threadIdx.x / WARP;
  if (filter >= layer.filters) return;                        // a whole warp
  const T* row = (const T*)layer.weight + client * layer.weight_stride + filter * layer.fan_in;
  const acc_t<T> sum = aligned16(row) ? row_abs_sum<true>(row, layer.fan_in, lane) : row_abs_sum<false>(row, layer.fan_in, lane);
  if (lane == 0) {
    const int64_t column = client * columns + layer.offset + filter;
    const T tau = ((const T*)layer.threshold)[client * layer.threshold_stride + filter];
    decide(sum, layer.fan_in, tau, compare, scores[column], mask[column], flipped[column]);
  }
}

template <typename Unit>
__global__ void __launch_bounds__(THREADS)
    list_kernel(const Table<SpaflLayer> __grid_constant__ table, unsigned tiles, int64_t columns, int64_t layer_columns,
                const uint8_t* __restrict__ mask, const uint8_t* __restrict__ flipped, int32_t* __restrict__ active,
                int32_t* __restrict__ inverse, int32_t* __restrict__ counts, uint8_t* __restrict__ changed, int64_t pad_to) {
  KERNEL_SHARED(int, scratch, WARPS);
  const int64_t client = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int owner = owner_of(table, tile);
  const SpaflLayer& layer = table.entry[owner];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t start = (tile - table.first_tile[owner]) * LIST_ROWS, base = client * columns + layer.offset;
  mask += base;
  flipped += base;
  active += base;
  inverse += base;

  // Each block counts the layer's mask itself: a few bytes per thread from L2 instead of a wait for the blocks before it.
  int mine_before = 0, mine_total = 0, mine_flipped = 0;
  for (int64_t i = threadIdx.x; i < layer.filters; i += THREADS) {
    mine_total += mask[i];
    mine_before += i < start ? mask[i] : 0;
    if (start == 0) mine_flipped |= flipped[i];
  }
  const int before = block_sum(mine_before, scratch), count = block_sum(mine_total, scratch);
  if (start == 0) {                                           // the same for all threads of the block
    const int flips = block_sum(mine_flipped, scratch);
    if (threadIdx.x == 0) {
      counts[client * layer_columns + layer.index] = count;
      changed[client * layer_columns + layer.index] = flips > 0;
    }
  }

  // Rank of the tile's filters. Active ones take the places [0, count) of the list, pruned ones the places [count, filters): so
  // every entry of the list, and every row of packed up to the padding, has exactly one writer.
  const unsigned votes = __ballot_sync(ALL_LANES, start + lane < layer.filters && mask[start + lane]);
  const int64_t rows = layer.filters - start < LIST_ROWS ? layer.filters - start : LIST_ROWS;
  auto place = [&](int r) {
    const int active_before = before + __popc(votes & ((1u << r) - 1));
    return votes >> r & 1 ? (int64_t)active_before : count + (start + r - active_before);
  };
  if (warp == 0 && lane < rows) {
    const bool is_active = votes >> lane & 1;
    active[place(lane)] = is_active ? (int32_t)(start + lane) : -1;
    inverse[start + lane] = is_active ? (int32_t)place(lane) : -1;
  }
  if (!layer.packed) return;
  const int64_t padded = (count + pad_to - 1) / pad_to * pad_to;
  const Unit* weight = (const Unit*)layer.weight + client * layer.weight_stride;
  Unit* packed = (Unit*)layer.packed + client * layer.packed_stride;
  for (int r = warp; r < rows; r += WARPS) {
    const int64_t p = place(r);
    if (p < padded) write_row(packed + p * layer.fan_in, votes >> r & 1 ? weight + (start + r) * layer.fan_in : nullptr, layer.fan_in, lane);
  }
  if (start + LIST_ROWS >= layer.filters)                     // padding past the last filter
    for (int64_t p = layer.filters + warp; p < padded; p += WARPS)
      write_row(packed + p * layer.fan_in, (const Unit*)nullptr, layer.fan_in, lane);
}

template <typename T>
int launch_scores(const SpaflLayer* layers, int layer_count, int64_t clients, int64_t columns, void* scores, uint8_t* mask,
                  uint8_t* flipped, int compare, void* stream) {
  return for_each_table(
      layers, layer_count, [](const SpaflLayer& l) { return divide_up(l.filters, SCORE_ROWS); },
      [&](const Table<SpaflLayer>& table, int64_t tiles, int64_t) {
        if (tiles * clients > MAX_GRID) return (int)cudaErrorInvalidConfiguration;
        KERNEL_LAUNCH(score_kernel<T>, dim3((unsigned)(tiles * clients)), dim3(THREADS), stream, table, (unsigned)tiles, columns, (T*)scores, mask,
                      flipped, compare);
        return (int)cudaGetLastError();
      });
}

template <typename Unit>
int launch_lists(const SpaflLayer* layers, int layer_count, int64_t clients, int64_t columns, int64_t layer_columns,
                 const uint8_t* mask, const uint8_t* flipped, int32_t* active, int32_t* inverse, int32_t* counts, uint8_t* changed,
                 int64_t pad_to, void* stream) {
  return for_each_table(
      layers, layer_count, [](const SpaflLayer& l) { return divide_up(l.filters, LIST_ROWS); },
      [&](const Table<SpaflLayer>& table, int64_t tiles, int64_t) {
        if (tiles * clients > MAX_GRID) return (int)cudaErrorInvalidConfiguration;
        KERNEL_LAUNCH(list_kernel<Unit>, dim3((unsigned)(tiles * clients)), dim3(THREADS), stream, table, (unsigned)tiles, columns, layer_columns,
                      mask, flipped, active, inverse, counts, changed, pad_to);
        return (int)cudaGetLastError();
      });
}

}  // namespace
}  // namespace spafl

extern "C" int spafl_threshold_scores(const SpaflLayer* layers, int layer_count, int64_t clients, int64_t columns, int dtype, void* scores,
                                      uint8_t* mask, uint8_t* flipped, int compare, void* stream) {
  using namespace spafl;
#define SPAFL_CASE(code, T) \
  case code: return launch_scores<T>(layers, layer_count, clients, columns, scores, mask, flipped, compare, stream);
  switch (dtype) {
    SPAFL_CASE(SPAFL_FLOAT64, double)
    SPAFL_CASE(SPAFL_FLOAT32, float)
    SPAFL_CASE(SPAFL_FLOAT16, Half)
    SPAFL_CASE(SPAFL_BFLOAT16, BFloat16)
  }
#undef SPAFL_CASE
  return (int)cudaErrorInvalidValue;
}

extern "C" int spafl_active_lists(const SpaflLayer* layers, int layer_count, int64_t clients, int64_t columns, int64_t layer_columns,
                                  int dtype, const uint8_t* mask, const uint8_t* flipped, int32_t* active, int32_t* inverse,
                                  int32_t* counts, uint8_t* changed, int64_t pad_to, void* stream) {
  using namespace spafl;
#define SPAFL_CASE(code, Unit)                                                                                                      \
  case code: return launch_lists<Unit>(layers, layer_count, clients, columns, layer_columns, mask, flipped, active, inverse, counts, \
                                       changed, pad_to, stream);
  switch (dtype) {
    SPAFL_CASE(SPAFL_FLOAT64, uint64_t)
    SPAFL_CASE(SPAFL_FLOAT32, uint32_t)
    SPAFL_CASE(SPAFL_FLOAT16, uint16_t)
    SPAFL_CASE(SPAFL_BFLOAT16, uint16_t)
  }
#undef SPAFL_CASE
  return (int)cudaErrorInvalidValue;
}
