// @NAME@: the kernels that the network calls, and its interface (see model.h).
//
// Written by fxquant @VERSION@. Which kernel runs when, on which memory, is in weights.bin.
#include "model.h"

// Two networks in one program may come from two versions of the kernels.
#define fxquant @NAME@_kernels
#define FXQUANT_API [[maybe_unused]] static

@UNIT@

namespace {

using Context = fxquant::Context;
using Port = fxquant::Port;

const char* const TYPES[] = {"uint8", "int8", "int16", "int32", "int64", "float32", "bool"};
const int64_t SIZES[] = {1, 1, 2, 4, 8, 4, 1};

Context* open(@NAME@_context* context) { return reinterpret_cast<Context*>(context); }
const Context* open(const @NAME@_context* context) {
    return reinterpret_cast<const Context*>(context);
}

const Port& port_of(const Context& context, bool output, int index) {
    const auto& model = *context.model;
    return model.ports()[(output ? model.header->input_count : 0) + static_cast<uint64_t>(index)];
}

int count_of(const Context& context, bool output) {
    const auto& header = *context.model->header;
    return static_cast<int>(output ? header.output_count : header.input_count);
}

int describe(const Context& context, bool output, int index, @NAME@_tensor* tensor) {
    if (index < 0 || index >= count_of(context, output)) return 0;
    const Port& port = port_of(context, output, index);
    *tensor = @NAME@_tensor();
    tensor->type = port.type;
    tensor->rank = port.rank;
    for (int axis = 0; axis < port.rank; ++axis) tensor->shape[axis] = port.shape[axis];
    return 1;
}

std::string words(int type, int rank, const int64_t* shape, bool any_batch) {
    const bool known = type >= 0 && type < static_cast<int>(sizeof(TYPES) / sizeof(*TYPES));
    std::string text = known ? TYPES[type] : "type " + std::to_string(type);
    text += "[";
    for (int axis = 0; axis < rank && axis < @NAME@_MAX_RANK; ++axis) {
        if (axis) text += ", ";
        if (any_batch && !axis && shape[0] != 1) text += "multiple of ";
        text += any_batch && !axis && shape[0] == 1 ? "any" : std::to_string(shape[axis]);
    }
    return text + "]";
}

// Whether tensors fit; `batch` is -1 until the first that has samples tells how many.
bool fit(const Context& context, bool output, const @NAME@_tensor* tensors, int count,
         int64_t& batch, std::string& error) {
    const std::string kind = output ? "output" : "input";
    const int wanted = count_of(context, output);
    if (count != wanted) {
        error = "the network has " + std::to_string(wanted) + " " + kind + "s, found " +
                std::to_string(count);
        return false;
    }
    for (int index = 0; index < count; ++index) {
        const Port& port = port_of(context, output, index);
        const @NAME@_tensor& tensor = tensors[index];
        bool fits = tensor.type == port.type && tensor.rank == port.rank;
        int64_t elements = 1;
        for (int axis = 0; fits && axis < port.rank; ++axis) {
            const int64_t size = tensor.shape[axis];
            elements *= size;
            if (axis || !port.samples_each) {
                fits = size == port.shape[axis];
            } else {
                if (batch < 0 && size >= 0) batch = size / port.samples_each;
                fits = batch >= 0 && size == batch * port.samples_each;
            }
        }
        if (!fits) {
            error = kind + " " + std::to_string(index) + " is " +
                    words(tensor.type, tensor.rank, tensor.shape, false) + ", expected " +
                    words(port.type, port.rank, port.shape, port.samples_each != 0);
            if (batch >= 0) error += " for a batch of " + std::to_string(batch);
            return false;
        }
        if (elements && !tensor.data) {
            error = kind + " " + std::to_string(index) + " has no data";
            return false;
        }
        if (reinterpret_cast<uintptr_t>(tensor.data) % static_cast<uintptr_t>(SIZES[port.type])) {
            error = kind + " " + std::to_string(index) + " is not aligned to its elements of " +
                    std::to_string(SIZES[port.type]) + " bytes";
            return false;
        }
    }
    return true;
}

int default_threads() {
    const char* named = std::getenv("FXQUANT_NUM_THREADS");
    const int wanted = named ? std::atoi(named) : 0;
    return wanted > 0 ? wanted : static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace

extern "C" {

#define EXPORTED __attribute__((visibility("default")))

EXPORTED @NAME@_context* @NAME@_create(const char* weights, char* error, int64_t room) {
    return static_cast<@NAME@_context*>(fxquant_create(weights ? weights : "", error, room));
}

EXPORTED @NAME@_context* @NAME@_clone(const @NAME@_context* context) {
    return static_cast<@NAME@_context*>(fxquant_clone(context));
}

EXPORTED void @NAME@_destroy(@NAME@_context* context) { fxquant_destroy(context); }

EXPORTED int @NAME@_input_count(const @NAME@_context* context) {
    return count_of(*open(context), false);
}

EXPORTED int @NAME@_output_count(const @NAME@_context* context) {
    return count_of(*open(context), true);
}

EXPORTED int @NAME@_input(const @NAME@_context* context, int index, @NAME@_tensor* tensor) {
    return describe(*open(context), false, index, tensor);
}

EXPORTED int @NAME@_output(const @NAME@_context* context, int index, @NAME@_tensor* tensor) {
    return describe(*open(context), true, index, tensor);
}

EXPORTED int @NAME@_any_batch(const @NAME@_context* context) {
    return port_of(*open(context), false, 0).samples_each != 0;
}

EXPORTED int @NAME@_run(@NAME@_context* handle, const @NAME@_tensor* inputs, int input_count,
                        const @NAME@_tensor* outputs, int output_count, int threads) {
    Context& context = *open(handle);
    try {
        int64_t batch = -1;
        if (!fit(context, false, inputs, input_count, batch, context.error) ||
            !fit(context, true, outputs, output_count, batch, context.error))
            return 0;
        std::vector<const void*> sources;
        std::vector<void*> results;
        for (int i = 0; i < input_count; ++i) sources.push_back(inputs[i].data);
        for (int i = 0; i < output_count; ++i) results.push_back(outputs[i].data);
        return !fxquant_run(handle, batch < 0 ? 1 : batch, sources.data(), results.data(),
                            threads > 0 ? threads : default_threads());
    } catch (...) {  // Of the lists above; there may be no memory for a longer text.
        context.error.assign("no memory");
        return 0;
    }
}

EXPORTED const char* @NAME@_error(const @NAME@_context* context) { return fxquant_error(context); }

EXPORTED const char* @NAME@_isa(const @NAME@_context* context) { return fxquant_isa(context); }
}
