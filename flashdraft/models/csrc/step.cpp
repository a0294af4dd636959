// One step of a llama-shaped decoder on a CPU: all layers over the new tokens of some rows.
//
// Row-exact by construction: a token's sums run over the inputs, and over its own visible slots, in
// one fixed order. How many tokens travel with it, which thread takes it and where a tree's nodes
// lie changes no bit.
//
// The embeddings come in x, which every layer reads and adds to; tokens lie one behind the other,
// row by row:
//
//   x --norm--> QKV -> qkv --norm, rotate--> PLACE -> the cache and qkv
//                                                      |
//   x += OUT <------------------- mixed <- ATTEND <----'
//   x --norm--> GATE_UP -> inner;  x += DOWN of inner
//   features <- KEEP of x, after the layers that a drafter asked for
//
// Where a model has convolutions, what is normed makes KERNELS first, and goes through those of the
// one side before QKV and GATE_UP; OUT and DOWN go through those of the other before x.
//
//   qkv of a token: | heads of the queries | heads of the keys | heads of the values |

#include <algorithm>
#include <cstring>
#include <vector>
#include "attention.h"
#include "cache.h"
#include "convolution.h"
#include "formats.h"
#include "interface.h"
#include "linear.h"
#include "norm_rope.h"
#include "team.h"

namespace flashdraft {
namespace {

// The phases of a layer, in their order; the last one is the whole model's.
enum StepPhase {
    ATTENTION_KERNELS, QKV, PLACE, ATTEND, OUT, MLP_KERNELS, GATE_UP, DOWN, KEEP, FINAL_NORM
};

// Of a convolution: what it does before a sublayer, or behind it.
enum Side { BEFORE, BEHIND };

// Which of Step::seconds a phase counts for.
enum Part { LINEARS, ATTENTION, REST };

thread_local std::vector<float> own_normed;  // this thread's copy of x, normed for a linear

struct StepJob : Job {
    const Model& model;
    const Step& step;
    const int64_t hidden, head_dim, heads, kv_heads, group, num_tokens;
    const int64_t qkv_size;
    const CacheShape cache;
    std::vector<Node> nodes;            // of all rows, in the order of x
    std::vector<int64_t> first_nodes;   // of those that read keys together; then the end
    std::vector<int64_t> group_of;      // of the convolutions, of each GROUP_STEP channels

    StepJob(const Model& m, const Step& s)
        : model(m), step(s), hidden(m.hidden), head_dim(m.head_dim), heads(m.heads),
          kv_heads(m.kv_heads), group(m.heads / m.kv_heads), num_tokens(s.tokens),
          qkv_size((m.heads + 2 * m.kv_heads) * m.head_dim),
          cache{m.kv_heads, s.slots, m.head_dim} {
        for (int64_t row = 0; row < step.rows; row++) add_row(row);
        first_nodes.push_back(int64_t(nodes.size()));
        if (convolves())
            for (int64_t channel = 0; channel < hidden; channel += GROUP_STEP)
                group_of.push_back(channel * model.conv_groups / hidden);
    }

    bool convolves() const { return model.taps > 0; }

    void add_row(int64_t row) {
        const int64_t size = step.size[row], start = step.start[row];
        for (int64_t i = 0; i < size; i++) {
            if (i % NODES_TOGETHER == 0) first_nodes.push_back(int64_t(nodes.size()));

            const int64_t at = row * step.nodes + i;
            Node node{step.row[row], start, start + i, start + step.depth[at], {}};
            const uint8_t* sees = step.seen + at * step.nodes;
            for (int64_t j = 0; j < size; j++)
                if (sees[j]) node.seen.push_back(j);
            nodes.push_back(std::move(node));
        }
    }

    int64_t num_groups() const { return int64_t(first_nodes.size()) - 1; }

    std::vector<Phase> phases() const {
        std::vector<Phase> list;
        for (int64_t i = 0; i < model.layers; i++) {
            const Layer& layer = model.layer[i];
            if (convolves()) {
                const Linear& kernels = layer.attention_conv.kernels;
                list.push_back({ATTENTION_KERNELS, i, num_pieces(kernels, STORE), LINEARS});
            }
            list.push_back({QKV, i, num_pieces(layer.qkv, STORE), LINEARS});
            list.push_back({PLACE, i, num_tokens * (heads + kv_heads), ATTENTION});
            list.push_back({ATTEND, i, kv_heads * num_groups(), ATTENTION});
            list.push_back({OUT, i, num_pieces(layer.out, ADD), LINEARS});
            if (convolves()) {
                const Linear& kernels = layer.mlp_conv.kernels;
                list.push_back({MLP_KERNELS, i, num_pieces(kernels, STORE), LINEARS});
            }
            list.push_back({GATE_UP, i, num_pieces(layer.gate_up, SWIGLU), LINEARS});
            list.push_back({DOWN, i, num_pieces(layer.down, ADD), LINEARS});
            if (step.wanted[i] >= 0) list.push_back({KEEP, i, num_tokens, REST});
        }
        list.push_back({FINAL_NORM, model.layers, num_tokens, REST});
        return list;
    }

    void run(const Phase& phase, const Pieces& pieces) override {
        if (phase.kind == FINAL_NORM) {
            for (int64_t t = pieces.from; t < pieces.to; t++) finish(t);
            return;
        }

        const int64_t at = phase.at;
        const Layer& layer = model.layer[at];
        switch (phase.kind) {
            case ATTENTION_KERNELS:
                linear(layer.attention_conv.kernels, normed(layer.input_norm, pieces),
                       step.kernels, STORE, pieces);
                break;
            case QKV:
                linear(layer.qkv, inputs(layer.input_norm, layer.attention_conv, pieces), step.qkv,
                       STORE, pieces);
                break;
            case PLACE:
                for (int64_t piece = pieces.from; piece < pieces.to; piece++)
                    place(layer, at, piece);
                break;
            case ATTEND:
                for (int64_t piece = pieces.from; piece < pieces.to; piece++) mix(at, piece);
                break;
            case OUT: add(layer.out, step.mixed, layer.attention_conv, pieces); break;
            case MLP_KERNELS:
                linear(layer.mlp_conv.kernels, normed(layer.post_norm, pieces), step.kernels,
                       STORE, pieces);
                break;
            case GATE_UP:
                linear(layer.gate_up, inputs(layer.post_norm, layer.mlp_conv, pieces), step.inner,
                       SWIGLU, pieces);
                break;
            case DOWN: add(layer.down, step.inner, layer.mlp_conv, pieces); break;
            case KEEP:
                for (int64_t t = pieces.from; t < pieces.to; t++) keep(at, t);
        }
    }

    float* state(int64_t token) const { return step.x + token * hidden; }

    void linear(const Linear& weight, const float* x, float* y, Mode mode,
                const Pieces& pieces) const {
        multiply(weight, x, num_tokens, y, mode, pieces);
    }

    // Every thread norms all tokens for itself, once a phase: that costs less than waiting for
    // others to do a part.
    float* normed(const float* weight, const Pieces& pieces) const {
        own_normed.resize(num_tokens * hidden);
        if (pieces.are_first)
            for (int64_t t = 0; t < num_tokens; t++)
                rms_norm(state(t), weight, hidden, model.eps, &own_normed[t * hidden]);
        return own_normed.data();
    }

    // What a sublayer reads: normed, and convolved where the model does that. The last token comes
    // first, so that the rows before it are still there.
    const float* inputs(const float* norm, const Convolution& convolution,
                        const Pieces& pieces) const {
        float* x = normed(norm, pieces);
        if (!convolves() || !pieces.are_first) return x;

        for (int64_t t = num_tokens - 1; t >= 0; t--) {
            const Kernel own = kernel(convolution, BEFORE, t);
            float* row = x + t * hidden;
            for (int64_t i = 0; i < hidden; i += LANES)
                store(row + i, convolved(own, row + i, i, group_of[i / GROUP_STEP]));
        }
        return x;
    }

    // x += what a sublayer gives, convolved where the model does that: a piece is PANEL channels of
    // all tokens, so that whoever has multiplied them goes on.
    void add(const Linear& weight, const float* inputs, const Convolution& convolution,
             const Pieces& pieces) const {
        if (!convolves()) return linear(weight, inputs, step.x, ADD, pieces);

        linear(weight, inputs, step.behind, STORE, pieces);
        for (int64_t t = 0; t < num_tokens; t++) {
            const Kernel own = kernel(convolution, BEHIND, t);
            const float* row = step.behind + t * hidden;
            for (int64_t i = pieces.from * PANEL; i < pieces.to * PANEL; i += LANES) {
                const Floats more = convolved(own, row + i, i, group_of[i / GROUP_STEP]);
                store(state(t) + i, load<Floats>(state(t) + i) + more);
            }
        }
    }

    Kernel kernel(const Convolution& convolution, Side side, int64_t token) const {
        const int64_t nodes_up_to_it = nodes[token].slot - nodes[token].start + 1;
        const int64_t size = model.taps * model.conv_groups;
        const float* base = convolution.base + side * model.taps * hidden;
        const float* added = step.kernels + (2 * token + side) * size;
        return {base, added, std::min(model.taps, nodes_up_to_it), hidden, model.conv_groups};
    }

    // A piece is a head of a token: a query stays where it is, a key goes into its slot, and its
    // value with it.
    void place(const Layer& layer, int64_t at, int64_t piece) const {
        const int64_t token = piece / (heads + kv_heads), head = piece % (heads + kv_heads);
        const bool is_query = head < heads;
        const Node& node = nodes[token];
        float* x = step.qkv + token * qkv_size + head * head_dim;

        const float* norm = is_query ? layer.q_norm : layer.k_norm;
        if (norm) rms_norm(x, norm, head_dim, model.eps, x);
        const int64_t turn = node.position * head_dim;
        rotate(x, model.cos + turn, model.sin + turn, head_dim);
        if (is_query) return;

        const int64_t own_head = cache.head(node.row, head - heads);
        float* key = step.keys[at] + own_head + cache.key(node.slot);
        for (int64_t j = 0; j < head_dim; j++) key[j * KEY_BLOCK] = x[j];

        float* value = step.values[at] + own_head + cache.value(node.slot);
        memcpy(value, x + kv_heads * head_dim, head_dim * sizeof(float));
    }

    // A piece is a key head of nodes that read it together; those of one row come one after the
    // other, so that its keys and values may stay in a processor's cache.
    void mix(int64_t at, int64_t piece) const {
        const int64_t kv_head = piece / num_groups(), g = piece % num_groups();
        const int64_t first = first_nodes[g], head = kv_head * group;
        const int64_t own_head = cache.head(nodes[first].row, kv_head);

        Queries queries;
        queries.nodes = &nodes[first];
        queries.num_nodes = first_nodes[g + 1] - first;
        queries.num_heads = group;
        queries.query = step.qkv + first * qkv_size + head * head_dim;
        queries.query_stride = qkv_size;
        queries.keys = step.keys[at] + own_head;
        queries.values = step.values[at] + own_head;
        queries.slots = step.slots;
        queries.head_dim = head_dim;
        queries.out = step.mixed + (first * heads + head) * head_dim;
        queries.out_stride = heads * head_dim;
        attend(queries);
    }

    // The state behind a layer (model.layers: the final one), if a drafter asked for it.
    void keep(int64_t layer, int64_t token) const {
        const int64_t column = step.wanted[layer];
        if (column < 0) return;
        memcpy(step.features + token * step.feature_size + column, state(token),
               hidden * sizeof(float));
    }

    void finish(int64_t token) const {
        rms_norm(state(token), model.norm, hidden, model.eps, state(token));
        keep(model.layers, token);
    }
};

}  // namespace
}  // namespace flashdraft

extern "C" void flashdraft_step(const flashdraft::Model* model, const flashdraft::Step* step) {
    using namespace flashdraft;
    StepJob job(*model, *step);
    run_by_team(job, job.phases(), step->threads, step->seconds);
}
