// Vectors of numbers as wide as this processor's registers, and what the kernels do with them.
//
// The types are the compiler's own (GCC, Clang): -march decides whether AVX-512, AVX2, NEON or SSE
// is made of them. Intrinsics stand only where these types have no word for an instruction, each
// beside plain code that does the same.
//
// Helpers in headers lie in an unnamed namespace: each .cpp compiles its own copy, inlined at will.

#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif
#include "half.h"

namespace flashdraft {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;  // numbers of 32 bits that a vector holds
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

// ---- memory ------------------------------------------------------------------------------------

template <class T> inline T load(const void* from) {  // from any address: vectors need no alignment
    T value;
    memcpy(&value, from, sizeof value);
    return value;
}

template <class T> inline void store(void* to, T value) { memcpy(to, &value, sizeof value); }

constexpr int64_t CACHE_LINE = 64;     // bytes
constexpr int64_t FETCH_AHEAD = 8192;  // bytes; docs/log.md has what other distances gave

// Asks for what will be read FETCH_AHEAD bytes later, into the second cache, so that memory and
// arithmetic overlap. Never faults, wherever it points.
inline void fetch_ahead(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += CACHE_LINE)
        __builtin_prefetch((const char*)p + FETCH_AHEAD + i, 0, 2);  // 0: to read; 2: second cache
}

// Keeps in a register what several products share. Else the compiler may load it for each of them
// again, and loads are what a processor with 16 registers runs out of.
inline void hold(Floats& v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
}

// ---- conversions -------------------------------------------------------------------------------

inline Floats splat(float x) { return Floats{} + x; }  // x in every lane
inline Ints splat(int32_t x) { return Ints{} + x; }

inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

// LANES numbers of float16.
inline Floats load_halves(const uint16_t* p) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    Floats v;
    for (int i = 0; i < LANES; i++) v[i] = half_to_float(p[i]);
    return v;
#endif
}

// ---- arithmetic --------------------------------------------------------------------------------

// Of all lanes.
inline float sum(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX__)
    const __m128 low = _mm256_castps256_ps128((__m256)v);
    const __m128 high = _mm256_extractf128_ps((__m256)v, 1);
    const __m128 four = _mm_add_ps(low, high);
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    float total = v[0];
    for (int i = 1; i < LANES; i++) total += v[i];
    return total;
#endif
}

// In every lane, the sum of the products of its two 16-bit numbers with those of the other.
#if defined(__AVX512BW__)
#define FLASHDRAFT_PAIRS 1
inline Ints add_pairs(Ints a, Ints b) { return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__) && !defined(__AVX512F__)
#define FLASHDRAFT_PAIRS 1
inline Ints add_pairs(Ints a, Ints b) { return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#endif

// sums + the products of bytes: a lane of w holds four unsigned ones, a lane of x four signed ones.
inline Ints add_byte_products(Ints sums, Ints w, Ints x) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
#elif defined(FLASHDRAFT_PAIRS)
    // In 16 bits, the bytes at even and at odd places apart: no sum of two products overflows.
    typedef int16_t Pairs __attribute__((vector_size(LANES * 4)));
    constexpr int32_t EVEN_BYTES = 0x00ff00ff;
    const Pairs even_x = ((Pairs)x << 8) >> 8, odd_x = (Pairs)x >> 8;
    const Ints even = add_pairs(w & EVEN_BYTES, (Ints)even_x);
    const Ints odd = add_pairs((w >> 8) & EVEN_BYTES, (Ints)odd_x);
    return sums + even + odd;
#else
    for (int bit = 0; bit < 32; bit += 8) {
        const Ints unsigned_byte = (w >> bit) & 255;
        const Ints signed_byte = (x << (24 - bit)) >> 24;
        sums += unsigned_byte * signed_byte;
    }
    return sums;
#endif
}

// e^x = 2^n * e^r with |r| <= ln(2) / 2; e^r by the polynomial of Cephes' expf (Moshier). Within 2
// units in the last place.
Floats exp_of(Floats x) {
    constexpr float LOWEST = -87.0f, HIGHEST = 88.0f;  // beyond them e^x is no normal float
    constexpr float LOG2_E = 1.44269504f;
    constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;  // n * LN2_HIGH is exact
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: a float of this size has no fraction
    constexpr int MANTISSA_BITS = 23;

    const Floats not_above = x > HIGHEST ? splat(HIGHEST) : x;
    x = x < LOWEST ? splat(LOWEST) : not_above;

    Floats n = x * LOG2_E + ROUND;  // to the nearest integer, which now lies in the low bits
    const Ints exponent = (Ints)n;
    n -= ROUND;
    const Floats r = (x - n * LN2_HIGH) - n * LN2_LOW;

    Floats y = splat(1.9875691500e-4f);
    for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                              1.6666665459e-1f, 5.0000001201e-1f})
        y = y * r + coefficient;
    y = y * r * r + r + 1.0f;

    return (Floats)((Ints)y + (exponent << MANTISSA_BITS));
}

}  // namespace
}  // namespace flashdraft
