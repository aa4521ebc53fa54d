// Weights of fewer bits as numbers, in front of cuBLAS's products of many rows (see common.cu and
// weights.cu for the definitions in front).

constexpr int MATRICES = 8;

struct DequantiseMatricesArgs {
    const void *values[MATRICES], *scales[MATRICES];  // each as in weights.cu
    T* y[MATRICES];                                   // [outputs, inputs]
    int inputs[MATRICES];                             // a multiple of eight
    unsigned ends[MATRICES];  // eights of numbers of this one and of those before it
    int count;
};

// A thread takes EACH times eight columns of a row, so that neighbours write what lies side by side.
template <class W, int THREADS, int EACH>
INLINE void dequantise_matrices(const DequantiseMatricesArgs& args) {
    typedef typename Format<W>::Scale Scale;
    constexpr int GROUP = Format<W>::GROUP, BYTES = Format<W>::BITS;  // of eight columns
    Fragment<W> w[EACH] = {};
    float scale[EACH];
    T* y[EACH];
    launch_dependents();
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const unsigned i = (blockIdx.x * EACH + e) * THREADS + threadIdx.x;
        int m = 0;
        while (m < args.count && i >= args.ends[m]) m++;
        y[e] = nullptr;
        if (m == args.count) continue;
        const unsigned at = m ? i - args.ends[m - 1] : i, eights = args.inputs[m] / 8;
        const unsigned row = at / eights, k = at % eights * 8;
        const unsigned groups = GROUP ? (args.inputs[m] + GROUP - 1) / GROUP : 1;
        const unsigned stored = GROUP ? groups * GROUP : args.inputs[m];
        const char* from = (const char*)args.values[m];
        load_bytes<BYTES>(from + ((long long)row * stored + k) / 8 * BYTES, w[e].word);
        const Scale* scales = (const Scale*)args.scales[m] + (long long)row * groups;
        scale[e] = to_float(scales[GROUP ? k / (GROUP ? GROUP : 1) : 0]);
        y[e] = args.y[m] + 8ll * at;
    }
    wait_for_inputs();  // whoever reads what is overwritten
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        if (!y[e]) continue;
        const uint4 exact = in_place<W>(centred<W>(eight(w[e], 0)));
        const Pack<fp16, 8> x = *(const Pack<fp16, 8>*)&exact;
        Pack<T, 8> numbers;
#pragma unroll
        for (int n = 0; n < 8; n++) from_float(to_float(x.element[n]) * scale[e], numbers.element[n]);
        *(Pack<T, 8>*)y[e] = numbers;
    }
}
