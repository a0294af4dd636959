// One step of a llama-shaped decoder on a CPU: every weight is streamed once, whatever the number of tokens.
//
// Row-exact by construction: a token's sums run over k, and over its own visible slots, in one fixed order; how many
// tokens travel with it, which thread takes it and where a tree's nodes lie changes no bit.
// The vectors are the compiler's (GCC and Clang): AVX-512, AVX2, NEON or SSE by -march. C ABI; loaded by native.py.

#include "linear.h"

namespace {

// ---- the small parts -----------------------------------------------------------------------------------------------

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
    vf squares = {};
    for (int64_t i = 0; i < n; i += W) squares += load<vf>(x + i) * load<vf>(x + i);
    float scale = 1 / std::sqrt(sum(squares) / n + eps);
    for (int64_t i = 0; i < n; i += W) store(y + i, load<vf>(x + i) * scale * load<vf>(weight + i));
}

void rotate(float* x, const float* cos, const float* sin, int64_t d) {
    for (int64_t i = 0; i < d / 2; i++) {
        float a = x[i], b = x[i + d / 2];
        x[i] = a * cos[i] + b * sin[i];
        x[i + d / 2] = b * cos[i + d / 2] + a * sin[i + d / 2];
    }
}

// Attention of Q heads of T tokens that share keys: a token sees the slots before `start` and its `nodes` behind it, in order.
// Keys lie in blocks of 64 slots, [block][d][64], so that a vector holds one input of many slots; values lie slot by slot.
constexpr int SLOTS = 64, TOGETHER = W == 16 ? 2 : 1;  // tokens of a row that read keys together: as registers allow

struct Token { int64_t row, start, place, position; std::vector<int64_t> nodes; };

template <int Q, int T>
void attend(const Token* token, const float* q, int64_t q_stride, const float* keys, const float* values, int64_t d, int64_t width,
            float* scores, float* out, int64_t out_stride) {
    const int64_t start = token->start;
    const float scale = 1 / std::sqrt(float(d));
    int64_t last = start - 1;
    for (int t = 0; t < T; t++) if (!token[t].nodes.empty()) last = std::max(last, start + token[t].nodes.back());
    for (int64_t block = 0; block <= last / SLOTS; block++) {
        vf acc[T][Q][SLOTS / W] = {};
        for (int64_t i = 0; i < d; i++) {
            const float* k = keys + (block * d + i) * SLOTS;
            fetch_ahead(k, 4 * SLOTS);
            for (int v = 0; v < SLOTS / W; v++) {
                vf lanes = load<vf>(k + v * W);
                for (int t = 0; t < T; t++)
                    for (int h = 0; h < Q; h++) acc[t][h][v] += lanes * splat(q[t * q_stride + h * d + i]);
            }
        }
        for (int t = 0; t < T; t++)
            for (int h = 0; h < Q; h++)
                for (int v = 0; v < SLOTS / W; v++) store(scores + (t * Q + h) * width + block * SLOTS + v * W, acc[t][h][v] * scale);
    }
    float all[T][Q];
    for (int t = 0; t < T; t++)
        for (int h = 0; h < Q; h++) {
            const int64_t count = token[t].nodes.size(), seen = start + count;
            float *p = scores + (t * Q + h) * width, most = -INFINITY;
            for (int64_t j = 0; j < count; j++) p[start + j] = p[start + token[t].nodes[j]];
            for (int64_t j = seen; j % W; j++) p[j] = -INFINITY;
            vf top = splat(-INFINITY), mass = {};
            for (int64_t j = 0; j < seen; j += W) {
                vf x = load<vf>(p + j);
                top = x > top ? x : top;
            }
            for (int i = 0; i < W; i++) most = std::max(most, top[i]);
            for (int64_t j = 0; j < seen; j += W) {
                vf x = load<vf>(p + j), e = x == -INFINITY ? vf{} : exp_of(x - most);
                mass += e;
                store(p + j, e);
            }
            all[t][h] = sum(mass);
        }
    for (int64_t i = 0; i < d; i += 4 * W) {
        auto mix = [&](int parts) __attribute__((always_inline)) {  // unrolled where `parts` is a constant
            vf acc[T][Q][4] = {};
            for (int64_t j = 0; j < start; j++) {
                fetch_ahead(values + j * d + i, parts * 4 * W);
                for (int part = 0; part < parts; part++) {
                    vf lanes = load<vf>(values + j * d + i + part * W);
                    for (int t = 0; t < T; t++)
                        for (int h = 0; h < Q; h++) acc[t][h][part] += lanes * splat(scores[(t * Q + h) * width + j]);
                }
            }
            for (int t = 0; t < T; t++) {
                for (size_t j = 0; j < token[t].nodes.size(); j++)
                    for (int part = 0; part < parts; part++) {
                        vf lanes = load<vf>(values + (start + token[t].nodes[j]) * d + i + part * W);
                        for (int h = 0; h < Q; h++) acc[t][h][part] += lanes * splat(scores[(t * Q + h) * width + start + j]);
                    }
                for (int h = 0; h < Q; h++)
                    for (int part = 0; part < parts; part++)
                        store(out + t * out_stride + h * d + i + part * W, acc[t][h][part] / all[t][h]);
            }
        };
        d - i >= 4 * W ? mix(4) : mix(int(d - i) / W);
    }
}

template <int T> auto for_heads(int64_t count) { return count >= 3 ? attend<3, T> : count == 2 ? attend<2, T> : attend<1, T>; }

}  // namespace

// ---- what native.py calls; every struct there has the same fields ----------------------------------------------------

struct Layer { const float *input_norm, *post_norm, *q_norm, *k_norm; Linear qkv, out, gate_up, down; };
struct Model {
    int64_t layers, hidden, heads, kv_heads, head_dim, inner; float eps;
    const Layer* layer; const float *norm, *cos, *sin;
};
struct Step {
    int64_t rows, nodes, tokens, slots, feature_size, threads;  // nodes of the widest row; tokens in all; slots of a cache row
    const int64_t *row, *start, *size;                        // of each row: cache row, committed slots, nodes
    const int64_t* depth; const uint8_t* seen;                // [rows, nodes]: behind start; [rows, nodes, nodes]: i sees j
    float *const *keys, *const *values;  // of each layer: [rows, kv_heads, slots / 64, head_dim, 64], [.., slots, head_dim]
    const int64_t* wanted;                                    // of each layer and the final state: column in features, or -1
    float *x, *qkv, *mixed, *inner, *features;                // [tokens, ...]; x: embeddings in, final normed state out
    double* seconds;                                          // null, or three sums: linears, attention, the rest
};

namespace {

struct LinearJob : flashdraft::Job {
    const Linear& l;
    const float* x;
    const int64_t rows;
    float* y;

    LinearJob(const Linear& linear, const float* in, int64_t count, float* out) : l(linear), x(in), rows(count), y(out) {}

    void run(const flashdraft::Phase&, uint64_t stamp, int64_t from, int64_t to) override {
        Scratch& own = own_scratch();
        if (own.stamp != stamp) in_8_bits(l, x, rows, own);
        own.stamp = stamp;
        linear(l, x, own.q.data(), rows, y, STORE, from, to);
    }
};

// In the order of a layer; the last one is the whole model's.
enum StepWork { QKV, PLACE, ATTEND, OUT, GATE_UP, DOWN, KEEP, FINAL_NORM };
enum Part { LINEARS, ATTENTION, REST };  // of the times that are asked for

struct StepJob : flashdraft::Job {
    const Model& m;
    const Step& s;
    const int64_t H = m.hidden, d = m.head_dim, heads = m.heads, kv = m.kv_heads, group = m.heads / m.kv_heads, n = s.tokens;
    const int64_t row_size = (heads + 2 * kv) * d;
    std::vector<Token> tokens;
    std::vector<int64_t> firsts;  // of tokens that read keys together; then the end

    StepJob(const Model& model, const Step& step) : m(model), s(step) {
        for (int64_t r = 0; r < s.rows; r++) add_row(r);
        firsts.push_back(int64_t(tokens.size()));
    }

    void add_row(int64_t r) {
        for (int64_t i = 0; i < s.size[r]; i++) {
            if (i % TOGETHER == 0) firsts.push_back(int64_t(tokens.size()));
            tokens.push_back({s.row[r], s.start[r], s.start[r] + i, s.start[r] + s.depth[r * s.nodes + i], {}});
            const uint8_t* sees = s.seen + (r * s.nodes + i) * s.nodes;
            for (int64_t j = 0; j < s.size[r]; j++)
                if (sees[j]) tokens.back().nodes.push_back(j);
        }
    }

    std::vector<flashdraft::Phase> phases() const {
        std::vector<flashdraft::Phase> list;
        const int64_t together = int64_t(firsts.size()) - 1;
        for (int64_t i = 0; i < m.layers; i++) {
            const Layer& l = m.layer[i];
            list.push_back({QKV, i, pieces_of(l.qkv, STORE), LINEARS});
            list.push_back({PLACE, i, n * (heads + kv), ATTENTION});
            list.push_back({ATTEND, i, kv * together, ATTENTION});
            list.push_back({OUT, i, pieces_of(l.out, ADD), LINEARS});
            list.push_back({GATE_UP, i, pieces_of(l.gate_up, SILU), LINEARS});
            list.push_back({DOWN, i, pieces_of(l.down, ADD), LINEARS});
            if (s.wanted[i] >= 0) list.push_back({KEEP, i, n, REST});
        }
        list.push_back({FINAL_NORM, m.layers, n, REST});
        return list;
    }

    void run(const flashdraft::Phase& phase, uint64_t stamp, int64_t from, int64_t to) override {
        Scratch& own = own_scratch();
        const bool fresh = own.stamp != stamp;
        own.stamp = stamp;
        const Layer* l = phase.at < m.layers ? m.layer + phase.at : nullptr;
        switch (phase.kind) {
            case QKV: return product(l->qkv, normed(l->input_norm, own, fresh), s.qkv, STORE, own, fresh, from, to);
            case PLACE:
                for (int64_t unit = from; unit < to; unit++) place(*l, phase.at, unit);
                return;
            case ATTEND:
                own.scores.resize(3 * TOGETHER * (s.slots + SLOTS));
                for (int64_t unit = from; unit < to; unit++) mix(phase.at, unit, own.scores.data());
                return;
            case OUT: return product(l->out, s.mixed, s.x, ADD, own, fresh, from, to);
            case GATE_UP: return product(l->gate_up, normed(l->post_norm, own, fresh), s.inner, SILU, own, fresh, from, to);
            case DOWN: return product(l->down, s.inner, s.x, ADD, own, fresh, from, to);
            case KEEP:
                for (int64_t t = from; t < to; t++) keep(phase.at, t);
                return;
            default:
                for (int64_t t = from; t < to; t++) {
                    rms_norm(s.x + t * H, m.norm, H, m.eps, s.x + t * H);
                    keep(m.layers, t);
                }
        }
    }

    // Every thread norms all tokens for itself, once a phase: that costs less than waiting for others to do a part.
    const float* normed(const float* weight, Scratch& own, bool fresh) const {
        own.x.resize(n * H);
        if (fresh)
            for (int64_t t = 0; t < n; t++) rms_norm(s.x + t * H, weight, H, m.eps, &own.x[t * H]);
        return own.x.data();
    }

    void product(const Linear& l, const float* x, float* y, Mode mode, Scratch& own, bool fresh, int64_t from, int64_t to) const {
        if (fresh) in_8_bits(l, x, n, own);
        linear(l, x, own.q.data(), n, y, mode, from, to);
    }

    // Queries in place, keys and values into their slots.
    void place(const Layer& l, int64_t layer, int64_t unit) const {
        const int64_t t = unit / (heads + kv), h = unit % (heads + kv);
        float* x = s.qkv + t * row_size + h * d;
        const float* norm = h < heads ? l.q_norm : l.k_norm;
        if (norm) rms_norm(x, norm, d, m.eps, x);
        const int64_t at = tokens[t].position * d, slot = tokens[t].place;
        rotate(x, m.cos + at, m.sin + at, d);
        if (h < heads) return;
        const int64_t base = (tokens[t].row * kv + h - heads) * s.slots * d;
        float* key = s.keys[layer] + base + slot / SLOTS * SLOTS * d + slot % SLOTS;
        for (int64_t j = 0; j < d; j++) key[j * SLOTS] = x[j];
        memcpy(s.values[layer] + base + slot * d, x + kv * d, d * 4);
    }

    // The tokens of a row one after the other: its keys and values may stay in a cache.
    void mix(int64_t layer, int64_t unit, float* scores) const {
        const int64_t together = int64_t(firsts.size()) - 1;
        const int64_t g = unit / together, t = firsts[unit % together], count = firsts[unit % together + 1] - t;
        const int64_t from = (tokens[t].row * kv + g) * s.slots * d, width = s.slots + SLOTS;
        for (int64_t h = g * group; h < (g + 1) * group; h += 3) {
            const int64_t left = (g + 1) * group - h;
            auto run = count == TOGETHER ? for_heads<TOGETHER>(left) : for_heads<1>(left);
            run(&tokens[t], s.qkv + t * row_size + h * d, row_size, s.keys[layer] + from, s.values[layer] + from, d, width, scores,
                s.mixed + (t * heads + h) * d, heads * d);
        }
    }

    // The state that a drafter asked for.
    void keep(int64_t id, int64_t t) const {
        if (s.wanted[id] >= 0) memcpy(s.features + t * s.feature_size + s.wanted[id], s.x + t * H, H * 4);
    }
};

}  // namespace

extern "C" void flashdraft_linear(const Linear* l, const float* x, int64_t rows, float* y, int64_t threads) {
    LinearJob job(*l, x, rows, y);
    flashdraft::team().run(job, {{0, 0, pieces_of(*l, STORE), 0}}, threads);
}

extern "C" void flashdraft_step(const Model* model, const Step* step) {
    StepJob job(*model, *step);
    flashdraft::team().run(job, job.phases(), step->threads, step->seconds);
}
