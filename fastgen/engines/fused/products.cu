// What a lane multiplies and adds up of a product of few rows, for each kind of weight (see common.cu
// and weights.cu for the definitions in front, and linear.cu for what uses it).

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
// Two are the scales of a group of weights in the two outputs that tensor cores leave a lane, and by how
// much their zero points are below the middle.
struct Two { float first, second, shift_first = 0.f, shift_second = 0.f; };
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
        float sum[4];             // of the inputs, for ZEROS
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
        for (int i = 0; i < 4; i++) x.less[i] = x.sum[i] = 0.f;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            x.eight[i] = {in_order<W>(x.eight[i].low), in_order<W>(x.eight[i].high)};
            if (Format<W>::SHIFTED) multiply(x.less, x.eight[i], excess<W>(), fp16());
            if (Format<W>::ZEROS) multiply(x.sum, x.eight[i], units<W>(), fp16());
        }
    }
    INLINE void add(const Input& x, int step, const Fragment<W>& w, Two scales, int lane) {
        float own[4] = {x.less[0], x.less[1], x.less[2], x.less[3]};
#pragma unroll
        for (int i = 0; i < 2; i++) multiply(own, x.eight[i], eight(w, i), fp16());
        if (Format<W>::ZEROS)
#pragma unroll
            for (int i = 0; i < 4; i++)
                own[i] += x.sum[i] * (i % 2 ? scales.shift_second : scales.shift_first);
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
template <int B, int G, class S, bool SIGNED, bool Z, int STEPS>
struct Product<Ints<B, G, S, SIGNED, Z>, STEPS> : NarrowProduct<Ints<B, G, S, SIGNED, Z>, STEPS> {};
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
