// The table of one instruction set: its kernels by memory order and dtype. Like kernels.cpp, compiled once for each
// set.
#include "kernels.h"
#include "lattice.h"
#include "pooling.h"

// Planes begin anywhere: vectors of 64 bytes would cross lines of the cache at nearly each step.
namespace batchnorm::BATCHNORM_PLANES_ISA {
extern const DepthwisePlanes depthwise_planes[4];
extern const PoolingKernels pooling[4];
}  // namespace batchnorm::BATCHNORM_PLANES_ISA

namespace batchnorm::BATCHNORM_ISA {

extern const Kernels planar_kernels[4], interleaved_kernels[4];
extern const CoefficientKernels coefficients[2];
extern const DepthwiseRows depthwise_rows[4];

namespace {

const KernelTable table = {{planar_kernels, interleaved_kernels},  coefficients,
                           BATCHNORM_PLANES_ISA::depthwise_planes, depthwise_rows,
                           BATCHNORM_PLANES_ISA::pooling,          BATCHNORM_VECTOR_BYTES / 4};

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
const batchnorm::KernelTable* batchnorm::JOIN(kernels_, BATCHNORM_ISA)() { return &BATCHNORM_ISA::table; }
