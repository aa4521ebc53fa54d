// Linear layers of few rows: y[ROWS, N] = x[ROWS, K] W[N, K]^T + bias, with the norm in front and what
// follows in the same launch (see common.cu for the definitions in front).

enum Epilogue { STORE, ADD, ACTIVATE, GATE };

// A lane's share of an 8 x 32 tile of W: row lane / 4, columns 8 * (lane % 4) and the next seven.
template <class W> struct Fragment { uint4 part[sizeof(W) / 2]; };

// Volatile and without .nc, loads stay where they are written: in front of wait_for_inputs().
template <class W> INLINE Fragment<W> load_weights(const W* row, int k, int columns) {
    Fragment<W> f;
#pragma unroll
    for (int i = 0; i < (int)sizeof(W) / 2; i++) {
        uint4& v = f.part[i];
        v = make_uint4(0, 0, 0, 0);
        if (k < columns)
            asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                         : "l"((const char*)(row + k) + 16 * i));
    }
    return f;
}

// The same tiles of a W[K, N] that lies the other way round. Of TILES tiles, an even number, a lane
// loads its eight columns' rows, TILES outputs next to each other of each: tile t has the outputs
// TILES * column + t. Tensor cores want two columns of an output in one register: turn() pairs them.
INLINE unsigned& part_of(uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }
template <int BYTES> INLINE void load_bytes(const void* from, unsigned* to) {
    if constexpr (BYTES == 4)
        asm volatile("ld.global.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
    else if constexpr (BYTES == 8)
        asm volatile("ld.global.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
                     : "=r"(to[0]), "=r"(to[1]) : "l"(from));
    else
        asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
}
template <int K, int N, int TILES, class W>
INLINE void load_across(const W* weight, int first, int k0, int lane, Fragment<W> (&w)[TILES]) {
    const int n = first + lane / 4 * TILES;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        unsigned two[TILES / 2] = {};
        if (k0 + j < K && n < N) load_bytes<2 * TILES>(weight + (long long)(k0 + j) * N + n, two);
#pragma unroll
        for (int t = 0; t < TILES / 2; t++) part_of(w[2 * t + j % 2].part[0], j / 2) = two[t];
    }
}
template <int K, int N, int TILES>  // float: a lane's columns of output lane / 4, one by one
INLINE void load_across(const float* weight, int first, int k0, int lane, Fragment<float> (&w)[TILES]) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int n = first + 8 * t + lane / 4;
            unsigned one = 0;
            if (k0 + e < K && n < N) load_bytes<4>(weight + (long long)(k0 + e) * N + n, &one);
            part_of(w[t].part[e / 4], e % 4) = one;
        }
}
template <int TILES> INLINE void turn(Fragment<float> (&)[TILES]) {}
template <int TILES, class W> INLINE void turn(Fragment<W> (&w)[TILES]) {
#pragma unroll
    for (int t = 0; t < TILES; t += 2)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned &x = part_of(w[t].part[0], i), &y = part_of(w[t + 1].part[0], i);
            const unsigned low = __byte_perm(x, y, 0x5410), high = __byte_perm(x, y, 0x7632);
            x = low, y = high;
        }
}

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

// What a lane accumulates of an 8-output tile, for all ROWS.
template <class W> struct Product {
    typedef Columns Input;
    float c[4] = {0.f, 0.f, 0.f, 0.f};

    static INLINE Input load(const T* x, int stride, int k, int columns, int lane) {
        Input input = {};
        const T* from = x + lane / 4 * stride + k;
        if (lane / 4 < ROWS && k < columns) input.low = *(const uint4*)from;
        if (lane / 4 + 8 < ROWS && k < columns) input.high = *(const uint4*)(from + 8 * stride);
        return input;
    }
    INLINE void add(const Input& x, const Fragment<W>& w) { multiply(c, x, w.part[0], W()); }
    INLINE void store(float* sums, int lane) const {  // sums[8 outputs][ROWS]
        const int output = lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + i / 2 * 8;
            if (row < ROWS) sums[(output + i % 2) * ROWS + row] = c[i];
        }
    }
};

// float weights: exact products, each lane for its own row of W and every row of x.
template <> struct Product<float> {
    struct Input { Pack<T, 8> row[ROWS]; };
    float c[ROWS] = {};

    static INLINE Input load(const T* x, int stride, int k, int columns, int) {
        Input input;
        for (int r = 0; r < ROWS; r++)
            input.row[r] = *(const Pack<T, 8>*)(x + r * stride + (k < columns ? k : 0));
        return input;
    }
    INLINE void add(const Input& x, const Fragment<float>& w) {
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
    const void* bias[3];    // W [N], with BIAS; the first of both is of FIRST segments
    void* y;                // T [ROWS, SEGMENTS * N]; ADD: the float residual stream [ROWS, N]
    float scale;
    NormArgs norm;
};

template <class P> INLINE P which(P const (&pointers)[3], int i) {
    return i == 0 ? pointers[0] : i == 1 ? pointers[1] : pointers[2];
}

// A block computes 8 * TILES outputs (of each of two weights with GATE); its warps share out K.
template <class W, int K, int N, int SEGMENTS, int TILES, int WARPS, int NORM, int EPILOGUE, int ACT,
          bool BIAS, bool ACROSS, int FIRST = 1>
INLINE void linear(const LinearArgs& args) {
    constexpr int WEIGHTS = EPILOGUE == GATE ? 2 : 1, ALL = TILES * WEIGHTS;
    constexpr int STEPS = (K + 32 * WARPS - 1) / (32 * WARPS);
    constexpr int FIT = 16 / (ALL * (int)sizeof(W));  // 32 registers of weights ahead
    constexpr int AHEAD = FIT < 1 ? 1 : FIT < STEPS ? FIT : STEPS;
    constexpr int BLOCKS = (N + 8 * TILES - 1) / (8 * TILES), OUTPUTS = 8 * TILES * ROWS;
    constexpr int EACH = (OUTPUTS + WARPS * 32 - 1) / (WARPS * 32);  // outputs of a thread
    __shared__ alignas(16) T normed[NORM ? ROWS * (K + PAD) : 1];
    __shared__ float sums[WARPS][ALL * 8 * ROWS];

    launch_dependents();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int segment = blockIdx.x / BLOCKS, first = blockIdx.x % BLOCKS * 8 * TILES;
    const int k0 = warp * 32 + lane % 4 * 8;
    const int source = FIRST > 1 ? max(segment - FIRST + 1, 0) : segment;  // of weight and bias
    const int inside = FIRST > 1 && segment < FIRST ? segment * N : 0;     // the first of them
    const W* rows[ALL];
    Fragment<W> w[AHEAD][ALL];
#pragma unroll
    for (int a = 0; a < ALL; a++) {
        rows[a] = (const W*)which(args.weight, EPILOGUE == GATE ? a % 2 : source);
        if (!ACROSS) rows[a] += (long long)(min(first + a / WEIGHTS * 8 + lane / 4, N - 1) + inside) * K;
    }
    const auto load = [&](Fragment<W> (&w)[ALL], int k) {
        if constexpr (ACROSS) load_across<K, N, ALL>(rows[0], first, k, lane, w);
        else
#pragma unroll
            for (int a = 0; a < ALL; a++) w[a] = load_weights<W>(rows[a], k, K);
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) load(w[i], k0 + i * WARPS * 32);

    // Output o is that of column o % (8 * TILES) and row o / (8 * TILES).
    const auto gives = [&](int o) { return o < OUTPUTS && first + o % (8 * TILES) < N; };
    const auto place = [&](int o) {
        return (long long)(o / (8 * TILES)) * SEGMENTS * N + segment * N + first + o % (8 * TILES);
    };
    float bias[EACH][WEIGHTS] = {}, before[EACH] = {};
    if (BIAS)
#pragma unroll
        for (int e = 0; e < EACH; e++)
#pragma unroll
            for (int i = 0; i < WEIGHTS; i++) {
                const int o = threadIdx.x + e * WARPS * 32;
                const W* from = (const W*)which(args.bias, source + i);
                if (gives(o) && from) bias[e][i] = to_float(from[first + o % (8 * TILES) + inside]);
            }

    if constexpr (NORM != NONE)
        normalize<NORM, K, WARPS, ROWS, K + PAD>((const float*)args.x, args.norm, blockIdx.x == 0, normed);
    else wait_for_inputs();
    const T* x = NORM ? normed : (const T*)args.x;
    const int stride = NORM ? K + PAD : K;

    if (EPILOGUE == ADD)
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int o = threadIdx.x + e * WARPS * 32;
            if (gives(o)) before[e] = ((const float*)args.y)[place(o)];
        }

    Product<W> product[ALL];
#pragma unroll
    for (int base = 0; base < STEPS; base += AHEAD) {
        typename Product<W>::Input input[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (base + i < STEPS)
                input[i] = Product<W>::load(x, stride, k0 + (base + i) * WARPS * 32, K, lane);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const bool more = base + i + AHEAD < STEPS;
            const int later = k0 + (base + i + AHEAD) * WARPS * 32;
            if constexpr (ACROSS) turn(w[i]);
#pragma unroll
            for (int a = 0; a < ALL; a++) {
                if (base + i < STEPS) product[a].add(input[i], w[i][a]);
                if (!ACROSS && more) w[i][a] = load_weights<W>(rows[a], later, K);
            }
            if (ACROSS && more) load(w[i], later);
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
            y[i] = y[i] * args.scale + bias[e][i];
        }
        if constexpr (EPILOGUE == ADD) ((float*)args.y)[place(o)] = before[e] + y[0];
        else if constexpr (EPILOGUE == STORE) from_float(y[0], ((T*)args.y)[place(o)]);
        else if constexpr (EPILOGUE == ACTIVATE) from_float(activate<ACT>(y[0]), ((T*)args.y)[place(o)]);
        else from_float(activate<ACT>(y[0]) * y[WEIGHTS - 1], ((T*)args.y)[place(o)]);
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
