// Asks the second-level cache for the beginning of a matrix that is read next, while memory has nothing else to do.
//
// Between two launches of a token memory stands still: the last blocks' sums, the launch, the first loads' latency; and
// while attention runs over a short context. Weights depend on nothing, so a launch beside those that the next product
// waits for (on the same level of the graph) may ask for its first bytes. An H100 reads 3.3 MB a microsecond and its
// cache holds 50 MB: 4096 x 4096 in Q4_K, 9.4 MB, is there in 3 us. A thread asks for one line of 128 bytes after the
// other and waits for none; a grid of one block a multiprocessor is enough. Not used yet: it has to be measured on a
// device, where it may as well take memory from the kernel that runs beside it.
#include "common.cuh"

// The first `lines` lines of 128 bytes.
extern "C" __global__ void __launch_bounds__(128) prefetch(const u8* from, int lines) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < lines; i += gridDim.x * blockDim.x)
        ask_for(from + 128 * (size_t)i);
}
