// float16 and float32 into each other in plain code, for packing and for processors without F16C.
//
//   float16  | sign 1 | exponent 5, biased by 15  | mantissa 10 |
//   float32  | sign 1 | exponent 8, biased by 127 | mantissa 23 |
//
// Does not know infinities on the way to float32: pack.cpp refuses a weight that would need them.

#pragma once
#include <cstdint>
#include <cstring>

namespace flashdraft {
namespace {

constexpr int MORE_MANTISSA = 23 - 10;  // bits
constexpr uint16_t INFINITE_HALF = 0x7c00;

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// Exact, subnormals too.
inline float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16;
    const uint32_t size = uint32_t(half & 0x7fff) << MORE_MANTISSA;
    const float magnitude = float_of(size) * 0x1p112f;  // 112: from the one bias to the other
    return float_of(bits_of(magnitude) | sign);
}

inline bool is_finite(uint16_t half) { return (half & INFINITE_HALF) != INFINITE_HALF; }

// To the nearest, ties to even.
inline uint16_t float_to_half(float x) {
    constexpr uint32_t TOO_LARGE = 0x47800000;     // 2^16: infinite from here on
    constexpr uint32_t LEAST_NORMAL = 0x38800000;  // 2^-14
    constexpr uint32_t REBIAS = uint32_t(127 - 15) << 23;

    const uint32_t bits = bits_of(x);
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t size = bits & 0x7fffffff;
    if (size >= TOO_LARGE) return uint16_t(sign | INFINITE_HALF);

    if (size < LEAST_NORMAL) {  // beside 0.5 a float's last bit is worth 2^-24, as a subnormal's is
        const uint32_t steps = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
        return uint16_t(sign | steps);
    }

    const uint32_t odd = size >> MORE_MANTISSA & 1;
    const uint32_t rounded = size - REBIAS + 0xfff + odd;  // 0xfff: just under half of a last bit
    return uint16_t(sign | rounded >> MORE_MANTISSA);
}

}  // namespace
}  // namespace flashdraft
