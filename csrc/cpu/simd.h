// The few vector operations the kernels need, for one instruction set. Included inside a namespace of its own by each
// isa_*.cpp, after SPAFL_ISA_AVX512 / SPAFL_ISA_AVX2 (or neither) is defined.
//
// Vec<T>: the widest vector; Row<T>: the vector that covers a few kernel columns (256 bit at most: kernels are 3..8
// wide). fma() may or may not round between the product and the sum; everything else is exact per lane.

#if defined(SPAFL_ISA_AVX512)
struct VecF {
  static constexpr int size = 16;
  using Mask = __mmask16;
  using Codes = __m512i;
  __m512 v;
  static VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static VecF gather(const float* p, const int32_t* at) { return {_mm512_i32gather_ps(_mm512_loadu_si512(at), p, 4)}; }
  static VecF all(float x) { return {_mm512_set1_ps(x)}; }
  static VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static VecF add(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
  static VecF mul(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static VecF abs(VecF a) { return {_mm512_abs_ps(a.v)}; }
  // True where candidate replaces best: larger, or not a number (what torch's max_pool2d does).
  static Mask replaces(VecF candidate, VecF best) {
    return _mm512_cmp_ps_mask(candidate.v, best.v, _CMP_GT_OQ) | _mm512_cmp_ps_mask(candidate.v, candidate.v, _CMP_UNORD_Q);
  }
  static Mask positive(VecF a) { return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NLE_UQ); }
  static VecF select(Mask m, VecF yes, VecF no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
  static VecF zero_unless(Mask m, VecF a) { return {_mm512_maskz_mov_ps(m, a.v)}; }
  static Codes codes(int k) { return _mm512_set1_epi32(k); }
  static Codes select(Mask m, Codes yes, Codes no) { return _mm512_mask_blend_epi32(m, no, yes); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  static void store(Codes c, uint8_t* p) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(c)); }
};
struct VecD {
  static constexpr int size = 8;
  using Mask = __mmask8;
  using Codes = __m512i;
  __m512d v;
  static VecD load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static VecD gather(const double* p, const int32_t* at) { return {_mm512_i32gather_pd(_mm256_loadu_si256((const __m256i*)at), p, 8)}; }
  static VecD all(double x) { return {_mm512_set1_pd(x)}; }
  static VecD fma(VecD a, VecD b, VecD c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  static VecD add(VecD a, VecD b) { return {_mm512_add_pd(a.v, b.v)}; }
  static VecD mul(VecD a, VecD b) { return {_mm512_mul_pd(a.v, b.v)}; }
  static VecD abs(VecD a) { return {_mm512_abs_pd(a.v)}; }
  static Mask replaces(VecD candidate, VecD best) {
    return _mm512_cmp_pd_mask(candidate.v, best.v, _CMP_GT_OQ) | _mm512_cmp_pd_mask(candidate.v, candidate.v, _CMP_UNORD_Q);
  }
  static Mask positive(VecD a) { return _mm512_cmp_pd_mask(a.v, _mm512_setzero_pd(), _CMP_NLE_UQ); }
  static VecD select(Mask m, VecD yes, VecD no) { return {_mm512_mask_blend_pd(m, no.v, yes.v)}; }
  static VecD zero_unless(Mask m, VecD a) { return {_mm512_maskz_mov_pd(m, a.v)}; }
  static Codes codes(int k) { return _mm512_set1_epi64(k); }
  static Codes select(Mask m, Codes yes, Codes no) { return _mm512_mask_blend_epi64(m, no, yes); }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  static void store(Codes c, uint8_t* p) { _mm_storel_epi64((__m128i*)p, _mm512_cvtepi64_epi8(c)); }
};
#elif defined(SPAFL_ISA_AVX2)
struct VecF {
  static constexpr int size = 8;
  using Mask = __m256;
  using Codes = __m256;
  __m256 v;
  static VecF load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static VecF gather(const float* p, const int32_t* at) { return {_mm256_i32gather_ps(p, _mm256_loadu_si256((const __m256i*)at), 4)}; }
  static VecF all(float x) { return {_mm256_set1_ps(x)}; }
  static VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static VecF add(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
  static VecF mul(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static VecF abs(VecF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0), a.v)}; }
  static Mask replaces(VecF candidate, VecF best) {
    return _mm256_or_ps(_mm256_cmp_ps(candidate.v, best.v, _CMP_GT_OQ), _mm256_cmp_ps(candidate.v, candidate.v, _CMP_UNORD_Q));
  }
  static Mask positive(VecF a) { return _mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_NLE_UQ); }
  static VecF select(Mask m, VecF yes, VecF no) { return {_mm256_blendv_ps(no.v, yes.v, m)}; }
  static VecF zero_unless(Mask m, VecF a) { return {_mm256_and_ps(m, a.v)}; }
  static Codes codes(int k) { return _mm256_castsi256_ps(_mm256_set1_epi32(k)); }
  static Codes select(Mask m, Codes yes, Codes no) { return _mm256_blendv_ps(no, yes, m); }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  static void store(Codes c, uint8_t* p) {
    // The low byte of each of the 8 integers.
    const __m256i pick = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1,
                                          -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_castps_si256(c), pick);
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64((__m128i*)p, both);
  }
};
struct VecD {
  static constexpr int size = 4;
  using Mask = __m256d;
  using Codes = __m256d;
  __m256d v;
  static VecD load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static VecD gather(const double* p, const int32_t* at) { return {_mm256_i32gather_pd(p, _mm_loadu_si128((const __m128i*)at), 8)}; }
  static VecD all(double x) { return {_mm256_set1_pd(x)}; }
  static VecD fma(VecD a, VecD b, VecD c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  static VecD add(VecD a, VecD b) { return {_mm256_add_pd(a.v, b.v)}; }
  static VecD mul(VecD a, VecD b) { return {_mm256_mul_pd(a.v, b.v)}; }
  static VecD abs(VecD a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
  static Mask replaces(VecD candidate, VecD best) {
    return _mm256_or_pd(_mm256_cmp_pd(candidate.v, best.v, _CMP_GT_OQ), _mm256_cmp_pd(candidate.v, candidate.v, _CMP_UNORD_Q));
  }
  static Mask positive(VecD a) { return _mm256_cmp_pd(a.v, _mm256_setzero_pd(), _CMP_NLE_UQ); }
  static VecD select(Mask m, VecD yes, VecD no) { return {_mm256_blendv_pd(no.v, yes.v, m)}; }
  static VecD zero_unless(Mask m, VecD a) { return {_mm256_and_pd(m, a.v)}; }
  static Codes codes(int k) { return _mm256_castsi256_pd(_mm256_set1_epi64x(k)); }
  static Codes select(Mask m, Codes yes, Codes no) { return _mm256_blendv_pd(no, yes, m); }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  static void store(Codes c, uint8_t* p) {
    alignas(32) int64_t lanes[4];
    _mm256_store_si256((__m256i*)lanes, _mm256_castpd_si256(c));
    for (int i = 0; i < 4; i++) p[i] = (uint8_t)lanes[i];
  }
};
#endif

#if defined(SPAFL_ISA_AVX512) || defined(SPAFL_ISA_AVX2)
struct RowF {
  static constexpr int size = 8;
  __m256 v;
  static RowF load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static RowF all(float x) { return {_mm256_set1_ps(x)}; }
  static RowF fma(RowF a, RowF b, RowF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static RowF add(RowF a, RowF b) { return {_mm256_add_ps(a.v, b.v)}; }
  // a where lane is not 0, else b.
  static RowF pick(RowF lane, RowF a, RowF b) {
    return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(lane.v, _mm256_setzero_ps(), _CMP_NEQ_OQ))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
};
struct RowD {
  static constexpr int size = 4;
  __m256d v;
  static RowD load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static RowD all(double x) { return {_mm256_set1_pd(x)}; }
  static RowD fma(RowD a, RowD b, RowD c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  static RowD add(RowD a, RowD b) { return {_mm256_add_pd(a.v, b.v)}; }
  static RowD pick(RowD lane, RowD a, RowD b) {
    return {_mm256_blendv_pd(b.v, a.v, _mm256_cmp_pd(lane.v, _mm256_setzero_pd(), _CMP_NEQ_OQ))};
  }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
};
template <typename T>
using Vec = std::conditional_t<std::is_same_v<T, float>, VecF, VecD>;
template <typename T>
using Row = std::conditional_t<std::is_same_v<T, float>, RowF, RowD>;
#else
// The compiler's own vectors: 128 bit on any baseline that has them (SSE2, NEON), plain code otherwise.
template <typename T, int N>
struct Lanes {
  static constexpr int size = N;
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Values __attribute__((vector_size(N * sizeof(T))));
  typedef Integer Integers __attribute__((vector_size(N * sizeof(T))));
  using Mask = Integers;
  using Codes = Integers;
  Values v;
  static Lanes load(const T* p) {
    Lanes r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  static Lanes gather(const T* p, const int32_t* at) {
    Lanes r;
    for (int i = 0; i < N; i++) r.v[i] = p[at[i]];
    return r;
  }
  static Lanes all(T x) { return {x - Values{}}; }
  static Lanes fma(Lanes a, Lanes b, Lanes c) { return {c.v + a.v * b.v}; }
  static Lanes add(Lanes a, Lanes b) { return {a.v + b.v}; }
  static Lanes mul(Lanes a, Lanes b) { return {a.v * b.v}; }
  static Lanes pick(Lanes lane, Lanes a, Lanes b) { return {lane.v != Values{} ? a.v : b.v}; }
  static Lanes abs(Lanes a) { return {(Values)((Integers)a.v & ~((Integers)all(T(-0.0)).v))}; }
  static Mask replaces(Lanes candidate, Lanes best) { return (candidate.v > best.v) | (candidate.v != candidate.v); }
  static Mask positive(Lanes a) { return ~(a.v <= Values{}); }
  static Lanes select(Mask m, Lanes yes, Lanes no) { return {m ? yes.v : no.v}; }
  static Lanes zero_unless(Mask m, Lanes a) { return {(Values)(m & (Integers)a.v)}; }
  static Codes codes(int k) { return k - Integers{}; }
  static Codes select(Mask m, Codes yes, Codes no) { return m ? yes : no; }
  void store(T* p) const { std::memcpy(p, &v, sizeof v); }
  static void store(Codes c, uint8_t* p) {
    for (int i = 0; i < N; i++) p[i] = (uint8_t)c[i];
  }
};
template <typename T>
using Vec = Lanes<T, 16 / sizeof(T)>;
template <typename T>
using Row = Lanes<T, 16 / sizeof(T)>;
#endif
