// The kernels for avx2. Only code after the pragma may use it: a standard-library function compiled here for avx2 could
// be the copy that the linker keeps for everybody, so all headers come first.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "kernels.h"

#ifdef SPAFL_X86_VECTORS
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define SPAFL_ISA_AVX2
namespace spafl::avx2 {
namespace {
#include "simd.h"
// clang-format keeps this order: simd.h first
#include "norm_impl.h"
#include "kernels_impl.h"
}  // namespace
extern const Kernels<float> f32 = table<float>;
extern const Kernels<double> f64 = table<double>;
}  // namespace spafl::avx2
#pragma GCC pop_options
#endif
