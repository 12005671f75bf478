// One table of kernels: compiled once per instruction set, like every file beside it.
#include "common/kernels.hpp"

#define FG_STRING_(x) #x
#define FG_STRING(x) FG_STRING_(x)

// The elementwise kernels gain nothing from AVX512_BF16 or AMX: those tables take avx512's (as setup.py knows).
#ifdef __AVX512BF16__
#define ELEMENTWISE avx512
#else
#define ELEMENTWISE ISA
#endif

// Attention multiplies pairs of bf16, but by no tiles of AMX: that table takes avx512_bf16's.
#ifdef __AMX_BF16__
#define ATTENTION avx512_bf16
#else
#define ATTENTION ISA
#endif

#define FG_DECLARE(kernel, ...) Kernel<__VA_ARGS__> kernel;
namespace fg::ISA {
FG_PRODUCT_KERNELS(FG_DECLARE)
}
namespace fg::ELEMENTWISE {
FG_ELEMENTWISE_KERNELS(FG_DECLARE)
FG_HOST_KERNELS(FG_DECLARE)
}  // namespace fg::ELEMENTWISE
namespace fg::ATTENTION {
FG_ATTENTION_KERNELS(FG_DECLARE)
}

namespace fg::ISA {

#define FG_PRODUCT(kernel, ...) kernel,
#define FG_ELEMENTWISE(kernel, ...) ELEMENTWISE::kernel,
#define FG_ATTENTION(kernel, ...) ATTENTION::kernel,
extern const Table table;
const Table table = {FG_STRING(ISA), FG_PRODUCT_KERNELS(FG_PRODUCT) FG_ELEMENTWISE_KERNELS(FG_ELEMENTWISE)
                                         FG_ATTENTION_KERNELS(FG_ATTENTION) FG_HOST_KERNELS(FG_ELEMENTWISE)};

}  // namespace fg::ISA
