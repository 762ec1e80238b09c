// Operator schemas and their CPU registration, through torch's stable ABI: one library serves every torch >= 2.11.
//
// These functions check what the kernels rely on (device, dtype, contiguity, shapes) and nothing else; friendlier
// checks and autograd live in spafl_kernels/cpu. The tensors' memory is the caller's: nothing is kept between calls.
#include <algorithm>
#include <cmath>

#include "bindings.h"

namespace spafl {
namespace {

ConvShape conv_shape(const char* op, const std::vector<int64_t>& x, const std::vector<int64_t>& w, int64_t pad_h,
                     int64_t pad_w, int64_t pool) {
  const ConvShape s{x[0], x[1], x[2], x[3], w[0], w[2], w[3], pad_h, pad_w, pool};
  CHECK(w[1] == x[1], op, ": weight has ", w[1], " input channels but input has ", x[1]);
  CHECK(pool == 2 || pool == 3, op, ": pool must be 2 or 3; got ", pool);
  CHECK(pad_h >= 0 && pad_w >= 0, op, ": padding must not be negative; got ", pad_h, ", ", pad_w);
  CHECK(w[0] >= 1 && w[1] >= 1 && w[1] <= 64, op, ": weight must have 1 or more filters of 1 to 64 channels; got ", w[0],
        " of ", w[1]);
  CHECK(w[2] >= 1 && w[2] <= 11 && w[3] >= 1 && w[3] <= 11, op, ": kernel sides must be 1 to 11; got ", w[2], "x", w[3]);
  CHECK(s.conv_h() >= pool && s.conv_w() >= pool, op, ": input of ", x[2], "x", x[3],
        " is too small for this kernel, padding and pool");
  // Offsets inside one padded image are 32-bit.
  CHECK((x[2] + 2 * pad_h + 16) * (x[3] + 2 * pad_w + 16) * x[1] < (int64_t)1 << 30, op, ": input images are too large");
  return s;
}

std::tuple<Tensor, Tensor> conv_relu_pool(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                                          int64_t pad_h, int64_t pad_w, int64_t pool) {
  const char* op = "conv_relu_pool";
  check_dense(op, "input", x, 4), check_dense(op, "weight", w, 4), check_float(op, "input", x);
  check_type(op, "weight", w, x.scalar_type());
  const ConvShape s = conv_shape(op, shape_of(x), shape_of(w), pad_h, pad_w, pool);
  if (bias) {
    check_dense(op, "bias", *bias, 1), check_type(op, "bias", *bias, x.scalar_type());
    CHECK(bias->size(0) == s.out_channels, op, ": bias must have ", s.out_channels, " values; got ", bias->size(0));
  }
  const std::vector<int64_t> shape{s.batch, s.out_channels, s.pooled_h(), s.pooled_w()};
  Tensor y = new_like(x, shape), argmax = new_like(x, shape, ScalarType::Byte);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().conv_relu_pool(s, in<T>(x), in<T>(w), bias ? in<T>(*bias) : nullptr, out<T>(y), out<uint8_t>(argmax));
  });
  return {y, argmax};
}

void check_pooled(const char* op, const ConvShape& s, const Tensor& gy, const Tensor& argmax, ScalarType type) {
  const std::vector<int64_t> shape{s.batch, s.out_channels, s.pooled_h(), s.pooled_w()};
  check_dense(op, "grad", gy, 4), check_dense(op, "argmax", argmax, 4);
  check_type(op, "grad", gy, type), check_type(op, "argmax", argmax, ScalarType::Byte);
  CHECK(shape_of(gy) == shape && shape_of(argmax) == shape, op, ": grad and argmax must have the shape of the output");
}

std::tuple<Tensor, Tensor> conv_relu_pool_grad_weight(const Tensor& gy, const Tensor& x, const Tensor& w,
                                                      const Tensor& argmax, int64_t pad_h, int64_t pad_w, int64_t pool) {
  const char* op = "conv_relu_pool_grad_weight";
  check_dense(op, "input", x, 4), check_dense(op, "weight", w, 4), check_float(op, "input", x);
  check_type(op, "weight", w, x.scalar_type());
  const ConvShape s = conv_shape(op, shape_of(x), shape_of(w), pad_h, pad_w, pool);
  check_pooled(op, s, gy, argmax, x.scalar_type());
  Tensor gw = new_like(w, shape_of(w)), gbias = new_like(w, {s.out_channels});
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().conv_relu_pool_grad_weight(s, in<T>(x), in<T>(gy), in<uint8_t>(argmax), out<T>(gw), out<T>(gbias));
  });
  return {gw, gbias};
}

Tensor conv_relu_pool_grad_input(const Tensor& gy, const Tensor& x, const Tensor& w, const Tensor& argmax, int64_t pad_h,
                                 int64_t pad_w, int64_t pool) {
  const char* op = "conv_relu_pool_grad_input";
  check_dense(op, "input", x, 4), check_dense(op, "weight", w, 4), check_float(op, "weight", w);
  const ConvShape s = conv_shape(op, shape_of(x), shape_of(w), pad_h, pad_w, pool);
  check_pooled(op, s, gy, argmax, w.scalar_type());
  Tensor gx = new_like(w, shape_of(x));
  with_type(w, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().conv_relu_pool_grad_input(s, in<T>(w), in<T>(gy), in<uint8_t>(argmax), out<T>(gx));
  });
  return gx;
}

std::tuple<Tensor, Tensor> relu_pool(const Tensor& x, int64_t pool) {
  const char* op = "relu_pool";
  check_dense(op, "input", x, 4), check_float(op, "input", x);
  CHECK(pool == 2 || pool == 3, op, ": pool must be 2 or 3; got ", pool);
  const std::vector<int64_t> from = shape_of(x);
  CHECK(from[2] >= pool && from[3] >= pool, op, ": input of ", from[2], "x", from[3], " is too small for pool ", pool);
  const std::vector<int64_t> shape{from[0], from[1], from[2] / pool, from[3] / pool};
  Tensor y = new_like(x, shape), argmax = new_like(x, shape, ScalarType::Byte);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().relu_pool(from[0] * from[1], from[2], from[3], pool, in<T>(x), out<T>(y), out<uint8_t>(argmax));
  });
  return {y, argmax};
}

Tensor relu_pool_grad(const Tensor& gy, const Tensor& argmax, int64_t height, int64_t width, int64_t pool) {
  const char* op = "relu_pool_grad";
  check_dense(op, "grad", gy, 4), check_dense(op, "argmax", argmax, 4), check_float(op, "grad", gy);
  check_type(op, "argmax", argmax, ScalarType::Byte);
  CHECK(pool == 2 || pool == 3, op, ": pool must be 2 or 3; got ", pool);
  const std::vector<int64_t> from = shape_of(gy);
  CHECK(shape_of(argmax) == from, op, ": grad and argmax must have the same shape");
  CHECK(height / pool == from[2] && width / pool == from[3], op, ": grad does not fit an input of ", height, "x", width);
  Tensor gx = new_like(gy, {from[0], from[1], height, width});
  with_type(gy, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().relu_pool_grad(from[0] * from[1], height, width, pool, in<T>(gy), in<uint8_t>(argmax), out<T>(gx));
  });
  return gx;
}

// How a tensor of N x C x ... lies in memory: row-major, or channels last with four dimensions.
NormShape norm_shape(const char* op, const char* name, const Tensor& t) {
  CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU");
  CHECK(t.dim() >= 2 && t.dim() <= 4, op, ": ", name, " must have 2 to 4 dimensions; got ", t.dim());
  const std::vector<int64_t> size = shape_of(t);
  const int64_t n = size[0], c = size[1], positions = t.dim() > 2 ? t.numel() / std::max<int64_t>(1, n * c) : 1;
  CHECK(n >= 1 && c >= 1 && positions >= 1, op, ": ", name, " must not be empty");
  if (t.is_contiguous()) return {n, c, positions};
  const auto stride = t.strides();
  const int64_t last[] = {c * positions, 1, t.dim() == 4 ? size[3] * c : 0, c};
  for (int64_t d = 0; d < 4; d++)
    CHECK(t.dim() == 4 && (size[d] == 1 || stride[d] == last[d]), op, ": ", name,
          " must be contiguous, or channels last with 4 dimensions");
  return {n * positions, c, 1};
}

template <typename T>
const T* channel_data(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& x,
                      int64_t count) {
  if (!t) return nullptr;
  check_dense(op, name, *t), check_type(op, name, *t, x.scalar_type());
  CHECK(t->numel() == count, op, ": ", name, " must have ", count, " values; got ", t->numel());
  return in<T>(*t);
}

// Where pooling is part of the kernel; pool 1 is none.
PoolShape norm_pool_shape(const char* op, const Tensor& x, const NormShape& s, int64_t pool) {
  CHECK(pool >= 1 && pool <= 3, op, ": pool must be 1, 2 or 3; got ", pool);
  if (pool == 1) return {};
  const std::vector<int64_t> size = shape_of(x);
  CHECK(x.dim() == 4 && s.inner == 1 && s.channels % 8 == 0 && size[2] % pool == 0 && size[3] % pool == 0, op,
        ": pool needs a channels-last input of 8, 16, ... channels, its sides multiples of pool");
  CHECK(size[1] * size[2] * size[3] < (int64_t)1 << 31, op, ": input images are too large");  // 32-bit offsets
  return {size[0], size[1], size[2], size[3], pool};
}

// Channels last, like the input.
Tensor new_pooled(const Tensor& x, const PoolShape& p) {
  const Tensor y = new_like(x, {p.batch, p.height / p.pool, p.width / p.pool, p.channels});
  return torch::stable::transpose(torch::stable::transpose(y, 2, 3), 1, 2);
}

std::tuple<Tensor, Tensor> batch_norm_relu(const Tensor& x, const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& bias, const std::optional<Tensor>& mean,
                                           const std::optional<Tensor>& var, double eps, int64_t pool) {
  const char* op = "batch_norm_relu";
  check_float(op, "input", x);
  const NormShape s = norm_shape(op, "input", x);
  const PoolShape p = norm_pool_shape(op, x, s, pool);
  CHECK(mean.has_value() == var.has_value(), op, ": mean and var must both be given, or both be left out");
  CHECK(mean || s.outer * s.inner > 1, op, ": training needs more than 1 value per channel");
  Tensor y = pool > 1 ? new_pooled(x, p) : torch::stable::empty_like(x), stats = new_like(x, {3, s.channels});
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t c = s.channels;
    const T *w = channel_data<T>(op, "weight", weight, x, c), *b = channel_data<T>(op, "bias", bias, x, c);
    T* to = out<T>(stats);
    if (mean) {
      const T *m = channel_data<T>(op, "mean", mean, x, c), *v = channel_data<T>(op, "var", var, x, c);
      for (int64_t i = 0; i < c; i++) to[i] = m[i], to[c + i] = (T)(1 / std::sqrt(v[i] + eps)), to[2 * c + i] = v[i];
    } else {
      kernels<T>().norm_moments(s, in<T>(x), eps, to, to + c, to + 2 * c);
    }
    if (pool > 1)
      kernels<T>().norm_relu_pool(p, in<T>(x), w, b, to, to + c, out<T>(y));
    else
      kernels<T>().norm_relu(s, in<T>(x), w, b, to, to + c, out<T>(y));
  });
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_grad(const Tensor& gy, const Tensor& x,
                                                        const std::optional<Tensor>& weight,
                                                        const std::optional<Tensor>& bias, const Tensor& stats,
                                                        bool training, int64_t pool) {
  const char* op = "batch_norm_relu_grad";
  check_float(op, "input", x), check_type(op, "grad", gy, x.scalar_type());
  const NormShape s = norm_shape(op, "input", x), g = norm_shape(op, "grad", gy);
  const PoolShape p = norm_pool_shape(op, x, s, pool);
  if (pool > 1) {
    const std::vector<int64_t> pooled{p.batch, p.channels, p.height / pool, p.width / pool};
    CHECK(shape_of(gy) == pooled, op, ": grad must have the shape of the output");
    // A map of one pixel is both row-major and channels last.
    CHECK(g.inner == 1, op, ": grad must be channels last");
  } else {
    CHECK(shape_of(x) == shape_of(gy) && s.inner == g.inner, op,
          ": grad must have the shape and the memory format of input");
  }
  Tensor gx = torch::stable::empty_like(x), gw = new_like(x, {s.channels}), gb = new_like(x, {s.channels});
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t c = s.channels;
    const T *w = channel_data<T>(op, "weight", weight, x, c), *b = channel_data<T>(op, "bias", bias, x, c);
    const T* from = channel_data<T>(op, "stats", stats, x, 3 * c);
    if (pool > 1)
      kernels<T>().norm_relu_pool_grad(p, in<T>(gy), in<T>(x), w, b, from, from + c, training, out<T>(gx), out<T>(gw),
                                       out<T>(gb));
    else
      kernels<T>().norm_relu_grad(s, in<T>(gy), in<T>(x), w, b, from, from + c, training, out<T>(gx), out<T>(gw),
                                  out<T>(gb));
  });
  return {gx, gw, gb};
}

// As torch: in double, rounded once.
void batch_norm_running(const Tensor& mean, const Tensor& var, const Tensor& stats, double momentum) {
  const char* op = "batch_norm_running";
  check_float(op, "stats", stats);
  const int64_t c = stats.numel() / 3;
  with_type(stats, [&](auto zero) {
    using T = decltype(zero);
    const T* from = channel_data<T>(op, "stats", stats, stats, 3 * c);
    channel_data<T>(op, "running_mean", mean, stats, c), channel_data<T>(op, "running_var", var, stats, c);
    T *m = out<T>(mean), *v = out<T>(var);
    for (int64_t i = 0; i < c; i++) {
      m[i] = (T)(momentum * from[i] + (1 - momentum) * m[i]);
      v[i] = (T)(momentum * from[2 * c + i] + (1 - momentum) * v[i]);
    }
  });
}

// Both in one call, in training. It has no derivative, so that no Python stands before it.
std::tuple<Tensor, Tensor> batch_norm_relu_train(const Tensor& x, const std::optional<Tensor>& weight,
                                                 const std::optional<Tensor>& bias, const std::optional<Tensor>& mean,
                                                 const std::optional<Tensor>& var, double momentum, double eps,
                                                 int64_t pool) {
  CHECK(mean.has_value() == var.has_value(),
        "batch_norm_relu_train: running_mean and running_var must both be given, or both be left out");
  auto result = batch_norm_relu(x, weight, bias, std::nullopt, std::nullopt, eps, pool);
  if (mean) batch_norm_running(*mean, *var, std::get<1>(result), momentum);
  return result;
}

void check_count(const char* op, const char* name, size_t got, size_t want) {
  CHECK(got == want, op, ": ", name, " must have ", want, " entries; got ", got);
}

Tensor threshold_pass(const std::vector<Tensor>& weights, const std::vector<Tensor>& thresholds,
                      const std::vector<Tensor>& rests, const std::vector<int64_t>& n_in,
                      const std::vector<Tensor>& scores, const std::vector<Tensor>& masks) {
  const char* op = "threshold_pass";
  const size_t layers = weights.size();
  CHECK(layers > 0, op, ": weights must not be empty");
  check_count(op, "thresholds", thresholds.size(), layers), check_count(op, "n_in", n_in.size(), layers);
  check_count(op, "scores", scores.size(), layers), check_count(op, "masks", masks.size(), layers);
  check_count(op, "rests", rests.size(), rests.empty() ? 0 : layers);
  const ScalarType type = weights[0].scalar_type();
  check_float(op, "weights", weights[0]);
  for (size_t i = 0; i < layers; i++) {
    check_dense(op, "weights", weights[i]), check_type(op, "weights", weights[i], type);
    CHECK(weights[i].dim() >= 1, op, ": weights must have at least 1 dimension");
    const int64_t rows = weights[i].size(0);
    const auto check_rows = [&](const char* name, const Tensor& t) {
      check_dense(op, name, t);
      CHECK(t.numel() == rows, op, ": ", name, "[", i, "] must have ", rows, " values; got ", t.numel());
    };
    check_rows("thresholds", thresholds[i]), check_type(op, "thresholds", thresholds[i], type);
    check_rows("scores", scores[i]), check_type(op, "scores", scores[i], type);
    check_rows("masks", masks[i]), check_bytes(op, "masks", masks[i]);
    if (!rests.empty()) check_rows("rests", rests[i]), check_type(op, "rests", rests[i], type);
    CHECK(n_in[i] >= 1, op, ": n_in must be positive; got ", n_in[i]);
  }
  Tensor flips = new_like(weights[0], {(int64_t)layers}, ScalarType::Long);
  int64_t* flip = out<int64_t>(flips);
  with_type(weights[0], [&](auto zero) {
    using T = decltype(zero);
    for (size_t i = 0; i < layers; i++) {
      const int64_t rows = weights[i].size(0);
      flip[i] = kernels<T>().threshold_rows({in<T>(weights[i]), in<T>(thresholds[i]),
                                             rests.empty() ? nullptr : in<T>(rests[i]), out<T>(scores[i]),
                                             out<uint8_t>(masks[i]), rows, rows ? weights[i].numel() / rows : 0,
                                             n_in[i]});
    }
  });
  return flips;
}

template <typename T>
std::vector<StepTensor<T>> step_tensors(const char* op, const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                                        const std::vector<Tensor>& momenta, const std::vector<int64_t>& is_threshold,
                                        bool with_momentum, ScalarType type) {
  const size_t count = params.size();
  check_count(op, "grads", grads.size(), count), check_count(op, "is_threshold", is_threshold.size(), count);
  check_count(op, "momenta", momenta.size(), with_momentum ? count : 0);
  std::vector<StepTensor<T>> tensors(count);
  for (size_t i = 0; i < count; i++) {
    const auto check_like = [&](const char* name, const Tensor& t) {
      check_dense(op, name, t), check_type(op, name, t, type);
      CHECK(t.numel() == params[i].numel(), op, ": ", name, "[", i, "] must have ", params[i].numel(), " values; got ",
            t.numel());
    };
    check_like("params", params[i]), check_like("grads", grads[i]);
    if (with_momentum) check_like("momenta", momenta[i]);
    tensors[i] = {out<T>(params[i]), out<T>(grads[i]), with_momentum ? out<T>(momenta[i]) : nullptr, params[i].numel(),
                  is_threshold[i] != 0};
  }
  return tensors;
}

Tensor sgd_step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& momenta,
                const std::vector<int64_t>& is_threshold, double lr, double momentum, double weight_decay,
                double penalty, double max_norm, double extra_norm2, bool write_grad) {
  const char* op = "sgd_step";
  CHECK(!params.empty(), op, ": params must not be empty");
  check_float(op, "params", params[0]);
  Tensor norm = new_like(params[0], {});
  with_type(params[0], [&](auto zero) {
    using T = decltype(zero);
    const auto tensors = step_tensors<T>(op, params, grads, momenta, is_threshold, momentum != 0, params[0].scalar_type());
    const StepOptions options{lr, momentum, weight_decay, penalty, max_norm, extra_norm2, write_grad};
    *out<T>(norm) = (T)kernels<T>().step(nullptr, 0, tensors.data(), (int64_t)tensors.size(), options, nullptr);
  });
  return norm;
}

// An empty tensor stands for "none" in grads, dropped, dropped_grads and dots.
std::tuple<Tensor, Tensor> threshold_step(
    const std::vector<Tensor>& weights, const std::vector<Tensor>& grads, const std::vector<Tensor>& weight_momenta,
    const std::vector<Tensor>& dropped, const std::vector<Tensor>& dropped_grads,
    const std::vector<Tensor>& dropped_momenta, const std::vector<Tensor>& thresholds,
    const std::vector<Tensor>& threshold_momenta, const std::vector<Tensor>& dots, const std::vector<Tensor>& index,
    const std::vector<Tensor>& scores, const std::vector<Tensor>& masks, const std::vector<int64_t>& n_in,
    const std::vector<int64_t>& window, const std::vector<Tensor>& params, const std::vector<Tensor>& param_grads,
    const std::vector<Tensor>& momenta, const std::vector<int64_t>& is_threshold, double lr, double momentum,
    double weight_decay, double penalty, double max_norm, double extra_norm2, bool write_grad) {
  const char* op = "threshold_step";
  const size_t count = weights.size();
  const bool with_momentum = momentum != 0;
  CHECK(count > 0, op, ": weights must not be empty");
  check_float(op, "weights", weights[0]);
  const ScalarType type = weights[0].scalar_type();
  const size_t momentum_count = with_momentum ? count : 0;
  check_count(op, "grads", grads.size(), count), check_count(op, "dropped", dropped.size(), count);
  check_count(op, "dropped_grads", dropped_grads.size(), count), check_count(op, "index", index.size(), count);
  check_count(op, "thresholds", thresholds.size(), count), check_count(op, "dots", dots.size(), count);
  check_count(op, "scores", scores.size(), count), check_count(op, "masks", masks.size(), count);
  check_count(op, "n_in", n_in.size(), count), check_count(op, "window", window.size(), count);
  check_count(op, "weight_momenta", weight_momenta.size(), momentum_count);
  check_count(op, "dropped_momenta", dropped_momenta.size(), momentum_count);
  check_count(op, "threshold_momenta", threshold_momenta.size(), momentum_count);
  Tensor norm = new_like(weights[0], {}), flips = new_like(weights[0], {(int64_t)count}, ScalarType::Long);
  with_type(weights[0], [&](auto zero) {
    using T = decltype(zero);
    std::vector<StepLayer<T>> layers(count);
    for (size_t i = 0; i < count; i++) {
      const auto data = [&](const char* name, const Tensor& t, int64_t size, bool may_be_empty = false) -> T* {
        check_dense(op, name, t), check_type(op, name, t, type);
        if (may_be_empty && t.numel() == 0) return nullptr;
        CHECK(t.numel() == size, op, ": ", name, "[", i, "] must have ", size, " values; got ", t.numel());
        return out<T>(t);
      };
      StepLayer<T>& layer = layers[i];
      layer.filters = thresholds[i].numel();
      check_dense(op, "index", index[i]);
      CHECK(index[i].scalar_type() == ScalarType::Long, op, ": index[", i, "] must be int64");
      layer.rows = index[i].numel();
      layer.index = in<int64_t>(index[i]);
      for (int64_t row = 0; row < layer.rows; row++)
        CHECK(layer.index[row] >= 0 && layer.index[row] < layer.filters, op, ": index[", i, "] must be in [0, ",
              layer.filters, "); got ", layer.index[row]);
      // Stored weights may have padding rows behind the filters; they are left alone.
      const int64_t stored = weights[i].dim() ? weights[i].size(0) : 0, dropped_stored = dropped[i].dim() ? dropped[i].size(0) : 0;
      CHECK(stored >= layer.rows, op, ": weights[", i, "] must have at least ", layer.rows, " rows");
      layer.columns = stored ? weights[i].numel() / stored : 0;
      layer.dropped_columns = dropped[i].numel() ? dropped[i].numel() / dropped_stored : 0;
      CHECK(!layer.dropped_columns || dropped_stored >= layer.rows, op, ": dropped[", i, "] must have at least ",
            layer.rows, " rows");
      CHECK(n_in[i] >= 1, op, ": n_in must be positive; got ", n_in[i]);
      const int64_t size = weights[i].numel(), dropped_size = dropped[i].numel();
      layer.weight = data("weights", weights[i], size);
      layer.grad = data("grads", grads[i], size, true);
      layer.momentum = with_momentum ? data("weight_momenta", weight_momenta[i], size) : nullptr;
      layer.dropped = data("dropped", dropped[i], dropped_size);
      layer.dropped_grad = data("dropped_grads", dropped_grads[i], dropped_size, true);
      layer.dropped_momentum = with_momentum ? data("dropped_momenta", dropped_momenta[i], dropped_size) : nullptr;
      layer.threshold = data("thresholds", thresholds[i], layer.filters);
      layer.threshold_momentum = with_momentum ? data("threshold_momenta", threshold_momenta[i], layer.filters) : nullptr;
      check_dense(op, "dots", dots[i]), check_type(op, "dots", dots[i], type);
      CHECK(dots[i].numel() == 0 || dots[i].numel() >= layer.rows, op, ": dots[", i, "] must have ", layer.rows,
            " values; got ", dots[i].numel());
      layer.dot = dots[i].numel() ? in<T>(dots[i]) : nullptr;
      layer.score = data("scores", scores[i], layer.filters);
      check_dense(op, "masks", masks[i]), check_bytes(op, "masks", masks[i]);
      CHECK(masks[i].numel() == layer.filters, op, ": masks[", i, "] must have ", layer.filters, " values; got ",
            masks[i].numel());
      layer.mask = out<uint8_t>(masks[i]);
      layer.n_in = n_in[i];
      layer.window = window[i] != 0;
    }
    const auto tensors = step_tensors<T>(op, params, param_grads, momenta, is_threshold, with_momentum, type);
    const StepOptions options{lr, momentum, weight_decay, penalty, max_norm, extra_norm2, write_grad};
    *out<T>(norm) = (T)kernels<T>().step(layers.data(), (int64_t)count, tensors.data(), (int64_t)tensors.size(), options,
                                         out<int64_t>(flips));
  });
  return {norm, flips};
}

// A number that is not part of a tensor: bit i is set if this machine runs instruction set i (0 scalar, 1 avx2,
// 2 avx512); the active one is added as 16 * i.
int64_t cpu_isa() {
  int64_t bits = 16 * (int64_t)active_isa();
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) bits |= (int64_t)isa_supported(isa) << (int)isa;
  return bits;
}

}  // namespace
}  // namespace spafl

// Read by spafl_kernels/native.py from the file's bytes, before it is loaded: a library that cannot be loaded still
// tells what it was built for. SPAFL_BUILD is filled in by setup.py.
#ifndef SPAFL_BUILD
#error "compile through setup.py, which defines SPAFL_BUILD"
#endif
extern "C" __attribute__((visibility("default"), used)) const char spafl_build[] = "SPAFL_BUILD{" SPAFL_BUILD "}";

// A fragment: cuda_bindings.cpp and Python add operators to the same namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(spafl, m) {
  m.def("conv_relu_pool(Tensor input, Tensor weight, Tensor? bias, int pad_h, int pad_w, int pool) -> (Tensor, Tensor)");
  m.def(
      "conv_relu_pool_grad_weight(Tensor grad, Tensor input, Tensor weight, Tensor argmax, int pad_h, int pad_w, "
      "int pool) -> (Tensor, Tensor)");
  m.def(
      "conv_relu_pool_grad_input(Tensor grad, Tensor input, Tensor weight, Tensor argmax, int pad_h, int pad_w, "
      "int pool) -> Tensor");
  m.def("relu_pool(Tensor input, int pool) -> (Tensor, Tensor)");
  m.def("relu_pool_grad(Tensor grad, Tensor argmax, int height, int width, int pool) -> Tensor");
  m.def(
      "batch_norm_relu(Tensor input, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, "
      "int pool) -> (Tensor, Tensor)");
  m.def(
      "batch_norm_relu_grad(Tensor grad, Tensor input, Tensor? weight, Tensor? bias, Tensor stats, bool training, "
      "int pool) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_relu_train(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, float momentum, float eps, int pool) -> (Tensor, Tensor)");
  m.def(
      "threshold_pass(Tensor[] weights, Tensor[] thresholds, Tensor[] rests, int[] n_in, Tensor(a!)[] scores, "
      "Tensor(b!)[] masks) -> Tensor");
  m.def(
      "sgd_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momenta, int[] is_threshold, float lr, "
      "float momentum, float weight_decay, float penalty, float max_norm, float extra_norm2, bool write_grad) -> Tensor");
  m.def(
      "threshold_step(Tensor(a!)[] weights, Tensor(b!)[] grads, Tensor(c!)[] weight_momenta, Tensor(d!)[] dropped, "
      "Tensor(e!)[] dropped_grads, Tensor(f!)[] dropped_momenta, Tensor(g!)[] thresholds, "
      "Tensor(h!)[] threshold_momenta, Tensor[] dots, Tensor[] index, Tensor(i!)[] scores, Tensor(j!)[] masks, "
      "int[] n_in, int[] window, Tensor(k!)[] params, Tensor(l!)[] param_grads, Tensor(m!)[] momenta, "
      "int[] is_threshold, float lr, float momentum, float weight_decay, float penalty, float max_norm, "
      "float extra_norm2, bool write_grad) -> (Tensor, Tensor)");
  m.def("cpu_isa() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(spafl, CPU, m) {
  m.impl("conv_relu_pool", TORCH_BOX(&spafl::conv_relu_pool));
  m.impl("conv_relu_pool_grad_weight", TORCH_BOX(&spafl::conv_relu_pool_grad_weight));
  m.impl("conv_relu_pool_grad_input", TORCH_BOX(&spafl::conv_relu_pool_grad_input));
  m.impl("relu_pool", TORCH_BOX(&spafl::relu_pool));
  m.impl("relu_pool_grad", TORCH_BOX(&spafl::relu_pool_grad));
  m.impl("batch_norm_relu", TORCH_BOX(&spafl::batch_norm_relu));
  m.impl("batch_norm_relu_grad", TORCH_BOX(&spafl::batch_norm_relu_grad));
  m.impl("batch_norm_relu_train", TORCH_BOX(&spafl::batch_norm_relu_train));
  m.impl("threshold_pass", TORCH_BOX(&spafl::threshold_pass));
  m.impl("sgd_step", TORCH_BOX(&spafl::sgd_step));
  m.impl("threshold_step", TORCH_BOX(&spafl::threshold_step));
}

STABLE_TORCH_LIBRARY_IMPL(spafl, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&spafl::cpu_isa)); }
