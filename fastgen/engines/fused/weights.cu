// Weights of linear layers as they lie in memory, and a lane's share of them, in registers (see
// common.cu for the definitions in front).

// Integers of BITS bits, the zero point in their middle, two of 4 bits in a byte with the even
// column low; a scale S for each GROUP columns of a row, or with 0 a float for each row. Rows are
// padded to whole groups. SIGNED: of 8 bits, around 0. ZEROS: groups have zero points of their own, in
// the same form, [rows, groups], two of 4 bits in a byte.
template <int BITS, int GROUP, class S, bool SIGNED = false, bool ZEROS = false> struct Ints {};
// float8_e4m3fn, with a float scale for each row.
struct Fp8 {};

// How a weight lies: BITS a column, COLUMNS of a lane in one step of its warp; GROUP columns have a
// scale of their own, 0: none. ROW_SCALED: each row has one. SHIFTED: eight() gives too much. Scale,
// Bias: their dtypes; Input: that of x where a kernel norms it.
template <class W> struct Format {
    typedef W Scale;
    typedef W Bias;
    typedef T Input;
    static constexpr int BITS = 8 * sizeof(W), COLUMNS = 8, GROUP = 0;
    static constexpr bool ROW_SCALED = false, ZEROS = false;
};
template <int B, int G, class S, bool SIGNED, bool Z> struct Format<Ints<B, G, S, SIGNED, Z>> {
    typedef S Scale;
    typedef T Bias;
    typedef fp16 Input;
    static constexpr int BITS = B, COLUMNS = 16, GROUP = G;  // a warp's 64 columns are of one group
    static constexpr bool ROW_SCALED = G == 0, ZEROS = Z, SHIFTED = true;
    static constexpr unsigned FLIPPED = SIGNED ? 0x80808080 : 0;  // what makes 128 of 0
    static_assert(G % 64 == 0, "a warp's step must lie within a group");
};
template <> struct Format<Fp8> {
    typedef float Scale;
    typedef T Bias;
    typedef fp16 Input;
    static constexpr int BITS = 8, COLUMNS = 16, GROUP = 0;
    static constexpr bool ROW_SCALED = true, ZEROS = false, SHIFTED = false;
};
template <class W, int K> INLINE constexpr int padded() {  // columns of a row in memory
    constexpr int GROUP = Format<W>::GROUP ? Format<W>::GROUP : 1;
    return (K + GROUP - 1) / GROUP * GROUP;
}

// What a group's integers take: its scale, and with ZEROS by how much its zero point is below the middle.
template <class S> struct Affine { S scale, shift; };
template <class W> struct OfGroup {
    typedef typename Format<W>::Scale S;
    typedef typename Either<Format<W>::ZEROS, Affine<S>, S>::type Type;
};
template <class W, int GROUPS>
INLINE typename OfGroup<W>::Type of_group(const void* scales, const void* zeros, long long row, int group) {
    typedef typename Format<W>::Scale S;
    const S scale = ((const S*)scales)[row * GROUPS + group];
    if constexpr (Format<W>::ZEROS) {
        constexpr int BITS = Format<W>::BITS, EACH = 8 / BITS;  // in a byte
        const unsigned char* own = (const unsigned char*)zeros + row * ((GROUPS + EACH - 1) / EACH);
        const int bits = own[group / EACH] ^ (Format<W>::FLIPPED & 0xff);
        const int zero = bits >> group % EACH * BITS & ((1 << BITS) - 1);
        Affine<S> both = {scale};
        from_float((float)((1 << (BITS - 1)) - zero), both.shift);
        return both;
    } else return scale;
}
template <class S> INLINE float scale_of(S x) { return to_float(x); }
template <class S> INLINE float scale_of(Affine<S> x) { return to_float(x.scale); }
template <class S> INLINE float shift_of(S) { return 0.f; }
template <class S> INLINE float shift_of(Affine<S> x) { return to_float(x.shift); }

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
// Weights of fewer bits as numbers of fp16, which all of their values are, two in a register, by the
// fewest instructions. Bits of an integer become the last ones of a mantissa: u is 1024 + u then, and
// four bits one nibble higher 1024 + 16 u. Products take what is too much from their sums.

INLINE unsigned fma_two(unsigned x, unsigned y, unsigned z) {  // x * y + z, of fp16
    unsigned d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(y), "r"(z));
    return d;
}
constexpr unsigned ONE = 0x3c003c00, SIXTEENTH = 0x2c002c00, NOTHING = 0x80008000;  // + -0 is exact

INLINE unsigned two_of_fp8(unsigned word, int i) {  // bytes i and i + 1; i: 0 or 2
#if __CUDA_ARCH__ >= 890
    unsigned d;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"((unsigned short)(word >> 8 * i)));
    return d;
#else  // its bits where fp16 has them, and the larger exponent made up for; subnormal ones too
    const unsigned both = __byte_perm(word, 0, i ? 0x3424 : 0x1404);
    return fma_two((both >> 1 & 0x3f803f80) | (both & 0x80008000), 0x5c005c00, NOTHING);
#endif
}

// Columns 8 * part and the next seven of a lane's share, in the order of in_order().
template <int G, class S, bool SIGNED, bool Z>
INLINE uint4 eight(const Fragment<Ints<8, G, S, SIGNED, Z>>& w, int part) {
    constexpr unsigned FLIPPED = Format<Ints<8, G, S, SIGNED, Z>>::FLIPPED, rest = 0x64646464;
    const unsigned a = w.word[2 * part] ^ FLIPPED, b = w.word[2 * part + 1] ^ FLIPPED;
    return make_uint4(__byte_perm(a, rest, 0x4140), __byte_perm(a, rest, 0x4342),
                      __byte_perm(b, rest, 0x4140), __byte_perm(b, rest, 0x4342));
}
template <int G, class S, bool Z>
INLINE uint4 eight(const Fragment<Ints<4, G, S, false, Z>>& w, int part) {
    const unsigned a = w.word[part], b = a >> 8;
    return make_uint4((a & 0x000f000f) | 0x64006400, (a & 0x00f000f0) | 0x64006400,
                      (b & 0x000f000f) | 0x64006400, (b & 0x00f000f0) | 0x64006400);
}
INLINE uint4 eight(const Fragment<Fp8>& w, int part) {
    const unsigned a = w.word[2 * part], b = w.word[2 * part + 1];
    return make_uint4(two_of_fp8(a, 0), two_of_fp8(a, 2), two_of_fp8(b, 0), two_of_fp8(b, 2));
}

// What eight() gives too much, negated, for inputs as in_order() gives them: 1024 and the zero point.
template <class W> INLINE uint4 excess() {
    const unsigned even = Format<W>::BITS == 4 ? 0xe408e408 : 0xe480e480;  // 1032 or 1152
    return make_uint4(even, 0xe480e480, even, 0xe480e480);
}
// What counts inputs as in_order() gives them, once each
template <class W> INLINE uint4 units() {
    const unsigned odd = Format<W>::BITS == 4 ? 0x4c004c00 : ONE;  // 16
    return make_uint4(ONE, odd, ONE, odd);
}
// The numbers themselves
template <class W> INLINE uint4 centred(uint4 x) {
    if (!Format<W>::SHIFTED) return x;
    const bool four = Format<W>::BITS == 4;
    const unsigned even = four ? 0xe408e408 : 0xe480e480, odd = four ? 0xd480d480 : 0xe480e480;  // 72
    const unsigned unit = four ? SIXTEENTH : ONE;
    return make_uint4(fma_two(x.x, ONE, even), fma_two(x.y, unit, odd), fma_two(x.z, ONE, even),
                      fma_two(x.w, unit, odd));
}

// Eight columns of x, in fp16, in the order in which eight() gives those of W, the sixteenth of those
// whose weights are 16 times too large; in_place(): the order only, the other way.
template <class W> INLINE uint4 in_order(uint4 x) {
    if (Format<W>::BITS != 4) return x;
    return make_uint4(__byte_perm(x.x, x.z, 0x5410),
                      fma_two(__byte_perm(x.x, x.z, 0x7632), SIXTEENTH, NOTHING),
                      __byte_perm(x.y, x.w, 0x5410),
                      fma_two(__byte_perm(x.y, x.w, 0x7632), SIXTEENTH, NOTHING));
}
template <class W> INLINE uint4 in_place(uint4 x) {
    if (Format<W>::BITS != 4) return x;
    return make_uint4(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410),
                      __byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632));
}
