// Heads of queries and keys turned by their position, behind a norm of each (see linear.cu for the
// definitions in front).

enum Turn { AS_IS, TURNED, NORMED };  // NORMED: the norm, and then turned

struct TurnArgs {
    const float2* angles;        // [known, D / 2], cosine and sine by position
    const T *query_norm, *key_norm;  // [D], of NORMED
    float eps;
    int known;
};

INLINE Pack<T, 8> load8(const T* x) { return *(const Pack<T, 8>*)x; }

INLINE void unpack(const Pack<T, 8>& from, float (&x)[8]) {
#pragma unroll
    for (int e = 0; e < 8; e++) x[e] = to_float(from.element[e]);
}

INLINE constexpr int lanes_of(int head_size) {  // eight elements each, as many as shuffles can sum
    int lanes = 1;
    while (8 * lanes < head_size) lanes *= 2;
    return lanes;
}

// Where the angles of query token `row % QUERIES` are, which may lie in front of its row.
template <int D>
INLINE const float2* angles_of(const TurnArgs& args, const long long* positions,
                               const long long* row_start, int row, int queries) {
    const long long start = row_start ? row_start[row / queries] : 0;
    const long long position = max(positions[row % queries] - start, 0ll);
    return args.angles + min(position, args.known - 1ll) * (D / 2);
}

// A lane's eight elements of a head, from `part` on, and those that they are turned with.
struct Halves {
    Pack<T, 8> own = {}, other = {};
};
template <int D> INLINE Halves load_halves(const T* head, int part) {
    Halves x;
    if (part >= D) return x;  // lanes beyond the head size are idle
    x.own = load8(head + part);
    x.other = load8(head + (part < D / 2 ? part + D / 2 : part - D / 2));
    return x;
}

// Norms a head that the lanes of a group hold, and turns it; gives the lane's eight elements.
template <int D, int TURN>
INLINE void turn(const Halves& head, const Halves& norm, float eps, const float2* angles, int part,
                 float (&y)[8]) {
    float own[8], other[8], weight[8];
    unpack(head.own, own);
    unpack(head.other, other);
    if constexpr (TURN == NORMED) {
        float square = 0.f;
#pragma unroll
        for (int e = 0; e < 8; e++) square += own[e] * own[e];
#pragma unroll
        for (int o = lanes_of(D) / 2; o; o /= 2) square += __shfl_xor_sync(~0u, square, o);
        const float factor = rsqrtf(square / D + eps);
        unpack(norm.own, weight);
#pragma unroll
        for (int e = 0; e < 8; e++) own[e] *= factor * weight[e];
        unpack(norm.other, weight);
#pragma unroll
        for (int e = 0; e < 8; e++) other[e] *= factor * weight[e];
    }
    const bool first = part < D / 2, holds = part < D;
#pragma unroll
    for (int e = 0; e < 8; e++) {
        const float2 angle = holds ? angles[part % (D / 2) + e] : make_float2(0.f, 0.f);
        y[e] = own[e] * angle.x + (first ? -other[e] : other[e]) * angle.y;
    }
}

struct TurnRowsArgs {
    T* x;                             // [ROWS, stride]: queries, and behind them keys
    const long long* query_positions; // [QUERIES]
    const long long* row_start;       // [B], or null
    int heads, keys, stride, queries; // keys: heads of them; QUERIES
    TurnArgs turn;
};

// The turn alone, in place, for many query tokens: BLOCKS blocks a row.
template <int D, int BLOCKS, int TURN> INLINE void turn_rows(const TurnRowsArgs& args) {
    constexpr int LANES = lanes_of(D);
    launch_dependents();
    const int row = blockIdx.x / BLOCKS, part = threadIdx.x % LANES * 8;
    const int head = (blockIdx.x % BLOCKS * blockDim.x + threadIdx.x) / LANES;
    const bool real = head < args.heads + args.keys && part < D, query = head < args.heads;
    T* x = args.x + (long long)row * args.stride + head * D;
    const float2* angles = angles_of<D>(args.turn, args.query_positions, args.row_start, row, QUERIES);
    Halves norm, mine;
    if (TURN == NORMED) norm = load_halves<D>(query ? args.turn.query_norm : args.turn.key_norm, part);
    wait_for_inputs();
    if (real) mine = load_halves<D>(x, part);
    __syncwarp();  // other lanes write what this one has read
    float y[8];
    turn<D, TURN>(mine, norm, args.turn.eps, angles, part, y);
    Pack<T, 8> turned;
#pragma unroll
    for (int e = 0; e < 8; e++) from_float(y[e], turned.element[e]);
    if (real) *(Pack<T, 8>*)(x + part) = turned;
}
