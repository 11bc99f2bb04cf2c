// What autograd asks of a CUDA device, for a PyTorch built without CUDA: a device guard and the
// hooks by which it is an accelerator. Tensors of FakeTensorMode then have a backward on "cuda".
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {

struct StubHooks final : CUDAHooksInterface {
  explicit StubHooks(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
};

C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, StubHooks)

} // namespace at

struct StubGuard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return {type(), 0}; }
  c10::Device exchangeDevice(c10::Device) const override { return {type(), 0}; }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, StubGuard)
