// The sequential head of a drafter (layers.py), left to right: each token corrects the state of the
// next one.
//
// Of a row, node by node:
//
//   token = embedding of the likeliest id of the node before (of the first node: the anchor)
//   inner = silu(gate of [state, token]) * (up of [state, token])      [rank]
//   state + down of inner                                              [hidden]
//   logits of this node's `likely` ids = head times that

#include <algorithm>
#include <cmath>
#include <vector>
#include "interface.h"
#include "team.h"
#include "vectors.h"

namespace flashdraft {
namespace {

float dot(const float* a, const float* b, int64_t size) {
    constexpr int SUMS = 4;  // so that none waits for the one before it
    Floats sums[SUMS] = {};
    int64_t i = 0;
    for (; i + SUMS * LANES <= size; i += SUMS * LANES)
        for (int s = 0; s < SUMS; s++)
            sums[s] += load<Floats>(a + i + s * LANES) * load<Floats>(b + i + s * LANES);

    float rest = 0;
    for (; i < size; i++) rest += a[i] * b[i];
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

// The first three are a place's (a node of a row), one place behind the other; the last is for all.
enum ChainPhase { INNER, STATE, LOGITS, NORMALISE };

struct ChainJob : Job {
    const Chain& chain;
    const int64_t hidden, rank, likely;
    std::vector<float> inner, state;  // of the place that is worked on

    explicit ChainJob(const Chain& c)
        : chain(c), hidden(c.hidden), rank(c.rank), likely(c.likely), inner(c.rank),
          state(c.hidden) {}

    int64_t num_places() const { return chain.rows * chain.nodes; }

    std::vector<Phase> phases() const {
        std::vector<Phase> list;
        for (int64_t place = 0; place < num_places(); place++) {
            list.push_back({INNER, place, rank, 0});
            list.push_back({STATE, place, hidden, 0});
            list.push_back({LOGITS, place, likely, 0});
        }
        list.push_back({NORMALISE, 0, num_places(), 0});
        return list;
    }

    void run(const Phase& phase, const Pieces& pieces) override {
        const int64_t place = phase.at;
        switch (phase.kind) {
            case INNER: return find_inner(place, pieces);
            case STATE: return find_state(place, pieces);
            case LOGITS: return find_logits(place, pieces);
            default:
                for (int64_t at = pieces.from; at < pieces.to; at++) normalise(logits_at(at));
        }
    }

    const float* state_at(int64_t place) const { return chain.states + place * hidden; }
    const int64_t* ids_at(int64_t place) const { return chain.ids + place * likely; }
    float* logits_at(int64_t place) const { return chain.scores + place * likely; }

    // The embedding of the token before a place.
    const float* token_before(int64_t place) const {
        const int64_t row = place / chain.nodes, node = place % chain.nodes;
        if (node == 0) return chain.anchors + row * hidden;

        const float* logits = logits_at(place - 1);
        const int64_t best = std::max_element(logits, logits + likely) - logits;
        return chain.embedding + ids_at(place - 1)[best] * hidden;
    }

    void find_inner(int64_t place, const Pieces& pieces) {
        const float* x = state_at(place);
        const float* token = token_before(place);
        auto of_both = [&](int64_t output) {  // of gate_up, whose inputs are state and token
            const float* weight = chain.gate_up + output * 2 * hidden;
            return dot(weight, x, hidden) + dot(weight + hidden, token, hidden);
        };
        for (int64_t i = pieces.from; i < pieces.to; i++) {
            const float gate = of_both(i);
            inner[i] = gate / (1 + std::exp(-gate)) * of_both(rank + i);
        }
    }

    void find_state(int64_t place, const Pieces& pieces) {
        const float* x = state_at(place);
        for (int64_t i = pieces.from; i < pieces.to; i++)
            state[i] = x[i] + dot(chain.down + i * rank, inner.data(), rank);
    }

    void find_logits(int64_t place, const Pieces& pieces) const {
        const int64_t* ids = ids_at(place);
        float* logits = logits_at(place);
        for (int64_t i = pieces.from; i < pieces.to; i++)
            logits[i] = dot(chain.head + ids[i] * hidden, state.data(), hidden);
    }

    // log_softmax, in place.
    void normalise(float* logits) const {
        const float most = *std::max_element(logits, logits + likely);
        float mass = 0;
        for (int64_t i = 0; i < likely; i++) mass += std::exp(logits[i] - most);

        const float whole = most + std::log(mass);
        for (int64_t i = 0; i < likely; i++) logits[i] -= whole;
    }
};

}  // namespace
}  // namespace flashdraft

extern "C" void flashdraft_chain(const flashdraft::Chain* chain) {
    using namespace flashdraft;
    ChainJob job(*chain);
    run_by_team(job, job.phases(), chain->threads);
}
