// What a packed weight looks like in memory. pack.cpp writes it, panel.h reads it.
//
// A weight [outputs, inputs] is cut into panels of 32 outputs; the last one is filled up with
// zeros. One panel lies behind the other, and within a panel the inputs come in order, the 32
// outputs of an input side by side. So a vector holds one input of LANES outputs, and a product
// reads the weight once, from front to back, whatever the number of rows.
//
//                  inputs  0  1  2 ...
//                 +-------------------+
//   outputs 0-31  | panel 0           |       memory:  | panel 0 | panel 1 | ...
//          32-63  | panel 1           |       panel:   | input 0 | input 1 | ...
//           ...   |                   |       input:   | output 0 | output 1 | ... | output 31 |
//                 +-------------------+
//
// The narrow formats fill lanes of 32 bits with several inputs of the same output. n: the output
// within its panel; k: the input.
//
//   FLOAT32   | n 0: k 0 | n 1: k 0 | ... | n 31: k 0 | n 0: k 1 | ...
//             `- 32 bit -'
//
//   BFLOAT16  | n 0: k 0, k 1 | n 1: k 0, k 1 | ... | n 31: k 0, k 1 | n 0: k 2, k 3 | ...
//             `--- 32 bit ----'  the even input in the low half
//
//   Q8        blocks of 32 inputs, each with the scales of its 32 outputs before it:
//             | scale of n 0 | ... | scale of n 31 | n 0: k 0-3 | ... | n 31: k 0-3 | n 0: k 4-7
//             `-- float16 ---'                      `- 32 bit -'  k 0 in the lowest byte
//             weight = scale * number, of 8 bits with a sign
//
//   Q4        the same with a minimum beside each scale, and eight inputs in a lane:
//             | 32 scales | 32 minima | n 0: k 0-7 | ... | n 31: k 0-7 | n 0: k 8-15 | ...
//             `------ float16 -------' `- 32 bit -'  k 0 in the lowest four bits
//             weight = scale * number + minimum, number from 0 to 15
//
//   INT8      | n 0: k 0-3 | n 1: k 0-3 | ... | n 31: k 0-3 | n 0: k 4-7 | ...
//             `-- 32 bit --'  k 0 in the lowest byte
//             weight = scale[n] * (number - 128), number unsigned; the scales lie elsewhere
//             (Linear::scale), a float32 for each output
//
// All but INT8 hold exactly the float32 numbers that they were made of.

#pragma once
#include <cstdint>

namespace flashdraft {

enum Format { FLOAT32, BFLOAT16, Q8, Q4, INT8 };  // in the order of native.py

namespace {

constexpr int PANEL = 32;  // outputs that lie side by side
constexpr int BLOCK = 32;  // inputs that share scales: in Q8, in Q4, and in INT8's rows
constexpr int LANE_BITS = 32, LANE_BYTES = 4;
constexpr int HALF_BYTES = 2;
constexpr int UNSIGNED = 128;  // what is added to the numbers of INT8, to make them unsigned

// Of Q8 and Q4.
constexpr int number_bits(Format format) { return format == Q4 ? 4 : 8; }
constexpr int inputs_of_a_lane(Format format) { return LANE_BITS / number_bits(format); }
constexpr int scale_bytes(Format format) { return PANEL * HALF_BYTES * (format == Q4 ? 2 : 1); }
constexpr int number_bytes(Format format) { return BLOCK * PANEL * number_bits(format) / 8; }
constexpr int block_bytes(Format format) { return scale_bytes(format) + number_bytes(format); }

inline int64_t num_panels(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }

}  // namespace
}  // namespace flashdraft
