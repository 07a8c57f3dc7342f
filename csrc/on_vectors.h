// forward and backward of an instruction set that computes everything on vectors. Included after spectral_reweight.h.

namespace {

bool forward(const Forward& call) {
  switch (call.common.dtype) {
    case FLOAT64: return forward_as<double, double>(call);
    case BFLOAT16: return forward_as<float, Bfloat16>(call);
    default: return forward_as<float, float>(call);
  }
}

bool backward(const Backward& call) {
  switch (call.common.dtype) {
    case FLOAT64: return backward_as<double, double>(call);
    case BFLOAT16: return backward_as<float, Bfloat16>(call);
    default: return backward_as<float, float>(call);
  }
}

}  // namespace
