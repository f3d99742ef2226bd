// A device for tests on machines without a GPU: its tensors lie in ordinary memory and its operators are those
// of the CPU, but as on CUDA an operator that is given tensors of two devices, or a generator of another one,
// fails. So a tensor that was made on the CPU, or forgotten there, is found.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>

namespace {

using at::Tensor;
using Ints = c10::IntArrayRef;
using SymInts = c10::SymIntArrayRef;
using MaybeTensor = std::optional<Tensor>;
constexpr auto TYPE = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(TYPE, 0);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    return {data, data, &c10::free_cpu, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = TYPE;
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

void resize_storage(c10::Storage storage, size_t bytes) {
  auto data = memory.allocate(bytes);
  std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
  storage.set_data_ptr(std::move(data));
  storage.set_nbytes(bytes);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(0);
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<at::CPUGeneratorImpl>(0);
  }
  c10::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage, bytes);
  }
};
Hooks hooks;

// The same memory as a tensor on the CPU.
Tensor on_cpu(const Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != TYPE) return tensor;
  auto* data = const_cast<void*>(tensor.storage().data());
  c10::Storage storage(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(),
                       c10::DataPtr(data, c10::Device(c10::kCPU)), c10::GetAllocator(c10::kCPU), true);
  auto found = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  found.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) found._set_conj(true);
  if (tensor.is_neg()) found._set_neg(true);
  return found;
}

Tensor moved(const Tensor& tensor) { return tensor.defined() ? tensor.to(DEVICE) : tensor; }

void require_same(const c10::Device& one, const Tensor& other, const char* where) {
  TORCH_CHECK(!other.defined() || !other.dim() || other.device() == one,
              "Expected all tensors to be on the same device, but found at least two devices, ", one, " and ",
              other.device(), "! (", where, ")");
}

Tensor empty(Ints size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(Ints size, Ints stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

const Tensor& resize(const Tensor& tensor, Ints size, std::optional<at::MemoryFormat>) {
  auto* inner = tensor.unsafeGetTensorImpl();
  inner->set_sizes_contiguous(size);
  const size_t bytes = (inner->storage_offset() + inner->numel()) * tensor.element_size();
  if (bytes > inner->storage().nbytes()) resize_storage(inner->storage(), bytes);
  return tensor;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar value_of(const Tensor& tensor) { return on_cpu(tensor).item(); }

Tensor& set_strided(Tensor& tensor, at::Storage storage, int64_t offset, Ints size, Ints stride) {
  auto* inner = tensor.unsafeGetTensorImpl();
  inner->set_storage_keep_dtype(std::move(storage));
  inner->set_sizes_and_strides(size, stride, offset);
  return tensor;
}

Tensor& set_storage(Tensor& tensor, at::Storage storage) {
  const auto size = static_cast<int64_t>(storage.nbytes() / tensor.element_size());
  return set_strided(tensor, std::move(storage), 0, {size}, {1});
}

Tensor& set_tensor(Tensor& tensor, const Tensor& other) {
  return set_strided(tensor, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

Tensor& set_empty(Tensor& tensor) {
  return set_storage(tensor, c10::Storage(c10::Storage::use_byte_size_t(), 0, &memory, true));
}

Tensor unfolded(const Tensor& tensor, int64_t axis, int64_t size, int64_t step) {
  return at::native::unfold(tensor, axis, size, step);
}

Tensor convolved(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, SymInts stride, SymInts padding,
                 SymInts dilation, bool transposed, SymInts output_padding, c10::SymInt groups) {
  require_same(x.device(), weight, "convolution");
  MaybeTensor added;
  if (bias && bias->defined()) {
    require_same(x.device(), *bias, "convolution");
    added = on_cpu(*bias);
  }
  return moved(at::convolution_symint(on_cpu(x), on_cpu(weight), added, stride, padding, dilation, transposed,
                                      output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolved_back(const Tensor& gradient, const Tensor& x, const Tensor& weight,
                                                  SymInts stride, SymInts padding, SymInts dilation,
                                                  bool transposed, SymInts output_padding, c10::SymInt groups,
                                                  std::array<bool, 3> mask) {
  require_same(x.device(), weight, "convolution_backward");
  require_same(x.device(), gradient, "convolution_backward");
  const std::vector<c10::SymInt> bias{transposed ? weight.sym_size(1) * groups : weight.sym_size(0)};
  auto [of_x, of_weight, of_bias] = at::convolution_backward_symint(
      on_cpu(gradient), on_cpu(x), on_cpu(weight), at::OptionalSymIntArrayRef(bias), stride, padding, dilation,
      transposed, output_padding, groups, mask);
  return {moved(of_x), moved(of_weight), moved(of_bias)};
}

// The CPU has no fused cell, and torch asks every other device for one.
std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input, const Tensor& hidden, const Tensor& cell,
                                             const MaybeTensor& input_bias, const MaybeTensor& hidden_bias) {
  auto gates = input + hidden;
  for (const auto* bias : {&input_bias, &hidden_bias})
    if (*bias && (*bias)->defined()) gates = gates + **bias;
  const auto parts = gates.chunk(4, 1);
  const auto in = parts[0].sigmoid(), forget = parts[1].sigmoid(), next = parts[2].tanh(), out = parts[3].sigmoid();
  const auto state = forget * cell + in * next;
  return {out * state.tanh(), state, at::cat({in, forget, next, out}, 1)};
}

// Every other operator: the CPU's, on the same memory.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const size_t count = op.schema().arguments().size(), first = stack->size() - count;
  std::optional<c10::Device> device;
  std::vector<std::pair<Tensor, Tensor>> pairs;  // on the CPU, and as it came
  // Indices on the CPU may index a tensor of any device.
  const bool indexes = name.find("index") != std::string::npos;
  auto look = [&](const Tensor& tensor) -> Tensor {
    if (!tensor.defined()) return tensor;
    if (!indexes && name != "aten::copy_" && tensor.dim()) {
      if (!device) device = tensor.device();
      require_same(*device, tensor, name.c_str());
    }
    if (tensor.device().type() != TYPE) return tensor;
    for (const auto& [alias, own] : pairs)
      if (own.is_same(tensor)) return alias;
    pairs.emplace_back(on_cpu(tensor), tensor);
    return pairs.back().first;
  };
  for (size_t i = first; i < first + count; ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = look(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(look(tensor));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<MaybeTensor> list;
      for (const auto& tensor : value.toOptionalTensorVector())
        list.push_back(tensor ? MaybeTensor(look(*tensor)) : std::nullopt);
      value = list;
    } else if (value.isDevice() && value.toDevice().type() == TYPE) {
      value = c10::Device(c10::kCPU);
    } else if (value.isGenerator() && value.toGenerator().defined()) {
      TORCH_CHECK(value.toGenerator().device().type() == TYPE, "Expected a '", DEVICE,
                  "' generator, but found one on the CPU (", name, ")");
    }
  }
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(stack);
  }
  auto back = [&](const Tensor& tensor) -> Tensor {
    for (const auto& [alias, own] : pairs) {
      if (alias.is_same(tensor)) return own;
      TORCH_CHECK(!tensor.defined() || !tensor.numel() || !tensor.has_storage() || !alias.numel() ||
                      tensor.storage().data() != alias.storage().data(),
                  name, " returns a view, which the pretended device does not know: add it to pretended.cpp");
    }
    return moved(tensor);
  };
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = back(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(back(tensor));
      value = list;
    }
  }
  for (auto& [alias, own] : pairs)  // what was written to has another size now
    if (alias.sizes() != own.sizes() || alias.storage().data() != own.storage().data()) own.set_(moved(alias));
}

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
}
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &memory);

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("resize_", &resize);
  library.impl("_local_scalar_dense", &value_of);
  library.impl("set_.source_Storage", &set_storage);
  library.impl("set_.source_Storage_storage_offset", &set_strided);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("set_", &set_empty);
  library.impl("as_strided", &at::native::as_strided_tensorimpl);
  library.impl("view", &at::native::view);
  library.impl("_reshape_alias", &at::native::_reshape_alias);
  library.impl("unfold", &unfolded);
  library.impl("view_as_real", &at::native::view_as_real);
  library.impl("view_as_complex", &at::native::view_as_complex);
  library.impl("convolution_overrideable", &convolved);
  library.impl("convolution_backward_overrideable", &convolved_back);
  library.impl("_thnn_fused_lstm_cell", &lstm_cell);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("start", []() { at::RegisterPrivateUse1HooksInterface(&hooks); });
}
