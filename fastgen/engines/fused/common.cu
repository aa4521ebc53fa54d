// What all kernels of a decoder step share: types, overlapping, norms and activations.
//
// The engine puts these definitions in front of this file:
//   T        type of activations: bf16, fp16 or float
//   ROWS     activation rows, batch * queries, 1 to 16
//   QUERIES  query tokens that share one row's KV buffer: a number, or what the arguments say
// behind it linear.cu and attention.cu, and last one extern "C" kernel for each instantiation.
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

INLINE unsigned two_of_float(float low, float high) {  // as fp16
    unsigned y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

template <class A, class B> struct Same { static constexpr bool value = false; };
template <class A> struct Same<A, A> { static constexpr bool value = true; };
template <bool FIRST, class A, class B> struct Either { typedef A type; };
template <class A, class B> struct Either<false, A, B> { typedef B type; };

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
// Activations

enum Activation { RELU, GELU_TANH, GELU_ERF, SILU };

template <int ACTIVATION> INLINE float activate(float x) {
    if constexpr (ACTIVATION == RELU) return fmaxf(x, 0.f);
    if constexpr (ACTIVATION == GELU_ERF) return 0.5f * x * (1.f + erff(x * 0.70710678f));
    if constexpr (ACTIVATION == SILU) return x / (1.f + expf(-x));
    return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
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

// ---------------------------------------------------------------------------------------------
// Norms

enum Norm { NONE, RMS, LAYER };

struct NormArgs {
    const T *weight, *bias;  // [K]; bias of LAYER
    float* stream;           // [ROWS, K] that takes the normed rows too, as a residual stream; or null
    float eps;
};

INLINE float4 operator-(float4 x, float m) { return make_float4(x.x - m, x.y - m, x.z - m, x.w - m); }
INLINE float dot(float4 x) { return x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w; }

INLINE float sum(float4 x) { return x.x + x.y + x.z + x.w; }
INLINE float over_warp(float x) {
#pragma unroll
    for (int o = 16; o; o /= 2) x += __shfl_xor_sync(~0u, x, o);
    return x;
}

// Root-mean-square norm, or that of the deviations from the mean, of COUNT rows of the residual
// stream, float [COUNT, K]; normed has rows of STRIDE. Waits for the residual stream itself.
// A warp's own mean first, and then all warps' parts as one: exact, with one barrier (Chan et al.,
// "Updating formulae and a pairwise algorithm for computing sample variances", 1979).
template <int NORM, int K, int WARPS, int COUNT, int STRIDE, class X>
INLINE void normalize(const float* residual, const NormArgs& args, bool first, X* normed) {
    constexpr int STEP = 128 * WARPS, STEPS = (K + STEP - 1) / STEP;  // four columns a thread
    __shared__ float sums[WARPS][COUNT], squares[WARPS][COUNT];       // squares: of deviations
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto columns = [](int w) {  // of a warp
        int n = 0;
        for (int s = 0; s < STEPS; s++) n += min(max(K - w * 128 - s * STEP, 0), 128);
        return n;
    };
    const auto inside = [](int s) {  // no branches where the columns are shared out evenly
        return K % STEP == 0 || (int)threadIdx.x * 4 + s * STEP < K;
    };
    float4 x[COUNT][STEPS];
    Pack<T, 4> scale[STEPS] = {}, bias[STEPS] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        const int k = threadIdx.x * 4 + s * STEP;
        if (inside(s)) scale[s] = *(const Pack<T, 4>*)(args.weight + k);
        if (NORM == LAYER && inside(s)) bias[s] = *(const Pack<T, 4>*)(args.bias + k);
    }
    wait_for_inputs();
#pragma unroll
    for (int r = 0; r < COUNT; r++)
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            const int k = threadIdx.x * 4 + s * STEP;
            x[r][s] = make_float4(0.f, 0.f, 0.f, 0.f);
            if (inside(s)) x[r][s] = *(const float4*)(residual + r * K + k);
        }
#pragma unroll
    for (int r = 0; r < COUNT; r++) {
        float total = 0.f, square = 0.f;
        if constexpr (NORM == LAYER) {
#pragma unroll
            for (int s = 0; s < STEPS; s++) total += sum(x[r][s]);
            total = over_warp(total);
        }
        const float mean = NORM == LAYER ? total / max(columns(warp), 1) : 0.f;
#pragma unroll
        for (int s = 0; s < STEPS; s++)
            if (NORM == RMS || inside(s)) square += dot(x[r][s] - mean);  // RMS: zeros elsewhere
        square = over_warp(square);
        if (lane == 0) sums[warp][r] = total, squares[warp][r] = square;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < COUNT; r++) {
        float mean = 0.f, square = 0.f;
        if constexpr (NORM == LAYER) {
#pragma unroll
            for (int w = 0; w < WARPS; w++) mean += sums[w][r];
            mean /= K;
        }
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            square += squares[w][r];
            if (NORM == LAYER && columns(w)) {
                const float off = sums[w][r] / columns(w) - mean;
                square += columns(w) * off * off;
            }
        }
        const float factor = rsqrtf(square / K + args.eps);
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            const int k = threadIdx.x * 4 + s * STEP;
            const float4 centred = x[r][s] - mean;
            const float from[4] = {centred.x, centred.y, centred.z, centred.w};
            float wide[4];
            Pack<X, 4> y;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                wide[e] = from[e] * factor * to_float(scale[s].element[e]);
                if (NORM == LAYER) wide[e] += to_float(bias[s].element[e]);
                from_float(wide[e], y.element[e]);
            }
            if (inside(s)) *(Pack<X, 4>*)(normed + r * STRIDE + k) = y;
            if (NORM == LAYER && inside(s) && first && args.stream)
                *(float4*)(args.stream + r * K + k) = make_float4(wide[0], wide[1], wide[2], wide[3]);
        }
    }
    __syncthreads();
}
