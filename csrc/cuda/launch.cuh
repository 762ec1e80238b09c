// How a kernel is launched and how it asks for shared memory. Kernels use these two macros and nothing else of the launch
// syntax, so that the same source also builds with g++ (tests/kernels/gpu/cuda/support/cpu_shim.h, included on the command line).
#pragma once
#ifdef __CUDACC__
#include <cuda_runtime.h>
#define KERNEL_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, (cudaStream_t)(stream)>>>(__VA_ARGS__)
#define KERNEL_SHARED(T, name, size) __shared__ T name[size]
#endif
#include <stdint.h>

namespace spafl {

constexpr int WARP = 32;
constexpr int WARPS = 8;                  // of a block
constexpr int THREADS = WARP * WARPS;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int64_t MAX_GRID = 2147483647;  // blocks in x

// Descriptors travel as a kernel argument, not through a device buffer: a CUDA graph then holds its own copy, nothing is
// allocated, and no host-to-device copy precedes the launch. The limit of all arguments is 32,764 bytes (CUDA >= 12.1, sm_70 and
// newer). More entries than MAX_ENTRIES take more launches.
constexpr int MAX_ENTRIES = 96;

template <typename Entry>
struct Table {
  Entry entry[MAX_ENTRIES];
  int64_t first_tile[MAX_ENTRIES + 1];    // tiles of entry e: [first_tile[e], first_tile[e + 1])
  int count;
};

// The entry that owns a tile: binary search, the same for all threads of a block.
template <typename Entry>
__device__ __forceinline__ int owner_of(const Table<Entry>& table, int64_t tile) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_tile[middle] <= tile) low = middle;
    else high = middle;
  }
  return low;
}

// Calls launch(table, tiles, base) for entries in groups of MAX_ENTRIES; base counts the tiles of the groups before.
template <typename Entry, typename Tiles, typename Launch>
int for_each_table(const Entry* entries, int count, Tiles tiles_of, Launch launch) {
  int64_t base = 0;
  for (int start = 0; start < count; start += MAX_ENTRIES) {
    Table<Entry> table{};
    table.count = count - start < MAX_ENTRIES ? count - start : MAX_ENTRIES;
    for (int e = 0; e < table.count; e++) {
      table.entry[e] = entries[start + e];
      table.first_tile[e + 1] = table.first_tile[e] + tiles_of(entries[start + e]);
    }
    const int error = launch(table, table.first_tile[table.count], base);
    if (error) return error;
    base += table.first_tile[table.count];
  }
  return 0;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace spafl
