// Runs every CPU kernel, on every instruction set of this machine, over odd shapes, against the plainest code that
// computes the same. Built with AddressSanitizer and UBSan by test_sanitizers.py: every array is a heap block of its
// exact size, so that a read or write past an end is caught. Prints one line per failure; exit status 1 if any.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/kernels.h"

using namespace spafl;

static int failures = 0;
static std::mt19937 engine(1);

template <typename T>
std::vector<T> noise(int64_t n) {
  std::normal_distribution<double> normal;
  std::vector<T> v(n);
  for (T& x : v) x = (T)normal(engine);
  return v;
}

template <typename T>
void expect_close(const char* what, Isa isa, const std::vector<T>& have, const std::vector<double>& want, double bound) {
  for (size_t i = 0; i < want.size(); i++)
    if (!(std::fabs((double)have[i] - want[i]) <= bound * (1 + std::fabs(want[i])))) {
      std::printf("%s (%s, %zu bytes): element %zu is %g, expected %g\n", what, isa_name(isa), sizeof(T), i,
                  (double)have[i], want[i]);
      failures++;
      return;
    }
}

template <typename T>
void expect_same(const char* what, Isa isa, const std::vector<T>& a, const std::vector<T>& b) {
  if (a.size() == b.size() && (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(T)))) return;
  std::printf("%s: %s differs in its bits from scalar (%zu bytes)\n", what, isa_name(isa), sizeof(T));
  failures++;
}

template <typename T>
void check_conv(Isa isa, const ConvShape& s, bool with_bias) {
  const Kernels<T>& k = kernels_for<T>(isa);
  const int64_t image = s.in_channels * s.height * s.width, taps = s.in_channels * s.kernel_h * s.kernel_w;
  const int64_t pooled = s.pooled_h() * s.pooled_w(), outputs = s.batch * s.out_channels * pooled;
  const auto x = noise<T>(s.batch * image), w = noise<T>(s.out_channels * taps), b = noise<T>(s.out_channels);
  const auto gy = noise<T>(outputs);
  std::vector<T> y(outputs, (T)NAN), gw(w.size(), (T)NAN), gb(b.size(), (T)NAN), gx(x.size(), (T)NAN);
  std::vector<uint8_t> argmax(outputs, 77);
  k.conv_relu_pool(s, x.data(), w.data(), with_bias ? b.data() : nullptr, y.data(), argmax.data());
  k.conv_relu_pool_grad_weight(s, x.data(), gy.data(), argmax.data(), gw.data(), with_bias ? gb.data() : nullptr);
  k.conv_relu_pool_grad_input(s, w.data(), gy.data(), argmax.data(), gx.data());

  std::vector<double> y2(outputs), gw2(w.size()), gb2(b.size()), gx2(x.size());
  for (int64_t o = 0; o < outputs; o++) {
    const int64_t n = o / pooled / s.out_channels, c = o / pooled % s.out_channels;
    const int64_t top = o % pooled / s.pooled_w() * s.pool, left = o % pooled % s.pooled_w() * s.pool;
    // Visits the inputs and weights of the convolution output at (row, column).
    const auto visit = [&](int64_t row, int64_t column, auto f) {
      for (int64_t t = 0; t < taps; t++) {
        const int64_t channel = t / s.kernel_w / s.kernel_h, v = row + t / s.kernel_w % s.kernel_h - s.pad_h;
        const int64_t u = column + t % s.kernel_w - s.pad_w;
        if (v >= 0 && v < s.height && u >= 0 && u < s.width) f(n * image + (channel * s.height + v) * s.width + u, c * taps + t);
      }
    };
    double best = -INFINITY;
    int64_t where = 0;
    for (int64_t d = 0; d < s.pool * s.pool; d++) {
      double sum = with_bias ? (double)b[c] : 0;
      visit(top + d / s.pool, left + d % s.pool, [&](int64_t i, int64_t j) { sum += (double)x[i] * (double)w[j]; });
      if (sum > best) best = sum, where = d;
    }
    y2[o] = std::max(best, 0.0);
    // Where rounding may decide the winner, take the kernel's.
    if (argmax[o] != kBlocked && argmax[o] != where && argmax[o] < s.pool * s.pool) where = argmax[o];
    if (best > 0) {
      gb2[c] += gy[o];
      visit(top + where / s.pool, left + where % s.pool, [&](int64_t i, int64_t j) {
        gw2[j] += (double)gy[o] * (double)x[i];
        gx2[i] += (double)gy[o] * (double)w[j];
      });
    }
  }
  const double bound = sizeof(T) == 4 ? 3e-4 : 1e-11;
  expect_close("conv_relu_pool", isa, y, y2, bound);
  expect_close("conv_relu_pool_grad_weight", isa, gw, gw2, bound);
  if (with_bias) expect_close("conv_relu_pool_grad_bias", isa, gb, gb2, bound);
  expect_close("conv_relu_pool_grad_input", isa, gx, gx2, bound);
}

template <typename T>
void check_pool(Isa isa, int64_t planes, int64_t height, int64_t width, int64_t pool) {
  const int64_t rows = height / pool, columns = width / pool, outputs = planes * rows * columns;
  const auto x = noise<T>(planes * height * width), gy = noise<T>(outputs);
  std::vector<T> y(outputs, (T)NAN), gx(x.size(), (T)NAN);
  std::vector<uint8_t> argmax(outputs, 77);
  kernels_for<T>(isa).relu_pool(planes, height, width, pool, x.data(), y.data(), argmax.data());
  kernels_for<T>(isa).relu_pool_grad(planes, height, width, pool, gy.data(), argmax.data(), gx.data());
  std::vector<double> y2(outputs), gx2(x.size());
  for (int64_t o = 0; o < outputs; o++) {
    const int64_t base = o / columns / rows * height * width + o / columns % rows * pool * width + o % columns * pool;
    int64_t at = base;
    for (int64_t d = 1; d < pool * pool; d++)
      if (const int64_t i = base + d / pool * width + d % pool; x[i] > x[at]) at = i;
    if (x[at] > 0) y2[o] = x[at], gx2[at] = gy[o];
  }
  expect_close("relu_pool", isa, y, y2, 0);
  expect_close("relu_pool_grad", isa, gx, gx2, 0);
}

// pool 1: none. Channels last where inner is 1.
template <typename T>
void check_norm(Isa isa, const PoolShape& p, int64_t inner, bool affine, bool training) {
  const Kernels<T>& k = kernels_for<T>(isa);
  const int64_t c = p.channels, pixels = p.batch * p.height * p.width, size = pixels * c;
  const NormShape s{pixels / inner, c, inner};
  const int64_t height = p.height / p.pool, width = p.width / p.pool, outputs = p.batch * height * width * c;
  const double eps = 1e-3;
  const auto x = noise<T>(size), gy = noise<T>(outputs), weight = noise<T>(c), bias = noise<T>(c);
  const T *w = affine ? weight.data() : nullptr, *b = affine ? bias.data() : nullptr;
  std::vector<T> mean = noise<T>(c), rstd(c, T(0.7)), var(c, T(1)), y(outputs, (T)NAN), gx(size, (T)NAN), gw(c, (T)NAN),
                 gb(c, (T)NAN);
  if (training) k.norm_moments(s, x.data(), eps, mean.data(), rstd.data(), var.data());
  if (p.pool > 1) {
    k.norm_relu_pool(p, x.data(), w, b, mean.data(), rstd.data(), y.data());
    k.norm_relu_pool_grad(p, gy.data(), x.data(), w, b, mean.data(), rstd.data(), training, gx.data(), gw.data(),
                          gb.data());
  } else {
    k.norm_relu(s, x.data(), w, b, mean.data(), rstd.data(), y.data());
    k.norm_relu_grad(s, gy.data(), x.data(), w, b, mean.data(), rstd.data(), training, gx.data(), gw.data(), gb.data());
  }

  const auto at = [&](int64_t pixel, int64_t channel) {
    return (pixel / inner * c + channel) * inner + pixel % inner;
  };
  std::vector<double> mean2(c), rstd2(c), var2(c), y2(outputs), gx2(size), gw2(c), gb2(c);
  for (int64_t i = 0; i < c; i++) {
    double m = 0, squares = 0;
    for (int64_t pixel = 0; pixel < pixels; pixel++) m += (double)x[at(pixel, i)] / (double)pixels;
    for (int64_t pixel = 0; pixel < pixels; pixel++) squares += std::pow((double)x[at(pixel, i)] - m, 2);
    mean2[i] = training ? m : (double)mean[i], var2[i] = training ? squares / (double)(pixels - 1) : 1;
    rstd2[i] = training ? 1 / std::sqrt(squares / (double)pixels + eps) : (double)rstd[i];
    const double scale = (affine ? (double)weight[i] : 1) * rstd2[i], offset = affine ? (double)bias[i] : 0;
    for (int64_t o = 0; o < outputs / c; o++) {
      // The pixel that wins the window of output pixel o.
      const int64_t n = o / (height * width), top = o / width % height * p.pool, left = o % width * p.pool;
      double best = -INFINITY;
      int64_t winner = 0;
      for (int64_t d = 0; d < p.pool * p.pool; d++) {
        const int64_t pixel = p.pool == 1 ? o : (n * p.height + top + d / p.pool) * p.width + left + d % p.pool;
        const double value = ((double)x[at(pixel, i)] - mean2[i]) * scale + offset;
        if (value > best) best = value, winner = pixel;
      }
      const int64_t to = p.pool == 1 ? at(o, i) : o * c + i;
      y2[to] = std::max(best, 0.0);
      if (best <= 0) continue;
      gb2[i] += (double)gy[to], gw2[i] += (double)gy[to] * ((double)x[at(winner, i)] - mean2[i]) * rstd2[i];
      gx2[at(winner, i)] += (double)gy[to] * scale;
    }
    if (training)
      for (int64_t pixel = 0; pixel < pixels; pixel++)
        gx2[at(pixel, i)] -=
            scale / (double)pixels * (gb2[i] + gw2[i] * rstd2[i] * ((double)x[at(pixel, i)] - mean2[i]));
  }
  const double bound = sizeof(T) == 4 ? 1e-4 : 1e-11;
  expect_close("norm_moments mean", isa, mean, mean2, bound), expect_close("norm_moments var", isa, var, var2, bound);
  expect_close("norm_moments rstd", isa, rstd, rstd2, bound), expect_close("norm_relu", isa, y, y2, bound);
  expect_close("norm_relu_grad gx", isa, gx, gx2, bound), expect_close("norm_relu_grad gw", isa, gw, gw2, bound);
  expect_close("norm_relu_grad gb", isa, gb, gb2, bound);
}

template <typename T>
void check_rows(int64_t rows, int64_t columns, int64_t dropped, bool momentum, bool window) {
  struct State {
    std::vector<T> w, g, m, d, dg, dm, tau, tm, score, p, pg, pm, rest;
    std::vector<uint8_t> mask;
  };
  const State start{noise<T>(rows * columns), noise<T>(rows * columns), noise<T>(rows * columns), noise<T>(rows * dropped),
                    noise<T>(rows * dropped), noise<T>(rows * dropped), noise<T>(rows), noise<T>(rows), noise<T>(rows), noise<T>(columns),
                    noise<T>(columns), noise<T>(columns), noise<T>(rows), std::vector<uint8_t>(rows, 1)};
  State expected;
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (!isa_supported(isa)) continue;
    State s = start;
    const int64_t n_in = std::max<int64_t>(1, columns + dropped);
    std::vector<int64_t> index(rows);
    for (int64_t i = 0; i < rows; i++) index[i] = rows - 1 - i;
    const StepLayer<T> layers[] = {{s.w.data(), s.g.data(), momentum ? s.m.data() : nullptr, s.d.data(),
                                    window ? s.dg.data() : nullptr, momentum ? s.dm.data() : nullptr, s.tau.data(),
                                    momentum ? s.tm.data() : nullptr, nullptr, index.data(), s.score.data(), s.mask.data(),
                                    rows, rows, columns, dropped, n_in, window}};
    const StepTensor<T> tensors[] = {{s.p.data(), s.pg.data(), momentum ? s.pm.data() : nullptr, columns, true}};
    int64_t flips[1] = {-1};
    const StepOptions options{0.1, momentum ? 0.9 : 0, 1e-3, 0.2, 0.7, 0.5, true};
    const double norm = kernels_for<T>(isa).step(layers, 1, tensors, 1, options, flips);
    s.rest.push_back((T)norm), s.rest.push_back((T)flips[0]);
    s.rest.resize(rows + 2);
    kernels_for<T>(isa).threshold_rows({s.w.data(), s.tau.data(), s.rest.data(), s.score.data(), s.mask.data(), rows, columns, n_in});
    if (isa == Isa::scalar) {
      expected = s;
      continue;
    }
    expect_same("weights", isa, s.w, expected.w), expect_same("gradients", isa, s.g, expected.g);
    expect_same("momenta", isa, s.m, expected.m), expect_same("dropped", isa, s.d, expected.d);
    expect_same("thresholds", isa, s.tau, expected.tau), expect_same("scores", isa, s.score, expected.score);
    expect_same("masks", isa, s.mask, expected.mask), expect_same("parameters", isa, s.p, expected.p);
    expect_same("norm and flips", isa, s.rest, expected.rest);
  }
}

template <typename T>
void check_channels(Isa isa, int64_t outer, int64_t inner, int64_t width, int64_t kept, int64_t pads) {
  std::vector<int64_t> place;
  for (int64_t k = 0; k < kept; k++) place.push_back(k * width / kept);
  const ChannelShape s{outer, width, inner, kept + pads, kept, place.data()};
  const auto x = noise<T>(outer * s.stored * inner), constants = noise<T>(width - kept), stream = noise<T>(outer * width * inner);
  const auto grad = noise<T>(stream.size());
  const Kernels<T>& k = kernels_for<T>(isa);
  for (int flags = 0; flags < 4; flags++) {
    std::vector<T> y(stream.size(), (T)NAN), gx(x.size(), (T)NAN), gc(constants.size(), (T)NAN);
    k.expand_channels(s, x.data(), flags & 1 ? constants.data() : nullptr, flags & 2 ? stream.data() : nullptr, y.data());
    k.collect_channels(s, grad.data(), gx.data(), flags & 1 ? gc.data() : nullptr);
    std::vector<double> y2(y.size()), gx2(gx.size()), gc2(gc.size());
    for (int64_t n = 0; n < outer; n++)
      for (int64_t c = 0, stored = 0; c < width; c++) {
        const bool has = stored < kept && place[stored] == c;
        for (int64_t i = 0; i < inner; i++) {
          const int64_t at = (n * width + c) * inner + i, from = (n * s.stored + stored) * inner + i;
          y2[at] = (flags & 2 ? stream[at] : 0) + (has ? x[from] : flags & 1 ? constants[c - stored] : T(0));
          if (has)
            gx2[from] = grad[at];
          else
            gc2[c - stored] += grad[at];
        }
        stored += has;
      }
    const double bound = sizeof(T) == 4 ? 1e-4 : 1e-12;
    expect_close("expand_channels", isa, y, y2, 0);
    expect_close("collect_channels", isa, gx, gx2, 0);
    if (flags & 1) expect_close("collect_channels: constants", isa, gc, gc2, bound);
  }
}

template <typename T>
void check_image_conv(Isa isa, const ImageConv& s, bool with_bias) {
  const Kernels<T>& k = kernels_for<T>(isa);
  const int64_t taps = s.kernel_h * s.kernel_w, inputs = s.height * s.width, outputs = s.out_h() * s.out_w();
  const auto x = noise<T>(s.batch * inputs * s.in_channels), w = noise<T>(s.out_channels * s.in_channels * taps);
  const auto b = noise<T>(s.out_channels), gy = noise<T>(s.batch * outputs * s.out_channels);
  std::vector<T> y(gy.size(), (T)NAN), gx(x.size(), (T)NAN), gw(w.size(), (T)NAN), gb(b.size(), (T)NAN);
  k.image_conv(s, x.data(), w.data(), with_bias ? b.data() : nullptr, y.data());
  k.image_conv_grad_input(s, w.data(), gy.data(), gx.data());
  k.image_conv_grad_weight(s, x.data(), gy.data(), gw.data(), with_bias ? gb.data() : nullptr);
  std::vector<double> y2(y.size()), gx2(gx.size()), gw2(gw.size()), gb2(gb.size());
  for (int64_t at = 0; at < s.batch * outputs; at++)
    for (int64_t o = 0; o < s.out_used; o++) {
      const int64_t out = at * s.out_channels + o, n = at / outputs;
      if (with_bias) y2[out] = b[o], gb2[o] += gy[out];
      for (int64_t tap = 0; tap < taps; tap++) {
        const int64_t row = at % outputs / s.out_w() * s.stride_h + tap / s.kernel_w - s.pad_h;
        const int64_t column = at % s.out_w() * s.stride_w + tap % s.kernel_w - s.pad_w;
        if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
        for (int64_t i = 0; i < s.in_used; i++) {
          const int64_t in = (n * inputs + row * s.width + column) * s.in_channels + i;
          const int64_t weight = (o * s.in_channels + i) * taps + tap;
          y2[out] += (double)x[in] * (double)w[weight];
          gx2[in] += (double)gy[out] * (double)w[weight];
          gw2[weight] += (double)gy[out] * (double)x[in];
        }
      }
    }
  const double bound = sizeof(T) == 4 ? 3e-4 : 1e-11;
  expect_close("image_conv", isa, y, y2, bound);
  expect_close("image_conv_grad_input", isa, gx, gx2, bound);
  expect_close("image_conv_grad_weight", isa, gw, gw2, bound);
  if (with_bias) expect_close("image_conv: bias", isa, gb, gb2, bound);
}

template <typename T>
void check_all() {
  const ConvShape shapes[] = {
      {2, 1, 28, 28, 20, 5, 5, 0, 0, 2}, {2, 3, 17, 19, 7, 3, 3, 1, 1, 2}, {1, 2, 11, 23, 5, 4, 7, 2, 3, 3},
      {1, 8, 12, 13, 3, 11, 11, 5, 5, 2}, {1, 1, 2, 2, 4, 1, 1, 0, 0, 2},   {2, 1, 1, 1, 2, 1, 1, 7, 7, 3},
      {35, 3, 7, 8, 5, 3, 3, 1, 1, 2},    {17, 2, 9, 6, 4, 2, 3, 1, 0, 3},      {16, 1, 4, 4, 3, 3, 3, 0, 0, 2},
      {1, 2, 3, 7, 13, 2, 2, 0, 3, 2},    {1, 1, 9, 70, 1, 3, 9, 4, 0, 3}};
  const ImageConv convs[] = {
      {16, 8, 5, 7, 8, 3, 3, 1, 1, 1, 1, 6, 5},    {3, 13, 4, 5, 11, 3, 3, 1, 1, 1, 1, 13, 11},
      {19, 4, 6, 5, 9, 3, 3, 2, 2, 1, 1, 4, 9},    {16, 20, 5, 5, 3, 1, 1, 2, 2, 0, 0, 17, 3},
      {2, 2, 9, 3, 4, 4, 2, 3, 1, 2, 3, 2, 4},     {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1},
      {2, 1, 2, 1, 2, 3, 5, 1, 2, 3, 4, 1, 1},     {17, 3, 8, 9, 24, 5, 5, 1, 1, 0, 0, 3, 23}};
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (!isa_supported(isa)) continue;
    for (const ConvShape& shape : shapes) check_conv<T>(isa, shape, shape.pad_h != 1);
    for (const ImageConv& conv : convs) check_image_conv<T>(isa, conv, conv.in_used != 13);
    for (int64_t width : {1, 5, 16, 33, 64, 130})
      for (int64_t kept : {(int64_t)0, (int64_t)1, width / 3, width})
        for (int64_t pads : {1, 9}) check_channels<T>(isa, 7, 1, width, kept, pads), check_channels<T>(isa, 2, 35, width, kept, pads);
    check_channels<T>(isa, 600, 1, 32, 8, 0), check_channels<T>(isa, 600, 1, 256, 100, 4);
    for (int64_t pool : {2, 3})
      for (int64_t side : {3, 8, 9, 34}) check_pool<T>(isa, 2, side, side + 1, pool);
    for (bool flag : {false, true}) {
      for (int64_t channels : {1, 3, 7, 8, 9, 24, 65})
        for (int64_t side : {1, 3, 7, 16}) {
          check_norm<T>(isa, {2, channels, side, side + 1, 1}, 1, flag, true);
          check_norm<T>(isa, {2, channels, side, side + 1, 1}, side * (side + 1), true, flag);
        }
      for (int64_t channels : {8, 24, 32})
        for (int64_t pool : {2, 3})
          for (int64_t side : {1, 3}) check_norm<T>(isa, {3, channels, side * pool, 5 * pool, pool}, 1, flag, true);
      check_norm<T>(isa, {2, 8, 2, 2, 2}, 1, true, flag);
    }
  }
  for (int64_t columns : {0, 1, 31, 32, 33, 100, 4999})
    for (bool flag : {false, true}) check_rows<T>(3, columns, columns / 2, flag, !flag);
  check_rows<T>(0, 5, 5, true, true);
}

int main() {
  check_all<float>();
  check_all<double>();
  if (!failures) std::printf("all kernels agree\n");
  return failures != 0;
}
