// Weights of linear layers as they lie in memory, and a lane's share of them, in registers (see
// common.cu for the definitions in front).

// Integers of BITS bits, the zero point in their middle, two of 4 bits in a byte with the even
// column low; a scale S for each GROUP columns of a row. Rows are padded to whole groups.
template <int BITS, int GROUP, class S> struct Ints {};
// float8_e4m3fn, with a float scale for each row.
struct Fp8 {};

// How a weight lies: BITS a column, COLUMNS of a lane in one step of its warp; GROUP columns have a
// scale of their own, 0: none. ROW_SCALED: each row has one. Scale, Bias: their dtypes.
template <class W> struct Format {
    typedef W Scale;
    typedef W Bias;
    static constexpr int BITS = 8 * sizeof(W), COLUMNS = 8, GROUP = 0;
    static constexpr bool ROW_SCALED = false;
};
template <int B, int G, class S> struct Format<Ints<B, G, S>> {
    typedef S Scale;
    typedef T Bias;
    static constexpr int BITS = B, COLUMNS = 16, GROUP = G;  // a warp's 64 columns are of one group
    static constexpr bool ROW_SCALED = false;
    static_assert(G % 64 == 0, "a warp's step must lie within a group");
};
template <> struct Format<Fp8> {
    typedef float Scale;
    typedef T Bias;
    static constexpr int BITS = 8, COLUMNS = 16, GROUP = 0;
    static constexpr bool ROW_SCALED = true;
};
template <class W, int K> INLINE constexpr int padded() {  // columns of a row in memory
    constexpr int GROUP = Format<W>::GROUP ? Format<W>::GROUP : 1;
    return (K + GROUP - 1) / GROUP * GROUP;
}

// A lane's share of a tile of eight outputs: row lane / 4, and COLUMNS columns of that row.
template <class W> struct Fragment {
    static constexpr int WORDS = Format<W>::COLUMNS * Format<W>::BITS / 32;
    unsigned word[WORDS];
};

// Volatile and without .nc, loads stay where they are written: in front of wait_for_inputs().
template <int BYTES> INLINE void load_bytes(const void* from, unsigned* to) {
    if constexpr (BYTES == 4)
        asm volatile("ld.global.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
    else if constexpr (BYTES == 8)
        asm volatile("ld.global.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
                     : "=r"(to[0]), "=r"(to[1]) : "l"(from));
    else
        asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
}
template <class W> INLINE Fragment<W> load_weights(const char* row, int k, int columns) {
    constexpr int WORDS = Fragment<W>::WORDS, EACH = WORDS < 4 ? WORDS : 4;
    Fragment<W> f = {};
    if (k < columns)
#pragma unroll
        for (int i = 0; i < WORDS; i += EACH)
            load_bytes<4 * EACH>(row + (long long)k * Format<W>::BITS / 8 + 4 * i, f.word + i);
    return f;
}

// The same tiles of a W[K, N] that lies the other way round. Of TILES tiles, an even number, a lane
// loads its eight columns' rows, TILES outputs next to each other of each: tile t has the outputs
// TILES * column + t. Tensor cores want two columns of an output in one register: turn() pairs them.
template <int K, int N, int TILES, class W>
INLINE void load_across(const W* weight, int first, int k0, int lane, Fragment<W> (&w)[TILES]) {
    const int n = first + lane / 4 * TILES;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        unsigned two[TILES / 2] = {};
        if (k0 + j < K && n < N) load_bytes<2 * TILES>(weight + (long long)(k0 + j) * N + n, two);
#pragma unroll
        for (int t = 0; t < TILES / 2; t++) w[2 * t + j % 2].word[j / 2] = two[t];
    }
}
template <int K, int N, int TILES>  // float: a lane's columns of output lane / 4, one by one
INLINE void load_across(const float* weight, int first, int k0, int lane, Fragment<float> (&w)[TILES]) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int n = first + 8 * t + lane / 4;
            w[t].word[e] = 0;
            if (k0 + e < K && n < N) load_bytes<4>(weight + (long long)(k0 + e) * N + n, w[t].word + e);
        }
}
template <int TILES> INLINE void turn(Fragment<float> (&)[TILES]) {}
template <int TILES, class W> INLINE void turn(Fragment<W> (&w)[TILES]) {
#pragma unroll
    for (int t = 0; t < TILES; t += 2)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned &x = w[t].word[i], &y = w[t + 1].word[i];
            const unsigned low = __byte_perm(x, y, 0x5410), high = __byte_perm(x, y, 0x7632);
            x = low, y = high;
        }
}

// ---------------------------------------------------------------------------------------------
// Two columns of a weight as two numbers of T in one register, without their scale, exactly. Bits
// are laid into the mantissa of a number whose last bit counts one: 0x4300 is 128 in bf16, 0x6400
// is 1024 in fp16.

INLINE unsigned fma_two(unsigned x, unsigned y, unsigned z, bf16) {  // x * y + z
    unsigned d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(y), "r"(z));
    return d;
}
INLINE unsigned fma_two(unsigned x, unsigned y, unsigned z, fp16) {
    unsigned d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(y), "r"(z));
    return d;
}

// Bytes i and i + 1 of a word (i: 0 or 2), each in a half of a register that has `rest` elsewhere.
INLINE unsigned bytes_low(unsigned word, int i, unsigned rest) {
    return __byte_perm(word, rest, i ? 0x4342 : 0x4140);
}
INLINE unsigned bytes_high(unsigned word, int i) { return __byte_perm(word, 0, i ? 0x3424 : 0x1404); }

// Integers of 8 bits around 128: the low seven bits in 128 + low, less 256, or less 128 with the high bit
INLINE unsigned two_of_8(unsigned word, int i, bf16) {
    const unsigned both = bytes_low(word, i, 0);
    const unsigned low = (both & 0x007f007f) | 0x43004300, less = (both & 0x00800080) ^ 0x43804380;
    return fma_two(less, 0xbf80bf80, low, bf16());
}
INLINE unsigned two_of_8(unsigned word, int i, fp16) {
    return fma_two(bytes_low(word, i, 0x64646464), 0x3c003c00, 0xe480e480, fp16());  // - 1152
}
// Integers of 4 bits around 8: columns i and i + 4 of a word's eight (i: 0 to 3)
INLINE unsigned two_of_4(unsigned word, int i, bf16) {
    return fma_two(((word >> 4 * i) & 0x000f000f) | 0x43004300, 0x3f803f80, 0xc308c308, bf16());
}
INLINE unsigned two_of_4(unsigned word, int i, fp16) {
    return fma_two(((word >> 4 * i) & 0x000f000f) | 0x64006400, 0x3c003c00, 0xe408e408, fp16());
}
// e4m3 with its bits where T has them, and T's larger exponent made up for; subnormal ones too
INLINE unsigned two_of_fp8(unsigned word, int i, bf16) {
    const unsigned both = bytes_high(word, i);
    return fma_two((both >> 4 & 0x07f007f0) | (both & 0x80008000), 0x7b807b80, 0x80008000, bf16());
}
INLINE unsigned two_of_fp8(unsigned word, int i, fp16) {
    const unsigned both = bytes_high(word, i);
    return fma_two((both >> 1 & 0x3f803f80) | (both & 0x80008000), 0x5c005c00, 0x80008000, fp16());
}

// Columns 8 * part and the next seven of a lane's share, in the order of in_order().
template <class E, int G, class S> INLINE uint4 eight(const Fragment<Ints<8, G, S>>& w, int part) {
    const unsigned a = w.word[2 * part], b = w.word[2 * part + 1];
    return make_uint4(two_of_8(a, 0, E()), two_of_8(a, 2, E()), two_of_8(b, 0, E()), two_of_8(b, 2, E()));
}
template <class E, int G, class S> INLINE uint4 eight(const Fragment<Ints<4, G, S>>& w, int part) {
    const unsigned a = w.word[part];
    return make_uint4(two_of_4(a, 0, E()), two_of_4(a, 1, E()), two_of_4(a, 2, E()), two_of_4(a, 3, E()));
}
template <class E> INLINE uint4 eight(const Fragment<Fp8>& w, int part) {
    const unsigned a = w.word[2 * part], b = w.word[2 * part + 1];
    return make_uint4(two_of_fp8(a, 0, E()), two_of_fp8(a, 2, E()), two_of_fp8(b, 0, E()),
                      two_of_fp8(b, 2, E()));
}

// Eight columns of x in the order in which eight() gives those of W; in_place(): the other way.
template <class W> INLINE uint4 in_order(uint4 x) {
    if (Format<W>::BITS != 4) return x;
    return make_uint4(__byte_perm(x.x, x.z, 0x5410), __byte_perm(x.x, x.z, 0x7632),
                      __byte_perm(x.y, x.w, 0x5410), __byte_perm(x.y, x.w, 0x7632));
}
template <class W> INLINE uint4 in_place(uint4 x) {
    if (Format<W>::BITS != 4) return x;
    return make_uint4(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410),
                      __byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632));
}
