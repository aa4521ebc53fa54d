// Products of 8-bit integers for many rows, by the tensor cores of compute capability 9.0:
// y[M, N] = activate((x[M, K] W[N, K]^T) * row_scale[M] * column_scale[N] + bias[N]).
//
// Behind common.cu, of which it takes the types, the activations' names and the two functions of
// programmatic dependent launch. Compiled for sm_90a.
//
// A block has 128 rows and BN columns of W: one warp asks for tiles of both (bulk tensor copies,
// STAGES of them ahead), two warp groups multiply 64 rows each, and store. Blocks are as many as
// there are processors; each walks over tiles. Those of a cluster of CM x CN tiles load a part each
// of what their rows or columns share, for all of them. What lies behind M, N or K is read as
// zeros, and not stored.

struct alignas(64) TensorMap { unsigned long long opaque[16]; };  // CUtensorMap

struct Int8Args {
    TensorMap x, weight[2];        // int8 [M, K], [N, K]; with GATED two weights
    const float* row_scale;        // [M], or with row_step 0 one for all
    const float* column_scale[2];  // [N], of each weight
    const T* bias[2];              // [N]; null: none
    void* y;                       // T [M, N], or with ONTO float [M, N] that it is added to, or
                                   // with INTEGERS int8 [M, N], of one step: N a multiple of 8
    const int* count;              // how many of the rows there are; null: all
    int rows, columns, inputs, row_step;  // M, N, K
    float factor;                  // of INTEGERS: these a unit
};

constexpr int STORED = -1;  // in place of an activation
constexpr int INT8_ROWS = 128, INT8_INPUTS = 128;  // of a tile; a block has 384 threads
constexpr int INT8_GROUP = 16;  // tiles of rows that are walked over together, for the L2 cache
constexpr int INT8_LAG = 2;     // stages between the warp groups: one multiplies while the other stores

INLINE unsigned shared_address(const void* pointer) {
    return (unsigned)__cvta_generic_to_shared(pointer);
}

// ---------------------------------------------------------------------------------------------
// Barriers in shared memory, clusters, and bulk tensor copies

INLINE void barrier_make(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
INLINE void barrier_expect(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
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
INLINE void barrier_arrive(unsigned barrier, unsigned block) {  // at that of a block of the cluster
    asm volatile("{\n.reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}"
                 ::"r"(barrier), "r"(block) : "memory");
}
template <int BLOCKS> INLINE void cluster_sync() {
    if constexpr (BLOCKS > 1) {
        __syncwarp();
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    } else {
        __syncthreads();
    }
}
template <int BLOCKS> INLINE unsigned rank_in_cluster() {
    unsigned rank = 0;
    if constexpr (BLOCKS > 1) asm("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
    return rank;
}

// A box of a matrix to the same place of all blocks of a mask, or with ALONE of this one.
template <bool ALONE>
INLINE void copy_box(unsigned to, const TensorMap& map, int column, int row, unsigned barrier,
                     unsigned blocks) {
    if constexpr (ALONE)
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                     " [%0], [%1, {%2, %3}], [%4];"
                     ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
    else
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                     ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
                     ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier),
                     "h"((unsigned short)blocks) : "memory");
}

// ---------------------------------------------------------------------------------------------
// Multiplication of a warp group: 64 rows, BN columns, 32 inputs

// Rows of 128 bytes, whose chunks of 16 lie as the copies swizzle them.
INLINE unsigned long long matrix_at(unsigned place) {
    return (unsigned long long)((place & 0x3ffff) >> 4) | 1ull << 16 | (1024ull >> 4) << 32 | 1ull << 62;
}

#define INT8_C8(i) "+r"(c[i]), "+r"(c[i + 1]), "+r"(c[i + 2]), "+r"(c[i + 3]), "+r"(c[i + 4]), \
                   "+r"(c[i + 5]), "+r"(c[i + 6]), "+r"(c[i + 7])
#define INT8_C32(i) INT8_C8(i), INT8_C8(i + 8), INT8_C8(i + 16), INT8_C8(i + 24)
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
INLINE void multiply(int (&c)[96], unsigned long long x, unsigned long long w, int add) {
    INT8_MULTIPLY("192", INT8_N0 ", " INT8_N1 ", " INT8_N2, "96", "97", "98", INT8_C32(0),
                  INT8_C32(32), INT8_C32(64));
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
template <int COUNT> INLINE void multiply_done(int (&c)[COUNT]) {  // c may be read behind it
    multiply_done<0>();
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(c[i])::"memory");
}

// ---------------------------------------------------------------------------------------------
// Activations, by the hardware's exponential: they are as long as a short product

template <int ACT> INLINE float quick(float x) {
    if constexpr (ACT == GELU_TANH)
        return __fdividef(x, 1.f + __expf(-1.5957691f * (x + 0.044715f * x * x * x)));
    else if constexpr (ACT == SILU) return __fdividef(x, 1.f + __expf(-x));
    else if constexpr (ACT == STORED) return x;
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

template <int BN, int CM, int CN, int ACT, bool GATED, bool ONTO, bool INTEGERS>
struct Int8Product {
    static constexpr int BLOCKS = CM * CN, OUT = GATED ? BN / 2 : BN;  // columns of y a tile
    static constexpr int X_BYTES = INT8_ROWS * INT8_INPUTS, W_BYTES = BN * INT8_INPUTS;
    static constexpr int STAGE = X_BYTES + W_BYTES, STAGES = 200 * 1024 / STAGE;
    static constexpr int PARTS = CM > 2 ? CM : 2;  // of a tile of W, each one copy
    static constexpr int COLUMN_BYTES = BN * 8;    // scales and biases of a tile, for a warp group
    static constexpr int BARRIERS = STAGES * STAGE + 4 * COLUMN_BYTES;

    const Int8Args& args;
    unsigned base;
    int rank, rows, k_steps, row_tiles, column_tiles;  // tiles of a whole cluster

    // The first row and column of this block's part of a tile of the cluster.
    INLINE void place(int tile, int& row, int& column) const {
        constexpr int GROUP = INT8_GROUP / CM;
        const int before = tile / (GROUP * column_tiles) * GROUP;
        const int size = min(GROUP, row_tiles - before), among = tile % (GROUP * column_tiles);
        row = ((before + among % size) * CM + rank % CM) * INT8_ROWS;
        column = (among / size * CN + rank / CM) * OUT;
    }
    INLINE void count_tiles() {
        rows = args.count ? min(*args.count, args.rows) : args.rows;
        row_tiles = (rows + INT8_ROWS * CM - 1) / (INT8_ROWS * CM);
    }
    INLINE unsigned filled(int stage) const { return base + BARRIERS + 8 * stage; }
    INLINE unsigned emptied(int stage) const { return base + BARRIERS + 8 * (STAGES + stage); }

    // Loads

    INLINE void load_weights(int stage, int k, int column) const {
        const unsigned to = base + stage * STAGE + X_BYTES;
        constexpr int SIZE = BN / PARTS;
#pragma unroll
        for (int i = 0; i < PARTS / CM; i++) {
            const int part = rank % CM * (PARTS / CM) + i, at = part * SIZE;
            const bool second = GATED && at >= OUT;
            copy_box<CM == 1>(to + part * SIZE * INT8_INPUTS, args.weight[second], k * INT8_INPUTS,
                              column + at - (second ? OUT : 0), filled(stage),
                              ((1u << CM) - 1) << rank / CM * CM);
        }
    }
    INLINE void load_rows(int stage, int k, int row) const {
        constexpr int SIZE = INT8_ROWS / CN;
        unsigned blocks = 0;
#pragma unroll
        for (int i = 0; i < CN; i++) blocks |= 1u << (i * CM);
        const int part = rank / CM * SIZE;
        copy_box<CN == 1>(base + stage * STAGE + part * INT8_INPUTS, args.x, k * INT8_INPUTS,
                          row + part, filled(stage), blocks << rank % CM);
    }

    // One thread. The first weights are fetched before the launch in front has ended, if it is known
    // that there are rows to multiply them by.
    INLINE void load() {
        int early = 0, row, column;
        if (!args.count) {
            count_tiles();
            early = min(STAGES, k_steps);
            place(blockIdx.x / BLOCKS, row, column);
            for (int k = 0; k < early; k++) {
                barrier_expect(filled(k), STAGE);
                load_weights(k, k, column);
            }
        }
        wait_for_inputs();
        count_tiles();
        int stage = 0;
        unsigned parity = 1;
        for (int tile = blockIdx.x / BLOCKS; tile < row_tiles * column_tiles;
             tile += gridDim.x / BLOCKS) {
            place(tile, row, column);
            for (int k = 0; k < k_steps; k++) {
                if (early > 0) {
                    early--;
                } else {
                    barrier_wait(emptied(stage), parity);
                    barrier_expect(filled(stage), STAGE);
                    load_weights(stage, k, column);
                }
                load_rows(stage, k, row);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        }
    }

    // Results

    static INLINE float4 columns_at(unsigned place) {
        float4 v;
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(place) : "memory");
        return v;
    }
    // Scales and biases of two columns: of this thread's place in the tile.
    INLINE float4 two_columns(int column) const {
        const int at = threadIdx.x % 128 * 2;
        const bool second = GATED && at >= OUT;
        float v[4] = {};
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int n = column + at + e - (second ? OUT : 0);
            if (at >= BN || n >= args.columns) continue;
            v[e] = args.column_scale[second][n];
            if (args.bias[second]) v[2 + e] = to_float(args.bias[second][n]);
        }
        return make_float4(v[0], v[1], v[2], v[3]);
    }
    INLINE void store(const int (&c)[BN / 2], const float (&row_scale)[2], int row, int column,
                      unsigned columns) const {
        const int lane = threadIdx.x % 32, quad = lane % 4;
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
                const float4 scales = columns_at(columns + (group * 4 + quad) * 16);
                float4 gates = scales;
                if constexpr (GATED) gates = columns_at(columns + ((group + OUT / 8) * 4 + quad) * 16);
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
        float* to = (float*)args.y + (long long)row * args.columns + column;
        if (row >= rows) return;
        if (column + 1 < args.columns && args.columns % 2 == 0)
            asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};"
                         ::"l"(to), "f"(y[0]), "f"(y[1]) : "memory");
        else
            for (int e = 0; e < 2; e++)
                if (column + e < args.columns) to[e] += y[e];
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
        T* to = (T*)args.y + (long long)row * args.columns + column;
        if (row >= rows || column >= args.columns) return;
        if constexpr (INTEGERS) {
            signed char* integers = (signed char*)args.y + (long long)row * args.columns + column;
            *(uint2*)integers = make_uint2(words[0] | words[1] << 16, words[2] | words[3] << 16);
        } else if (args.columns % 8 == 0) {
            *(uint4*)to = make_uint4(words[0], words[1], words[2], words[3]);
        } else {
#pragma unroll
            for (int e = 0; e < 8; e++)
                if (column + e < args.columns) to[e].bits = words[e / 2] >> e % 2 * 16;
        }
    }

    // A warp group

    INLINE void multiply_tiles(int group) {
        wait_for_inputs();
        count_tiles();
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        unsigned columns = base + STAGES * STAGE + 2 * group * COLUMN_BYTES;
        int stage = 0;
        unsigned parity = 0;
        const auto release = [&](int s) {  // to all whose copies reach this block
            if constexpr (BLOCKS == 1) {
                if (lane == 0) barrier_arrive(emptied(s));
            } else {
                if (lane < BLOCKS && (lane % CM == rank % CM || lane / CM == rank / CM))
                    barrier_arrive(emptied(s), lane);
            }
        };
        bool first = true;
        for (int tile = blockIdx.x / BLOCKS; tile < row_tiles * column_tiles;
             tile += gridDim.x / BLOCKS) {
            int row, column;
            place(tile, row, column);
            row += group * 64 + warp * 16 + lane / 4;
            const float4 two = two_columns(column);
            float row_scale[2];
#pragma unroll
            for (int h = 0; h < 2; h++)
                row_scale[h] = args.row_scale[min(row + 8 * h, rows - 1) * args.row_step];
            if (first && group == 1 && k_steps > INT8_LAG) asm volatile("bar.sync 3, 256;" ::: "memory");
            int c[BN / 2];
            int last = stage;
            for (int k = 0; k < k_steps; k++) {
                barrier_wait(filled(stage), parity);
                const unsigned at = base + stage * STAGE;
                const auto x = matrix_at(at + group * 64 * INT8_INPUTS), w = matrix_at(at + X_BYTES);
                multiply_begin();
#pragma unroll
                for (int i = 0; i < INT8_INPUTS / 32; i++)  // 32 bytes further on
                    multiply(c, x + 2 * i, w + 2 * i, k + i > 0);
                multiply_queued();
                if (k > 0) {
                    multiply_done<1>();
                    release(last);
                }
                if (first && group == 0 && k == INT8_LAG) asm volatile("bar.arrive 3, 256;" ::: "memory");
                last = stage;
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
            multiply_done(c);
            release(last);
            first = false;
            const unsigned at = columns + threadIdx.x % 128 * 16;
            if (threadIdx.x % 128 < BN / 2)
                asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};"
                             ::"r"(at), "f"(two.x), "f"(two.y), "f"(two.z), "f"(two.w) : "memory");
            asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
            store(c, row_scale, row, column, columns);
            columns = base + STAGES * STAGE + 2 * group * COLUMN_BYTES +
                      (columns == base + STAGES * STAGE + 2 * group * COLUMN_BYTES) * COLUMN_BYTES;
        }
    }
};

template <int BN, int CM, int CN, int ACT, bool GATED, bool ONTO, bool INTEGERS = false>
INLINE void int8_product(const Int8Args& args) {
    typedef Int8Product<BN, CM, CN, ACT, GATED, ONTO, INTEGERS> Product;
    extern __shared__ char int8_shared[];
    launch_dependents();
    Product product = {args, (shared_address(int8_shared) + 1023) & ~1023u,
                       (int)rank_in_cluster<CM * CN>()};
    product.k_steps = (args.inputs + INT8_INPUTS - 1) / INT8_INPUTS;
    product.column_tiles = (args.columns + Product::OUT * CN - 1) / (Product::OUT * CN);
    if (threadIdx.x == 0) {
        for (int s = 0; s < Product::STAGES; s++) {
            barrier_make(product.filled(s), 1);
            barrier_make(product.emptied(s), 8 * (CM + CN - 1));  // a warp of each block that reads it
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    cluster_sync<CM * CN>();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) product.load();
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        product.multiply_tiles(threadIdx.x / 128 - 1);
    }
    if constexpr (CM * CN > 1) cluster_sync<CM * CN>();  // nobody leaves whom others still copy to
}
