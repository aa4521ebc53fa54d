// Beam bookkeeping after torch.topk over the scores; follows top.cu.
//
// The reference is advance.py's Advance: the results are equal bit for bit. So products and sums must
// not become one instruction where torch rounds both.
//
// Axes: B rows, N beams, C candidates, T capacity in tokens.

constexpr int MAX_BEAMS = 16, MAX_CANDIDATES = 256;
constexpr float NEVER = -1.0e9f;  // transformers' score of what must not be chosen

struct BeamArgs {
    const float* top;          // [B, C] scores
    const int64* indices;      // [B, C] beam * vocabulary + token
    const int64 *limit, *eos;  // [1], [ends]
    const float *final_divisor, *best_divisor;  // reciprocals by number of new tokens
    int64 *running, *sequences, *ancestors;     // [B, N, T]
    int *running_parents, *parents;             // [B, N, T]
    float *running_scores, *scores;             // [B, N]
    bool *finished, *improvable;                // [B, N], [B]
    int64 *index, *count, *steps;               // [1]
    bool *done, *seen;                          // [1]; seen in host memory
    int64 *input_ids, *positions, *first_slot;  // [B, N], [N], [B]
    T* slot_mask;                               // [B, 1, N, slots]
    const int64* prefix;                        // [1]: slots of a prompt that all beams share
    uint64* arrived;                            // [1]: 0 between launches
    int vocabulary, beams, candidates, capacity, slots, ends, early;
};

// One row's candidates, and which of them the next beams are.
struct Candidates {
    int beam[MAX_CANDIDATES], token[MAX_CANDIDATES];
    float running[MAX_CANDIDATES];            // scores to go on with
    float final[MAX_BEAMS + MAX_CANDIDATES];  // of the finished beams, then of these if they end
    bool finished[MAX_BEAMS + MAX_CANDIDATES];
    int chosen[MAX_BEAMS];  // candidates that go on
    int best[MAX_BEAMS];    // places in ``final``
};

// Which columns of the row's token tables a thread holds: all beams of column ``base + column``.
struct Columns {
    int *first, *second;  // shared [N][stride]
    int column, stride, count;
};

template <class E>
INLINE void load(const E* from, int* to, const Columns& c, int t, const BeamArgs& a) {
    if (t >= c.count) return;
#pragma unroll 4
    for (int n = 0; n < a.beams; n++) to[n * c.stride] = (int)from[n * a.capacity + t];
}

// The running beams continue by what their candidates add in column ``at``; the finished ones are
// the best of themselves and of those candidates.
template <class E>
INLINE void store(E* running, E* kept, const int* added, int offset, int at, bool done,
                  const Candidates& row, const Columns& c, int t, const BeamArgs& a) {
    if (t >= c.count) return;
    auto candidate = [&](int i) {
        return t == at ? added[i] + offset : c.first[row.beam[i] * c.stride];
    };
#pragma unroll 1
    for (int n = 0; n < a.beams; n++) running[n * a.capacity + t] = candidate(row.chosen[n]);
    if (done) return;
#pragma unroll 1
    for (int n = 0; n < a.beams; n++) {
        const int i = row.best[n];
        kept[n * a.capacity + t] = i < a.beams ? c.second[i * c.stride] : candidate(i - a.beams);
    }
}

// Ancestors, and the mask that shows each beam the slots of its own: N of each position behind the
// prefix, which every beam sees.
INLINE void store_ancestors(int64* ancestors, T* mask, int at, const Candidates& row,
                            const Columns& c, int t, const BeamArgs& a) {
    if (t >= c.count) return;
    const int64 prefix = *a.prefix, slot = prefix + (t - prefix) * a.beams;
#pragma unroll 1
    for (int n = 0; n < a.beams; n++) {
        const int owner = t == at ? n : c.first[row.beam[row.chosen[n]] * c.stride];
        ancestors[n * a.capacity + t] = owner;
        if (t < prefix || slot + a.beams > a.slots) continue;
#pragma unroll 1
        for (int m = 0; m < a.beams; m++) mask_out(owner != m, mask[(int64)n * a.slots + slot + m]);
    }
}

// Fills in the candidates of row b; gives whether all of them end.
INLINE bool read_candidates(Candidates& row, int b, int at, int count, const BeamArgs& a) {
    const bool improvable = a.improvable[b], last = at + 1 >= *a.limit;
    const float divisor = a.final_divisor[count + 1];
    bool full = a.early, all = true;
#pragma unroll 1
    for (int n = 0; n < a.beams; n++) full = full && a.finished[b * a.beams + n];
    for (int n = threadIdx.x; n < a.beams; n += blockDim.x) {
        row.final[n] = a.scores[b * a.beams + n];
        row.finished[n] = a.finished[b * a.beams + n];
    }
    for (int i = threadIdx.x; i < a.candidates; i += blockDim.x) {
        const unsigned index = (unsigned)a.indices[b * a.candidates + i];
        const float score = a.top[b * a.candidates + i];
        const int beam = index / a.vocabulary, token = index - beam * a.vocabulary;
        const bool stopped = last || is_end(token, a.eos, a.ends);
        const bool ends = stopped && i < a.beams;
        row.beam[i] = beam, row.token[i] = token;
        row.running[i] = stopped ? __fadd_rn(score, NEVER) : score;
        float final = __fmul_rn(score, divisor);
        if (full) final = __fadd_rn(final, NEVER);
        if (!improvable) final = __fadd_rn(final, NEVER);
        if (!ends) final = __fadd_rn(final, NEVER);
        row.final[a.beams + i] = final;
        row.finished[a.beams + i] = ends;
        all = all && stopped;
    }
    return __syncthreads_and(all);
}

// By one warp: what the row's beams score now, and whether it can improve; gives one count each of
// blocks, and of rows that can improve, that go on, that lack finished beams.
INLINE uint64 update_scores(const Candidates& row, int b, int count, bool done, bool all_stopped,
                            const BeamArgs& a) {
    const int lane = threadIdx.x, n = b * a.beams + lane;
    const bool mine = lane < a.beams;
    const float inf = __uint_as_float(0x7f800000);
    bool finished = true;
    float score = inf;
    if (mine) {
        const int i = done ? lane : row.best[lane], next = row.chosen[lane];
        a.finished[n] = finished = row.finished[i];
        a.scores[n] = score = row.final[i];
        a.running_scores[n] = row.running[next];
        a.input_ids[n] = row.token[next];
    }
    float least = score;
    for (int o = 16; o; o /= 2) {
        const float other = __shfl_xor_sync(~0u, least, o);
        least = least != least || least < other ? least : other;  // NaN stays, as in amin
    }
    const float best = __fmul_rn(row.running[row.chosen[0]], a.best_divisor[count + 1]);
    const bool improves = __any_sync(~0u, mine && best > (finished ? least : NEVER));
    const bool all_finished = __all_sync(~0u, finished);
    const bool improvable = a.improvable[b] && improves;
    __syncwarp();
    if (lane == 0) {
        a.improvable[b] = improvable;
        a.first_slot[b] += a.beams;
    }
    return 1 | (uint64)improvable << 16 | (uint64)!all_stopped << 32 | (uint64)!all_finished << 48;
}

// By one warp of the last block: the counters that all rows share.
INLINE void move_on(uint64 sums, int at, int count, bool done, const BeamArgs& a) {
    if (threadIdx.x < a.beams) a.positions[threadIdx.x] += 1;
    if (threadIdx.x != 0) return;
    const bool improvable = sums >> 16 & 0xffff, running = sums >> 32 & 0xffff;
    const bool goes_on = improvable && running && (!a.early || sums >> 48);
    *a.index = at + 1;
    *a.count = count + 1;
    *a.steps += !done;
    *a.done = *a.seen = done || !goes_on;
    *a.arrived = 0;
}

// Grid: rows. A third of the threads each moves tokens, parents and ancestors.
extern "C" __global__ void advance(BeamArgs a) {
    extern __shared__ int tiles[];  // [5][N][blockDim.x / 3]
    __shared__ Candidates row;
    wait_for_inputs();
    const int b = blockIdx.x, stride = blockDim.x / 3, table = threadIdx.x / stride;
    const int column = threadIdx.x % stride, at = (int)*a.index, count = (int)*a.count;
    const bool done = *a.done;
    const int64 first = (int64)b * a.beams * a.capacity;
    int* tile = tiles + 2 * table * a.beams * stride + column;
    const int columns = table == 0 ? at + 1 : table == 1 ? count + 1 : a.capacity;
    const Columns c = {tile, tile + a.beams * stride, column, stride, min(columns, a.capacity)};
    auto load_column = [&](int t) {
        if (table == 0) {
            load(a.running + first, c.first, c, t, a);
            load(a.sequences + first, c.second, c, t, a);
        } else if (table == 1) {
            load(a.running_parents + first, c.first, c, t, a);
            load(a.parents + first, c.second, c, t, a);
        } else load(a.ancestors + first, c.first, c, t, a);
    };
    load_column(column);
    const bool all_stopped = read_candidates(row, b, at, count, a);
    if (threadIdx.x < 64) {  // the first warp the running beams, the second the finished ones
        const bool runs = threadIdx.x < 32;
        top(runs ? row.running : row.final, a.candidates + (runs ? 0 : a.beams), a.beams,
            runs ? row.chosen : row.best);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        uint64 sums = update_scores(row, b, count, done, all_stopped, a);
        uint64 before = 0;
        if (threadIdx.x == 0) before = atomicAdd(a.arrived, sums);
        sums += __shfl_sync(~0u, before, 0);
        if ((sums & 0xffff) == gridDim.x) move_on(sums, at, count, done, a);
    }
    T* mask = a.slot_mask + (int64)b * a.beams * a.slots;
    for (int t = column; t < c.count; load_column(t += stride)) {
        if (table == 0)
            store(a.running + first, a.sequences + first, row.token, 0, at, done, row, c, t, a);
        else if (table == 1)
            store(a.running_parents + first, a.parents + first, row.beam, b * a.beams, count, done,
                  row, c, t, a);
        else store_ancestors(a.ancestors + first, mask, at, row, c, t, a);
    }
}
