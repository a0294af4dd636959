// Weights into the panels that step.cpp reads, in a format that holds exactly their numbers, or the news that it does not.

#include "linear.h"

namespace {

uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
float float_of(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }

uint16_t to_half(float x) {  // to the nearest, ties to even
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size >= 0x47800000) return uint16_t(sign | 0x7c00);
    if (size < 0x38800000) return uint16_t(sign | (bits_of(float_of(size) + 0.5f) - bits_of(0.5f)));  // subnormal
    return uint16_t(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
}

struct Source {
    const float* weight; int64_t outputs, inputs;
    float operator()(int64_t n, int64_t k) const { return n < outputs ? weight[n * inputs + k] : 0.0f; }  // panels are filled up
};

bool pack_block(const Source& w, bool four, int64_t first, int64_t k, uint8_t* out) {
    uint16_t *scales = (uint16_t*)out, *lows = scales + P;
    uint8_t* numbers = out + (four ? 4 : 2) * P;
    memset(numbers, 0, BLOCK * P / (four ? 2 : 1));
    for (int64_t n = 0; n < P; n++) {
        float low = w(first + n, k), high = low, most = 0;
        for (int64_t i = 0; i < BLOCK; i++) {
            float x = w(first + n, k + i);
            low = std::min(low, x), high = std::max(high, x), most = std::max(most, std::fabs(x));
        }
        scales[n] = to_half(four ? (high - low) / 15 : most / 127);
        const float d = half(scales[n]), base = four ? low : 0.0f;
        if (four && half(lows[n] = to_half(low)) != low) return false;
        for (int64_t i = 0; i < BLOCK; i++) {
            const float x = w(first + n, k + i);
            float q = d == 0 ? 0 : std::nearbyint((x - base) / d);
            q = four ? std::min(std::max(q, 0.0f), 15.0f) : std::min(std::max(q, -127.0f), 127.0f);
            const float product = q * d;  // exact: 15 or 19 bits
            if (product + base != x) return false;
            const int64_t per = four ? 8 : 4;
            uint8_t* lane = numbers + (i / per * P + n) * 4;
            if (four) lane[i % 8 / 2] |= uint8_t(int(q) << (i % 2 * 4));
            else lane[i % 4] = uint8_t(int8_t(q));
        }
    }
    return true;
}

}  // namespace

// weight: [outputs, inputs]; out: as much as the format takes; scale: of int8, an output each. 0: the format would round.
extern "C" int64_t flashdraft_pack(const float* weight, int64_t format, int64_t outputs, int64_t inputs, uint8_t* out, float* scale) {
    const Source w{weight, outputs, inputs};
    for (int64_t first = 0; first < outputs; first += P) {
        if (format == F32)
            for (int64_t k = 0; k < inputs; k++)
                for (int64_t n = 0; n < P; n++, out += 4) { float x = w(first + n, k); memcpy(out, &x, 4); }
        if (format == BF16)
            for (int64_t k = 0; k < inputs; k += 2)
                for (int64_t n = 0; n < P; n++)
                    for (int64_t i = 0; i < 2; i++, out += 2) {
                        uint32_t bits = bits_of(w(first + n, k + i));
                        if (bits & 0xffff) return 0;
                        uint16_t high = uint16_t(bits >> 16);
                        memcpy(out, &high, 2);
                    }
        if (format == Q8 || format == Q4)
            for (int64_t k = 0; k < inputs; k += BLOCK, out += format == Q4 ? 4 * P + BLOCK * P / 2 : 2 * P + BLOCK * P)
                if (!pack_block(w, format == Q4, first, k, out)) return 0;
        if (format == INT8) {
            for (int64_t n = 0; n < P; n++) {
                float most = 0;
                for (int64_t k = 0; k < inputs; k++) most = std::max(most, std::fabs(w(first + n, k)));
                for (int64_t k = 0; k < inputs; k++)
                    out[(k / 4 * P + n) * 4 + k % 4] = uint8_t(128 + (most == 0 ? 0 : int(std::nearbyint(w(first + n, k) / (most / 127)))));
                scale[n] = most / 127;
            }
            out += P * inputs, scale += P;
        }
    }
    return 1;
}
