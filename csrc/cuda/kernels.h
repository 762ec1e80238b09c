// The C interface of the CUDA kernels: raw pointers, sizes and a stream; no torch header. Every function returns a cudaError_t as
// an int (0 is success), allocates nothing, never waits for the device, and may be captured in a CUDA graph.
//
// Words: a layer's weight is (filters, fan_in); a cohort has `clients` copies of it, one every *_stride elements. Flat outputs are
// (clients, columns): the filters of all layers side by side, layer l at [offset, offset + filters).
#pragma once
#include <stdint.h>

// Element types of weights and thresholds.
enum SpaflDtype { SPAFL_FLOAT64 = 0, SPAFL_FLOAT32 = 1, SPAFL_FLOAT16 = 2, SPAFL_BFLOAT16 = 3 };

struct SpaflLayer {
  const void* weight;         // (filters, fan_in) of client 0, rows contiguous
  const void* threshold;      // (filters) of client 0; unused by spafl_active_lists
  void* packed;               // (round_up(filters, pad_to), fan_in) of client 0; null: do not pack
  int64_t weight_stride;      // elements from one client to the next
  int64_t threshold_stride;
  int64_t packed_stride;
  int64_t filters;            // 1 or more
  int64_t fan_in;             // 1 or more
  int64_t offset;             // first column in the flat outputs
  int64_t index;              // column in counts and changed
};

// One parameter of an optimiser step: a layer's weight with its thresholds, or (threshold == null) any other parameter, which is
// cut into rows of `length` elements, the last one short.
struct SpaflParameter {
  void* value;
  const void* grad;
  void* momentum;             // null: no momentum
  void* threshold;            // null: not a threshold layer
  const void* threshold_grad;
  void* threshold_momentum;
  int64_t value_stride, grad_stride, momentum_stride;
  int64_t threshold_stride, threshold_grad_stride, threshold_momentum_stride;
  int64_t length;             // elements of a row: fan_in of a layer
  int64_t size;               // elements of one client
  int64_t offset;             // first column in scores, mask and flipped
};

// Copies between a full weight and a compact one, both contiguous: (rows, outer, columns, inner). A convolution's (O, I, kH, kW) has
// outer = 1, inner = kH * kW; its channels_last storage (O, kH, kW, I) has outer = kH * kW, inner = 1; a linear layer 1 and 1,
// or inner = H * W where its input is a flattened map. rows / columns list the kept indices, ascending (null: 0, 1, 2, ...), and their
// lengths are read on the device from row_count / column_count.
struct SpaflCompact {
  void* full;                 // (full_rows, outer, full_columns, inner) of client 0
  void* compact;              // (compact_rows, outer, compact_columns, inner) of client 0
  const int32_t* rows;
  const int32_t* row_count;   // null with rows == null: full_rows
  const int32_t* columns;
  const int32_t* column_count;
  int64_t full_stride, compact_stride;                 // elements from one client to the next
  int64_t list_stride;                                 // entries of rows and of columns from one client to the next
  int64_t count_stride;
  int64_t full_rows, full_columns, compact_rows, compact_columns;
  int64_t outer, inner;
};

#ifdef __cplusplus
extern "C" {
#endif

// scores = mean|w| per filter (dtype of the weights), mask = scores > threshold (strict; NaN is pruned), flipped = mask differs
// from its former content. compare == 0: the former content is not read and every flag of flipped is set.
int spafl_threshold_scores(const SpaflLayer* layers, int layer_count, int64_t clients, int64_t columns, int dtype, void* scores,
                           uint8_t* mask, uint8_t* flipped, int compare, void* stream);

// From mask and flipped: the active filters of each layer in ascending order (then -1), the place of each filter in that list (-1:
// pruned), counts and changed (clients, layer_columns), and the rows of the active filters, packed, with zero rows up to the
// next multiple of pad_to. Rows of packed beyond that are not written.
int spafl_active_lists(const SpaflLayer* layers, int layer_count, int64_t clients, int64_t columns, int64_t layer_columns, int dtype,
                       const uint8_t* mask, const uint8_t* flipped, int32_t* active, int32_t* inverse, int32_t* counts,
                       uint8_t* changed, int64_t pad_to, void* stream);

// Entries that partials must have for one client.
int64_t spafl_step_partials(const SpaflParameter* parameters, int parameter_count);

// Penalty, global-norm clip (clip != 0), SGD, then the new scores, mask and flipped. dtype: SPAFL_FLOAT32 or SPAFL_FLOAT64.
// learning_rate and penalty are float64 on the device, one value, or one per client when *_stride is 1.
int spafl_fused_step(const SpaflParameter* parameters, int parameter_count, int64_t clients, int64_t columns, int dtype,
                     const double* learning_rate, int64_t learning_rate_stride, const double* penalty, int64_t penalty_stride,
                     double momentum, double weight_decay, int clip, double max_norm, double* partials, double* norms, void* scores,
                     uint8_t* mask, uint8_t* flipped, void* stream);

// compact <- full: rows and columns in list order; what lies beyond the counts becomes zero. short_by (clients, item_count) gets
// the number of listed rows and columns that compact has no room for: 0 unless the caller's capacity is wrong.
int spafl_compact_gather(const SpaflCompact* items, int item_count, int64_t clients, int element_bytes, int32_t* short_by, void* stream);
// full <- compact: only the listed rows and columns are written, everything else keeps its value.
int spafl_compact_scatter(const SpaflCompact* items, int item_count, int64_t clients, int element_bytes, int32_t* short_by, void* stream);

#ifdef __cplusplus
}
#endif
