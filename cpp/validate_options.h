// The options of a call: terms of the score, exclusion, dropout, how to run. Each function reads
// its part of the arguments into the problem, which knows its tensors' shapes and device already.
#pragma once
#include "common/problem.h"
#include "flashcore/flashcore.h"

namespace flashcore {

void read_score_options(const flashcore_attention_args& args, Problem& p);
void read_run_options(const flashcore_attention_args& args, Problem& p);
void read_block_mask(const flashcore_block_mask& mask, Problem& p);
// A probability as a threshold of 2^16; 0 = no dropout.
uint32_t read_dropout(double dropout_p);

}  // namespace flashcore
