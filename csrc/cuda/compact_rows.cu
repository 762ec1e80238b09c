// Rebuilds of compact weights after a mask change: all layers and clients in one launch, in either direction. A value is copied,
// never computed. It runs once per mask change, not per step: one warp per row, and 128-bit copies where whole rows are kept.
// Each element of `compact` is written exactly once (padding as zero), so that it may be uninitialised before.
#include "numeric.cuh"

namespace spafl {
namespace {

constexpr int COPY_ROWS = WARPS;          // compact rows of a block: one per warp

template <typename Unit, bool GATHER>
__global__ void __launch_bounds__(THREADS)
    compact_kernel(const Table<SpaflCompact> __grid_constant__ table, unsigned tiles, int first_item, int item_count,
                   int32_t* __restrict__ short_by) {
  const int64_t client = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int owner = owner_of(table, tile);
  const SpaflCompact& item = table.entry[owner];
  const int lane = threadIdx.x % WARP;
  const int64_t rows = item.rows ? item.row_count[client * item.count_stride] : item.full_rows;
  const int64_t columns = item.columns ? item.column_count[client * item.count_stride] : item.full_columns;
  if (threadIdx.x == 0 && tile == table.first_tile[owner]) {
    const int64_t row_excess = rows > item.compact_rows ? rows - item.compact_rows : 0;
    const int64_t column_excess = columns > item.compact_columns ? columns - item.compact_columns : 0;
    short_by[client * item_count + first_item + owner] = (int32_t)(row_excess + column_excess);
  }
  const int64_t row = (tile - table.first_tile[owner]) * COPY_ROWS + threadIdx.x / WARP;
  if (row >= item.compact_rows) return;                       // a whole warp
  const bool listed = row < rows;
  if (!GATHER && !listed) return;
  const int64_t full_row = !listed ? 0 : item.rows ? item.rows[client * item.list_stride + row] : row;
  const int64_t full_length = item.outer * item.full_columns * item.inner;
  const int64_t compact_length = item.outer * item.compact_columns * item.inner;
  Unit* full = (Unit*)item.full + client * item.full_stride + full_row * full_length;
  Unit* compact = (Unit*)item.compact + client * item.compact_stride + row * compact_length;

  if (!item.columns && item.compact_columns == item.full_columns) {
    if (GATHER) write_row(compact, listed ? full : nullptr, compact_length, lane);
    else write_row(full, compact, compact_length, lane);
    return;
  }
  const int32_t* list = item.columns ? item.columns + client * item.list_stride : nullptr;
  for (int64_t i = lane; i < compact_length; i += WARP) {
    // The launcher refuses rows of 2^31 elements or more: 32-bit divisions.
    const unsigned inner = (unsigned)i % (unsigned)item.inner, pair = (unsigned)i / (unsigned)item.inner;
    const unsigned column = pair % (unsigned)item.compact_columns, outer = pair / (unsigned)item.compact_columns;
    const bool kept = listed && column < columns;
    if (GATHER && !kept) compact[i] = 0;
    if (!kept) continue;
    const int64_t full_column = list ? list[column] : column;
    Unit& other = full[(outer * item.full_columns + full_column) * item.inner + inner];
    if (GATHER) compact[i] = other;
    else other = compact[i];
  }
}

template <typename Unit, bool GATHER>
int launch_copy(const SpaflCompact* items, int item_count, int64_t clients, int32_t* short_by, void* stream) {
  int first_item = 0;
  return for_each_table(
      items, item_count, [](const SpaflCompact& i) { return divide_up(i.compact_rows, COPY_ROWS); },
      [&](const Table<SpaflCompact>& table, int64_t tiles, int64_t) {
        if (tiles * clients > MAX_GRID) return (int)cudaErrorInvalidConfiguration;
        for (int e = 0; e < table.count; e++)
          if (table.entry[e].outer * table.entry[e].compact_columns * table.entry[e].inner > MAX_GRID) return (int)cudaErrorInvalidValue;
        KERNEL_LAUNCH((compact_kernel<Unit, GATHER>), dim3((unsigned)(tiles * clients)), dim3(THREADS), stream, table, (unsigned)tiles, first_item,
                      item_count, short_by);
        first_item += table.count;
        return (int)cudaGetLastError();
      });
}

template <bool GATHER>
int copy_any(const SpaflCompact* items, int item_count, int64_t clients, int element_bytes, int32_t* short_by, void* stream) {
  switch (element_bytes) {
    case 2: return launch_copy<uint16_t, GATHER>(items, item_count, clients, short_by, stream);
    case 4: return launch_copy<uint32_t, GATHER>(items, item_count, clients, short_by, stream);
    case 8: return launch_copy<uint64_t, GATHER>(items, item_count, clients, short_by, stream);
  }
  return (int)cudaErrorInvalidValue;
}

}  // namespace
}  // namespace spafl

extern "C" int spafl_compact_gather(const SpaflCompact* items, int item_count, int64_t clients, int element_bytes, int32_t* short_by,
                                    void* stream) {
  return spafl::copy_any<true>(items, item_count, clients, element_bytes, short_by, stream);
}

extern "C" int spafl_compact_scatter(const SpaflCompact* items, int item_count, int64_t clients, int element_bytes, int32_t* short_by,
                                     void* stream) {
  return spafl::copy_any<false>(items, item_count, clients, element_bytes, short_by, stream);
}
