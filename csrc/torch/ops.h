// The functions that bindings.cpp registers. Shapes and dtypes are in the headers of csrc/include/fastft.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace fastft {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                     std::optional<Tensor> seqused_k, std::optional<Tensor> prefix_k,
                                     std::optional<Tensor> prefix_v, double scale, bool is_causal);
std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& lse,
                                                      const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                      double scale, bool is_causal);
std::tuple<Tensor, Tensor> log_softmax_kl_forward(const Tensor& student, const Tensor& teacher,
                                                  std::optional<Tensor> weights, double temperature,
                                                  std::string direction, double beta);
Tensor log_softmax_kl_backward(const Tensor& grad_kl, const Tensor& student, const Tensor& teacher,
                               const Tensor& stats, double temperature, std::string direction, double beta);
void log_softmax_kl_rows(Tensor student, const Tensor& teacher, std::optional<Tensor> weights, Tensor kl,
                         double temperature, std::string direction, double beta, bool write_grad);
void topk_kl_rows(Tensor logits, const Tensor& ids, const Tensor& log_probs, std::optional<Tensor> weights,
                  Tensor kl, bool tail, double temperature, std::string direction, double beta,
                  bool write_grad);
void cross_entropy_rows(Tensor logits, const Tensor& labels, Tensor nll, int64_t ignore_index,
                        bool write_grad);
void lora_down(const Tensor& x, const Tensor& a, double scaling, Tensor u);
void lora_up(Tensor y, const Tensor& u, const Tensor& b);
Tensor lora_outer(const Tensor& u, const Tensor& y, bool transposed);
Tensor lora_down_outer(const Tensor& y, const Tensor& a, double scaling, Tensor du, const Tensor& u);
void summed_products(std::vector<Tensor> a, std::vector<Tensor> b, std::optional<Tensor> bias, Tensor y);
void index_check(const Tensor& index, int64_t vocab, int64_t ignore, int64_t source, Tensor record);
void dequantise_4bit(const Tensor& packed, const Tensor& code, const Tensor& absmax,
                     std::optional<Tensor> absmax_code, std::optional<Tensor> absmax_scale,
                     double absmax_offset, int64_t block, int64_t absmax_block, int64_t first, Tensor out);
void quantise_4bit(const Tensor& x, const Tensor& bounds, int64_t block, Tensor packed, Tensor absmax);
void dequantise_8bit(const Tensor& values, const Tensor& scale, Tensor out);
std::tuple<Tensor, Tensor> relu(const Tensor& x);
Tensor relu_backward(const Tensor& grad, const Tensor& mask);
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps);
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd, bool weight_grad);
std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                  bool transposed);
Tensor swiglu(const Tensor& gate, const Tensor& up);
std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up);
std::tuple<Tensor, Tensor> row_reduce(const Tensor& values, std::optional<Tensor> weights, bool mean);
void bias_adamw(std::vector<Tensor> params, std::vector<Tensor> grads, Tensor exp_avg, Tensor exp_avg_sq,
                std::optional<Tensor> scales, std::optional<Tensor> master, Tensor steps, Tensor status,
                Tensor partials, Tensor tickets, const Tensor& plan, const Tensor& device_plan,
                std::vector<double> hyperparameters, std::optional<Tensor> lr,
                std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, double max_grad_norm,
                bool skip_non_finite);

}  // namespace fastft
