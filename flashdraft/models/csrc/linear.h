// Products of token rows with packed weights, split over a team of threads: the vectors, the formats, the linear.
//
// Weights lie in panels of 32 outputs: [panel][k][32]; every one is read once, whatever the number of rows. Formats that hold
// the same float32 numbers in fewer bytes are widened in registers. A row's sums run over k in one fixed order.

#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#include "team.h"
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
// Asks for what will be read 8 KiB later, into the second cache: so that memory and arithmetic overlap (docs/log.md has what
// other distances gave). Never faults, wherever it points.
inline void fetch_ahead(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + 8192 + i, 0, 2);
}
inline vf splat(float x) { return vf{} + x; }
inline vf to_float(vi v) { return __builtin_convertvector(v, vf); }

enum Format { F32, BF16, Q8, Q4, INT8 };
struct Linear { int64_t format, outputs, inputs; const void* weight; const float* bias; const float* scale; };  // scale: INT8

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
            fetch_ahead(data, 4 * P);
            for (int v = 0; v < V; v++) w[v] = load<vf>(data + v * W);
            multiply<M>(s, w, x + k, K);
        }
    } else if constexpr (F == BF16) {  // a lane holds two inputs
        const uint8_t* data = (const uint8_t*)l.weight + p * K * P * 2;
        for (int64_t k = 0; k < K; k += 2, data += 4 * P) {
            fetch_ahead(data, 4 * P);
            for (int v = 0; v < V; v++) w[v] = (vf)(load<vi>(data + v * W * 4) << 16);
            multiply<M>(s, w, x + k, K);
            for (int v = 0; v < V; v++) w[v] = (vf)(load<vi>(data + v * W * 4) & int32_t(0xffff0000));
            multiply<M>(s, w, x + k + 1, K);
        }
    } else {  // blocks of 32 inputs: the panel's scales (and minima) in half precision, then 4 or 8 inputs a lane
        constexpr int BITS = F == Q4 ? 4 : 8, HEAD = F == Q4 ? 4 * P : 2 * P, BODY = BLOCK * P * BITS / 8;
        const uint8_t* data = (const uint8_t*)l.weight + p * (K / BLOCK) * (HEAD + BODY);
        for (int64_t k = 0; k < K; k += BLOCK, data += HEAD + BODY) {
            fetch_ahead(data, HEAD + BODY);
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

// Rows in 8 bits: blocks of 32 inputs, each with a scale of its own, against unsigned weights (128 added to each of them).
struct Block8 { int8_t x[BLOCK]; float scale; int32_t start; };  // start: -128 times the sum of x, which takes the 128 out again

inline vi dot4(vi sum, vi w, vi x) {  // w: 4 unsigned bytes a lane, x: 4 signed ones
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
    __m256i low = _mm256_set1_epi16(255), xs = (__m256i)x, ws = (__m256i)w;
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(ws, low), _mm256_srai_epi16(_mm256_slli_epi16(xs, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(ws, 8), _mm256_srai_epi16(xs, 8));
    return sum + (vi)_mm256_add_epi32(even, odd);
#else
    for (int b = 0; b < 32; b += 8) sum += ((w >> b) & 255) * ((x << (24 - b)) >> 24);
    return sum;
#endif
}

template <int M> Sums<M> panel8(const Linear& l, int64_t p, const Block8* x) {
    const int64_t blocks = l.inputs / BLOCK;
    Sums<M> s = {};
    const uint8_t* data = (const uint8_t*)l.weight + p * l.inputs * P;
    for (int64_t block = 0; block < blocks; block++) {
        fetch_ahead(data, BLOCK * P);
        vi a[M][V];
        for (int m = 0; m < M; m++) for (int v = 0; v < V; v++) a[m][v] = vi{} + x[m * blocks + block].start;
        for (int64_t i = 0; i < BLOCK; i += 4, data += 4 * P)
            for (int m = 0; m < M; m++) {
                vi b = vi{} + load<int32_t>(x[m * blocks + block].x + i);
                for (int v = 0; v < V; v++) a[m][v] = dot4(a[m][v], load<vi>(data + v * 4 * W), b);
            }
        for (int m = 0; m < M; m++) for (int v = 0; v < V; v++) s.a[m][v] += to_float(a[m][v]) * x[m * blocks + block].scale;
    }
    for (int m = 0; m < M; m++) for (int v = 0; v < V; v++) s.a[m][v] *= load<vf>(l.scale + p * P + v * W);
    return s;
}

void quantise(const float* x, int64_t count, Block8* out) {
    for (Block8* end = out + count / BLOCK; out < end; out++, x += BLOCK) {
        float all[BLOCK];
        for (int i = 0; i < BLOCK; i++) all[i] = std::fabs(x[i]);
        for (int half = BLOCK / 2; half; half /= 2)
            for (int i = 0; i < half; i++) all[i] = all[i] > all[i + half] ? all[i] : all[i + half];
        const float most = all[0];
        out->scale = most / 127;
        const float inverse = most > 0 ? 127 / most : 0;
        int32_t sum = 0;
        for (int i = 0; i < BLOCK; i++) {
            const int32_t q = int32_t(x[i] * inverse + 128.5f) - 128;  // to the nearest
            sum += q, out->x[i] = int8_t(q);
        }
        out->start = -128 * sum;
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
template <int M> Sums<M> one(const Linear& l, int64_t p, const float* x, const Block8* q) {
    Sums<M> s;
    switch (l.format) {
        case F32: s = panel<F32, M>(l, p, x); break;
        case BF16: s = panel<BF16, M>(l, p, x); break;
        case Q8: s = panel<Q8, M>(l, p, x); break;
        case Q4: s = panel<Q4, M>(l, p, x); break;
        default: s = panel8<M>(l, p, q);
    }
    if (l.bias)
        for (int m = 0; m < M; m++) for (int v = 0; v < V; v++) s.a[m][v] += load<vf>(l.bias + p * P + v * W);
    return s;
}

template <int M>
void tile(const Linear& l, int64_t p, const float* x, const Block8* q, float* y, Mode mode) {
    Sums<M> s = one<M>(l, p, x, q);
    const int64_t N = mode == SILU ? l.outputs / 2 : l.outputs, first = mode == SILU ? p / 2 * P : p * P;
    if (mode == SILU) {
        const Sums<M> up = one<M>(l, p + 1, x, q);
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
void tiles(const Linear& l, int64_t p, const float* x, const Block8* q, float* y, int64_t rows, Mode mode) {
    const int64_t K = l.inputs, N = mode == SILU ? l.outputs / 2 : l.outputs;
    for (; rows >= M; rows -= M, x += M * K, q += M * K / BLOCK, y += M * N) tile<M>(l, p, x, q, y, mode);
    if constexpr (M > 1) if (rows) tiles<M - 1>(l, p, x, q, y, rows, mode);
}

// What a thread keeps for itself between pieces of a phase, and the memory that it uses again.
struct Scratch {
    std::vector<float> x, scores;
    std::vector<Block8> q;
    uint64_t stamp = 0;  // of the phase whose rows lie in x or q
};

inline Scratch& own_scratch() {
    thread_local Scratch scratch;
    return scratch;
}

inline int64_t pieces_of(const Linear& l, Mode mode) { return (l.outputs + P - 1) / P / (mode == SILU ? 2 : 1); }

// Pieces `from` to `to`, a panel each (of SILU two). q: the rows in 8 bits, for INT8.
inline void linear(const Linear& l, const float* x, const Block8* q, int64_t rows, float* y, Mode mode, int64_t from, int64_t to) {
    const int64_t step = mode == SILU ? 2 : 1;
    for (int64_t piece = from; piece < to; piece++) tiles<TILE>(l, piece * step, x, q, y, rows, mode);
}

inline const Block8* in_8_bits(const Linear& l, const float* x, int64_t rows, Scratch& own) {
    if (l.format != INT8) return nullptr;
    own.q.resize(rows * l.inputs / BLOCK);
    quantise(x, rows * l.inputs, own.q.data());
    return own.q.data();
}

}  // namespace
