// DFlash 2's convolutions along a row's nodes (convolution.py has the formulas), token by token.

#pragma once
#include <cstdint>
#include "vectors.h"

namespace flashdraft {
namespace {

constexpr int64_t GROUP_STEP = 16;  // channels: a group has a multiple of them, and of every LANES

// What one token's rows are multiplied with, on one side of a sublayer.
struct Kernel {
    const float* base;   // [taps, hidden]
    const float* added;  // [taps, groups]
    int64_t taps;        // no more than there are nodes up to this one
    int64_t hidden, groups;
};

// LANES channels of a token. x: the channels of its own row; the nodes before it lie before it.
inline Floats convolved(const Kernel& kernel, const float* x, int64_t channel, int64_t group) {
    Floats sum = {};
    for (int64_t tap = 0; tap < kernel.taps; tap++) {
        const float* base = kernel.base + tap * kernel.hidden + channel;
        const Floats weight = load<Floats>(base) + kernel.added[tap * kernel.groups + group];
        sum += weight * load<Floats>(x - tap * kernel.hidden);
    }
    return sum;
}

}  // namespace
}  // namespace flashdraft
