// Which instruction set runs: the best one of this machine, or the one that SPAFL_CPU_ISA names.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace spafl {
#define SPAFL_TABLES(isa)              \
  namespace isa {                      \
  extern const Kernels<float> f32;     \
  extern const Kernels<double> f64;    \
  }
SPAFL_TABLES(scalar)
#ifdef SPAFL_X86_VECTORS
SPAFL_TABLES(avx2)
SPAFL_TABLES(avx512)
#endif

bool isa_supported(Isa isa) {
  if (isa == Isa::scalar) return true;
#ifdef SPAFL_X86_VECTORS
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

const char* isa_name(Isa isa) {
  return isa == Isa::scalar ? "scalar" : isa == Isa::avx2 ? "avx2" : "avx512";
}

static Isa choose() {
  const char* wanted = std::getenv("SPAFL_CPU_ISA");
  const Isa all[] = {Isa::avx512, Isa::avx2, Isa::scalar};
  for (Isa isa : all) {
    if (wanted && *wanted ? std::string(wanted) == isa_name(isa) : isa_supported(isa)) {
      if (!isa_supported(isa))
        throw std::runtime_error("SPAFL_CPU_ISA=" + std::string(wanted) + ": this machine or this build cannot run it");
      return isa;
    }
  }
  throw std::runtime_error("SPAFL_CPU_ISA must be scalar, avx2 or avx512; got " + std::string(wanted));
}

Isa active_isa() {
  // Read once. If choose() throws, the next call tries again and throws again.
  static const Isa isa = choose();
  return isa;
}

template <>
const Kernels<float>& kernels_for<float>(Isa isa) {
#ifdef SPAFL_X86_VECTORS
  if (isa == Isa::avx512) return avx512::f32;
  if (isa == Isa::avx2) return avx2::f32;
#endif
  return scalar::f32;
}

template <>
const Kernels<double>& kernels_for<double>(Isa isa) {
#ifdef SPAFL_X86_VECTORS
  if (isa == Isa::avx512) return avx512::f64;
  if (isa == Isa::avx2) return avx2::f64;
#endif
  return scalar::f64;
}

template <typename T>
const Kernels<T>& kernels() {
  return kernels_for<T>(active_isa());
}
template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

}  // namespace spafl
