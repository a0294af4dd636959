// What native.py calls, and the structs that it fills: the same fields in the same order there.
//
// Sizes are counted in numbers, not in bytes. Nothing is checked here: native.py does that.

#pragma once
#include <cstdint>

namespace flashdraft {

// x -> x @ weight.T + bias. format: of formats.h; weight: packed; bias: filled up to whole panels,
// or null; scale: of INT8's outputs.
struct Linear {
    int64_t format, outputs, inputs;
    const void* weight;
    const float* bias;
    const float* scale;
};

// A sublayer's (convolution.h). base: [2, taps, hidden]; kernels: gives [2, taps, conv_groups].
struct Convolution {
    const float* base;
    Linear kernels;
};

// qkv: the queries', the keys' and the values' heads; gate_up: panels of the gate and of the other
// half in turn. q_norm, k_norm: null where a model has none.
struct Layer {
    const float *input_norm, *post_norm, *q_norm, *k_norm;
    Linear qkv, out, gate_up, down;
    Convolution attention_conv, mlp_conv;
};

// cos, sin: [positions, head_dim]. taps: 0 where a model has no convolutions.
struct Model {
    int64_t layers, hidden, heads, kv_heads, head_dim, inner;
    int64_t taps, conv_groups;
    float eps;
    const Layer* layer;
    const float *norm, *cos, *sin;
};

// One pass over new tokens, the nodes, of some rows of a cache (cache.h draws it).
struct Step {
    int64_t rows;
    int64_t nodes;         // of the row that has most
    int64_t tokens;        // nodes of all rows
    int64_t slots;         // of a row of the cache
    int64_t feature_size;  // numbers that are kept of a token
    int64_t threads;
    const int64_t* row;         // [rows]: which row of the cache
    const int64_t* start;       // [rows]: committed slots
    const int64_t* size;        // [rows]: nodes
    const int64_t* depth;       // [rows, nodes]: position behind `start`
    const uint8_t* seen;        // [rows, nodes, nodes]: whether node i sees node j
    float *const *keys;         // of each layer
    float *const *values;       // of each layer
    const int64_t* wanted;      // of each layer and the final state: column in features, or -1
    float* x;                   // [tokens, hidden]: embeddings; then the final state, normed
    float* qkv;                 // [tokens, (heads + 2 * kv_heads) * head_dim]: to work in
    float* mixed;               // [tokens, heads * head_dim]: to work in
    float* inner;               // [tokens, inner]: to work in
    float* kernels;             // [tokens, 2, taps, conv_groups]: to work in
    float* behind;              // [tokens, hidden], where there are taps: to work in
    float* features;            // [tokens, feature_size]
    double* seconds;            // null, or three sums: linears, attention, the rest
};

// A drafter's sequential head (draft.cpp). gate_up is not packed here.
struct Chain {
    int64_t rows, nodes, likely, hidden, rank, threads;
    const float* states;     // [rows, nodes, hidden]
    const float* anchors;    // [rows, hidden]: embeddings of the tokens before the first nodes
    const float* head;       // [ids, hidden]: of every draft id
    const float* embedding;  // [ids, hidden]
    const float* gate_up;    // [2 * rank, 2 * hidden]: of state and token side by side
    const float* down;       // [hidden, rank]
    const int64_t* ids;      // [rows, nodes, likely]: those among which each node chooses
    float* scores;           // [rows, nodes, likely]: their log-probabilities, which is the result
};

}  // namespace flashdraft

extern "C" {

// pack.cpp. weight: [outputs, inputs]; out, scale: as large as the format asks for. 1, or 0 where
// the format would round.
int64_t flashdraft_pack(const float* weight, int64_t format, int64_t outputs, int64_t inputs,
                        uint8_t* out, float* scale);

// linear.cpp. x: [rows, inputs]; y: [rows, outputs].
void flashdraft_linear(const flashdraft::Linear* linear, const float* x, int64_t rows, float* y,
                       int64_t threads);

// step.cpp
void flashdraft_step(const flashdraft::Model* model, const flashdraft::Step* step);

// draft.cpp
void flashdraft_chain(const flashdraft::Chain* chain);

// team.cpp. A job comes soon: threads that sleep wake up meanwhile.
void flashdraft_call();

}
