// A linear over some rows, in pieces for a team of threads.

#pragma once
#include <cstdint>
#include "interface.h"
#include "team.h"

namespace flashdraft {

// What becomes of the products Wx.
enum Mode {
    STORE,  // y = Wx
    ADD,    // y += Wx
    SWIGLU  // y = silu(gate) * up, where W's panels are those of gate and of up in turn
};

// A piece is a panel; of SWIGLU it is two, which make PANEL outputs.
int64_t num_pieces(const Linear& linear, Mode mode);

// x: [rows, inputs]; y: [rows, outputs], of SWIGLU half as many.
void multiply(const Linear& linear, const float* x, int64_t rows, float* y, Mode mode,
              const Pieces& pieces);

}  // namespace flashdraft
