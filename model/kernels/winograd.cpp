// 3x3 convolutions (stride 1, padding 1) by Winograd's F(2x2, 3x3), forward and both gradients, in bfloat16.
//
// A tile of 2x2 outputs depends on 4x4 inputs. Directly it costs 36 products per pair of channels. Winograd's form
// costs 16: both sides are first transformed to 4x4 "positions", in which the convolution is a plain product:
//
//   y  = A^T [(G w G^T) * (B^T x B)] A       * position by position, summed over input channels
//   dw = G^T [(B^T x B) * (A dy A^T)] G                              summed over tiles
//
// The gradient of x is a convolution of dy with the filters rotated by 180 degrees. So each direction is 16 matrix
// products between two transforms that only add and subtract. Transforms are computed in float32 and rounded once to
// bfloat16 for the products (VDPBF16PS: pairs of bfloat16 products, summed in float32).
//
// A 2x2 max-pool may follow the convolution; its windows are the tiles. Then only the pool's output is written, with
// the index of the largest pixel in each window; the backward pass reads only its gradient and those indices.
//
// Activations are stored channels last, (n, h, w, c). A "chunk" is 16 channels, one vector register of float32.
// Threads divide the tiles or the output channels and never wait for each other; one thread computes each sum.

#include <algorithm>
#include <cstdint>

#include "common.h"
#ifndef __AVX512BF16__
#error "needs a processor that multiplies bfloat16"
#endif

namespace {

constexpr int64_t POSITIONS = 16;
constexpr int64_t AT_ONCE = 3;  // chunks of outputs in one product: 8 tiles x 3 chunks, or 12 x 2, are 24 registers
constexpr int64_t SLICE = 48;   // tiles whose products wait in L2 for the output transform; a multiple of 8 and 12
// Transformed filters of at most KEPT_BYTES are kept for all tiles, which then go slice by slice. Larger ones are
// computed again for every BLOCK tiles, enough to be worth it.
constexpr int64_t KEPT_BYTES = 4 << 20, BLOCK = 8 * SLICE;
constexpr int64_t LONG = 640, PART = 512;  // more input channels than LONG go in parts of at most PART
constexpr int64_t GRAD_TILES = 256, GRAD_BYTES = 8 << 20;  // gradient of filters: tiles at once, sums in cache

INLINE Floats load(const bfloat16* from, __mmask16 lanes) {
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16);
}
INLINE Floats as_stored(Floats x) { return widened(rounded(x)); }
// Lane i holds first[i] and second[i]: a pair for VDPBF16PS.
INLINE __m512i joined(__m256i first, __m256i second) {
  typedef uint16_t Order __attribute__((vector_size(64)));
  constexpr Order order = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                            8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return _mm512_permutex2var_epi16(_mm512_castsi256_si512(first), (__m512i)order, _mm512_castsi256_si512(second));
}

// Those of 16 channels whose largest pixel in the window has the index `pixel`.
INLINE __mmask16 lanes_at(const uint8_t* place, int pixel, __mmask16 lanes) {
  return _mm_mask_cmpeq_epi8_mask(lanes, _mm_maskz_loadu_epi8(lanes, place), _mm_set1_epi8(char(pixel)));
}

// A transform reads next what is a row of pixels away, which the processor does not predict. Without `prefetch` it
// waits for memory most of the time (4.9 ms instead of 1.3 for 192 channels of 128 images of 16x16).

struct Images {
  int64_t count, height, width, channels;
  int64_t tile_rows() const { return count * height / 2; }
  int64_t tiles_in_row() const { return width / 2; }
  int64_t at(int64_t tile_row) const { return tile_row * 2 * width * channels; }  // of its upper left pixel
  int64_t window(int64_t tile_row) const { return tile_row * tiles_in_row() * channels; }  // first in the pool's output
};

// The transforms along one axis, applied to columns and then to rows.
INLINE void input_transform(const Floats d[4], Floats t[4]) {  // B^T
  t[0] = d[0] - d[2], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[3] - d[1];
}
INLINE void output_transform(const Floats m[4], Floats y[2]) {  // A^T
  y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] + m[3];
}
INLINE void gradient_transform(const Floats y[2], Floats t[4]) {  // A
  t[0] = y[0], t[1] = y[0] + y[1], t[2] = y[0] - y[1], t[3] = y[1];
}
INLINE void filter_transform(const Floats g[3], Floats u[4]) {  // G
  const Floats half = (g[0] + g[2]) * 0.5f, middle = g[1] * 0.5f;
  u[0] = g[0], u[1] = half + middle, u[2] = half - middle, u[3] = g[2];
}
INLINE void filter_transform_back(const Floats u[4], Floats g[3]) {  // G^T
  const Floats sum = (u[1] + u[2]) * 0.5f;
  g[0] = u[0] + sum, g[1] = (u[1] - u[2]) * 0.5f, g[2] = sum + u[3];
}

// One transform along columns and then along rows.
template <int FROM, int TO, typename Transform>
INLINE void along_both(Transform transform, const Floats (&from)[FROM][FROM], Floats (&to)[TO][TO]) {
  Floats half[TO][FROM];
  for (int j = 0; j < FROM; ++j) {
    Floats column[FROM], transformed[TO];
    for (int i = 0; i < FROM; ++i) column[i] = from[i][j];
    transform(column, transformed);
    for (int i = 0; i < TO; ++i) half[i][j] = transformed[i];
  }
  for (int i = 0; i < TO; ++i) transform(half[i], to[i]);
}

// B^T x B of one row of tiles, for up to 16 channels: store(tile in row, its 16 positions). If x is the gradient of a
// pool's output, `place` is the index of its pixel in the window; the other pixels are zero.
template <bool POOLED, typename Store>
INLINE void transform_input(const bfloat16* x, const uint8_t* place, Images im, int64_t tile_row, int64_t channel,
                            __mmask16 lanes, Store store) {
  const int64_t line = (POOLED ? im.width / 2 : im.width) * im.channels, y = tile_row * 2 % im.height;
  const int64_t corner = (POOLED ? im.window(tile_row) : im.at(tile_row)) - line + channel;
  const bool above = y > 0, below = y + 2 < im.height;
  Floats column[4][4] = {};  // of the tile, transformed; neighbouring tiles share two
  auto read = [&](int64_t at, Floats t[4]) INLINE_LAMBDA {
    const int64_t from = corner + (POOLED ? at / 2 : at) * im.channels;
    Floats d[4];
    for (int i = 0; i < 4; ++i) {
      const bool inside = i == 0 ? above : i == 3 ? below : true;
      const int64_t here = from + (POOLED ? (i + 1) / 2 : i) * line;
      if (!inside)
        d[i] = Floats{};
      else if (POOLED)
        d[i] = load(x + here, lanes_at(place + here, (i + 1) % 2 * 2 + at % 2, lanes));
      else
        d[i] = load(x + here, lanes);
    }
    input_transform(d, t);
    if (POOLED)
      prefetch(x + from + 3 * line), prefetch(place + from + 3 * line);  // the next row's
    else
      for (int i = 4; i < 6; ++i) prefetch(x + from + i * line);
  };
  read(0, column[1]);
  for (int64_t tile = 0; tile < im.tiles_in_row(); ++tile) {
    read(2 * tile + 1, column[2]);
    if (2 * tile + 2 < im.width)
      read(2 * tile + 2, column[3]);
    else
      for (int i = 0; i < 4; ++i) column[3][i] = Floats{};
    Floats all[4][4];
    for (int i = 0; i < 4; ++i) {
      const Floats d[4] = {column[0][i], column[1][i], column[2][i], column[3][i]};
      input_transform(d, all[i]);
      column[0][i] = column[2][i], column[1][i] = column[3][i];
    }
    store(tile, all[0]);
  }
}

// The same for A dy A^T.
template <bool POOLED, typename Store>
INLINE void transform_gradient(const bfloat16* dy, const uint8_t* place, Images im, int64_t tile_row, int64_t channel,
                               __mmask16 lanes, Store store) {
  const int64_t line = im.width * im.channels;
  for (int64_t tile = 0; tile < im.tiles_in_row(); ++tile) {
    Floats d[2][2], all[4][4];
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) {
        if (POOLED) {
          const int64_t at = im.window(tile_row) + tile * im.channels + channel;
          d[i][j] = load(dy + at, lanes_at(place + at, 2 * i + j, lanes));
          if (i + j == 0) prefetch(dy + at + line / 2), prefetch(place + at + line / 2);
        } else {
          const bfloat16* from = dy + im.at(tile_row) + tile * 2 * im.channels + channel + i * line + j * im.channels;
          d[i][j] = load(from, lanes);
          prefetch(from + 2 * line);
        }
      }
    along_both(gradient_transform, d, all);
    store(tile, all[0]);
  }
}

// ROWS x CHUNKS * 16 sums of `pairs` pairs: m[i][z] (+)= sum over k of a[i * row + k * step] . b[z * chunk + k * 16].
// All sums stay in registers; a pair of a goes to all lanes and multiplies CHUNKS vectors of b. Units: pairs, floats.
template <int ROWS, int CHUNKS>
__attribute__((noinline)) void product(const int32_t* a, int64_t row, int64_t step, const int32_t* b, int64_t chunk,
                                       int64_t pairs, float* m, int64_t m_row, int64_t m_chunk, bool add) {
  __m512 sum[ROWS][CHUNKS];
#pragma GCC unroll 24
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 3
    for (int z = 0; z < CHUNKS; ++z) sum[i][z] = _mm512_setzero_ps();
  if (add)
    for (int i = 0; i < ROWS * CHUNKS; ++i) prefetch(m + i / CHUNKS * m_row + i % CHUNKS * m_chunk);
  const int32_t* rows[(ROWS + 3) / 4];
  for (int i = 0; i < ROWS; i += 4) rows[i / 4] = a + i * row;
#pragma GCC unroll 1
  for (int64_t k = 0; k < pairs; ++k) {
    __m512i vectors[CHUNKS];
#pragma GCC unroll 3
    for (int z = 0; z < CHUNKS; ++z) vectors[z] = _mm512_loadu_si512(b + z * chunk);
    b += LANES;
#pragma GCC unroll 24
    for (int i = 0; i < ROWS; ++i) {
      __m512i pair = _mm512_set1_epi32(rows[i / 4][i % 4 * row]);
      asm("" : "+v"(pair));  // one load for all chunks, not one per chunk
#pragma GCC unroll 3
      for (int z = 0; z < CHUNKS; ++z)
        sum[i][z] = _mm512_dpbf16_ps(sum[i][z], (__m512bh)vectors[z], (__m512bh)pair);
    }
#pragma GCC unroll 6
    for (int i = 0; i < (ROWS + 3) / 4; ++i) rows[i] += step;
  }
#pragma GCC unroll 24
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 3
    for (int z = 0; z < CHUNKS; ++z) {
      float* to = m + i * m_row + z * m_chunk;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[i][z]) : sum[i][z]);
    }
}

// Transposes 16 x 16 values in four rounds that exchange lanes at distance 8, 4, 2, 1.
template <int DISTANCE>
INLINE void exchange(Floats r[16]) {
  Ints low, high;  // numbers from 16 on are lanes of the second vector
  for (int j = 0; j < 16; ++j) {
    low[j] = j & DISTANCE ? 16 + j - DISTANCE : j;
    high[j] = j & DISTANCE ? 16 + j : j + DISTANCE;
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (!(i & DISTANCE)) {
      const __m512 a = (__m512)r[i], b = (__m512)r[i + DISTANCE];
      r[i] = (Floats)_mm512_permutex2var_ps(a, (__m512i)low, b);
      r[i + DISTANCE] = (Floats)_mm512_permutex2var_ps(a, (__m512i)high, b);
    }
}

// The filters of a convolution with `inputs` and `outputs` channels; strides are in floats.
struct Filters {
  const float* data;
  int64_t inputs, outputs, input_step, output_step, line, tap;

  // With inputs and outputs exchanged and rotated by 180 degrees: the filters of the gradient's convolution.
  Filters turned() const {
    return {data + 2 * line + 2 * tap, outputs, inputs, output_step, input_step, -line, -tap};
  }

  // One tap of 16 inputs (one vector each) and 16 outputs (lanes); zeros after the last.
  INLINE void block(const float* from, int64_t input, int64_t output, Floats to[16]) const {
    const int64_t rows = std::min(LANES, inputs - input), columns = std::min(LANES, outputs - output);
    from += input * input_step + output * output_step;
    if (input_step == 1 || output_step == 1) {  // vectors along the axis that is contiguous
      const bool turn = output_step != 1;
      const int64_t step = turn ? output_step : input_step, count = turn ? columns : rows;
      const __mmask16 lanes = lanes_of(turn ? rows : columns);
      for (int i = 0; i < LANES; ++i) {
        to[i] = i < count ? (Floats)_mm512_maskz_loadu_ps(lanes, from + i * step) : Floats{};
        prefetch(from + LANES * input_step + i * step);
      }
      if (turn) exchange<8>(to), exchange<4>(to), exchange<2>(to), exchange<1>(to);
    } else {
      for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < LANES; ++j)
          to[i][j] = i < rows && j < columns ? from[i * input_step + j * output_step] : 0.0f;
    }
  }

  // G w G^T of `chunks` of outputs and `count` (even) inputs from `first` on, to [position][chunk][input / 2][output]
  // pairs.
  void transform(int64_t first, int64_t count, int64_t output, int64_t chunks, int32_t* to, int64_t step) const {
    const int64_t blocks = (count + LANES - 1) / LANES;
    for (int64_t b = 0; b < blocks * chunks; ++b) {  // along what is contiguous in memory
      const int64_t k = (output_step == 1 ? b / chunks : b % blocks) * LANES;
      const int64_t z = output_step == 1 ? b % chunks : b / blocks;
      Floats taps[9][16];
      for (int i = 0; i < 9; ++i) block(data + i / 3 * line + i % 3 * tap, first + k, output + z * LANES, taps[i]);
      for (int64_t pair = 0; 2 * pair < std::min(LANES, count - k); ++pair) {
        Floats u[2][4][4];
        for (int half = 0; half < 2; ++half) {
          Floats g[3][3];
          for (int i = 0; i < 9; ++i) g[i / 3][i % 3] = taps[i][2 * pair + half];
          along_both(filter_transform, g, u[half]);
        }
        for (int p = 0; p < POSITIONS; ++p)
          _mm512_storeu_si512(to + (p * chunks + z) * step + (k / 2 + pair) * LANES,
                              joined((__m256i)rounded(u[0][p / 4][p % 4]), (__m256i)rounded(u[1][p / 4][p % 4])));
      }
    }
  }
};

// A convolution, and how it uses caches: each thread takes one block of tile rows after another and multiplies its
// transformed input by one group of up to 3 chunks of outputs after another. Long sums are split by inputs.
struct Convolution {
  Images im;
  Filters w;
  int64_t all_chunks, parts, part, row_shares, chunk_shares, rows, slices, groups;
  int64_t input_step, filter_step, filter_group, slice_step;
  bool kept, backward;

  Convolution(Images images, Filters filters, bool is_backward, int64_t threads)
      : im(images), w(filters), backward(is_backward) {
    all_chunks = round_up(w.outputs, LANES) / LANES;
    parts = w.inputs > LONG ? (w.inputs + PART - 1) / PART : 1;
    part = round_up((w.inputs + parts - 1) / parts, LANES);
    // Strides between positions avoid multiples of 4096 bytes, which map to the same lines of a cache.
    filter_step = part / 2 * LANES + LANES;
    filter_group = filter_step * POSITIONS * AT_ONCE;
    slice_step = SLICE * AT_ONCE * LANES + LANES;
    kept = parts == 1 && filter_step * POSITIONS * all_chunks * 4 <= KEPT_BYTES;
    // Threads divide the tiles, and each transforms all filters; or they divide the outputs, and each transforms all
    // inputs. A filter (of one input channel and one output) costs 3 times a tile, once per block of tiles.
    const bool by_tiles = (kept ? im.tile_rows() * im.tiles_in_row() : BLOCK) >= 3 * w.outputs;
    row_shares = by_tiles ? std::min(threads, im.tile_rows()) : 1;
    chunk_shares = by_tiles ? 1 : std::min(threads, all_chunks);
    groups = groups_of((all_chunks + chunk_shares - 1) / chunk_shares);
    rows = std::max<int64_t>(1, (kept ? SLICE : BLOCK) / im.tiles_in_row());
    rows = std::min(rows, (im.tile_rows() + row_shares - 1) / row_shares);
    slices = (rows * im.tiles_in_row() + SLICE - 1) / SLICE;
    input_step = slices * SLICE * part / 2 + LANES;
  }
  static int64_t groups_of(int64_t chunks) { return (chunks + AT_ONCE - 1) / AT_ONCE; }

  int64_t threads() const { return row_shares * chunk_shares; }
  // Scratch memory per thread, in units of 4 bytes.
  int64_t input_words() const { return POSITIONS * input_step; }
  int64_t filter_words() const { return filter_group * (kept ? groups : 1); }
  int64_t sum_words() const { return POSITIONS * slice_step * (parts == 1 ? 1 : slices * groups); }
  int64_t words() const { return input_words() + filter_words() + sum_words(); }

  // A thread's share of the output y. With a pool, `place` is an output; backward, it belongs to x.
  void run(int64_t thread, const bfloat16* x, const float* bias, bfloat16* y, uint8_t* place, int32_t* scratch) const {
    int32_t *input = scratch + thread * words(), *filters = input + input_words();
    float* sums = (float*)(filters + filter_words());
    const int64_t row_share = thread % row_shares, chunk_share = thread / row_shares, all_rows = im.tile_rows();
    const int64_t first_row = all_rows * row_share / row_shares, end_row = all_rows * (row_share + 1) / row_shares;
    const int64_t first_chunk = all_chunks * chunk_share / chunk_shares;
    const int64_t own_chunks = all_chunks * (chunk_share + 1) / chunk_shares - first_chunk;
    const int64_t own_groups = groups_of(own_chunks);
    for (int64_t row = first_row; row < end_row; row += rows) {
      const int64_t rows_here = std::min(rows, end_row - row), tiles = rows_here * im.tiles_in_row();
      for (int64_t p = 0; p < parts; ++p) {
        const int64_t first = p * part, inputs = std::min(part, w.inputs - first);
        if (place && backward)
          transform_inputs<true>(x, place, row, rows_here, first, inputs, input);
        else
          transform_inputs<false>(x, nullptr, row, rows_here, first, inputs, input);
        for (int64_t group = 0; group < own_groups; ++group) {
          const int64_t chunk = first_chunk + own_chunks * group / own_groups;
          const int64_t chunks = first_chunk + own_chunks * (group + 1) / own_groups - chunk;
          int32_t* filter = filters + (kept ? group * filter_group : 0);
          if (!kept || row == first_row) w.transform(first, round_up(inputs, 2), chunk * LANES, chunks, filter, filter_step);
          for (int64_t slice = 0; slice * SLICE < tiles; ++slice) {
            const int64_t tile = slice * SLICE, count = std::min(SLICE, tiles - tile);
            float* sum = sums + (parts == 1 ? 0 : (group * slices + slice) * POSITIONS * slice_step);
            uint8_t* const result = backward ? nullptr : place;
            if (p == parts - 1)
              for (int64_t t = tile; t < tile + count; ++t)
                for (int i = 0; i < (result ? 1 : 4); ++i) {
                  const bfloat16* to = y + (result ? window(row, t) : pixel(row, t, i)) + chunk * LANES;
                  __builtin_prefetch(to, 1), __builtin_prefetch(to + chunks * LANES - 1, 1);
                }
            const int32_t* from = input + tile * part / 2;
            const int64_t pairs = (inputs + 1) / 2;
            if (chunks == 3) multiply<8, 3>(from, filter, count, pairs, p > 0, sum);
            if (chunks == 2) multiply<12, 2>(from, filter, count, pairs, p > 0, sum);
            if (chunks == 1) multiply<12, 1>(from, filter, count, pairs, p > 0, sum);
            if (p == parts - 1)
              for (int64_t t = 0; t < count; ++t)
                for (int64_t z = 0; z < chunks; ++z)
                  transform_output(sum + (t * chunks + z) * LANES, row, tile + t, (chunk + z) * LANES, bias, y, result);
          }
        }
      }
    }
  }

  // The offset of one of the four pixels of a tile's output; tiles count from the start of tile row `row`.
  INLINE int64_t pixel(int64_t row, int64_t tile, int i) const {
    const int64_t in_row = im.tiles_in_row();
    return (((row + tile / in_row) * 2 + i / 2) * im.width + tile % in_row * 2 + i % 2) * w.outputs;
  }

  // The offset of a tile's pixel in the pool's output.
  INLINE int64_t window(int64_t row, int64_t tile) const { return (row * im.tiles_in_row() + tile) * w.outputs; }

  template <bool POOLED>
  void transform_inputs(const bfloat16* x, const uint8_t* place, int64_t row, int64_t count, int64_t first,
                        int64_t inputs, int32_t* to) const {
    const int64_t step = input_step, tile_step = part / 2;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < inputs; c += LANES) {
        int32_t* start = to + r * im.tiles_in_row() * tile_step + c / 2;
        transform_input<POOLED>(
            x, place, im, row + r, first + c, lanes_of(inputs - c),
            [=](int64_t tile, const Floats* all) INLINE_LAMBDA {
              for (int p = 0; p < POSITIONS; ++p)
                _mm256_storeu_si256((__m256i*)(start + tile * tile_step + p * step), (__m256i)rounded(all[p]));
            });
      }
  }

  // The 16 products of a slice of tiles and a group of chunks. Sums of rows that only fill the last panel are not used.
  template <int ROWS, int CHUNKS>
  void multiply(const int32_t* input, const int32_t* filter, int64_t tiles, int64_t pairs, bool add, float* sum) const {
    for (int64_t p = 0; p < POSITIONS; ++p)
      for (int64_t tile = 0; tile < tiles; tile += ROWS)
        product<ROWS, CHUNKS>(input + p * input_step + tile * part / 2, part / 2, 1, filter + p * filter_step * CHUNKS,
                              filter_step, pairs, sum + p * slice_step + tile * CHUNKS * LANES, CHUNKS * LANES, LANES,
                              add);
  }

  // A^T m A + bias of one tile and chunk; with `place`, the largest of its four pixels, the first of equals. As in
  // PyTorch's pool after its convolution, pixels are rounded before they are compared, and a NaN is the largest.
  INLINE void transform_output(const float* m, int64_t row, int64_t tile, int64_t channel, const float* bias,
                               bfloat16* y, uint8_t* place) const {
    const __mmask16 lanes = lanes_of(w.outputs - channel);
    const Floats shift = bias ? (Floats)_mm512_maskz_loadu_ps(lanes, bias + channel) : Floats{};
    Floats sum[4][4], out[2][2];
    for (int p = 0; p < POSITIONS; ++p) sum[p / 4][p % 4] = (Floats)_mm512_loadu_ps(m + p * slice_step);
    along_both(output_transform, sum, out);
    if (!place) {
      for (int i = 0; i < 4; ++i)
        _mm256_mask_storeu_epi16(y + pixel(row, tile, i) + channel, lanes, (__m256i)rounded(out[i / 2][i % 2] + shift));
      return;
    }
    __m512 best = (__m512)as_stored(out[0][0] + shift);
    __m512i where = _mm512_setzero_si512();
    for (int i = 1; i < 4; ++i) {
      const __m512 value = (__m512)as_stored(out[i / 2][i % 2] + shift);
      const __mmask16 nans = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      const __mmask16 wins = nans | _mm512_cmp_ps_mask(value, best, _CMP_GT_OQ);
      best = _mm512_mask_mov_ps(best, wins, value);
      where = _mm512_mask_mov_epi32(where, wins, _mm512_set1_epi32(i));
    }
    const int64_t at = window(row, tile) + channel;
    _mm256_mask_storeu_epi16(y + at, lanes, (__m256i)rounded((Floats)best));
    _mm512_mask_cvtepi32_storeu_epi8(place + at, lanes, where);
  }
};

// The gradient of the filters, and how it uses caches: each thread takes one group of output channels after another,
// whose sums stay in cache, and for each group all tiles, one block of rows after another. So x is transformed again
// for each group and thread, which costs less than threads that wait for each other. Both transforms are stored as
// [position][chunk][tile / 2][channel] pairs of tiles.
struct FilterGradient {
  Images x, dy;
  int64_t threads, x_chunks, dy_chunks, rows, group, chunk_step, x_step, dy_step, sum_step;

  FilterGradient(Images inputs, Images outputs, int64_t wanted_threads) : x(inputs), dy(outputs) {
    x_chunks = round_up(x.channels, LANES) / LANES, dy_chunks = round_up(dy.channels, LANES) / LANES;
    threads = std::min(wanted_threads, dy_chunks);
    rows = round_up(std::max<int64_t>(1, std::min(x.tile_rows(), GRAD_TILES / x.tiles_in_row())), 2);
    const int64_t chunk_bytes = POSITIONS * x_chunks * LANES * LANES * 4;
    group = std::min((dy_chunks + threads - 1) / threads, std::max<int64_t>(1, GRAD_BYTES / chunk_bytes));
    chunk_step = rows * x.tiles_in_row() / 2 * LANES;
    x_step = chunk_step * x_chunks + LANES, dy_step = chunk_step * group + LANES;
    sum_step = x_chunks * group * LANES * LANES + LANES;
  }
  int64_t words() const { return POSITIONS * (x_step + dy_step + sum_step); }  // of scratch memory per thread

  // A thread's share of both gradients.
  void run(int64_t thread, const bfloat16* x_data, const bfloat16* dy_data, const uint8_t* place, float* grad_weight,
           float* grad_bias, int32_t* scratch) const {
    int32_t *x_tiles = scratch + thread * words(), *dy_tiles = x_tiles + POSITIONS * x_step;
    float* sums = (float*)(dy_tiles + POSITIONS * dy_step);
    const int64_t end = std::min(dy_chunks * (thread + 1) / threads * LANES, dy.channels);
    for (int64_t first = dy_chunks * thread / threads * LANES; first < end; first += group * LANES) {
      const int64_t outputs = std::min(group * LANES, end - first);
      std::fill(grad_bias + first, grad_bias + first + outputs, 0.0f);
      for (int64_t row = 0; row < x.tile_rows(); row += rows) {
        const int64_t rows_here = round_up(std::min(rows, x.tile_rows() - row), 2);
        for (int64_t r = 0; r < rows_here; ++r)
          if (place)
            transform<true>(x_data, dy_data, place, row, r, first, outputs, x_tiles, dy_tiles, grad_bias);
          else
            transform<false>(x_data, dy_data, place, row, r, first, outputs, x_tiles, dy_tiles, grad_bias);
        multiply(x_tiles, dy_tiles, outputs, rows_here * x.tiles_in_row() / 2, row > 0, sums);
      }
      for (int64_t o = 0; o < outputs; ++o)
        for (int64_t chunk = 0; chunk < x_chunks; ++chunk)
          transform_back(sums + (chunk * group * LANES + o) * LANES, first + o, chunk * LANES, grad_weight);
    }
  }

  // The 16 products of a block: outputs are the rows, inputs the lanes; the sum is over pairs of tiles.
  void multiply(const int32_t* x_tiles, const int32_t* dy_tiles, int64_t outputs, int64_t pairs, bool add,
                float* sums) const {
    const int64_t strips = (x_chunks + AT_ONCE - 1) / AT_ONCE;
    for (int64_t p = 0; p < POSITIONS; ++p)
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t chunk = x_chunks * strip / strips, chunks = x_chunks * (strip + 1) / strips - chunk;
        for (int64_t o = 0; o < outputs; o += 8)
          (chunks == 3 ? product<8, 3> : chunks == 2 ? product<8, 2> : product<8, 1>)(
              dy_tiles + p * dy_step + o / LANES * chunk_step + o % LANES, 1, LANES,
              x_tiles + p * x_step + chunk * chunk_step, chunk_step, pairs,
              sums + p * sum_step + (chunk * group * LANES + o) * LANES, LANES, group * LANES * LANES, add);
      }
  }

  // Both transforms of tile row `first_row` + r; zeros if that is after the last row, to pair with an odd one.
  template <bool POOLED>
  void transform(const bfloat16* x_data, const bfloat16* dy_data, const uint8_t* place, int64_t first_row, int64_t r,
                 int64_t first, int64_t outputs, int32_t* x_tiles, int32_t* dy_tiles, float* grad_bias) const {
    const bool there = first_row + r < x.tile_rows();
    const int64_t row = there ? first_row + r : first_row, first_tile = r * x.tiles_in_row();
    // An even tile stores its values in the first half of the pair's memory; the odd one joins them to its own.
    const auto pairs_at = [=](int32_t* start, int64_t step) INLINE_LAMBDA {
      return [=](int64_t tile, const Floats* all) INLINE_LAMBDA {
        int32_t* to = start + (first_tile + tile) / 2 * LANES;
        if ((first_tile + tile) % 2 == 0)
          for (int p = 0; p < POSITIONS; ++p) _mm256_storeu_si256((__m256i*)(to + p * step), (__m256i)rounded(all[p]));
        else
          for (int p = 0; p < POSITIONS; ++p)
            _mm512_storeu_si512(to + p * step, joined(_mm256_loadu_si256((__m256i*)(to + p * step)), (__m256i)rounded(all[p])));
      };
    };
    for (int64_t c = 0; c < x.channels; c += LANES)
      transform_input<false>(x_data, nullptr, x, row, c, there ? lanes_of(x.channels - c) : 0,
                             pairs_at(x_tiles + c / LANES * chunk_step, x_step));
    for (int64_t c = 0; c < outputs; c += LANES) {
      const auto store = pairs_at(dy_tiles + c / LANES * chunk_step, dy_step);
      Floats sum = {};
      transform_gradient<POOLED>(dy_data, place, dy, row, first + c, there ? lanes_of(outputs - c) : 0,
                                 [=, &sum](int64_t tile, const Floats* all) INLINE_LAMBDA {
                                   sum += all[5];  // A dy A^T holds the sum of its tile there
                                   store(tile, all);
                                 });
      for (int64_t i = 0; i < std::min(LANES, outputs - c); ++i) grad_bias[first + c + i] += sum[i];
    }
  }

  // G^T m G of one output and a chunk of inputs.
  INLINE void transform_back(const float* m, int64_t output, int64_t input, float* grad_weight) const {
    Floats sum[4][4], g[3][3];
    for (int p = 0; p < POSITIONS; ++p) sum[p / 4][p % 4] = (Floats)_mm512_loadu_ps(m + p * sum_step);
    along_both(filter_transform_back, sum, g);
    for (int i = 0; i < 9; ++i)
      _mm512_mask_storeu_ps(grad_weight + (output * 9 + i) * x.channels + input, lanes_of(x.channels - input),
                            (__m512)g[i / 3][i % 3]);
  }
};

// A shape is {images, height, width, inputs, outputs, and the filters' strides of inputs, outputs, lines and taps}.
Convolution convolution(const int64_t* s, const float* weight, bool backward, int64_t threads) {
  const Filters w{weight, s[3], s[4], s[5], s[6], s[7], s[8]}, used = backward ? w.turned() : w;
  return Convolution({s[0], s[1], s[2], used.inputs}, used, backward, threads);
}
FilterGradient filter_gradient(const int64_t* s, int64_t threads) {
  return FilterGradient({s[0], s[1], s[2], s[3]}, {s[0], s[1], s[2], s[4]}, threads);
}

}  // namespace

// Entry points for ctypes; the caller provides scratch memory, as many bytes as the first two return.
extern "C" int64_t winograd_scratch(const int64_t* shape, int64_t backward, int64_t threads) {
  const Convolution conv = convolution(shape, nullptr, backward, threads);
  return conv.words() * conv.threads() * 4;
}

extern "C" int64_t winograd_weights_scratch(const int64_t* shape, int64_t threads) {
  const FilterGradient gradient = filter_gradient(shape, threads);
  return gradient.words() * gradient.threads * 4;
}

// y from x; or backward, the gradient of x (here y) from that of y (here x). With `place`, a 2x2 max-pool follows: y is
// its output (backward, x is the gradient of that), and `place` has the indices of the chosen pixels.
extern "C" void winograd(const int64_t* shape, int64_t backward, int64_t threads, const bfloat16* x,
                         const float* weight, const float* bias, bfloat16* y, uint8_t* place, int32_t* scratch) {
  const Convolution conv = convolution(shape, weight, backward, threads);
#pragma omp parallel for num_threads(conv.threads()) schedule(static, 1)
  for (int64_t thread = 0; thread < conv.threads(); ++thread) conv.run(thread, x, bias, y, place, scratch);
}

// The gradients of filters (o, 3, 3, c) and bias; with `place`, dy is the gradient of a pool's output.
extern "C" void winograd_weights(const int64_t* shape, int64_t threads, const bfloat16* x, const bfloat16* dy,
                                 const uint8_t* place, float* grad_weight, float* grad_bias, int32_t* scratch) {
  const FilterGradient gradient = filter_gradient(shape, threads);
#pragma omp parallel for num_threads(gradient.threads) schedule(static, 1)
  for (int64_t thread = 0; thread < gradient.threads; ++thread)
    gradient.run(thread, x, dy, place, grad_weight, grad_bias, scratch);
}
