// Linear layers of few rows: y[ROWS, N] = x[ROWS, K] W[N, K]^T + bias, with the norm in front and what
// follows in the same launch (see common.cu, weights.cu and products.cu for the definitions in front).

enum Epilogue { STORE, ADD, ACTIVATE, GATE };

struct LinearArgs {
    const void* x;          // T [ROWS, K], or with a norm the float residual stream
    const void* weight[3];  // W [N, K], ACROSS: [K, N]; one a segment; GATE: wi_0 and wi_1
    const void* scales[3];  // of weights of fewer bits: S [N, groups], or float [N]
    const void* zeros[3];   // of those with ZEROS
    const void* bias[3];    // [N], with BIAS, in the weights' dtype; the first of all three is of FIRST segments
    void* y;                // T [ROWS, SEGMENTS * N]; ADD: the float residual stream [ROWS, N]
    float scale;
    NormArgs norm;
};

template <class P> INLINE P which(P const (&pointers)[3], int i) {
    return i == 0 ? pointers[0] : i == 1 ? pointers[1] : pointers[2];
}

// The scales of all groups that a block's outputs have, [groups, OUTPUTS], in shared memory: on their
// way in registers of its THREADS, as weights are, until store().
template <class W, int K, int OUTPUTS, int THREADS> struct Scales {
    typedef typename OfGroup<W>::Type S;
    static constexpr int GROUP = Format<W>::GROUP ? Format<W>::GROUP : K;
    static constexpr int GROUPS = padded<W, K>() / GROUP;
    static constexpr int COUNT = Format<W>::GROUP ? GROUPS * OUTPUTS : 0;
    static constexpr int EACH = (COUNT + THREADS - 1) / THREADS;
    static constexpr int STRIDE = OUTPUTS + 2;  // writes of neighbouring groups fall on other banks
    static constexpr int SHARED = COUNT ? GROUPS * STRIDE : 1;
    S own[EACH ? EACH : 1];

    // at(output, group): what there is of an output's group
    template <class At> INLINE void load(At at) {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = threadIdx.x + e * THREADS;
            if (i < COUNT) own[e] = at(i / GROUPS, i % GROUPS);
        }
    }
    INLINE void store(S* shared) const {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = threadIdx.x + e * THREADS;
            if (i < COUNT) shared[i % GROUPS * STRIDE + i / GROUPS] = own[e];
        }
        if (COUNT) __syncthreads();
    }
    static INLINE Two two(const S* shared, int k, int output) {  // of a column's group; an even output
        if (!COUNT) return {1.f, 1.f};
        const int group = min(k / GROUP, GROUPS - 1);  // behind the last one weights are zeros
        const Pack<S, 2> two = *(const Pack<S, 2>*)(shared + group * STRIDE + output);
        return {scale_of(two.element[0]), scale_of(two.element[1]), shift_of(two.element[0]),
                shift_of(two.element[1])};
    }
};

// A block computes 8 * TILES outputs (of each of two weights with GATE); its warps share out K.
template <class W, int K, int N, int SEGMENTS, int TILES, int WARPS, int NORM, int EPILOGUE, int ACT,
          bool BIAS, bool ACROSS, int FIRST = 1>
INLINE void linear(const LinearArgs& args) {
    typedef typename Format<W>::Bias Bias;
    constexpr int WEIGHTS = EPILOGUE == GATE ? 2 : 1, ALL = TILES * WEIGHTS;
    constexpr int COLUMNS = Format<W>::COLUMNS, STEP = 4 * COLUMNS * WARPS;
    constexpr int STEPS = (K + STEP - 1) / STEP, STORED = padded<W, K>();
    constexpr int FIT = 32 / (ALL * Fragment<W>::WORDS);  // 32 registers of weights ahead
    constexpr int AHEAD = FIT < 1 ? 1 : FIT < STEPS ? FIT : STEPS;
    // Of weights of fewer bits, as many fragments, of one tile after the other
    constexpr bool NARROW = COLUMNS > 8;
    constexpr int MANY = 32 / Fragment<W>::WORDS, RING = MANY < STEPS * ALL ? MANY : STEPS * ALL;
    typedef Product<W, STEPS> Sums;
    constexpr int PER = Sums::PER, MOST = COLUMNS == 8 ? AHEAD : PER > 2 ? 1 : 2;
    constexpr int INPUTS = MOST < STEPS ? MOST : STEPS, TOGETHER = INPUTS * PER;  // x at a time
    constexpr int BLOCKS = (N + 8 * TILES - 1) / (8 * TILES), OUTPUTS = 8 * TILES * ROWS;
    constexpr int EACH = (OUTPUTS + WARPS * 32 - 1) / (WARPS * 32);  // outputs of a thread
    typedef Scales<W, K, 8 * ALL, 32 * WARPS> OfGroups;
    typedef typename Format<W>::Input X;  // what x is in after the norm
    __shared__ alignas(16) X normed[NORM ? ROWS * (K + PAD) : 1];
    __shared__ float sums[WARPS][ALL * 8 * ROWS];
    __shared__ alignas(16) typename OfGroups::S group_scales[OfGroups::SHARED];

    launch_dependents();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int segment = blockIdx.x / BLOCKS, first = blockIdx.x % BLOCKS * 8 * TILES;
    const int k0 = (warp * 4 + lane % 4) * COLUMNS;
    const int source = FIRST > 1 ? max(segment - FIRST + 1, 0) : segment;  // of weight and bias
    const int inside = FIRST > 1 && segment < FIRST ? segment * N : 0;     // the first of them
    const char* rows[ALL];
    Fragment<W> w[AHEAD][ALL], ring[RING];
    const auto row_of = [&](int a, int i) {  // row i of tile a, as there are N
        return (long long)(min(first + a / WEIGHTS * 8 + i, N - 1) + inside);
    };
    const auto matrix = [&](int a) { return EPILOGUE == GATE ? a % 2 : source; };
#pragma unroll
    for (int a = 0; a < ALL; a++) {
        rows[a] = (const char*)which(args.weight, matrix(a));
        if (!ACROSS) rows[a] += row_of(a, lane / 4) * STORED * Format<W>::BITS / 8;
    }
    const auto load = [&](Fragment<W> (&w)[ALL], int k) {
        if constexpr (ACROSS) load_across<K, N, ALL>((const W*)rows[0], first, k, lane, w);
        else
#pragma unroll
            for (int a = 0; a < ALL; a++) w[a] = load_weights<W>(rows[a], k, STORED);
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (!NARROW) load(w[i], k0 + i * STEP);
#pragma unroll
    for (int i = 0; i < RING; i++)
        if (NARROW) ring[i] = load_weights<W>(rows[i % ALL], k0 + i / ALL * STEP, STORED);
    OfGroups of_groups;
    of_groups.load([&](int output, int group) {
        const int a = output / 8, of = matrix(a);
        const long long row = row_of(a, output % 8);
        return of_group<W, OfGroups::GROUPS>(which(args.scales, of), which(args.zeros, of), row, group);
    });

    // Output o is that of column o % (8 * TILES) and row o / (8 * TILES).
    const auto gives = [&](int o) { return o < OUTPUTS && first + o % (8 * TILES) < N; };
    const auto place = [&](int o) {
        return (long long)(o / (8 * TILES)) * SEGMENTS * N + segment * N + first + o % (8 * TILES);
    };
    float bias[EACH][WEIGHTS] = {}, scale[EACH][WEIGHTS], before[EACH] = {};
#pragma unroll
    for (int e = 0; e < EACH; e++)
#pragma unroll
        for (int i = 0; i < WEIGHTS; i++) {
            const int o = threadIdx.x + e * WARPS * 32, n = first + o % (8 * TILES);
            const Bias* from = (const Bias*)which(args.bias, source + i);
            if (BIAS && gives(o) && from) bias[e][i] = to_float(from[n + inside]);
            scale[e][i] = args.scale;
            if (Format<W>::ROW_SCALED && gives(o))
                scale[e][i] *= ((const float*)which(args.scales, source + i))[n + inside];
        }

    if constexpr (NORM != NONE)
        normalize<NORM, K, WARPS, ROWS, K + PAD>((const float*)args.x, args.norm, blockIdx.x == 0, normed);
    else wait_for_inputs();
    typedef typename Either<NORM != NONE, X, T>::type Given;
    const Given* x = NORM ? (const Given*)normed : (const Given*)args.x;
    const int stride = NORM ? K + PAD : K;

    if (EPILOGUE == ADD)
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int o = threadIdx.x + e * WARPS * 32;
            if (gives(o)) before[e] = ((const float*)args.y)[place(o)];
        }

    Sums product[ALL];
    typename Sums::Input input[INPUTS];
    const auto fetch = [&](int base) {
#pragma unroll
        for (int i = 0; i < INPUTS; i++)
            if (base + i * PER < STEPS)
                input[i] = Sums::template load<STEP>(x, stride, k0 + (base + i * PER) * STEP, lane, K);
    };
    fetch(0);
    of_groups.store(group_scales);
#pragma unroll
    for (int base = 0; base < STEPS; base += TOGETHER) {
        if (base) fetch(base);
#pragma unroll
        for (int i = 0; i < INPUTS; i++)
            if (base + i * PER < STEPS) Sums::template prepare<Same<Given, fp16>::value>(input[i]);
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int step = base + i, later = k0 + (step + AHEAD) * STEP;
            if (step >= STEPS) continue;
            if constexpr (ACROSS) turn(w[step % AHEAD]);
#pragma unroll
            for (int a = 0; a < ALL; a++) {
                const int at = step * ALL + a, next = at + RING;
                Fragment<W>& own = NARROW ? ring[at % RING] : w[step % AHEAD][a];
                const Two scales =
                    OfGroups::two(group_scales, warp * 4 * COLUMNS + step * STEP, 8 * a + lane % 4 * 2);
                product[a].add(input[i / PER], i % PER, own, scales, lane);
                if (NARROW && next < STEPS * ALL)
                    own = load_weights<W>(rows[next % ALL], k0 + next / ALL * STEP, STORED);
                if (!NARROW && !ACROSS && step + AHEAD < STEPS)
                    own = load_weights<W>(rows[a], later, STORED);
            }
            if (ACROSS && step + AHEAD < STEPS) load(w[step % AHEAD], later);
        }
    }
#pragma unroll
    for (int a = 0; a < ALL; a++) product[a].store(&sums[warp][a * 8 * ROWS], lane);
    __syncthreads();
    // Where the tiles hold output n: side by side, or as load_across dealt them out
    constexpr bool DEALT = ACROSS && sizeof(W) == 2;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int o = threadIdx.x + e * WARPS * 32, row = o / (8 * TILES), n = o % (8 * TILES);
        if (!gives(o)) continue;
        const int tile = DEALT ? n % TILES : n / 8, column = DEALT ? n / TILES : n % 8;
        float y[WEIGHTS] = {};
#pragma unroll
        for (int i = 0; i < WEIGHTS; i++) {
#pragma unroll
            for (int v = 0; v < WARPS; v++)
                y[i] += sums[v][((tile * WEIGHTS + i) * 8 + column) * ROWS + row];
            y[i] = y[i] * scale[e][i] + bias[e][i];
        }
        if constexpr (EPILOGUE == ADD) ((float*)args.y)[place(o)] = before[e] + y[0];
        else if constexpr (EPILOGUE == STORE) from_float(y[0], ((T*)args.y)[place(o)]);
        else if constexpr (EPILOGUE == ACTIVATE) from_float(activate<ACT>(y[0]), ((T*)args.y)[place(o)]);
        else from_float(activate<ACT>(y[0]) * y[WEIGHTS - 1], ((T*)args.y)[place(o)]);
    }
}

struct DequantiseArgs {
    const void *weight, *scales, *zeros;  // as in LinearArgs, of the first row
    T* y;                                 // [rows, K]
    int rows;
};

// What weights of fewer bits stand for, for products of many rows: a lane's share for each thread.
template <class W, int K> INLINE void dequantise(const DequantiseArgs& args) {
    constexpr int STORED = padded<W, K>(), PIECES = (K + Format<W>::COLUMNS - 1) / Format<W>::COLUMNS;
    constexpr int GROUP = Format<W>::GROUP ? Format<W>::GROUP : STORED, GROUPS = STORED / GROUP;
    launch_dependents();
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x, row = i / PIECES;
    const int k = i % PIECES * Format<W>::COLUMNS;
    if (row >= args.rows) return;
    const char* from = (const char*)args.weight + row * STORED * Format<W>::BITS / 8;
    const Fragment<W> w = load_weights<W>(from, k, STORED);
    const auto own = of_group<W, GROUPS>(args.scales, args.zeros, row, k / GROUP);
    const float scale = scale_of(own), shift = shift_of(own);
    wait_for_inputs();  // whoever reads what is overwritten
#pragma unroll
    for (int part = 0; part < Format<W>::COLUMNS / 8; part++) {
        const uint4 exact = in_place<W>(centred<W>(eight(w, part)));
        const Pack<fp16, 8> x = *(const Pack<fp16, 8>*)&exact;
        Pack<T, 8> y;
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const float value = to_float(x.element[e]);
            from_float((Format<W>::ZEROS ? value + shift : value) * scale, y.element[e]);
        }
        if (k + 8 * part < K) *(Pack<T, 8>*)(args.y + row * K + k + 8 * part) = y;
    }
}

// The norm alone, one block a row: for many rows, whose norms cost more to repeat in every block.
template <int NORM, int K, int WARPS> INLINE void norm(const LinearArgs& args) {
    launch_dependents();
    const long long row = (long long)blockIdx.x * K;
    NormArgs own = args.norm;
    if (own.stream) own.stream += row;
    normalize<NORM, K, WARPS, 1, K>((const float*)args.x + row, own, true, (T*)args.y + row);
}
