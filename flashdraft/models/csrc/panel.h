// Products of M rows with one panel of a packed weight: a loop for each format of formats.h.
//
// Every number of the panel is read once and multiplied with all M rows. A row's sums run over the
// inputs in one fixed order, whatever M is: the rows beside it change no bit.

#pragma once
#include "formats.h"
#include "interface.h"
#include "rows8.h"
#include "vectors.h"

namespace flashdraft {
namespace {

constexpr int VECTORS = PANEL / LANES;  // of an input's 32 outputs

// Rows that are multiplied at once: as many as the registers hold sums for, beside the weights.
constexpr int most_rows_at_once() {
    if (LANES == 16) return 8;  // 8 x 2 of 32 registers
    if (LANES == 8) return 3;   // 3 x 4 of 16
    return 2;                   // 2 x 8, of 32 on ARM
}

// of[m][v]: of row m, the outputs from v * LANES on.
template <int M> struct Sums {
    Floats of[M][VECTORS];
};

// One input of M rows, which lie row_size apart, times its weights.
template <int M>
inline void add_products(Sums<M>& sums, const Floats* weights, const float* x, int64_t row_size) {
    for (int m = 0; m < M; m++) {
        const Floats input = splat(x[m * row_size]);
        for (int v = 0; v < VECTORS; v++) sums.of[m][v] += input * weights[v];
    }
}

template <int M> Sums<M> multiply_float32(const Linear& linear, int64_t panel, const float* x) {
    const int64_t inputs = linear.inputs;
    const float* numbers = (const float*)linear.weight + panel * inputs * PANEL;
    Sums<M> sums = {};
    Floats weights[VECTORS];

    for (int64_t k = 0; k < inputs; k++, numbers += PANEL) {
        fetch_ahead(numbers, PANEL * LANE_BYTES);
        for (int v = 0; v < VECTORS; v++) weights[v] = load<Floats>(numbers + v * LANES);
        add_products<M>(sums, weights, x + k, inputs);
    }
    return sums;
}

// A bfloat16 is the upper half of a float32.
inline Floats even_input(Ints lanes) { return (Floats)(lanes << 16); }
inline Floats odd_input(Ints lanes) { return (Floats)(lanes & int32_t(0xffff0000)); }

template <int M> Sums<M> multiply_bfloat16(const Linear& linear, int64_t panel, const float* x) {
    const int64_t inputs = linear.inputs;
    const uint8_t* lanes = (const uint8_t*)linear.weight + panel * inputs * PANEL * 2;
    Sums<M> sums = {};
    Floats weights[VECTORS];

    for (int64_t k = 0; k < inputs; k += 2, lanes += PANEL * LANE_BYTES) {
        fetch_ahead(lanes, PANEL * LANE_BYTES);
        for (int v = 0; v < VECTORS; v++)
            weights[v] = even_input(load<Ints>(lanes + v * LANES * LANE_BYTES));
        add_products<M>(sums, weights, x + k, inputs);

        for (int v = 0; v < VECTORS; v++)
            weights[v] = odd_input(load<Ints>(lanes + v * LANES * LANE_BYTES));
        add_products<M>(sums, weights, x + k + 1, inputs);
    }
    return sums;
}

// The numbers of the lanes' input j, of Q8 or Q4.
template <Format F> inline Floats numbers_of_input(Ints lanes, int j) {
    if constexpr (F == Q4) return to_floats((lanes >> 4 * j) & 15);
    else return to_floats((lanes << (24 - 8 * j)) >> 24);  // up and down again: extends the sign
}

template <Format F, int M>
Sums<M> multiply_blocks(const Linear& linear, int64_t panel, const float* x) {
    const int64_t inputs = linear.inputs;
    const int64_t panel_bytes = inputs / BLOCK * block_bytes(F);
    const uint8_t* block = (const uint8_t*)linear.weight + panel * panel_bytes;
    Sums<M> sums = {};
    Floats weights[VECTORS];

    for (int64_t k = 0; k < inputs; k += BLOCK, block += block_bytes(F)) {
        fetch_ahead(block, block_bytes(F));
        Floats scale[VECTORS], minimum[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            const uint16_t* halves = (const uint16_t*)block + v * LANES;
            scale[v] = load_halves(halves);
            if constexpr (F == Q4) minimum[v] = load_halves(halves + PANEL);
        }

        const uint8_t* lanes = block + scale_bytes(F);
        constexpr int TOGETHER = inputs_of_a_lane(F);
        for (int64_t i = 0; i < BLOCK; i += TOGETHER, lanes += PANEL * LANE_BYTES)
            for (int j = 0; j < TOGETHER; j++) {
                for (int v = 0; v < VECTORS; v++) {
                    const Ints packed = load<Ints>(lanes + v * LANES * LANE_BYTES);
                    const Floats numbers = numbers_of_input<F>(packed, j);
                    if constexpr (F == Q4) weights[v] = numbers * scale[v] + minimum[v];
                    else weights[v] = numbers * scale[v];
                }
                add_products<M>(sums, weights, x + k + i + j, inputs);
            }
    }
    return sums;
}

// Rows in 8 bits: exact sums of 32 bits within a block, then the row's scale of this block; at last
// the scale of each output.
template <int M> Sums<M> multiply_int8(const Linear& linear, int64_t panel, const Block8* rows) {
    constexpr int TOGETHER = inputs_of_a_lane(INT8);
    const int64_t blocks = linear.inputs / BLOCK;
    const uint8_t* lanes = (const uint8_t*)linear.weight + panel * linear.inputs * PANEL;
    Sums<M> sums = {};

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

}  // namespace
}  // namespace flashdraft
