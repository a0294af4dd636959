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
    const int64_t H = c.hidden, R = c.rank;
#pragma omp parallel for num_threads(c.threads)
    for (int64_t r = 0; r < c.rows; r++) {
        std::vector<float> x(2 * H), inner(R);
        memcpy(&x[H], c.anchors + r * H, H * 4);
        for (int64_t k = 0; k < c.nodes; k++) {
            const int64_t at = r * c.nodes + k, *ids = c.ids + at * c.likely;
            float* logits = c.scores + at * c.likely;
            memcpy(x.data(), c.states + at * H, H * 4);
            for (int64_t i = 0; i < R; i++) {
                const float gate = dot(c.gate_up + i * 2 * H, x.data(), 2 * H);
                inner[i] = gate / (1 + std::exp(-gate)) * dot(c.gate_up + (R + i) * 2 * H, x.data(), 2 * H);
            }
            for (int64_t i = 0; i < H; i++) x[i] += dot(c.down + i * R, inner.data(), R);
            int64_t best = 0;
            for (int64_t i = 0; i < c.likely; i++)
                if ((logits[i] = dot(c.head + ids[i] * H, x.data(), H)) > logits[best]) best = i;
            float mass = 0;
            for (int64_t i = 0; i < c.likely; i++) mass += std::exp(logits[i] - logits[best]);
            const float whole = logits[best] + std::log(mass);
            for (int64_t i = 0; i < c.likely; i++) logits[i] -= whole;
            memcpy(&x[H], c.embedding + ids[best] * H, H * 4);
        }
    }
}
