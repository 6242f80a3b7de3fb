// A CUDA device that computes nothing, for a PyTorch built without CUDA: what autograd asks of a device before it runs a
// backward over fake tensors that say they lie there.
//
//   a device guard    PyTorch's own FakeGuardImpl: devices, streams and events that do nothing
//   CUDA hooks        which say that there are eight GPUs
//
// Nothing is allocated and there are no kernels: an operation on a real CUDA tensor fails as before, with PyTorch's
// message. fake_cuda.py compiles this against the headers of the PyTorch that is installed, and loads it before torch.
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

namespace {

constexpr c10::DeviceIndex kDevices = 8;
constexpr auto kCuda = c10::DeviceType::CUDA;

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::impl::FakeGuardImpl<kCuda> fake;

    c10::DeviceType type() const override { return kCuda; }
    c10::Device exchangeDevice(c10::Device d) const override {
        return d.index() < 0 ? fake.getDevice() : fake.exchangeDevice(d);
    }
    c10::Device getDevice() const override { return fake.getDevice(); }
    void setDevice(c10::Device d) const override {
        if (d.index() >= 0) fake.setDevice(d);
    }
    void uncheckedSetDevice(c10::Device d) const noexcept override {
        if (d.index() >= 0) fake.uncheckedSetDevice(d);
    }
    c10::Stream getStream(c10::Device d) const override { return fake.getStream(d.index() < 0 ? fake.getDevice() : d); }
    c10::Stream getDefaultStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
    c10::Stream getNewStream(c10::Device d, int) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
    c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override {
        return c10::Stream(c10::Stream::DEFAULT, d);
    }
    c10::Stream exchangeStream(c10::Stream s) const override { return fake.exchangeStream(s); }
    c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
    void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    bool queryStream(const c10::Stream&) const override { return true; }
    void synchronizeStream(const c10::Stream&) const override {}
    void synchronizeEvent(void*) const override {}
    void synchronizeDevice(const c10::DeviceIndex) const override {}
    double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 0; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
    explicit Hooks(at::CUDAHooksArgs) {}
    void init() const override {}
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasCUDA() const override { return true; }
    bool hasCUDART() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    int getNumGPUs() const override { return kDevices; }
    c10::DeviceIndex deviceCount() const override { return kDevices; }
    c10::DeviceIndex current_device() const override { return 0; }
    c10::DeviceIndex getCurrentDevice() const override { return 0; }
    void setCurrentDevice(c10::DeviceIndex) const override {}
    c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
    c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
    void deviceSynchronize(c10::DeviceIndex) const override {}
};

}  // namespace

// These two take the place of PyTorch's own, which answer "none" in a build without CUDA: this library is loaded first,
// with RTLD_GLOBAL, so PyTorch's calls of them arrive here.
namespace at::accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) { return kCuda; }
}  // namespace at::accelerator

namespace at::detail {
const CUDAHooksInterface& getCUDAHooks() {
    static const CUDAHooksInterface* hooks = new Hooks(at::CUDAHooksArgs{});
    return *hooks;
}
}  // namespace at::detail
