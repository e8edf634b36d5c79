// The first block's 3x3 convolution (stride 1, padding 1; 1 to 7 channels, an image's 3) in bfloat16, and the 2x2
// max-pool after it, in one pass; and the gradients of its filters.
//
// With C channels a sum has only 9 C + 1 products (the bias is the weight of a constant 1), so most of the time goes to
// memory: the convolution's output is four times as large as the pool's. Here the four pixels of a window stay in
// registers until the largest is found; only its value and its index (0 to 3) are stored. The backward pass moves each
// gradient to its pixel just before the products, which are as many as without a pool.
//
// Activations are stored channels last, (n, h, w, c). Products of bfloat16 are summed in float32 (VDPBF16PS: pairs of
// products per lane) and rounded to bfloat16 before the maximum, so the indices are those of the separate operations.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common.h"
#ifndef __AVX512BF16__
#error "needs a processor that multiplies bfloat16"
#endif

namespace {

constexpr int64_t STRIP = 6;           // forward: vectors of outputs at once; with 4 pixels, 24 registers of sums
constexpr int64_t TAPS = 9, GROUP = 3; // gradient: taps (a line of filters of 3 channels) x vectors, 27 registers
constexpr int64_t TASKS = 32;          // gradient: about this many parts, if there are as many images
constexpr int64_t SLACK = 64;          // words after rows and patches, which are copied in whole vectors
constexpr int32_t ONE = 0x3f80;        // 1 in bfloat16, and a 0 that completes the pair

struct Shape {
  int64_t images, height, width, channels, outputs;
  explicit Shape(const int64_t* s) : images(s[0]), height(s[1]), width(s[2]), channels(s[3]), outputs(s[4]) {}
  int64_t vectors() const { return ceil_div(outputs, LANES); }
  int64_t parts(int64_t most) const { return ceil_div(vectors(), most); }  // each of at most `most` vectors
  int64_t first(int64_t part, int64_t most) const { return vectors() * part / parts(most); }
  int64_t window_rows() const { return height / 2; }
  int64_t line() const { return (width + 2) * channels; }  // including its padding
  int64_t pairs() const { return ceil_div(9 * channels + 1, 2); }
};

// Copies a row of an image to after the padding of `to`; writes zeros if the row is outside the image.
void copy_row(const Shape& s, const bfloat16* images, int64_t image, int64_t row, bfloat16* to) {
  const int64_t dense = s.width * s.channels, bytes = dense * sizeof(bfloat16);
  if (row >= 0 && row < s.height)
    std::memcpy(to + s.channels, images + (image * s.height + row) * dense, bytes);
  else
    std::memset(to + s.channels, 0, bytes);
}

// The inputs of the filters at each pixel of a row: 9 C values and a 1. They are copied in whole vectors; the next copy
// overwrites the excess.
template <typename Vector>
void gather(const Shape& s, const bfloat16* rows, int64_t step, bfloat16* patches) {
  const int64_t c = s.channels, patch = 2 * s.pairs();
  for (int64_t i = 0; i < s.width; ++i, patches += patch, rows += c) {
    for (int64_t line = 0; line < 3; ++line) {
      Vector part;
      std::memcpy(&part, rows + line * step, sizeof part);
      std::memcpy(patches + line * 3 * c, &part, sizeof part);
    }
    std::memcpy(patches + 9 * c, &ONE, sizeof ONE);
  }
}

// Filters and bias as vectors of pairs of taps, ordered by strip, then by pair.
std::vector<int32_t> packed(const Shape& s, const int64_t* steps, const float* weight, const float* bias) {
  const int64_t c = s.channels, pairs = s.pairs();
  std::vector<int32_t> words(pairs * s.vectors() * LANES);
  for (int64_t strip = 0; strip < s.parts(STRIP); ++strip) {
    const int64_t first = s.first(strip, STRIP) * LANES, behind = s.first(strip + 1, STRIP) * LANES;
    for (int64_t k = 0; k < 9 * c + (bias != nullptr); ++k) {
      const float* from = k == 9 * c ? bias : weight + k % c * steps[1] + k / c / 3 * steps[2] + k / c % 3 * steps[3];
      const int64_t step = k == 9 * c ? 1 : steps[0];
      int32_t* to = words.data() + first * pairs + k / 2 * (behind - first) - first;
      for (int64_t o = first; o < std::min(behind, s.outputs); ++o)
        to[o] |= int32_t(uint32_t(rounded(from[o * step])) << k % 2 * 16);
    }
  }
  return words;
}

// Integers that sort like bfloat16s: -0 equals 0, and every NaN is above infinity (subtracting 0x80 wraps negative NaNs
// to the top). `bits` is the inverse.
INLINE __m512i order(__m512i bits) {
  const __m512i positive = _mm512_sub_epi16(bits, _mm512_set1_epi16(0x80));
  return _mm512_mask_sub_epi16(positive, _mm512_movepi16_mask(bits), _mm512_set1_epi16(0x7f80), bits);
}
INLINE __m512i bits(__m512i order) {
  const __m512i number = _mm512_add_epi16(order, _mm512_set1_epi16(0x80));
  return _mm512_mask_sub_epi16(number, _mm512_movepi16_mask(number), _mm512_set1_epi16(int16_t(0x8000)), number);
}

// Writes the first `count` lanes. A masked write takes longer, even with all lanes set.
INLINE void write(bfloat16* to, __m512i value, int64_t count) {
  if (count >= 32)
    _mm512_storeu_si512(to, value);
  else
    _mm512_mask_storeu_epi16(to, (1u << count) - 1, value);
}
INLINE void write(uint8_t* to, __m256i value, int64_t count) {
  if (count >= 32)
    _mm256_storeu_si256((__m256i*)to, value);
  else
    _mm256_mask_storeu_epi8(to, (1u << count) - 1, value);
}

// Where the results of a window go. Its pixels are `right` and `down` apart; only an output without a pool needs that.
struct Target {
  bfloat16* y;
  uint8_t* place;
  int64_t right, down, count;
};

// 32 outputs of the four pixels of a window.
template <bool POOLED>
INLINE void store(const __m512i (&pixel)[4], const Target& to, int64_t at) {
  if (!POOLED) {
    for (int p = 0; p < 4; ++p) write(to.y + at + p % 2 * to.right + p / 2 * to.down, pixel[p], to.count - at);
    return;
  }
  __m512i key[4];
  for (int p = 0; p < 4; ++p) key[p] = order(pixel[p]);
  const __m512i best = _mm512_max_epi16(_mm512_max_epi16(key[0], key[1]), _mm512_max_epi16(key[2], key[3]));
  __m256i place = _mm256_set1_epi8(3);
  for (int p = 2; p >= 0; --p)
    place = _mm256_mask_mov_epi8(place, _mm512_cmpeq_epi16_mask(key[p], best), _mm256_set1_epi8(char(p)));
  write(to.y + at, bits(best), to.count - at);
  write(to.place + at, place, to.count - at);
}

// A row of windows, V vectors of outputs.
template <int V, bool POOLED>
void windows(int64_t pairs, int64_t count, const int32_t* top, const int32_t* bottom, const int32_t* weights,
             Target to, int64_t step) {
  for (int64_t window = 0; window < count; ++window) {
    __m512 sums[4][V + V % 2];
    for (auto& of_pixel : sums)
      for (__m512& sum : of_pixel) sum = _mm512_setzero_ps();
    const int32_t* filters = weights;
    for (int64_t pair = 0; pair < pairs; ++pair, filters += V * LANES) {
      const __m512bh inputs[4] = {
          (__m512bh)_mm512_set1_epi32(top[pair]), (__m512bh)_mm512_set1_epi32(top[pairs + pair]),
          (__m512bh)_mm512_set1_epi32(bottom[pair]), (__m512bh)_mm512_set1_epi32(bottom[pairs + pair])};
      for (int v = 0; v < V; ++v) {
        const __m512bh filter = (__m512bh)_mm512_loadu_si512(filters + v * LANES);
        for (int p = 0; p < 4; ++p) sums[p][v] = _mm512_dpbf16_ps(sums[p][v], filter, inputs[p]);
      }
    }
    for (int v = 0; v < V; v += 2) {
      __m512i pixel[4];
      for (int p = 0; p < 4; ++p) pixel[p] = (__m512i)_mm512_cvtne2ps_pbh(sums[p][v + 1], sums[p][v]);
      store<POOLED>(pixel, to, v * LANES);
    }
    top += 2 * pairs, bottom += 2 * pairs, to.y += step, to.place += step;
  }
}

template <bool POOLED>
void convolution(const Shape& s, int64_t threads, const int64_t* steps, const bfloat16* x, const float* weight,
                 const float* bias, bfloat16* y, uint8_t* place) {
  const std::vector<int32_t> filters = packed(s, steps, weight, bias);
  const int64_t line = s.line() + SLACK, pairs = s.pairs(), o = s.outputs, rows = s.images * s.window_rows();
  constexpr auto of_vectors = [](int64_t v) {
    return v == 6   ? windows<6, POOLED>
           : v == 5 ? windows<5, POOLED>
           : v == 4 ? windows<4, POOLED>
           : v == 3 ? windows<3, POOLED>
           : v == 2 ? windows<2, POOLED>
                    : windows<1, POOLED>;
  };
#pragma omp parallel num_threads(threads)
  {
    std::vector<bfloat16> padded(4 * line);
    std::vector<int32_t> top(s.width * pairs + SLACK), bottom(s.width * pairs + SLACK);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t first = row % s.window_rows() * 2;
      for (int64_t i = 0; i < 4; ++i) copy_row(s, x, row / s.window_rows(), first - 1 + i, padded.data() + i * line);
      const auto copy = s.channels <= 5 ? gather<__m256i> : gather<__m512i>;
      copy(s, padded.data(), line, (bfloat16*)top.data());
      copy(s, padded.data() + line, line, (bfloat16*)bottom.data());
      const int64_t at = POOLED ? row * s.width / 2 * o : row * 2 * s.width * o;
      for (int64_t strip = 0; strip < s.parts(STRIP); ++strip) {
        const int64_t v = s.first(strip, STRIP), c = v * LANES;
        const Target to{y + at + c, place + at + c, o, s.width * o, o - c};
        of_vectors(s.first(strip + 1, STRIP) - v)(pairs, s.width / 2, top.data(), bottom.data(),
                                                  filters.data() + c * pairs, to, POOLED ? o : 2 * o);
      }
    }
  }
}

// Neighbouring pixels of a padded row: word i holds (row[i], row[i + channels]). For the upper or lower two pixels of a
// window, the inputs of a line of the filter are then 3 C consecutive words.
void join_neighbours(const bfloat16* row, int64_t channels, int64_t line, int32_t* to) {
  const bfloat16* next = row + channels;
  for (int64_t i = 0; i < line; ++i) to[i] = int32_t(row[i] | uint32_t(next[i]) << 16);
}

// Gradients of a window's upper two and lower two pixels, for 16 outputs, as pairs for VDPBF16PS. Returns their sum.
template <bool POOLED>
INLINE __m512 spread(const bfloat16* grad, const uint8_t* place, int64_t right, int64_t down, __mmask16 lanes,
                     int32_t* to) {
  const auto load = [=](const bfloat16* from) INLINE_LAMBDA {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
  };
  if (POOLED) {
    // The processor does not predict what the next row of windows needs: 3.5 ms without prefetch, 2.0 with it.
    prefetch(grad + down), prefetch(place + down);
    // Shift by 16 bits per index: index 1 is the upper half. Larger shifts (or negative ones: unsigned) give 0.
    const __m512i value = load(grad), last = _mm512_set1_epi32(32);
    const __m512i shift = _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, place)), 4);
    _mm512_storeu_si512(to, _mm512_sllv_epi32(value, shift));
    _mm512_storeu_si512(to + LANES, _mm512_sllv_epi32(value, _mm512_sub_epi32(shift, last)));
    return (__m512)_mm512_slli_epi32(value, 16);
  }
  __m512 sum = _mm512_setzero_ps();
  for (int64_t p = 0; p < 2; ++p, grad += down) {
    prefetch(grad + 2 * down), prefetch(grad + 2 * down + right);
    const __m512i second = _mm512_slli_epi32(load(grad + right), 16), first = load(grad);
    _mm512_storeu_si512(to + p * LANES, _mm512_or_si512(first, second));
    sum = _mm512_add_ps(sum, _mm512_add_ps((__m512)_mm512_slli_epi32(first, 16), (__m512)second));
  }
  return sum;
}

// Gradients of an image for some vectors of outputs.
struct Source {
  const bfloat16* grad;
  const uint8_t* place;
  int64_t rows, windows, outputs, count;  // `outputs`: all; `count`: those from `grad` on
  int32_t* pairs;                         // where the spread gradients are kept
};

// Adds to the sums of TAPS taps in a line of the filter and V vectors of outputs. The first call has SPREAD: it makes
// the pairs, which later calls read again, between products that leave time for it, and adds to the bias sums.
template <int V, bool POOLED, bool SPREAD>
void add_products(const Source source, const int32_t* inputs, int64_t line, int64_t step, float* sums, float* bias) {
  __m512 sum[TAPS][V];
#pragma GCC unroll 9
  for (int i = 0; i < TAPS; ++i)
    for (int v = 0; v < V; ++v) sum[i][v] = _mm512_loadu_ps(sums + (i * V + v) * LANES);
  const int64_t right = source.outputs, down = (POOLED ? 1 : 2) * source.windows * right;
  const bfloat16* grad = source.grad;
  const uint8_t* place = source.place;
  int32_t* pairs = source.pairs;
  for (int64_t row = 0; row < source.rows; ++row, inputs += 2 * line) {
    const int32_t* input = inputs;
    for (int64_t window = 0; window < source.windows; ++window, input += step, pairs += 2 * V * LANES) {
      if (SPREAD) {
        for (int v = 0; v < V; ++v) {
          const __m512 more = spread<POOLED>(grad + v * LANES, place + v * LANES, right, down,
                                             lanes_of(source.count - v * LANES), pairs + 2 * v * LANES);
          _mm512_storeu_ps(bias + v * LANES, _mm512_add_ps(_mm512_loadu_ps(bias + v * LANES), more));
        }
        grad += (POOLED ? 1 : 2) * right, place += right;
      }
      for (int64_t half = 0; half < 2; ++half) {
        const int32_t* from = input + half * line;
        __m512bh value[V];
        for (int v = 0; v < V; ++v) value[v] = (__m512bh)_mm512_loadu_si512(pairs + (2 * v + half) * LANES);
#pragma GCC unroll 9
        for (int i = 0; i < TAPS; ++i) {
          __m512i pair = _mm512_set1_epi32(from[i]);
          asm("" : "+v"(pair));  // one load for all vectors, not one per vector
          for (int v = 0; v < V; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], value[v], (__m512bh)pair);
        }
      }
    }
    if (SPREAD && !POOLED) grad += down;
  }
#pragma GCC unroll 9
  for (int i = 0; i < TAPS; ++i)
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(sums + (i * V + v) * LANES, sum[i][v]);
}

// The gradients of groups of filters, from parts of the images. Sums of a group: all its outputs, for each line of the
// filter and each of its taps (padded to a multiple of TAPS; those after 3 C are unused); then the bias.
template <bool POOLED>
struct FilterGradient {
  const Shape s;
  const int64_t groups = s.parts(GROUP);
  const int64_t parts = std::max<int64_t>(1, std::min(s.images, ceil_div(TASKS, groups)));
  const int64_t taps = ceil_div(3 * s.channels, TAPS) * TAPS, line = ceil_div(s.line() + taps, LANES) * LANES;
  const int64_t sums = (3 * taps + 1) * LANES;  // for each vector of outputs

  struct Scratch {  // of one thread; the zeros around images stay zero
    std::vector<bfloat16> padded;
    std::vector<int32_t> inputs, pairs;
    explicit Scratch(const FilterGradient& g)
        : padded(g.line + g.s.channels), inputs((g.s.height + 2) * g.line),
          pairs(g.s.height * g.s.width / 2 * GROUP * LANES) {}
  };

  template <int V>
  void run(int64_t part, int64_t first, const bfloat16* x, const bfloat16* grad, const uint8_t* place, float* sums,
           Scratch& scratch) const {
    const int64_t o = s.outputs, c = s.channels, channel = first * LANES;
    const int32_t* inputs = scratch.inputs.data();
    for (int64_t image = s.images * part / parts; image < s.images * (part + 1) / parts; ++image) {
      for (int64_t row = 0; row < s.height; ++row) {  // the rows above and below stay zero
        copy_row(s, x, image, row, scratch.padded.data());
        join_neighbours(scratch.padded.data(), c, line, scratch.inputs.data() + (row + 1) * line);
      }
      const int64_t at = image * s.height * s.width / (POOLED ? 4 : 1) * o + channel;
      const Source source{grad + at, place + at, s.window_rows(), s.width / 2, o, o - channel, scratch.pairs.data()};
      for (int64_t kh = 0; kh < 3; ++kh)
        for (int64_t tap = 0; tap < taps; tap += TAPS)
          (kh + tap == 0 ? add_products<V, POOLED, true> : add_products<V, POOLED, false>)(
              source, inputs + kh * line + tap, line, 2 * c, sums + (kh * taps + tap) * V * LANES,
              sums + 3 * taps * V * LANES);
    }
  }

  // Parts do not depend on the number of threads and are added in order, so results are equal to the bit.
  void all(int64_t threads, const bfloat16* x, const bfloat16* grad, const uint8_t* place, float* grad_weight,
           float* grad_bias) const {
    const int64_t each = sums * s.vectors(), c = s.channels;
    std::vector<float> all(parts * each);
#pragma omp parallel num_threads(threads)
    {
      Scratch scratch(*this);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < parts * groups; ++i) {
        const int64_t part = i / groups, first = s.first(i % groups, GROUP), v = s.first(i % groups + 1, GROUP) - first;
        const auto of_vectors = v == 3   ? &FilterGradient::run<3>
                                : v == 2 ? &FilterGradient::run<2>
                                         : &FilterGradient::run<1>;
        (this->*of_vectors)(part, first, x, grad, place, all.data() + part * each + first * sums, scratch);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < each; ++i)
        for (int64_t part = 1; part < parts; ++part) all[i] += all[part * each + i];
#pragma omp for schedule(static)
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = s.first(group, GROUP), lanes = (s.first(group + 1, GROUP) - first) * LANES;
        const float* sum = all.data() + first * sums;
        for (int64_t o = 0; o < std::min(lanes, s.outputs - first * LANES); ++o) {
          for (int64_t k = 0; k < 9 * c; ++k)
            grad_weight[(first * LANES + o) * 9 * c + k] = sum[(k / (3 * c) * taps + k % (3 * c)) * lanes + o];
          grad_bias[first * LANES + o] = sum[3 * taps * lanes + o];
        }
      }
    }
  }
};

}  // namespace

// Entry points for ctypes. A shape is {images, height, width, channels, outputs}; steps are the strides of the filters
// (o, c, 3, 3), whose gradients are (o, 3, 3, c). bias may be null; place is null if there is no pool.
extern "C" void stem(const int64_t* shape, const int64_t* steps, int64_t threads, const bfloat16* x,
                     const float* weight, const float* bias, bfloat16* y, uint8_t* place) {
  (place ? convolution<true> : convolution<false>)(Shape(shape), threads, steps, x, weight, bias, y, place);
}

extern "C" void stem_weights(const int64_t* shape, int64_t threads, const bfloat16* x, const bfloat16* grad,
                             const uint8_t* place, float* grad_weight, float* grad_bias) {
  if (place)
    FilterGradient<true>{Shape(shape)}.all(threads, x, grad, place, grad_weight, grad_bias);
  else
    FilterGradient<false>{Shape(shape)}.all(threads, x, grad, place, grad_weight, grad_bias);
}
