// Weights into the panels that formats.h draws, or the news that a format would round them.

#include <algorithm>
#include <cmath>
#include "formats.h"
#include "half.h"
#include "interface.h"

namespace flashdraft {
namespace {

struct Weight {
    const float* numbers;
    int64_t outputs, inputs;

    // The last panel is filled up with zeros.
    float at(int64_t output, int64_t input) const {
        return output < outputs ? numbers[output * inputs + input] : 0.0f;
    }
};

template <class T> inline uint8_t* append(uint8_t* out, T value) {
    memcpy(out, &value, sizeof value);
    return out + sizeof value;
}

uint8_t* pack_float32(const Weight& weight, int64_t first, uint8_t* out) {
    for (int64_t k = 0; k < weight.inputs; k++)
        for (int64_t n = 0; n < PANEL; n++) out = append(out, weight.at(first + n, k));
    return out;
}

// null: a number has more bits than that.
uint8_t* pack_bfloat16(const Weight& weight, int64_t first, uint8_t* out) {
    for (int64_t k = 0; k < weight.inputs; k += 2)
        for (int64_t n = 0; n < PANEL; n++)
            for (int64_t i = 0; i < 2; i++) {
                const uint32_t bits = bits_of(weight.at(first + n, k + i));
                if (bits & 0xffff) return nullptr;
                out = append(out, uint16_t(bits >> 16));
            }
    return out;
}

struct Range {
    float lowest, highest, largest_size;
};

Range range_of(const Weight& weight, int64_t output, int64_t first, int64_t count) {
    const float one = weight.at(output, first);
    Range range{one, one, 0};
    for (int64_t k = first; k < first + count; k++) {
        const float x = weight.at(output, k);
        range.lowest = std::min(range.lowest, x);
        range.highest = std::max(range.highest, x);
        range.largest_size = std::max(range.largest_size, std::fabs(x));
    }
    return range;
}

// The lane of an output's input i of a block.
template <Format F> uint8_t* lane_of(uint8_t* lanes, int64_t output, int64_t i) {
    return lanes + (i / inputs_of_a_lane(F) * PANEL + output) * LANE_BYTES;
}

// The numbers of one output of a block; false: scale and minimum do not give its weights exactly.
template <Format F>
bool pack_numbers(const Weight& weight, int64_t output, int64_t k, float scale, float minimum,
                  uint8_t* lanes) {
    constexpr float LEAST = F == Q4 ? 0 : -127, MOST = F == Q4 ? 15 : 127;
    for (int64_t i = 0; i < BLOCK; i++) {
        const float x = weight.at(output, k + i);
        float number = scale == 0 ? 0 : std::nearbyint((x - minimum) / scale);
        number = std::min(std::max(number, LEAST), MOST);
        const float product = number * scale;  // exact: 11 bits of a scale and 4 or 8 more
        if (product + minimum != x) return false;

        uint8_t* lane = lane_of<F>(lanes, output % PANEL, i);
        if (F == Q4) lane[i % 8 / 2] |= uint8_t(int(number) << (i % 2 * 4));
        else lane[i % 4] = uint8_t(int8_t(number));
    }
    return true;
}

template <Format F>
bool pack_block(const Weight& weight, int64_t first, int64_t k, uint8_t* out) {
    uint16_t* scales = (uint16_t*)out;
    uint16_t* minima = scales + PANEL;
    uint8_t* lanes = out + scale_bytes(F);
    memset(lanes, 0, number_bytes(F));

    for (int64_t n = 0; n < PANEL; n++) {
        const Range range = range_of(weight, first + n, k, BLOCK);
        float minimum = 0;
        if (F == Q4) {
            scales[n] = float_to_half((range.highest - range.lowest) / 15);
            minima[n] = float_to_half(range.lowest);
            minimum = range.lowest;
            if (!is_finite(minima[n]) || half_to_float(minima[n]) != minimum) return false;
        } else {
            scales[n] = float_to_half(range.largest_size / 127);
        }

        if (!is_finite(scales[n])) return false;
        const float scale = half_to_float(scales[n]);
        if (!pack_numbers<F>(weight, first + n, k, scale, minimum, lanes)) return false;
    }
    return true;
}

template <Format F> uint8_t* pack_blocks(const Weight& weight, int64_t first, uint8_t* out) {
    for (int64_t k = 0; k < weight.inputs; k += BLOCK, out += block_bytes(F))
        if (!pack_block<F>(weight, first, k, out)) return nullptr;
    return out;
}

// Rounds: the largest number of an output becomes 127 or -127.
uint8_t* pack_int8(const Weight& weight, int64_t first, uint8_t* out, float* scales) {
    for (int64_t n = 0; n < PANEL; n++) {
        const Range range = range_of(weight, first + n, 0, weight.inputs);
        const float scale = range.largest_size / 127;
        for (int64_t k = 0; k < weight.inputs; k++) {
            int number = 0;
            if (range.largest_size != 0)
                number = int(std::nearbyint(weight.at(first + n, k) / scale));
            lane_of<INT8>(out, n, k)[k % 4] = uint8_t(UNSIGNED + number);
        }
        scales[n] = scale;
    }
    return out + PANEL * weight.inputs;
}

// Where the next panel goes, or null: the format would round this one.
uint8_t* pack_panel(const Weight& weight, int64_t format, int64_t panel, uint8_t* out,
                    float* scales) {
    const int64_t first = panel * PANEL;
    switch (format) {
        case FLOAT32: return pack_float32(weight, first, out);
        case BFLOAT16: return pack_bfloat16(weight, first, out);
        case Q8: return pack_blocks<Q8>(weight, first, out);
        case Q4: return pack_blocks<Q4>(weight, first, out);
        default: return pack_int8(weight, first, out, scales + first);
    }
}

}  // namespace
}  // namespace flashdraft

extern "C" int64_t flashdraft_pack(const float* numbers, int64_t format, int64_t outputs,
                                   int64_t inputs, uint8_t* out, float* scales) {
    using namespace flashdraft;
    const Weight weight{numbers, outputs, inputs};
    for (int64_t panel = 0; panel < num_panels(outputs); panel++) {
        out = pack_panel(weight, format, panel, out, scales);
        if (!out) return 0;
    }
    return 1;
}
