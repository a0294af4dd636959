// One step of a llama-shaped decoder on a CPU: every weight is streamed once, whatever the number of tokens.
//
// Row-exact by construction: a token's sums run over k, and over its own visible slots, in one fixed order; how many
// tokens travel with it, which thread takes it and where a tree's nodes lie changes no bit. Weights lie in panels of 32
// outputs: [panel][k][32]. Formats that hold the same float32 numbers in fewer bytes are widened in registers.
// The vectors are the compiler's (GCC and Clang): AVX-512, AVX2, NEON or SSE by -march. C ABI; loaded by native.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16, TILE = 8;
#elif defined(__AVX__)
constexpr int W = 8, TILE = 3;
#else
constexpr int W = 4, TILE = 2;
#endif
constexpr int P = 32, V = P / W, BLOCK = 32;  // outputs of a panel, its vectors, inputs that share a scale

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));

template <class T> inline T load(const void* p) { T v; memcpy(&v, p, sizeof v); return v; }
template <class T> inline void store(void* p, T v) { memcpy(p, &v, sizeof v); }
inline vf splat(float x) { return vf{} + x; }
inline vf to_float(vi v) { return __builtin_convertvector(v, vf); }

enum Format { F32, BF16, Q8, Q4, INT8 };
struct Linear { int64_t format, outputs, inputs; const void* weight; const float* bias; const float* scale; };  // scale, offset: INT8

inline float half(uint16_t h) {  // IEEE half to float, subnormals and all
    uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
    float magnitude; memcpy(&magnitude, &rest, 4);
    magnitude *= 0x1p112f;
    uint32_t bits; memcpy(&bits, &magnitude, 4); bits |= sign;
    float out; memcpy(&out, &bits, 4); return out;
}
inline vf halves(const uint16_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vf v; for (int i = 0; i < W; i++) v[i] = half(p[i]); return v;
#endif
}

// ---- products: M rows of x with one panel --------------------------------------------------------------------------

template <int M> struct Sums { vf a[M][V]; };

template <int M> inline void multiply(Sums<M>& s, const vf* w, const float* x, int64_t stride) {
    for (int m = 0; m < M; m++) {
        vf b = splat(x[m * stride]);
        for (int v = 0; v < V; v++) s.a[m][v] += b * w[v];
    }
}

template <int F, int M> Sums<M> panel(const Linear& l, int64_t p, const float* x) {
    const int64_t K = l.inputs;
    Sums<M> s = {};
    vf w[V];
    if constexpr (F == F32) {
        const float* data = (const float*)l.weight + p * K * P;
        for (int64_t k = 0; k < K; k++, data += P) {
            for (int v = 0; v < V; v++) w[v] = load<vf>(data + v * W);
            multiply<M>(s, w, x + k, K);
        }
    } else if constexpr (F == BF16) {  // a lane holds two inputs
        const uint8_t* data = (const uint8_t*)l.weight + p * K * P * 2;
        for (int64_t k = 0; k < K; k += 2, data += 4 * P) {
            for (int v = 0; v < V; v++) w[v] = (vf)(load<vi>(data + v * W * 4) << 16);
            multiply<M>(s, w, x + k, K);
            for (int v = 0; v < V; v++) w[v] = (vf)(load<vi>(data + v * W * 4) & int32_t(0xffff0000));
            multiply<M>(s, w, x + k + 1, K);
        }
    } else {  // blocks of 32 inputs: the panel's scales (and minima) in half precision, then 4 or 8 inputs a lane
        constexpr int BITS = F == Q4 ? 4 : 8, HEAD = F == Q4 ? 4 * P : 2 * P, BODY = BLOCK * P * BITS / 8;
        const uint8_t* data = (const uint8_t*)l.weight + p * (K / BLOCK) * (HEAD + BODY);
        for (int64_t k = 0; k < K; k += BLOCK, data += HEAD + BODY) {
            vf d[V], low[V];
            for (int v = 0; v < V; v++) {
                d[v] = halves((const uint16_t*)data + v * W);
                if constexpr (F == Q4) low[v] = halves((const uint16_t*)data + P + v * W);
            }
            const uint8_t* q = data + HEAD;
            for (int64_t i = 0; i < BLOCK; i += 32 / BITS, q += 4 * P)
                for (int j = 0; j < 32 / BITS; j++) {
                    for (int v = 0; v < V; v++) {
                        vi lanes = load<vi>(q + v * W * 4);
                        if constexpr (F == Q4) w[v] = to_float((lanes >> 4 * j) & 15) * d[v] + low[v];
                        else w[v] = to_float((lanes << (24 - 8 * j)) >> 24) * d[v];
                    }
                    multiply<M>(s, w, x + k + i + j, K);
                }
        }
    }
    return s;
}

// Rows in 8 bits: q = round(x / scale) + 128 as unsigned bytes, four inputs side by side; integers have no order.
inline vi dot4(vi sum, vi x, vi w) {  // x: 4 unsigned bytes a lane, w: 4 signed ones
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#elif defined(__AVX2__)
    __m256i low = _mm256_set1_epi16(255), xs = (__m256i)x, ws = (__m256i)w;
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(xs, low), _mm256_srai_epi16(_mm256_slli_epi16(ws, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(xs, 8), _mm256_srai_epi16(ws, 8));
    return sum + (vi)_mm256_add_epi32(even, odd);
#else
    for (int b = 0; b < 32; b += 8) sum += ((x >> b) & 255) * ((w << (24 - b)) >> 24);
    return sum;
#endif
}

template <int M> Sums<M> panel8(const Linear& l, int64_t p, const uint8_t* x, const float* scales) {
    const int64_t K = l.inputs;
    Sums<M> s;
    vi a[M][V] = {};
    const int8_t* data = (const int8_t*)l.weight + p * K * P;
    for (int64_t k = 0; k < K; k += 4, data += 4 * P)
        for (int m = 0; m < M; m++) {
            vi b = vi{} + load<int32_t>(x + m * K + k);
            for (int v = 0; v < V; v++) a[m][v] = dot4(a[m][v], b, load<vi>(data + v * 4 * W));
        }
    const float* scale = l.scale + p * 2 * P;  // the panel's scales, then 128 times its sums, as floats' integers
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++)
            s.a[m][v] = to_float(a[m][v] - load<vi>(scale + P + v * W)) * (load<vf>(scale + v * W) * scales[m]);
    return s;
}

void quantise(const float* x, int64_t rows, int64_t K, uint8_t* q, float* scales) {
    for (int64_t m = 0; m < rows; m++, x += K, q += K) {
        float most = 0;
        for (int64_t k = 0; k < K; k++) most = std::max(most, std::fabs(x[k]));
        scales[m] = most / 127;
        float inverse = most > 0 ? 127 / most : 0;
        for (int64_t k = 0; k < K; k++) q[k] = uint8_t(int32_t(x[k] * inverse + 128.5f));
    }
}

// ---- a linear, split over the team's threads -----------------------------------------------------------------------

vf exp_of(vf x) {  // 2^n e^r, the polynomial of Cephes; within 2 units in the last place
    x = x < -87.0f ? splat(-87.0f) : x > 88.0f ? splat(88.0f) : x;
    vf n = x * 1.44269504f + 12582912.0f;  // rounds to the nearest integer, kept in the low bits
    vi exponent = (vi)n;
    n -= 12582912.0f;
    vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vf y = splat(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) y = y * r + c;
    y = y * r * r + r + 1.0f;
    return (vf)((vi)y + (exponent << 23));
}

enum Mode { STORE, ADD, SILU };  // y = Wx; y += Wx; y = silu(first panel of two) * second
template <int M> Sums<M> one(const Linear& l, int64_t p, const float* x, const uint8_t* q, const float* scales) {
    Sums<M> s;
    switch (l.format) {
        case F32: s = panel<F32, M>(l, p, x); break;
        case BF16: s = panel<BF16, M>(l, p, x); break;
        case Q8: s = panel<Q8, M>(l, p, x); break;
        case Q4: s = panel<Q4, M>(l, p, x); break;
        default: s = panel8<M>(l, p, q, scales);
    }
    if (l.bias)
        for (int m = 0; m < M; m++) for (int v = 0; v < V; v++) s.a[m][v] += load<vf>(l.bias + p * P + v * W);
    return s;
}

template <int M>
void tile(const Linear& l, int64_t p, const float* x, const uint8_t* q, const float* scales, float* y, Mode mode) {
    Sums<M> s = one<M>(l, p, x, q, scales);
    const int64_t N = mode == SILU ? l.outputs / 2 : l.outputs, first = mode == SILU ? p / 2 * P : p * P;
    if (mode == SILU) {
        const Sums<M> up = one<M>(l, p + 1, x, q, scales);
        for (int m = 0; m < M; m++)
            for (int v = 0; v < V; v++) s.a[m][v] = s.a[m][v] / (1.0f + exp_of(-s.a[m][v])) * up.a[m][v];
    }
    for (int m = 0; m < M; m++) {
        float* out = y + m * N + first;
        if (first + P <= N)
            for (int v = 0; v < V; v++) store(out + v * W, mode == ADD ? load<vf>(out + v * W) + s.a[m][v] : s.a[m][v]);
        else
            for (int64_t i = 0; first + i < N; i++) out[i] = (mode == ADD ? out[i] : 0) + s.a[m][i / W][i % W];
    }
}

template <int M>
void tiles(const Linear& l, int64_t p, const float* x, const uint8_t* q, const float* scales, float* y, int64_t rows, Mode mode) {
    const int64_t K = l.inputs, N = mode == SILU ? l.outputs / 2 : l.outputs;
    for (; rows >= M; rows -= M, x += M * K, q += M * K, scales += M, y += M * N) tile<M>(l, p, x, q, scales, y, mode);
    if constexpr (M > 1) if (rows) tiles<M - 1>(l, p, x, q, scales, y, rows, mode);
}

struct Scratch { std::vector<float> x, scores; std::vector<uint8_t> q; std::vector<float> scales; };

void linear(const Linear& l, const float* x, int64_t rows, float* y, Mode mode, Scratch& own) {
    if (l.format == INT8) {
        own.q.resize(rows * l.inputs), own.scales.resize(rows);
        quantise(x, rows, l.inputs, own.q.data(), own.scales.data());
    }
    const int64_t step = mode == SILU ? 2 : 1, units = (l.outputs + P - 1) / P / step;
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    for (int64_t u = units * me / team; u < units * (me + 1) / team; u++)
        tiles<TILE>(l, u * step, x, own.q.data(), own.scales.data(), y, rows, mode);
}

// ---- the small parts -----------------------------------------------------------------------------------------------

inline float sum(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX__)
    __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
#else
    float s = v[0]; for (int i = 1; i < W; i++) s += v[i]; return s;
#endif
}
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

// Attention of Q heads that share keys. Keys lie in blocks of 64 slots, [block][d][64], so that a vector holds one input of
// many slots; values lie slot by slot. A token sees the slots before `start` and `count` nodes behind it, in their order.
constexpr int SLOTS = 64;

template <int Q>
void attend(const float* q, const float* keys, const float* values, int64_t d, int64_t start, const int64_t* nodes, int64_t count,
            int64_t width, float* scores, float* out) {
    const int64_t last = count ? start + nodes[count - 1] : start - 1, seen = start + count;
    const float scale = 1 / std::sqrt(float(d));
    for (int64_t block = 0; block <= last / SLOTS; block++) {
        vf acc[Q][SLOTS / W] = {};
        for (int64_t i = 0; i < d; i++) {
            const float* k = keys + (block * d + i) * SLOTS;
            for (int v = 0; v < SLOTS / W; v++) {
                vf lanes = load<vf>(k + v * W);
                for (int h = 0; h < Q; h++) acc[h][v] += lanes * splat(q[h * d + i]);
            }
        }
        for (int h = 0; h < Q; h++)
            for (int v = 0; v < SLOTS / W; v++) store(scores + h * width + block * SLOTS + v * W, acc[h][v] * scale);
    }
    float all[Q];
    for (int h = 0; h < Q; h++) {
        float *p = scores + h * width, most = -INFINITY;
        for (int64_t j = 0; j < count; j++) p[start + j] = p[start + nodes[j]];
        for (int64_t j = 0; j < seen; j++) most = std::max(most, p[j]);
        for (int64_t j = seen; j % W; j++) p[j] = -INFINITY;
        vf mass = {};
        for (int64_t j = 0; j < seen; j += W) {
            vf x = load<vf>(p + j), e = x == -INFINITY ? vf{} : exp_of(x - most);
            mass += e;
            store(p + j, e);
        }
        all[h] = sum(mass);
    }
    for (int64_t i = 0; i < d; i += 4 * W) {
        auto mix = [&](int parts) __attribute__((always_inline)) {  // unrolled where `parts` is a constant
            vf acc[Q][4] = {};
            for (int64_t j = 0; j < seen; j++) {
                const float* v = values + (j < start ? j : start + nodes[j - start]) * d + i;
                for (int part = 0; part < parts; part++) {
                    vf lanes = load<vf>(v + part * W);
                    for (int h = 0; h < Q; h++) acc[h][part] += lanes * splat(scores[h * width + j]);
                }
            }
            for (int h = 0; h < Q; h++)
                for (int part = 0; part < parts; part++) store(out + h * d + i + part * W, acc[h][part] / all[h]);
        };
        d - i >= 4 * W ? mix(4) : mix(int(d - i) / W);
    }
}

}  // namespace

// ---- what native.py calls; every struct there has the same fields ----------------------------------------------------

struct Layer { const float *input_norm, *post_norm, *q_norm, *k_norm; Linear qkv, out, gate_up, down; };
struct Model {
    int64_t layers, hidden, heads, kv_heads, head_dim, inner; float eps;
    const Layer* layer; const float *norm, *cos, *sin;
};
struct Step {
    int64_t tokens, slots, width, feature_size, threads;      // slots of a cache row; width of `ancestors`
    const int64_t *row, *start, *place, *position;            // of each token: cache row, committed slots, own slot, position
    const int64_t *num_ancestors, *ancestors;                 // nodes behind `start` that it sees, itself last
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
    const int64_t H = m.hidden, d = m.head_dim, heads = m.heads, kv = m.kv_heads, group = heads / kv, n = s.tokens;
    const int64_t row_size = (heads + 2 * kv) * d;
#pragma omp parallel num_threads(s.threads)
    {
        Scratch own;
        own.x.resize(n * H), own.scores.resize(3 * (s.slots + SLOTS));
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
        double last = omp_get_wtime();
        auto mark = [&](int part) {
            if (!s.seconds || me) return;
            double now = omp_get_wtime();
            s.seconds[part] += now - last;
            last = now;
        };
        auto share = [&](int64_t count, auto work) { for (int64_t i = count * me / team; i < count * (me + 1) / team; i++) work(i); };
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
                rotate(x, m.cos + s.position[t] * d, m.sin + s.position[t] * d, d);
                if (h >= heads) {
                    const int64_t slot = s.place[t], base = (s.row[t] * kv + h - heads) * s.slots * d;
                    float* key = s.keys[i] + base + slot / SLOTS * SLOTS * d + slot % SLOTS;
                    for (int64_t j = 0; j < d; j++) key[j * SLOTS] = x[j];
                    memcpy(s.values[i] + base + slot * d, x + kv * d, d * 4);
                }
            });
#pragma omp barrier
            share(n * kv, [&](int64_t unit) {
                const int64_t t = unit / kv, g = unit % kv, from = (s.row[t] * kv + g) * s.slots * d;
                const int64_t start = s.start[t], count = s.num_ancestors[t], *nodes = s.ancestors + t * s.width;
                for (int64_t h = g * group; h < (g + 1) * group;) {
                    const int64_t heads_left = (g + 1) * group - h, width = s.slots + SLOTS;
                    auto run = heads_left >= 3 ? attend<3> : heads_left == 2 ? attend<2> : attend<1>;
                    run(s.qkv + t * row_size + h * d, s.keys[i] + from, s.values[i] + from, d, start, nodes, count, width,
                        own.scores.data(), s.mixed + (t * heads + h) * d);
                    h += std::min<int64_t>(3, heads_left);
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
