// A linear over some rows: panel by panel, and of a panel as many rows at once as registers allow.

#include "linear.h"

#include <vector>
#include "panel.h"

namespace flashdraft {
namespace {

// Rows of the input, as floats and, for INT8, in 8 bits.
struct Rows {
    const float* x;
    const Block8* in_8_bits;
};

template <int M> Sums<M> multiply_panel(const Linear& linear, int64_t panel, const Rows& rows) {
    Sums<M> sums;
    switch (linear.format) {
        case FLOAT32: sums = multiply_float32<M>(linear, panel, rows.x); break;
        case BFLOAT16: sums = multiply_bfloat16<M>(linear, panel, rows.x); break;
        case Q8: sums = multiply_blocks<Q8, M>(linear, panel, rows.x); break;
        case Q4: sums = multiply_blocks<Q4, M>(linear, panel, rows.x); break;
        default: sums = multiply_int8<M>(linear, panel, rows.in_8_bits);
    }

    if (linear.bias) {
        const float* bias = linear.bias + panel * PANEL;
        for (int m = 0; m < M; m++)
            for (int v = 0; v < VECTORS; v++) sums.of[m][v] += load<Floats>(bias + v * LANES);
    }
    return sums;
}

inline Floats silu(Floats x) { return x / (1.0f + exp_of(-x)); }

inline int64_t num_outputs(const Linear& linear, Mode mode) {
    return mode == SWIGLU ? linear.outputs / 2 : linear.outputs;
}

// The last panel may have fewer than 32 outputs that are real.
template <int M>
void write_panel(const Sums<M>& sums, float* y, int64_t outputs, int64_t first, Mode mode) {
    for (int m = 0; m < M; m++) {
        float* out = y + m * outputs + first;
        if (first + PANEL <= outputs) {
            for (int v = 0; v < VECTORS; v++) {
                float* to = out + v * LANES;
                store(to, mode == ADD ? load<Floats>(to) + sums.of[m][v] : sums.of[m][v]);
            }
        } else {
            for (int64_t i = 0; first + i < outputs; i++)
                out[i] = (mode == ADD ? out[i] : 0) + sums.of[m][i / LANES][i % LANES];
        }
    }
}

template <int M>
void multiply_piece(const Linear& linear, int64_t piece, const Rows& rows, float* y, Mode mode) {
    const int64_t panel = mode == SWIGLU ? 2 * piece : piece;
    Sums<M> sums = multiply_panel<M>(linear, panel, rows);
    if (mode == SWIGLU) {
        const Sums<M> up = multiply_panel<M>(linear, panel + 1, rows);
        for (int m = 0; m < M; m++)
            for (int v = 0; v < VECTORS; v++)
                sums.of[m][v] = silu(sums.of[m][v]) * up.of[m][v];
    }
    write_panel<M>(sums, y, num_outputs(linear, mode), piece * PANEL, mode);
}

// One piece for all rows: M at once while there are so many, then the rest at once.
template <int M>
void multiply_rows(const Linear& linear, int64_t piece, Rows rows, int64_t count, float* y,
                   Mode mode) {
    const int64_t numbers = M * linear.inputs;
    for (; count >= M; count -= M) {
        multiply_piece<M>(linear, piece, rows, y, mode);
        rows.x += numbers;
        rows.in_8_bits += numbers / BLOCK;
        y += M * num_outputs(linear, mode);
    }
    if constexpr (M > 1)
        if (count) multiply_rows<M - 1>(linear, piece, rows, count, y, mode);
}

// Of the last linear that this thread had rows for.
thread_local std::vector<Block8> rows_in_8_bits;

struct LinearJob : Job {
    const Linear& linear;
    const float* x;
    const int64_t rows;
    float* y;

    LinearJob(const Linear& linear, const float* x, int64_t rows, float* y)
        : linear(linear), x(x), rows(rows), y(y) {}

    void run(const Phase&, const Pieces& pieces) override {
        multiply(linear, x, rows, y, STORE, pieces);
    }
};

}  // namespace

int64_t num_pieces(const Linear& linear, Mode mode) {
    const int64_t panels = num_panels(linear.outputs);
    return mode == SWIGLU ? panels / 2 : panels;
}

void multiply(const Linear& linear, const float* x, int64_t rows, float* y, Mode mode,
              const Pieces& pieces) {
    std::vector<Block8>& in_8_bits = rows_in_8_bits;
    if (linear.format == INT8 && pieces.are_first) {  // every thread for itself: nobody waits
        const int64_t numbers = rows * linear.inputs;
        in_8_bits.resize(numbers / BLOCK);
        quantise_rows(x, numbers, in_8_bits.data());
    }

    const Rows all{x, in_8_bits.data()};
    for (int64_t piece = pieces.from; piece < pieces.to; piece++)
        multiply_rows<most_rows_at_once()>(linear, piece, all, rows, y, mode);
}

}  // namespace flashdraft

extern "C" void flashdraft_linear(const flashdraft::Linear* linear, const float* x, int64_t rows,
                                  float* y, int64_t threads) {
    using namespace flashdraft;
    LinearJob job(*linear, x, rows, y);
    run_by_team(job, {{0, 0, num_pieces(*linear, STORE), 0}}, threads);
}
