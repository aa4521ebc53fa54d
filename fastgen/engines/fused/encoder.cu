// Kernels of an encoder over packed rows: all but its products and its attention.
//
// Behind common.cu and encoder_rows.cu. A row is one token. Every kernel waits for its inputs before it
// reads any.

// ---------------------------------------------------------------------------------------------
// Packing: tokens of all rows one after the other. Each row's visible tokens come first, in their
// order; behind them those that are computed though no query sees them.

struct CountArgs {
    const long long* mask;  // [B, S], 0: hidden; null: all are visible
    int* lengths;           // [B] tokens that are computed
    int* visible;           // [B]
    int sources, padding;   // S; whether all hidden tokens are computed, or only a row's first place
};

// One block a row.
template <int THREADS> INLINE void count(const CountArgs& args) {
    launch_dependents();
    wait_for_inputs();
    const long long* mask = args.mask + (long long)blockIdx.x * args.sources;
    int seen = 0;
    for (int s = threadIdx.x; s < args.sources; s += THREADS) seen += !args.mask || mask[s] != 0;
    seen = block_count<THREADS>(seen);
    if (threadIdx.x) return;
    const int first = args.mask && mask[0] == 0;
    args.visible[blockIdx.x] = seen;
    args.lengths[blockIdx.x] = args.padding ? args.sources : seen + first;
}

struct PlaceArgs {
    const long long* mask;       // as in CountArgs
    const int *lengths, *visible;  // [B]
    int *starts, *keys;  // [B + 1], [B]: for attention, where rows begin, and visible tokens of each
    int* tokens;         // [T] the place b * S + s of each token
    int* rows;           // [B, S] the token of each place; -1: it is not computed
    int* columns;        // [T] the column s of each token; null: nobody asks
    int sources, padding;
};

// One block a row.
template <int THREADS> INLINE void place(const PlaceArgs& args) {
    launch_dependents();
    wait_for_inputs();
    __shared__ int seen_by[THREADS / 32];
    const int b = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int before = 0;
    for (int i = threadIdx.x; i < b; i += THREADS) before += args.lengths[i];
    const int start = block_count<THREADS>(before), visible = args.visible[b];
    if (threadIdx.x == 0) {
        args.starts[b] = start;
        args.keys[b] = visible;
        if (b + 1 == gridDim.x) args.starts[b + 1] = start + args.lengths[b];
    }
    const long long first = (long long)b * args.sources;
    int seen = 0;  // visible tokens of earlier rounds
    for (int base = 0; base < args.sources; base += THREADS) {
        const int s = base + threadIdx.x;
        const bool inside = s < args.sources;
        const bool sees = inside && (!args.mask || args.mask[first + s] != 0);
        const unsigned votes = __ballot_sync(~0u, sees);
        __syncthreads();  // the last round's counts were read
        if (lane == 0) seen_by[warp] = __popc(votes);
        __syncthreads();
        int rank = seen + __popc(votes & ((1u << lane) - 1));
#pragma unroll
        for (int w = 0; w < THREADS / 32; w++) {
            if (w < warp) rank += seen_by[w];
            seen += seen_by[w];
        }
        if (!inside) continue;
        int row = -1;
        if (sees) row = start + rank;
        else if (args.padding) row = start + visible + s - rank;
        else if (s == 0) row = start + visible;
        args.rows[first + s] = row;
        if (row >= 0) args.tokens[row] = (int)(first + s);
        if (row >= 0 && args.columns) args.columns[row] = s;
    }
}

// ---------------------------------------------------------------------------------------------
// Embeddings: a sum over tables, normed

struct Term {
    const T* table;        // [count, K]
    const long long* ids;  // [B, S]; null: the token's column is its id, or with ONE_ID it is 0
    int count, offset, one_id;
    float scale;
};

struct EmbedArgs {
    Term term[4];
    const int* tokens;  // [T]
    const int* total;   // T
    Out out;
    float* stream;      // [T, K] that takes the sum as it was before its norm, of RMS
    const T *weight, *bias;  // bias: of LAYER
    float eps;
    int sources;
};

// One block a token.
template <int K, int VEC, int THREADS, int TERMS, int NORM, int STORE>
INLINE void embed(const EmbedArgs& args) {
    launch_dependents();
    wait_for_inputs();
    if ((int)blockIdx.x >= *args.total) return;
    const int place = args.tokens[blockIdx.x];
    Row<K, VEC, THREADS> row;
    row.clear();
#pragma unroll
    for (int i = 0; i < TERMS; i++) {
        const Term& term = args.term[i];
        long long id = term.ids ? term.ids[place] : term.one_id ? 0 : place % args.sources;
        id = max(0ll, min(id + term.offset, (long long)term.count - 1));  // never beside the table
        row.add(term.table + id * K, term.scale);
    }
    if constexpr (NORM == RMS) {
        row.store(args.stream + (long long)blockIdx.x * K);
        row.normalize(args.weight, args.eps);
    } else {
        row.normalize(args.weight, args.bias, args.eps);
    }
    row.template leave<STORE>(args.out, blockIdx.x);
}

// ---------------------------------------------------------------------------------------------
// Between the products

struct NormArguments {
    const T *x, *residual;  // [T, K]; residual: with ADD
    const T *weight, *bias;
    Out out;
    float eps;
};

// out = norm(x + residual), one block a token.
template <int K, int VEC, int THREADS, bool ADD, int STORE>
INLINE void norm_rows(const NormArguments& args) {
    launch_dependents();
    wait_for_inputs();
    const long long first = (long long)blockIdx.x * K;
    Row<K, VEC, THREADS> row;
    row.clear();
    row.add(args.x + first);
    if constexpr (ADD) row.add(args.residual + first);
    row.normalize(args.weight, args.bias, args.eps);
    row.template leave<STORE>(args.out, blockIdx.x);
}

struct StreamArgs {
    const float* x;  // [T, K], a residual stream
    const T* weight;
    Out out;
    float eps;
};

// out = the root-mean-square norm of x, one block a token.
template <int K, int VEC, int THREADS, int STORE> INLINE void norm_stream(const StreamArgs& args) {
    launch_dependents();
    wait_for_inputs();
    const long long first = (long long)blockIdx.x * K;
    Row<K, VEC, THREADS> row;
    row.clear();
    row.add(args.x + first);
    row.normalize(args.weight, args.eps);
    row.template leave<STORE>(args.out, blockIdx.x);
}

struct ActivationArgs {
    T* x;
    const T* gate;  // of GATED
    long long count;
};

// x = activate(x), or activate(x) * gate; VEC elements a thread, the count is a multiple of VEC.
template <int ACT, int VEC, bool GATED> INLINE void activate_rows(const ActivationArgs& args) {
    launch_dependents();
    wait_for_inputs();
    const long long i = VEC * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= args.count) return;
    Pack<T, VEC> x = *(const Pack<T, VEC>*)(args.x + i);
    Pack<T, VEC> gate;
    if constexpr (GATED) gate = *(const Pack<T, VEC>*)(args.gate + i);
#pragma unroll
    for (int e = 0; e < VEC; e++) {
        float y = activate<ACT>(finite(x.element[e]));
        if constexpr (GATED) y *= finite(gate.element[e]);
        from_float(y, x.element[e]);
    }
    *(Pack<T, VEC>*)(args.x + i) = x;
}

struct SpreadArgs {
    const T* x;       // [T, K]
    const int* rows;  // [B, S]
    T* y;             // [B, S, K]
};

// y[place] = x[rows[place]], zeros where there is none: one block a place.
template <int K, int VEC, int THREADS> INLINE void spread(const SpreadArgs& args) {
    launch_dependents();
    wait_for_inputs();
    const int from = args.rows[blockIdx.x];
#pragma unroll
    for (int k = threadIdx.x * VEC; k < K; k += VEC * THREADS) {
        Pack<T, VEC> values = {};
        if (from >= 0) values = *(const Pack<T, VEC>*)(args.x + (long long)from * K + k);
        *(Pack<T, VEC>*)(args.y + (long long)blockIdx.x * K + k) = values;
    }
}

struct PrefetchArgs {
    const char* from[8];
    long long bytes[8];
    int count;
};

// Bring weights into the L2 cache while products before theirs run: those of few rows do not ask for
// memory fast enough themselves.
template <int THREADS> INLINE void prefetch(const PrefetchArgs& args) {
    const long long first = 128ll * (blockIdx.x * THREADS + threadIdx.x);
    const long long step = 128ll * gridDim.x * THREADS;
    for (int i = 0; i < args.count; i++)
        for (long long byte = first; byte < args.bytes[i]; byte += step)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(args.from[i] + byte));
}
