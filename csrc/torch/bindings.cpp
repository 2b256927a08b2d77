// Every op of this project: schema and kernels. Nothing else is registered in C++.
//
// No schema has default arguments (defaults live in the public Python functions). The linear_* ops are the
// chunk loops around torch's matrix product; fastft/ops registers their kernels, fakes and gradients. Row ops
// end in `_rows`: they work on one chunk of logits and write into it.
#include <torch/csrc/stable/library.h>

#include <stdexcept>

#include "ops.h"

STABLE_TORCH_LIBRARY(fastft, m) {
    // Of the CPU alone; a GPU has flash-attn's kernels.
    m.def(
        "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? "
        "seqused_k, Tensor? prefix_k, "
        "Tensor? prefix_v, float scale, bool is_causal) -> (Tensor out, Tensor lse)");
    m.def(
        "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor "
        "cu_seqlens_q, "
        "Tensor cu_seqlens_k, float scale, bool is_causal) -> (Tensor dq, Tensor dk, Tensor dv)");
    m.def(
        "log_softmax_kl(Tensor student_logits, Tensor teacher_logits, Tensor? weights, float temperature, "
        "str direction, float beta) -> (Tensor kl, Tensor stats)");
    m.def(
        "log_softmax_kl_backward(Tensor grad_kl, Tensor student_logits, Tensor teacher_logits, Tensor stats, "
        "float temperature, str direction, float beta) -> Tensor");
    m.def(
        "log_softmax_kl_rows(Tensor(a!) student_logits, Tensor teacher_logits, Tensor? weights, Tensor(b!) "
        "kl, "
        "float temperature, str direction, float beta, bool write_grad) -> ()");
    m.def(
        "topk_kl_rows(Tensor(a!) logits, Tensor ids, Tensor log_probs, Tensor? weights, Tensor(b!) kl, "
        "bool tail, float temperature, str direction, float beta, bool write_grad) -> ()");
    m.def(
        "cross_entropy_rows(Tensor(a!) logits, Tensor labels, Tensor(b!) nll, int ignore_index, "
        "bool write_grad) -> ()");
    // Ids outside [0, vocab) other than `ignore`, into a record in the host's memory (for CUDA's, pinned):
    // see fastft/index_check.h.
    m.def("index_check(Tensor index, int vocab, int ignore, int source, Tensor(a!) record) -> ()");
    // u = scaling x a^T; y += u b^T; u^T y, or with `transposed` y^T u; du = scaling y a^T and y^T u: see
    // fastft/lora_linear.h.
    m.def("lora_down(Tensor x, Tensor a, float scaling, Tensor(a!) u) -> ()");
    m.def("lora_up(Tensor(a!) y, Tensor u, Tensor b) -> ()");
    m.def("lora_outer(Tensor u, Tensor y, bool transposed) -> Tensor");
    m.def("lora_down_outer(Tensor y, Tensor a, float scaling, Tensor(a!) du, Tensor u) -> Tensor");
    // y = sum of a b^T, + bias; of a GPU with compute capability 9.0 alone: see fastft/summed_products.h.
    m.def("summed_products(Tensor[] a, Tensor[] b, Tensor? bias, Tensor(a!) y) -> ()");
    // A tile of a quantised weight: see fastft/dequantise.h.
    m.def(
        "dequantise_4bit(Tensor packed, Tensor code, Tensor absmax, Tensor? absmax_code, Tensor? "
        "absmax_scale, "
        "float absmax_offset, int block, int absmax_block, int first, Tensor(a!) out) -> ()");
    m.def("dequantise_8bit(Tensor values, Tensor scale, Tensor(a!) out) -> ()");
    // A weight as it is read: see fastft/quantise.h.
    m.def("quantise_4bit(Tensor x, Tensor bounds, int block, Tensor(a!) packed, Tensor(b!) absmax) -> ()");
    // One bit an element is all that backward needs: see fastft/relu.h.
    m.def("relu(Tensor x) -> (Tensor y, Tensor mask)");
    m.def("relu_backward(Tensor grad, Tensor mask) -> Tensor");
    // dweight is empty unless asked for: see fastft/rms_norm.h.
    m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
    m.def(
        "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, bool weight_grad) "
        "-> (Tensor dx, Tensor dweight)");
    // Its gradient is itself, transposed: see fastft/rotary.h.
    m.def("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transposed) -> (Tensor y_q, Tensor y_k)");
    m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
    m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)");
    m.def("row_reduce(Tensor values, Tensor? weights, bool mean) -> (Tensor out, Tensor row_scale)");

    m.def(
        "bias_adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
        "Tensor(d!)? scales, Tensor(e!)? master, Tensor(f!) steps, Tensor(g!) status, Tensor(h!) partials, "
        "Tensor(i!) tickets, Tensor plan, Tensor device_plan, float[] hyperparameters, Tensor? lr, "
        "Tensor? grad_scale, Tensor? found_inf, float max_grad_norm, bool skip_non_finite) -> ()");

    // -> the loss ([] or, with reduction none, [rows]); what each row's divergence is multiplied with in it;
    // d divergence / d hidden per row, and d loss / d weight, both empty unless asked for.
    m.def(
        "linear_log_softmax_kl(Tensor student_hidden, Tensor teacher_hidden, Tensor weight, "
        "Tensor? teacher_weight, Tensor? weights, float temperature, str direction, float beta, "
        "str reduction, int chunk_rows, bool hidden_grad, bool weight_grad) "
        "-> (Tensor loss, Tensor row_scale, Tensor hidden_grad, Tensor weight_grad)");
    m.def(
        "linear_topk_kl(Tensor student_hidden, Tensor weight, Tensor topk_ids, Tensor topk_log_probs, "
        "Tensor? weights, bool tail, float temperature, str direction, float beta, str reduction, "
        "int chunk_rows, bool hidden_grad, bool weight_grad) "
        "-> (Tensor loss, Tensor row_scale, Tensor hidden_grad, Tensor weight_grad)");
    m.def(
        "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, Tensor? weights, int "
        "ignore_index, "
        "str reduction, int chunk_rows, bool hidden_grad, bool weight_grad) "
        "-> (Tensor loss, Tensor row_scale, Tensor hidden_grad, Tensor weight_grad)");
}

#define FASTFT_IMPL(device)                                                             \
    STABLE_TORCH_LIBRARY_IMPL(fastft, device, m) {                                      \
        m.impl("log_softmax_kl", TORCH_BOX(&fastft::log_softmax_kl_forward));           \
        m.impl("log_softmax_kl_backward", TORCH_BOX(&fastft::log_softmax_kl_backward)); \
        m.impl("log_softmax_kl_rows", TORCH_BOX(&fastft::log_softmax_kl_rows));         \
        m.impl("topk_kl_rows", TORCH_BOX(&fastft::topk_kl_rows));                       \
        m.impl("cross_entropy_rows", TORCH_BOX(&fastft::cross_entropy_rows));           \
        m.impl("index_check", TORCH_BOX(&fastft::index_check));                         \
        m.impl("lora_down", TORCH_BOX(&fastft::lora_down));                             \
        m.impl("lora_up", TORCH_BOX(&fastft::lora_up));                                 \
        m.impl("lora_outer", TORCH_BOX(&fastft::lora_outer));                           \
        m.impl("lora_down_outer", TORCH_BOX(&fastft::lora_down_outer));                 \
        m.impl("dequantise_4bit", TORCH_BOX(&fastft::dequantise_4bit));                 \
        m.impl("dequantise_8bit", TORCH_BOX(&fastft::dequantise_8bit));                 \
        m.impl("relu", TORCH_BOX(&fastft::relu));                                       \
        m.impl("relu_backward", TORCH_BOX(&fastft::relu_backward));                     \
        m.impl("rms_norm", TORCH_BOX(&fastft::rms_norm));                               \
        m.impl("rms_norm_backward", TORCH_BOX(&fastft::rms_norm_backward));             \
        m.impl("rotary", TORCH_BOX(&fastft::rotary));                                   \
        m.impl("swiglu", TORCH_BOX(&fastft::swiglu));                                   \
        m.impl("swiglu_backward", TORCH_BOX(&fastft::swiglu_backward));                 \
        m.impl("row_reduce", TORCH_BOX(&fastft::row_reduce));                           \
        m.impl("bias_adamw", TORCH_BOX(&fastft::bias_adamw));                           \
    }

// One glue function serves both devices; which kernel it calls is the tensor's device.
FASTFT_IMPL(CPU)
STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
    m.impl("attention", TORCH_BOX(&fastft::attention));
    m.impl("attention_backward", TORCH_BOX(&fastft::attention_backward));
    m.impl("quantise_4bit", TORCH_BOX(&fastft::quantise_4bit));
}

#ifdef FASTFT_WITH_CUDA
FASTFT_IMPL(CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastft, CUDA, m) { m.impl("summed_products", TORCH_BOX(&fastft::summed_products)); }
#else
namespace {
void no_cuda(StableIValue*, uint64_t, uint64_t) {
    throw std::runtime_error(
        "fastft was built without CUDA; rebuild with FASTFT_CUDA=1 (nvcc must be on PATH)");
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastft, CUDA, m) {
    for (const char* op : {"log_softmax_kl",
                           "log_softmax_kl_backward",
                           "log_softmax_kl_rows",
                           "topk_kl_rows",
                           "cross_entropy_rows",
                           "index_check",
                           "lora_down",
                           "lora_up",
                           "lora_outer",
                           "lora_down_outer",
                           "summed_products",
                           "dequantise_4bit",
                           "dequantise_8bit",
                           "relu",
                           "relu_backward",
                           "rms_norm",
                           "rms_norm_backward",
                           "rotary",
                           "swiglu",
                           "swiglu_backward",
                           "row_reduce",
                           "bias_adamw"}) {
        m.impl(op, &no_cuda);
    }
}
#endif
