// What every binding of a CPU kernel uses: argument checks and access to memory, on torch's stable ABI.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace spafl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define CHECK(...) STD_TORCH_CHECK(__VA_ARGS__)

[[maybe_unused]] void check_dense(const char* op, const char* name, const Tensor& t, int64_t dim = -1) {
  CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU");
  CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
  CHECK(dim < 0 || t.dim() == dim, op, ": ", name, " must have ", dim, " dimensions; got ", t.dim());
}

[[maybe_unused]] void check_type(const char* op, const char* name, const Tensor& t, ScalarType type) {
  CHECK(t.scalar_type() == type, op, ": ", name, " must have the dtype of the first tensor");
}

[[maybe_unused]] void check_float(const char* op, const char* name, const Tensor& t) {
  CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, op, ": ", name,
        " must be float32 or float64");
}

// uint8 and bool tensors are both one byte of 0 or 1.
[[maybe_unused]] void check_bytes(const char* op, const char* name, const Tensor& t) {
  CHECK(t.scalar_type() == ScalarType::Byte || t.scalar_type() == ScalarType::Bool, op, ": ", name,
        " must be uint8 or bool");
}

template <typename T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

[[maybe_unused]] Tensor new_like(const Tensor& t, std::vector<int64_t> shape, std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_empty(t, shape, type);
}

// 4 dimensions, (batch, channels, height, width), in channels-last order.
[[maybe_unused]] bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  int64_t expected = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected && t.numel()) return false;
    expected *= t.size(d);
  }
  return true;
}

[[maybe_unused]] void check_images(const char* op, const char* name, const Tensor& t) {
  CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU");
  CHECK(is_channels_last(t), op, ": ", name, " must have 4 dimensions in channels-last order");
}

[[maybe_unused]] Tensor new_images(const Tensor& t, std::vector<int64_t> shape) {
  return torch::stable::empty(shape, t.scalar_type(), std::nullopt, std::nullopt, std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

// Calls body(T()) with the tensor's type.
template <typename Body>
auto with_type(const Tensor& t, Body body) {
  return t.scalar_type() == ScalarType::Float ? body(float()) : body(double());
}

[[maybe_unused]] std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

}  // namespace
}  // namespace spafl
