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

extern "C" void flashdraft_linear(const Linear* l, const float* x, int64_t rows, float* y, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        Scratch own;
        linear(*l, x, rows, y, STORE, own);
    }
}

extern "C" void flashdraft_step(const Model* model, const Step* step) {
    const Model& m = *model;
    const Step& s = *step;
    std::vector<Token> tokens;
    std::vector<int64_t> firsts;  // of tokens that read keys together; then the end
    for (int64_t r = 0; r < s.rows; r++)
        for (int64_t i = 0; i < s.size[r]; i++) {
            if (i % TOGETHER == 0) firsts.push_back(tokens.size());
            tokens.push_back({s.row[r], s.start[r], s.start[r] + i, s.start[r] + s.depth[r * s.nodes + i], {}});
            for (int64_t j = 0; j < s.size[r]; j++)
                if (s.seen[(r * s.nodes + i) * s.nodes + j]) tokens.back().nodes.push_back(j);
        }
    firsts.push_back(tokens.size());
    const int64_t H = m.hidden, d = m.head_dim, heads = m.heads, kv = m.kv_heads, group = heads / kv, n = s.tokens;
    const int64_t together = firsts.size() - 1;
    const int64_t row_size = (heads + 2 * kv) * d;
#pragma omp parallel num_threads(s.threads)
    {
        Scratch own;
        own.x.resize(n * H), own.scores.resize(3 * TOGETHER * (s.slots + SLOTS));
        const bool first = omp_get_thread_num() == 0;
        double last = omp_get_wtime();
        auto mark = [&](int part) {
            if (!s.seconds || !first) return;
            double now = omp_get_wtime();
            s.seconds[part] += now - last;
            last = now;
        };
        auto keep = [&](int64_t id) {  // the state that a drafter asked for
            if (s.wanted[id] >= 0)
                share(n, [&](int64_t t) { memcpy(s.features + t * s.feature_size + s.wanted[id], s.x + t * H, H * 4); });
        };
        for (int64_t i = 0; i < m.layers; i++) {
            const Layer& l = m.layer[i];
            for (int64_t t = 0; t < n; t++) rms_norm(s.x + t * H, l.input_norm, H, m.eps, &own.x[t * H]);
            mark(2);
            linear(l.qkv, own.x.data(), n, s.qkv, STORE, own);
#pragma omp barrier
            mark(0);
            share(n * (heads + kv), [&](int64_t unit) {  // queries in place, keys and values into their slots
                const int64_t t = unit / (heads + kv), h = unit % (heads + kv);
                float* x = s.qkv + t * row_size + h * d;
                const float* norm = h < heads ? l.q_norm : l.k_norm;
                if (norm) rms_norm(x, norm, d, m.eps, x);
                const int64_t at = tokens[t].position * d, slot = tokens[t].place;
                rotate(x, m.cos + at, m.sin + at, d);
                if (h >= heads) {
                    const int64_t base = (tokens[t].row * kv + h - heads) * s.slots * d;
                    float* key = s.keys[i] + base + slot / SLOTS * SLOTS * d + slot % SLOTS;
                    for (int64_t j = 0; j < d; j++) key[j * SLOTS] = x[j];
                    memcpy(s.values[i] + base + slot * d, x + kv * d, d * 4);
                }
            });
#pragma omp barrier
            share(kv * together, [&](int64_t unit) {  // the tokens of a row one after the other: its keys and values may stay in a cache
                const int64_t g = unit / together, t = firsts[unit % together], count = firsts[unit % together + 1] - t;
                const int64_t from = (tokens[t].row * kv + g) * s.slots * d, width = s.slots + SLOTS;
                for (int64_t h = g * group; h < (g + 1) * group; h += 3) {
                    const int64_t left = (g + 1) * group - h;
                    auto run = count == TOGETHER ? for_heads<TOGETHER>(left) : for_heads<1>(left);
                    run(&tokens[t], s.qkv + t * row_size + h * d, row_size, s.keys[i] + from, s.values[i] + from, d, width,
                        own.scores.data(), s.mixed + (t * heads + h) * d, heads * d);
                }
            });
#pragma omp barrier
            mark(1);
            linear(l.out, s.mixed, n, s.x, ADD, own);
#pragma omp barrier
            mark(0);
            for (int64_t t = 0; t < n; t++) rms_norm(s.x + t * H, l.post_norm, H, m.eps, &own.x[t * H]);
            mark(2);
            linear(l.gate_up, own.x.data(), n, s.inner, SILU, own);
#pragma omp barrier
            linear(l.down, s.inner, n, s.x, ADD, own);
#pragma omp barrier
            mark(0);
            keep(i);
        }
#pragma omp barrier
        share(n, [&](int64_t t) { rms_norm(s.x + t * H, m.norm, H, m.eps, s.x + t * H); });
#pragma omp barrier
        keep(m.layers);
    }
}
