// Attention of many rows, or over long KV buffers, at the memory's rate: what attention.cu computes,
// for 16-bit numbers (see it and tiles.cu for the definitions in front).
//
// Each warp has slots of its own, SLOTS of them at a time, and keeps STAGES such tiles of keys and
// values on their way to shared memory: from before the launch that gives the queries has ended, and
// without a register. Tensor cores multiply them. Their rows 0 to 7 are queries, or what values count,
// rounded to T; the rows 8 to 15 are what rounding left of the same: both count almost as in float32.

// Shared memory of a block, in this order. Bytes are also counted by wide_attention.py.
template <int D, int WARPS, int SPLITS, int SLOTS, int STAGES, int TOGETHER, bool SELF, bool MASKED,
          int HEADS>
struct WideShared {
    static constexpr int ALL = TOGETHER * HEADS, STRIDE = D + 8;  // rows fall on different banks
    static constexpr int TILE = SLOTS * STRIDE;
    static constexpr int UNIT = MASKED ? 32 : SLOTS;  // slots that warps are dealt, in turn
    T* ring;                // [WARPS, STAGES, keys and values, SLOTS, STRIDE]; later the warps' parts
    T* fresh;               // SELF: [keys and values, SLOTS, STRIDE] of the query tokens
    T* queries;             // [16, STRIDE]
    float* parts;           // SPLITS > 1: [ALL, SPLITS, D + 2]
    float* bias;            // [WARPS, TOGETHER, held + 8] of the slots of each warp
    float* fresh_bias;      // SELF: [TOGETHER, SLOTS + 8]
    unsigned short* seen;   // MASKED: [WARPS, held], each warp's slots
    int held;               // slots of a warp that it looks at before it reads any of them

    INLINE explicit WideShared(void* from, int slots) {
        held = min(((slots + UNIT - 1) / UNIT + WARPS * SPLITS - 1) / (WARPS * SPLITS) * UNIT, 256);
        ring = (T*)from;
        fresh = ring + WARPS * STAGES * 2 * TILE;
        queries = fresh + (SELF ? 2 * TILE : 0);
        parts = (float*)(queries + 16 * STRIDE);
        bias = parts + (SPLITS > 1 ? ALL * SPLITS * (D + 2) : 0);
        fresh_bias = bias + WARPS * TOGETHER * (held + 8);
        seen = (unsigned short*)(fresh_bias + (SELF ? TOGETHER * (SLOTS + 8) : 0));
    }
};

// Attention over some of the slots of up to eight queries, as the registers of a warp hold it: lane
// 4 * g + t has what is of query g, its columns 2 * t and 2 * t + 1 of each eight. `y` has the values'
// sums under weights rounded to T, and behind them those under what rounding left.
template <int D, int SLOTS, int STRIDE> struct WideSoftmax {
    float top = negative_infinity(), sum = 0.f, y[D / 8][4] = {};  // sum: of this lane's slots

    INLINE void attend(const unsigned (&query)[D / 16][4], const T* key, const T* value,
                       const float* bias, float scale) {
        const int lane = threadIdx.x % 32, t = lane % 4, matrix = lane / 8;
        float score[SLOTS / 8][4] = {};
#pragma unroll
        for (int s = 0; s < D / 16; s++)
#pragma unroll
            for (int p = 0; p < SLOTS / 8; p += 2) {
                unsigned m[4];
                const int row = p * 8 + matrix / 2 * 8 + lane % 8;
                load_matrices<false>(m, key + row * STRIDE + s * 16 + matrix % 2 * 8);
                multiply(score[p], query[s], m[0], m[1], T());
                multiply(score[p + 1], query[s], m[2], m[3], T());
            }
        float highest = top;
#pragma unroll
        for (int p = 0; p < SLOTS / 8; p++) {
            const float2 added = *(const float2*)(bias + p * 8 + 2 * t);
            score[p][0] = (score[p][0] + score[p][2]) * scale + added.x;
            score[p][1] = (score[p][1] + score[p][3]) * scale + added.y;
            highest = fmaxf(highest, fmaxf(score[p][0], score[p][1]));
        }
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
        const float keep = weight_under(top, highest);
        top = highest;
        sum *= keep;
#pragma unroll
        for (int d = 0; d < D / 8; d++)
#pragma unroll
            for (int e = 0; e < 4; e++) y[d][e] *= keep;
#pragma unroll
        for (int p = 0; p < SLOTS / 8; p++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float x = score[p][e];
                T rounded;
                score[p][e] = x == negative_infinity() ? 0.f : weight_under(x, highest);
                sum += score[p][e];
                from_float(score[p][e], rounded);
                score[p][e + 2] = score[p][e] - to_float(rounded);
            }
#pragma unroll
        for (int p = 0; p < SLOTS / 8; p += 2) {
            const unsigned weight[4] = {
                pack_pair(score[p][0], score[p][1], T()), pack_pair(score[p][2], score[p][3], T()),
                pack_pair(score[p + 1][0], score[p + 1][1], T()),
                pack_pair(score[p + 1][2], score[p + 1][3], T())};
#pragma unroll
            for (int d = 0; d < D / 8; d += 2) {
                unsigned m[4];
                const int row = p * 8 + matrix % 2 * 8 + lane % 8;
                load_matrices<true>(m, value + row * STRIDE + d * 8 + matrix / 2 * 8);
                multiply(y[d], weight, m[0], m[1], T());
                multiply(y[d + 1], weight, m[2], m[3], T());
            }
        }
    }

    // What the warp found, as [ALL, D + 2]: y, the highest score and the sum.
    template <int ALL> INLINE void leave(float* parts) {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (g >= ALL) return;
        float* mine = parts + g * (D + 2);
#pragma unroll
        for (int d = 0; d < D / 8; d++)
            *(float2*)(mine + d * 8 + 2 * t) = make_float2(y[d][0] + y[d][2], y[d][1] + y[d][3]);
        if (t == 0) *(float2*)(mine + D) = make_float2(top, sum);
    }
};

// Element `e` of the sums of COUNT softmaxes, `apart` floats from each other, with their top and sum.
template <int D, int COUNT>
INLINE float merge_apart(const float* parts, int apart, int e, float& top, float& sum) {
    float y = sum = 0.f;
    top = negative_infinity();
#pragma unroll
    for (int i = 0; i < COUNT; i++) top = fmaxf(top, parts[i * apart + D]);
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const float keep = weight_under(parts[i * apart + D], top);
        sum += parts[i * apart + D + 1] * keep;
        y += parts[i * apart + e] * keep;
    }
    return y;
}

// A head's eight elements from `part` on, rounded to T, and what rounding left of them.
INLINE void store_rounded(const float (&y)[8], T* rounded, T* rest) {
    Pack<T, 8> high, low;
#pragma unroll
    for (int e = 0; e < 8; e++) {
        from_float(y[e], high.element[e]);
        from_float(y[e] - to_float(high.element[e]), low.element[e]);
    }
    *(Pack<T, 8>*)rounded = high;
    if (rest) *(Pack<T, 8>*)rest = low;
}

// Blocks as attention's: TOGETHER queries of one row, and HEADS of the GROUP that shares a key's, up to
// eight in all, over the slots of a cluster of SPLITS blocks.
template <int D, int WARPS, int SPLITS, int SLOTS, int STAGES, int TOGETHER, bool SELF, bool MASKED,
          int GROUP = 1, int HEADS = 1, int TURN = AS_IS>
INLINE void wide_attention(const AttentionArgs& args) {
    typedef WideShared<D, WARPS, SPLITS, SLOTS, STAGES, TOGETHER, SELF, MASKED, HEADS> Shared;
    constexpr int ALL = Shared::ALL, STRIDE = Shared::STRIDE, TILE = Shared::TILE, CHUNKS = D / 8;
    constexpr int LANES = lanes_of(D), GROUPS = WARPS * 32 / LANES, PARTS = WARPS * SPLITS;
    constexpr int NEW = TURN ? QUERIES : 1;
    extern __shared__ uint4 wide_shared[];
    __shared__ float2 angles[NEW][TURN ? D / 2 : 1];

    launch_dependents();
    cluster_arrive<SPLITS>();
    const int split = blockIdx.x % SPLITS, h = blockIdx.x / SPLITS * HEADS, row = blockIdx.y * TOGETHER;
    const int b = row / QUERIES, width = args.heads * D, lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32, turn_of_warp = warp * SPLITS + split;
    const int kv_width = width / GROUP, kv_part = h / GROUP * D;
    const int old = SELF ? min((int)args.first_slot[b], args.slots) : args.slots;
    const Shared shared(wide_shared, args.slots);
    T* key = args.key + (long long)b * args.slots * kv_width + kv_part;
    T* value = args.value + (long long)b * args.slots * kv_width + kv_part;
    T* ring = shared.ring + warp * STAGES * 2 * TILE;
    const int stride = shared.held + 8;
    float* bias = shared.bias + warp * TOGETHER * stride;
    unsigned short* seen = shared.seen + warp * shared.held;
    const auto slot_at = [&](int i) {
        return (i / Shared::UNIT * PARTS + turn_of_warp) * Shared::UNIT + i % Shared::UNIT;
    };

    int begin = 0, tiles = 0;  // of this warp, in the slots that it looks at
    const auto fetch = [&](int tile) {
        if (tile < tiles) {
            T* to = ring + tile % STAGES * (2 * TILE);
#pragma unroll
            for (int j = 0; j < SLOTS * CHUNKS / 32; j++) {
                const int i = j * 32 + lane, r = i / CHUNKS, e = i % CHUNKS * 8;
                const int slot = MASKED ? seen[tile * SLOTS + r] : slot_at(begin + tile * SLOTS + r);
                const bool there = slot < old;
                const long long place = there ? (long long)slot * kv_width + e : 0;
                copy_ahead(to + r * STRIDE + e, key + place, there);
                copy_ahead(to + TILE + r * STRIDE + e, value + place, there);
            }
        }
        end_group();
    };
    const auto fetch_first = [&] {
#pragma unroll
        for (int tile = 0; tile < STAGES; tile++) fetch(tile);
    };
    const auto look = [&] {  // at the next slots: which there are, what is added to their scores
        int count = 0;
        if constexpr (!MASKED) {
            while (count < shared.held && slot_at(begin + count) < old) count += SLOTS;
            tiles = count / SLOTS;
            fetch_first();
        }
        for (int i = lane; i < (MASKED ? shared.held : count); i += 32) {
            const int slot = slot_at(begin + i);
            if (MASKED && slot - lane >= old) break;
            float added[TOGETHER];
            bool sees = false;
#pragma unroll
            for (int r = 0; r < TOGETHER; r++) {
                added[r] = slot < old ? bias_of<SELF>(args, h, row + r, slot) : negative_infinity();
                sees |= added[r] != negative_infinity();
            }
            int place = i;
            if constexpr (MASKED) {
                const unsigned votes = __ballot_sync(~0u, sees);
                place = count + __popc(votes & ((1u << lane) - 1));
                count += __popc(votes);
                if (sees) seen[place] = slot;
            }
#pragma unroll
            for (int r = 0; r < TOGETHER; r++)
                if (!MASKED || sees) bias[r * stride + place] = added[r];
        }
        if constexpr (MASKED) {
            tiles = (count + SLOTS - 1) / SLOTS;
            for (int i = count + lane; i < tiles * SLOTS; i += 32) {
                seen[i] = 0xffff;
#pragma unroll
                for (int r = 0; r < TOGETHER; r++) bias[r * stride + i] = negative_infinity();
            }
            __syncwarp();
            fetch_first();
        }
    };
    look();
    const bool has_fresh = SELF && split == 0 && warp == WARPS - 1;
    if (has_fresh && lane < SLOTS)
        for (int r = 0; r < TOGETHER; r++) {
            const bool there = lane < QUERIES && old + lane < args.slots;
            shared.fresh_bias[r * (SLOTS + 8) + lane] =
                there ? bias_of<SELF>(args, h, row + r, old + lane) : negative_infinity();
        }
    const int part = threadIdx.x % LANES * 8, group = threadIdx.x / LANES;
    const bool holds = part < D;  // lanes beyond the head size are idle
    Halves query_norm, key_norm;
    if constexpr (TURN != AS_IS) {
        for (int i = threadIdx.x; i < QUERIES * D / 2; i += WARPS * 32)
            angles[i / (D / 2)][i % (D / 2)] = angles_of<D>(args.turn, args.query_positions,
                args.row_start, b * QUERIES + i / (D / 2), QUERIES)[i % (D / 2)];
        __syncthreads();
    }
    if constexpr (TURN == NORMED) {
        query_norm = load_halves<D>(args.turn.query_norm, part);
        key_norm = load_halves<D>(args.turn.key_norm, part);
    }
    wait_for_inputs();

    // Queries; and the new keys and values, which are read where the product left them
    const T* fresh = args.q + (long long)b * QUERIES * args.stride + kv_part;
    const T* own = fresh + (h * D - kv_part) + row % QUERIES * args.stride;
    const int rows = SELF && split == 0 ? 8 + SLOTS : 8;
    for (int base = 0; base < rows; base += GROUPS) {  // all lanes stay for the norms' sums
        const int i = base + group, token = i < 8 ? row % QUERIES + i / HEADS : i - 8;
        const bool there = i < 8 ? i < ALL : i < rows && token < QUERIES;
        const T* head = i < 8 ? own + i / HEADS * args.stride + i % HEADS * D
                              : fresh + token * args.stride + width;
        float y[8] = {};
        if constexpr (TURN == AS_IS) {
            if (there && holds) unpack(load8(head + part), y);
        } else {
            float turned[8];
            const Halves x = there ? load_halves<D>(head, part) : Halves();
            turn<D, TURN>(x, i < 8 ? query_norm : key_norm, args.turn.eps,
                          angles[there ? token % NEW : 0], part, turned);
#pragma unroll
            for (int e = 0; e < 8; e++) y[e] = there ? turned[e] : 0.f;
        }
        if (!holds) continue;
        if (i < 8) {
            T* to = shared.queries + i * STRIDE + part;
            store_rounded(y, to, to + 8 * STRIDE);
        } else if (i < rows) {
            T* to = shared.fresh + token * STRIDE + part;
            store_rounded(y, to, nullptr);
            *(Pack<T, 8>*)(to + TILE) = there ? load8(head + kv_width + part) : Pack<T, 8>{};
        }
    }
    __syncthreads();
    if (SELF && split == 0 && h % GROUP == 0)
        for (int i = threadIdx.x; i < TOGETHER * CHUNKS; i += WARPS * 32) {
            const int token = row % QUERIES + i / CHUNKS, e = i % CHUNKS * 8;
            const T* from = shared.fresh + token * STRIDE + e;
            if (old + token >= args.slots) continue;
            *(Pack<T, 8>*)(key + (long long)(old + token) * kv_width + e) = *(const Pack<T, 8>*)from;
            *(Pack<T, 8>*)(value + (long long)(old + token) * kv_width + e) =
                *(const Pack<T, 8>*)(from + TILE);
        }

    unsigned query[D / 16][4];
#pragma unroll
    for (int s = 0; s < D / 16; s++) {
        const int matrix = lane / 8;
        load_matrices<false>(query[s], shared.queries + (matrix % 2 * 8 + lane % 8) * STRIDE +
                                           s * 16 + matrix / 2 * 8);
    }
    const int token = min(lane / 4, ALL - 1) / HEADS;  // of this lane's query
    WideSoftmax<D, SLOTS, STRIDE> softmax;
    for (bool more = true; more;) {
        more = slot_at(begin + shared.held) < old;
        for (int tile = 0; tile < tiles + (has_fresh && !more); tile++) {
            const bool stored = tile < tiles;
            wait_but<STAGES - 1>();
            __syncwarp();  // all lanes' copies are there
            const T* keys = stored ? ring + tile % STAGES * (2 * TILE) : shared.fresh;
            softmax.attend(query, keys, keys + TILE,
                           stored ? bias + token * stride + tile * SLOTS
                                  : shared.fresh_bias + token * (SLOTS + 8),
                           args.scale);
            __syncwarp();  // none reads them any longer
            fetch(tile + STAGES);
        }
        begin += shared.held;
        if (more) look();
    }
    wait_but<0>();
    __syncwarp();
    constexpr int APART = STAGES * TILE;  // floats of a warp's ring
    softmax.template leave<ALL>((float*)ring);
    __syncthreads();
    cluster_wait<SPLITS>();  // the first block runs by now
    const auto store = [&](int r, int e, float y, float sum) {
        T* to = args.y + (long long)(row + r / HEADS) * width + (h + r % HEADS) * D + e;
        from_float(sum > 0.f ? y / sum : 0.f, *to);
    };
    for (int i = threadIdx.x; i < ALL * D; i += WARPS * 32) {
        const int r = i / D, e = i % D;
        float top, sum;
        const float* from = (const float*)shared.ring + r * (D + 2);
        const float y = merge_apart<D, WARPS>(from, APART, e, top, sum);
        if constexpr (SPLITS > 1) {
            float* to = shared.parts + (r * SPLITS + split) * (D + 2);
            store_to_first(to + e, y);
            if (e == 0) store_to_first(to + D, top), store_to_first(to + D + 1, sum);
        } else {
            store(r, e, y, sum);
        }
    }
    if constexpr (SPLITS > 1) {
        cluster_arrive<SPLITS>();
        cluster_wait<SPLITS>();
        for (int i = threadIdx.x; split == 0 && i < ALL * D; i += WARPS * 32) {
            float top, sum;
            const float* from = shared.parts + i / D * SPLITS * (D + 2);
            const float y = merge_apart<D, SPLITS>(from, D + 2, i % D, top, sum);
            store(i / D, i % D, y, sum);
        }
    }
}
