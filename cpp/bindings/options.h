// The keyword options of a call, read from Python into the C argument structure.
#pragma once
#include <vector>

#include "bindings/import.h"

namespace flashcore::python {

// One call's inputs and options. args points into the object, which must outlive its use.
struct Call {
  explicit Call(const char* name, nb::handle stream);

  void read_inputs(nb::handle q, nb::handle k, nb::handle v);
  // options: a dict of what the caller gave by keyword. Reads what was given and nothing else, so
  // an option costs nothing where it is not used.
  void read_options(nb::handle options);
  static nb::tuple option_names();

  Session session;
  flashcore_attention_args args{};
  Tensor q, k, v, bias, sinks;  // bias and sinks decide which gradients there are

 private:
  struct Option;
  struct Readers;
  static const Option kOptions[];

  const DLTensor* read_array(Tensor& tensor, const char* name, nb::handle value);
  void read_window(nb::handle value);
  void read_rng(nb::handle value);
  void read_block_mask(nb::handle value);

  double scale_;
  int64_t window_left_, window_right_, q_offset_, rng_[2];
  flashcore_block_mask block_mask_;
  std::vector<nb::object> block_mask_arrays_;  // a borrowed array must outlive the call
  Tensor q_offset_tensor_, alibi_slopes_, mask_, rng_tensor_;
  Tensor kv_num_blocks_, kv_indices_, q_num_blocks_, q_indices_;
  Tensor cu_seqlens_q_, cu_seqlens_k_, seqlens_q_, seqlens_k_;
  Tensor page_table_, q_descale_, k_descale_, v_descale_;
};

// Single values. A bool is no number, and an array is refused even where it could be converted:
// reading a number out of one can wait for a device.
bool read_bool(const char* call, const char* name, nb::handle value);
double read_double(const char* call, const char* name, nb::handle value);
int64_t read_int(const char* call, const char* name, nb::handle value);
int32_t read_int32(const char* call, const char* name, nb::handle value);
flashcore_layout read_layout(const char* call, nb::handle value);
void read_seed_and_offset(const char* call, nb::handle pair, int64_t rng[2]);

}  // namespace flashcore::python
