// The part of CUDA's runtime that the launchers and the bindings call.
#pragma once

#include <stddef.h>

struct CUstream_st;
typedef CUstream_st* cudaStream_t;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };

// What the last launch that failed said; the emulator's own words.
const char* cudaGetErrorString(cudaError_t error);

// The last failure; forgets it.
cudaError_t cudaGetLastError();

// Tensors of the emulated device lie in the memory of the CPU. It is the only device and always the current one, so
// nothing should set it: on a GPU that would make a context.
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaErrorInvalidValue; }
