// The kernels for whatever the compiler's baseline is.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace spafl::scalar {
namespace {
#include "simd.h"
// clang-format keeps this order: simd.h first
#include "norm_impl.h"
#include "kernels_impl.h"
}  // namespace
extern const Kernels<float> f32 = table<float>;
extern const Kernels<double> f64 = table<double>;
}  // namespace spafl::scalar
