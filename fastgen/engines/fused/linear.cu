// Kernels of one decoder step for few rows: what a layer computes in eight launches.
//
// The engine puts these definitions in front of this file:
//   T        type of activations: bf16, fp16 or float
//   ROWS     activation rows, batch * queries, 1 to 16
//   QUERIES  query tokens that share one row's KV buffer
// and behind it one extern "C" kernel for each instantiation a model needs.
//
// Programmatic dependent launch: a kernel starts while the ones before it still run. Until
// wait_for_inputs() it may only touch what no kernel of the step writes: weights, positions,
// masks, and KV slots of earlier steps.

struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };

#define INLINE __device__ __forceinline__

constexpr int PAD = 32;  // elements behind a row in shared memory: rows fall on different banks

INLINE float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
INLINE float to_float(fp16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
INLINE float to_float(float x) { return x; }

INLINE void from_float(float x, bf16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
INLINE void from_float(float x, fp16& y) {  // finite, as stock T5 clamps: inf - inf would be NaN
    x = fminf(fmaxf(x, -65504.f), 65504.f);
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}
INLINE void from_float(float x, float& y) { y = x; }

INLINE float finite(fp16 x) { return fminf(fmaxf(to_float(x), -65504.f), 65504.f); }
INLINE float finite(bf16 x) { return to_float(x); }
INLINE float finite(float x) { return x; }

// Four or eight consecutive elements, 16-byte aligned where there are 16 bytes.
template <class E, int COUNT> struct alignas(COUNT * sizeof(E) < 16 ? COUNT * sizeof(E) : 16) Pack {
    E element[COUNT];
};

INLINE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
INLINE void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

INLINE float negative_infinity() { return __int_as_float(0xff800000); }

// ---------------------------------------------------------------------------------------------
// Linear layers: y[ROWS, N] = x[ROWS, K] W[N, K]^T

enum Epilogue { STORE, ADD, ACTIVATE, GATE };
enum Activation { RELU, GELU_TANH, GELU_ERF, SILU };

template <int ACTIVATION> INLINE float activate(float x) {
    if constexpr (ACTIVATION == RELU) return fmaxf(x, 0.f);
    if constexpr (ACTIVATION == GELU_ERF) return 0.5f * x * (1.f + erff(x * 0.70710678f));
    if constexpr (ACTIVATION == SILU) return x / (1.f + expf(-x));
    return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
}

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

// Root-mean-square norm of COUNT rows of the residual stream, float [COUNT, K], with four columns a
// thread; normed has rows of STRIDE. Waits for the residual stream itself.
template <int K, int WARPS, int COUNT, int STRIDE>
INLINE void normalize(const float* residual, const T* weight, float eps, T* normed) {
    static_assert(WARPS * 128 >= K, "four columns a thread");
    __shared__ float squares[WARPS][COUNT];
    const int k = threadIdx.x * 4;
    float4 x[COUNT];
    Pack<T, 4> scale = {};
    if (k < K) scale = *(const Pack<T, 4>*)(weight + k);
    wait_for_inputs();
#pragma unroll
    for (int r = 0; r < COUNT; r++)
        x[r] = k < K ? *(const float4*)(residual + r * K + k) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int r = 0; r < COUNT; r++) {
        float sum = x[r].x * x[r].x + x[r].y * x[r].y + x[r].z * x[r].z + x[r].w * x[r].w;
#pragma unroll
        for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
        if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32][r] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < COUNT; r++) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += squares[w][r];
        const float factor = rsqrtf(sum / K + eps);
        Pack<T, 4> y;
        from_float(x[r].x * factor * to_float(scale.element[0]), y.element[0]);
        from_float(x[r].y * factor * to_float(scale.element[1]), y.element[1]);
        from_float(x[r].z * factor * to_float(scale.element[2]), y.element[2]);
        from_float(x[r].w * factor * to_float(scale.element[3]), y.element[3]);
        if (k < K) *(Pack<T, 4>*)(normed + r * STRIDE + k) = y;
    }
    __syncthreads();
}

struct LinearArgs {
    const void* x;         // T [ROWS, K], or with NORM the float residual stream
    const T* norm;         // T [K], with NORM
    const void* weight[3]; // W [N, K]: one a segment; GATE: wi_0 and wi_1
    void* y;               // T [ROWS, SEGMENTS * N]; ADD: the float residual stream [ROWS, N]
    float eps, scale;
};

// A block computes 8 * TILES outputs (of each of two weights with GATE); its warps share out K.
template <class W, int K, int N, int SEGMENTS, int TILES, int WARPS, bool NORM, int EPILOGUE, int ACT>
INLINE void linear(const LinearArgs& args) {
    constexpr int WEIGHTS = EPILOGUE == GATE ? 2 : 1, ALL = TILES * WEIGHTS;
    constexpr int STEPS = (K + 32 * WARPS - 1) / (32 * WARPS);
    constexpr int FIT = 16 / (ALL * (int)sizeof(W));  // 32 registers of weights ahead
    constexpr int AHEAD = FIT < 1 ? 1 : FIT < STEPS ? FIT : STEPS;
    constexpr int BLOCKS = (N + 8 * TILES - 1) / (8 * TILES), OUTPUTS = 8 * TILES * ROWS;
    static_assert(OUTPUTS <= WARPS * 32, "one output a thread");
    __shared__ alignas(16) T normed[NORM ? ROWS * (K + PAD) : 1];
    __shared__ float sums[WARPS][ALL * 8 * ROWS];

    launch_dependents();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int segment = blockIdx.x / BLOCKS, first = blockIdx.x % BLOCKS * 8 * TILES;
    const int k0 = warp * 32 + lane % 4 * 8;
    const W* rows[ALL];
    Fragment<W> w[ALL][AHEAD];
#pragma unroll
    for (int a = 0; a < ALL; a++) {
        const int which = EPILOGUE == GATE ? a % 2 : segment;
        const void* weight = which == 0 ? args.weight[0] : which == 1 ? args.weight[1] : args.weight[2];
        rows[a] = (const W*)weight + (long long)min(first + a / WEIGHTS * 8 + lane / 4, N - 1) * K;
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
#pragma unroll
        for (int a = 0; a < ALL; a++) w[a][i] = load_weights<W>(rows[a], k0 + i * WARPS * 32, K);

    if constexpr (NORM) normalize<K, WARPS, ROWS, K + PAD>((const float*)args.x, args.norm, args.eps, normed);
    else wait_for_inputs();
    const T* x = NORM ? normed : (const T*)args.x;
    const int stride = NORM ? K + PAD : K;

    // Thread o gives output o % (8 * TILES) of row o / (8 * TILES).
    const int row = threadIdx.x / (8 * TILES), n = threadIdx.x % (8 * TILES);
    const bool gives = threadIdx.x < OUTPUTS && first + n < N;
    const long long place = (long long)row * SEGMENTS * N + segment * N + first + n;
    float before = 0.f;
    if (EPILOGUE == ADD && gives) before = ((const float*)args.y)[place];

    Product<W> product[ALL];
#pragma unroll
    for (int base = 0; base < STEPS; base += AHEAD) {
        typename Product<W>::Input input[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (base + i < STEPS)
                input[i] = Product<W>::load(x, stride, k0 + (base + i) * WARPS * 32, K, lane);
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int a = 0; a < ALL; a++) {
                if (base + i < STEPS) product[a].add(input[i], w[a][i]);
                if (base + i + AHEAD < STEPS)
                    w[a][i] = load_weights<W>(rows[a], k0 + (base + i + AHEAD) * WARPS * 32, K);
            }
    }
#pragma unroll
    for (int a = 0; a < ALL; a++) product[a].store(&sums[warp][a * 8 * ROWS], lane);
    __syncthreads();
    if (!gives) return;
    float y[WEIGHTS] = {};
#pragma unroll
    for (int i = 0; i < WEIGHTS; i++)
#pragma unroll
        for (int v = 0; v < WARPS; v++)
            y[i] += sums[v][((n / 8 * WEIGHTS + i) * 8 + n % 8) * ROWS + row];
    if constexpr (EPILOGUE == ADD) ((float*)args.y)[place] = before + y[0];
    else if constexpr (EPILOGUE == STORE) from_float(y[0] * args.scale, ((T*)args.y)[place]);
    else if constexpr (EPILOGUE == ACTIVATE) from_float(activate<ACT>(y[0]), ((T*)args.y)[place]);
    else from_float(activate<ACT>(y[0]) * y[WEIGHTS - 1], ((T*)args.y)[place]);
}

// The norm alone, one block a row: for many rows, whose norms cost more to repeat in every block.
template <int K, int WARPS> INLINE void norm(const LinearArgs& args) {
    launch_dependents();
    const long long row = (long long)blockIdx.x * K;
    normalize<K, WARPS, 1, K>((const float*)args.x + row, args.norm, args.eps, (T*)args.y + row);
}

struct ActivateArgs {
    const T *x, *gate;  // gate: of GATED
    T* y;
    long long count;  // elements, a multiple of eight; all T [count]
};

// An activation alone, for products of many rows: y = activate(x), or activate(x) * gate.
template <int ACT, bool GATED> INLINE void activation(const ActivateArgs& args) {
    launch_dependents();
    wait_for_inputs();
    const long long i = 8 * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= args.count) return;
    const Pack<T, 8> x = *(const Pack<T, 8>*)(args.x + i);
    Pack<T, 8> gate = x, y;
    if (GATED) gate = *(const Pack<T, 8>*)(args.gate + i);
#pragma unroll
    for (int e = 0; e < 8; e++) {
        const float activated = activate<ACT>(finite(x.element[e]));
        from_float(GATED ? activated * finite(gate.element[e]) : activated, y.element[e]);
    }
    *(Pack<T, 8>*)(args.y + i) = y;
}
