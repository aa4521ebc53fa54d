// torch.topk with its order of equal items; follows select.cu.
//
// torch selects: the items above the k-th greatest and then those equal to it, each by place, go
// through a sorting network that is not stable. It promises no order; kernels.py compares.

// ---------------------------------------------------------------------------------------------
// Short rows

// Order of torch's radix selection, which tells -0 from 0.
INLINE unsigned radix(float x) {
    const unsigned bits = __float_as_uint(x);
    return x != x ? ~0u : bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

INLINE bool above(float a, float b) { return (a != a && b == b) || a > b; }

// A bitonic network of 32, one item a lane, which is not stable; lanes of place -1 have none.
INLINE void sort(float& item, int& place) {
    const int lane = threadIdx.x % 32;
    for (int size = 2; size <= 32; size *= 2)
        for (int stride = size / 2; stride; stride /= 2) {
            const float other = __shfl_xor_sync(~0u, item, stride);
            const int from = __shfl_xor_sync(~0u, place, stride);
            const bool low = !(lane & stride);
            const bool ordered = low ? (above(item, other) && place >= 0) || from < 0
                                     : (above(other, item) && from >= 0) || place < 0;
            if (ordered == (bool)(lane & size & 31)) item = other, place = from;
        }
}

// Places of the k <= 32 greatest of ``count`` items in shared memory, found by one warp. Those above
// the k-th greatest and then those equal to it, each by place, go through the network.
INLINE void top(const float* items, int count, int k, int* places) {
    const int lane = threadIdx.x % 32;
    unsigned limit = 0, below = 0;  // the k-th greatest, and how many are above it
    bool mine = false;
    for (int i = lane; i < count; i += 32) {
        const unsigned key = radix(items[i]);
        int higher = 0, before = 0;
#pragma unroll 1
        for (int j = 0; j < count; j++) {
            higher += radix(items[j]) > key;
            before += j < i && radix(items[j]) == key;
        }
        if (higher + before == k - 1) limit = key, below = higher, mine = true;
    }
    const int owner = __ffs(__ballot_sync(~0u, mine)) - 1;
    limit = __shfl_sync(~0u, limit, owner);
    below = __shfl_sync(~0u, below, owner);
    for (int i = lane; i < count; i += 32) {
        const unsigned key = radix(items[i]);
        if (key < limit) continue;
        int place = key == limit ? below : 0;
#pragma unroll 1
        for (int j = 0; j < i; j++)
            place += key == limit ? radix(items[j]) == limit : radix(items[j]) > limit;
        if (place < k) places[place] = i;
    }
    __syncwarp();
    int place = lane < k ? places[lane] : -1;
    float item = lane < k ? items[place] : 0.f;
    sort(item, place);
    if (lane < k) places[lane] = place;
}

struct TopArgs {
    const float* items;  // [gridDim.x, count], count <= 256
    int64* places;       // [gridDim.x, k]
    int count, k;
};

// The above for every row, to be compared with torch.topk.
extern "C" __global__ void top_rows(TopArgs args) {
    __shared__ float items[256];
    __shared__ int places[32];
    wait_for_inputs();
    for (int i = threadIdx.x; i < args.count; i += 32)
        items[i] = args.items[blockIdx.x * args.count + i];
    __syncwarp();
    top(items, args.count, args.k, places);
    if (threadIdx.x < args.k) args.places[blockIdx.x * args.k + threadIdx.x] = places[threadIdx.x];
}

// ---------------------------------------------------------------------------------------------
// Long rows: the best continuations of all beams of a row

constexpr int SELECT_WARPS = 16, ITEMS = 8, TILE = 32 * ITEMS, MAX_KEPT = 32;

struct SelectArgs {
    const float* log_probs;       // [rows, beams, vocabulary]
    const float* running_scores;  // [rows, beams], added to them
    uint64* kept;                 // [rows, beams, gridDim.x, k]
    unsigned* arrived;            // [rows]: 0 between launches
    float* top;                   // [rows, k]
    int64* indices;               // [rows, k]: beam * vocabulary + token
    int vocabulary, beams, k;
};

// Items are numbers (0: none) in order of value, equal ones by lowest place.
INLINE uint64 numbered(float value, unsigned place) { return (uint64)radix(value) << 32 | ~place; }

INLINE float value_of(uint64 item) {
    const unsigned order = item >> 32;
    return __uint_as_float(order & 0x80000000 ? order ^ 0x80000000 : ~order);
}

INLINE uint64 warp_max(uint64 x) {
    const unsigned high = __reduce_max_sync(~0u, (unsigned)(x >> 32));
    const unsigned low = __reduce_max_sync(~0u, x >> 32 == high ? (unsigned)x : 0);
    return (uint64)high << 32 | low;
}

// The k best of a warp's share of ``count`` items, the n-th in lane n: every ``step`` from
// ``first`` it takes a tile.
template <class Item> INLINE uint64 warp_best(Item item, int count, int k, int first, int step) {
    const int lane = threadIdx.x % 32;
    uint64 kept = 0;
    for (int start = first; start < count; start += step) {
        uint64 items[ITEMS + 1], mine = kept;
#pragma unroll
        for (int e = 0; e < ITEMS; e++) {
            const int i = start + e * 32 + lane;
            items[e] = i < count ? item(i) : 0;
        }
        items[ITEMS] = kept;
#pragma unroll
        for (int e = 0; e < ITEMS; e++) mine = max(mine, items[e]);
        kept = 0;
#pragma unroll 1
        for (int n = 0; n < k; n++) {
            const uint64 best = warp_max(mine);
            if (lane == n) kept = best;
            if (mine != best) continue;
            mine = 0;
#pragma unroll
            for (int e = 0; e <= ITEMS; e++) {
                if (items[e] == best) items[e] = 0;
                mine = max(mine, items[e]);
            }
        }
    }
    return kept;
}

// The same of a block, in its first warp.
template <class Item> INLINE uint64 block_best(Item item, int count, int k) {
    __shared__ uint64 lists[SELECT_WARPS * MAX_KEPT];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint64 best = warp_best(item, count, k, warp * TILE, SELECT_WARPS * TILE);
    if (count <= TILE) return best;
    if (lane < k) lists[warp * k + lane] = best;
    __syncthreads();
    if (warp > 0) return 0;
    return warp_best([&](int i) { return lists[i]; }, SELECT_WARPS * k, k, 0, TILE);
}

// By one warp: leaves the row's best in torch's order and clears the way for the next launch.
INLINE void store_best(uint64 best, int row, const SelectArgs& a) {
    __shared__ uint64 by_place[MAX_KEPT];
    const int lane = threadIdx.x;
    // those above the k-th by place, which ~place turns round; then the others
    const unsigned limit = __shfl_sync(~0u, (unsigned)(best >> 32), a.k - 1);
    int place = 0;
    for (int n = 0; n < a.k; n++) {
        const uint64 other = __shfl_sync(~0u, best, n);
        place += other >> 32 > limit && (unsigned)other > (unsigned)best;
    }
    if (lane < a.k) by_place[best >> 32 > limit ? place : lane] = best;
    __syncwarp();
    best = by_place[lane % a.k];
    float value = value_of(best);
    int index = lane < a.k ? (int)~(unsigned)best : -1;
    sort(value, index);
    if (lane < a.k) {
        a.top[row * a.k + lane] = value;
        a.indices[row * a.k + lane] = index;
    }
    if (lane == 0) a.arrived[row] = 0;
}

// Grid: blocks that share a beam, rows * beams. The last block of a row merges what all kept.
extern "C" __global__ void select_best(SelectArgs a) {
    __shared__ bool last;
    launch_dependents();
    wait_for_inputs();
    const int share = (a.vocabulary + gridDim.x - 1) / gridDim.x, first = blockIdx.x * share;
    const int row = blockIdx.y / a.beams, beam = blockIdx.y % a.beams;
    const float* scores = a.log_probs + (int64)blockIdx.y * a.vocabulary + first;
    const float before = a.running_scores[blockIdx.y];
    uint64 best = block_best(
        [&](int i) {
            return numbered(__fadd_rn(scores[i], before), beam * a.vocabulary + first + i);
        },
        min(share, a.vocabulary - first), a.k);
    if (threadIdx.x < 32) {
        if (threadIdx.x < a.k) {
            a.kept[((int64)blockIdx.y * gridDim.x + blockIdx.x) * a.k + threadIdx.x] = best;
            __threadfence();
        }
        __syncwarp();
        if (threadIdx.x == 0)
            last = atomicAdd(a.arrived + row, 1) == gridDim.x * a.beams - 1;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    const int count = gridDim.x * a.beams * a.k;
    const volatile uint64* kept = a.kept + (int64)row * count;
    best = block_best([&](int i) { return (uint64)kept[i]; }, count, a.k);
    if (threadIdx.x < 32) store_best(best, row, a);
}
