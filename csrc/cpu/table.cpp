// One table of kernels: compiled once per instruction set, like every file beside it.
#include "common/kernels.hpp"

#define FG_STRING_(x) #x
#define FG_STRING(x) FG_STRING_(x)

namespace fg::ISA {

void conv2d(const ConvShape&, const Conv2dArgs&);
void conv_transpose2d(const ConvShape&, const ConvTranspose2dArgs&);
void conv2d_weight(const ConvShape&, const Conv2dWeightArgs&);
void bn_act_forward(const BnShape&, const BnActForwardArgs&);
void bn_act_backward(const BnShape&, const BnActBackwardArgs&);
void bn_act_double_backward(const BnShape&, const BnActDoubleBackwardArgs&);
void bias_act_forward(const BiasActShape&, const BiasActForwardArgs&);
void bias_act_backward(const BiasActShape&, const BiasActBackwardArgs&);
void gan_loss_forward(const GanLossArgs&);
void gan_loss_backward(const GanLossArgs&);

#ifdef FG_WITHOUT_conv2d
#define conv2d nullptr
#endif
#ifdef FG_WITHOUT_conv_transpose2d
#define conv_transpose2d nullptr
#endif
#ifdef FG_WITHOUT_conv2d_weight
#define conv2d_weight nullptr
#endif
#ifdef FG_WITHOUT_bn_act
#define bn_act_forward nullptr
#define bn_act_backward nullptr
#define bn_act_double_backward nullptr
#endif
#ifdef FG_WITHOUT_bias_act
#define bias_act_forward nullptr
#define bias_act_backward nullptr
#endif
#ifdef FG_WITHOUT_gan_loss
#define gan_loss_forward nullptr
#define gan_loss_backward nullptr
#endif

extern const Table table;
const Table table = {
    FG_STRING(ISA),         conv2d,           conv_transpose2d,  conv2d_weight,    bn_act_forward,    bn_act_backward,
    bn_act_double_backward, bias_act_forward, bias_act_backward, gan_loss_forward, gan_loss_backward,
};

}  // namespace fg::ISA
