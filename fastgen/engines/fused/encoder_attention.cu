// Attention over packed rows with a bias by relative position, on tensor cores.
//
// Behind common.cu, tiles.cu and encoder.cu. No score leaves the registers, and none is computed for padding: a
// block has 64 queries of one row and head, 16 a warp, and keys and values pass it 64 at a time. The
// layouts are those of mma.m16n8k16: lane 4 * g + t has the rows g and g + 8 of what a warp computes,
// and of each eight columns 2 * t and 2 * t + 1.

constexpr int TILE = 64;       // queries of a block, and keys at a time
constexpr int ROW_WARPS = 4;   // of a block

struct RowsAttentionArgs {
    const T *q, *k, *v;   // [T, heads * D]
    T* y;                 // [T, heads * D]
    const T* bias;        // [buckets, heads]
    const int* buckets;   // [SPAN] bucket of each distance, key minus query, from -(SPAN / 2)
    const int* starts;    // [B + 1] where each row's tokens begin
    const int* keys;      // [B] how many of a row's first tokens its queries see
    const int* columns;   // [T] each token's column in its row: distances are between these
    int heads, tiles;     // tiles: of the longest row's queries
    float scale;
};

// TILE rows of keys or values, zeros behind those that there are; or nothing, if there are none.
template <int D> INLINE void load_tile(T (*to)[D + 8], const T* from, int there, int stride) {
    constexpr int CHUNKS = D / 8;
    for (int i = threadIdx.x; there > 0 && i < TILE * CHUNKS; i += 32 * ROW_WARPS) {
        const int row = i / CHUNKS, column = i % CHUNKS * 8;
        const bool inside = row < there;
        copy_ahead(&to[row][column], from + (inside ? (long long)row * stride + column : 0), inside);
    }
    end_group();
}

// One block for each tile of queries, head and row.
template <int D, int SPAN> INLINE void attend_rows(const RowsAttentionArgs& args) {
    launch_dependents();
    constexpr float LOG2E = 1.44269504f;
    constexpr int REACH = SPAN / 2, STEPS = D / 16, PARTS = TILE / 8;
    __shared__ alignas(16) T key[TILE][D + 8];  // eight more: rows fall on different banks
    __shared__ alignas(16) T value[TILE][D + 8];
    __shared__ float bias[SPAN];
    __shared__ int key_columns[2][TILE];
    const int tile = blockIdx.x % args.tiles, head = blockIdx.x / args.tiles % args.heads;
    const int b = blockIdx.x / args.tiles / args.heads;
    for (int i = threadIdx.x; i < SPAN; i += 32 * ROW_WARPS)
        bias[i] = LOG2E * to_float(args.bias[args.buckets[i] * args.heads + head]);
    wait_for_inputs();
    const int start = args.starts[b], count = args.starts[b + 1] - start, keys = args.keys[b];
    if (tile * TILE >= count) return;
    const int stride = args.heads * D, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int g = lane / 4, t = lane % 4, matrix = lane / 8;
    const long long first = (long long)start * stride + head * D;
    const auto load_keys = [&](int from, int turn) {
        if (threadIdx.x < TILE && from + (int)threadIdx.x < keys)
            key_columns[turn][threadIdx.x] = args.columns[start + from + threadIdx.x];
        load_tile<D>(key, args.k + first + (long long)from * stride, keys - from, stride);
    };
    load_keys(0, 0);
    load_tile<D>(value, args.v + first, keys, stride);

    unsigned query[STEPS][4];
    int row[2], column[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        row[half] = tile * TILE + warp * 16 + half * 8 + g;
        const bool inside = row[half] < count;
        column[half] = inside ? args.columns[start + row[half]] : 0;
        const T* from = args.q + first + (long long)row[half] * stride + 2 * t;
#pragma unroll
        for (int s = 0; s < STEPS; s++)
#pragma unroll
            for (int part = 0; part < 2; part++)
                query[s][2 * part + half] =
                    inside ? *(const unsigned*)(from + s * 16 + part * 8) : 0u;
    }

    float out[D / 8][4] = {}, highest[2] = {negative_infinity(), negative_infinity()}, sum[2] = {};
    for (int from = 0, turn = 0; from < keys; from += TILE, turn ^= 1) {
        float score[PARTS][4] = {};
        wait_but<1>();
        __syncthreads();  // all have the keys
#pragma unroll
        for (int s = 0; s < STEPS; s++)
#pragma unroll
            for (int p = 0; p < PARTS; p += 2) {
                unsigned m[4];
                load_matrices<false>(
                    m, &key[p * 8 + matrix / 2 * 8 + lane % 8][s * 16 + matrix % 2 * 8]);
                multiply(score[p], query[s], m[0], m[1], T());
                multiply(score[p + 1], query[s], m[2], m[3], T());
            }
        __syncthreads();  // none reads them any longer
        load_keys(from + TILE, turn ^ 1);

        const bool whole = from + TILE <= keys;
        float top[2] = {highest[0], highest[1]};
#pragma unroll
        for (int p = 0; p < PARTS; p++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int i = p * 8 + 2 * t + e % 2, half = e / 2;
                const int distance = key_columns[turn][i] - column[half];
                const int clipped = max(-REACH, min(distance, REACH)) + REACH;
                const bool seen = whole || from + i < keys;
                score[p][e] = seen ? score[p][e] * (args.scale * LOG2E) + bias[clipped]
                                   : negative_infinity();
                top[half] = fmaxf(top[half], score[p][e]);
            }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 1));
            top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 2));
            const float shrink = power_of_two(highest[half] - top[half]);
            highest[half] = top[half];
            sum[half] *= shrink;
#pragma unroll
            for (int d = 0; d < D / 8; d++)
                out[d][2 * half] *= shrink, out[d][2 * half + 1] *= shrink;
        }
#pragma unroll
        for (int p = 0; p < PARTS; p++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                score[p][e] = power_of_two(score[p][e] - highest[e / 2]);
                sum[e / 2] += score[p][e];
            }
        wait_but<1>();
        __syncthreads();  // all have the values
#pragma unroll
        for (int p = 0; p < PARTS; p += 2) {
            const unsigned weight[4] = {
                pack_pair(score[p][0], score[p][1], T()), pack_pair(score[p][2], score[p][3], T()),
                pack_pair(score[p + 1][0], score[p + 1][1], T()),
                pack_pair(score[p + 1][2], score[p + 1][3], T())};
#pragma unroll
            for (int d = 0; d < D / 8; d += 2) {
                unsigned m[4];
                load_matrices<true>(
                    m, &value[p * 8 + matrix % 2 * 8 + lane % 8][d * 8 + matrix / 2 * 8]);
                multiply(out[d], weight, m[0], m[1], T());
                multiply(out[d + 1], weight, m[2], m[3], T());
            }
        }
        __syncthreads();  // none reads them any longer
        load_tile<D>(value, args.v + first + (long long)(from + TILE) * stride, keys - from - TILE,
                     stride);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
        sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
        if (row[half] >= count) continue;
        const float factor = sum[half] > 0.f ? 1.f / sum[half] : 0.f;
        T* to = args.y + first + (long long)row[half] * stride + 2 * t;
#pragma unroll
        for (int d = 0; d < D / 8; d++)
            *(unsigned*)(to + d * 8) =
                pack_pair(factor * out[d][2 * half], factor * out[d][2 * half + 1], T());
    }
}
