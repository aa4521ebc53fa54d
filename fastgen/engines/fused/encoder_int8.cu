// Around the products of 8-bit integers of an encoder's packed rows: rows that are rounded alone, and
// what is made of sums, where cuBLAS leaves these in 32 bits.
//
// Behind common.cu, encoder_rows.cu and encoder.cu.

constexpr int NOT_ACTIVATED = -1;  // in place of an activation

struct RoundArgs {
    const T* x;  // [T, K]
    Out out;
};

// out = x as 8-bit integers, one block a token.
template <int K, int VEC, int THREADS, int STORE> INLINE void round_rows(const RoundArgs& args) {
    launch_dependents();
    wait_for_inputs();
    Row<K, VEC, THREADS> row;
    row.clear();
    row.add(args.x + (long long)blockIdx.x * K);
    row.template leave<STORE>(args.out, blockIdx.x);
}

struct FinishArgs {
    const int* sums[2];            // [T, N]; the second of GATED
    const float* row_steps;        // [T], or with row_step 0 one for all
    const float* column_steps[2];  // [N]
    const T* bias[2];              // [N]; null: none
    void* y;                       // [T, N]: T, or as LEFT says
    float factor;                  // integers a unit, of INTEGERS
    int row_step;
    long long count;  // elements, a multiple of eight
};

// What a product leaves: rows of T, numbers that are added to a residual stream of float, or 8-bit
// integers of a step that is known beforehand.
enum Left { ROWS_OF_T, ONTO_STREAM, INTEGERS };

// y = activate(sums * row_steps * column_steps + bias), with GATED times the second sums so scaled.
template <int N, int ACT, bool GATED, int LEFT> INLINE void finish(const FinishArgs& args) {
    launch_dependents();
    wait_for_inputs();
    const long long i = 8 * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= args.count) return;
    const int column = i % N;
    const float row_step = args.row_steps[i / N * args.row_step];
    float y[8];
#pragma unroll
    for (int factor = 0; factor < 1 + GATED; factor++) {
        const Pack<int, 4>* sums = (const Pack<int, 4>*)(args.sums[factor] + i);
        const Pack<float, 4>* steps = (const Pack<float, 4>*)(args.column_steps[factor] + column);
        Pack<T, 8> bias = {};
        if (args.bias[factor]) bias = *(const Pack<T, 8>*)(args.bias[factor] + column);
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const float scale = row_step * steps[e / 4].element[e % 4];
            const float x = sums[e / 4].element[e % 4] * scale + to_float(bias.element[e]);
            if (factor) y[e] *= x;
            else if constexpr (ACT == NOT_ACTIVATED) y[e] = x;
            else y[e] = activate<ACT>(x);
        }
    }
    if constexpr (LEFT == INTEGERS) {
        uint2 q;
        round_eight(y, args.factor, q);
        *(uint2*)((signed char*)args.y + i) = q;
    } else if constexpr (LEFT == ONTO_STREAM) {
        Pack<float, 4>* to = (Pack<float, 4>*)((float*)args.y + i);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Pack<float, 4> total = to[half];
#pragma unroll
            for (int e = 0; e < 4; e++) total.element[e] += y[4 * half + e];
            to[half] = total;
        }
    } else {
        Pack<T, 8> rows;
#pragma unroll
        for (int e = 0; e < 8; e++) from_float(y[e], rows.element[e]);
        *(Pack<T, 8>*)((T*)args.y + i) = rows;
    }
}
