// The convolution with a lane per image. Images are in channels-last order.
#include "bindings.h"

namespace spafl {
namespace {

ImageConv image_shape(const char* op, const std::vector<int64_t>& x, const Tensor& w, int64_t stride_h, int64_t stride_w,
                      int64_t pad_h, int64_t pad_w, int64_t in_used, int64_t out_used) {
  check_dense(op, "weight", w, 4), check_float(op, "weight", w);
  CHECK(x.size() == 4, op, ": input must have 4 dimensions; got ", x.size());
  const ImageConv s{x[0], x[1], x[2], x[3], w.size(0), w.size(2), w.size(3), stride_h, stride_w, pad_h, pad_w,
                    in_used, out_used};
  CHECK(w.size(1) == s.in_channels, op, ": weight has ", w.size(1), " input channels but input has ", s.in_channels);
  CHECK(w.numel() > 0, op, ": weight must not be empty");
  CHECK(stride_h >= 1 && stride_w >= 1, op, ": stride must be positive; got ", stride_h, ", ", stride_w);
  CHECK(pad_h >= 0 && pad_w >= 0, op, ": padding must not be negative; got ", pad_h, ", ", pad_w);
  CHECK(s.height + 2 * pad_h >= s.kernel_h && s.width + 2 * pad_w >= s.kernel_w, op, ": input of ", s.height, "x", s.width,
        " is too small for this kernel and padding");
  CHECK(in_used >= 1 && in_used <= s.in_channels && out_used >= 1 && out_used <= s.out_channels, op,
        ": used channels must be 1 to ", s.in_channels, " and 1 to ", s.out_channels, "; got ", in_used, ", ", out_used);
  return s;
}

void check_grad(const char* op, const ImageConv& s, const Tensor& gy, ScalarType type) {
  check_images(op, "grad", gy), check_type(op, "grad", gy, type);
  const std::vector<int64_t> shape{s.batch, s.out_channels, s.out_h(), s.out_w()};
  CHECK(shape_of(gy) == shape, op, ": grad must have the shape of the output");
}

Tensor image_conv(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, int64_t stride_h,
                  int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t in_used, int64_t out_used) {
  const char* op = "image_conv";
  const ImageConv s = image_shape(op, shape_of(x), w, stride_h, stride_w, pad_h, pad_w, in_used, out_used);
  check_images(op, "input", x), check_type(op, "input", x, w.scalar_type());
  if (bias) {
    check_dense(op, "bias", *bias, 1), check_type(op, "bias", *bias, w.scalar_type());
    CHECK(bias->size(0) == s.out_channels, op, ": bias must have ", s.out_channels, " values; got ", bias->size(0));
  }
  Tensor y = new_images(x, {s.batch, s.out_channels, s.out_h(), s.out_w()});
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().image_conv(s, in<T>(x), in<T>(w), bias ? in<T>(*bias) : nullptr, out<T>(y));
  });
  return y;
}

Tensor image_conv_grad_input(const Tensor& gy, const Tensor& w, int64_t height, int64_t width, int64_t stride_h,
                             int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t in_used, int64_t out_used) {
  const char* op = "image_conv_grad_input";
  check_images(op, "grad", gy);
  const std::vector<int64_t> shape{gy.size(0), w.dim() > 1 ? w.size(1) : 0, height, width};
  const ImageConv s = image_shape(op, shape, w, stride_h, stride_w, pad_h, pad_w, in_used, out_used);
  check_grad(op, s, gy, w.scalar_type());
  Tensor gx = new_images(gy, shape);
  with_type(gy, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().image_conv_grad_input(s, in<T>(w), in<T>(gy), out<T>(gx));
  });
  return gx;
}

// The second result is empty unless `bias`.
std::tuple<Tensor, Tensor> image_conv_grad_weight(const Tensor& gy, const Tensor& x, const Tensor& w, int64_t stride_h,
                                                  int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t in_used,
                                                  int64_t out_used, bool bias) {
  const char* op = "image_conv_grad_weight";
  const ImageConv s = image_shape(op, shape_of(x), w, stride_h, stride_w, pad_h, pad_w, in_used, out_used);
  check_images(op, "input", x), check_type(op, "input", x, w.scalar_type());
  check_grad(op, s, gy, w.scalar_type());
  Tensor gw = new_like(w, shape_of(w)), gbias = new_like(w, {bias ? s.out_channels : 0});
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().image_conv_grad_weight(s, in<T>(x), in<T>(gy), out<T>(gw), bias ? out<T>(gbias) : nullptr);
  });
  return {gw, gbias};
}

}  // namespace
}  // namespace spafl

STABLE_TORCH_LIBRARY_FRAGMENT(spafl, m) {
  m.def(
      "image_conv(Tensor input, Tensor weight, Tensor? bias, int stride_h, int stride_w, int pad_h, int pad_w, int in_used, "
      "int out_used) -> Tensor");
  m.def(
      "image_conv_grad_input(Tensor grad, Tensor weight, int height, int width, int stride_h, int stride_w, int pad_h, "
      "int pad_w, int in_used, int out_used) -> Tensor");
  m.def(
      "image_conv_grad_weight(Tensor grad, Tensor input, Tensor weight, int stride_h, int stride_w, int pad_h, int pad_w, "
      "int in_used, int out_used, bool bias) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(spafl, CPU, m) {
  m.impl("image_conv", TORCH_BOX(&spafl::image_conv));
  m.impl("image_conv_grad_input", TORCH_BOX(&spafl::image_conv_grad_input));
  m.impl("image_conv_grad_weight", TORCH_BOX(&spafl::image_conv_grad_weight));
}
