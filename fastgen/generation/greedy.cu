// The greedy choice of the next tokens, and all that depends on them; follows select.cu.
//
// The reference is choose.py's Choose: the results are equal bit for bit.

constexpr int MAX_ENDS = 32, LOADS = 4;  // 16-byte loads of a thread that are under way at once

struct GreedyArgs {
    const T* logits;    // [rows, vocabulary], the first 16-byte aligned
    const int64* pad;   // [1]: with ``pads``, what finished rows continue with
    const int64* eos;   // [ends]
    int64* sequences;   // [rows, capacity]
    int64* index;       // [1]: where the next token goes
    int64* input_ids;   // [rows]
    int64* position;    // [1]
    int64* first_slot;  // [rows]
    bool* unfinished;   // [rows]: with ``stops``, false behind an end token
    bool* seen;         // [rows]: the same in host memory
    uint64* best;       // [rows, gridDim.x]
    unsigned* arrived;  // [1]: 0 between launches
    int rows, vocabulary, capacity, ends, pads, stops;
};

// A value and its place as one number that is greatest for torch.argmax's choice: NaN before all,
// then the greatest value (0 and -0 are equal), then the lowest place.
INLINE uint64 ranked(float value, int place) {
    const unsigned bits = __float_as_uint(value), size = bits & 0x7fffffff, zero = 0x80000000;
    const unsigned order = value != value ? ~0u : bits == size ? zero + size : zero - size;
    return (uint64)order << 32 | (unsigned)~place;
}

// The best of a block's share of one row, in thread 0.
INLINE uint64 block_argmax(const T* logits, const GreedyArgs& args) {
    constexpr int COUNT = 16 / sizeof(T);
    struct alignas(16) Pack { T element[COUNT]; };
    const int stride = gridDim.x * blockDim.x, first = blockIdx.x * blockDim.x + threadIdx.x;
    float best = __uint_as_float(0xff800000);
    int place = 0;  // right if nothing is above -inf
    auto look = [&](T logit, int i) {
        const float x = to_float(logit);
        if (!(x <= best) && best == best) best = x, place = i;
    };
    // A row begins anywhere between 16-byte boundaries: in front of the first and behind the last
    // are up to COUNT - 1 logits on their own
    const int head = (int)(-(int64)blockIdx.y * args.vocabulary & (COUNT - 1));
    const int packs = max(args.vocabulary - head, 0) / COUNT;
    if (first < min(head, args.vocabulary)) look(logits[first], first);
    for (int start = first; start < packs; start += LOADS * stride) {
        Pack pack[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; i++)
            if (start + i * stride < packs)
                pack[i] = ((const Pack*)(logits + head))[start + i * stride];
#pragma unroll
        for (int i = 0; i < LOADS; i++)
            if (start + i * stride < packs)
#pragma unroll
                for (int e = 0; e < COUNT; e++)
                    look(pack[i].element[e], head + (start + i * stride) * COUNT + e);
    }
    for (int i = head + packs * COUNT + first; i < args.vocabulary; i += stride) look(logits[i], i);

    __shared__ uint64 bests[32];
    uint64 all = ranked(best, place);
    for (int o = 16; o; o /= 2) all = max(all, __shfl_xor_sync(~0u, all, o));
    if (threadIdx.x % 32 == 0) bests[threadIdx.x / 32] = all;
    __syncthreads();
    if (threadIdx.x >= 32) return 0;
    all = threadIdx.x < blockDim.x / 32 ? bests[threadIdx.x] : 0;
    for (int o = 16; o; o /= 2) all = max(all, __shfl_xor_sync(~0u, all, o));
    return all;
}

// Whether this block is the last to arrive; it then sees what the others left in ``best``.
INLINE bool last_to_arrive(uint64 best, const GreedyArgs& args) {
    const unsigned blocks = gridDim.x * gridDim.y;
    if (blocks == 1) return true;
    __shared__ bool last;
    if (threadIdx.x == 0) {
        args.best[blockIdx.y * gridDim.x + blockIdx.x] = best;
        __threadfence();
        last = atomicAdd(args.arrived, 1) == blocks - 1;
        __threadfence();
    }
    __syncthreads();
    return last;
}

// Grid: blocks that share a row, rows. The last block moves all rows on, one thread each.
extern "C" __global__ void greedy(GreedyArgs args) {
    __shared__ int64 eos[MAX_ENDS];
    wait_for_inputs();
    const int row = threadIdx.x;
    const bool moves = row < args.rows;
    const int64 at = *args.index, pad = *args.pad;
    const bool unfinished = moves ? args.unfinished[row] : false;
    const int64 slot = moves ? args.first_slot[row] : 0;
    if (threadIdx.x < args.ends) eos[threadIdx.x] = args.eos[threadIdx.x];
    uint64 best = block_argmax(args.logits + (int64)blockIdx.y * args.vocabulary, args);
    if (!last_to_arrive(best, args)) return;
    if (moves) {
        if (gridDim.x * gridDim.y > 1) {
            best = 0;
            const volatile uint64* bests = args.best + row * gridDim.x;
            for (int i = 0; i < gridDim.x; i++) best = max(best, bests[i]);
        }
        const int64 token = args.pads && !unfinished ? pad : (int64)(unsigned)~best;
        if (at < args.capacity) args.sequences[(int64)row * args.capacity + at] = token;
        args.input_ids[row] = token;
        args.first_slot[row] = slot + 1;
        if (args.stops)
            args.unfinished[row] = args.seen[row] = unfinished && !is_end(token, eos, args.ends);
    }
    if (threadIdx.x == 0) {  // every thread has read the index: there was a barrier
        *args.index = at + 1;
        *args.position += 1;
        *args.arrived = 0;
    }
}
