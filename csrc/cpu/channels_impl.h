// Compact channels into a tensor of all channels, and back. Included by kernels_impl.h.
//
// With channels last a position is a row of channels. Which of them are stored changes from vector to vector but not from
// row to row, so every vector of a row has its own shuffle, made once per call: one load of stored channels, one shuffle,
// one blend with the constants. Vectors are loaded and stored whole; what is too much of a store is overwritten by the
// next row, so the last rows, where nothing comes behind, are written channel by channel.

// One vector of a row: `first`, `first` + 1, ... are the stored channels, `at`, `at` + 1, ... the channels of the tensor. The
// shuffle is kept as plain arrays, because a vector type would ask the allocator for its own alignment.
template <typename T>
struct Chunk {
  using V = Vec<T>;
  static constexpr int lanes = V::size;
#if defined(SPAFL_ISA_AVX2)
  using Index = int32_t;  // doubles are moved as pairs of floats
  static constexpr int parts = 8 / lanes;
#else
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  static constexpr int parts = 1;
#endif
  int64_t at, first, count;  // count: stored channels among the vector's
  Index index[lanes * parts], keep[lanes * parts];
  T constant[lanes];

  // Lane i is lane from[i] of what is shuffled, or constants[i] if that is negative.
  Chunk(int64_t at, int64_t first, int64_t count, const int32_t* from, const T* constants)
      : at(at), first(first), count(count) {
    for (int i = 0; i < lanes * parts; i++) {
      index[i] = std::max(from[i / parts], 0) * parts + i % parts;
      keep[i] = from[i / parts] >= 0 ? -1 : 0;
    }
    std::copy_n(constants, lanes, constant);
  }

  V shuffle(V a) const {
    const V other = V::load(constant);
#if defined(SPAFL_ISA_AVX512)
    const __m512i at = _mm512_loadu_si512(index), kept = _mm512_loadu_si512(keep);
    if constexpr (sizeof(T) == 4)
      return {_mm512_mask_permutexvar_ps(other.v, _mm512_movepi32_mask(kept), at, a.v)};
    else
      return {_mm512_mask_permutexvar_pd(other.v, _mm512_movepi64_mask(kept), at, a.v)};
#elif defined(SPAFL_ISA_AVX2)
    const __m256i at = _mm256_loadu_si256((const __m256i*)index), kept = _mm256_loadu_si256((const __m256i*)keep);
    if constexpr (sizeof(T) == 4)
      return V::select(_mm256_castsi256_ps(kept), {_mm256_permutevar8x32_ps(a.v, at)}, other);
    else
      return V::select(_mm256_castsi256_pd(kept),
                       {_mm256_castps_pd(_mm256_permutevar8x32_ps(_mm256_castpd_ps(a.v), at))}, other);
#else
    V r = other;
    for (int i = 0; i < lanes; i++)
      if (keep[i]) r.v[i] = a.v[index[i]];
    return r;
#endif
  }
};

// The chunks of a row in a local array, whose shuffles the compiler can keep in registers while rows go by.
template <typename T, int N>
struct LocalChunks {
  Chunk<T> chunk[N];
  template <typename Body>
  void each(Body body) const {
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) body(chunk[i]);
  }
};
template <typename T, int... I>
LocalChunks<T, sizeof...(I)> local_chunks(const std::vector<Chunk<T>>& c, std::integer_sequence<int, I...>) {
  return {{c[I]...}};
}
template <typename T>
struct ChunkList {
  const std::vector<Chunk<T>>& chunks;
  template <typename Body>
  void each(Body body) const {
    for (const Chunk<T>& c : chunks) body(c);
  }
};
template <typename T, typename Body>
void with_chunks(const std::vector<Chunk<T>>& c, Body body) {
  switch (c.size()) {
    case 1: return body(local_chunks(c, std::make_integer_sequence<int, 1>()));
    case 2: return body(local_chunks(c, std::make_integer_sequence<int, 2>()));
    case 4: return body(local_chunks(c, std::make_integer_sequence<int, 4>()));
    case 8: return body(local_chunks(c, std::make_integer_sequence<int, 8>()));
    case 16: return body(local_chunks(c, std::make_integer_sequence<int, 16>()));
    default: return body(ChunkList<T>{c});
  }
}

// Rows whose whole vectors end inside an array of `rows` rows of `size`, if a row's last vector ends at `end`.
inline int64_t whole_rows(int64_t rows, int64_t size, int64_t end) {
  const int64_t over = std::max<int64_t>(0, end - size);
  return std::max<int64_t>(0, rows - (over + size - 1) / size);
}

template <typename T>
void expand_rows(const ChannelShape& s, const T* x, const T* constants, const T* stream, T* y) {
  using V = Vec<T>;
  constexpr int lanes = V::size;
  std::vector<Chunk<T>> chunks;
  int64_t next = 0, end_in = 0;
  for (int64_t at = 0; at < s.width; at += lanes) {
    int32_t from[lanes];
    T fill[lanes];
    const int64_t first = next;
    for (int i = 0; i < lanes; i++) {
      const bool kept = at + i < s.width && next < s.kept && s.place[next] == at + i;
      from[i] = kept ? (int32_t)(next++ - first) : -1;
      fill[i] = kept || at + i >= s.width || !constants ? T(0) : constants[at + i - next];
    }
    // A vector of constants alone loads something that is there anyway.
    const int64_t source = next > first ? first : 0;
    end_in = std::max(end_in, source + lanes);
    chunks.emplace_back(at, source, next - first, from, fill);
  }
  const int64_t end_out = (s.width + lanes - 1) / lanes * lanes;
  const int64_t whole = std::min(whole_rows(s.outer, s.stored, end_in), whole_rows(s.outer, s.width, end_out));
  with_chunks(chunks, [&](auto local) {
    if (stream)
      for (int64_t row = 0; row < whole; row++)
        local.each([&](const Chunk<T>& c) {
          const int64_t to = row * s.width + c.at;
          V::add(V::load(stream + to), c.shuffle(V::load(x + row * s.stored + c.first))).store(y + to);
        });
    else
      for (int64_t row = 0; row < whole; row++)
        local.each([&](const Chunk<T>& c) {
          c.shuffle(V::load(x + row * s.stored + c.first)).store(y + row * s.width + c.at);
        });
  });
  for (int64_t row = whole; row < s.outer; row++) {
    int64_t k = 0;
    for (int64_t channel = 0; channel < s.width; channel++) {
      const int64_t to = row * s.width + channel;
      const T v = k < s.kept && s.place[k] == channel ? x[row * s.stored + k++] : constants ? constants[channel - k] : T(0);
      y[to] = stream ? stream[to] + v : v;
    }
  }
}

template <typename T>
void expand_planes(const ChannelShape& s, const T* x, const T* constants, const T* stream, T* y) {
  for (int64_t n = 0; n < s.outer; n++) {
    int64_t k = 0;
    for (int64_t channel = 0; channel < s.width; channel++) {
      const int64_t at = (n * s.width + channel) * s.inner;
      T* to = y + at;
      const T* base = stream ? stream + at : nullptr;
      if (k < s.kept && s.place[k] == channel) {
        const T* from = x + (n * s.stored + k++) * s.inner;
        if (base)
          for (int64_t i = 0; i < s.inner; i++) to[i] = base[i] + from[i];
        else
          std::copy_n(from, s.inner, to);
      } else {
        const T c = constants ? constants[channel - k] : T(0);
        if (base)
          for (int64_t i = 0; i < s.inner; i++) to[i] = base[i] + c;
        else
          std::fill_n(to, s.inner, c);
      }
    }
  }
}

template <typename T>
void expand_channels(const ChannelShape& s, const T* x, const T* constants, const T* stream, T* y) {
  (s.inner == 1 ? expand_rows<T> : expand_planes<T>)(s, x, constants, stream, y);
}

// Sums over many positions, in blocks: float sums of some hundred numbers, added up in double.
constexpr int64_t kSumBlock = 256;

template <typename T>
void collect_rows(const ChannelShape& s, const T* grad, T* kept_grad, T* constant_grad) {
  using V = Vec<T>;
  constexpr int lanes = V::size;
  std::vector<Chunk<T>> chunks;
  const T zeros[lanes] = {};
  int64_t next = 0, end_out = 0;
  for (int64_t at = 0; at < s.width; at += lanes) {
    int32_t from[lanes];
    const int64_t first = next;
    std::fill_n(from, lanes, -1);
    while (next < s.kept && s.place[next] < at + lanes) from[next - first] = (int32_t)(s.place[next] - at), next++;
    end_out = std::max(end_out, first + lanes);
    chunks.emplace_back(at, first, next - first, from, zeros);
  }
  const int64_t padded = (s.width + lanes - 1) / lanes * lanes;
  for (int64_t at = s.kept; at < s.stored; at += lanes) end_out = std::max(end_out, at + lanes);
  const int64_t whole = std::min(whole_rows(s.outer, s.stored, end_out), whole_rows(s.outer, s.width, padded));
  std::vector<T> block(constant_grad ? padded : 0);
  std::vector<double> sums(block.size());
  const auto fold = [&] {
    for (size_t i = 0; i < sums.size(); i++) sums[i] += block[i], block[i] = 0;
  };
  with_chunks(chunks, [&](auto local) {
    T* const sum = block.data();
    for (int64_t row = 0; row < whole; row++) {
      const T* from = grad + row * s.width;
      T* to = kept_grad + row * s.stored;
      local.each([&](const Chunk<T>& c) {
        const V g = V::load(from + c.at);
        if (sum) V::add(V::load(sum + c.at), g).store(sum + c.at);
        // Also where none is kept: a branch costs more than a store that the next one overwrites.
        c.shuffle(g).store(to + c.first);
      });
      for (int64_t at = s.kept; at < s.stored; at += lanes) V::all(T(0)).store(to + at);
      if (sum && row % kSumBlock == kSumBlock - 1) fold();
    }
  });
  for (int64_t row = whole; row < s.outer; row++) {
    const T* from = grad + row * s.width;
    for (int64_t k = 0; k < s.stored; k++) kept_grad[row * s.stored + k] = k < s.kept ? from[s.place[k]] : T(0);
    if (constant_grad)
      for (int64_t channel = 0; channel < s.width; channel++) block[channel] += from[channel];
  }
  if (!constant_grad) return;
  fold();
  int64_t k = 0;
  for (int64_t channel = 0; channel < s.width; channel++)
    if (k < s.kept && s.place[k] == channel)
      k++;
    else
      constant_grad[channel - k] = (T)sums[channel];
}

template <typename T>
void collect_planes(const ChannelShape& s, const T* grad, T* kept_grad, T* constant_grad) {
  std::vector<double> sums(constant_grad ? s.width - s.kept : 0);
  for (int64_t n = 0; n < s.outer; n++) {
    for (int64_t k = 0; k < s.stored; k++) {
      T* to = kept_grad + (n * s.stored + k) * s.inner;
      if (k < s.kept)
        std::copy_n(grad + (n * s.width + s.place[k]) * s.inner, s.inner, to);
      else
        std::fill_n(to, s.inner, T(0));
    }
    int64_t k = 0;
    for (int64_t channel = 0; constant_grad && channel < s.width; channel++) {
      if (k < s.kept && s.place[k] == channel) {
        k++;
        continue;
      }
      const T* from = grad + (n * s.width + channel) * s.inner;
      for (int64_t i = 0; i < s.inner; i += kSumBlock)
        sums[channel - k] += (double)steady_sum<Sum::plain>(from + i, std::min(kSumBlock, s.inner - i));
    }
  }
  if (constant_grad)
    for (size_t i = 0; i < sums.size(); i++) constant_grad[i] = (T)sums[i];
}

template <typename T>
void collect_channels(const ChannelShape& s, const T* grad, T* kept_grad, T* constant_grad) {
  (s.inner == 1 ? collect_rows<T> : collect_planes<T>)(s, grad, kept_grad, constant_grad);
}
