// Attention of a few nodes of one row to the keys and values of one head.

#pragma once
#include <cstdint>
#include <vector>
#include "vectors.h"

namespace flashdraft {

struct Node {
    int64_t row;                // of the cache
    int64_t start;              // committed slots of its row
    int64_t slot;               // its own
    int64_t position;           // in the text, for the rotary tables
    std::vector<int64_t> seen;  // nodes of its row that it sees, itself too: slots behind `start`
};

namespace {

constexpr int NODES_TOGETHER = LANES == 16 ? 2 : 1;  // read keys together, as registers allow

}  // namespace

// Query heads that share keys, of nodes of one row.
struct Queries {
    const Node* nodes;
    int64_t num_nodes;  // 1 or NODES_TOGETHER
    int64_t num_heads;
    const float* query;           // [nodes, heads, head_dim], the nodes query_stride apart
    int64_t query_stride;
    const float *keys, *values;   // of their head: cache.h
    int64_t slots, head_dim;
    float* out;                   // [nodes, heads, head_dim], the nodes out_stride apart
    int64_t out_stride;
};

// A node's sums run over the committed slots, then over the nodes that it sees, in order: where
// these lie, and who is read together with it, changes no bit.
void attend(const Queries& queries);

}  // namespace flashdraft
