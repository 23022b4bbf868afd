// A simulated accelerator: memory of the host that only tensors of this device may be computed with.
//
// Operations run on the CPU, on copies (`fallback`). What matters here is what an accelerator is
// strict about: tensors of two devices are never mixed, and the host learns a number only by a copy,
// which is counted.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>

using at::Tensor;
using c10::IntArrayRef;
using MaybeTensor = std::optional<Tensor>;

namespace {

constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(KIND, 0);
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

int64_t reads = 0;           // copies to the host, and operations whose result's size it must know
thread_local int inside = 0; // operations under way, whose own copies do not count

// Memory, streams and random numbers.

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    return {memory, memory, &std::free, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(KIND, &allocator);

// There is one device with one stream, on which everything has happened when a call returns.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, DEVICE);
  }
  c10::Stream getDefaultStream(c10::Device) const override { return getStream(DEVICE); }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(DEVICE); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Generator final : at::CPUGeneratorImpl {
  Generator() {
    device_ = DEVICE;
    key_set_ = KEYS;
  }
};

const at::Generator& default_generator() {
  static const at::Generator generator = at::make_generator<Generator>();
  return generator;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return default_generator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Generator>();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto memory = allocator.allocate(bytes);
    std::memcpy(memory.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(memory));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// Tensors are made, seen in other shapes and copied without the fallback, which would copy them.

// The same memory, as a tensor of the CPU.
Tensor on_cpu(const Tensor& tensor) {
  const auto options = tensor.options().device(at::kCPU);
  auto same = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), options);
  same._set_conj(tensor.is_conj());
  same._set_neg(tensor.is_neg());
  return same;
}

MaybeTensor on_cpu(const MaybeTensor& tensor) {
  return tensor && tensor->defined() ? MaybeTensor(on_cpu(*tensor)) : std::nullopt;
}

Tensor on_device(const Tensor& tensor) { return tensor.defined() ? tensor.to(DEVICE) : tensor; }

Tensor empty(
    IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &allocator, KEYS, c10::dtype_or_default(dtype));
}

Tensor as_strided(
    const Tensor& self, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

Tensor view(const Tensor& self, IntArrayRef size) { return at::native::view(self, size); }

Tensor reshape_alias(const Tensor& self, IntArrayRef size, IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}

const Tensor& resize(
    const Tensor& self, IntArrayRef size, std::optional<c10::MemoryFormat> format) {
  return at::native::resize_(self, size, format);
}

Tensor& set_storage(
    Tensor& self, at::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(storage));
  tensor->set_storage_offset(offset);
  tensor->set_sizes_and_strides(size, stride);
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(storage), 0, {count}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& other) {
  return set_storage(
      self, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (to.is_cpu() && !inside) ++reads;
  (to.is_cpu() ? to : on_cpu(to)).copy_(from.is_cpu() ? from : on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar_dense(const Tensor& self) {
  if (!inside) ++reads;
  return on_cpu(self).item();
}

// Operations for which the fallback is not enough: it does not write running statistics back, and
// convolutions have a form of their own for devices like this.

std::tuple<Tensor, Tensor, Tensor> native_batch_norm(
    const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& mean,
    const MaybeTensor& variance, bool training, double momentum, double eps) {
  const auto [y, means, deviations] = at::native_batch_norm(
      on_cpu(x), on_cpu(weight), on_cpu(bias), on_cpu(mean), on_cpu(variance), training, momentum,
      eps);
  return {on_device(y), on_device(means), on_device(deviations)};
}

Tensor convolution(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
    int64_t groups) {
  return on_device(at::convolution(
      on_cpu(x), on_cpu(weight), on_cpu(bias), stride, padding, dilation, transposed,
      output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
    int64_t groups, std::array<bool, 3> wanted) {
  const std::vector<int64_t> of_bias{transposed ? weight.size(1) * groups : weight.size(0)};
  const auto [a, b, c] = at::convolution_backward(
      on_cpu(grad), on_cpu(x), on_cpu(weight), at::OptionalIntArrayRef(of_bias), stride, padding,
      dilation, transposed, output_padding, groups, wanted);
  return {on_device(a), on_device(b), on_device(c)};
}

// All other operations.

// These take indices of the CPU, or look at sizes only.
const std::set<std::string> MAY_MIX = {
    "aten::index",       "aten::index_put",     "aten::index_put_",   "aten::_index_put_impl_",
    "aten::_unsafe_index", "aten::_unsafe_index_put", "aten::is_same_size"};
// The size of what they return depends on numbers.
const std::set<std::string> READS = {"aten::nonzero", "aten::masked_select"};

void check_devices(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  bool device = false, host = false;
  const auto look = [&](const Tensor& tensor) {
    if (!tensor.defined()) return;
    if (tensor.device().type() == KIND) device = true;
    else if (tensor.dim() > 0) host = true;  // a number on the CPU fits every device
  };
  for (const auto& argument : arguments) {
    if (argument.isTensor()) look(argument.toTensor());
    else if (argument.isTensorList())
      for (const Tensor& tensor : argument.toTensorVector()) look(tensor);
    else if (argument.isOptionalTensorList())
      for (const auto& tensor : argument.toOptionalTensorVector())
        if (tensor) look(*tensor);
  }
  TORCH_CHECK(
      !(device && host) || MAY_MIX.count(name),
      "Expected all tensors to be on the same device in ", name);
}

void fallback(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto& schema = operation.schema();
  const auto& name = schema.operator_name().name;
  const auto count = schema.arguments().size();
  check_devices(name, torch::jit::last(stack, count));
  // The CPU's operations take generators of the CPU: one with the same state, which is put back.
  std::vector<std::pair<at::Generator, at::Generator>> lent;
  for (size_t i = 0; i < count; ++i) {
    auto& argument = (*stack)[stack->size() - count + i];
    const bool draws = schema.arguments()[i].name() == "generator";
    if (!argument.isGenerator() && !(draws && argument.isNone())) continue;
    auto own = argument.isGenerator() ? argument.toGenerator() : default_generator();
    TORCH_CHECK(
        own.device().type() == KIND, "Expected a generator of this device, and found one of ",
        own.device(), " in ", name);
    auto generator = at::detail::createCPUGenerator();
    generator.set_state(own.get_state());
    argument = c10::IValue(generator);
    lent.emplace_back(own, generator);
  }
  if (READS.count(name) && !inside) ++reads;
  struct Inside {
    Inside() { ++inside; }
    ~Inside() { --inside; }
  };
  {
    const Inside now;
    at::native::cpu_fallback(operation, stack);
  }
  for (auto& [own, generator] : lent) own.set_state(generator.get_state());
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("view_as_real", at::native::view_as_real);
  library.impl("view_as_complex", at::native::view_as_complex);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Storage", set_whole_storage);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", local_scalar_dense);
  library.impl("native_batch_norm", native_batch_norm);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
}

// Copies see to conjugated and negated views themselves; torch would resolve them by another copy.
TORCH_LIBRARY_IMPL(aten, Conjugate, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, Negative, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {  // the name that the macros use
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
}

PYBIND11_MODULE(simulated_device, module) {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  module.def("reads", [] { return reads; });
  module.def("get_rng_state", [] { return default_generator().get_state(); });
  module.def("set_rng_state", [](const Tensor& state) {
    at::Generator generator = default_generator();
    generator.set_state(state);
  });
  module.def("manual_seed", [](int64_t seed) {
    at::Generator generator = default_generator();
    generator.set_current_seed(seed);
  });
}
