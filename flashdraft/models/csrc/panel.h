// Products of some rows with one panel of a packed weight: a loop for each format of formats.h.
//
// A row's sums run over the inputs in one fixed order, whatever rows lie beside it: these change no
// bit.

#pragma once
#include "formats.h"
#include "interface.h"
#include "rows8.h"
#include "vectors.h"

namespace flashdraft {
namespace {

constexpr int VECTORS = PANEL / LANES;  // of an input's 32 outputs

// Vectors of sums that the registers hold, beside the weights, and beside scales, too.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int SUMS = 16, SUMS_AND_SCALES = 16;  // of 32 registers
#else
constexpr int SUMS = 12, SUMS_AND_SCALES = 10;  // of 16
#endif

constexpr bool has_blocks(Format format) { return format == Q8 || format == Q4; }

// Rows that are multiplied at once, while a number of the panel lies in a register.
constexpr int rows_at_once(Format format) {
    return has_blocks(format) ? SUMS_AND_SCALES / 2 : SUMS / VECTORS;
}

// of[m][v]: of row m, V vectors of a panel's outputs.
template <int M, int V> struct Sums {
    Floats of[M][V];
};

// One input of M rows, which lie row_size apart, times its weights.
template <int M, int V>
inline void add_products(Sums<M, V>& sums, Floats* weights, const float* x, int64_t row_size) {
    for (int v = 0; v < V; v++) hold(weights[v]);
    for (int m = 0; m < M; m++) {
        const Floats input = splat(x[m * row_size]);
        for (int v = 0; v < V; v++) sums.of[m][v] += input * weights[v];
    }
}

// ---- all inputs of a panel ---------------------------------------------------------------------
//
// Each takes V vectors of the panel's outputs, from `first` on.

template <int M, int V>
Sums<M, V> multiply_float32(const Linear& linear, int64_t panel, int first, const float* x) {
    const int64_t inputs = linear.inputs;
    const float* numbers = (const float*)linear.weight + panel * inputs * PANEL + first * LANES;
    Sums<M, V> sums = {};
    Floats weights[V];

    for (int64_t k = 0; k < inputs; k++, numbers += PANEL) {
        fetch_ahead(numbers, V * LANES * LANE_BYTES);
        for (int v = 0; v < V; v++) weights[v] = load<Floats>(numbers + v * LANES);
        add_products<M, V>(sums, weights, x + k, inputs);
    }
    return sums;
}

// A bfloat16 is the upper half of a float32.
inline Floats even_input(Ints lanes) { return (Floats)(lanes << 16); }
inline Floats odd_input(Ints lanes) { return (Floats)(lanes & int32_t(0xffff0000)); }

template <int M, int V>
Sums<M, V> multiply_bfloat16(const Linear& linear, int64_t panel, int first, const float* x) {
    const int64_t inputs = linear.inputs;
    const uint8_t* lanes = (const uint8_t*)linear.weight + panel * inputs * PANEL * 2;
    lanes += first * LANES * LANE_BYTES;
    Sums<M, V> sums = {};
    Floats weights[V];

    for (int64_t k = 0; k < inputs; k += 2, lanes += PANEL * LANE_BYTES) {
        fetch_ahead(lanes, V * LANES * LANE_BYTES);
        for (int v = 0; v < V; v++)
            weights[v] = even_input(load<Ints>(lanes + v * LANES * LANE_BYTES));
        add_products<M, V>(sums, weights, x + k, inputs);

        for (int v = 0; v < V; v++)
            weights[v] = odd_input(load<Ints>(lanes + v * LANES * LANE_BYTES));
        add_products<M, V>(sums, weights, x + k + 1, inputs);
    }
    return sums;
}

// Scales, and of Q4 minima, of a block's outputs.
template <Format F, int V> struct Scales {
    Floats scale[V], minimum[V];

    Scales(const uint8_t* block, int first) {
        for (int v = 0; v < V; v++) {
            const uint16_t* halves = (const uint16_t*)block + (first + v) * LANES;
            scale[v] = load_halves(halves);
            if constexpr (F == Q4) minimum[v] = load_halves(halves + PANEL);
        }
    }

    // The weights of the lanes' input j, of vector v.
    Floats weights(Ints lanes, int j, int v) const {
        if constexpr (F == Q4) return to_floats((lanes >> 4 * j) & 15) * scale[v] + minimum[v];
        const Ints with_sign = (lanes << (24 - 8 * j)) >> 24;
        return to_floats(with_sign) * scale[v];
    }
};

template <Format F, int M, int V>
Sums<M, V> multiply_blocks(const Linear& linear, int64_t panel, int first, const float* x) {
    constexpr int TOGETHER = inputs_of_a_lane(F);
    const int64_t inputs = linear.inputs;
    const int64_t panel_bytes = inputs / BLOCK * block_bytes(F);
    const uint8_t* block = (const uint8_t*)linear.weight + panel * panel_bytes;
    Sums<M, V> sums = {};
    Floats weights[V];

    for (int64_t k = 0; k < inputs; k += BLOCK, block += block_bytes(F)) {
        if (first == 0) fetch_ahead(block, block_bytes(F));
        const Scales<F, V> scales(block, first);
        const uint8_t* lanes = block + scale_bytes(F) + first * LANES * LANE_BYTES;
        for (int64_t i = 0; i < BLOCK; i += TOGETHER, lanes += PANEL * LANE_BYTES)
            for (int j = 0; j < TOGETHER; j++) {
                for (int v = 0; v < V; v++) {
                    const Ints packed = load<Ints>(lanes + v * LANES * LANE_BYTES);
                    weights[v] = scales.weights(packed, j, v);
                }
                add_products<M, V>(sums, weights, x + k + i + j, inputs);
            }
    }
    return sums;
}

// Rows in 8 bits: exact sums of 32 bits within a block, then the row's scale of this block; at last
// the scale of each output.
template <int M>
Sums<M, VECTORS> multiply_int8(const Linear& linear, int64_t panel, const Block8* rows) {
    constexpr int TOGETHER = inputs_of_a_lane(INT8);
    const int64_t blocks = linear.inputs / BLOCK;
    const uint8_t* lanes = (const uint8_t*)linear.weight + panel * linear.inputs * PANEL;
    Sums<M, VECTORS> sums = {};

    for (int64_t block = 0; block < blocks; block++) {
        fetch_ahead(lanes, BLOCK * PANEL);
        Ints exact[M][VECTORS];
        for (int m = 0; m < M; m++)
            for (int v = 0; v < VECTORS; v++) exact[m][v] = splat(rows[m * blocks + block].start);

        for (int64_t i = 0; i < BLOCK; i += TOGETHER, lanes += PANEL * LANE_BYTES)
            for (int m = 0; m < M; m++) {
                const Ints x = splat(load<int32_t>(rows[m * blocks + block].x + i));
                for (int v = 0; v < VECTORS; v++) {
                    const Ints w = load<Ints>(lanes + v * LANES * LANE_BYTES);
                    exact[m][v] = add_byte_products(exact[m][v], w, x);
                }
            }

        for (int m = 0; m < M; m++)
            for (int v = 0; v < VECTORS; v++)
                sums.of[m][v] += to_floats(exact[m][v]) * rows[m * blocks + block].scale;
    }

    const float* scale = linear.scale + panel * PANEL;
    for (int m = 0; m < M; m++)
        for (int v = 0; v < VECTORS; v++) sums.of[m][v] *= load<Floats>(scale + v * LANES);
    return sums;
}

// ---- a chunk of a panel's inputs ---------------------------------------------------------------

constexpr int64_t CHUNK = BLOCK;  // inputs; 4 KiB of weights, once they are unpacked

constexpr int64_t bytes_of_inputs(Format format, int64_t inputs) {
    if (format == FLOAT32) return inputs * PANEL * LANE_BYTES;
    if (format == BFLOAT16) return inputs * PANEL * HALF_BYTES;
    if (format == INT8) return inputs * PANEL;
    return inputs / BLOCK * block_bytes(format);
}

inline void unpack_bfloat16(const uint8_t* lanes, int64_t inputs, float* weights) {
    for (int64_t k = 0; k < inputs; k += 2, weights += 2 * PANEL, lanes += PANEL * LANE_BYTES)
        for (int v = 0; v < VECTORS; v++) {
            const Ints packed = load<Ints>(lanes + v * LANES * LANE_BYTES);
            store(weights + v * LANES, even_input(packed));
            store(weights + PANEL + v * LANES, odd_input(packed));
        }
}

template <Format F> void unpack_block(const uint8_t* block, float* weights) {
    constexpr int TOGETHER = inputs_of_a_lane(F);
    const Scales<F, VECTORS> scales(block, 0);
    const uint8_t* lanes = block + scale_bytes(F);
    for (int k = 0; k < BLOCK; k += TOGETHER, lanes += PANEL * LANE_BYTES)
        for (int v = 0; v < VECTORS; v++) {
            const Ints packed = load<Ints>(lanes + v * LANES * LANE_BYTES);
            for (int j = 0; j < TOGETHER; j++)
                store(weights + (k + j) * PANEL + v * LANES, scales.weights(packed, j, v));
        }
}

// A chunk's weights as FLOAT32 has them: where they lie, or in `unpacked`.
template <Format F>
const float* unpack(const uint8_t* packed, int64_t inputs, float* unpacked) {
    if constexpr (F == FLOAT32) return (const float*)packed;
    if constexpr (F == BFLOAT16) unpack_bfloat16(packed, inputs, unpacked);
    if constexpr (has_blocks(F)) unpack_block<F>(packed, unpacked);
    return unpacked;
}

// What a loop over a chunk asks for on the way: bytes that are needed soon, a step with each input,
// into the first cache.
struct Ahead {
    const uint8_t* from;
    int64_t step;
};

// Adds the products of M rows with V vectors of a chunk to their sums: to[m * PANEL + output].
template <int M, int V>
void add_chunk(const float* numbers, int64_t inputs, const float* x, int64_t row_size, float* to,
               Ahead ahead) {
    Sums<M, V> sums;
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) sums.of[m][v] = load<Floats>(to + m * PANEL + v * LANES);

    Floats weights[V];
    for (int64_t k = 0; k < inputs; k++, numbers += PANEL) {
        __builtin_prefetch(ahead.from + k * ahead.step, 0, 3);  // 0: to read; 3: first cache
        for (int v = 0; v < V; v++) weights[v] = load<Floats>(numbers + v * LANES);
        add_products<M, V>(sums, weights, x + k, row_size);
    }

    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) store(to + m * PANEL + v * LANES, sums.of[m][v]);
}

}  // namespace
}  // namespace flashdraft
