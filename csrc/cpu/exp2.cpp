// The vector exp2 and log of vec.h on arrays, for the tests of their error bounds; compiled once per
// capability.
#include "vec.h"

namespace fastft {
inline namespace FASTFT_TARGET {

void exp2_array(const float* x, float* y, int64_t n) {
    map_blocks(x, y, n, [](Value<float> v) { return exp2_(v); });
}

void log_array(const float* x, float* y, int64_t n) {
    map_blocks(x, y, n, [](Value<float> v) { return log_(v); });
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
