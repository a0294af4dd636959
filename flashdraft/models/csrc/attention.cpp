// Attention in three steps: scores of all slots, softmax of those that a node sees, mixed values.
//
// Up to HEADS_TOGETHER heads of up to NODES_TOGETHER nodes read each key and each value once.

#include "attention.h"

#include <algorithm>
#include <cmath>
#include "cache.h"

namespace flashdraft {
namespace {

constexpr int HEADS_TOGETHER = 3;  // of two nodes: 3 x 2 x 4 sums in AVX-512's 32 registers
constexpr int KEY_VECTORS = KEY_BLOCK / LANES;
constexpr int VALUE_VECTORS = 4;  // of a slot's numbers, summed at once

// scores: [nodes, heads, width].
template <int H, int N> int64_t score_row(int node, int head, int64_t width) {
    return (node * H + head) * width;
}

// The last slot that one of the nodes sees.
template <int N> int64_t last_seen(const Node* nodes) {
    const int64_t start = nodes->start;
    int64_t last = start - 1;
    for (int n = 0; n < N; n++)
        if (!nodes[n].seen.empty()) last = std::max(last, start + nodes[n].seen.back());
    return last;
}

// Of every slot, seen or not, in blocks of keys.
template <int H, int N> void score_keys(const Queries& queries, float* scores, int64_t width) {
    const int64_t d = queries.head_dim;
    const int64_t query_stride = queries.query_stride;
    const float* query = queries.query;
    const float* keys = queries.keys;
    const float scale = 1 / std::sqrt(float(d));
    const int64_t last = last_seen<N>(queries.nodes);

    for (int64_t block = 0; block <= last / KEY_BLOCK; block++) {
        Floats sums[N][H][KEY_VECTORS] = {};
        for (int64_t i = 0; i < d; i++) {
            const float* key = keys + (block * d + i) * KEY_BLOCK;
            fetch_ahead(key, KEY_BLOCK * sizeof(float));
            for (int v = 0; v < KEY_VECTORS; v++) {
                const Floats lanes = load<Floats>(key + v * LANES);
                for (int n = 0; n < N; n++)
                    for (int h = 0; h < H; h++)
                        sums[n][h][v] += lanes * splat(query[n * query_stride + h * d + i]);
            }
        }

        for (int n = 0; n < N; n++)
            for (int h = 0; h < H; h++)
                for (int v = 0; v < KEY_VECTORS; v++) {
                    float* row = scores + score_row<H, N>(n, h, width) + block * KEY_BLOCK;
                    store(row + v * LANES, sums[n][h][v] * scale);
                }
    }
}

// The scores that a node sees, moved together, become e^(score - largest); returns their sum.
inline float softmax(const Node& node, float* scores) {
    const int64_t start = node.start, count = node.seen.size();
    const int64_t num_seen = start + count;
    for (int64_t j = 0; j < count; j++) scores[start + j] = scores[start + node.seen[j]];
    for (int64_t j = num_seen; j % LANES; j++) scores[j] = -INFINITY;

    Floats largest = splat(-INFINITY);
    for (int64_t j = 0; j < num_seen; j += LANES) {
        const Floats x = load<Floats>(scores + j);
        largest = x > largest ? x : largest;
    }
    float most = -INFINITY;
    for (int i = 0; i < LANES; i++) most = std::max(most, largest[i]);

    Floats mass = {};
    for (int64_t j = 0; j < num_seen; j += LANES) {
        const Floats x = load<Floats>(scores + j);
        const Floats e = x == -INFINITY ? Floats{} : exp_of(x - most);
        mass += e;
        store(scores + j, e);
    }
    return sum(mass);
}

// Numbers `first` to `first + vectors * LANES` of the result. Inlined, so that the loops over
// `vectors` are unrolled where it is a constant.
template <int H, int N>
__attribute__((always_inline)) inline void mix_values(const Queries& queries, const float* scores,
                                                      int64_t width, const float (*mass)[H],
                                                      int64_t first, int vectors) {
    const int64_t d = queries.head_dim;
    const Node* nodes = queries.nodes;
    const int64_t start = nodes->start;
    const float* values = queries.values + first;
    Floats sums[N][H][VALUE_VECTORS] = {};

    for (int64_t slot = 0; slot < start; slot++) {
        fetch_ahead(values + slot * d, vectors * LANES * sizeof(float));
        for (int v = 0; v < vectors; v++) {
            const Floats lanes = load<Floats>(values + slot * d + v * LANES);
            for (int n = 0; n < N; n++)
                for (int h = 0; h < H; h++)
                    sums[n][h][v] += lanes * splat(scores[score_row<H, N>(n, h, width) + slot]);
        }
    }

    for (int n = 0; n < N; n++) {
        for (size_t j = 0; j < nodes[n].seen.size(); j++)
            for (int v = 0; v < vectors; v++) {
                const int64_t slot = start + nodes[n].seen[j];
                const Floats lanes = load<Floats>(values + slot * d + v * LANES);
                for (int h = 0; h < H; h++) {
                    const int64_t row = score_row<H, N>(n, h, width);
                    sums[n][h][v] += lanes * splat(scores[row + start + j]);
                }
            }

        for (int h = 0; h < H; h++)
            for (int v = 0; v < vectors; v++) {
                float* out = queries.out + n * queries.out_stride + h * d + first;
                store(out + v * LANES, sums[n][h][v] / mass[n][h]);
            }
    }
}

template <int H, int N> void attend_heads(const Queries& queries, float* scores) {
    const int64_t d = queries.head_dim;
    const int64_t width = queries.slots + KEY_BLOCK;
    score_keys<H, N>(queries, scores, width);

    float mass[N][H];
    for (int n = 0; n < N; n++)
        for (int h = 0; h < H; h++)
            mass[n][h] = softmax(queries.nodes[n], scores + score_row<H, N>(n, h, width));

    for (int64_t first = 0; first < d; first += VALUE_VECTORS * LANES) {
        const int64_t left = d - first;
        if (left >= VALUE_VECTORS * LANES)
            mix_values<H, N>(queries, scores, width, mass, first, VALUE_VECTORS);
        else
            mix_values<H, N>(queries, scores, width, mass, first, int(left) / LANES);
    }
}

// All heads, a few at a time.
template <int N> void attend_nodes(Queries queries, float* scores) {
    int64_t left = queries.num_heads;
    while (left > 0) {
        if (left >= HEADS_TOGETHER) attend_heads<HEADS_TOGETHER, N>(queries, scores);
        else if (left == 2) attend_heads<2, N>(queries, scores);
        else attend_heads<1, N>(queries, scores);
        left -= HEADS_TOGETHER;
        queries.query += HEADS_TOGETHER * queries.head_dim;
        queries.out += HEADS_TOGETHER * queries.head_dim;
    }
}

thread_local std::vector<float> own_scores;  // of this thread: memory to work in

}  // namespace

void attend(const Queries& queries) {
    const int64_t width = queries.slots + KEY_BLOCK;
    own_scores.resize(HEADS_TOGETHER * NODES_TOGETHER * width);
    float* scores = own_scores.data();
    if (queries.num_nodes == NODES_TOGETHER) attend_nodes<NODES_TOGETHER>(queries, scores);
    else attend_nodes<1>(queries, scores);
}

}  // namespace flashdraft
