// Rows of a linear's input in 8 bits, for weights of the format INT8.
//
// A row is cut into blocks of 32 numbers, each with a scale of its own: a number that stands out
// makes only its own block coarse.

#pragma once
#include <cmath>
#include <cstdint>
#include "formats.h"

namespace flashdraft {
namespace {

// x[i] * scale is the number. start: where a sum of products with this block begins. The weights
// have UNSIGNED added to each, so it is the negative of what that adds to the sum.
struct Block8 {
    int8_t x[BLOCK];
    float scale;
    int32_t start;
};

// Of BLOCK numbers, in halves, which the compiler makes vectors of.
inline float largest_size(const float* x) {
    float sizes[BLOCK];
    for (int i = 0; i < BLOCK; i++) sizes[i] = std::fabs(x[i]);
    for (int half = BLOCK / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            sizes[i] = sizes[i] > sizes[i + half] ? sizes[i] : sizes[i + half];
    return sizes[0];
}

inline void quantise_block(const float* x, Block8* out) {
    constexpr int32_t SHIFT = 128;  // makes numbers positive, for which cutting off rounds down
    const float most = largest_size(x);
    const float inverse = most > 0 ? 127 / most : 0;

    int32_t sum = 0;
    for (int i = 0; i < BLOCK; i++) {
        const int32_t nearest = int32_t(x[i] * inverse + (SHIFT + 0.5f)) - SHIFT;
        sum += nearest;
        out->x[i] = int8_t(nearest);
    }
    out->scale = most / 127;
    out->start = -UNSIGNED * sum;
}

// count: numbers of all rows.
inline void quantise_rows(const float* x, int64_t count, Block8* out) {
    for (int64_t i = 0; i < count; i += BLOCK, out++) quantise_block(x + i, out);
}

}  // namespace
}  // namespace flashdraft
