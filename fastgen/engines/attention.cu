// Attention over KV buffers, and the embedding (see linear.cu for the definitions in front).

// ---------------------------------------------------------------------------------------------
// Embedding: the rows of the token ids start the residual stream

struct EmbeddingArgs {
    const long long* ids;  // [ROWS]
    const T* weight;       // [V, E]
    float* residual;       // [ROWS, E]
    int width;
};

INLINE void embedding(const EmbeddingArgs& args) {
    launch_dependents();
    const T* row = args.weight + args.ids[blockIdx.x] * args.width;
    for (int e = threadIdx.x; e < args.width; e += blockDim.x)
        args.residual[(long long)blockIdx.x * args.width + e] = to_float(row[e]);
}

// ---------------------------------------------------------------------------------------------
// Attention of one head and one KV row: unscaled, one pass, softmax kept as maximum and sum

struct AttentionArgs {
    const T* q;                        // [ROWS, stride]; SELF: new keys and values lie behind it
    T *key, *value;                    // [B, slots, H * D]
    const T* table;                    // SELF: [H, span], bias by key minus query position
    const T* mask;                     // [B, 1, QUERIES, slots] to add, or null
    const long long* query_positions;  // SELF: [QUERIES]
    const long long* slot_positions;   // SELF: [slots]
    const long long* first_slot;       // SELF: [B], where the new keys and values go
    T* y;                              // [ROWS, H * D]
    int heads, slots, stride, span, low, high;
};

INLINE void load8(const T* x, float (&y)[8]) {
    const Pack<T, 8> pack = *(const Pack<T, 8>*)x;
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = to_float(pack.element[i]);
}

// The bias of every visible slot, float [QUERIES, end], by distance as Python lists are indexed.
template <bool SELF> INLINE void load_bias(const AttentionArgs& args, int end, float* bias) {
    const T* table = args.table + (SELF ? blockIdx.x * args.span : 0);
    for (int s = threadIdx.x; s < end; s += blockDim.x)
        for (int q = 0; q < QUERIES; q++) {
            float value = 0.f;
            if constexpr (SELF) {
                const long long far = args.slot_positions[s] - args.query_positions[q];
                const int distance = (int)max((long long)args.low, min((long long)args.high, far));
                value = to_float(table[distance < 0 ? distance + args.span : distance]);
            }
            if (args.mask) {
                const long long row = (long long)blockIdx.y * QUERIES + q;
                value += to_float(args.mask[row * args.slots + s]);
            }
            bias[q * end + s] = value;
        }
}

// One query's softmax so far, over some of the slots.
struct Softmax {
    float top = negative_infinity(), sum = 0.f, y[8] = {};

    INLINE void add(float score, const float (&v)[8]) {
        const float highest = fmaxf(top, score);
        const float keep = top == highest ? 1.f : __expf(top - highest);
        const float p = score == negative_infinity() ? 0.f : __expf(score - highest);
        sum = sum * keep + p;
#pragma unroll
        for (int i = 0; i < 8; i++) y[i] = y[i] * keep + p * v[i];
        top = highest;
    }
    INLINE void merge(int offset) {  // with the lane at this xor offset
        const float other = __shfl_xor_sync(~0u, top, offset), highest = fmaxf(top, other);
        const float mine = top == highest ? 1.f : __expf(top - highest);
        const float theirs = other == highest ? 1.f : __expf(other - highest);
        sum = sum * mine + __shfl_xor_sync(~0u, sum, offset) * theirs;
#pragma unroll
        for (int i = 0; i < 8; i++) y[i] = y[i] * mine + __shfl_xor_sync(~0u, y[i], offset) * theirs;
        top = highest;
    }
};

template <int D, int WARPS, bool SELF> INLINE void attention(const AttentionArgs& args) {
    constexpr int LANES = D / 8, GROUPS = WARPS * 32 / LANES;  // LANES hold one slot's key
    extern __shared__ float bias[];
    __shared__ float merged[WARPS][QUERIES][D + 2];

    launch_dependents();
    const int h = blockIdx.x, b = blockIdx.y, width = args.heads * D;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int part = threadIdx.x % LANES * 8, group = threadIdx.x / LANES;
    const int old = SELF ? (int)args.first_slot[b] : args.slots;
    const int end = SELF ? min(old + QUERIES, args.slots) : args.slots;
    T* key = args.key + (long long)b * args.slots * width + h * D;
    T* value = args.value + (long long)b * args.slots * width + h * D;
    constexpr int LINES = (D * (int)sizeof(T) + 127) / 128;  // of 128 bytes, of one slot
    for (int i = threadIdx.x; i < old * LINES; i += WARPS * 32) {
        const long long place = (long long)(i / LINES) * width + i % LINES * (128 / (int)sizeof(T));
        asm volatile("prefetch.global.L2 [%0];" ::"l"(key + place));
        asm volatile("prefetch.global.L2 [%0];" ::"l"(value + place));
    }
    load_bias<SELF>(args, end, bias);
    wait_for_inputs();

    const T* queries = args.q + (long long)b * QUERIES * args.stride + h * D;
    for (int i = threadIdx.x; SELF && i < (end - old) * D; i += WARPS * 32) {
        const T* source = queries + i / D * args.stride + i % D;
        const long long place = (long long)(old + i / D) * width + i % D;
        key[place] = source[width];
        value[place] = source[2 * width];
    }
    float q[QUERIES][8];
#pragma unroll
    for (int i = 0; i < QUERIES; i++) load8(queries + i * args.stride + part, q[i]);
    __syncthreads();

    Softmax softmax[QUERIES];
#pragma unroll 2
    for (int base = 0; base < end; base += GROUPS) {  // all lanes of a warp stay in the loop
        const int slot = base + group, inside = min(slot, end - 1);
        float k[8], v[8];
        load8(key + (long long)inside * width + part, k);
        load8(value + (long long)inside * width + part, v);
#pragma unroll
        for (int i = 0; i < QUERIES; i++) {
            float score = 0.f;
#pragma unroll
            for (int e = 0; e < 8; e++) score += q[i][e] * k[e];
#pragma unroll
            for (int o = LANES / 2; o; o /= 2) score += __shfl_xor_sync(~0u, score, o);
            softmax[i].add(slot < end ? score + bias[i * end + inside] : negative_infinity(), v);
        }
    }
#pragma unroll
    for (int i = 0; i < QUERIES; i++) {
#pragma unroll
        for (int o = LANES; o < 32; o *= 2) softmax[i].merge(o);
        if (lane < LANES) {
#pragma unroll
            for (int e = 0; e < 8; e++) merged[warp][i][part + e] = softmax[i].y[e];
            merged[warp][i][D] = softmax[i].top;
            merged[warp][i][D + 1] = softmax[i].sum;
        }
    }
    __syncthreads();
    for (int o = threadIdx.x; o < QUERIES * D; o += WARPS * 32) {
        const int i = o / D;
        float top = negative_infinity(), sum = 0.f, y = 0.f;
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, merged[w][i][D]);
        for (int w = 0; w < WARPS; w++) {
            const float share = merged[w][i][D] == top ? 1.f : __expf(merged[w][i][D] - top);
            sum += merged[w][i][D + 1] * share;
            y += merged[w][i][o % D] * share;
        }
        from_float(sum > 0.f ? y / sum : 0.f, args.y[((long long)b * QUERIES + i) * width + h * D + o % D]);
    }
}
