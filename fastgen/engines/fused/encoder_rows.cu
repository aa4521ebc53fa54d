// Rows that a block holds: what the kernels of an encoder have in common.
//
// Behind common.cu, of which it takes the types and Pack. A row is one token, K elements of T: a block
// holds one in registers, VEC neighbouring elements a load (8, or 1 where some width or address forbids
// it), and loops over the columns.

struct Sum { static INLINE float of(float a, float b) { return a + b; } };
struct Most { static INLINE float of(float a, float b) { return fmaxf(a, b); } };

// One number of each thread over the block: their Sum, or their Most, none below zero.
template <class OF, int THREADS> INLINE float over_block(float x) {
    __shared__ float parts[THREADS / 32];
#pragma unroll
    for (int o = 16; o; o /= 2) x = OF::of(x, __shfl_xor_sync(~0u, x, o));
    if constexpr (THREADS == 32) return x;
    __syncthreads();  // an earlier one was read
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.f;
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) x = OF::of(x, parts[w]);
    return x;
}
template <int THREADS> INLINE float block_sum(float x) { return over_block<Sum, THREADS>(x); }
template <int THREADS> INLINE float block_most(float x) { return over_block<Most, THREADS>(x); }

template <int THREADS> INLINE int block_count(int x) {
    return (int)block_sum<THREADS>((float)x);  // exact up to 2^24
}

// Eight integers to the nearest of eight numbers, those beyond -127 to 127 to its nearer end.
INLINE void round_eight(const float (&x)[8], float factor, uint2& to) {
    int q[8];
#pragma unroll
    for (int e = 0; e < 8; e++) q[e] = __float2int_rn(fminf(fmaxf(x[e] * factor, -127.f), 127.f));
    const auto packed = [](const int* q) {
        unsigned high, y;
        asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(high) : "r"(q[3]), "r"(q[2]), "r"(0));
        asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(q[1]), "r"(q[0]), "r"(high));
        return y;
    };
    to = make_uint2(packed(q), packed(q + 4));
}

// Where a kernel leaves its rows [T, K]: as they are (PLAIN), as 8-bit integers (ROUNDED) and what
// rounding to these takes away, in steps a 254th as wide (REST).
enum Store { PLAIN = 1, ROUNDED = 2, BOTH = 3, REST = 4, SPLIT = 6 };
struct Out {
    T* y;
    signed char *values, *rest;
    float *steps, *rest_steps;  // [T]
    float factor;  // integers a unit, of all rows; 0: each row's largest number is 127 of its steps
};

// One row of K columns in the block's registers: thread t has the packs t, t + THREADS, ...
template <int K, int VEC, int THREADS> struct Row {
    static constexpr int PACKS = (K + VEC * THREADS - 1) / (VEC * THREADS);
    float x[PACKS][VEC];

    static INLINE int column(int pack) { return ((int)threadIdx.x + pack * THREADS) * VEC; }

    INLINE void clear() {
#pragma unroll
        for (int p = 0; p < PACKS; p++)
#pragma unroll
            for (int e = 0; e < VEC; e++) x[p][e] = 0.f;
    }
    template <class E> INLINE void add(const E* from, float scale = 1.f) {
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            if (column(p) >= K) continue;
            const Pack<E, VEC> values = *(const Pack<E, VEC>*)(from + column(p));
#pragma unroll
            for (int e = 0; e < VEC; e++) x[p][e] += scale * to_float(values.element[e]);
        }
    }
    template <class E> INLINE void store(E* to) const {
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            if (column(p) >= K) continue;
            Pack<E, VEC> values;
#pragma unroll
            for (int e = 0; e < VEC; e++) from_float(x[p][e], values.element[e]);
            *(Pack<E, VEC>*)(to + column(p)) = values;
        }
    }
    template <int STORE> INLINE void store_rounded(const Out& out, long long number) const {
        static_assert(VEC == 8, "rows of 8-bit integers are stored eight at a time");
        float factor = out.factor;
        if (factor == 0.f) {
            float most = 0.f;
#pragma unroll
            for (int p = 0; p < PACKS; p++)
#pragma unroll
                for (int e = 0; e < VEC; e++) most = fmaxf(most, fabsf(x[p][e]));
            most = block_most<THREADS>(most);
            factor = most > 0.f ? 127.f / most : 0.f;
            if (threadIdx.x == 0) {
                out.steps[number] = most / 127.f;
                if constexpr (STORE & REST) out.rest_steps[number] = most / (127.f * 254.f);
            }
        }
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            if (column(p) >= K) continue;
            uint2 q;
            round_eight(x[p], factor, q);
            *(uint2*)(out.values + number * K + column(p)) = q;
            if constexpr (STORE & REST) {
                float rest[VEC];
#pragma unroll
                for (int e = 0; e < VEC; e++)
                    rest[e] = x[p][e] * factor - ((const signed char*)&q)[e];
                round_eight(rest, 254.f, q);
                *(uint2*)(out.rest + number * K + column(p)) = q;
            }
        }
    }
    template <int STORE> INLINE void leave(const Out& out, long long number) const {
        if constexpr (STORE & PLAIN) store(out.y + number * K);
        if constexpr (STORE & ROUNDED) store_rounded<STORE>(out, number);
    }
    // Root-mean-square norm in float.
    INLINE void normalize(const T* weight, float eps) {
        float squares = 0.f;
#pragma unroll
        for (int p = 0; p < PACKS; p++)
#pragma unroll
            for (int e = 0; e < VEC; e++) squares += x[p][e] * x[p][e];
        const float factor = rsqrtf(block_sum<THREADS>(squares) / K + eps);
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            if (column(p) >= K) continue;
            const Pack<T, VEC> w = *(const Pack<T, VEC>*)(weight + column(p));
#pragma unroll
            for (int e = 0; e < VEC; e++) x[p][e] = x[p][e] * factor * to_float(w.element[e]);
        }
    }
    // Layer norm in float, of the deviations from the mean.
    INLINE void normalize(const T* weight, const T* bias, float eps) {
        float sum = 0.f;
#pragma unroll
        for (int p = 0; p < PACKS; p++)
#pragma unroll
            for (int e = 0; e < VEC; e++) sum += x[p][e];
        const float mean = block_sum<THREADS>(sum) / K;
        float squares = 0.f;
#pragma unroll
        for (int p = 0; p < PACKS; p++)
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                x[p][e] = column(p) < K ? x[p][e] - mean : 0.f;
                squares += x[p][e] * x[p][e];
            }
        const float factor = rsqrtf(block_sum<THREADS>(squares) / K + eps);
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            if (column(p) >= K) continue;
            const Pack<T, VEC> w = *(const Pack<T, VEC>*)(weight + column(p));
            const Pack<T, VEC> b = *(const Pack<T, VEC>*)(bias + column(p));
#pragma unroll
            for (int e = 0; e < VEC; e++)
                x[p][e] = x[p][e] * factor * to_float(w.element[e]) + to_float(b.element[e]);
        }
    }
};
