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

namespace {

enum ChainWork { INNER, STATE, LOGITS, NORMALISE };

struct ChainJob : flashdraft::Job {
    const Chain& c;
    const int64_t H = c.hidden, R = c.rank;
    std::vector<float> inner, state;

    explicit ChainJob(const Chain& chain) : c(chain), inner(chain.rank), state(chain.hidden) {}

    const int64_t* ids_at(int64_t place) const { return c.ids + place * c.likely; }
    float* logits_at(int64_t place) const { return c.scores + place * c.likely; }

    const float* before(int64_t place) const {  // the embedding of the anchor, or of the likeliest token of the place before
        if (place % c.nodes == 0) return c.anchors + place / c.nodes * H;
        const float* logits = logits_at(place - 1);
        const int64_t best = std::max_element(logits, logits + c.likely) - logits;
        return c.embedding + ids_at(place - 1)[best] * H;
    }

    void run(const flashdraft::Phase& phase, uint64_t, int64_t from, int64_t to) override {
        const int64_t place = phase.at;
        const float* x = c.states + place * H;
        if (phase.kind == INNER) {
            const float* token = before(place);
            auto both = [&](const float* w) { return dot(w, x, H) + dot(w + H, token, H); };
            for (int64_t i = from; i < to; i++) {
                const float gate = both(c.gate_up + i * 2 * H);
                inner[i] = gate / (1 + std::exp(-gate)) * both(c.gate_up + (R + i) * 2 * H);
            }
        } else if (phase.kind == STATE) {
            for (int64_t i = from; i < to; i++) state[i] = x[i] + dot(c.down + i * R, inner.data(), R);
        } else if (phase.kind == LOGITS) {
            for (int64_t i = from; i < to; i++) logits_at(place)[i] = dot(c.head + ids_at(place)[i] * H, state.data(), H);
        } else {
            for (int64_t at = from; at < to; at++) normalise(logits_at(at));
        }
    }

    void normalise(float* logits) const {
        const float most = *std::max_element(logits, logits + c.likely);
        float mass = 0;
        for (int64_t i = 0; i < c.likely; i++) mass += std::exp(logits[i] - most);
        const float whole = most + std::log(mass);
        for (int64_t i = 0; i < c.likely; i++) logits[i] -= whole;
    }
};

}  // namespace

extern "C" void flashdraft_chain(const Chain* chain) {
    ChainJob job(*chain);
    const int64_t places = chain->rows * chain->nodes;
    std::vector<flashdraft::Phase> phases;
    for (int64_t place = 0; place < places; place++) {
        phases.push_back({INNER, place, chain->rank, 0});
        phases.push_back({STATE, place, chain->hidden, 0});
        phases.push_back({LOGITS, place, chain->likely, 0});
    }
    phases.push_back({NORMALISE, 0, places, 0});
    flashdraft::team().run(job, phases, chain->threads);
}
