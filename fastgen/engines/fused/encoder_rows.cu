// Rows that a block holds: what the kernels of an encoder have in common.
//
// Behind common.cu, of which it takes the types and Pack. A row is one token, K elements of T: a block
// holds one in registers, VEC neighbouring elements a load (8, or 1 where some width or address forbids
// it), and loops over the columns.

// Sum of one number of each thread over the block.
template <int THREADS> INLINE float block_sum(float x) {
    __shared__ float parts[THREADS / 32];
#pragma unroll
    for (int o = 16; o; o /= 2) x += __shfl_xor_sync(~0u, x, o);
    if constexpr (THREADS == 32) return x;
    __syncthreads();  // an earlier sum was read
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.f;
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) x += parts[w];
    return x;
}

// The largest of one number of each thread over the block, none below zero.
template <int THREADS> INLINE float block_most(float x) {
    __shared__ float parts[THREADS / 32];
#pragma unroll
    for (int o = 16; o; o /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, o));
    if constexpr (THREADS == 32) return x;
    __syncthreads();  // an earlier one was read
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.f;
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) x = fmaxf(x, parts[w]);
    return x;
}

template <int THREADS> INLINE int block_count(int x) {
    return (int)block_sum<THREADS>((float)x);  // exact up to 2^24
}

struct fp8 { unsigned char bits; };  // e4m3

INLINE unsigned short round_pair(float low, float high) {
    unsigned short y;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(high), "f"(low));
    return y;
}

// Where a kernel leaves its rows [T, K]: as they are (PLAIN), as 8-bit floats with a scale each
// (ROUNDED), or both.
enum Store { PLAIN = 1, ROUNDED = 2, BOTH = 3 };
struct Out {
    T* y;
    fp8* values;
    float* scales;  // [T]
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
    INLINE void add(const T* from, float scale = 1.f) {
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            if (column(p) >= K) continue;
            const Pack<T, VEC> values = *(const Pack<T, VEC>*)(from + column(p));
#pragma unroll
            for (int e = 0; e < VEC; e++) x[p][e] += scale * to_float(values.element[e]);
        }
    }
    INLINE void store(T* to) const {
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            if (column(p) >= K) continue;
            Pack<T, VEC> values;
#pragma unroll
            for (int e = 0; e < VEC; e++) from_float(x[p][e], values.element[e]);
            *(Pack<T, VEC>*)(to + column(p)) = values;
        }
    }
    INLINE void add_wide(const float* from) {
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            if (column(p) >= K) continue;
            const Pack<float, VEC> values = *(const Pack<float, VEC>*)(from + column(p));
#pragma unroll
            for (int e = 0; e < VEC; e++) x[p][e] += values.element[e];
        }
    }
    INLINE void store_wide(float* to) const {
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            if (column(p) >= K) continue;
            Pack<float, VEC> values;
#pragma unroll
            for (int e = 0; e < VEC; e++) values.element[e] = x[p][e];
            *(Pack<float, VEC>*)(to + column(p)) = values;
        }
    }
    // As 8-bit floats, of which the largest stands for the row's number farthest from zero.
    INLINE void store_rounded(fp8* to, float* scale) const {
        float most = 0.f;
#pragma unroll
        for (int p = 0; p < PACKS; p++)
#pragma unroll
            for (int e = 0; e < VEC; e++) most = fmaxf(most, fabsf(x[p][e]));
        most = block_most<THREADS>(most);
        const float factor = most > 0.f ? 448.f / most : 0.f;
        if (threadIdx.x == 0) *scale = most / 448.f;
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            if (column(p) >= K) continue;
            static_assert(VEC == 8, "rows of 8-bit floats are loaded eight at a time");
            Pack<unsigned short, VEC / 2> pairs;
#pragma unroll
            for (int e = 0; e < VEC; e += 2)
                pairs.element[e / 2] = round_pair(x[p][e] * factor, x[p][e + 1] * factor);
            *(Pack<unsigned short, VEC / 2>*)(to + column(p)) = pairs;
        }
    }
    template <int STORE> INLINE void leave(const Out& out, long long number) const {
        if constexpr (STORE & PLAIN) store(out.y + number * K);
        if constexpr (STORE & ROUNDED) store_rounded(out.values + number * K, out.scales + number);
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
