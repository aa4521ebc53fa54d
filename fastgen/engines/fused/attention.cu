// Attention over KV buffers, and the embedding (see rotary.cu for the definitions in front).

// ---------------------------------------------------------------------------------------------
// Embedding: the rows of the token ids, and of their positions, start the residual stream

struct EmbeddingArgs {
    const long long* ids;        // [ROWS]
    const T* weight;             // [V, E]
    const T* places;             // [P, E], rows by position; or null
    const long long* positions;  // [QUERIES], in the order of slots
    const long long* row_start;  // [B], where position 0 is; null: at 0
    float* residual;             // [ROWS, E]
    float scale;                 // of the tokens' rows
    int width, offset;           // offset: of positions in the table
    int known, queries;          // rows of that table; QUERIES
};

INLINE void embedding(const EmbeddingArgs& args) {
    launch_dependents();
    const T* row = args.weight + args.ids[blockIdx.x] * args.width;
    const T* place = args.places;
    if (place) {
        const long long start = args.row_start ? args.row_start[blockIdx.x / QUERIES] : 0;
        const long long position = max(args.positions[blockIdx.x % QUERIES] - start, 0ll);
        place += min(position + args.offset, args.known - 1ll) * args.width;  // padding lies beyond
    }
    for (int e = threadIdx.x; e < args.width; e += blockDim.x) {
        const float x = args.scale * to_float(row[e]);
        args.residual[(long long)blockIdx.x * args.width + e] = place ? x + to_float(place[e]) : x;
    }
}

// ---------------------------------------------------------------------------------------------
// Attention of one head and one row's queries: one pass, the softmax kept as maximum and sum

struct AttentionArgs {
    const T* q;                        // [ROWS, stride]; SELF: new keys and values lie behind it
    T *key, *value;                    // [B, slots, H / GROUP * D]
    const T* table;                    // SELF: [H, span], bias by key minus query position; or null
    const T* mask;                     // [B, 1, QUERIES, slots] to add, or null
    const long long* query_positions;  // SELF: [QUERIES]
    const long long* slot_positions;   // SELF: [slots]
    const long long* first_slot;       // SELF: [B], where the new keys and values go
    const long long* row_start;        // SELF: [B], the first position that is seen; or null
    T* y;                              // [ROWS, H * D]
    int heads, slots, stride, span, reach, queries;
    float scale;    // of the products of queries and keys
    TurnArgs turn;  // of TURN
};

// What is added to the score of a slot: a mask, and without a source a bias by distance, at most
// 1 ahead and indexed as Python lists are; or nothing, for slots from the row's start to the query.
template <bool SELF> INLINE float bias_of(const AttentionArgs& args, int h, int row, int slot) {
    float bias = args.mask ? to_float(args.mask[(long long)row * args.slots + slot]) : 0.f;
    if constexpr (SELF) {
        const long long place = args.slot_positions[slot];
        const long long ahead = place - args.query_positions[row % QUERIES];
        if (args.table) {
            const int distance = (int)max((long long)-args.reach, min(1ll, ahead));
            bias += to_float(args.table[h * args.span + distance + (distance < 0 ? args.span : 0)]);
        } else if (ahead > 0 || (args.row_start && place < args.row_start[row / QUERIES])) {
            bias = negative_infinity();
        }
    }
    return bias;
}

INLINE float weight_under(float top, float highest) {  // exp, also of -inf - -inf
    return top == highest ? 1.f : exp2f((top - highest) * 1.44269504f);
}

// The softmax over some of the slots, and a lane's eight elements of the values' weighted sum.
struct Softmax {
    float top = negative_infinity(), sum = 0.f, y[8] = {};

    // Turns scores into what their values count, under the highest score so far.
    template <int COUNT> INLINE void weigh(float (&score)[COUNT]) {
        float highest = top;
#pragma unroll
        for (int i = 0; i < COUNT; i++) highest = fmaxf(highest, score[i]);
        const float keep = weight_under(top, highest);
        sum *= keep;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            score[i] = score[i] == negative_infinity() ? 0.f : weight_under(score[i], highest);
            sum += score[i];
        }
#pragma unroll
        for (int e = 0; e < 8; e++) y[e] *= keep;
        top = highest;
    }
    INLINE void merge(int offset) {  // with the lane at this xor offset
        const float other = __shfl_xor_sync(~0u, top, offset), highest = fmaxf(top, other);
        const float mine = weight_under(top, highest), theirs = weight_under(other, highest);
        sum = sum * mine + __shfl_xor_sync(~0u, sum, offset) * theirs;
#pragma unroll
        for (int i = 0; i < 8; i++) y[i] = y[i] * mine + __shfl_xor_sync(~0u, y[i], offset) * theirs;
        top = highest;
    }
};

// A cluster of SPLITS blocks shares out one row's slots; the first of them merges what all found.
template <int SPLITS> INLINE void cluster_arrive() {
    if constexpr (SPLITS > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
template <int SPLITS> INLINE void cluster_wait() {
    if constexpr (SPLITS > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
INLINE void store_to_first(float* shared, float x) {
    unsigned place = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("mapa.shared::cluster.u32 %0, %0, 0;" : "+r"(place));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(place), "f"(x) : "memory");
}

// Merges COUNT softmaxes of [y[D], top, sum]; thread i < D gives element i of their y.
template <int D, int COUNT>
INLINE float merge_parts(float (&parts)[COUNT][D + 2], float& top, float& sum) {
    float y = sum = 0.f;
    top = negative_infinity();
#pragma unroll
    for (int i = 0; i < COUNT; i++) top = fmaxf(top, parts[i][D]);
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const float keep = weight_under(parts[i][D], top);
        sum += parts[i][D + 1] * keep;
        y += parts[i][threadIdx.x] * keep;
    }
    return y;
}

// Lists, in order, which of COUNT rows of bias have a finite number somewhere; gives how many.
template <int TOGETHER>
INLINE int list_seen(const float* bias, int stride, int count, unsigned short* seen) {
    __shared__ int total;
    __syncthreads();
    if (threadIdx.x < 32) {
        int listed = 0;
        for (int base = 0; base < count; base += 32) {
            const int s = base + threadIdx.x;
            bool sees = false;
            for (int r = 0; r < TOGETHER; r++)
                sees |= s < count && bias[r * stride + s] != negative_infinity();
            const unsigned votes = __ballot_sync(~0u, sees);
            if (sees) seen[listed + __popc(votes & ((1u << threadIdx.x) - 1))] = s;
            listed += __popc(votes);
        }
        if (threadIdx.x == 0) total = listed;
    }
    __syncthreads();
    return total;
}

constexpr int WINDOW = 64;  // slots that a block has on their way to L2, which all blocks share

// A block computes TOGETHER queries of one row, and of each HEADS heads of the GROUP that shares a
// key's: all of them share its keys and values. With MASKED it reads only the slots that one of the
// queries sees: of beams, each sees one slot of every position. With TURN the new keys and the
// queries are turned here. With EARLY the first stored keys and values are loaded before the product in
// front has ended, which costs registers that other launches could have.
template <int D, int WARPS, int SPLITS, int UNROLL, int TOGETHER, bool SELF, bool MASKED, bool EARLY,
          int GROUP = 1, int HEADS = 1, int TURN = AS_IS>
INLINE void attention(const AttentionArgs& args) {
    constexpr int LANES = lanes_of(D), GROUPS = WARPS * 32 / LANES;  // LANES hold one slot's key
    constexpr int ALL = TOGETHER * HEADS;  // query i is of token i / HEADS, head i % HEADS
    constexpr int NEW = TURN ? QUERIES : 1;
    extern __shared__ float bias[];  // [TOGETHER, slots of this block]; MASKED: the slots seen
    __shared__ float warp_parts[WARPS][D + 2], block_parts[SPLITS > 1 ? ALL : 1][SPLITS][D + 2];
    __shared__ alignas(16) T new_keys[NEW][TURN ? D : 8];  // of TURN
    __shared__ float2 angles[NEW][TURN ? D / 2 : 1];

    launch_dependents();
    cluster_arrive<SPLITS>();
    const int split = blockIdx.x % SPLITS, h = blockIdx.x / SPLITS * HEADS, row = blockIdx.y * TOGETHER;
    const int b = row / QUERIES, width = args.heads * D, lane = threadIdx.x % 32;
    const int kv_width = width / GROUP, kv_part = h / GROUP * D;
    const int part = threadIdx.x % LANES * 8, group = threadIdx.x / LANES;
    const bool holds = part < D;  // lanes beyond the head size are idle
    const int old = SELF ? (int)args.first_slot[b] : args.slots;
    const int total = SELF ? min(old + QUERIES, args.slots) : args.slots;
    const int share = (total + SPLITS - 1) / SPLITS;
    const int begin = split * share, end = min(begin + share, total);
    T* key = args.key + (long long)b * args.slots * kv_width + kv_part;
    T* value = args.value + (long long)b * args.slots * kv_width + kv_part;
    unsigned short* seen = (unsigned short*)(bias + TOGETHER * share);
    const auto slot_at = [&](int i) { return begin + (MASKED ? seen[i] : i); };
    const auto prefetch = [&](int slot, int element) {
        if (slot >= old) return;
        const long long place = (long long)slot * kv_width + element;
        asm volatile("prefetch.global.L2 [%0];" ::"l"(key + place));
        asm volatile("prefetch.global.L2 [%0];" ::"l"(value + place));
    };
    const auto prefetch_first = [&](int count) {
        constexpr int LINE = 128 / (int)sizeof(T), LINES = (D + LINE - 1) / LINE;  // of one slot
        for (int i = threadIdx.x; i < min(count, WINDOW) * LINES; i += WARPS * 32)
            prefetch(slot_at(i / LINES), i % LINES * LINE);
    };
    int count = end - begin;
    if constexpr (!MASKED) prefetch_first(count);
    Halves query_norm, key_norm;
    if constexpr (TURN != AS_IS)
        for (int i = threadIdx.x; i < QUERIES * D / 2; i += WARPS * 32)
            angles[i / (D / 2)][i % (D / 2)] = angles_of<D>(args.turn, args.query_positions,
                args.row_start, b * QUERIES + i / (D / 2), QUERIES)[i % (D / 2)];
    if constexpr (TURN == NORMED) {
        query_norm = load_halves<D>(args.turn.query_norm, part);
        key_norm = load_halves<D>(args.turn.key_norm, part);
    }
    for (int s = begin + threadIdx.x; s < end; s += WARPS * 32)
#pragma unroll
        for (int r = 0; r < TOGETHER; r++)
            bias[r * share + s - begin] = bias_of<SELF>(args, h, row + r, s);
    if constexpr (MASKED) prefetch_first(count = list_seen<TOGETHER>(bias, share, count, seen));
    else __syncthreads();
    Pack<T, 8> k[UNROLL], v[UNROLL];
    const auto slot_of = [&](int base, int i) {
        return slot_at(min(base + i * GROUPS + group, count - 1));
    };
    const auto load_stored = [&](int base) {
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            const int slot = slot_of(base, i);
            k[i] = v[i] = Pack<T, 8>{};
            if (!holds || slot >= old) continue;
            k[i] = load8(key + (long long)slot * kv_width + part);
            v[i] = load8(value + (long long)slot * kv_width + part);
        }
    };
    if (EARLY && count > 0) load_stored(0);
    wait_for_inputs();

    // The new keys and values are read where the product left them, whichever block stores them
    const T* fresh = args.q + (long long)b * QUERIES * args.stride + kv_part;
    const int beside = GROUP > 1 ? h * D - kv_part : 0;  // the queries' heads lie further on
    const T* own = fresh + beside + row % QUERIES * args.stride;
    if constexpr (TURN != AS_IS) {
        for (int base = 0; base < QUERIES; base += GROUPS) {  // all lanes stay for the norms' sums
            const int i = min(base + group, QUERIES - 1);
            const Halves x = load_halves<D>(fresh + i * args.stride + width, part);
            float y[8];
            turn<D, TURN>(x, key_norm, args.turn.eps, angles[i], part, y);
            if (base + group < QUERIES && holds)
#pragma unroll
                for (int e = 0; e < 8; e++) from_float(y[e], new_keys[i][part + e]);
        }
        __syncthreads();
    }
    const auto load_fresh = [&](int base) {
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            const int slot = slot_of(base, i);
            if (!SELF || !holds || slot < old) continue;
            const T* new_row = fresh + (long long)(slot - old) * args.stride;
            const T* new_key = TURN ? new_keys[(unsigned)(slot - old) % NEW] : new_row + width;
            k[i] = load8(new_key + part);
            v[i] = load8(new_row + (width + kv_width) + part);
        }
    };
    const auto load = [&](int i, int slot) {  // both in one, which many loads take fewer instructions by
        const bool stored = !SELF || slot < old;
        const T* new_row = fresh + (long long)(slot - old) * args.stride;
        const T* new_key = TURN ? new_keys[(unsigned)(slot - old) % NEW] : new_row + width;
        k[i] = v[i] = Pack<T, 8>{};
        if (holds) k[i] = load8((stored ? key + (long long)slot * kv_width : new_key) + part);
        if (holds) v[i] = load8((stored ? value + (long long)slot * kv_width : new_row + (width + kv_width)) + part);
    };
    // All that the product gave is asked for before any of it is needed
    const auto head_of = [&](int r) { return own + r / HEADS * args.stride + r % HEADS * D; };
    const bool stores = SELF && split == 0 && h % GROUP == 0 && threadIdx.x < D;
    float q[ALL][8];
    Pack<T, 8> as_is[ALL];
    T own_key[TOGETHER], own_value[TOGETHER];
#pragma unroll
    for (int r = 0; r < ALL; r++)
        if (TURN == AS_IS) as_is[r] = holds ? load8(head_of(r) + part) : Pack<T, 8>{};
    if (EARLY && count > 0) load_fresh(0);
#pragma unroll
    for (int token = 0; token < TOGETHER; token++) {
        const T* mine = own + token * args.stride + threadIdx.x - beside;
        const T* turned = &new_keys[(row % QUERIES + token) % NEW][threadIdx.x];
        if (stores) own_key[token] = TURN ? *turned : mine[width];
        if (stores) own_value[token] = mine[width + kv_width];
    }
#pragma unroll
    for (int r = 0; r < ALL; r++) {
        if constexpr (TURN == AS_IS) unpack(as_is[r], q[r]);
        else
            turn<D, TURN>(load_halves<D>(head_of(r), part), query_norm, args.turn.eps,
                          angles[row % QUERIES + r / HEADS], part, q[r]);
#pragma unroll
        for (int e = 0; e < 8; e++) q[r][e] *= args.scale;
    }
    Softmax softmax[ALL];
    for (int base = 0; base < count; base += UNROLL * GROUPS) {  // all lanes of a warp stay in the loop
        int place[UNROLL];
        if (EARLY && base > 0) load_stored(base), load_fresh(base);
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            const int slot = slot_of(base, i);
            if (!EARLY) load(i, slot);
            place[i] = slot - begin;
            const int later = base + i * GROUPS + group + WINDOW;
            if (holds && part * (int)sizeof(T) % 128 == 0 && later < count) prefetch(slot_at(later), part);
        }
        float score[ALL][UNROLL], x[8];
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            const bool real = base + i * GROUPS + group < count;
            unpack(k[i], x);
#pragma unroll
            for (int r = 0; r < ALL; r++) {
                float sum = 0.f;
#pragma unroll
                for (int e = 0; e < 8; e++) sum += q[r][e] * x[e];
#pragma unroll
                for (int o = LANES / 2; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
                score[r][i] = real ? sum + bias[r / HEADS * share + place[i]] : negative_infinity();
            }
        }
#pragma unroll
        for (int r = 0; r < ALL; r++) softmax[r].weigh(score[r]);
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            unpack(v[i], x);
#pragma unroll
            for (int r = 0; r < ALL; r++)
#pragma unroll
                for (int e = 0; e < 8; e++) softmax[r].y[e] += score[r][i] * x[e];
        }
    }
#pragma unroll
    for (int token = 0; token < TOGETHER; token++) {
        const long long slot = old + row % QUERIES + token;
        if (!stores || slot >= args.slots) continue;
        key[slot * kv_width + threadIdx.x] = own_key[token];
        value[slot * kv_width + threadIdx.x] = own_value[token];
    }
    const auto store = [&](int r, float y, float sum) {
        T* to = args.y + (long long)(row + r / HEADS) * width + (h + r % HEADS) * D + threadIdx.x;
        from_float(sum > 0.f ? y / sum : 0.f, *to);
    };
    cluster_wait<SPLITS>();  // the first block runs by now
#pragma unroll
    for (int r = 0; r < ALL; r++) {
        if (r > 0) __syncthreads();  // the parts of the query before were read
#pragma unroll
        for (int o = LANES; o < 32; o *= 2) softmax[r].merge(o);
        if (lane < LANES && holds) {
            float* mine = warp_parts[threadIdx.x / 32];
#pragma unroll
            for (int e = 0; e < 8; e++) mine[part + e] = softmax[r].y[e];
            mine[D] = softmax[r].top;
            mine[D + 1] = softmax[r].sum;
        }
        __syncthreads();
        float top = 0.f, sum = 0.f, y = 0.f;
        if (threadIdx.x < D) y = merge_parts<D>(warp_parts, top, sum);
        if constexpr (SPLITS > 1) {
            if (threadIdx.x < D) store_to_first(&block_parts[r][split][threadIdx.x], y);
            if (threadIdx.x == 0) store_to_first(&block_parts[r][split][D], top);
            if (threadIdx.x == 0) store_to_first(&block_parts[r][split][D + 1], sum);
            if (r + 1 < ALL) continue;  // all queries' parts are merged together
            cluster_arrive<SPLITS>();
            cluster_wait<SPLITS>();
#pragma unroll
            for (int before = 0; before < r; before++)
                if (split == 0 && threadIdx.x < D) {
                    y = merge_parts<D>(block_parts[before], top, sum);
                    store(before, y, sum);
                }
            if (split == 0 && threadIdx.x < D) y = merge_parts<D>(block_parts[r], top, sum);
        }
        if (split == 0 && threadIdx.x < D) store(r, y, sum);
    }
}
