// CPU kernels behind raw pointers: no torch header here, so that they can be built and sanitised on their own.
//
// Every kernel exists once per instruction set (isa_*.cpp instantiate the same templates) and is reached through a
// table chosen at run time. All arrays are dense and row-major. float and double only.
#pragma once
#include <cstdint>

// The vector code selects its instruction set by GCC's target pragma, which clang ignores.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SPAFL_X86_VECTORS
#endif

namespace spafl {

// y = max_pool2d(relu(conv2d(x, w, b, stride=1, padding=(pad_h, pad_w))), pool), kernel = stride = pool, floor mode.
struct ConvShape {
  int64_t batch, in_channels, height, width;
  int64_t out_channels, kernel_h, kernel_w, pad_h, pad_w;
  int64_t pool;  // 2 or 3

  int64_t conv_h() const { return height + 2 * pad_h - kernel_h + 1; }
  int64_t conv_w() const { return width + 2 * pad_w - kernel_w + 1; }
  int64_t pooled_h() const { return conv_h() / pool; }
  int64_t pooled_w() const { return conv_w() / pool; }
};

// x is outer x channels x inner: NCHW has inner = H W, channels last (and N x C) has inner = 1.
struct NormShape {
  int64_t outer, channels, inner;
};

// Channels last, then max-pool with kernel = stride = pool. channels is a multiple of 8, the sides are multiples of
// pool.
struct PoolShape {
  int64_t batch, channels, height, width;
  int64_t pool;  // 2 or 3
};

// What argmax holds where ReLU blocks the winner: no gradient passes. Otherwise it is dy * pool + dx.
constexpr uint8_t kBlocked = 255;

// One layer of a threshold pass; rows = filters. A row's score is (sum |weight| + rest) / n_in.
template <typename T>
struct ThresholdRows {
  const T* weight;     // rows x columns
  const T* threshold;  // rows
  const T* rest;       // rows, or null: sum of |w| over columns that are not stored
  T* score;            // rows
  uint8_t* mask;       // rows; in: the previous mask, out: score > threshold
  int64_t rows, columns, n_in;
};

// One tensor of a step.
template <typename T>
struct StepTensor {
  T* param;
  T* grad;      // scratch; holds the clipped gradient afterwards if write_grad
  T* momentum;  // null when momentum is 0
  int64_t size;
  bool is_threshold;  // gets -penalty * exp(-param) added to its gradient
};

// One layer in a step: the weights of those of its filters that are stored, split into stored columns and dropped ones
// (whose only gradient is usually the sign term); and the thresholds of all its filters.
template <typename T>
struct StepLayer {
  T *weight, *grad, *momentum;                    // rows x columns; grad null: these filters have no gradient
  T *dropped, *dropped_grad, *dropped_momentum;   // rows x dropped_columns; dropped_grad null: sign term only
  T *threshold, *threshold_momentum;              // filters
  const T* dot;                                   // rows, or null: r_i, if it is not what the gradients show
  const int64_t* index;                           // rows: which filter a row is; no filter twice
  T* score;                                       // filters; in: of the forward pass, out: new for the stored filters
  uint8_t* mask;                                  // filters; in: of the forward pass, out: score > threshold
  int64_t rows, filters, columns, dropped_columns, n_in;
  bool window;  // estimator: gradient only where |score - threshold| > 1
};

struct StepOptions {
  double lr, momentum, weight_decay, penalty;
  double max_norm;     // < 0: no clipping
  double extra_norm2;  // added to the squared norm: gradients of entries that are in no list
  bool write_grad;
};

// A tensor of `width` channels of which `kept` are stored in another, in front of `stored - kept` channels of padding:
// outer x width x inner and outer x stored x inner.
struct ChannelShape {
  int64_t outer, width, inner, stored, kept;
  const int64_t* place;  // kept: which channel a stored one is, ascending
};

// y = conv2d(x, w, b): channels-last images, weights out x in x height x width. Of the channels the first are used: the
// others of x are not read, the others of y are 0, and so are the gradients of both and of their weights.
struct ImageConv {
  int64_t batch, in_channels, height, width;
  int64_t out_channels, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  int64_t in_used, out_used;

  int64_t out_h() const { return (height + 2 * pad_h - kernel_h) / stride_h + 1; }
  int64_t out_w() const { return (width + 2 * pad_w - kernel_w) / stride_w + 1; }
};

template <typename T>
struct Kernels {
  void (*conv_relu_pool)(const ConvShape&, const T* x, const T* w, const T* bias, T* y, uint8_t* argmax);
  // gw and gbias are overwritten; gbias may be null.
  void (*conv_relu_pool_grad_weight)(const ConvShape&, const T* x, const T* gy, const uint8_t* argmax, T* gw,
                                     T* gbias);
  void (*conv_relu_pool_grad_input)(const ConvShape&, const T* w, const T* gy, const uint8_t* argmax, T* gx);
  // planes x height x width -> planes x height/pool x width/pool
  void (*relu_pool)(int64_t planes, int64_t height, int64_t width, int64_t pool, const T* x, T* y, uint8_t* argmax);
  void (*relu_pool_grad)(int64_t planes, int64_t height, int64_t width, int64_t pool, const T* gy,
                         const uint8_t* argmax, T* gx);
  // Statistics of a batch of 2 or more values per channel: mean, 1 / sqrt(variance + eps), unbiased variance.
  void (*norm_moments)(const NormShape&, const T* x, double eps, T* mean, T* rstd, T* var);
  // y = relu((x - mean) * rstd * weight + bias); weight and bias may be null.
  void (*norm_relu)(const NormShape&, const T* x, const T* weight, const T* bias, const T* mean, const T* rstd, T* y);
  // training: mean and rstd depend on x.
  void (*norm_relu_grad)(const NormShape&, const T* gy, const T* x, const T* weight, const T* bias, const T* mean,
                         const T* rstd, bool training, T* gx, T* gweight, T* gbias);
  // The same, then max-pool.
  void (*norm_relu_pool)(const PoolShape&, const T* x, const T* weight, const T* bias, const T* mean, const T* rstd,
                         T* y);
  void (*norm_relu_pool_grad)(const PoolShape&, const T* gy, const T* x, const T* weight, const T* bias, const T* mean,
                              const T* rstd, bool training, T* gx, T* gweight, T* gbias);
  // Number of rows whose mask changed.
  int64_t (*threshold_rows)(const ThresholdRows<T>&);
  // Everything in place; flips: by layer, the number of filters whose mask changed. Returns the gradient norm before
  // clipping (without clipping: the root of extra_norm2).
  double (*step)(const StepLayer<T>* layers, int64_t layer_count, const StepTensor<T>* tensors, int64_t tensor_count,
                 const StepOptions&, int64_t* flips);
  // y = stream + x in its channels and constants (width - kept, or null: 0) in the others. stream may be null.
  void (*expand_channels)(const ChannelShape&, const T* x, const T* constants, const T* stream, T* y);
  // The gradients: of x (0 in the padding), and of the constants, unless that is null.
  void (*collect_channels)(const ChannelShape&, const T* grad, T* kept_grad, T* constant_grad);
  // bias may be null, and gbias.
  void (*image_conv)(const ImageConv&, const T* x, const T* w, const T* bias, T* y);
  void (*image_conv_grad_input)(const ImageConv&, const T* w, const T* gy, T* gx);
  void (*image_conv_grad_weight)(const ImageConv&, const T* x, const T* gy, T* gw, T* gbias);
};

enum class Isa { scalar, avx2, avx512 };

// The best instruction set of this machine, or the one SPAFL_CPU_ISA names. Throws std::runtime_error for a name that
// is unknown or that this machine or build cannot run.
Isa active_isa();
bool isa_supported(Isa);
const char* isa_name(Isa);
template <typename T>
const Kernels<T>& kernels();           // of active_isa()
template <typename T>
const Kernels<T>& kernels_for(Isa);    // for tests

}  // namespace spafl
