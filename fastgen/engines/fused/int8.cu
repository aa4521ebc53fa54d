// Products of 8-bit integers for many rows, by the tensor cores of compute capability 9.0:
// y[M, N] = activate((x[M, K] W[N, K]^T) * row_scale[M] * column_scale[N] + bias[N]).
//
// Behind common.cu, of which it takes the types, the activations' names and the two functions of
// programmatic dependent launch. Compiled for sm_90a.
//
// A block computes tiles of 128 x BN outputs (with GATED half of BN, of two weights). One warp asks
// for tiles of x and W, by bulk tensor copies that run STAGES ahead; two warp groups multiply and
// store. With TURNS they have every other tile each, so that one multiplies while the other stores;
// else they share each tile's rows. Blocks are as many as there are processors, and each walks over
// tiles. What lies behind M, N or K is read as zeros, and not stored; K is a multiple of 16 and N of 8,
// as 16 bytes are read and stored at once.

struct alignas(64) TensorMap { unsigned long long opaque[16]; };  // CUtensorMap

struct Int8Args {
    TensorMap x, weight[2];        // int8 [M, K], [N, K]; with GATED two weights
    const float* row_scale;        // [M], or with row_step 0 one for all
    const float* column_scale[2];  // [N], of each weight
    const T* bias[2];              // [N]; null: none
    void* y;                       // T [M, N], or with ONTO float [M, N] that it is added to, or
                                   // with INTEGERS int8 [M, N], of one step
    const int* count;              // how many of the rows there are; null: all
    int rows, columns, inputs, row_step;  // M, N, K
    float factor;                  // of INTEGERS: these a unit
};

constexpr int STORED = -1;  // in place of an activation
constexpr int INT8_ROWS = 128, INT8_INPUTS = 128;  // of a tile: rows of 128 bytes
constexpr int INT8_GROUP = 2048;  // rows whose tiles are walked over together, for the L2 cache

// ---------------------------------------------------------------------------------------------
// Barriers in shared memory, and bulk tensor copies

INLINE void barrier_make(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
INLINE void barrier_expect(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
INLINE void barrier_wait(unsigned barrier, unsigned parity) {
    unsigned done;
    do {
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
                     "selp.b32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}
INLINE void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// A box of a matrix to a place in shared memory.
INLINE void copy_box(unsigned to, const TensorMap& map, int column, int row, unsigned barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// ---------------------------------------------------------------------------------------------
// Multiplication of a warp group: 64 rows, BN columns, 32 inputs

// Rows of 128 bytes, whose chunks of 16 lie as the copies swizzle them.
INLINE unsigned long long matrix_at(unsigned place) {
    return (unsigned long long)((place & 0x3ffff) >> 4) | 1ull << 16 | (1024ull >> 4) << 32 | 1ull << 62;
}

#define INT8_C4(i) "+r"(c[i]), "+r"(c[i + 1]), "+r"(c[i + 2]), "+r"(c[i + 3])
#define INT8_C16(i) INT8_C4(i), INT8_C4(i + 4), INT8_C4(i + 8), INT8_C4(i + 12)
#define INT8_C32(i) INT8_C16(i), INT8_C16(i + 16)
#define INT8_N0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
    "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define INT8_N1 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define INT8_N2 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define INT8_N3 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, " \
    "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, " \
    "%125, %126, %127"
#define INT8_MULTIPLY(COLUMNS, NAMES, X, W, ADD, ...)                                          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" ADD ", 0;\n"                             \
                 "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k32.s32.s8.s8 {" NAMES "}, %" X  \
                 ", %" W ", p;\n}"                                                             \
                 : __VA_ARGS__ : "l"(x), "l"(w), "r"(add))

// c = x w^T, or with add c + x w^T; a lane holds, of each eight columns, two of row lane / 4 of its
// warp's sixteen, and two of the row eight further on.
INLINE void multiply(int (&c)[32], unsigned long long x, unsigned long long w, int add) {
    INT8_MULTIPLY("64", INT8_N0, "32", "33", "34", INT8_C32(0));
}
INLINE void multiply(int (&c)[64], unsigned long long x, unsigned long long w, int add) {
    INT8_MULTIPLY("128", INT8_N0 ", " INT8_N1, "64", "65", "66", INT8_C32(0), INT8_C32(32));
}
INLINE void multiply(int (&c)[128], unsigned long long x, unsigned long long w, int add) {
    INT8_MULTIPLY("256", INT8_N0 ", " INT8_N1 ", " INT8_N2 ", " INT8_N3, "128", "129", "130",
                  INT8_C32(0), INT8_C32(32), INT8_C32(64), INT8_C32(96));
}
INLINE void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void multiply_queued() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LATER> INLINE void multiply_done() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATER) : "memory");
}
template <int COUNT> INLINE void multiplied(int (&c)[COUNT]) {  // c is read behind this only
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(c[i])::"memory");
}

// ---------------------------------------------------------------------------------------------
// Activations, by the hardware's exponential and reciprocal: there are as many as a short product takes

INLINE float sigmoid_of(float power) {  // 1 / (1 + 2^-power)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(-power));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.f + y));
    return y;
}

template <int ACT> INLINE float quick(float x) {
    if constexpr (ACT == STORED) return x;
    else if constexpr (ACT == GELU_TANH) return x * sigmoid_of(x * (2.3022082f + 0.10294324f * x * x));
    else if constexpr (ACT == SILU) return x * sigmoid_of(x * 1.442695f);
    else return activate<ACT>(x);
}

INLINE unsigned two_of(float low, float high, bf16) {
    unsigned y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
INLINE unsigned two_of(float low, float high, fp16) {  // finite
    return two_of_float(fminf(fmaxf(low, -65504.f), 65504.f), fminf(fmaxf(high, -65504.f), 65504.f));
}

// Of four words that each lane of four has, lane i gets the i-th of all.
INLINE void transpose(unsigned (&w)[4]) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
        const bool upper = threadIdx.x & bit;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & bit) continue;
            const unsigned other = __shfl_xor_sync(~0u, upper ? w[i] : w[i + bit], bit);
            if (upper) w[i] = other;
            else w[i + bit] = other;
        }
    }
}

// ---------------------------------------------------------------------------------------------

template <int BN, bool TURNS, int ACT, bool GATED, bool ONTO, bool INTEGERS> struct Int8Product {
    static constexpr int OUT = GATED ? BN / 2 : BN;  // columns of y
    static constexpr int PARTS = TURNS ? 2 : 1;      // of 64 rows that a warp group has
    static constexpr int WARPS = TURNS ? 4 : 8;      // that read a tile
    static constexpr int X_BYTES = INT8_ROWS * INT8_INPUTS, STAGE = X_BYTES + BN * INT8_INPUTS;
    static constexpr int STAGES = 200 * 1024 / STAGE;
    static constexpr int COLUMN_BYTES = BN * 8;  // scales and biases of a tile, for a warp group
    static constexpr int BARRIERS = STAGES * STAGE + 4 * COLUMN_BYTES;

    const Int8Args& args;
    char* shared;
    unsigned base;  // its address
    int k_steps, column_tiles, rows = 0, row_tiles = 0;

    // The first row and column of a tile.
    INLINE void place(int tile, int& row, int& column) const {
        constexpr int GROUP = INT8_GROUP / INT8_ROWS;
        const int before = tile / (GROUP * column_tiles) * GROUP;
        const int size = min(GROUP, row_tiles - before), among = tile % (GROUP * column_tiles);
        row = (before + among % size) * INT8_ROWS;
        column = among / size * OUT;
    }
    INLINE void count_tiles() {
        rows = args.count ? min(*args.count, args.rows) : args.rows;
        row_tiles = (rows + INT8_ROWS - 1) / INT8_ROWS;
    }
    INLINE unsigned filled(int stage) const { return base + BARRIERS + 8 * stage; }
    INLINE unsigned emptied(int stage) const { return base + BARRIERS + 8 * (STAGES + stage); }

    // Loads

    INLINE void load_weights(int stage, int k, int column) const {
#pragma unroll
        for (int half = 0; half < 2; half++)
            copy_box(base + stage * STAGE + X_BYTES + half * (BN / 2 * INT8_INPUTS),
                     args.weight[GATED ? half : 0], k * INT8_INPUTS,
                     column + (GATED ? 0 : half * (BN / 2)), filled(stage));
    }

    // One thread. The first weights are fetched before the launch in front has ended, if it is known
    // that there are rows to multiply them by.
    INLINE void load() {
        int early = 0, row, column;
        if (!args.count) {
            count_tiles();
            early = min(STAGES, k_steps);
            place(blockIdx.x, row, column);
            for (int k = 0; k < early; k++) {
                barrier_expect(filled(k), STAGE);
                load_weights(k, k, column);
            }
        }
        wait_for_inputs();
        count_tiles();
        int stage = 0;
        unsigned parity = 1;
        for (int tile = blockIdx.x; tile < row_tiles * column_tiles; tile += gridDim.x) {
            place(tile, row, column);
            for (int k = 0; k < k_steps; k++) {
                if (early > 0) {
                    early--;
                } else {
                    barrier_wait(emptied(stage), parity);
                    barrier_expect(filled(stage), STAGE);
                    load_weights(stage, k, column);
                }
                copy_box(base + stage * STAGE, args.x, k * INT8_INPUTS, row, filled(stage));
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        }
    }

    // Results

    // Scales and biases of two columns: of this thread's place in the tile.
    INLINE float4 two_columns(int column) const {
        const int at = threadIdx.x % 128 * 2;
        const bool second = GATED && at >= OUT;
        const int n = column + at - (second ? OUT : 0);
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
        if (at >= BN || n >= args.columns) return v;
        const float2 scales = *(const float2*)(args.column_scale[second] + n);
        v.x = scales.x, v.y = scales.y;
        if (args.bias[second]) {
            const Pack<T, 2> bias = *(const Pack<T, 2>*)(args.bias[second] + n);
            v.z = to_float(bias.element[0]), v.w = to_float(bias.element[1]);
        }
        return v;
    }
    INLINE void store(const int (&c)[BN / 2], const float (&row_scale)[2], int row, int column,
                      const float4* columns) const {
        const int quad = threadIdx.x % 4;
        const auto result = [&](int group, int h, float4 scales, float4 gates, float (&y)[2]) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float scale = row_scale[h] * (e ? scales.y : scales.x);
                y[e] = quick<ACT>(c[group * 4 + 2 * h + e] * scale + (e ? scales.w : scales.z));
                if constexpr (GATED) {
                    const float factor = row_scale[h] * (e ? gates.y : gates.x);
                    y[e] *= c[(group + OUT / 8) * 4 + 2 * h + e] * factor + (e ? gates.w : gates.z);
                }
            }
        };
#pragma unroll
        for (int block = 0; block < OUT / 32; block++) {
            unsigned words[2][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int group = block * 4 + i;
                const float4 scales = columns[group * 4 + quad];
                const float4 gates = columns[(GATED ? group + OUT / 8 : group) * 4 + quad];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float y[2];
                    result(group, h, scales, gates, y);
                    if constexpr (ONTO) add(y, row + 8 * h, column + group * 8 + quad * 2);
                    else if constexpr (INTEGERS) words[h][i] = two_integers(y[0], y[1]);
                    else words[h][i] = two_of(y[0], y[1], T());
                }
            }
            if constexpr (!ONTO)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    transpose(words[h]);
                    put(words[h], row + 8 * h, column + (block * 4 + quad) * 8);
                }
        }
    }
    INLINE void add(const float (&y)[2], int row, int column) const {
        if (row >= rows || column >= args.columns) return;
        float* to = (float*)args.y + (long long)row * args.columns + column;
        asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};"
                     ::"l"(to), "f"(y[0]), "f"(y[1]) : "memory");
    }
    INLINE unsigned two_integers(float low, float high) const {
        unsigned y;
        asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;"
            : "=r"(y) : "r"(nearest(high)), "r"(nearest(low)), "r"(0));
        return y;
    }
    INLINE int nearest(float y) const {
        return __float2int_rn(fminf(fmaxf(y * args.factor, -127.f), 127.f));
    }
    INLINE void put(const unsigned (&words)[4], int row, int column) const {
        if (row >= rows || column >= args.columns) return;
        if constexpr (INTEGERS) {
            signed char* integers = (signed char*)args.y + (long long)row * args.columns + column;
            *(uint2*)integers = make_uint2(words[0] | words[1] << 16, words[2] | words[3] << 16);
        } else {
            T* to = (T*)args.y + (long long)row * args.columns + column;
            *(uint4*)to = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }

    // A warp group

    // Where the next load is, so many stages further on: 2 stage + the parity of its phase.
    static INLINE unsigned after(unsigned at, int stages) {
        const unsigned stage = at / 2 + stages;
        return stage % STAGES * 2 + ((at ^ stage / STAGES) & 1);
    }
    INLINE void release(unsigned at) const {
        if (threadIdx.x % 32 == 0) barrier_arrive(emptied(at / 2));
    }
    INLINE void sum_up(int (&c)[PARTS][BN / 2], int group, unsigned at) const {
        unsigned last = at;
        for (int k = 0; k < k_steps; k++, last = at, at = after(at, 1)) {
            barrier_wait(filled(at / 2), at & 1);
            const unsigned place = base + at / 2 * STAGE;
            const auto x = matrix_at(place + (TURNS ? 0 : group * 64 * INT8_INPUTS));
            const auto w = matrix_at(place + X_BYTES);
            multiply_begin();
#pragma unroll
            for (int i = 0; i < INT8_INPUTS / 32; i++)  // 32 bytes further on, of 16 each
#pragma unroll
                for (int part = 0; part < PARTS; part++)
                    multiply(c[part], x + part * (64 * INT8_INPUTS / 16) + 2 * i, w + 2 * i, k + i > 0);
            multiply_queued();
            if (k > 0) multiply_done<1>(), release(last);
        }
    }
    INLINE void multiply_tiles(int group) {
        wait_for_inputs();
        count_tiles();
        const int thread = threadIdx.x % 128, tiles = row_tiles * column_tiles;
        const int skipped = TURNS ? group : 0, step = gridDim.x * PARTS;
        unsigned at = after(0, skipped * k_steps);
        float4* columns = (float4*)(shared + STAGES * STAGE + 2 * group * COLUMN_BYTES);
        for (int n = skipped, tile = blockIdx.x + skipped * gridDim.x; tile < tiles; n++, tile += step) {
            int row, column;
            place(tile, row, column);
            row += (TURNS ? 0 : group * 64) + thread / 32 * 16 + thread % 32 / 4;
            const float4 two = two_columns(column);
            float row_scale[PARTS][2];
#pragma unroll
            for (int i = 0; i < 2 * PARTS; i++)
                row_scale[i / 2][i % 2] =
                    args.row_scale[min(row + i / 2 * 64 + i % 2 * 8, rows - 1) * args.row_step];
            // One after the other: a barrier tells its last phase only from the one before
            if (TURNS && n > 0) asm volatile("bar.sync %0, 256;" ::"r"(3 + group) : "memory");
            int c[PARTS][BN / 2];
            sum_up(c, group, at);
            if (TURNS && tile + (int)gridDim.x < tiles)
                asm volatile("bar.arrive %0, 256;" ::"r"(4 - group) : "memory");
            multiply_done<0>();
            release(after(at, k_steps - 1));
            at = after(at, k_steps * PARTS);
            float4* own = columns + (n & 1) * (COLUMN_BYTES / 16);
            if (thread < BN / 2) own[thread] = two;
            asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
#pragma unroll
            for (int part = 0; part < PARTS; part++, row += 64) {
                multiplied(c[part]);
                asm volatile("" : "+r"(row), "+r"(column));  // no addresses are kept in registers
                store(c[part], row_scale[part], row, column, own);
            }
        }
    }
};

template <int BN, bool TURNS, int ACT, bool GATED, bool ONTO, bool INTEGERS>
INLINE void int8_product(const Int8Args& args) {
    typedef Int8Product<BN, TURNS, ACT, GATED, ONTO, INTEGERS> Product;
    extern __shared__ char int8_shared[];
    launch_dependents();
    const unsigned start = (unsigned)__cvta_generic_to_shared(int8_shared);
    const unsigned base = (start + 1023) & ~1023u;
    Product product = {args, int8_shared + (base - start), base,
                       (args.inputs + INT8_INPUTS - 1) / INT8_INPUTS,
                       (args.columns + Product::OUT - 1) / Product::OUT};
    if (threadIdx.x == 0) {
        asm volatile("prefetch.tensormap [%0];" ::"l"(&args.x) : "memory");
        for (int s = 0; s < Product::STAGES; s++) {
            barrier_make(product.filled(s), 1);
            barrier_make(product.emptied(s), Product::WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) product.load();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        product.multiply_tiles(threadIdx.x / 128 - 1);
    }
}
