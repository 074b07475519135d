// The host path of repeated calls. Python checks and plans a call (plan.py); `add` and `add_backward` hand the finished
// plan over, and from then on `attend` does what Plan.forward and Plan.backward do, with an autograd node of its own.
//
// Whatever it does not know is Python's: `attend` returns None, and a backward pass without a plan calls `gradients`.
// So there is no rule in this file, and no error but a refused launch. CUDA is reached through torch's own tables and
// two addresses (the kernel, the current stream), so that one source compiles beside any build of torch.
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <array>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace at::autocast {
TORCH_API at::ScalarType get_autocast_dtype(at::DeviceType device_type);  // its header takes seconds
}

namespace {

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using NodePointer = decltype(std::declval<Node&>().getptr());  // std::shared_ptr, from torch 2.13 on intrusive

using Launch = int (*)(const void* pointers, const void* problem, void* stream);
using CurrentStream = int32_t (*)(int32_t device, void** stream);

constexpr uintptr_t ALIGNMENT = 16;   // bytes; plan.py
constexpr size_t MAX_BACKWARDS = 16;  // of one plan

// A Python object that may be let go by a thread that does not hold the GIL.
class Reference {
  public:
    explicit Reference(py::object object) : object_(object.release().ptr()) {}
    Reference(const Reference&) = delete;
    Reference& operator=(const Reference&) = delete;
    ~Reference() {
        if (!Py_IsInitialized()) return;
        const py::gil_scoped_acquire gil;
        Py_DECREF(object_);
    }
    py::handle get() const { return object_; }

  private:
    PyObject* object_;
};

CurrentStream current_stream = nullptr;
Reference* python_gradients = nullptr;  // autograd.py: gradients

// --- Keys: everything a plan depends on, as words

class Key {
  public:
    void add(int64_t word) { words_[count_++] = word; }
    void add(double number) {
        int64_t word;
        std::memcpy(&word, &number, sizeof word);
        add(word);
    }
    void add(const Tensor& tensor) {
        if (!tensor.defined()) return add(int64_t(-1));
        const int64_t dimensions = tensor.dim();
        if (dimensions > MAX_DIMENSIONS) {
            fits_ = false;
            return;
        }
        const c10::Device device = tensor.device();
        add(dimensions | int64_t(tensor.scalar_type()) << 8 | int64_t(device.type()) << 16 |
            int64_t(uint8_t(device.index())) << 24);
        for (const int64_t size : tensor.sizes()) add(size);
        for (const int64_t stride : tensor.strides()) add(stride);
    }
    uint64_t hash() const {
        uint64_t hash = 0;
        for (size_t i = 0; i < count_; ++i) {
            hash = (hash ^ uint64_t(words_[i])) * 0x9E3779B97F4A7C15u;
            hash ^= hash >> 32;
        }
        return hash;
    }
    bool fits() const { return fits_; }
    bool operator==(const Key& other) const {
        return count_ == other.count_ && std::memcmp(words_.data(), other.words_.data(), count_ * sizeof(int64_t)) == 0;
    }

  private:
    static constexpr int64_t MAX_DIMENSIONS = 5;
    static constexpr int MAX_TENSORS = 7;
    static constexpr int MAX_OTHERS = 12;
    std::array<int64_t, MAX_TENSORS * (1 + 2 * MAX_DIMENSIONS) + MAX_OTHERS> words_;
    size_t count_ = 0;
    bool fits_ = true;
};

// --- Plans

using Shape = std::vector<int64_t>;

struct Layout {
    Shape sizes, strides;
};

// A kernel and what it is told about sizes and strides.
struct Call {
    Launch launch;
    std::string problem;
    int64_t workspace;
    Reference kernel;  // launch.Kernel
};

struct BackwardPlan {
    Key key;
    Call call;
    Layout dq, dk, dv;
};

struct Plan {
    Key key;
    Reference python;  // plan.Plan
    Call call;
    Layout out;
    Shape lse;
    std::array<int64_t, 3> rows;  // batch, query heads, queries: lse with its heads apart

    std::mutex mutex;  // backward runs in threads of the engine, without the GIL
    std::vector<std::shared_ptr<const BackwardPlan>> backwards;
    size_t oldest = 0;

    std::shared_ptr<const BackwardPlan> backward(const Key& wanted) {
        const std::lock_guard<std::mutex> lock(mutex);
        for (const auto& found : backwards)
            if (found->key == wanted) return found;
        return nullptr;
    }
};

using Plans = std::unordered_multimap<uint64_t, std::shared_ptr<Plan>>;

Plans& plans() {  // the GIL guards it; never destroyed, because Python is gone when static objects go
    static Plans* const all = new Plans;
    return *all;
}

std::shared_ptr<Plan> find(const Key& key) {
    const auto [first, last] = plans().equal_range(key.hash());
    for (auto found = first; found != last; ++found)
        if (found->second->key == key) return found->second;
    return nullptr;
}

// --- Memory and launches

struct Inputs {
    Tensor q, k, v, mask, bias, scale;  // undefined where there is none; a constant scale is in the plan's problem
};

uintptr_t address(const Tensor& tensor) {
    return tensor.defined() ? reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) : 0;
}

bool misaligned(uintptr_t addresses) { return addresses % ALIGNMENT != 0; }

// Uninitialised memory, without the dispatcher. The device must be current.
class Memory {
  public:
    explicit Memory(c10::Device device)
        : cuda_(device.is_cuda()),
          allocator_(cuda_ ? at::detail::getCUDAHooks().getCUDADeviceAllocator() : c10::GetCPUAllocator()) {}
    Tensor tensor(const Layout& layout, at::ScalarType type) const {
        return at::detail::empty_strided_generic(layout.sizes, layout.strides, allocator_, keys(), type);
    }
    Tensor contiguous(at::IntArrayRef sizes, at::ScalarType type) const {
        return at::detail::empty_generic(sizes, allocator_, keys(), type, std::nullopt);
    }
    c10::DataPtr bytes(int64_t size) const { return size == 0 ? c10::DataPtr() : allocator_->allocate(size_t(size)); }

  private:
    c10::DispatchKeySet keys() const {
        return c10::DispatchKeySet(cuda_ ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU);
    }
    bool cuda_;
    c10::Allocator* allocator_;
};

// Fields of `Pointers`, in the order of abi.py.
struct Pointers {
    uintptr_t q, k, v, mask, bias, scale, out, lse, dout = 0, dlse = 0, dq = 0, dk = 0, dv = 0, dbias = 0, dscale = 0;
    const void* workspace = nullptr;
};

// Launch on the current stream. The workspace is free again at once: only later work of this stream gets it.
int launch(const Call& call, Pointers pointers, const Memory& memory, c10::Device device) {
    void* stream = nullptr;
    const int32_t failed = current_stream(device.index(), &stream);
    TORCH_CHECK(failed == 0, "cosattn: the current CUDA stream of device ", int(device.index()), " is unknown");
    const c10::DataPtr workspace = memory.bytes(call.workspace);
    pointers.workspace = workspace.get();
    return call.launch(&pointers, call.problem.data(), stream);
}

// Set the LaunchError of a refused launch as Python's current exception.
void set_error(const Call& call, int code) {
    const py::object error = call.kernel.get().attr("error")(code);
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
}

[[noreturn]] void throw_python_error() {  // the GIL is held, an exception is set
    python_error error;
    error.persist();
    throw std::move(error);
}

struct GilRelease {
    PyThreadState* const state = PyEval_SaveThread();
    ~GilRelease() { PyEval_RestoreThread(state); }
};

// --- What may be read

bool within(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) { return (keys | allowed) == allowed; }

// Tensors without a rule of their own: no subclass, not sparse, lazy, negated, batched or functional.
const c10::DispatchKeySet PLAIN_TENSOR =
    c10::DispatchKeySet(c10::DispatchKeySet::RAW, c10::full_backend_mask) |
    c10::DispatchKeySet({c10::DispatchKey::Dense, c10::DispatchKey::AutogradFunctionality,
                         c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutocastCUDA,
                         c10::DispatchKey::AutocastCPU});

bool plain(const Tensor& tensor) { return within(tensor.key_set(), PLAIN_TENSOR); }

// --- Backward

struct Gradients {
    Tensor dq, dk, dv, dbias, dscale;
};

py::object wrapped(const Tensor& tensor) {
    if (!tensor.defined()) return py::none();
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
}

class AttentionBackward : public Node {
  public:
    AttentionBackward(torch::autograd::edge_list&& next, std::shared_ptr<Plan> plan, int deterministic)
        : Node(std::move(next)), plan_(std::move(plan)), deterministic_(deterministic) {}

    std::string name() const override { return "AttentionBackward"; }

    void compiled_args(torch::autograd::CompiledNodeArgs&) const override {
        TORCH_CHECK_NOT_IMPLEMENTED(false,
                                    "cosattn's host extension does not know compiled autograd. Ways out: "
                                    "COSATTN_DISABLE_EXTENSION=1, or torch.compile around the forward pass");
    }

    void save(const Inputs& in, const Tensor& out, const Tensor& lse, bool with_lse) {
        q_ = SavedVariable(in.q, false);
        k_ = SavedVariable(in.k, false);
        v_ = SavedVariable(in.v, false);
        mask_ = SavedVariable(in.mask, false);
        bias_ = SavedVariable(in.bias, false);
        scale_ = SavedVariable(in.scale, false);
        // Results are saved without this node, which they would keep alive; their version is counted all the same.
        out_ = SavedVariable(out.tensor_data(), false);
        lse_ = SavedVariable(with_lse ? lse.tensor_data() : lse, false);
    }

    void release_variables() override {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (SavedVariable* saved : {&q_, &k_, &v_, &mask_, &bias_, &scale_, &out_, &lse_}) saved->reset_data();
    }

    variable_list apply(variable_list&& grads) override {
        Inputs in;
        Tensor out, lse;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            in = {q_.unpack(), k_.unpack(), v_.unpack(), mask_.unpack(), bias_.unpack(), scale_.unpack()};
            out = out_.unpack();
            lse = lse_.unpack();
        }
        const Tensor dlse = grads.size() > 1 ? grads[1] : Tensor();
        const bool deterministic =
            deterministic_ < 0 ? at::globalContext().deterministicAlgorithms() : deterministic_ != 0;
        const bool bias_grad = in.bias.defined() && task_should_compute_output(3);
        const bool scale_grad = in.scale.defined() && task_should_compute_output(4);
        Gradients found;
        const auto compute = [&] {
            return computed(found, in, out, lse, grads[0], dlse, deterministic, bias_grad, scale_grad);
        };
        const auto ask_python = [&](bool offer) {
            return by_python(found, offer, in, out, lse, grads[0], dlse, deterministic, bias_grad, scale_grad);
        };
        compute() || ask_python(true) || compute() || ask_python(false);
        if (found.dscale.defined()) found.dscale = found.dscale.view(in.scale.sizes());
        return {found.dq, found.dk, found.dv, found.dbias, found.dscale};
    }

  private:
    // False where Python has to look at the call first.
    bool computed(Gradients& found, const Inputs& in, const Tensor& out, Tensor lse, Tensor dout, Tensor dlse,
                  bool deterministic, bool bias_grad, bool scale_grad) const {
        if (at::GradMode::is_enabled()) return false;  // create_graph=True
        const c10::Device device = in.q.device();
        const c10::DeviceGuard guard(device);
        if (!dout.defined()) dout = at::zeros_like(out);
        if (!plain(dout) || (dlse.defined() && !plain(dlse))) return false;
        Key key;
        for (const Tensor* tensor : {&in.q, &in.k, &in.v, &in.mask, &in.bias, &out, &std::as_const(dout)})
            key.add(*tensor);
        key.add(int64_t(deterministic) | int64_t(bias_grad) << 1);
        if (!key.fits()) return false;
        const std::shared_ptr<const BackwardPlan> plan = plan_->backward(key);
        if (plan == nullptr) return false;
        if (misaligned(address(in.q) | address(in.k) | address(in.v) | address(out) | address(dout))) return false;
        lse = lse.contiguous();
        if (dlse.defined()) dlse = dlse.contiguous();
        const Memory memory(device);
        const at::ScalarType type = in.q.scalar_type();
        found.dq = memory.tensor(plan->dq, type);
        found.dk = memory.tensor(plan->dk, type);
        found.dv = memory.tensor(plan->dv, type);
        if (bias_grad) found.dbias = memory.contiguous(in.bias.sizes(), at::kFloat);
        if (scale_grad) found.dscale = memory.contiguous(plan_->lse, at::kFloat);
        const Pointers pointers{address(in.q),     address(in.k),        address(in.v),        address(in.mask),
                                address(in.bias),  address(in.scale),    address(out),         address(lse),
                                address(dout),     address(dlse),        address(found.dq),    address(found.dk),
                                address(found.dv), address(found.dbias), address(found.dscale)};
        const int code = launch(plan->call, pointers, memory, device);
        if (code != 0) {
            const py::gil_scoped_acquire gil;
            set_error(plan->call, code);
            throw_python_error();
        }
        if (bias_grad) found.dbias = found.dbias.to(in.bias.scalar_type());
        if (scale_grad) found.dscale = found.dscale.view(plan_->rows).sum(at::IntArrayRef{0, 2});
        return true;
    }

    // False where Python has offered a plan instead.
    bool by_python(Gradients& found, bool offer, const Inputs& in, const Tensor& out, const Tensor& lse,
                   const Tensor& dout, const Tensor& dlse, bool deterministic, bool bias_grad, bool scale_grad) const {
        const py::gil_scoped_acquire gil;
        try {
            const py::object answer = python_gradients->get()(
                offer, plan_->python.get(), wrapped(in.q), wrapped(in.k), wrapped(in.v), wrapped(in.mask),
                wrapped(in.bias), wrapped(in.scale), wrapped(out), wrapped(lse), wrapped(dout), wrapped(dlse),
                deterministic, bias_grad, scale_grad);
            if (answer.is_none()) return false;
            const py::tuple gradients = answer;
            const auto tensor = [&](int i) {
                const py::object item = gradients[i];
                return item.is_none() ? Tensor() : THPVariable_Unpack(item.ptr());
            };
            found = {tensor(0), tensor(1), tensor(2), tensor(3), tensor(4)};
            return true;
        } catch (py::error_already_set& error) {
            error.restore();
            throw_python_error();
        }
    }

    const std::shared_ptr<Plan> plan_;
    const int deterministic_;  // -1: as torch.use_deterministic_algorithms says when backward runs
    SavedVariable q_, k_, v_, mask_, bias_, scale_, out_, lse_;
};

// Nodes are owned by std::shared_ptr up to torch 2.12 and by intrusive_ptr after it.
template <class Pointer, class T> Pointer owned(T* node) {
    if constexpr (std::is_same_v<Pointer, std::shared_ptr<T>>)
        return Pointer(node, [](T* last) { deleteNode(last); });  // graphs may be too deep to be destroyed by recursion
    else return Pointer::unsafe_steal_from_new(node);
}

// --- Forward

struct Options {
    bool with_lse;
    int deterministic;
};

// Arguments of `attend`, in the order of functional.py.
enum {
    Q,
    K,
    V,
    MASK,
    BIAS,
    SCALE,
    GROUPS,
    CAUSAL,
    BATCH_DIM,
    L2NORM,
    SCALE_MAX,
    BIAS_BOUND,
    RETURN_LSE,
    DETERMINISTIC,
    ARGUMENTS
};

// A thread in which operators do just what they say: no mode, transform or trace listens.
const c10::DispatchKeySet PLAIN_THREAD =
    c10::DispatchKeySet({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView,
                         c10::DispatchKey::AutocastCUDA, c10::DispatchKey::AutocastCPU});

bool read_tensor(PyObject* argument, Tensor& tensor) {
    if (!THPVariable_CheckExact(argument)) return false;
    tensor = THPVariable_Unpack(argument);
    return tensor.defined() && plain(tensor);
}

bool read_optional_tensor(PyObject* argument, Tensor& tensor) {
    return argument == Py_None || read_tensor(argument, tensor);
}

bool read_number(PyObject* argument, Key& key) {
    if (argument == Py_None) return key.add(int64_t(0)), true;
    double number;
    if (PyFloat_CheckExact(argument)) number = PyFloat_AS_DOUBLE(argument);
    else if (PyLong_CheckExact(argument)) {
        number = PyLong_AsDouble(argument);
        if (number == -1.0 && PyErr_Occurred()) return PyErr_Clear(), false;
    } else return false;
    return key.add(int64_t(1)), key.add(number), true;
}

bool read_switch(PyObject* argument, bool& value) {
    value = argument == Py_True;
    return value || argument == Py_False;
}

// False for whatever is not in its plain form; Python then says what is wrong with it, or converts it.
bool read(PyObject* const* arguments, Inputs& in, Options& options, Key& key) {
    if (!read_tensor(arguments[Q], in.q) || !read_tensor(arguments[K], in.k) || !read_tensor(arguments[V], in.v) ||
        !read_optional_tensor(arguments[MASK], in.mask) || !read_optional_tensor(arguments[BIAS], in.bias))
        return false;
    const bool scale_tensor = read_tensor(arguments[SCALE], in.scale);
    for (const Tensor* tensor : {&in.q, &in.k, &in.v, &in.mask, &in.bias, &in.scale}) key.add(*tensor);
    if (!scale_tensor && (arguments[SCALE] == Py_None || !read_number(arguments[SCALE], key))) return false;
    if (!PyLong_CheckExact(arguments[GROUPS])) return false;
    const long long groups = PyLong_AsLongLong(arguments[GROUPS]);
    if (groups == -1 && PyErr_Occurred()) return PyErr_Clear(), false;
    key.add(int64_t(groups));
    bool causal, batch_dim, l2norm;
    if (!read_switch(arguments[CAUSAL], causal) || !read_switch(arguments[BATCH_DIM], batch_dim) ||
        !read_switch(arguments[L2NORM], l2norm) || !read_switch(arguments[RETURN_LSE], options.with_lse))
        return false;
    key.add(int64_t(causal) | int64_t(batch_dim) << 1 | int64_t(l2norm) << 2);
    if (!read_number(arguments[SCALE_MAX], key) || !read_number(arguments[BIAS_BOUND], key)) return false;
    bool deterministic;
    if (arguments[DETERMINISTIC] == Py_None) options.deterministic = -1;
    else if (read_switch(arguments[DETERMINISTIC], deterministic)) options.deterministic = deterministic;
    else return false;
    return key.fits();
}

// Under autocast q, k and v are what autocast would make of them.
bool cast_already(const Inputs& in) {
    if (c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutocastCUDA)) return true;  // no autocast
    const at::ScalarType type = at::autocast::get_autocast_dtype(at::kCUDA);
    return in.q.scalar_type() == type && in.k.scalar_type() == type && in.v.scalar_type() == type;
}

// The result of a call, or None where Python has to look at it.
PyObject* attend(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    Inputs in;
    Options options;
    Key key;
    if (count != ARGUMENTS || !within(c10::impl::tls_local_dispatch_key_set().included_, PLAIN_THREAD) ||
        !read(arguments, in, options, key) || !cast_already(in) ||
        misaligned(address(in.q) | address(in.k) | address(in.v)))
        Py_RETURN_NONE;
    std::shared_ptr<Plan> plan = find(key);
    if (plan == nullptr) Py_RETURN_NONE;
    const bool grad = torch::autograd::compute_requires_grad(in.q, in.k, in.v, in.bias, in.scale);
    Tensor out, lse;
    int code;
    {
        const GilRelease no_gil;
        const c10::Device device = in.q.device();
        const c10::DeviceGuard guard(device);
        const Memory memory(device);
        out = memory.tensor(plan->out, in.q.scalar_type());
        if (grad || options.with_lse) lse = memory.contiguous(plan->lse, at::kFloat);
        code = launch(plan->call,
                      Pointers{address(in.q), address(in.k), address(in.v), address(in.mask), address(in.bias),
                               address(in.scale), address(out), address(lse)},
                      memory, device);
    }
    if (code != 0) return set_error(plan->call, code), nullptr;
    if (grad) {
        auto* const node = new AttentionBackward(
            torch::autograd::collect_next_edges(in.q, in.k, in.v, in.bias, in.scale), plan, options.deterministic);
        const auto pointer = owned<NodePointer>(static_cast<Node*>(node));
        torch::autograd::set_history(out, pointer);
        if (options.with_lse) torch::autograd::set_history(lse, pointer);
        node->save(in, out, lse, options.with_lse);
    }
    PyObject* const result = THPVariable_Wrap(std::move(out));
    if (result == nullptr || !options.with_lse) return result;
    PyObject* const second = THPVariable_Wrap(std::move(lse));
    PyObject* const pair = second == nullptr ? nullptr : PyTuple_Pack(2, result, second);
    Py_DECREF(result);
    Py_XDECREF(second);
    return pair;
    END_HANDLE_TH_ERRORS
}

PyMethodDef FAST_METHODS[] = {
    {"attend", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(attend)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// --- What Python tells this module

using CallFacts =
    std::tuple<py::object, uintptr_t, py::bytes, int64_t>;  // kernel, address of its launch, problem, workspace

Call call_of(const CallFacts& facts) {
    return {reinterpret_cast<Launch>(std::get<1>(facts)), std::string(std::get<2>(facts)), std::get<3>(facts),
            Reference(std::get<0>(facts))};
}

Layout layout_of(const std::pair<Shape, Shape>& facts) { return {facts.first, facts.second}; }

// Serve calls that look like these arguments. The result names the plan.
uintptr_t add(const py::args& looks, const py::object& plan, const CallFacts& call, const std::pair<Shape, Shape>& out,
              const Shape& lse, const std::array<int64_t, 3>& rows) {
    Inputs in;
    Options options;
    Key key;
    TORCH_CHECK(looks.size() == ARGUMENTS, "expected ", int(ARGUMENTS), " arguments");
    if (!read(reinterpret_cast<PyTupleObject*>(looks.ptr())->ob_item, in, options, key)) return 0;
    if (const auto known = find(key)) return reinterpret_cast<uintptr_t>(known.get());
    std::shared_ptr<Plan> added(new Plan{key, Reference(plan), call_of(call), layout_of(out), lse, rows, {}, {}, 0});
    plans().emplace(key.hash(), added);
    return reinterpret_cast<uintptr_t>(added.get());
}

Plans::iterator named(uintptr_t name) {
    auto found = plans().begin();
    while (found != plans().end() && reinterpret_cast<uintptr_t>(found->second.get()) != name) ++found;
    return found;
}

void forget(uintptr_t name) {
    if (const auto found = named(name); found != plans().end()) plans().erase(found);
}

using OptionalTensor = std::optional<Tensor>;

// Serve backward passes of a plan that look like these tensors.
void add_backward(uintptr_t name, const std::array<OptionalTensor, 7>& looks, bool deterministic, bool bias_grad,
                  const CallFacts& call, const std::pair<Shape, Shape>& dq, const std::pair<Shape, Shape>& dk,
                  const std::pair<Shape, Shape>& dv) {
    const auto found = named(name);
    if (found == plans().end()) return;
    Key key;
    for (const OptionalTensor& tensor : looks) key.add(tensor.value_or(Tensor()));
    key.add(int64_t(deterministic) | int64_t(bias_grad) << 1);
    if (!key.fits()) return;
    Plan& plan = *found->second;
    std::shared_ptr<const BackwardPlan> added(
        new BackwardPlan{key, call_of(call), layout_of(dq), layout_of(dk), layout_of(dv)});
    const std::lock_guard<std::mutex> lock(plan.mutex);
    if (plan.backwards.size() < MAX_BACKWARDS) return plan.backwards.push_back(std::move(added));
    plan.backwards[plan.oldest].swap(added);
    plan.oldest = (plan.oldest + 1) % MAX_BACKWARDS;
}

}  // namespace

PYBIND11_MODULE(cosattn_host, module) {
    if (PyModule_AddFunctions(module.ptr(), FAST_METHODS) != 0) throw py::error_already_set();
    module.def("connect", [](uintptr_t stream, py::object gradients) {
        current_stream = reinterpret_cast<CurrentStream>(stream);
        python_gradients = new Reference(std::move(gradients));  // kept for good: a backward pass may be running
    });
    module.def("add", &add, py::kw_only(), py::arg("plan"), py::arg("call"), py::arg("out"), py::arg("lse"),
               py::arg("rows"));
    module.def("add_backward", &add_backward);
    module.def("forget", &forget);
    module.def("clear", [] { plans().clear(); });
    module.def("count", [] { return plans().size(); });
}
