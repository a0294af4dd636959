// A linear over some rows: panel by panel. A few rows are multiplied with all of a panel at once.
// More of them share chunks of it: a chunk is unpacked once, and lies in the first cache until all
// rows had it.

#include "linear.h"

#include <vector>
#include "panel.h"

namespace flashdraft {
namespace {

constexpr int64_t TILE = 48;         // rows whose sums are kept beside a chunk
constexpr int64_t CHUNKS_AHEAD = 2;  // how far memory is asked for

// Rows of the input, as floats and, for INT8, in 8 bits.
struct Rows {
    const float* x;
    const Block8* in_8_bits;
    int64_t inputs;

    Rows from(int64_t row) const {
        const int64_t numbers = row * inputs;
        return {x + numbers, in_8_bits + numbers / BLOCK, inputs};
    }
};

template <int M, int V> void write_sums(const Sums<M, V>& sums, float* to) {
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) store(to + m * PANEL + v * LANES, sums.of[m][v]);
}

template <Format F, int M>
void multiply_at_once(const Linear& linear, int64_t panel, const Rows& rows, float* sums) {
    constexpr int V = has_blocks(F) && M > 1 ? 2 : VECTORS;  // scales need registers, too
    for (int first = 0; first < VECTORS; first += V) {
        float* to = sums + first * LANES;
        if constexpr (F == FLOAT32)
            write_sums(multiply_float32<M, V>(linear, panel, first, rows.x), to);
        if constexpr (F == BFLOAT16)
            write_sums(multiply_bfloat16<M, V>(linear, panel, first, rows.x), to);
        if constexpr (has_blocks(F))
            write_sums(multiply_blocks<F, M, V>(linear, panel, first, rows.x), to);
        if constexpr (F == INT8) write_sums(multiply_int8<M>(linear, panel, rows.in_8_bits), to);
    }
}

// count: of rows, M at most.
template <Format F, int M = rows_at_once(F)>
void multiply_few(const Linear& linear, int64_t panel, const Rows& rows, int64_t count,
                  float* sums) {
    if constexpr (M > 1)
        if (count < M) return multiply_few<F, M - 1>(linear, panel, rows, count, sums);
    multiply_at_once<F, M>(linear, panel, rows, sums);
}

// A chunk's weights, and where they lie packed.
struct Chunk {
    const float* weights;
    int64_t inputs;
    const uint8_t* packed;
    int64_t bytes;

    // One of several loops asks for its share of what lies behind, so that memory is always busy.
    Ahead share_of_next(int64_t share, int64_t shares) const {
        const int64_t steps = shares * CHUNK;
        const int64_t step = (bytes + steps - 1) / steps;
        return {packed + CHUNKS_AHEAD * bytes + share * CHUNK * step, step};
    }
};

// count: of rows, M at most; group: their number among `groups`.
template <int M = SUMS / 2>
void add_group(const Chunk& chunk, const float* x, int64_t row_size, int64_t count, float* sums,
               int64_t group, int64_t groups) {
    if constexpr (M > 1)
        if (count < M)
            return add_group<M - 1>(chunk, x, row_size, count, sums, group, groups);

    constexpr int V = M * VECTORS <= SUMS ? VECTORS : 2;
    constexpr int TURNS = VECTORS / V;
    for (int turn = 0; turn < TURNS; turn++) {
        const int first = turn * V * LANES;
        const Ahead ahead = chunk.share_of_next(group * TURNS + turn, groups * TURNS);
        add_chunk<M, V>(chunk.weights + first, chunk.inputs, x, row_size, sums + first, ahead);
    }
}

template <Format F>
void multiply_many(const Linear& linear, int64_t panel, const Rows& rows, int64_t count,
                   float* sums) {
    constexpr int64_t MOST = SUMS / 2;
    const int64_t inputs = linear.inputs;
    const int64_t groups = (count + MOST - 1) / MOST;
    const uint8_t* packed = (const uint8_t*)linear.weight + panel * bytes_of_inputs(F, inputs);
    float unpacked[CHUNK * PANEL];
    for (int64_t i = 0; i < count * PANEL; i++) sums[i] = 0;

    for (int64_t k = 0; k < inputs; k += CHUNK) {
        const int64_t num_inputs = inputs - k < CHUNK ? inputs - k : CHUNK;
        const int64_t bytes = bytes_of_inputs(F, num_inputs);
        const Chunk chunk{unpack<F>(packed, num_inputs, unpacked), num_inputs, packed, bytes};
        for (int64_t group = 0; group < groups; group++) {
            const int64_t from = count * group / groups, to = count * (group + 1) / groups;
            const float* x = rows.x + from * inputs + k;
            add_group(chunk, x, inputs, to - from, sums + from * PANEL, group, groups);
        }
        packed += bytes;
    }
}

// count: of rows, TILE at most. sums: [count, PANEL]
template <Format F>
void multiply_panel(const Linear& linear, int64_t panel, const Rows& rows, int64_t count,
                    float* sums) {
    constexpr int MOST = rows_at_once(F);
    if (F == INT8) {
        for (int64_t row = 0; row < count; row += MOST) {
            const int64_t some = count - row < MOST ? count - row : MOST;
            multiply_few<F>(linear, panel, rows.from(row), some, sums + row * PANEL);
        }
    } else if (count <= MOST) {
        multiply_few<F>(linear, panel, rows, count, sums);
    } else {
        if constexpr (F != INT8) multiply_many<F>(linear, panel, rows, count, sums);
    }

    if (!linear.bias) return;
    const float* bias = linear.bias + panel * PANEL;
    for (int64_t row = 0; row < count; row++)
        for (int i = 0; i < PANEL; i++) sums[row * PANEL + i] += bias[i];
}

inline Floats silu(Floats x) { return x / (1.0f + exp_of(-x)); }

inline int64_t num_outputs(const Linear& linear, Mode mode) {
    return mode == SWIGLU ? linear.outputs / 2 : linear.outputs;
}

// The last panel may have fewer than 32 outputs that are real.
inline void write_row(const float* sums, int64_t count, float* y, Mode mode) {
    if (count >= PANEL) {
        for (int v = 0; v < VECTORS; v++) {
            float* to = y + v * LANES;
            const Floats own = load<Floats>(sums + v * LANES);
            store(to, mode == ADD ? load<Floats>(to) + own : own);
        }
    } else {
        for (int64_t i = 0; i < count; i++) y[i] = (mode == ADD ? y[i] : 0) + sums[i];
    }
}

// count: of rows, TILE at most.
template <Format F>
void multiply_piece(const Linear& linear, int64_t piece, const Rows& rows, int64_t count, float* y,
                    Mode mode) {
    const int64_t outputs = num_outputs(linear, mode);
    const int64_t first = piece * PANEL;
    float sums[TILE * PANEL];
    if (mode == SWIGLU) {
        float up[TILE * PANEL];
        multiply_panel<F>(linear, 2 * piece, rows, count, sums);
        multiply_panel<F>(linear, 2 * piece + 1, rows, count, up);
        for (int64_t i = 0; i < count * PANEL; i += LANES)
            store(sums + i, silu(load<Floats>(sums + i)) * load<Floats>(up + i));
    } else {
        multiply_panel<F>(linear, piece, rows, count, sums);
    }
    for (int64_t row = 0; row < count; row++)
        write_row(sums + row * PANEL, outputs - first, y + row * outputs + first, mode);
}

template <Format F>
void multiply_pieces(const Linear& linear, const Rows& rows, int64_t count, float* y, Mode mode,
                     const Pieces& pieces) {
    for (int64_t piece = pieces.from; piece < pieces.to; piece++)
        for (int64_t row = 0; row < count; row += TILE) {
            const int64_t some = count - row < TILE ? count - row : TILE;
            float* own = y + row * num_outputs(linear, mode);
            multiply_piece<F>(linear, piece, rows.from(row), some, own, mode);
        }
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

    const Rows all{x, in_8_bits.data(), linear.inputs};
    switch (linear.format) {
        case FLOAT32: return multiply_pieces<FLOAT32>(linear, all, rows, y, mode, pieces);
        case BFLOAT16: return multiply_pieces<BFLOAT16>(linear, all, rows, y, mode, pieces);
        case Q8: return multiply_pieces<Q8>(linear, all, rows, y, mode, pieces);
        case Q4: return multiply_pieces<Q4>(linear, all, rows, y, mode, pieces);
        default: return multiply_pieces<INT8>(linear, all, rows, y, mode, pieces);
    }
}

}  // namespace flashdraft

extern "C" void flashdraft_linear(const flashdraft::Linear* linear, const float* x, int64_t rows,
                                  float* y, int64_t threads) {
    using namespace flashdraft;
    LinearJob job(*linear, x, rows, y);
    run_by_team(job, {{0, 0, num_pieces(*linear, STORE), 0}}, threads);
}
