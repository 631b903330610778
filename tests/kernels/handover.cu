// What `sanitize.sh racecheck` says of sparse_mla on sm90, made small: is it a race, or does the tool not see the order?
//     nvcc -arch=sm_90 -o handover benchmarks/handover.cu && compute-sanitizer --tool racecheck ./handover [all]
// One group of warps writes and meets at a barrier of its own, one of its threads arrives at the mbarrier, the other group
// waits for it and reads: in order by PTX's memory model, and reported. With `all`, every thread arrives: not reported.
#include <cstdio>

__device__ unsigned shared_address(void* p) { return (unsigned)__cvta_generic_to_shared(p); }

__global__ void handover(float* out, int all) {
    __shared__ float values[128];
    __shared__ alignas(8) unsigned long long ready;
    int thread = threadIdx.x;
    if (thread == 0) asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&ready)), "r"(all ? 128 : 1));
    __syncthreads();
    if (thread < 128) {
        values[thread] = thread;
        asm volatile("bar.sync 1, 128;" ::: "memory");
        if (all || thread == 0) asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(&ready)) : "memory");
    } else {
        asm volatile(
            "{\n.reg .pred p;\nWAIT: mbarrier.try_wait.parity.shared.b64 p, [%0], 0;\n@!p bra WAIT;\n}" ::"r"(
                shared_address(&ready))
            : "memory");
        out[thread - 128] = values[(thread + 1) % 128];
    }
}

int main(int arguments, char**) {
    float* out;
    cudaMalloc(&out, 512);
    handover<<<1, 256>>>(out, arguments > 1);
    printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
}
