/* @NAME@: a quantized network as C++ that stands alone, written by fxquant @VERSION@.
 *
 * A context belongs to one thread at a time; contexts of several threads share the weights. Nothing
 * here throws an exception; a function that can fail says how it tells.
 */
#ifndef @NAME@_H
#define @NAME@_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define @NAME@_MAX_RANK 8

enum @NAME@_type {
    @NAME@_UINT8 = 0,
    @NAME@_INT8 = 1,
    @NAME@_INT16 = 2,
    @NAME@_INT32 = 3,
    @NAME@_INT64 = 4,
    @NAME@_FLOAT32 = 5,
    @NAME@_BOOL = 6
};

/* A dense tensor: its last dimension lies next to each other in memory. */
typedef struct @NAME@_tensor {
    void* data;
    int32_t type; /* enum @NAME@_type */
    int32_t rank;
    int64_t shape[@NAME@_MAX_RANK];
} @NAME@_tensor;

typedef struct @NAME@_context @NAME@_context;

/* A context of the network whose weights are in a file. NULL where it cannot be made: then `error`,
 * which may be NULL, holds why, cut to `room` bytes. */
@NAME@_context* @NAME@_create(const char* weights, char* error, int64_t room);

/* Another context that shares the weights; NULL where memory is short. */
@NAME@_context* @NAME@_clone(const @NAME@_context* context);

void @NAME@_destroy(@NAME@_context* context);

int @NAME@_input_count(const @NAME@_context* context);
int @NAME@_output_count(const @NAME@_context* context);

/* Type, rank and shape of an input or output for a batch of one; `data` becomes NULL. 1, or 0 where
 * there is none of this number. */
int @NAME@_input(const @NAME@_context* context, int index, @NAME@_tensor* tensor);
int @NAME@_output(const @NAME@_context* context, int index, @NAME@_tensor* tensor);

/* 1 where shape[0] of all inputs and outputs may be any multiple of what these functions say. */
int @NAME@_any_batch(const @NAME@_context* context);

/* Computes the outputs, into memory of the caller, from all inputs. `threads` counts the caller; 0
 * takes $FXQUANT_NUM_THREADS, else as many as there are processors. 1, or 0 and `@NAME@_error` says
 * why: tensors that do not fit, or memory or threads that the system does not give. */
int @NAME@_run(@NAME@_context* context, const @NAME@_tensor* inputs, int input_count,
               const @NAME@_tensor* outputs, int output_count, int threads);

/* Why the last run of this context failed. */
const char* @NAME@_error(const @NAME@_context* context);

/* The instruction set that it runs on: portable, avx2, avxvnni, avx512vnni or amx. $FXQUANT_ISA
 * names a lower one than the processor has. */
const char* @NAME@_isa(const @NAME@_context* context);

#ifdef __cplusplus
}
#endif

#endif
