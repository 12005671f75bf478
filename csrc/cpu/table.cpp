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

namespace fg::ELEMENTWISE {

void bn_act_forward(const BnShape&, const BnActForwardArgs&);
void bn_act_backward(const BnShape&, const BnActBackwardArgs&);
void bn_act_double_backward(const BnShape&, const BnActDoubleBackwardArgs&);
void gn_act_forward(const GnShape&, const GnActForwardArgs&);
void gn_act_backward(const GnShape&, const GnActBackwardArgs&);
void gn_act_double_backward(const GnShape&, const GnActDoubleBackwardArgs&);
void bias_act_forward(const BiasActShape&, const BiasActForwardArgs&);
void bias_act_backward(const BiasActShape&, const BiasActBackwardArgs&);
void gan_loss_forward(const GanLossArgs&);
void gan_loss_backward(const GanLossArgs&);
void gan_loss_double_backward(const GanLossArgs&);
void interpolate_forward(const InterpolateArgs&);
void sample_dot(const SampleDotArgs&);
void grad_norm_penalty_forward(const GradNormPenaltyArgs&);
void grad_norm_penalty_backward(const GradNormPenaltyArgs&);
void adam(const AdamArgs&);

}  // namespace fg::ELEMENTWISE

namespace fg::ISA {

void conv2d(const ConvShape&, const Conv2dArgs&);
void conv_transpose2d(const ConvShape&, const ConvTranspose2dArgs&);
void conv2d_weight(const ConvShape&, const Conv2dWeightArgs&);

extern const Table table;
const Table table = {
    FG_STRING(ISA),
    conv2d,
    conv_transpose2d,
    conv2d_weight,
    ELEMENTWISE::bn_act_forward,
    ELEMENTWISE::bn_act_backward,
    ELEMENTWISE::bn_act_double_backward,
    ELEMENTWISE::gn_act_forward,
    ELEMENTWISE::gn_act_backward,
    ELEMENTWISE::gn_act_double_backward,
    ELEMENTWISE::bias_act_forward,
    ELEMENTWISE::bias_act_backward,
    ELEMENTWISE::gan_loss_forward,
    ELEMENTWISE::gan_loss_backward,
    ELEMENTWISE::gan_loss_double_backward,
    ELEMENTWISE::interpolate_forward,
    ELEMENTWISE::sample_dot,
    ELEMENTWISE::grad_norm_penalty_forward,
    ELEMENTWISE::grad_norm_penalty_backward,
    ELEMENTWISE::adam,
};

}  // namespace fg::ISA
