// Operators of the CUDA kernels through torch's stable ABI: schemas, argument checks, the CUDA dispatch entries. All of them write
// into tensors that the caller owns: static addresses and no allocation, as CUDA graphs need. Nothing is launched before every
// argument has been checked; a check never reads device memory.
//
// Built with SPAFL_CUDA_ON_CPU (tests only) the same functions are registered for the CPU, over the kernels compiled by g++, in another
// namespace (SPAFL_NAMESPACE), so that both libraries can be loaded in one process.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "loaded_symbol.h"

#ifndef SPAFL_NAMESPACE
#define SPAFL_NAMESPACE spafl
#endif

// One clear line: torch's own check macro puts function, file and line of this source in front of the message.
#define SPAFL_CHECK(condition, ...)         \
  do {                                      \
    if (!(condition)) refuse(__VA_ARGS__);  \
  } while (0)

template <typename... Parts>
[[noreturn]] static void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Schemas. T is the number of filters of all layers together, L the number of layers, C the number of clients; the leading dimension of
// every tensor is the client. docs: spafl_kernels/gpu/cuda_ops.py.
STABLE_TORCH_LIBRARY_FRAGMENT(SPAFL_NAMESPACE, m) {
  m.def(
      "threshold_pass_cuda(Tensor[] weights, Tensor[] thresholds, bool compare, int pad_to, Tensor(a!) scores, Tensor(b!) mask, "
      "Tensor(c!) flipped, Tensor(d!) active, Tensor(e!) inverse, Tensor(f!) counts, Tensor(g!) changed, Tensor(h!)[] packed) -> ()");
  m.def(
      "active_lists_cuda(Tensor[] weights, Tensor mask, Tensor flipped, int pad_to, Tensor(a!) active, Tensor(b!) inverse, "
      "Tensor(c!) counts, Tensor(d!) changed, Tensor(e!)[] packed) -> ()");
  m.def(
      "fused_step_cuda(Tensor(a!)[] weights, Tensor[] weight_grads, Tensor(b!)[] weight_momenta, Tensor(c!)[] thresholds, "
      "Tensor[] threshold_grads, Tensor(d!)[] threshold_momenta, Tensor(e!)[] others, Tensor[] other_grads, "
      "Tensor(f!)[] other_momenta, Tensor learning_rate, Tensor penalty, float momentum, float weight_decay, float? max_norm, "
      "Tensor(g!) partials, Tensor(h!) norms, Tensor(i!) scores, Tensor(j!) mask, Tensor(k!) flipped) -> ()");
  m.def("fused_step_partials(int[] rows, int[] sizes) -> int");
  m.def("require_cuda_stream() -> ()");
  m.def(
      "compact_gather_cuda(Tensor[] full, Tensor(a!)[] compact, Tensor active, Tensor counts, int[] filters, int[] row_layers, "
      "int[] column_layers, Tensor(b!) short_by) -> ()");
  m.def(
      "compact_scatter_cuda(Tensor(a!)[] full, Tensor[] compact, Tensor active, Tensor counts, int[] filters, int[] row_layers, "
      "int[] column_layers, Tensor(b!) short_by) -> ()");
}

#if defined(USE_CUDA) || defined(SPAFL_CUDA_ON_CPU)

namespace {

#ifdef SPAFL_CUDA_ON_CPU
void require_cuda_stream() {}
bool on_device(const Tensor& t) { return t.is_cpu(); }
constexpr const char* DEVICE = "cpu";
struct Launch {
  explicit Launch(const Tensor&) {}
  void* stream = nullptr;
};
#else
bool on_device(const Tensor& t) { return t.is_cuda(); }
constexpr const char* DEVICE = "cuda";

// A CPU-only torch does not have this function, and the library must still load there.
using CurrentStream = AOTITorchError (*)(int32_t, void**);
CurrentStream current_stream() {
  constexpr const char* NAME = "aoti_torch_get_current_cuda_stream";
  static const auto found = reinterpret_cast<CurrentStream>(loaded_symbol(NAME));
  SPAFL_CHECK(found, "no library in this process defines ", NAME, ", by which the CUDA kernels find their stream: this torch was built without CUDA");
  return found;
}

void require_cuda_stream() { current_stream(); }

struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
  explicit Launch(const Tensor& t) : guard(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(current_stream()(t.get_device_index(), &stream));
  }
};
#endif

const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    default: return "another dtype";
  }
}

int dtype_code(ScalarType t) {
  switch (t) {
    case ScalarType::Double: return SPAFL_FLOAT64;
    case ScalarType::Float: return SPAFL_FLOAT32;
    case ScalarType::Half: return SPAFL_FLOAT16;
    case ScalarType::BFloat16: return SPAFL_BFLOAT16;
    default: return -1;
  }
}

using Shape = std::vector<int64_t>;

Shape shape_of(const Tensor& t) {
  Shape shape;
  for (int64_t d = 0; d < t.dim(); d++) shape.push_back(t.size(d));
  return shape;
}

std::string text(const Shape& shape) {
  std::string s = "(";
  for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + (shape.size() == 1 ? ",)" : ")");
}

std::string item(const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; }

// The checks of one call: all tensors on one device, named errors.
struct Checker {
  const char* op;
  std::optional<int32_t> device = {};

  void on_one_device(const std::string& name, const Tensor& t) {
    SPAFL_CHECK(on_device(t), op, ": ", name, " must be on a ", DEVICE, " device");
    if (!device) device = t.get_device();
    SPAFL_CHECK(t.get_device() == *device, op, ": ", name, " is on ", DEVICE, ":", (int)t.get_device(),
                    " but other arguments are on ", DEVICE, ":", *device);
  }

  void dtype(const std::string& name, const Tensor& t, ScalarType want) {
    SPAFL_CHECK(t.scalar_type() == want, op, ": ", name, " must be ", dtype_name(want), "; got ", dtype_name(t.scalar_type()));
  }

  // A contiguous tensor of one dtype and shape.
  void plain(const std::string& name, const Tensor& t, ScalarType want, const Shape& shape) {
    on_one_device(name, t);
    dtype(name, t, want);
    SPAFL_CHECK(shape_of(t) == shape, op, ": ", name, " must have shape ", text(shape), "; got ", text(shape_of(t)));
    SPAFL_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
  }

  // A parameter: (clients, ...), each client in one block of memory, in any order of its dimensions (contiguous and channels_last
  // both do), blocks at any distance that keeps them apart.
  void dense_clients(const std::string& name, const Tensor& t) {
    on_one_device(name, t);
    std::vector<std::pair<int64_t, int64_t>> dims;
    for (int64_t d = 1; d < t.dim(); d++)
      if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
    std::sort(dims.begin(), dims.end());
    int64_t expected = 1;
    for (auto [stride, size] : dims) {
      SPAFL_CHECK(stride == expected, op, ": ", name, " must keep each client in one block of memory; shape ",
                      text(shape_of(t)), " has strides ", text(strides_of(t)));
      expected *= size;
    }
    SPAFL_CHECK(t.size(0) == 1 || t.stride(0) >= expected, op, ": ", name, " must keep its clients apart in memory; shape ",
                    text(shape_of(t)), " has strides ", text(strides_of(t)));
  }

  static Shape strides_of(const Tensor& t) {
    Shape s;
    for (int64_t d = 0; d < t.dim(); d++) s.push_back(t.stride(d));
    return s;
  }

  void same_layout(const std::string& name, const Tensor& t, const std::string& model_name, const Tensor& model) {
    on_one_device(name, t);
    dtype(name, t, model.scalar_type());
    SPAFL_CHECK(shape_of(t) == shape_of(model), op, ": ", name, " must have the shape of ", model_name, ", ", text(shape_of(model)),
                    "; got ", text(shape_of(t)));
    for (int64_t d = 1; d < t.dim(); d++)
      SPAFL_CHECK(t.size(d) == 1 || t.stride(d) == model.stride(d), op, ": ", name, " must have the memory order of ", model_name,
                      ", strides ", text(strides_of(model)), "; got ", text(strides_of(t)));
  }

  void length(const char* name, size_t got, size_t want) {
    SPAFL_CHECK(got == want, op, ": ", name, " must have ", want, " entries; got ", got);
  }
};

int64_t client_stride(const Tensor& t) { return t.size(0) == 1 ? 0 : t.stride(0); }

struct Cohort {
  int64_t clients = 0, columns = 0;
  ScalarType dtype = ScalarType::Float;
  std::vector<SpaflLayer> layers;
  Shape wide() const { return {clients, columns}; }
  Shape narrow() const { return {clients, (int64_t)layers.size()}; }
};

// Weights (and thresholds, if given) of one cohort.
Cohort cohort(Checker& check, const Tensors& weights, const Tensors* thresholds) {
  const char* op = check.op;
  SPAFL_CHECK(!weights.empty(), op, ": weights must name at least one layer");
  Cohort c;
  c.dtype = weights[0].scalar_type();
  SPAFL_CHECK(dtype_code(c.dtype) >= 0, op, ": weights[0] must be float64, float32, float16 or bfloat16; got ", dtype_name(c.dtype));
  if (thresholds) check.length("thresholds", thresholds->size(), weights.size());
  for (size_t l = 0; l < weights.size(); l++) {
    const Tensor& w = weights[l];
    const std::string name = item("weights", l);
    SPAFL_CHECK(w.dim() >= 3, op, ": ", name, " must have shape (clients, filters, ...) with 3 dimensions or more; got ", text(shape_of(w)));
    SPAFL_CHECK(w.numel() > 0, op, ": ", name, " must have no dimension of size 0; got ", text(shape_of(w)));
    check.dtype(name, w, c.dtype);
    check.dense_clients(name, w);
    if (l == 0) c.clients = w.size(0);
    SPAFL_CHECK(w.size(0) == c.clients, op, ": ", name, " must have ", c.clients, " clients like weights[0]; got ", w.size(0));
    SpaflLayer layer{};
    layer.filters = w.size(1);
    layer.fan_in = w.numel() / w.size(0) / w.size(1);
    SPAFL_CHECK(w.size(1) == 1 || w.stride(1) == layer.fan_in, op, ": ", name, " must keep each filter in one block of memory; shape ",
                    text(shape_of(w)), " has strides ", text(Checker::strides_of(w)));
    SPAFL_CHECK(c.columns + layer.filters <= INT32_MAX, op, ": the layers must have fewer than 2^31 filters together");
    layer.weight = w.const_data_ptr();
    layer.weight_stride = client_stride(w);
    layer.offset = c.columns;
    layer.index = (int64_t)l;
    c.columns += layer.filters;
    if (thresholds) {
      const Tensor& tau = (*thresholds)[l];
      const std::string tau_name = item("thresholds", l);
      check.dtype(tau_name, tau, c.dtype);
      SPAFL_CHECK((shape_of(tau) == Shape{c.clients, layer.filters}), op, ": ", tau_name, " must have one value per filter, shape ",
                      text({c.clients, layer.filters}), "; got ", text(shape_of(tau)));
      check.dense_clients(tau_name, tau);
      layer.threshold = tau.const_data_ptr();
      layer.threshold_stride = client_stride(tau);
    }
    c.layers.push_back(layer);
  }
  return c;
}

struct Lists {
  Tensor &active, &inverse, &counts, &changed;
  Tensors& packed;
  int64_t pad_to;
};

void check_lists(Checker& check, Cohort& c, const Tensors& weights, const Tensor& mask, const Tensor& flipped, Lists& out) {
  check.plain("mask", mask, ScalarType::Bool, c.wide());
  check.plain("flipped", flipped, ScalarType::Bool, c.wide());
  check.plain("active", out.active, ScalarType::Int, c.wide());
  check.plain("inverse", out.inverse, ScalarType::Int, c.wide());
  check.plain("counts", out.counts, ScalarType::Int, c.narrow());
  check.plain("changed", out.changed, ScalarType::Bool, c.narrow());
  SPAFL_CHECK(out.pad_to >= 1, check.op, ": pad_to must be 1 or more; got ", out.pad_to);
  if (out.packed.empty()) return;
  check.length("packed", out.packed.size(), c.layers.size());
  for (size_t l = 0; l < c.layers.size(); l++) {
    const Tensor &t = out.packed[l], &w = weights[l];
    const std::string name = item("packed", l);
    Shape want = shape_of(w);
    want[1] = (want[1] + out.pad_to - 1) / out.pad_to * out.pad_to;
    check.on_one_device(name, t);
    check.dtype(name, t, c.dtype);
    SPAFL_CHECK(shape_of(t) == want, check.op, ": ", name, " must have shape ", text(want), " (filters rounded up to a multiple of ",
                    out.pad_to, "); got ", text(shape_of(t)));
    check.dense_clients(name, t);
    SPAFL_CHECK(t.size(1) == 1 || t.stride(1) == c.layers[l].fan_in, check.op, ": ", name,
                    " must keep each filter in one block of memory; strides ", text(Checker::strides_of(t)));
    for (int64_t d = 2; d < t.dim(); d++)
      SPAFL_CHECK(t.size(d) == 1 || t.stride(d) == w.stride(d), check.op, ": ", name, " must have the memory order of ",
                      item("weights", l), ", strides ", text(Checker::strides_of(w)), "; got ", text(Checker::strides_of(t)));
    c.layers[l].packed = t.mutable_data_ptr();
    c.layers[l].packed_stride = client_stride(t);
  }
}

void launched(const char* op, int error) { SPAFL_CHECK(error == 0, op, ": the launch failed with CUDA error ", error); }

void run_lists(const char* op, const Cohort& c, const Tensor& mask, const Tensor& flipped, Lists& out, void* stream) {
  launched(op, spafl_active_lists(c.layers.data(), (int)c.layers.size(), c.clients, c.columns, (int64_t)c.layers.size(), dtype_code(c.dtype),
                                  (const uint8_t*)mask.const_data_ptr(), (const uint8_t*)flipped.const_data_ptr(),
                                  (int32_t*)out.active.mutable_data_ptr(), (int32_t*)out.inverse.mutable_data_ptr(),
                                  (int32_t*)out.counts.mutable_data_ptr(), (uint8_t*)out.changed.mutable_data_ptr(), out.pad_to, stream));
}

void threshold_pass(Tensors weights, Tensors thresholds, bool compare, int64_t pad_to, Tensor scores, Tensor mask, Tensor flipped,
                    Tensor active, Tensor inverse, Tensor counts, Tensor changed, Tensors packed) {
  Checker check{"threshold_pass_cuda"};
  Cohort c = cohort(check, weights, &thresholds);
  Lists lists{active, inverse, counts, changed, packed, pad_to};
  check.plain("scores", scores, c.dtype, c.wide());
  check_lists(check, c, weights, mask, flipped, lists);
  Launch on(weights[0]);
  launched(check.op, spafl_threshold_scores(c.layers.data(), (int)c.layers.size(), c.clients, c.columns, dtype_code(c.dtype),
                                            scores.mutable_data_ptr(), (uint8_t*)mask.mutable_data_ptr(),
                                            (uint8_t*)flipped.mutable_data_ptr(), compare, on.stream));
  run_lists(check.op, c, mask, flipped, lists, on.stream);
}

void active_lists(Tensors weights, Tensor mask, Tensor flipped, int64_t pad_to, Tensor active, Tensor inverse, Tensor counts,
                  Tensor changed, Tensors packed) {
  Checker check{"active_lists_cuda"};
  Cohort c = cohort(check, weights, nullptr);
  Lists lists{active, inverse, counts, changed, packed, pad_to};
  check_lists(check, c, weights, mask, flipped, lists);
  Launch on(weights[0]);
  run_lists(check.op, c, mask, flipped, lists, on.stream);
}

constexpr int64_t PLAIN_ROW = 1024;     // elements of a row of a parameter that is no threshold layer: 8 KB per block and tensor in fp32

int64_t fused_step_partials(std::vector<int64_t> rows, std::vector<int64_t> sizes) {
  SPAFL_CHECK(rows.size() == sizes.size(), "fused_step_partials: rows and sizes must have the same number of entries");
  std::vector<SpaflParameter> parameters;
  for (size_t i = 0; i < rows.size(); i++) {
    SPAFL_CHECK(rows[i] >= 0 && sizes[i] > 0 && (rows[i] == 0 || sizes[i] % rows[i] == 0),
                    "fused_step_partials: rows must be 0 (no threshold layer) or divide sizes, and sizes must be 1 or more; got ", rows[i],
                    " and ", sizes[i]);
    SpaflParameter p{};
    p.length = rows[i] ? sizes[i] / rows[i] : PLAIN_ROW;
    p.size = sizes[i];
    parameters.push_back(p);
  }
  return spafl_step_partials(parameters.data(), (int)parameters.size());
}

void fused_step(Tensors weights, Tensors weight_grads, Tensors weight_momenta, Tensors thresholds, Tensors threshold_grads,
                Tensors threshold_momenta, Tensors others, Tensors other_grads, Tensors other_momenta, Tensor learning_rate, Tensor penalty,
                double momentum, double weight_decay, std::optional<double> max_norm, Tensor partials, Tensor norms, Tensor scores,
                Tensor mask, Tensor flipped) {
  Checker check{"fused_step_cuda"};
  const char* op = check.op;
  SPAFL_CHECK(momentum >= 0 && momentum < 1, op, ": momentum must be in [0, 1); got ", momentum);
  SPAFL_CHECK(weight_decay >= 0, op, ": weight_decay must be 0 or more; got ", weight_decay);
  SPAFL_CHECK(!max_norm || *max_norm > 0, op, ": max_norm must be positive, or None for no clipping; got ", *max_norm);
  Cohort c = cohort(check, weights, &thresholds);
  SPAFL_CHECK(c.dtype == ScalarType::Float || c.dtype == ScalarType::Double, op, ": weights[0] must be float32 or float64; got ",
                  dtype_name(c.dtype));
  const size_t layers = weights.size(), all = others.size();
  check.length("weight_grads", weight_grads.size(), layers);
  check.length("threshold_grads", threshold_grads.size(), layers);
  check.length("other_grads", other_grads.size(), all);
  const bool moving = momentum != 0;
  check.length("weight_momenta (none without momentum)", weight_momenta.size(), moving ? layers : 0);
  check.length("threshold_momenta (none without momentum)", threshold_momenta.size(), moving ? layers : 0);
  check.length("other_momenta (none without momentum)", other_momenta.size(), moving ? all : 0);
  std::vector<SpaflParameter> parameters;
  for (size_t l = 0; l < layers; l++) {
    SpaflParameter p{};
    p.length = c.layers[l].fan_in;
    p.size = c.layers[l].fan_in * c.layers[l].filters;
    p.offset = c.layers[l].offset;
    p.value = weights[l].mutable_data_ptr();
    p.value_stride = client_stride(weights[l]);
    p.threshold = thresholds[l].mutable_data_ptr();
    p.threshold_stride = client_stride(thresholds[l]);
    check.same_layout(item("weight_grads", l), weight_grads[l], item("weights", l), weights[l]);
    check.same_layout(item("threshold_grads", l), threshold_grads[l], item("thresholds", l), thresholds[l]);
    p.grad = weight_grads[l].const_data_ptr();
    p.grad_stride = client_stride(weight_grads[l]);
    p.threshold_grad = threshold_grads[l].const_data_ptr();
    p.threshold_grad_stride = client_stride(threshold_grads[l]);
    if (moving) {
      check.same_layout(item("weight_momenta", l), weight_momenta[l], item("weights", l), weights[l]);
      check.same_layout(item("threshold_momenta", l), threshold_momenta[l], item("thresholds", l), thresholds[l]);
      p.momentum = weight_momenta[l].mutable_data_ptr();
      p.momentum_stride = client_stride(weight_momenta[l]);
      p.threshold_momentum = threshold_momenta[l].mutable_data_ptr();
      p.threshold_momentum_stride = client_stride(threshold_momenta[l]);
    }
    parameters.push_back(p);
  }
  for (size_t i = 0; i < all; i++) {
    const Tensor& t = others[i];
    const std::string name = item("others", i);
    SPAFL_CHECK(t.dim() >= 1 && t.numel() > 0 && t.size(0) == c.clients, op, ": ", name, " must have ", c.clients,
                    " clients in its leading dimension and no dimension of size 0; got ", text(shape_of(t)));
    check.dtype(name, t, c.dtype);
    check.dense_clients(name, t);
    check.same_layout(item("other_grads", i), other_grads[i], name, t);
    SpaflParameter p{};
    p.length = PLAIN_ROW;
    p.size = t.numel() / c.clients;
    p.value = t.mutable_data_ptr();
    p.value_stride = client_stride(t);
    p.grad = other_grads[i].const_data_ptr();
    p.grad_stride = client_stride(other_grads[i]);
    if (moving) {
      check.same_layout(item("other_momenta", i), other_momenta[i], name, t);
      p.momentum = other_momenta[i].mutable_data_ptr();
      p.momentum_stride = client_stride(other_momenta[i]);
    }
    parameters.push_back(p);
  }
  for (const auto& [name, rate] : {std::pair<const char*, const Tensor&>{"learning_rate", learning_rate}, {"penalty", penalty}})
    check.plain(name, rate, ScalarType::Double, {rate.dim() == 1 && rate.size(0) == 1 ? 1 : c.clients});
  check.plain("partials", partials, ScalarType::Double, {c.clients, spafl_step_partials(parameters.data(), (int)parameters.size())});
  check.plain("norms", norms, ScalarType::Double, {c.clients});
  check.plain("scores", scores, c.dtype, c.wide());
  check.plain("mask", mask, ScalarType::Bool, c.wide());
  check.plain("flipped", flipped, ScalarType::Bool, c.wide());
  Launch on(weights[0]);
  launched(op, spafl_fused_step(parameters.data(), (int)parameters.size(), c.clients, c.columns, dtype_code(c.dtype),
                                (const double*)learning_rate.const_data_ptr(), learning_rate.size(0) > 1,
                                (const double*)penalty.const_data_ptr(), penalty.size(0) > 1, momentum, weight_decay, max_norm.has_value(),
                                max_norm.value_or(0), (double*)partials.mutable_data_ptr(), (double*)norms.mutable_data_ptr(),
                                scores.mutable_data_ptr(), (uint8_t*)mask.mutable_data_ptr(), (uint8_t*)flipped.mutable_data_ptr(), on.stream));
}

using Copy = decltype(&spafl_compact_gather);

void compact_copy(const char* op, Copy copy, Tensors& full, Tensors& compact, Tensor& active, Tensor& counts,
                  const std::vector<int64_t>& filters, const std::vector<int64_t>& row_layers, const std::vector<int64_t>& column_layers,
                  Tensor& short_by) {
  Checker check{op};
  SPAFL_CHECK(!full.empty(), op, ": full must name at least one tensor");
  check.length("compact", compact.size(), full.size());
  check.length("row_layers", row_layers.size(), full.size());
  check.length("column_layers", column_layers.size(), full.size());
  const int64_t layers = (int64_t)filters.size();
  std::vector<int64_t> offsets;
  int64_t columns = 0;
  for (int64_t f : filters) {
    SPAFL_CHECK(f > 0, op, ": filters must be 1 or more for every layer; got ", f);
    offsets.push_back(columns);
    columns += f;
  }
  const int64_t clients = full[0].dim() ? full[0].size(0) : 0;
  check.plain("active", active, ScalarType::Int, {clients, columns});
  check.plain("counts", counts, ScalarType::Int, {clients, layers});
  check.plain("short_by", short_by, ScalarType::Int, {clients, (int64_t)full.size()});
  const ScalarType dtype = full[0].scalar_type();
  SPAFL_CHECK(dtype_code(dtype) >= 0, op, ": full[0] must be float64, float32, float16 or bfloat16; got ", dtype_name(dtype));
  std::vector<SpaflCompact> items;
  for (size_t i = 0; i < full.size(); i++) {
    const Tensor &f = full[i], &t = compact[i];
    for (const auto& [name, x] : {std::pair<std::string, const Tensor&>{item("full", i), f}, {item("compact", i), t}}) {
      check.dtype(name, x, dtype);
      SPAFL_CHECK(x.dim() == 5 && x.numel() > 0 && x.size(0) == clients, op, ": ", name, " must have shape (", clients,
                      ", rows, outer, columns, inner) with no dimension of size 0; got ", text(shape_of(x)));
      check.on_one_device(name, x);
      int64_t expected = 1;
      for (int d = 4; d >= 1; d--) {
        SPAFL_CHECK(x.size(d) == 1 || x.stride(d) == expected, op, ": ", name, " must be contiguous within a client; shape ",
                        text(shape_of(x)), " has strides ", text(Checker::strides_of(x)));
        expected *= x.size(d);
      }
    }
    SPAFL_CHECK(f.size(2) == t.size(2) && f.size(4) == t.size(4), op, ": ", item("compact", i),
                    " must have the outer and inner sizes of ", item("full", i), "; got ", text(shape_of(t)), " and ", text(shape_of(f)));
    SPAFL_CHECK(t.numel() / t.size(0) / t.size(1) <= INT32_MAX, op, ": a row of ", item("compact", i), " must have fewer than 2^31 elements");
    SpaflCompact c{};
    c.full = f.mutable_data_ptr();
    c.compact = t.mutable_data_ptr();
    c.full_stride = client_stride(f);
    c.compact_stride = client_stride(t);
    c.list_stride = columns;
    c.count_stride = layers;
    c.full_rows = f.size(1);
    c.compact_rows = t.size(1);
    c.outer = f.size(2);
    c.full_columns = f.size(3);
    c.compact_columns = t.size(3);
    c.inner = f.size(4);
    auto use = [&](const char* what, int64_t layer, int64_t full_size, const int32_t*& list, const int32_t*& count) {
      SPAFL_CHECK(layer >= -1 && layer < layers, op, ": ", item(what, i), " must be -1 (keep all) or the number of a layer, 0 to ",
                      layers - 1, "; got ", layer);
      if (layer < 0) return;
      SPAFL_CHECK(full_size == filters[layer], op, ": ", item("full", i), " has ", full_size, " where layer ", layer, " of ", what, " has ",
                      filters[layer], " filters");
      list = (const int32_t*)active.const_data_ptr() + offsets[layer];
      count = (const int32_t*)counts.const_data_ptr() + layer;
    };
    use("row_layers", row_layers[i], c.full_rows, c.rows, c.row_count);
    use("column_layers", column_layers[i], c.full_columns, c.columns, c.column_count);
    items.push_back(c);
  }
  Launch on(full[0]);
  launched(op, copy(items.data(), (int)items.size(), clients, (int)full[0].element_size(), (int32_t*)short_by.mutable_data_ptr(), on.stream));
}

void compact_gather(Tensors full, Tensors compact, Tensor active, Tensor counts, std::vector<int64_t> filters,
                    std::vector<int64_t> row_layers, std::vector<int64_t> column_layers, Tensor short_by) {
  compact_copy("compact_gather_cuda", spafl_compact_gather, full, compact, active, counts, filters, row_layers, column_layers, short_by);
}

void compact_scatter(Tensors full, Tensors compact, Tensor active, Tensor counts, std::vector<int64_t> filters,
                     std::vector<int64_t> row_layers, std::vector<int64_t> column_layers, Tensor short_by) {
  compact_copy("compact_scatter_cuda", spafl_compact_scatter, full, compact, active, counts, filters, row_layers, column_layers, short_by);
}

}  // namespace

#ifdef SPAFL_CUDA_ON_CPU
#define SPAFL_KERNEL_DEVICE CPU
#else
#define SPAFL_KERNEL_DEVICE CUDA
#endif
STABLE_TORCH_LIBRARY_IMPL(SPAFL_NAMESPACE, SPAFL_KERNEL_DEVICE, m) {
  m.impl("threshold_pass_cuda", TORCH_BOX(&threshold_pass));
  m.impl("active_lists_cuda", TORCH_BOX(&active_lists));
  m.impl("fused_step_cuda", TORCH_BOX(&fused_step));
  m.impl("compact_gather_cuda", TORCH_BOX(&compact_gather));
  m.impl("compact_scatter_cuda", TORCH_BOX(&compact_scatter));
}
STABLE_TORCH_LIBRARY_IMPL(SPAFL_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("fused_step_partials", TORCH_BOX(&fused_step_partials));
  m.impl("require_cuda_stream", TORCH_BOX(&require_cuda_stream));
}
#endif
