// The sequential head of a drafter (layers.py), left to right: each token corrects the state of the next one.

#include "linear.h"

namespace {

float dot(const float* a, const float* b, int64_t n) {
    vf s[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
        for (int v = 0; v < 4; v++) s[v] += load<vf>(a + i + v * W) * load<vf>(b + i + v * W);
    float rest = 0;
    for (; i < n; i++) rest += a[i] * b[i];
    return sum((s[0] + s[1]) + (s[2] + s[3])) + rest;
}

}  // namespace

struct Chain {
    int64_t rows, nodes, likely, hidden, rank, threads;
    const float *states, *anchors;           // [rows, nodes, hidden]; embeddings [rows, hidden]
    const float *head, *embedding;           // of every draft id: [ids, hidden]
    const float *gate_up, *down;             // [2 * rank, 2 * hidden], [hidden, rank]
    const int64_t* ids;                      // among which each node chooses: [rows, nodes, likely]
    float* scores;                           // their log-probabilities, of which each node takes the likeliest
};

extern "C" void flashdraft_chain(const Chain* chain) {
    const Chain& c = *chain;
    const int64_t H = c.hidden, R = c.rank, places = c.rows * c.nodes;
    std::vector<float> inner(R), state(H);
#pragma omp parallel num_threads(c.threads)
    {
        const float* before = nullptr;  // the embedding of the token that the thread saw last, which all of them found
        for (int64_t at = 0; at < places; at++) {
            if (at % c.nodes == 0) before = c.anchors + at / c.nodes * H;
            const float* x = c.states + at * H;
            const int64_t* ids = c.ids + at * c.likely;
            float* logits = c.scores + at * c.likely;
            share(R, [&](int64_t i) {  // a thread's part of the weights is its own for all places, and may stay in its cache
                auto both = [&](const float* w) { return dot(w, x, H) + dot(w + H, before, H); };
                const float gate = both(c.gate_up + i * 2 * H);
                inner[i] = gate / (1 + std::exp(-gate)) * both(c.gate_up + (R + i) * 2 * H);
            });
#pragma omp barrier
            share(H, [&](int64_t i) { state[i] = x[i] + dot(c.down + i * R, inner.data(), R); });
#pragma omp barrier
            share(c.likely, [&](int64_t i) { logits[i] = dot(c.head + ids[i] * H, state.data(), H); });
#pragma omp barrier
            before = c.embedding + ids[std::max_element(logits, logits + c.likely) - logits] * H;
        }
#pragma omp barrier
        share(places, [&](int64_t at) {
            float *logits = c.scores + at * c.likely, most = *std::max_element(logits, logits + c.likely), mass = 0;
            for (int64_t i = 0; i < c.likely; i++) mass += std::exp(logits[i] - most);
            const float whole = most + std::log(mass);
            for (int64_t i = 0; i < c.likely; i++) logits[i] -= whole;
        });
    }
}
