// What a layer does to single vectors: norms and rotary positions.

#pragma once
#include <cmath>
#include <cstdint>
#include "vectors.h"

namespace flashdraft {
namespace {

// y may be x. size: a multiple of LANES.
inline void rms_norm(const float* x, const float* weight, int64_t size, float eps, float* y) {
    Floats squares = {};
    for (int64_t i = 0; i < size; i += LANES) squares += load<Floats>(x + i) * load<Floats>(x + i);

    const float scale = 1 / std::sqrt(sum(squares) / size + eps);
    for (int64_t i = 0; i < size; i += LANES)
        store(y + i, load<Floats>(x + i) * scale * load<Floats>(weight + i));
}

// Number i of a head turns together with the one half a head behind it. cos, sin: [head_dim]; the
// minus of the first half's sine lies in the table (layers.py).
inline void rotate(float* x, const float* cos, const float* sin, int64_t head_dim) {
    const int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] + b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

}  // namespace
}  // namespace flashdraft
