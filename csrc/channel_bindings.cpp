// Operators that move between compact channels and all channels.
#include "bindings.h"

namespace spafl {
namespace {

ChannelShape channel_shape(const char* op, const std::vector<int64_t>& shape, int64_t dim, bool last, const Tensor& kept,
                           int64_t width, int64_t stored) {
  check_dense(op, "kept", kept, 1);
  CHECK(kept.scalar_type() == ScalarType::Long, op, ": kept must be int64");
  ChannelShape s{1, width, 1, stored, kept.numel(), in<int64_t>(kept)};
  for (int64_t i = 0; i < (int64_t)shape.size(); i++)
    if (i != dim) (i < dim || last ? s.outer : s.inner) *= shape[i];
  CHECK(s.stored >= 1 && s.stored >= s.kept, op, ": ", s.stored, " channels are stored, for ", s.kept, " kept ones");
  CHECK(s.width < (int64_t)1 << 31, op, ": too many channels");
  int64_t before = -1;
  for (int64_t k = 0; k < s.kept; k++) {
    CHECK(s.place[k] > before && s.place[k] < width, op, ": kept must ascend within [0, ", width, "); got ", s.place[k],
          " after ", before);
    before = s.place[k];
  }
  return s;
}

// Whether images in channels-last order; else the tensor must be contiguous.
bool check_order(const char* op, const char* name, const Tensor& t, int64_t dim) {
  const bool last = !t.is_contiguous() && dim == 1 && is_channels_last(t);
  last ? check_images(op, name, t) : check_dense(op, name, t);
  return last;
}

void check_dim(const char* op, const Tensor& t, int64_t dim) {
  CHECK(dim >= 0 && dim < t.dim(), op, ": dim must be in [0, ", t.dim(), "); got ", dim);
}

Tensor expand_channels(const Tensor& x, const Tensor& kept, int64_t width, int64_t dim,
                       const std::optional<Tensor>& constants, const std::optional<Tensor>& stream) {
  const char* op = "expand_channels";
  check_float(op, "input", x), check_dim(op, x, dim);
  const bool last = check_order(op, "input", x, dim);
  std::vector<int64_t> shape = shape_of(x);
  const ChannelShape s = channel_shape(op, shape, dim, last, kept, width, shape[dim]);
  shape[dim] = width;
  if (constants) {
    check_dense(op, "constants", *constants, 1), check_type(op, "constants", *constants, x.scalar_type());
    CHECK(constants->numel() == width - s.kept, op, ": constants must have ", width - s.kept, " values; got ",
          constants->numel());
  }
  if (stream) {
    last ? check_images(op, "stream", *stream) : check_dense(op, "stream", *stream);
    check_type(op, "stream", *stream, x.scalar_type());
    CHECK(shape_of(*stream) == shape, op, ": stream must have the shape of the result");
  }
  Tensor y = last ? new_images(x, shape) : new_like(x, shape);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().expand_channels(s, in<T>(x), constants ? in<T>(*constants) : nullptr, stream ? in<T>(*stream) : nullptr,
                                 out<T>(y));
  });
  return y;
}

std::tuple<Tensor, Tensor> collect_channels(const Tensor& grad, const Tensor& kept, int64_t stored, int64_t dim,
                                            bool constants) {
  const char* op = "collect_channels";
  check_float(op, "grad", grad), check_dim(op, grad, dim);
  const bool last = check_order(op, "grad", grad, dim);
  std::vector<int64_t> shape = shape_of(grad);
  const ChannelShape s = channel_shape(op, shape, dim, last, kept, shape[dim], stored);
  shape[dim] = stored;
  Tensor kept_grad = last ? new_images(grad, shape) : new_like(grad, shape), constant_grad = new_like(grad, {constants ? s.width - s.kept : 0});
  with_type(grad, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().collect_channels(s, in<T>(grad), out<T>(kept_grad), constants ? out<T>(constant_grad) : nullptr);
  });
  return {kept_grad, constant_grad};
}

}  // namespace
}  // namespace spafl

STABLE_TORCH_LIBRARY_FRAGMENT(spafl, m) {
  m.def("expand_channels(Tensor input, Tensor kept, int width, int dim, Tensor? constants, Tensor? stream) -> Tensor");
  m.def("collect_channels(Tensor grad, Tensor kept, int stored, int dim, bool constants) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(spafl, CPU, m) {
  m.impl("expand_channels", TORCH_BOX(&spafl::expand_channels));
  m.impl("collect_channels", TORCH_BOX(&spafl::collect_channels));
}
