// What greedy.cu, top.cu and beams.cu share: kernels that follow a decoder step.
//
// kernels.py puts one definition in front of this file:
//   T        type of logits and masks: bf16, fp16 or float

struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };
typedef long long int64;
typedef unsigned long long uint64;

#define INLINE __device__ __forceinline__

INLINE float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
INLINE float to_float(fp16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
INLINE float to_float(float x) { return x; }
INLINE void mask_out(bool hidden, bf16& x) { x.bits = hidden ? 0xff80 : 0; }
INLINE void mask_out(bool hidden, fp16& x) { x.bits = hidden ? 0xfc00 : 0; }
INLINE void mask_out(bool hidden, float& x) { x = __uint_as_float(hidden ? 0xff800000 : 0); }

// The launch may start while earlier kernels run (programmatic dependent launch).
INLINE void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

INLINE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

INLINE bool is_end(int64 token, const int64* eos, int ends) {
    bool found = false;
#pragma unroll 1
    for (int i = 0; i < ends; i++) found |= token == eos[i];
    return found;
}
