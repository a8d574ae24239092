// Vectors of 16 numbers, of which the compiler makes what the processor has; bfloat16 is read as
// float32 and rounded to. What the project has in C++ includes this.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats4 __attribute__((vector_size(16)));

template <class T> inline T load(const void *from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class T> inline void store(void *to, T value) { std::memcpy(to, &value, sizeof value); }

template <class To, class From> inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// 16 numbers of 16 bits in memory as 16 of 32, and back. Compilers take the generic form apart.
inline Words words_of(const uint16_t *from) {
#if defined(__AVX512F__)
  return bits<Words>(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)));
#elif defined(__AVX2__)
  const __m256i halves[2] = {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)),
                             _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(from + 8)))};
  return load<Words>(halves);
#else
  return __builtin_convertvector(load<Halves>(from), Words);
#endif
}

inline Halves halves_of(Words words) {
#if defined(__AVX512F__)
  return bits<Halves>(_mm512_cvtepi32_epi16(bits<__m512i>(words)));
#else
  return __builtin_convertvector(words, Halves);
#endif
}

inline Floats read(const float *from) { return load<Floats>(from); }
inline Floats read(const uint16_t *from) { return bits<Floats>(words_of(from) << 16); }

inline Halves narrowed(Floats x) { // to the nearest, ties to even
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  return bits<Halves>(_mm512_cvtneps_pbh(bits<__m512>(x)));
#else
  const Words word = bits<Words>(x);
  return halves_of((word + 0x7fff + ((word >> 16) & 1)) >> 16);
#endif
}

inline void write(float *to, Floats x) { store(to, x); }
inline void write(uint16_t *to, Floats x) { store(to, narrowed(x)); }

inline float single(float x) { return x; }
inline float single(uint16_t x) { return bits<float>(uint32_t(x) << 16); }

inline void write_one(float *to, float x) { *to = x; }
inline void write_one(uint16_t *to, float x) {
  const uint32_t word = bits<uint32_t>(x);
  *to = uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// The exponential of numbers up to 80; below -87 it is about 1e-38, not 0.
inline Floats exponential(Floats x) {
  const Floats lowest = Floats{} - 87.0f;
  x = x > lowest ? x : lowest;
  const Floats magic = Floats{} + 12582912.0f; // adding it rounds to an integer
  const Floats shifted = x * 1.44269504f + magic, n = shifted - magic;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  return bits<Floats>(bits<Words>(p) + (bits<Words>(shifted) << 23));
}

#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (Words){__VA_ARGS__})
#endif
#define EACH_LANE(of) of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7), of(8), of(9), of(10), \
    of(11), of(12), of(13), of(14), of(15)

template <int distance> void exchange(Words *rows) {
#define FIRST(lane) ((lane) & distance ? LANES + (lane) - distance : (lane))
#define SECOND(lane) ((lane) & distance ? LANES + (lane) : (lane) + distance)
  for (int i = 0; i < LANES; ++i)
    if (!(i & distance)) {
      const Words a = rows[i], b = rows[i + distance];
      rows[i] = PICK(a, b, EACH_LANE(FIRST));
      rows[i + distance] = PICK(a, b, EACH_LANE(SECOND));
    }
#undef FIRST
#undef SECOND
}

// (16, 16) numbers of 32 bits.
inline void transpose(Words *rows) {
  exchange<8>(rows);
  exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
}

inline float largest(Floats v) {
  float peak = v[0];
  for (int i = 1; i < LANES; ++i) peak = std::max(peak, v[i]);
  return peak;
}

inline float total(Floats v) {
  Floats8 eight[2];
  std::memcpy(eight, &v, sizeof v);
  const Floats8 sum8 = eight[0] + eight[1];
  Floats4 four[2];
  std::memcpy(four, &sum8, sizeof sum8);
  const Floats4 sum = four[0] + four[1];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

} // namespace
