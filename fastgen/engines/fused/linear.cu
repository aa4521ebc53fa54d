// Linear layers of few rows: y[ROWS, N] = x[ROWS, K] W[N, K]^T + bias, with the norm in front and what
// follows in the same launch (see common.cu and weights.cu for the definitions in front).

enum Epilogue { STORE, ADD, ACTIVATE, GATE };

// What a lane holds of eight columns of x: of row lane / 4, and of the row eight further on.
struct Columns { uint4 low, high; };

// 16-bit weights go through tensor cores, whose 16 x 8 products take x as the rows. The order of
// the columns is free as long as x and W agree: a lane's eight consecutive ones serve two products.
#define FASTGEN_MMA(TYPE, X0, X1, X2, X3, W0, W1)                                                  \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "                             \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                          \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                           \
        : "r"(X0), "r"(X1), "r"(X2), "r"(X3), "r"(W0), "r"(W1))
INLINE void multiply(float (&c)[4], const Columns& x, uint4 w, bf16) {
    FASTGEN_MMA("bf16", x.low.x, x.high.x, x.low.y, x.high.y, w.x, w.y);
    FASTGEN_MMA("bf16", x.low.z, x.high.z, x.low.w, x.high.w, w.z, w.w);
}
INLINE void multiply(float (&c)[4], const Columns& x, uint4 w, fp16) {
    FASTGEN_MMA("f16", x.low.x, x.high.x, x.low.y, x.high.y, w.x, w.y);
    FASTGEN_MMA("f16", x.low.z, x.high.z, x.low.w, x.high.w, w.z, w.w);
}

template <class X> INLINE uint4 eight_columns(const X* x, int stride, int k, int row, int columns) {
    uint4 eight = make_uint4(0, 0, 0, 0);
    if (row < ROWS && k < columns) eight = *(const uint4*)(x + row * stride + k);
    return eight;
}

// What a lane accumulates of an 8-output tile, for all ROWS. An Input is x of PER steps of its warp.
// Two are the scales of a group of weights in the two outputs that tensor cores leave a lane.
struct Two { float first, second; };
template <class W, int STEPS> struct Product {
    typedef Columns Input;
    static constexpr int PER = 1;
    float c[4] = {0.f, 0.f, 0.f, 0.f};

    template <int STEP, class X>
    static INLINE Input load(const X* x, int stride, int k, int lane, int columns) {
        return {eight_columns(x, stride, k, lane / 4, columns),
                eight_columns(x, stride, k, lane / 4 + 8, columns)};
    }
    template <bool> static INLINE void prepare(Input&) {}
    INLINE void add(const Input& x, int, const Fragment<W>& w, Two, int) {
        multiply(c, x, make_uint4(w.word[0], w.word[1], w.word[2], w.word[3]), W());
    }
    INLINE void store(float* sums, int lane) const {  // sums[8 outputs][ROWS]
        const int output = lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + i / 2 * 8;
            if (row < ROWS) sums[(output + i % 2) * ROWS + row] = c[i];
        }
    }
};

// Weights of fewer bits become numbers of fp16 without their scales, which the sums of a step take.
// x is in fp16 for them: normed rows as they are; others that are in bf16 times a power of two, which
// 64 columns share, so that none is too large.
// A tensor core has 16 rows: if there are fewer of x, the others hold x of further steps. So one load
// brings x of many steps into few registers; of a step's sums, only those of its rows count.
template <class W, int STEPS> struct NarrowProduct {
    static constexpr int HELD = ROWS > 8 ? 16 : ROWS > 4 ? 8 : ROWS > 2 ? 4 : ROWS;  // rows of a step
    static constexpr int HALF = HELD > 8 ? 1 : 8 / HELD;  // steps in the rows 0 to 7
    static constexpr int PER = HELD > 8 ? 1 : STEPS < 2 * HALF ? STEPS : 2 * HALF;
    struct Input {
        Columns eight[2];
        float scale[2], less[4];  // scale: of the rows low and high; less: see excess()
    };
    float c[HELD > 8 ? 4 : 2] = {};

    template <int STEP, class X>
    static INLINE Input load(const X* x, int stride, int k, int lane, int columns) {
        const int row = lane / 4 % HELD, own = k + lane / 4 / HELD * STEP;
        Input input = {};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int low = own + 8 * i, high = HELD > 8 ? low : low + HALF * STEP;
            Columns& eight = input.eight[i];
            eight.low = eight_columns(x, stride, low, row, columns);
            if (HELD > 8 || PER > HALF)
                eight.high = eight_columns(x, stride, high, HELD > 8 ? row + 8 : row, columns);
        }
        return input;
    }
    // 16 columns of a row in bf16 to fp16, where the largest of the 64 that four lanes have is 2^14
    static INLINE void narrow(uint4& first, uint4& second, float& scale) {
        const unsigned from[8] = {first.x,  first.y,  first.z,  first.w,
                                  second.x, second.y, second.z, second.w};
        float x[16], largest = 0.f;
#pragma unroll
        for (int e = 0; e < 16; e++) {
            x[e] = __uint_as_float(e % 2 ? from[e / 2] & 0xffff0000 : from[e / 2] << 16);
            largest = fmaxf(largest, fabsf(x[e]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        const int exponent = max((int)(__float_as_uint(largest) >> 23), 15);
        const float factor = __uint_as_float((268 - exponent) << 23);  // 2^14 over the largest's power
        scale = __uint_as_float((exponent - 14) << 23);                // of two, and its inverse
        unsigned y[8];
#pragma unroll
        for (int i = 0; i < 8; i++) y[i] = two_of_float(x[2 * i] * factor, x[2 * i + 1] * factor);
        first = make_uint4(y[0], y[1], y[2], y[3]), second = make_uint4(y[4], y[5], y[6], y[7]);
    }
    template <bool NARROW> static INLINE void prepare(Input& x) {  // NARROW: x is in fp16
        x.scale[0] = x.scale[1] = 1.f;
        if (!NARROW) narrow(x.eight[0].low, x.eight[1].low, x.scale[0]);
        if (!NARROW && (HELD > 8 || PER > HALF)) narrow(x.eight[0].high, x.eight[1].high, x.scale[1]);
#pragma unroll
        for (int i = 0; i < 4; i++) x.less[i] = 0.f;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            x.eight[i] = {in_order<W>(x.eight[i].low), in_order<W>(x.eight[i].high)};
            if (!Format<W>::ROW_SCALED) multiply(x.less, x.eight[i], excess<W>(), fp16());
        }
    }
    INLINE void add(const Input& x, int step, const Fragment<W>& w, Two scales, int lane) {
        float own[4] = {x.less[0], x.less[1], x.less[2], x.less[3]}, more[4] = {};
        multiply(own, x.eight[0], eight(w, 0), fp16());  // two short chains: nothing else to wait for
        multiply(more, x.eight[1], eight(w, 1), fp16());
#pragma unroll
        for (int i = 0; i < 4; i++) own[i] += more[i];
        if constexpr (HELD > 8) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                c[i] += own[i] * ((i % 2 ? scales.second : scales.first) * x.scale[i / 2]);
        } else {
            const int half = step < HALF ? 0 : 1;
            const float scale = x.scale[half];
            if (lane / 4 / HELD == step % HALF) {
                c[0] += own[2 * half] * (scales.first * scale);
                c[1] += own[2 * half + 1] * (scales.second * scale);
            }
        }
    }
    INLINE void store(float* sums, int lane) const {
#pragma unroll
        for (int i = 0; i < (HELD > 8 ? 4 : 2); i++) {
            float sum = c[i];
#pragma unroll
            for (int other = 4 * HELD; other < 32; other *= 2) sum += __shfl_xor_sync(~0u, sum, other);
            const int row = lane / 4 + i / 2 * 8;
            if (row < ROWS) sums[(lane % 4 * 2 + i % 2) * ROWS + row] = sum;
        }
    }
};
template <int B, int G, class S, int STEPS>
struct Product<Ints<B, G, S>, STEPS> : NarrowProduct<Ints<B, G, S>, STEPS> {};
template <int STEPS> struct Product<Fp8, STEPS> : NarrowProduct<Fp8, STEPS> {};

// float weights: exact products, each lane for its own row of W and every row of x.
template <int STEPS> struct Product<float, STEPS> {
    static constexpr int PER = 1;
    struct Input { Pack<T, 8> row[ROWS]; };
    float c[ROWS] = {};

    template <int STEP> static INLINE Input load(const T* x, int stride, int k, int, int columns) {
        Input input;
        for (int r = 0; r < ROWS; r++)
            input.row[r] = *(const Pack<T, 8>*)(x + r * stride + (k < columns ? k : 0));
        return input;
    }
    template <bool> static INLINE void prepare(Input&) {}
    INLINE void add(const Input& x, int, const Fragment<float>& w, Two, int) {
        const float* weights = (const float*)&w;
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int i = 0; i < 8; i++) c[r] += to_float(x.row[r].element[i]) * weights[i];
    }
    INLINE void store(float* sums, int lane) const {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float sum = c[r];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (lane % 4 == 0) sums[lane / 4 * ROWS + r] = sum;
        }
    }
};

struct LinearArgs {
    const void* x;          // T [ROWS, K], or with a norm the float residual stream
    const void* weight[3];  // W [N, K], ACROSS: [K, N]; one a segment; GATE: wi_0 and wi_1
    const void* scales[3];  // of weights of fewer bits: S [N, groups], or float [N]
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
    typedef typename Format<W>::Scale S;
    static constexpr int GROUP = Format<W>::GROUP ? Format<W>::GROUP : K;
    static constexpr int GROUPS = padded<W, K>() / GROUP;
    static constexpr int COUNT = Format<W>::GROUP ? GROUPS * OUTPUTS : 0;
    static constexpr int EACH = (COUNT + THREADS - 1) / THREADS;
    static constexpr int STRIDE = OUTPUTS + 2;  // writes of neighbouring groups fall on other banks
    static constexpr int SHARED = COUNT ? GROUPS * STRIDE : 1;
    S own[EACH ? EACH : 1];

    // at(output): where the scales of an output's groups are
    template <class At> INLINE void load(At at) {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = threadIdx.x + e * THREADS;
            if (i < COUNT) own[e] = at(i / GROUPS)[i % GROUPS];
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
        return {to_float(two.element[0]), to_float(two.element[1])};
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
    of_groups.load([&](int output) {
        const int a = output / 8;
        const auto* scales = (const typename OfGroups::S*)which(args.scales, matrix(a));
        return scales + row_of(a, output % 8) * OfGroups::GROUPS;
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
    const void *weight, *scales;  // as in LinearArgs, of the first row
    T* y;                         // [rows, K]
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
    const float scale = to_float(((const typename Format<W>::Scale*)args.scales)[row * GROUPS + k / GROUP]);
    wait_for_inputs();  // whoever reads what is overwritten
#pragma unroll
    for (int part = 0; part < Format<W>::COLUMNS / 8; part++) {
        const uint4 exact = in_place<W>(centred<W>(eight(w, part)));
        const Pack<fp16, 8> x = *(const Pack<fp16, 8>*)&exact;
        Pack<T, 8> y;
#pragma unroll
        for (int e = 0; e < 8; e++) from_float(to_float(x.element[e]) * scale, y.element[e]);
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
