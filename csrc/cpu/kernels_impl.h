// The kernels as templates over Vec and Row (simd.h). Included by each isa_*.cpp inside its own namespace, so that one
// instruction set's code is never merged with another's by the linker.

// ---- conv + ReLU + max-pool ---------------------------------------------------------------------------------------
//
// Forward. The padded image is split by (row mod pool, column mod pool) into pool^2 planes. In a plane the inputs of
// neighbouring pool windows are neighbours in memory, so one vector lane is one pool window: the pool^2 convolution
// outputs of a window are pool^2 accumulators in the same lane, and max-pooling needs no shuffle. Lanes run across row
// ends (a few columns per row are computed for nothing), which keeps vectors full on 12-wide maps. For every kernel tap
// there are pool^2 loads and `channels` broadcasts for channels * pool^2 multiply-adds.
//
// Backward to the weight visits pool winners only: 1 / pool^2 of the work, less what ReLU blocks.

template <typename T>
using Buffer = std::unique_ptr<T[]>;

template <typename T>
Buffer<T> zeroed(int64_t size) {
  return Buffer<T>(new T[size]());
}

// Channels computed together: as many as leave the accumulators, the weights and one input in registers.
template <int P>
constexpr int max_channels() {
#if defined(SPAFL_ISA_AVX512)
  return P == 2 ? 6 : 3;
#elif defined(SPAFL_ISA_AVX2)
  return P == 2 ? 3 : 1;
#else
  return P == 2 ? 2 : 1;
#endif
}

template <int P>
struct Planes {
  int64_t rows, pitch, size, count;  // size: elements of one plane

  explicit Planes(const ConvShape& s)
      : rows(s.pooled_h() + (P + s.kernel_h - 2) / P),
        pitch(s.pooled_w() + (P + s.kernel_w - 2) / P),
        size(rows * pitch),
        count(s.in_channels * P * P) {}

  template <typename T>
  void fill(const ConvShape& s, const T* image, T* planes) const {
    for (int64_t channel = 0; channel < s.in_channels; channel++) {
      for (int64_t a = 0; a < P; a++) {
        for (int64_t b = 0; b < P; b++) {
          // Columns c with a source: 0 <= P c + b - pad_w < width.
          const int64_t first = b >= s.pad_w ? 0 : (s.pad_w - b + P - 1) / P;
          const int64_t past = s.width + s.pad_w - b;
          const int64_t last = std::max(first, std::min(pitch, past <= 0 ? 0 : (past + P - 1) / P));
          for (int64_t r = 0; r < rows; r++) {
            T* to = planes + ((channel * P + a) * P + b) * size + r * pitch;
            const int64_t y = P * r + a - s.pad_h;
            if (y < 0 || y >= s.height || first >= last) {
              std::fill(to, to + pitch, T(0));
              continue;
            }
            const T* from = image + (channel * s.height + y) * s.width + b - s.pad_w;
            std::fill(to, to + first, T(0));
            for (int64_t c = first; c < last; c++) to[c] = from[P * c];
            std::fill(to + last, to + pitch, T(0));
          }
        }
      }
    }
  }

  // Where window position k reads its input for a tap, relative to the window's place in plane 0.
  int32_t offset(int64_t channel, int64_t ky, int64_t kx, int64_t k) const {
    const int64_t y = k / P + ky, x = k % P + kx;
    return (int32_t)(((channel * P + y % P) * P + x % P) * size + y / P * pitch + x / P);
  }
};

// `count` vectors of pool windows, C channels. Vector i reads its inputs from input + starts[i] + offsets, and writes to
// i * V::size in each of C rows of `stride` values and codes.
template <typename T, int P, int C>
void conv_block(const T* input, const int32_t* starts, const int32_t* offsets, int64_t taps, const T* weight,
                const T* bias, int64_t count, int64_t stride, T* values, uint8_t* codes) {
  using V = Vec<T>;
  constexpr int windows = P * P;
  for (int64_t i = 0; i < count; i++) {
    V sum[C][windows];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++)
#pragma GCC unroll 9
      for (int k = 0; k < windows; k++) sum[c][k] = V::all(bias[c]);
    const T* base = input + starts[i];
    for (int64_t tap = 0; tap < taps; tap++) {
      V w[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) w[c] = V::all(weight[tap * C + c]);
#pragma GCC unroll 9
      for (int k = 0; k < windows; k++) {
        const V x = V::load(base + offsets[tap * windows + k]);
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) sum[c][k] = V::fma(w[c], x, sum[c][k]);
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      V best = sum[c][0];
      auto code = V::codes(0);
#pragma GCC unroll 9
      for (int k = 1; k < windows; k++) {
        const auto better = V::replaces(sum[c][k], best);
        best = V::select(better, sum[c][k], best);
        code = V::select(better, V::codes(k), code);
      }
      const auto alive = V::positive(best);
      V::zero_unless(alive, best).store(values + c * stride + i * V::size);
      V::store(V::select(alive, code, V::codes(kBlocked)), codes + c * stride + i * V::size);
    }
  }
}

template <typename T, int P, int C>
struct BlockOf {
  static auto pick(int channels) {
    if constexpr (C > 1) {
      if (channels < C) return BlockOf<T, P, C - 1>::pick(channels);
    }
    return &conv_block<T, P, C>;
  }
};

// Filters in blocks of nearly equal size (20 are 5+5+5+5, not 6+6+6+2), packed tap by tap.
template <typename T, int P>
struct Filters {
  static constexpr int most = max_channels<P>();
  int64_t taps, blocks, filters;
  std::vector<T> weight, bias;

  Filters(const ConvShape& s, const T* w, const T* b)
      : taps(s.in_channels * s.kernel_h * s.kernel_w),
        blocks((s.out_channels + most - 1) / most),
        filters(s.out_channels),
        weight(filters * taps),
        bias(filters) {
    if (b) std::copy_n(b, filters, bias.data());
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t from = first(block), count = first(block + 1) - from;
      for (int64_t tap = 0; tap < taps; tap++)
        for (int64_t c = 0; c < count; c++) weight[from * taps + tap * count + c] = w[(from + c) * taps + tap];
    }
  }

  int64_t first(int64_t block) const { return block * filters / blocks; }

  // Computes `count` vectors of windows for every filter; calls done(first filter, filters, values, codes).
  template <typename Done>
  void run(const T* input, const std::vector<int32_t>& starts, const std::vector<int32_t>& offsets, int64_t stride,
           T* values, uint8_t* codes, Done done) const {
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t from = first(block), channels = first(block + 1) - from;
      BlockOf<T, P, most>::pick((int)channels)(input, starts.data(), offsets.data(), taps, weight.data() + from * taps,
                                               bias.data() + from, (int64_t)starts.size(), stride, values, codes);
      done(from, channels);
    }
  }
};

// offset(channel, ky, kx, window) for every tap and window.
template <int P, typename Offset>
std::vector<int32_t> tap_offsets(const ConvShape& s, Offset offset) {
  std::vector<int32_t> offsets;
  offsets.reserve(s.in_channels * s.kernel_h * s.kernel_w * P * P);
  for (int64_t channel = 0; channel < s.in_channels; channel++)
    for (int64_t ky = 0; ky < s.kernel_h; ky++)
      for (int64_t kx = 0; kx < s.kernel_w; kx++)
        for (int64_t k = 0; k < P * P; k++) offsets.push_back((int32_t)offset(channel, ky, kx, k));
  return offsets;
}

// Images [first, batch), a lane per window.
template <typename T, int P>
void forward_by_windows(const ConvShape& s, const Filters<T, P>& filters, int64_t first, const T* x, T* y, uint8_t* argmax) {
  constexpr int lanes = Vec<T>::size;
  const Planes<P> planes(s);
  const int64_t pooled_h = s.pooled_h(), pooled_w = s.pooled_w(), pooled = pooled_h * pooled_w;
  const int64_t count = (pooled_h - 1) * planes.pitch + pooled_w, stride = (count + lanes - 1) / lanes * lanes;
  const auto offsets = tap_offsets<P>(s, [&](auto... at) { return planes.offset(at...); });
  std::vector<int32_t> starts(stride / lanes);
  for (size_t i = 0; i < starts.size(); i++) starts[i] = (int32_t)(i * lanes);
  // Vectors may read past the last plane by less than one vector.
  const Buffer<T> image = zeroed<T>(planes.count * planes.size + stride - count + lanes);
  const int64_t outputs = s.batch * s.out_channels * pooled, padded_w = (pooled_w + lanes - 1) / lanes * lanes;
  std::vector<T> values(filters.most * stride + padded_w);
  std::vector<uint8_t> codes(filters.most * stride + padded_w);

  for (int64_t n = first; n < s.batch; n++) {
    planes.fill(s, x + n * s.in_channels * s.height * s.width, image.get());
    filters.run(image.get(), starts, offsets, stride, values.data(), codes.data(), [&](int64_t from, int64_t channels) {
      for (int64_t c = 0; c < channels; c++) {
        for (int64_t row = 0; row < pooled_h; row++) {
          const int64_t at = c * stride + row * planes.pitch, to = (n * s.out_channels + from + c) * pooled + row * pooled_w;
          // Whole vectors, as the next row overwrites what is too much; but not past the end of the output.
          if (to + padded_w <= outputs) {
            for (int64_t i = 0; i < padded_w; i += lanes) {
              Vec<T>::load(values.data() + at + i).store(y + to + i);
              std::memcpy(argmax + to + i, codes.data() + at + i, lanes);
            }
          } else {
            std::copy_n(values.data() + at, pooled_w, y + to);
            std::copy_n(codes.data() + at, pooled_w, argmax + to);
          }
        }
      }
    });
  }
}

// Images [0, returned count), whole vectors of them, a lane per image: no lane is wasted on narrow maps, for the price
// of transposing inputs and outputs.
template <typename T, int P>
int64_t forward_by_images(const ConvShape& s, const Filters<T, P>& filters, const T* x, T* y, uint8_t* argmax) {
  constexpr int lanes = Vec<T>::size;
  const int64_t pitch = s.width + 2 * s.pad_w, channel_size = (s.height + 2 * s.pad_h) * pitch;
  const int64_t image = s.in_channels * s.height * s.width, pooled = s.pooled_h() * s.pooled_w();
  const auto offsets = tap_offsets<P>(s, [&](int64_t channel, int64_t ky, int64_t kx, int64_t k) {
    return (channel * channel_size + (ky + k / P) * pitch + kx + k % P) * lanes;
  });
  std::vector<int32_t> starts(pooled), image_at(lanes);
  for (int64_t i = 0; i < pooled; i++)
    starts[i] = (int32_t)((i / s.pooled_w() * P * pitch + i % s.pooled_w() * P) * lanes);
  for (int l = 0; l < lanes; l++) image_at[l] = (int32_t)(l * image);
  const int64_t stride = pooled * lanes;
  const Buffer<T> input = zeroed<T>(s.in_channels * channel_size * lanes);
  std::vector<T> values(filters.most * stride);
  std::vector<uint8_t> codes(filters.most * stride);

  int64_t n = 0;
  for (; n + lanes <= s.batch; n += lanes) {
    for (int64_t channel = 0; channel < s.in_channels; channel++)
      for (int64_t row = 0; row < s.height; row++) {
        const T* from = x + n * image + (channel * s.height + row) * s.width;
        T* to = input.get() + (channel * channel_size + (row + s.pad_h) * pitch + s.pad_w) * lanes;
        for (int64_t i = 0; i < s.width; i++) Vec<T>::gather(from + i, image_at.data()).store(to + i * lanes);
      }
    filters.run(input.get(), starts, offsets, stride, values.data(), codes.data(), [&](int64_t from, int64_t channels) {
      for (int64_t c = 0; c < channels; c++)
        for (int64_t l = 0; l < lanes; l++) {
          const int64_t to = ((n + l) * s.out_channels + from + c) * pooled;
          for (int64_t i = 0; i < pooled; i++) y[to + i] = values[c * stride + i * lanes + l];
          for (int64_t i = 0; i < pooled; i++) argmax[to + i] = codes[c * stride + i * lanes + l];
        }
    });
  }
  return n;
}

template <typename T, int P>
void conv_relu_pool_forward(const ConvShape& s, const T* x, const T* w, const T* bias, T* y, uint8_t* argmax) {
  constexpr int64_t lanes = Vec<T>::size;
  const Filters<T, P> filters(s, w, bias);
  const Planes<P> planes(s);
  const int64_t used = s.pooled_h() * s.pooled_w(), count = (s.pooled_h() - 1) * planes.pitch + s.pooled_w();
  // Lanes that hold a window, of those computed; and gather indices are 32-bit.
  const bool narrow = used * 10 < (count + lanes - 1) / lanes * lanes * 7;
  const bool small = s.in_channels * s.height * s.width * lanes < (int64_t)1 << 30;
  const int64_t done = narrow && small ? forward_by_images<T, P>(s, filters, x, y, argmax) : 0;
  if (done < s.batch) forward_by_windows<T, P>(s, filters, done, x, y, argmax);
}

template <typename T>
void conv_relu_pool(const ConvShape& s, const T* x, const T* w, const T* bias, T* y, uint8_t* argmax) {
  if (s.pool == 2)
    conv_relu_pool_forward<T, 2>(s, x, w, bias, y, argmax);
  else
    conv_relu_pool_forward<T, 3>(s, x, w, bias, y, argmax);
}

// The surviving winners of one channel of one image: where their patch starts in the padded image, and their gradient.
template <typename T>
struct Winners {
  static constexpr int64_t slack = 16;  // whole vectors may be written behind the last winner
  int64_t pooled, windows;
  std::vector<int32_t> corner;  // of each pool window
  int32_t shift[256];           // by argmax
  std::vector<int32_t> patch;
  std::vector<T> grad;

  Winners(const ConvShape& s, int64_t pitch)
      : pooled(s.pooled_h() * s.pooled_w()),
        windows(s.pool * s.pool),
        corner(pooled),
        shift{},
        patch(pooled + slack),
        grad(pooled + slack) {
    for (int64_t i = 0; i < pooled; i++)
      corner[i] = (int32_t)(i / s.pooled_w() * s.pool * pitch + i % s.pooled_w() * s.pool);
    for (int64_t k = 0; k < windows; k++) shift[k] = (int32_t)(k / s.pool * pitch + k % s.pool);
  }

  int64_t collect(const T* gy, const uint8_t* argmax) {
    int64_t found = 0, i = 0;
#if defined(SPAFL_ISA_AVX512)
    if constexpr (std::is_same_v<T, float>) {
      const __m512i shifts = _mm512_loadu_si512(shift);
      for (; i + 16 <= pooled; i += 16) {
        const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(argmax + i)));
        const __mmask16 alive = _mm512_cmplt_epi32_mask(code, _mm512_set1_epi32((int)windows));
        const __m512i at = _mm512_add_epi32(_mm512_loadu_si512(corner.data() + i), _mm512_permutexvar_epi32(code, shifts));
        // Compressed in a register and stored whole: storing under a mask is microcode on Zen 4.
        _mm512_storeu_si512(patch.data() + found, _mm512_maskz_compress_epi32(alive, at));
        _mm512_storeu_ps(grad.data() + found, _mm512_maskz_compress_ps(alive, _mm512_loadu_ps(gy + i)));
        found += __builtin_popcount(alive);
      }
    }
#endif
    // Always written, kept only by the count: no branch to mispredict.
    for (; i < pooled; i++) {
      patch[found] = corner[i] + shift[argmax[i]];
      grad[found] = gy[i];
      found += argmax[i] < windows;
    }
    return found;
  }
};

// sums[r][:] += sum over winners of grad * image[patch + r * pitch :], for R kernel rows of V vectors each.
template <typename T, int R, int V>
void gather_rows(const T* image, int64_t pitch, const int32_t* patch, const T* grad, int64_t count, T* sums) {
  using W = Row<T>;
  constexpr int ways = 2;  // independent sums, to hide the latency of the multiply-add
  W sum[ways][R][V];
#pragma GCC unroll 2
  for (int u = 0; u < ways; u++)
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 6
      for (int v = 0; v < V; v++) sum[u][r][v] = W::all(T(0));
  int64_t i = 0;
  for (; i + ways <= count; i += ways) {
#pragma GCC unroll 2
    for (int u = 0; u < ways; u++) {
      const W g = W::all(grad[i + u]);
      const T* from = image + patch[i + u];
#pragma GCC unroll 6
      for (int r = 0; r < R; r++)
#pragma GCC unroll 6
        for (int v = 0; v < V; v++)
          sum[u][r][v] = W::fma(g, W::load(from + r * pitch + v * W::size), sum[u][r][v]);
    }
  }
  if (i < count) {
    const W g = W::all(grad[i]);
    const T* from = image + patch[i];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 6
      for (int v = 0; v < V; v++) sum[0][r][v] = W::fma(g, W::load(from + r * pitch + v * W::size), sum[0][r][v]);
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 6
    for (int v = 0; v < V; v++) {
      T* to = sums + (r * V + v) * W::size;
      W::add(W::load(to), W::add(sum[0][r][v], sum[1][r][v])).store(to);
    }
}

template <typename T, int V>
void gather_kernel_rows(const T* image, int64_t pitch, int64_t kernel_h, const int32_t* patch, const T* grad,
                        int64_t count, T* sums) {
  constexpr int most = 6 / V;
  for (int64_t row = 0; row < kernel_h;) {
    const int64_t rows = std::min<int64_t>(most, kernel_h - row);
    const T* from = image + row * pitch;
    T* to = sums + row * V * Row<T>::size;
    switch (rows) {
      case 1: gather_rows<T, 1, V>(from, pitch, patch, grad, count, to); break;
      case 2: if constexpr (most >= 2) gather_rows<T, 2, V>(from, pitch, patch, grad, count, to); break;
      case 3: if constexpr (most >= 3) gather_rows<T, 3, V>(from, pitch, patch, grad, count, to); break;
      case 4: if constexpr (most >= 4) gather_rows<T, 4, V>(from, pitch, patch, grad, count, to); break;
      case 5: if constexpr (most >= 5) gather_rows<T, 5, V>(from, pitch, patch, grad, count, to); break;
      case 6: if constexpr (most >= 6) gather_rows<T, 6, V>(from, pitch, patch, grad, count, to); break;
    }
    row += rows;
  }
}

template <typename T>
void conv_relu_pool_grad_weight(const ConvShape& s, const T* x, const T* gy, const uint8_t* argmax, T* gw, T* gbias) {
  const int64_t padded_h = s.height + 2 * s.pad_h, pitch = s.width + 2 * s.pad_w, channel_size = padded_h * pitch;
  const int64_t vectors = (s.kernel_w + Row<T>::size - 1) / Row<T>::size, row_size = vectors * Row<T>::size;
  const int64_t sums_size = s.in_channels * s.kernel_h * row_size;
  // A row of lanes may read past the last kernel column; those lanes are thrown away.
  const Buffer<T> image = zeroed<T>(s.in_channels * channel_size + row_size);
  const Buffer<T> sums = zeroed<T>(s.out_channels * sums_size);
  if (gbias) std::fill(gbias, gbias + s.out_channels, T(0));
  Winners<T> winners(s, pitch);
  using Gather = void (*)(const T*, int64_t, int64_t, const int32_t*, const T*, int64_t, T*);
  const Gather all[] = {gather_kernel_rows<T, 1>, gather_kernel_rows<T, 2>, gather_kernel_rows<T, 3>,
                        gather_kernel_rows<T, 4>, gather_kernel_rows<T, 5>, gather_kernel_rows<T, 6>};
  const Gather gather = all[vectors - 1];  // kernels are at most 11 wide: 6 vectors of 2

  for (int64_t n = 0; n < s.batch; n++) {
    for (int64_t channel = 0; channel < s.in_channels; channel++)
      for (int64_t row = 0; row < s.height; row++)
        std::copy_n(x + ((n * s.in_channels + channel) * s.height + row) * s.width, s.width,
                    image.get() + channel * channel_size + (row + s.pad_h) * pitch + s.pad_w);
    for (int64_t c = 0; c < s.out_channels; c++) {
      const int64_t at = (n * s.out_channels + c) * winners.pooled;
      const int64_t count = winners.collect(gy + at, argmax + at);
      if (gbias) {
        T total = 0;
        for (int64_t i = 0; i < count; i++) total += winners.grad[i];
        gbias[c] += total;
      }
      for (int64_t channel = 0; channel < s.in_channels; channel++)
        gather(image.get() + channel * channel_size, pitch, s.kernel_h, winners.patch.data(), winners.grad.data(), count,
               sums.get() + c * sums_size + channel * s.kernel_h * row_size);
    }
  }
  for (int64_t row = 0; row < s.out_channels * s.in_channels * s.kernel_h; row++)
    std::copy_n(sums.get() + row * row_size, s.kernel_w, gw + row * s.kernel_w);
}

// The winners of one image, sorted by their place: adding up what all channels send to one patch before the patch is
// touched replaces a read and write of every kernel row per winner by a multiply-add on registers.
template <typename T>
void conv_relu_pool_grad_input(const ConvShape& s, const T* w, const T* gy, const uint8_t* argmax, T* gx) {
  using V = Vec<T>;
  using W = Row<T>;
  constexpr int group = 4;  // vectors of taps summed together
  constexpr int64_t group_size = group * V::size;
  const int64_t padded_h = s.height + 2 * s.pad_h, pitch = s.width + 2 * s.pad_w, channel_size = padded_h * pitch;
  const int64_t rows = s.in_channels * s.kernel_h, taps = rows * s.kernel_w;
  const int64_t taps_size = (taps + group_size - 1) / group_size * group_size;
  const int64_t row_size = (s.kernel_w + W::size - 1) / W::size * W::size;
  const Buffer<T> image = zeroed<T>(s.in_channels * channel_size + row_size);
  std::vector<T> kernel(s.out_channels * taps_size), sums(taps_size + row_size), lane(row_size);
  for (int64_t c = 0; c < s.out_channels; c++) std::copy_n(w + c * taps, taps, kernel.data() + c * taps_size);
  std::fill_n(lane.data(), s.kernel_w, T(1));
  std::vector<int32_t> row_at(rows);
  for (int64_t row = 0; row < rows; row++)
    row_at[row] = (int32_t)(row / s.kernel_h * channel_size + row % s.kernel_h * pitch);

  Winners<T> winners(s, pitch);
  struct Winner {
    const T* kernel;
    T grad;
  };
  // Counting sort: places are offsets in one channel of the padded image.
  std::vector<int32_t> places(s.out_channels * winners.pooled), ends(channel_size + 1);
  std::vector<Winner> unsorted(places.size()), sorted(places.size());
  for (int64_t n = 0; n < s.batch; n++) {
    std::fill_n(image.get(), s.in_channels * channel_size, T(0));
    std::fill(ends.begin(), ends.end(), 0);
    int64_t total = 0;
    for (int64_t c = 0; c < s.out_channels; c++) {
      const int64_t at = (n * s.out_channels + c) * winners.pooled;
      const int64_t count = winners.collect(gy + at, argmax + at);
      for (int64_t i = 0; i < count; i++, total++) {
        places[total] = winners.patch[i];
        unsorted[total] = {kernel.data() + c * taps_size, winners.grad[i]};
        ends[winners.patch[i] + 1]++;
      }
    }
    for (int64_t place = 0; place < channel_size; place++) ends[place + 1] += ends[place];
    // Afterwards ends[place] is where the winners of place end.
    for (int64_t i = 0; i < total; i++) sorted[ends[places[i]]++] = unsorted[i];

    for (int64_t place = 0, i = 0; i < total; place++) {
      const int64_t end = ends[place];
      if (i == end) continue;
      for (int64_t tap = 0; tap < taps; tap += group_size) {
        V sum[group];
#pragma GCC unroll 4
        for (int k = 0; k < group; k++) sum[k] = V::all(T(0));
        for (int64_t j = i; j < end; j++) {
          const V g = V::all(sorted[j].grad);
          const T* from = sorted[j].kernel + tap;
#pragma GCC unroll 4
          for (int k = 0; k < group; k++) sum[k] = V::fma(g, V::load(from + k * V::size), sum[k]);
        }
#pragma GCC unroll 4
        for (int k = 0; k < group; k++) sum[k].store(sums.data() + tap + k * V::size);
      }
      for (int64_t v = 0; v < row_size; v += W::size) {
        const W real = W::load(lane.data() + v);
        for (int64_t row = 0; row < rows; row++) {
          T* to = image.get() + place + row_at[row] + v;
          const W old = W::load(to);
          // Lanes past the kernel hold the next row's taps.
          W::pick(real, W::add(old, W::load(sums.data() + row * s.kernel_w + v)), old).store(to);
        }
      }
      i = end;
    }
    for (int64_t channel = 0; channel < s.in_channels; channel++)
      for (int64_t row = 0; row < s.height; row++)
        std::copy_n(image.get() + channel * channel_size + (row + s.pad_h) * pitch + s.pad_w, s.width,
                    gx + ((n * s.in_channels + channel) * s.height + row) * s.width);
  }
}

// ---- ReLU + max-pool ----------------------------------------------------------------------------------------------

// Where the windows of one plane start. Padded to whole vectors with the last window.
inline std::vector<int32_t> window_corners(int64_t height, int64_t width, int64_t pool, int64_t lanes) {
  const int64_t pooled_w = width / pool, count = height / pool * pooled_w;
  std::vector<int32_t> corners((count + lanes - 1) / lanes * lanes);
  for (int64_t i = 0; i < (int64_t)corners.size(); i++) {
    const int64_t window = std::min(i, count - 1);
    corners[i] = (int32_t)(window / pooled_w * pool * width + window % pooled_w * pool);
  }
  return corners;
}

// One vector lane per window; comparing in scalar code mispredicts on every other window.
template <typename T, int P>
void relu_pool_forward(int64_t planes, int64_t height, int64_t width, const T* x, T* y, uint8_t* argmax) {
  using V = Vec<T>;
  const int64_t count = height / P * (width / P);
  const std::vector<int32_t> corners = window_corners(height, width, P, V::size);
  for (int64_t plane = 0; plane < planes; plane++) {
    const T* from = x + plane * height * width;
    T* to = y + plane * count;
    uint8_t* code_to = argmax + plane * count;
    for (int64_t i = 0; i < count; i += V::size) {
      V best = V::gather(from, corners.data() + i);
      auto code = V::codes(0);
#pragma GCC unroll 9
      for (int k = 1; k < P * P; k++) {
        const V candidate = V::gather(from + k / P * width + k % P, corners.data() + i);
        const auto better = V::replaces(candidate, best);
        best = V::select(better, candidate, best);
        code = V::select(better, V::codes(k), code);
      }
      const auto alive = V::positive(best);
      best = V::zero_unless(alive, best), code = V::select(alive, code, V::codes(kBlocked));
      if (i + V::size <= count) {
        best.store(to + i);
        V::store(code, code_to + i);
      } else {
        T rest[V::size];
        uint8_t rest_code[V::size];
        best.store(rest);
        V::store(code, rest_code);
        std::copy_n(rest, count - i, to + i);
        std::copy_n(rest_code, count - i, code_to + i);
      }
    }
  }
}

template <typename T>
void relu_pool(int64_t planes, int64_t height, int64_t width, int64_t pool, const T* x, T* y, uint8_t* argmax) {
  (pool == 2 ? relu_pool_forward<T, 2> : relu_pool_forward<T, 3>)(planes, height, width, x, y, argmax);
}

template <typename T>
void relu_pool_grad(int64_t planes, int64_t height, int64_t width, int64_t pool, const T* gy, const uint8_t* argmax,
                    T* gx) {
  const int64_t count = height / pool * (width / pool);
  const std::vector<int32_t> corners = window_corners(height, width, pool, 1);
  int32_t shift[256] = {};
  for (int64_t k = 0; k < pool * pool; k++) shift[k] = (int32_t)(k / pool * width + k % pool);
  for (int64_t plane = 0; plane < planes; plane++) {
    T* to = gx + plane * height * width;
    const T* from = gy + plane * count;
    const uint8_t* code = argmax + plane * count;
    std::fill_n(to, height * width, T(0));
    for (int64_t i = 0; i < count; i++) to[corners[i] + shift[code[i]]] = code[i] == kBlocked ? T(0) : from[i];
  }
}

// ---- sums with one result on every machine ------------------------------------------------------------------------

enum class Sum { plain, abs, square, product };

// Sum over n numbers of a, |a|, a * a or a * b: 32 partial sums whatever the vector length, folded in a fixed order, and
// carried in double every 2048 numbers. The bits do not depend on the instruction set.
template <Sum kind, typename T>
double steady_sum(const T* a, int64_t n, const T* b = nullptr) {
  using V = Vec<T>;
  constexpr int width = 32, parts = width / V::size;
  constexpr int64_t block = 64 * width;
  double total = 0;
  for (int64_t start = 0; start < n; start += block) {
    const int64_t end = std::min(n, start + block), whole = start + (end - start) / width * width;
    V sum[parts];
#pragma GCC unroll 16
    for (int k = 0; k < parts; k++) sum[k] = V::all(T(0));
    for (int64_t i = start; i < whole; i += width)
#pragma GCC unroll 16
      for (int k = 0; k < parts; k++) {
        const V x = V::load(a + i + k * V::size);
        if constexpr (kind == Sum::plain) sum[k] = V::add(sum[k], x);
        if constexpr (kind == Sum::abs) sum[k] = V::add(sum[k], V::abs(x));
        if constexpr (kind == Sum::square) sum[k] = V::add(sum[k], V::mul(x, x));
        if constexpr (kind == Sum::product) sum[k] = V::add(sum[k], V::mul(x, V::load(b + i + k * V::size)));
      }
    T lane[width];
#pragma GCC unroll 16
    for (int k = 0; k < parts; k++) sum[k].store(lane + k * V::size);
    for (int64_t i = whole; i < end; i++) {
      if constexpr (kind == Sum::plain) lane[i - whole] += a[i];
      if constexpr (kind == Sum::abs) lane[i - whole] += std::fabs(a[i]);
      if constexpr (kind == Sum::square) lane[i - whole] += a[i] * a[i];
      if constexpr (kind == Sum::product) lane[i - whole] += a[i] * b[i];
    }
    for (int half = width / 2; half; half /= 2)
      for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    total += lane[0];
  }
  return total;
}

// ---- threshold pass -----------------------------------------------------------------------------------------------

template <typename T>
int64_t threshold_rows(const ThresholdRows<T>& layer) {
  int64_t changed = 0;
  for (int64_t row = 0; row < layer.rows; row++) {
    double sum = steady_sum<Sum::abs>(layer.weight + row * layer.columns, layer.columns);
    if (layer.rest) sum += layer.rest[row];
    const T score = (T)(sum / (double)layer.n_in);
    const uint8_t mask = score > layer.threshold[row];
    layer.score[row] = score;
    changed += mask != layer.mask[row];
    layer.mask[row] = mask;
  }
  return changed;
}

// ---- the step -----------------------------------------------------------------------------------------------------

template <typename T>
T sign(T x) {
  return (T)((x > 0) - (x < 0));
}

// torch.optim.SGD on n numbers; gradient(i, p[i]) is the gradient of the i-th.
template <typename T, typename Gradient>
inline void update(T* __restrict__ p, T* __restrict__ m, int64_t n, const StepOptions& options, Gradient gradient) {
  const T lr = (T)options.lr, momentum = (T)options.momentum, decay = (T)options.weight_decay;
  // With decay 0 the term is left out, not multiplied: an infinite weight must not become NaN.
  if (m && decay != 0)
    for (int64_t i = 0; i < n; i++) m[i] = momentum * m[i] + (gradient(i, p[i]) + decay * p[i]), p[i] -= lr * m[i];
  else if (m)
    for (int64_t i = 0; i < n; i++) m[i] = momentum * m[i] + gradient(i, p[i]), p[i] -= lr * m[i];
  else if (decay != 0)
    for (int64_t i = 0; i < n; i++) p[i] -= lr * (gradient(i, p[i]) + decay * p[i]);
  else
    for (int64_t i = 0; i < n; i++) p[i] -= lr * gradient(i, p[i]);
}

// The gradient of the penalty c * sum exp(-tau) with regard to one threshold.
template <typename T>
inline T penalty_gradient(double coefficient, T tau) {
  return -(T)coefficient * std::exp(-tau);
}

// What the gradients of one layer need beyond backward: by row, the sign term's coefficient; by filter, the gradient of
// the threshold. Adds the sign term to the gradients given. Returns the squared norm of everything, if it is asked for.
template <typename T>
double complete_gradients(const StepLayer<T>& layer, const StepOptions& options, bool norm, T* coefficient,
                          T* threshold_grad) {
  double norm2 = 0;
  for (int64_t i = 0; i < layer.filters; i++)
    threshold_grad[i] = options.penalty != 0 ? penalty_gradient(options.penalty, layer.threshold[i]) : T(0);
  const auto add_signs = [](T* grad, const T* weight, T a, int64_t n) {
    for (int64_t i = 0; i < n; i++) grad[i] += a * sign(weight[i]);
  };
  for (int64_t row = 0; row < layer.rows; row++) {
    const int64_t filter = layer.index[row], start = row * layer.columns, dropped_start = row * layer.dropped_columns;
    const T *weight = layer.weight + start, *dropped = layer.dropped + dropped_start;
    T* grad = layer.grad ? layer.grad + start : nullptr;
    T* dropped_grad = layer.dropped_grad ? layer.dropped_grad + dropped_start : nullptr;
    T dot = 0;
    if (layer.dot) {
      dot = layer.dot[row];
    } else {
      double sum = 0;
      if (grad) sum += steady_sum<Sum::product>(grad, layer.columns, weight);
      if (dropped_grad) sum += steady_sum<Sum::product>(dropped_grad, layer.dropped_columns, dropped);
      dot = (T)sum;
    }
    // Not a product: outside the window the gradient is 0 even if dot is infinite.
    if (layer.window && !(std::fabs(layer.score[filter] - layer.threshold[filter]) > 1)) dot = 0;
    const T a = dot / (T)layer.n_in;
    coefficient[row] = a;
    threshold_grad[filter] -= dot;
    if (grad && a != 0) add_signs(grad, weight, a, layer.columns);
    if (dropped_grad && a != 0) add_signs(dropped_grad, dropped, a, layer.dropped_columns);
    if (!norm) continue;
    const auto signs_norm2 = [&](const T* w, int64_t n) {
      int64_t signs = 0;
      if (a != 0)
        for (int64_t i = 0; i < n; i++) signs += w[i] != 0;
      return signs ? (double)a * (double)a * (double)signs : 0.0;
    };
    norm2 += grad ? steady_sum<Sum::square>(grad, layer.columns) : signs_norm2(weight, layer.columns);
    norm2 += dropped_grad ? steady_sum<Sum::square>(dropped_grad, layer.dropped_columns)
                          : signs_norm2(dropped, layer.dropped_columns);
  }
  if (norm)
    for (int64_t i = 0; i < layer.filters; i++) norm2 += (double)threshold_grad[i] * (double)threshold_grad[i];
  return norm2;
}

// One row of weights: with its gradient, or with the sign term a alone. Returns its new sum of absolute values.
template <typename T>
double update_row(T* weight, T* grad, T* momentum, int64_t n, const StepOptions& options, T scale, T a) {
  if (grad) {
    if (options.write_grad)
      for (int64_t i = 0; i < n; i++) grad[i] *= scale;
    const T s = options.write_grad ? T(1) : scale;
    update(weight, momentum, n, options, [=](int64_t i, T) { return s * grad[i]; });
  } else if (a != 0) {
    const T s = scale * a;
    update(weight, momentum, n, options, [=](int64_t, T w) { return s * sign(w); });
  } else if (momentum || options.weight_decay != 0) {
    update(weight, momentum, n, options, [](int64_t, T) { return T(0); });
  }
  return steady_sum<Sum::abs>(weight, n);
}

template <typename T>
int64_t update_layer(const StepLayer<T>& layer, const StepOptions& options, T scale, const T* coefficient,
                     const T* threshold_grad) {
  const auto at = [](T* p, int64_t offset) { return p ? p + offset : nullptr; };
  for (int64_t row = 0; row < layer.rows; row++) {
    const int64_t start = row * layer.columns, dropped_start = row * layer.dropped_columns;
    double sum = update_row(layer.weight + start, at(layer.grad, start), at(layer.momentum, start), layer.columns, options,
                            scale, coefficient[row]);
    if (layer.dropped_columns)
      sum += update_row(layer.dropped + dropped_start, at(layer.dropped_grad, dropped_start),
                        at(layer.dropped_momentum, dropped_start), layer.dropped_columns, options, scale,
                        coefficient[row]);
    layer.score[layer.index[row]] = (T)(sum / (double)layer.n_in);
  }
  update(layer.threshold, layer.threshold_momentum, layer.filters, options,
         [=](int64_t i, T) { return scale * threshold_grad[i]; });
  int64_t changed = 0;
  for (int64_t i = 0; i < layer.filters; i++) {
    const uint8_t mask = layer.score[i] > layer.threshold[i];
    changed += mask != layer.mask[i];
    layer.mask[i] = mask;
  }
  return changed;
}

template <typename T>
double step(const StepLayer<T>* layers, int64_t layer_count, const StepTensor<T>* tensors, int64_t tensor_count,
            const StepOptions& options, int64_t* flips) {
  const bool clip = options.max_norm >= 0;
  double norm2 = options.extra_norm2;
  int64_t size = 0;
  for (int64_t l = 0; l < layer_count; l++) size += layers[l].rows + layers[l].filters;
  std::vector<T> scratch(size);
  const auto for_each_layer = [&](auto f) {
    T* at = scratch.data();
    for (int64_t l = 0; l < layer_count; at += layers[l].rows + layers[l].filters, l++) f(l, at, at + layers[l].rows);
  };
  for_each_layer([&](int64_t l, T* coefficient, T* threshold_grad) {
    norm2 += complete_gradients(layers[l], options, clip, coefficient, threshold_grad);
  });
  for (int64_t t = 0; t < tensor_count; t++) {
    const StepTensor<T>& a = tensors[t];
    if (a.is_threshold && options.penalty != 0)
      for (int64_t i = 0; i < a.size; i++) a.grad[i] += penalty_gradient(options.penalty, a.param[i]);
    if (clip) norm2 += steady_sum<Sum::square>(a.grad, a.size);
  }
  const T norm = (T)std::sqrt(norm2);
  T scale = 1;
  if (clip) {
    scale = (T)options.max_norm / (norm + (T)1e-6);
    // Not min(): a norm that is not a number must reach the parameters, as it does in torch.
    if (scale > 1) scale = 1;
  }
  for_each_layer([&](int64_t l, T* coefficient, T* threshold_grad) {
    flips[l] = update_layer(layers[l], options, scale, coefficient, threshold_grad);
  });
  for (int64_t t = 0; t < tensor_count; t++) {
    const StepTensor<T>& a = tensors[t];
    T* grad = a.grad;
    if (options.write_grad && clip)
      for (int64_t i = 0; i < a.size; i++) grad[i] *= scale;
    const T s = options.write_grad ? T(1) : scale;
    update(a.param, a.momentum, a.size, options, [=](int64_t i, T) { return s * grad[i]; });
  }
  return (double)norm;
}

#include "channels_impl.h"
#include "image_conv_impl.h"

template <typename T>
constexpr Kernels<T> table = {
    conv_relu_pool<T>,   conv_relu_pool_grad_weight<T>, conv_relu_pool_grad_input<T>, relu_pool<T>,
    relu_pool_grad<T>,   norm_moments<T>,               norm_relu<T>,                 norm_relu_grad<T>,
    norm_relu_pool<T>,   norm_relu_pool_grad<T>,        threshold_rows<T>,            step<T>,
    expand_channels<T>,  collect_channels<T>,           image_conv<T>,                image_conv_grad_input<T>,
    image_conv_grad_weight<T>,
};
