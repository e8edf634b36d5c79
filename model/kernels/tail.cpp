// A block after its convolution, in as few passes over memory as it needs: max-pool, batch norm, activation and the
// weighted sum of the branches, forward and backward. model/kernels/tail.py compiles, loads and documents it;
// model/kernels/plain.py has the same function in PyTorch's own operations.
//
// Activations are stored channels last, (n, h, w, L * c), as bfloat16 or float32; all arithmetic is float32. Threads
// share the images; within an image, 16 channels at a time go through vector registers (GCC's and Clang's vector
// types; a processor with narrower registers takes several steps).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#include <omp.h>

#include "common.h"
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define MASKED 1
#endif

namespace {

enum Pool { NO_POOL, POOL_CONV, POOL_BRANCH };
enum Activation { RELU, LEAKY_RELU, GELU, SILU };
constexpr float LEAKY_SLOPE = 0.01f;

// Which lanes are used: all of them, or the first `count`.
struct Whole {};
struct Part {
  int64_t count;
};

template <typename Body>
INLINE void for_lanes(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) body(i, Whole{});
  if (i < count) body(i, Part{count - i});
}

// Read and write lanes. Unused lanes of a part are read as zero and not written.
template <typename Vector, typename T>
INLINE Vector read(const T* from, Whole) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <typename Vector, typename T>
INLINE void write(T* to, Vector value, Whole) {
  std::memcpy(to, &value, sizeof value);
}
#ifdef MASKED
INLINE __mmask16 mask_of(Part part) { return __mmask16((1u << part.count) - 1); }
template <typename Vector>
INLINE Vector read(const float* from, Part part) {
  return (Vector)_mm512_maskz_loadu_ps(mask_of(part), from);
}
template <typename Vector>
INLINE Vector read(const bfloat16* from, Part part) {
  return (Vector)_mm256_maskz_loadu_epi16(mask_of(part), from);
}
template <typename Vector>
INLINE Vector read(const uint8_t* from, Part part) {
  return (Vector)_mm_maskz_loadu_epi8(mask_of(part), from);
}
INLINE void write(float* to, Floats value, Part part) { _mm512_mask_storeu_ps(to, mask_of(part), (__m512)value); }
INLINE void write(bfloat16* to, Halves value, Part part) {
  _mm256_mask_storeu_epi16(to, mask_of(part), (__m256i)value);
}
INLINE void write(uint8_t* to, Bytes value, Part part) { _mm_mask_storeu_epi8(to, mask_of(part), (__m128i)value); }
#else
template <typename Vector, typename T>
INLINE Vector read(const T* from, Part part) {
  Vector value = {};
  std::memcpy(&value, from, part.count * sizeof(T));
  return value;
}
template <typename Vector, typename T>
INLINE void write(T* to, Vector value, Part part) {
  std::memcpy(to, &value, part.count * sizeof(T));
}
#endif

template <typename Lanes>
INLINE Floats load(const float* from, Lanes lanes) {
  return read<Floats>(from, lanes);
}
template <typename Lanes>
INLINE Floats load(const bfloat16* from, Lanes lanes) {
  return widened(read<Halves>(from, lanes));
}
template <typename Lanes>
INLINE void store(float* to, Floats value, Lanes lanes) {
  write(to, value, lanes);
}
template <typename Lanes>
INLINE void store(bfloat16* to, Floats value, Lanes lanes) {
  write(to, rounded(value), lanes);
}

// The value as it is after storing and loading.
INLINE Floats as_stored(const float*, Floats value) { return value; }
INLINE Floats as_stored(const bfloat16*, Floats value) { return widened(rounded(value)); }

INLINE Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffff); }

// e^x to 2e-7 for x <= 0, by 2^k and a polynomial from Cephes; e^-87 below -87.
INLINE Floats exp_of(Floats x) {
  x = x < -87.0f ? x * 0.0f - 87.0f : x;
  constexpr float MAGIC = 12582912.0f;  // adding it leaves a whole number in the lowest bits
  Floats shifted = x * 1.44269504f + MAGIC, k = shifted - MAGIC;
  Floats r = x - k * 0.693359375f + k * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (Floats)(((Words)shifted + 127u) << 23);
}

// The activation and its derivative.
template <int ACTIVATION>
INLINE void activate(Floats z, Floats& y, Floats& slope) {
  const Floats zero = z * 0.0f, one = zero + 1.0f;  // a NaN stays a NaN
  if (ACTIVATION == RELU) {
    y = z > 0.0f ? z : zero;
    slope = z > 0.0f ? one : zero;
  } else if (ACTIVATION == LEAKY_RELU) {
    slope = z > 0.0f ? one : zero + LEAKY_SLOPE;
    y = z * slope;
  } else if (ACTIVATION == GELU) {  // z Phi(z), erf by Abramowitz and Stegun 7.1.26, to 1.5e-7
    Floats e = exp_of(z * z * -0.5f);
    Floats t = 1.0f / (magnitude(z) * (0.3275911f * 0.70710678f) + 1.0f);
    Floats poly = t * 1.061405429f - 1.453152027f;
    poly = poly * t + 1.421413741f;
    poly = poly * t - 0.284496736f;
    poly = poly * t + 0.254829592f;
    Floats half = poly * t * e * 0.5f, phi = z > 0.0f ? 1.0f - half : half;
    y = z * phi;
    slope = phi + z * e * 0.39894228f;
  } else {
    Floats e = exp_of(-magnitude(z));
    Floats sigmoid = (z > 0.0f ? one : e) / (e + 1.0f);
    y = z * sigmoid;
    slope = sigmoid * (z - y + 1.0f);
  }
}

INLINE float sum_of(Floats x) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += x[i];
  return total;
}

INLINE void add_to(float* to, Floats value) { write(to, read<Floats>(to, Whole{}) + value, Whole{}); }

struct Shape {
  int64_t images, height, width, groups, channels;  // of the convolution's output; channels of one group
  int64_t all() const { return groups * channels; }
  int64_t pixels() const { return height * width; }
};

// The four pixels of a pooling window, in the order in which PyTorch looks for the first largest.
struct Window {
  int64_t pixel[4];
  Window(int64_t number, int64_t width) {
    int64_t half = std::max<int64_t>(width / 2, 1), first = number / half * 2 * width + number % half * 2;
    pixel[0] = first, pixel[1] = first + 1, pixel[2] = first + width, pixel[3] = first + width + 1;
  }
};

// The largest of four and its index. As in PyTorch, the first of equals wins, and a NaN wins over all.
struct Largest {
  Floats best;
  Ints where;
  INLINE explicit Largest(Floats first) : best(first), where{} {}
  INLINE void see(Floats next, int number) {
    Ints wins = (next > best) | (next != next);
    best = wins ? next : best;
    where = wins ? where * 0 + number : where;
  }
};

template <typename T, typename Lanes>
INLINE Largest largest_of(const T* image, const Window& window, int64_t all, Lanes lanes) {
  Largest found(load(image + window.pixel[0] * all, lanes));
  for (int k = 1; k < 4; ++k) found.see(load(image + window.pixel[k] * all, lanes), k);
  return found;
}

template <typename Lanes>
INLINE Ints places(const uint8_t* from, Lanes lanes) {
  return __builtin_convertvector(read<Bytes>(from, lanes), Ints);
}

// Arrays of channels have one extra vector, so whole vectors can be read and added to at their ends.
typedef std::vector<float> Channels;
Channels channels_of(int64_t count) { return Channels(count + LANES, 0.0f); }

// The norm as one factor and one summand per channel.
struct Affine {
  Channels scale, shift;
  Affine(int64_t all, const float* gamma, const float* beta, const float* mean, const float* inverse)
      : scale(channels_of(all)), shift(channels_of(all)) {
    for (int64_t i = 0; i < all; ++i) scale[i] = gamma[i] * inverse[i], shift[i] = beta[i] - mean[i] * scale[i];
  }
};

// Two sums per channel, one pair of rows per thread.
struct Sums {
  int64_t all;
  int threads;
  std::vector<double> values;
  Sums(int64_t all, int threads) : all(all), threads(threads), values(threads * 2 * all, 0.0) {}
  void add(int thread, const Channels& first, const Channels& second) {
    double* own = values.data() + thread * 2 * all;
    for (int64_t i = 0; i < all; ++i) own[i] += first[i], own[all + i] += second[i];
  }
  double first(int64_t i) const { return total(i); }
  double second(int64_t i) const { return total(all + i); }

 private:
  double total(int64_t i) const {
    double sum = 0;
    for (int thread = 0; thread < threads; ++thread) sum += values[thread * 2 * all + i];
    return sum;
  }
};

void finish_statistics(const Sums& sums, double count, float epsilon, float momentum, float* mean, float* inverse,
                       float* running_mean, float* running_variance) {
  for (int64_t i = 0; i < sums.all; ++i) {
    double average = sums.first(i) / count, variance = sums.second(i) / count - average * average;
    variance = variance < 0 ? 0 : variance;
    mean[i] = float(average);
    inverse[i] = float(1.0 / std::sqrt(variance + epsilon));
    running_mean[i] += momentum * (float(average) - running_mean[i]);
    running_variance[i] += momentum * (float(variance * count / (count - 1)) - running_variance[i]);
  }
}

template <typename T, int ACTIVATION>
void forward(const Shape& shape, int pool, bool training, int threads, const T* x, const float* gamma,
             const float* beta, const float* weights, float epsilon, float momentum, float* running_mean,
             float* running_variance, T* pooled, uint8_t* place, float* mean, float* inverse, T* out, float* means) {
  const int64_t all = shape.all(), groups = shape.groups, channels = shape.channels;
  const int64_t out_pixels = pool == NO_POOL ? shape.pixels() : shape.pixels() / 4;
  const int64_t normed_pixels = pool == POOL_CONV ? out_pixels : shape.pixels();
  Sums sums(all, threads);
  if (training || pool == POOL_CONV) {
#pragma omp parallel num_threads(threads)
    {
      Channels sum = channels_of(all), square = channels_of(all);
#pragma omp for schedule(static)
      for (int64_t n = 0; n < shape.images; ++n) {
        std::fill(sum.begin(), sum.end(), 0.0f), std::fill(square.begin(), square.end(), 0.0f);
        const T* image = x + n * shape.pixels() * all;
        for (int64_t p = 0; p < normed_pixels; ++p) {
          const int64_t at = (n * normed_pixels + p) * all;
          const Window window(p, shape.width);
          for_lanes(all, [&](int64_t i, auto lanes) INLINE_LAMBDA {
            Floats value;
            if (pool == POOL_CONV) {
              Largest found = largest_of(image + i, window, all, lanes);
              value = found.best;  // one of the stored values, so storing it loses nothing
              store(pooled + at + i, value, lanes);
              write(place + at + i, __builtin_convertvector(found.where, Bytes), lanes);
            } else {
              value = load(image + p * all + i, lanes);
            }
            add_to(sum.data() + i, value);
            add_to(square.data() + i, value * value);
          });
        }
        if (training) sums.add(omp_get_thread_num(), sum, square);
      }
    }
  }
  if (training) {
    finish_statistics(sums, double(shape.images * normed_pixels), epsilon, momentum, mean, inverse, running_mean,
                      running_variance);
  } else {
    for (int64_t i = 0; i < all; ++i)
      mean[i] = running_mean[i], inverse[i] = 1.0f / std::sqrt(running_variance[i] + epsilon);
  }
  const Affine norm(all, gamma, beta, mean, inverse);

#pragma omp parallel num_threads(threads)
  {
    Channels totals = channels_of(channels), image_sums = channels_of(channels);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < shape.images; ++n) {
      std::fill(image_sums.begin(), image_sums.end(), 0.0f);
      const T* image = x + n * shape.pixels() * all;
      for (int64_t p = 0; p < out_pixels; ++p) {
        std::fill(totals.begin(), totals.end(), 0.0f);
        const Window window(p, shape.width);
        for (int64_t g = 0; g < groups; ++g) {
          const float weight = weights[n * groups + g];
          const int64_t at = (n * out_pixels + p) * all + g * channels;
          const T* values = pool == POOL_CONV ? pooled + at : image + p * all + g * channels;
          for_lanes(channels, [&](int64_t i, auto lanes) INLINE_LAMBDA {
            const Floats scale = read<Floats>(norm.scale.data() + g * channels + i, Whole{});
            const Floats shift = read<Floats>(norm.shift.data() + g * channels + i, Whole{});
            Floats y, slope;
            if (pool == POOL_BRANCH) {
              const T* corner = image + g * channels + i;
              activate<ACTIVATION>(load(corner + window.pixel[0] * all, lanes) * scale + shift, y, slope);
              Largest found(y);
              for (int k = 1; k < 4; ++k) {
                activate<ACTIVATION>(load(corner + window.pixel[k] * all, lanes) * scale + shift, y, slope);
                found.see(y, k);
              }
              y = found.best;
              write(place + at + i, __builtin_convertvector(found.where, Bytes), lanes);
            } else {
              activate<ACTIVATION>(load(values + i, lanes) * scale + shift, y, slope);
            }
            add_to(totals.data() + i, y * weight);
          });
        }
        T* to = out + (n * out_pixels + p) * channels;
        for_lanes(channels, [&](int64_t i, auto lanes) INLINE_LAMBDA {
          const Floats total = read<Floats>(totals.data() + i, Whole{});
          store(to + i, total, lanes);
          add_to(image_sums.data() + i, as_stored(to, total));
        });
      }
      for (int64_t i = 0; i < channels; ++i) means[n * channels + i] = image_sums[i] / float(out_pixels);
    }
  }
}

template <typename T, int ACTIVATION>
void backward(const Shape& shape, int pool, int threads, const T* x, const T* pooled, const uint8_t* place,
              const float* gamma, const float* beta, const float* weights, const float* mean, const float* inverse,
              const T* grad_out, const float* grad_means, T* slopes, T* grad_x, float* grad_gamma, float* grad_beta,
              float* grad_weights) {
  const int64_t all = shape.all(), groups = shape.groups, channels = shape.channels;
  const int64_t out_pixels = pool == NO_POOL ? shape.pixels() : shape.pixels() / 4;
  const int64_t normed_pixels = pool == POOL_CONV ? out_pixels : shape.pixels();
  const Affine norm(all, gamma, beta, mean, inverse);
  Sums sums(all, threads);

#pragma omp parallel num_threads(threads)
  {
    Channels sum = channels_of(all), product = channels_of(all), from_mean = channels_of(channels);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < shape.images; ++n) {
      std::fill(sum.begin(), sum.end(), 0.0f), std::fill(product.begin(), product.end(), 0.0f);
      for (int64_t i = 0; i < channels; ++i) from_mean[i] = grad_means[n * channels + i] / float(out_pixels);
      const T* image = x + n * shape.pixels() * all;
      for (int64_t g = 0; g < groups; ++g) {
        const float weight = weights[n * groups + g];
        Floats dot = {};
        for (int64_t p = 0; p < out_pixels; ++p) {
          const T* from = grad_out + (n * out_pixels + p) * channels;
          const int64_t at = (n * out_pixels + p) * all + g * channels;
          const T* values = pool == POOL_CONV ? pooled + at : image + p * all + g * channels;
          const Window window(p, shape.width);
          for_lanes(channels, [&](int64_t i, auto lanes) INLINE_LAMBDA {
            const int64_t channel = g * channels + i;
            // Unused lanes have a gradient of zero, so they add zero to every sum.
            const Floats grad = load(from + i, lanes) + load(from_mean.data() + i, lanes);
            Floats value, y, slope;
            if (pool == POOL_BRANCH) {
              const T* corner = image + channel;
              const Ints where = places(place + at + i, lanes);
              value = load(corner + window.pixel[0] * all, lanes);
              for (int k = 1; k < 4; ++k) value = where == k ? load(corner + window.pixel[k] * all, lanes) : value;
            } else {
              value = load(values + i, lanes);
            }
            activate<ACTIVATION>(value * read<Floats>(norm.scale.data() + channel, Whole{}) +
                                     read<Floats>(norm.shift.data() + channel, Whole{}),
                                 y, slope);
            dot += grad * y;
            const Floats down = grad * weight * slope;
            add_to(sum.data() + channel, down);
            add_to(product.data() + channel, down * value);
            store(slopes + at + i, down, lanes);
          });
        }
        grad_weights[n * groups + g] = sum_of(dot);
      }
      sums.add(omp_get_thread_num(), sum, product);
    }
  }

  const double count = double(shape.images * normed_pixels);
  // grad_x = scale * slope + level + tilt * (x - mean)
  Channels levels = channels_of(all), tilts = channels_of(all), middles = channels_of(all);
  for (int64_t i = 0; i < all; ++i) {
    const double gamma_grad = (sums.second(i) - mean[i] * sums.first(i)) * inverse[i];
    grad_gamma[i] = float(gamma_grad);
    grad_beta[i] = float(sums.first(i));
    tilts[i] = float(-norm.scale[i] * inverse[i] * gamma_grad / count);
    levels[i] = float(-norm.scale[i] * sums.first(i) / count);
    middles[i] = mean[i];
  }

#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < shape.images; ++n) {
    const int64_t image = n * shape.pixels() * all;
    for (int64_t p = 0; p < out_pixels; ++p) {
      const int64_t at = (n * out_pixels + p) * all;
      const Window window(p, shape.width);
      for_lanes(all, [&](int64_t i, auto lanes) INLINE_LAMBDA {
        const Floats scale = read<Floats>(norm.scale.data() + i, Whole{});
        const Floats level = read<Floats>(levels.data() + i, Whole{}), tilt = read<Floats>(tilts.data() + i, Whole{});
        const Floats middle = read<Floats>(middles.data() + i, Whole{});
        const Floats slope = load(slopes + at + i, lanes) * scale;
        if (pool == NO_POOL) {
          store(grad_x + at + i, slope + level + tilt * (load(x + at + i, lanes) - middle), lanes);
        } else if (pool == POOL_CONV) {
          const Ints where = places(place + at + i, lanes);
          const Floats value = slope + level + tilt * (load(pooled + at + i, lanes) - middle), zero = {};
          for (int k = 0; k < 4; ++k)
            store(grad_x + image + window.pixel[k] * all + i, where == k ? value : zero, lanes);
        } else {
          const Ints where = places(place + at + i, lanes);
          for (int k = 0; k < 4; ++k) {
            const int64_t pixel = image + window.pixel[k] * all + i;
            const Floats rest = level + tilt * (load(x + pixel, lanes) - middle);
            store(grad_x + pixel, where == k ? rest + slope : rest, lanes);
          }
        }
      });
    }
  }
}

}  // namespace

// One entry point per dtype and direction; `activation` and the rest are plain numbers, so that ctypes can call it.
#define FOR_ACTIVATION(CALL)               \
  switch (activation) {                    \
    case RELU: CALL(RELU); break;          \
    case LEAKY_RELU: CALL(LEAKY_RELU); break; \
    case GELU: CALL(GELU); break;          \
    default: CALL(SILU);                   \
  }

#define ENTRIES(NAME, T)                                                                                              \
  extern "C" void forward_##NAME(const int64_t* shape, int64_t pool, int64_t activation, int64_t training,            \
                                 int64_t threads, const T* x, const float* gamma, const float* beta,                  \
                                 const float* weights, float epsilon, float momentum, float* running_mean,            \
                                 float* running_variance, T* pooled, uint8_t* place, float* mean, float* inverse,     \
                                 T* out, float* means) {                                                              \
    Shape s{shape[0], shape[1], shape[2], shape[3], shape[4]};                                                        \
    FORWARD_CALL(T)                                                                                                   \
  }                                                                                                                   \
  extern "C" void backward_##NAME(const int64_t* shape, int64_t pool, int64_t activation, int64_t threads,            \
                                  const T* x, const T* pooled, const uint8_t* place, const float* gamma,              \
                                  const float* beta, const float* weights, const float* mean, const float* inverse,   \
                                  const T* grad_out, const float* grad_means, T* slopes, T* grad_x,                   \
                                  float* grad_gamma, float* grad_beta, float* grad_weights) {                         \
    Shape s{shape[0], shape[1], shape[2], shape[3], shape[4]};                                                        \
    BACKWARD_CALL(T)                                                                                                  \
  }

#define FORWARD_ONE(A)                                                                                                \
  forward<Type, A>(s, int(pool), training != 0, int(threads), x, gamma, beta, weights, epsilon, momentum,             \
                   running_mean, running_variance, pooled, place, mean, inverse, out, means)
#define BACKWARD_ONE(A)                                                                                               \
  backward<Type, A>(s, int(pool), int(threads), x, pooled, place, gamma, beta, weights, mean, inverse, grad_out,      \
                    grad_means, slopes, grad_x, grad_gamma, grad_beta, grad_weights)
#define FORWARD_CALL(T) { using Type = T; FOR_ACTIVATION(FORWARD_ONE) }
#define BACKWARD_CALL(T) { using Type = T; FOR_ACTIVATION(BACKWARD_ONE) }

ENTRIES(bfloat16, bfloat16)
ENTRIES(float32, float)
