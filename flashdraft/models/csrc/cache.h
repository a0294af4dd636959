// Where a layer's keys and values lie: the tensors of SlotCache (cache.py) with blocked keys.
//
//   values  [rows, kv_heads, slots, head_dim]
//   keys    [rows, kv_heads, slots / 64, head_dim, 64]
//
// One head of one row, d numbers a slot:
//
//   values  | slot 0: 0 1 ... d-1 | slot 1: 0 1 ... d-1 | ...
//   keys    | number 0: slots 0-63 | number 1: slots 0-63 | ... | number d-1: slots 0-63 |
//           | number 0: slots 64-127 | ...
//
// So a vector holds the same number of LANES keys, and a dot product with all of them needs no sum
// across lanes; of values, which are summed slot by slot, it holds LANES numbers of one slot.
//
// What a row's slots hold during a step:
//
//   slots   | 0 ...     start-1 | start ...    start+size-1 | ...
//           | the text so far,  | the nodes of this step,   | free
//           | every node sees   | a node sees itself and    |
//           | all of it         | those above it in a tree  |

#pragma once
#include <cstdint>

namespace flashdraft {
namespace {

constexpr int64_t KEY_BLOCK = 64;  // slots: cache.py's SLOT_STEP, and a multiple of every LANES

struct CacheShape {
    int64_t kv_heads, slots, head_dim;

    // Where a head's keys begin, and its values.
    int64_t head(int64_t row, int64_t kv_head) const {
        return (row * kv_heads + kv_head) * slots * head_dim;
    }

    // Within a head: a slot's first number; the next one lies KEY_BLOCK behind it.
    int64_t key(int64_t slot) const {
        const int64_t first_of_block = slot / KEY_BLOCK * KEY_BLOCK;
        return first_of_block * head_dim + slot % KEY_BLOCK;
    }

    // Within a head: a slot's first number; the next one lies beside it.
    int64_t value(int64_t slot) const { return slot * head_dim; }
};

}  // namespace
}  // namespace flashdraft
