// BatchNorm with ReLU as templates over Vec (simd.h), included by each isa_*.cpp like kernels_impl.h.
//
//   y = relu(scale (x - mean) + offset),  scale = weight / sqrt(var + eps)
//
// An array is outer x channels x inner: NCHW has inner = H W; channels last is inner = 1, and a vector then holds
// several pixels or a part of one. Two passes forward (moments, y) and two backward (sums, gx); backward asks the sign
// of y again, by the same operations on the same numbers, because that is cheaper than reading y.

// Steps after which sums in T are carried on in double.
constexpr int64_t kCarry = 64;

template <typename T>
struct NormArrays {
  const T* x;
  const T* g = nullptr;
  T* y = nullptr;
};

// ---- what happens to one vector -----------------------------------------------------------------------------------
//
// begin() gets its channels' parameters, parameter(k) for k < parameters; parameter(0) is always minus the centre.
// No lambda may handle a vector: GCC compiles lambdas without the pragma's target, and they would pass it differently.

// Parameters by lane, or one for all lanes.
template <typename T>
struct PerLane {
  const T* at;
  int64_t stride;
  Vec<T> operator()(int k) const { return Vec<T>::load(at + k * stride); }
};
template <typename T>
struct PerChannel {
  const T* at;
  int64_t stride;
  Vec<T> operator()(int k) const { return Vec<T>::all(at[k * stride]); }
};

template <typename T>
struct NoSums {
  static constexpr bool sums = false;
  void carry_lanes(double*, double*) {}
  void carry_all(double*, double*) {}
};

template <typename T>
struct TwoSums {
  using V = Vec<T>;
  static constexpr bool sums = true;
  V first, second;

  void clear() { first = second = V::all(T(0)); }
  void add(V a, V b, V c) { first = V::add(first, a), second = V::fma(b, c, second); }
  // Both start again, afterwards.
  void carry_lanes(double* __restrict__ to_first, double* __restrict__ to_second) {
    T a[V::size], b[V::size];
    first.store(a), second.store(b);
    for (int lane = 0; lane < V::size; lane++) to_first[lane] += (double)a[lane];
    for (int lane = 0; lane < V::size; lane++) to_second[lane] += (double)b[lane];
    clear();
  }
  void carry_all(double* to_first, double* to_second) {
    T a[V::size], b[V::size];
    first.store(a), second.store(b);
    double sum = 0, other = 0;
    for (int lane = 0; lane < V::size; lane++) sum += (double)a[lane], other += (double)b[lane];
    *to_first += sum, *to_second += other;
    clear();
  }
};

// Sums of x - centre and of its square.
template <typename T>
struct Moments : TwoSums<T> {
  using V = Vec<T>;
  static constexpr int parameters = 1;
  V minus_centre;

  template <typename P>
  void begin(P parameter) {
    minus_centre = parameter(0);
    this->clear();
  }
  void take(const NormArrays<T>& a, int64_t at) {
    const V d = V::add(V::load(a.x + at), minus_centre);
    this->add(d, d, d);
  }
};

template <typename T>
struct Normalise : NoSums<T> {
  using V = Vec<T>;
  static constexpr int parameters = 3;
  V minus_mean, scale, offset;

  template <typename P>
  void begin(P parameter) {
    minus_mean = parameter(0), scale = parameter(1), offset = parameter(2);
  }
  // Not max(): NaN is carried on.
  void take(const NormArrays<T>& a, int64_t at) const {
    const V y = V::fma(V::add(V::load(a.x + at), minus_mean), scale, offset);
    V::zero_unless(V::positive(y), y).store(a.y + at);
  }
};

// Sums of g and of g (x - mean), where y passes the gradient.
template <typename T>
struct GradientSums : TwoSums<T> {
  using V = Vec<T>;
  static constexpr int parameters = 3;
  V minus_mean, scale, offset;

  template <typename P>
  void begin(P parameter) {
    minus_mean = parameter(0), scale = parameter(1), offset = parameter(2);
    this->clear();
  }
  void take(const NormArrays<T>& a, int64_t at) {
    const V d = V::add(V::load(a.x + at), minus_mean);
    const V g = V::zero_unless(V::positive(V::fma(d, scale, offset)), V::load(a.g + at));
    this->add(g, g, d);
  }
};

// scale g + slope (x - mean) + level; in eval the statistics are constants and only the first term is there.
template <typename T, bool training>
struct InputGradient : NoSums<T> {
  using V = Vec<T>;
  static constexpr int parameters = training ? 5 : 3;
  V minus_mean, scale, offset, slope, level;

  template <typename P>
  void begin(P parameter) {
    minus_mean = parameter(0), scale = parameter(1), offset = parameter(2);
    if constexpr (training) slope = parameter(3), level = parameter(4);
  }
  void take(const NormArrays<T>& a, int64_t at) const {
    const V d = V::add(V::load(a.x + at), minus_mean);
    const V g = V::zero_unless(V::positive(V::fma(d, scale, offset)), V::load(a.g + at));
    if constexpr (training)
      V::fma(g, scale, V::fma(d, slope, level)).store(a.y + at);
    else
      V::mul(g, scale).store(a.y + at);
  }
};

// ---- walks over an array ------------------------------------------------------------------------------------------
//
// table: parameters x channels. sums: 2 x channels, added to. Ends that fill no vector go through the same code in a
// padded copy: x is the centre and g is 0 there, which adds nothing to any sum.

template <typename Step, int G, typename T>
void walk_columns(int64_t rows, int64_t lanes, int64_t column, const T* table, const NormArrays<T> a, int64_t at,
                  double* sums) {
  using V = Vec<T>;
  Step step[G];
#pragma GCC unroll 8
  for (int k = 0; k < G; k++) step[k].begin(PerLane<T>{table + column + k * V::size, lanes});
  for (int64_t row = 0; row < rows; row++)
#pragma GCC unroll 8
    for (int k = 0; k < G; k++) step[k].take(a, at + row * lanes + column + k * V::size);
  if constexpr (Step::sums)
#pragma GCC unroll 8
    for (int k = 0; k < G; k++) step[k].carry_lanes(sums + column + k * V::size, sums + lanes + column + k * V::size);
}

// A row is whole pixels (or whole images, where planes are small) and whole vectors, so that a lane has the same
// channel in every row.
template <typename Step, typename T>
void walk_rows(const NormShape& s, const T* table, const NormArrays<T> a, double* sums) {
  using V = Vec<T>;
  const int64_t width = s.channels * s.inner;
  int64_t divisor = V::size;
  while (width % divisor) divisor /= 2;
  // At least four vectors side by side, so that four sums are in flight.
  const int64_t period = width / divisor, vectors = period * ((3 + period) / period), lanes = vectors * V::size;
  std::vector<T> wide(Step::parameters * lanes);
  for (int64_t p = 0; p < Step::parameters; p++) {
    T* to = wide.data() + p * lanes;
    for (int64_t c = 0; c < s.channels; c++) std::fill_n(to + c * s.inner, s.inner, table[p * s.channels + c]);
    for (int64_t lane = width; lane < lanes; lane++) to[lane] = to[lane - width];
  }
  std::vector<double> lane_sums(Step::sums ? 2 * lanes : 0);

  const auto walk = [&](int64_t rows, int64_t count, const NormArrays<T>& from, int64_t at) {
    for (int64_t v = 0; v < count;) {
      const int64_t left = count - v, group = left < 8 ? left : 4;
      (group == 4   ? walk_columns<Step, 4, T>
       : group == 5 ? walk_columns<Step, 5, T>
       : group == 6 ? walk_columns<Step, 6, T>
                    : walk_columns<Step, 7, T>)(rows, lanes, v * V::size, wide.data(), from, at, lane_sums.data());
      v += group;
    }
  };
  const int64_t total = s.outer * width, rows = total / lanes;
  for (int64_t row = 0; row < rows; row += kCarry) walk(std::min(kCarry, rows - row), vectors, a, row * lanes);
  if (const int64_t start = rows * lanes, left = total - start; left) {
    const int64_t count = std::max<int64_t>(4, (left + V::size - 1) / V::size), padded = count * V::size;
    std::vector<T> x(padded), g(padded), y(padded);
    for (int64_t lane = 0; lane < padded; lane++) x[lane] = -wide[lane];
    std::copy_n(a.x + start, left, x.data());
    if (a.g) std::copy_n(a.g + start, left, g.data());
    walk(1, count, {x.data(), g.data(), y.data()}, 0);
    if (a.y) std::copy_n(y.data(), left, a.y + start);
  }
  if constexpr (Step::sums)
    for (int64_t half = 0; half < 2; half++)
      for (int64_t start = 0; start < lanes; start += width)
        for (int64_t lane = 0; lane < width; lane++)
          sums[half * s.channels + lane / s.inner] += lane_sums[half * lanes + start + lane];
}

template <int G, typename Step>
inline void carry_planes(Step (&step)[G], double* sums, int64_t channels, int64_t c) {
  if constexpr (Step::sums)
#pragma GCC unroll 8
    for (int k = 0; k < G; k++) step[k].carry_all(sums + c, sums + channels + c);
}

// Channels first: one channel's planes after another.
template <typename Step, typename T>
void walk_planes(const NormShape& s, const T* table, const NormArrays<T> a, double* sums) {
  using V = Vec<T>;
  constexpr int G = 4;
  constexpr int64_t group = G * V::size;
  T x[V::size], g[V::size] = {}, y[V::size];
  for (int64_t c = 0; c < s.channels; c++) {
    Step step[G];
#pragma GCC unroll 4
    for (int k = 0; k < G; k++) step[k].begin(PerChannel<T>{table + c, s.channels});
    int64_t steps = 0;
    for (int64_t n = 0; n < s.outer; n++) {
      const int64_t start = (n * s.channels + c) * s.inner, end = start + s.inner;
      int64_t i = start;
      while (i + group <= end) {
        const int64_t pause = std::min(end, i + kCarry * group);
        for (; i + group <= pause; i += group, steps++)
#pragma GCC unroll 4
          for (int k = 0; k < G; k++) step[k].take(a, i + k * V::size);
        if (steps >= kCarry) carry_planes(step, sums, s.channels, c), steps = 0;
      }
      for (; i + V::size <= end; i += V::size, steps++) step[0].take(a, i);
      if (const int64_t left = end - i; left) {
        std::fill_n(x, (int)V::size, -table[c]);
        std::copy_n(a.x + i, left, x);
        if (a.g) std::copy_n(a.g + i, left, g);
        step[1].take({x, g, y}, 0);
        if (a.y) std::copy_n(y, left, a.y + i);
        steps++;
      }
      if (steps >= kCarry) carry_planes(step, sums, s.channels, c), steps = 0;
    }
    carry_planes(step, sums, s.channels, c);
  }
}

template <typename Step, typename T>
void walk(const NormShape& s, const std::vector<T>& table, const NormArrays<T>& a, double* sums = nullptr) {
  // A plane of fewer than four vectors keeps too few sums in flight.
  const bool rows = s.inner == 1 || (s.inner < 4 * Vec<T>::size && s.channels * s.inner % Vec<T>::size == 0);
  (rows ? walk_rows<Step, T> : walk_planes<Step, T>)(s, table.data(), a, sums);
}

// ---- BatchNorm + ReLU ---------------------------------------------------------------------------------------------

// A number near the mean of each channel: moments about it lose nothing to cancellation. The mean of a few values
// spread over the array, taken about the first: a constant channel gives that constant, and variance 0, exactly.
template <typename T>
std::vector<T> near_means(const NormShape& s, const T* x) {
  constexpr uint64_t golden = 0x9E3779B9;  // multiples of the golden ratio mod 1: even for any count, in step with none
  const int64_t pixels = s.outer * s.inner, samples = std::min<int64_t>(pixels, 16);
  std::vector<double> sum(s.channels);
  for (int64_t i = 1; i < samples; i++) {
    const int64_t pixel = (int64_t)((((uint64_t)i * golden) & 0xFFFFFFFF) * (uint64_t)pixels >> 32);
    const T* from = x + pixel / s.inner * s.channels * s.inner + pixel % s.inner;
    for (int64_t c = 0; c < s.channels; c++) sum[c] += (double)from[c * s.inner] - (double)x[c * s.inner];
  }
  std::vector<T> near(s.channels);
  for (int64_t c = 0; c < s.channels; c++) {
    near[c] = (T)((double)x[c * s.inner] + sum[c] / (double)samples);
    // About 0, sums with infinities in them come out as the mean's definition has it.
    if (!std::isfinite(near[c])) near[c] = 0;
  }
  return near;
}

template <typename T>
void norm_moments(const NormShape& s, const T* x, double eps, T* mean, T* rstd, T* var) {
  std::vector<T> table = near_means(s, x);
  const std::vector<T> near = table;
  for (T& centre : table) centre = -centre;
  std::vector<double> sums(2 * s.channels);
  walk<Moments<T>, T>(s, table, {x}, sums.data());
  const double count = (double)(s.outer * s.inner);
  for (int64_t c = 0; c < s.channels; c++) {
    const double shift = sums[c] / count;
    double squares = sums[s.channels + c] - sums[c] * shift;
    if (squares < 0) squares = 0;  // NaN stays
    mean[c] = (T)((double)near[c] + shift);
    rstd[c] = (T)(1 / std::sqrt(squares / count + eps));
    var[c] = (T)(squares / (count - 1));
  }
}

// The parameters of every step: minus the mean, scale, offset.
template <typename T>
std::vector<T> norm_table(const NormShape& s, const T* weight, const T* bias, const T* mean, const T* rstd, int rows) {
  std::vector<T> table(rows * s.channels);
  T *minus_mean = table.data(), *scale = minus_mean + s.channels, *offset = scale + s.channels;
  for (int64_t c = 0; c < s.channels; c++) {
    minus_mean[c] = -mean[c];
    scale[c] = weight ? weight[c] * rstd[c] : rstd[c];
    offset[c] = bias ? bias[c] : T(0);
  }
  return table;
}

template <typename T>
void norm_relu(const NormShape& s, const T* x, const T* weight, const T* bias, const T* mean, const T* rstd, T* y) {
  walk<Normalise<T>, T>(s, norm_table(s, weight, bias, mean, rstd, 3), {x, nullptr, y});
}

// Gradients of weight and bias from the sums, and the parameters of the input's: slope, level.
template <typename T>
void norm_gradients(const NormShape& s, const std::vector<double>& sums, const T* rstd, std::vector<T>& table,
                    T* gweight, T* gbias) {
  const double count = (double)(s.outer * s.inner);
  for (int64_t c = 0; c < s.channels; c++) {
    const double sum = sums[c], product = sums[s.channels + c], scale = table[s.channels + c], r = rstd[c];
    gbias[c] = (T)sum;
    gweight[c] = (T)(product * r);
    table[3 * s.channels + c] = (T)(-scale * r * r * product / count);
    table[4 * s.channels + c] = (T)(-scale * sum / count);
  }
}

template <typename T>
void norm_relu_grad(const NormShape& s, const T* gy, const T* x, const T* weight, const T* bias, const T* mean,
                    const T* rstd, bool training, T* gx, T* gweight, T* gbias) {
  std::vector<T> table = norm_table(s, weight, bias, mean, rstd, 5);
  std::vector<double> sums(2 * s.channels);
  walk<GradientSums<T>, T>(s, table, {x, gy}, sums.data());
  norm_gradients(s, sums, rstd, table, gweight, gbias);
  if (training)
    walk<InputGradient<T, true>, T>(s, table, {x, gy, gx});
  else
    walk<InputGradient<T, false>, T>(s, table, {x, gy, gx});
}

// ---- BatchNorm + ReLU + max-pool, channels last -------------------------------------------------------------------
//
// A vector is one or two blocks of neighbouring channels, each of one pool window: with 8 channels AVX-512 takes two
// windows at a time. Backward finds the winners again from x, so that nothing is kept but the statistics.

template <typename T>
struct PoolBlocks {
  using V = Vec<T>;
#if defined(SPAFL_ISA_AVX512)
  static constexpr int parts = 2, size = V::size / parts;
  static V load(const T* p, const int32_t* at) {
    if constexpr (sizeof(T) == 4)
      return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(p + at[0])), _mm256_loadu_ps(p + at[1]), 1)};
    else
      return {_mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_loadu_pd(p + at[0])), _mm256_loadu_pd(p + at[1]), 1)};
  }
  static void store(V v, T* p, const int32_t* at) {
    if constexpr (sizeof(T) == 4) {
      _mm256_storeu_ps(p + at[0], _mm512_castps512_ps256(v.v));
      _mm256_storeu_ps(p + at[1], _mm512_extractf32x8_ps(v.v, 1));
    } else {
      _mm256_storeu_pd(p + at[0], _mm512_castpd512_pd256(v.v));
      _mm256_storeu_pd(p + at[1], _mm512_extractf64x4_pd(v.v, 1));
    }
  }
#else
  static constexpr int parts = 1, size = V::size;
  static V load(const T* p, const int32_t* at) { return V::load(p + at[0]); }
  static void store(V v, T* p, const int32_t* at) { v.store(p + at[0]); }
#endif

  // Of one image, by block of the pooled map: where its window starts, and its first channel. A last vector that is
  // not full repeats its last block.
  std::vector<int32_t> corner, channel;
  int64_t count, image, pooled;  // blocks; elements of an image and of a pooled image
  int32_t step[9];               // from a window's corner to its k-th element

  PoolBlocks(const PoolShape& s) {
    const int64_t per_pixel = s.channels / size, width = s.width / s.pool;
    count = s.height / s.pool * width * per_pixel;
    image = s.height * s.width * s.channels, pooled = count * size;
    for (int64_t i = 0; i < (count + parts - 1) / parts * parts; i++) {
      const int64_t block = std::min(i, count - 1), pixel = block / per_pixel, first = block % per_pixel * size;
      channel.push_back((int32_t)first);
      corner.push_back((int32_t)((pixel / width * s.width + pixel % width) * s.pool * s.channels + first));
    }
    for (int64_t k = 0; k < s.pool * s.pool; k++)
      step[k] = (int32_t)((k / s.pool * s.width + k % s.pool) * s.channels);
  }
  // y and its gradient are dense.
  V load_pooled(const T* p, int64_t block) const {
    if (block + parts <= count) return V::load(p + block * size);
    T lanes[V::size];
    for (int part = 0; part < parts; part++) std::copy_n(p + block * size, size, lanes + part * size);
    return V::load(lanes);
  }
  void store_pooled(V v, T* p, int64_t block) const {
    if (block + parts <= count) return v.store(p + block * size);
    T lanes[V::size];
    v.store(lanes);
    std::copy_n(lanes, size, p + block * size);
  }
};

// The windows of one vector: the winners' y, and how to find them.
template <typename T, int P>
struct PoolWindows {
  using V = Vec<T>;
  V d[P * P], best, best_d;  // x - mean
  typename V::Mask better[P * P];

  PoolWindows(const PoolBlocks<T>& b, const T* x, const int32_t* at, V minus_mean, V scale, V offset) {
#pragma GCC unroll 9
    for (int k = 0; k < P * P; k++) {
      d[k] = V::add(PoolBlocks<T>::load(x + b.step[k], at), minus_mean);
      const V y = V::fma(d[k], scale, offset);
      if (k == 0) {
        best = y, best_d = d[0];
      } else {
        better[k] = V::replaces(y, best);
        best = V::select(better[k], y, best), best_d = V::select(better[k], d[k], best_d);
      }
    }
  }
};

template <typename T, int P>
void norm_relu_pool_forward(const PoolShape& s, const T* x, const std::vector<T>& table, T* y) {
  using V = Vec<T>;
  using B = PoolBlocks<T>;
  const B b(s);
  const T *minus_mean = table.data(), *scale = minus_mean + s.channels, *offset = scale + s.channels;
  for (int64_t n = 0; n < s.batch; n++)
    for (int64_t i = 0; i < b.count; i += B::parts) {
      const int32_t* c = b.channel.data() + i;
      const PoolWindows<T, P> w(b, x + n * b.image, b.corner.data() + i, B::load(minus_mean, c),
                                B::load(scale, c), B::load(offset, c));
      b.store_pooled(V::zero_unless(V::positive(w.best), w.best), y + n * b.pooled, i);
    }
}

template <typename T, int P>
void norm_relu_pool_sums(const PoolShape& s, const T* x, const T* gy, const std::vector<T>& table, double* sums) {
  using V = Vec<T>;
  using B = PoolBlocks<T>;
  const B b(s);
  const T *minus_mean = table.data(), *scale = minus_mean + s.channels, *offset = scale + s.channels;
  // A row of lanes for every first channel: lane j of the row is channel (first + j) % channels.
  const int64_t rows = s.channels / B::size, lanes = rows * V::size;
  std::vector<T> partial(2 * lanes);
  const auto carry = [&] {
    for (int64_t half = 0; half < 2; half++)
      for (int64_t row = 0; row < rows; row++)
        for (int64_t lane = 0; lane < V::size; lane++) {
          T& sum = partial[half * lanes + row * V::size + lane];
          sums[half * s.channels + (row * B::size + lane) % s.channels] += (double)sum;
          sum = 0;
        }
  };
  int64_t left = kCarry * rows;
  for (int64_t n = 0; n < s.batch; n++)
    for (int64_t i = 0; i < b.count; i += B::parts) {
      const int32_t* c = b.channel.data() + i;
      const PoolWindows<T, P> w(b, x + n * b.image, b.corner.data() + i, B::load(minus_mean, c),
                                B::load(scale, c), B::load(offset, c));
      const V g = V::zero_unless(V::positive(w.best), b.load_pooled(gy + n * b.pooled, i));
      T *first = partial.data() + c[0] * B::parts, *second = first + lanes;
      if (i + B::parts <= b.count) {
        V::add(V::load(first), g).store(first);
        V::fma(g, w.best_d, V::load(second)).store(second);
      } else {
        T a[V::size], product[V::size];
        g.store(a), V::mul(g, w.best_d).store(product);
        for (int lane = 0; lane < B::size; lane++) first[lane] += a[lane], second[lane] += product[lane];
      }
      if (--left == 0) carry(), left = kCarry * rows;
    }
  carry();
}

template <typename T, int P, bool training>
void norm_relu_pool_input(const PoolShape& s, const T* x, const T* gy, const std::vector<T>& table, T* gx) {
  using V = Vec<T>;
  using B = PoolBlocks<T>;
  const B b(s);
  const T *minus_mean = table.data(), *scale = minus_mean + s.channels, *offset = scale + s.channels,
          *slope = offset + s.channels, *level = slope + s.channels;
  for (int64_t n = 0; n < s.batch; n++)
    for (int64_t i = 0; i < b.count; i += B::parts) {
      const int32_t *c = b.channel.data() + i, *at = b.corner.data() + i;
      const V factor = B::load(scale, c);
      const PoolWindows<T, P> w(b, x + n * b.image, at, B::load(minus_mean, c), factor, B::load(offset, c));
      V g = V::zero_unless(V::positive(w.best), b.load_pooled(gy + n * b.pooled, i));
      g = V::mul(g, factor);
      // The last that was better than all before it is the winner.
#pragma GCC unroll 9
      for (int k = P * P - 1; k >= 0; k--) {
        V mine = g;
        if (k) mine = V::zero_unless(w.better[k], g), g = V::select(w.better[k], V::all(T(0)), g);
        if constexpr (training) mine = V::add(mine, V::fma(w.d[k], B::load(slope, c), B::load(level, c)));
        B::store(mine, gx + n * b.image + b.step[k], at);
      }
    }
}

template <typename T>
void norm_relu_pool(const PoolShape& s, const T* x, const T* weight, const T* bias, const T* mean, const T* rstd,
                    T* y) {
  const auto table = norm_table({s.batch * s.height * s.width, s.channels, 1}, weight, bias, mean, rstd, 3);
  (s.pool == 2 ? norm_relu_pool_forward<T, 2> : norm_relu_pool_forward<T, 3>)(s, x, table, y);
}

template <typename T>
void norm_relu_pool_grad(const PoolShape& s, const T* gy, const T* x, const T* weight, const T* bias, const T* mean,
                         const T* rstd, bool training, T* gx, T* gweight, T* gbias) {
  const NormShape shape{s.batch * s.height * s.width, s.channels, 1};
  auto table = norm_table(shape, weight, bias, mean, rstd, 5);
  std::vector<double> sums(2 * s.channels);
  (s.pool == 2 ? norm_relu_pool_sums<T, 2> : norm_relu_pool_sums<T, 3>)(s, x, gy, table, sums.data());
  norm_gradients(shape, sums, rstd, table, gweight, gbias);
  if (training)
    (s.pool == 2 ? norm_relu_pool_input<T, 2, true> : norm_relu_pool_input<T, 3, true>)(s, x, gy, table, gx);
  else
    (s.pool == 2 ? norm_relu_pool_input<T, 2, false> : norm_relu_pool_input<T, 3, false>)(s, x, gy, table, gx);
}
