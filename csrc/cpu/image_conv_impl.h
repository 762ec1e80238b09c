// Convolution with a lane per image, for layers with few channels. Included by kernels_impl.h.
//
// A vector holds one number of each of several images, so a vector instruction does for all of them what the plainest code
// does for one: no channel count leaves lanes empty and no border needs a mask. Images in channels-last order are
// transposed in and out row by row, a few rows at a time, which a few channels' multiply-adds pay for many times over.
// Blocks of output channels and pixels (for the weight gradient: of output and input channels) stay in registers.

// Rows and columns of a block of sums that leave room for what is multiplied.
#if defined(SPAFL_ISA_AVX512)
constexpr int kSums = 24, kBlock = 8;  // kBlock: most channels of a block
#else
constexpr int kSums = 12, kBlock = 4;
#endif

template <typename T>
using LaneIndex = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// Vec<T>::size vectors as a square matrix: exchanges rows i and i + D with columns l and l + D.
template <typename T, int D, int... L>
inline void swap_corners(Vec<T>* r, std::integer_sequence<int, L...>) {
  constexpr int lanes = Vec<T>::size;
  typedef LaneIndex<T> Index __attribute__((vector_size(lanes * sizeof(T))));
  constexpr Index low = {(L & D ? L - D + lanes : L)...}, high = {(L & D ? L + lanes : L + D)...};
#pragma GCC unroll 16
  for (int i = 0; i < lanes; i++) {
    if (i & D) continue;
    const auto a = r[i].v, b = r[i + D].v;
    r[i].v = __builtin_shuffle(a, b, low);
    r[i + D].v = __builtin_shuffle(a, b, high);
  }
}

template <typename T, int D = Vec<T>::size / 2>
inline void transpose(Vec<T>* r) {
  swap_corners<T, D>(r, std::make_integer_sequence<int, Vec<T>::size>());
  if constexpr (D > 1) transpose<T, D / 2>(r);
}

// Zeros at the start of a cache line: a vector across two lines costs two reads of the cache.
template <typename T>
class LaneBuffer {
 public:
  explicit LaneBuffer(int64_t size) : memory_(zeroed<T>(size + line)) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = memory_.get() + (64 - address % 64) % 64 / sizeof(T);
  }
  T* get() const { return data_; }

 private:
  static constexpr int64_t line = 64 / sizeof(T);
  Buffer<T> memory_;
  T* data_;
};

// `n` numbers of each of `count` images, `stride` apart, to n vectors; number i goes to vector place[i], or i without a
// table. Images that are missing in the vectors are zeros.
template <typename T>
void images_to_lanes(const T* from, int64_t stride, int64_t count, int64_t n, const int32_t* place, T* to) {
  using V = Vec<T>;
  constexpr int lanes = V::size;
  if (n < lanes) {
    for (int64_t i = 0; i < n; i++)
      for (int64_t l = 0; l < lanes; l++) to[(place ? place[i] : i) * lanes + l] = l < count ? from[l * stride + i] : T(0);
    return;
  }
  // The last square may overlap the one before.
  for (int64_t next = 0; next < n; next += lanes) {
    const int64_t i = std::min(next, n - lanes);
    V r[lanes];
#pragma GCC unroll 16
    for (int l = 0; l < lanes; l++) r[l] = l < count ? V::load(from + l * stride + i) : V::all(T(0));
    transpose<T>(r);
    if (place) {
#pragma GCC unroll 16
      for (int j = 0; j < lanes; j++) r[j].store(to + place[i + j] * lanes);
    } else {
#pragma GCC unroll 16
      for (int j = 0; j < lanes; j++) r[j].store(to + (i + j) * lanes);
    }
  }
}

template <typename T>
void lanes_to_images(const T* from, int64_t n, T* to, int64_t stride, int64_t count) {
  using V = Vec<T>;
  constexpr int lanes = V::size;
  if (n < lanes) {
    for (int64_t i = 0; i < n; i++)
      for (int64_t l = 0; l < count; l++) to[l * stride + i] = from[i * lanes + l];
    return;
  }
  for (int64_t next = 0; next < n; next += lanes) {
    const int64_t i = std::min(next, n - lanes);
    V r[lanes];
#pragma GCC unroll 16
    for (int j = 0; j < lanes; j++) r[j] = V::load(from + (i + j) * lanes);
    transpose<T>(r);
#pragma GCC unroll 16
    for (int l = 0; l < lanes; l++)
      if (l < count) r[l].store(to + l * stride + i);
  }
}

// `channels` in blocks of nearly equal size.
struct Blocks {
  int64_t channels, count;
  Blocks(int64_t channels, int64_t most) : channels(channels), count((channels + most - 1) / most) {}
  int64_t first(int64_t block) const { return block * channels / count; }
  int64_t size(int64_t block) const { return first(block + 1) - first(block); }
};

// Some neighbouring rows of a block of images, a lane per image, between margins of zeros. Row y is in slot y mod slots. A
// row is a row of pixels for each block of used channels (Blocks with `most`): what one block of sums reads lies together, for
// apart, at a distance of a power of two, it would not stay in the cache.
template <typename T>
class LaneRows {
 public:
  static constexpr int64_t lanes = Vec<T>::size;

  LaneRows(int64_t height, int64_t width, int64_t channels, int64_t used, int64_t left, int64_t right, int64_t slots,
           int64_t most)
      : height_(height), size_(width * channels), left_(left), pixels_(left + width + right), slots_(slots),
        pitch_((pixels_ * used + 1) * lanes), blocks_(used, most), data_(pitch_ * slots) {
    if (blocks_.count == 1 && used == channels) return;
    // What is not used goes to the vector behind the row.
    place_.assign(size_, (int32_t)(pixels_ * used));
    for (int64_t block = 0; block < blocks_.count; block++)
      for (int64_t x = 0; x < width; x++)
        for (int64_t c = 0; c < blocks_.size(block); c++)
          place_[x * channels + blocks_.first(block) + c] = (int32_t)(at(block, x) + c);
  }

  // Another block of `count` images.
  void start(const T* images, int64_t count) { images_ = images, count_ = count, next_ = 0; }

  // Makes sure of the rows up to and with `last`; those of the last `slots` rows are there then.
  void fetch(int64_t last) {
    last = std::min(last, height_ - 1);
    next_ = std::max(next_, last + 1 - slots_);
    for (; next_ <= last; next_++) {
      T* to = data_.get() + next_ % slots_ * pitch_;
      images_to_lanes(images_ + next_ * size_, height_ * size_, count_, size_, place_.empty() ? nullptr : place_.data(),
                      place_.empty() ? to + at(0, 0) * lanes : to);
    }
  }

  bool has(int64_t y) const { return y >= 0 && y < height_; }

  // Pixel x of row y, channels of a block; x may lie in the margins.
  const T* pixel(int64_t y, int64_t x, int64_t block = 0) const {
    return data_.get() + y % slots_ * pitch_ + at(block, x) * lanes;
  }

 private:
  int64_t at(int64_t block, int64_t x) const {
    return blocks_.first(block) * pixels_ + (left_ + x) * blocks_.size(block);
  }

  int64_t height_, size_, left_, pixels_, slots_, pitch_;
  Blocks blocks_;
  LaneBuffer<T> data_;
  std::vector<int32_t> place_;
  const T* images_ = nullptr;
  int64_t count_ = 0, next_ = 0;
};

// One tap of a row of outputs: where pixel 0 reads its input channels, and the weights (input channels x outputs).
template <typename T>
struct Tap {
  const T *x, *w;
};

// C outputs of P pixels; pixel p reads its inputs at p * x_step and is written at p * y_step (in vectors).
template <typename T, int C, int P>
void lane_block(const Tap<T>* taps, int64_t tap_count, int64_t channels, int64_t x_at, int64_t x_step, const T* bias, T* y,
                int64_t y_step) {
  using V = Vec<T>;
  constexpr int64_t lanes = V::size;
  V sum[C][P];
#pragma GCC unroll 8
  for (int c = 0; c < C; c++)
#pragma GCC unroll 12
    for (int p = 0; p < P; p++) sum[c][p] = V::all(bias ? bias[c] : T(0));
  for (int64_t t = 0; t < tap_count; t++) {
    const T* x = taps[t].x + x_at * lanes;
    const T* w = taps[t].w;
    for (int64_t i = 0; i < channels; i++, x += lanes, w += C) {
      V in[P];
#pragma GCC unroll 12
      for (int p = 0; p < P; p++) in[p] = V::load(x + p * x_step * lanes);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) {
        const V weight = V::all(w[c]);
#pragma GCC unroll 12
        for (int p = 0; p < P; p++) sum[c][p] = V::fma(weight, in[p], sum[c][p]);
      }
    }
  }
#pragma GCC unroll 12
  for (int p = 0; p < P; p++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) sum[c][p].store(y + (p * y_step + c) * lanes);
}

// Pixels computed together with C channels.
template <int C>
constexpr int kPixels = std::min(kSums / C, C < 4 ? 7 : 6);

template <typename T, int C, int P = kPixels<C>>
void lane_pixels(const Tap<T>* taps, int64_t tap_count, int64_t channels, int64_t pixels, int64_t x_step, const T* bias,
                 T* y, int64_t y_step, int64_t first = 0) {
  for (; first + P <= pixels; first += P)
    lane_block<T, C, P>(taps, tap_count, channels, first * x_step, x_step, bias, y + first * y_step * Vec<T>::size, y_step);
  if constexpr (P > 1)
    if (first < pixels) lane_pixels<T, C, P / 2>(taps, tap_count, channels, pixels, x_step, bias, y, y_step, first);
}

template <typename T, int C>
struct PixelsOf {
  static auto pick(int64_t channels) {
    if constexpr (C > 1) {
      if (channels < C) return PixelsOf<T, C - 1>::pick(channels);
    }
    return +[](const Tap<T>* taps, int64_t tap_count, int64_t inputs, int64_t pixels, int64_t x_step, const T* bias, T* y,
               int64_t y_step) { lane_pixels<T, C>(taps, tap_count, inputs, pixels, x_step, bias, y, y_step); };
  }
};

// Weights by block of outputs, then tap, input and output of the block; weight(tap, input, output) gives them.
template <typename T, typename Weight>
std::vector<T> pack(const Blocks& blocks, int64_t taps, int64_t inputs, Weight weight) {
  std::vector<T> packed;
  packed.reserve(blocks.channels * taps * inputs);
  for (int64_t block = 0; block < blocks.count; block++)
    for (int64_t tap = 0; tap < taps; tap++)
      for (int64_t i = 0; i < inputs; i++)
        for (int64_t o = blocks.first(block); o < blocks.first(block + 1); o++) packed.push_back(weight(tap, i, o));
  return packed;
}

template <typename T>
void image_conv(const ImageConv& s, const T* x, const T* w, const T* bias, T* y) {
  constexpr int64_t lanes = Vec<T>::size;
  const int64_t out_h = s.out_h(), out_w = s.out_w(), taps = s.kernel_h * s.kernel_w;
  const Blocks blocks(s.out_used, kBlock);
  const std::vector<T> packed = pack<T>(blocks, taps, s.in_used, [&](int64_t tap, int64_t i, int64_t o) {
    return w[(o * s.in_channels + i) * taps + tap];
  });
  LaneRows<T> rows(s.height, s.width, s.in_channels, s.in_used, s.pad_w, s.pad_w, s.kernel_h, s.in_used);
  const LaneBuffer<T> line(out_w * s.out_channels * lanes);
  std::vector<Tap<T>> used(taps);
  for (int64_t n = 0; n < s.batch; n += lanes) {
    const int64_t count = std::min(lanes, s.batch - n);
    rows.start(x + n * s.height * s.width * s.in_channels, count);
    for (int64_t oy = 0; oy < out_h; oy++) {
      const int64_t top = oy * s.stride_h - s.pad_h;
      rows.fetch(top + s.kernel_h - 1);
      for (int64_t block = 0; block < blocks.count; block++) {
        const int64_t from = blocks.first(block), channels = blocks.size(block);
        int64_t found = 0;
        for (int64_t tap = 0; tap < taps; tap++)
          if (rows.has(top + tap / s.kernel_w))
            used[found++] = {rows.pixel(top + tap / s.kernel_w, tap % s.kernel_w - s.pad_w),
                             packed.data() + (from * taps + tap * channels) * s.in_used};
        PixelsOf<T, kBlock>::pick(channels)(used.data(), found, s.in_used, out_w, s.stride_w * s.in_used,
                                            bias ? bias + from : nullptr, line.get() + from * lanes, s.out_channels);
      }
      lanes_to_images(line.get(), out_w * s.out_channels, y + (n * out_h + oy) * out_w * s.out_channels,
                      out_h * out_w * s.out_channels, count);
    }
  }
}

// An input pixel is read by the taps that lie a multiple of the stride before it: pixels of one phase (their column
// modulo the stride) share their taps, and are a convolution of their own.
template <typename T>
void image_conv_grad_input(const ImageConv& s, const T* w, const T* gy, T* gx) {
  constexpr int64_t lanes = Vec<T>::size;
  const int64_t out_h = s.out_h(), out_w = s.out_w(), taps = s.kernel_h * s.kernel_w;
  const Blocks blocks(s.in_used, kBlock);
  const std::vector<T> packed = pack<T>(blocks, taps, s.out_used, [&](int64_t tap, int64_t o, int64_t i) {
    return w[(o * s.in_channels + i) * taps + tap];
  });
  const int64_t left = (s.kernel_w - 1) / s.stride_w + 1;
  const int64_t right = std::max<int64_t>(0, (s.width - 1 + s.pad_w) / s.stride_w + 1 - out_w);
  LaneRows<T> rows(out_h, out_w, s.out_channels, s.out_used, left, right, (s.kernel_h - 1) / s.stride_h + 1, s.out_used);
  const LaneBuffer<T> line(s.width * s.in_channels * lanes);
  std::vector<Tap<T>> used(taps);
  for (int64_t n = 0; n < s.batch; n += lanes) {
    const int64_t count = std::min(lanes, s.batch - n);
    rows.start(gy + n * out_h * out_w * s.out_channels, count);
    for (int64_t iy = 0; iy < s.height; iy++) {
      rows.fetch((iy + s.pad_h) / s.stride_h);
      for (int64_t phase = 0; phase < std::min(s.stride_w, s.width); phase++) {
        for (int64_t block = 0; block < blocks.count; block++) {
          const int64_t from = blocks.first(block), channels = blocks.size(block);
          int64_t found = 0;
          for (int64_t tap = 0; tap < taps; tap++) {
            const int64_t down = iy + s.pad_h - tap / s.kernel_w, along = phase + s.pad_w - tap % s.kernel_w;
            if (down % s.stride_h || along % s.stride_w) continue;
            if (rows.has(down / s.stride_h) && down >= 0)
              used[found++] = {rows.pixel(down / s.stride_h, along / s.stride_w),
                               packed.data() + (from * taps + tap * channels) * s.out_used};
          }
          PixelsOf<T, kBlock>::pick(channels)(used.data(), found, s.out_used,
                                              (s.width - phase + s.stride_w - 1) / s.stride_w, s.out_used, nullptr,
                                              line.get() + (phase * s.in_channels + from) * lanes,
                                              s.stride_w * s.in_channels);
        }
      }
      lanes_to_images(line.get(), s.width * s.in_channels, gx + (n * s.height + iy) * s.width * s.in_channels,
                      s.height * s.width * s.in_channels, count);
    }
  }
}

// Least pixels, and most rows, whose weight gradient is added up before the sums leave the registers. More are fewer trips
// of the sums, until a block of channels of these pixels does not stay in the first-level cache.
constexpr int64_t kStripPixels = 32, kStripRows = 8;

// sums (O x I) += over rows and pixels of g (O neighbouring channels) times x (I neighbouring channels).
template <typename T, int O, int I>
void lane_products(const T* const* g, const T* const* x, int64_t rows, int64_t pixels, int64_t g_step, int64_t x_step,
                   T* sums, int64_t sums_step) {
  using V = Vec<T>;
  constexpr int64_t lanes = V::size;
  V sum[O][I];
#pragma GCC unroll 12
  for (int o = 0; o < O; o++)
#pragma GCC unroll 8
    for (int i = 0; i < I; i++) sum[o][i] = V::load(sums + (o * sums_step + i) * lanes);
  for (int64_t row = 0; row < rows; row++) {
    const T *a = g[row], *b = x[row];
    for (int64_t p = 0; p < pixels; p++, a += g_step * lanes, b += x_step * lanes) {
      V grad[O];
#pragma GCC unroll 12
      for (int o = 0; o < O; o++) grad[o] = V::load(a + o * lanes);
#pragma GCC unroll 8
      for (int i = 0; i < I; i++) {
        const V in = V::load(b + i * lanes);
#pragma GCC unroll 12
        for (int o = 0; o < O; o++) sum[o][i] = V::fma(grad[o], in, sum[o][i]);
      }
    }
  }
#pragma GCC unroll 12
  for (int o = 0; o < O; o++)
#pragma GCC unroll 8
    for (int i = 0; i < I; i++) sum[o][i].store(sums + (o * sums_step + i) * lanes);
}

template <typename T>
using Products = void (*)(const T* const*, const T* const*, int64_t, int64_t, int64_t, int64_t, T*, int64_t);

// Most output channels of a block with I input channels.
constexpr int64_t most_outputs(int64_t inputs) { return std::min<int64_t>(kSums / inputs, kBlock); }

template <typename T, int I, int O>
Products<T> pick_outputs(int64_t outputs) {
  if constexpr (O > 1) {
    if (outputs < O) return pick_outputs<T, I, O - 1>(outputs);
  }
  return &lane_products<T, O, I>;
}
template <typename T, int I = kBlock>
Products<T> pick_products(int64_t inputs, int64_t outputs) {
  if constexpr (I > 1) {
    if (inputs < I) return pick_products<T, I - 1>(inputs, outputs);
  }
  return pick_outputs<T, I, most_outputs(I)>(outputs);
}

// The sum of the lanes of each of n vectors, with room behind n for whole vectors.
template <typename T>
std::vector<T> fold_lanes(const T* sums, int64_t n) {
  using V = Vec<T>;
  constexpr int lanes = V::size;
  std::vector<T> totals((n + lanes - 1) / lanes * lanes);
  for (int64_t i = 0; i < n; i += lanes) {
    V r[lanes];
#pragma GCC unroll 16
    for (int j = 0; j < lanes; j++) r[j] = i + j < n ? V::load(sums + (i + j) * lanes) : V::all(T(0));
    transpose<T>(r);
    for (int half = lanes / 2; half; half /= 2)
#pragma GCC unroll 8
      for (int j = 0; j < half; j++) r[j] = V::add(r[j], r[j + half]);
    r[0].store(totals.data() + i);
  }
  return totals;
}

// gw is overwritten, and gbias unless it is null.
template <typename T>
void image_conv_grad_weight(const ImageConv& s, const T* x, const T* gy, T* gw, T* gbias) {
  using V = Vec<T>;
  constexpr int64_t lanes = V::size;
  const int64_t out_h = s.out_h(), out_w = s.out_w(), taps = s.kernel_h * s.kernel_w;
  const int64_t ins = s.in_used, outs = s.out_used;
  const int64_t strip = std::min((kStripPixels + out_w - 1) / out_w, kStripRows);
  const Blocks in_blocks(ins, kBlock), out_blocks(outs, most_outputs(in_blocks.size(in_blocks.count - 1)));
  LaneRows<T> rows(s.height, s.width, s.in_channels, ins, s.pad_w, s.pad_w, (strip - 1) * s.stride_h + s.kernel_h, kBlock);
  LaneRows<T> grads(out_h, out_w, s.out_channels, outs, 0, 0, strip, out_blocks.size(out_blocks.count - 1));
  // tap x out x in
  const LaneBuffer<T> sums(taps * outs * ins * lanes), bias_sums(outs * lanes);
  const T *g[kStripRows], *from[kStripRows];
  for (int64_t n = 0; n < s.batch; n += lanes) {
    const int64_t count = std::min(lanes, s.batch - n);
    rows.start(x + n * s.height * s.width * s.in_channels, count);
    grads.start(gy + n * out_h * out_w * s.out_channels, count);
    for (int64_t first = 0; first < out_h; first += strip) {
      const int64_t last = std::min(first + strip, out_h) - 1;
      grads.fetch(last);
      rows.fetch(last * s.stride_h - s.pad_h + s.kernel_h - 1);
      for (int64_t ky = 0; ky < s.kernel_h; ky++)
        for (int64_t i = 0; i < in_blocks.count; i++)
          for (int64_t o = 0; o < out_blocks.count; o++)
            for (int64_t kx = 0; kx < s.kernel_w; kx++) {
              int64_t found = 0;
              for (int64_t oy = first; oy <= last; oy++)
                if (const int64_t y = oy * s.stride_h - s.pad_h + ky; rows.has(y)) {
                  from[found] = rows.pixel(y, kx - s.pad_w, i);
                  g[found++] = grads.pixel(oy, 0, o);
                }
              const int64_t tap = ky * s.kernel_w + kx, in_count = in_blocks.size(i), out_count = out_blocks.size(o);
              T* to = sums.get() + ((tap * outs + out_blocks.first(o)) * ins + in_blocks.first(i)) * lanes;
              pick_products<T>(in_count, out_count)(g, from, found, out_w, out_count, s.stride_w * in_count, to, ins);
            }
      for (int64_t o = 0; gbias && o < out_blocks.count; o++)
        for (int64_t oy = first; oy <= last; oy++)
          for (int64_t i = 0; i < out_w; i++)
            for (int64_t c = 0; c < out_blocks.size(o); c++) {
              T* sum = bias_sums.get() + (out_blocks.first(o) + c) * lanes;
              V::add(V::load(sum), V::load(grads.pixel(oy, i, o) + c * lanes)).store(sum);
            }
    }
  }
  const std::vector<T> weights = fold_lanes(sums.get(), taps * outs * ins), biases = fold_lanes(bias_sums.get(), outs);
  std::fill_n(gw, s.out_channels * s.in_channels * taps, T(0));
  if (gbias) std::fill_n(std::copy_n(biases.data(), outs, gbias), s.out_channels - outs, T(0));
  for (int64_t o = 0; o < outs; o++)
    for (int64_t i = 0; i < ins; i++)
      for (int64_t tap = 0; tap < taps; tap++)
        gw[(o * s.in_channels + i) * taps + tap] = weights[(tap * outs + o) * ins + i];
}
