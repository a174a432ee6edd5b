// The C contract between a caller (Python's ctypes, or any other runtime) and the compiled backends.
//
// One struct describes a whole batch, and another one a change of histories: pointers, element strides,
// sizes. Nothing here knows torch or Python. Within a version fields are only ever appended: a caller states
// the size of the struct that it was compiled with, and fields past that size read as zero, which is "off"
// for every one of them.
#ifndef LLM_SAMPLING_H_
#define LLM_SAMPLING_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LLM_SAMPLING_ABI_VERSION 3
#define LLM_SAMPLING_MAX_VOCAB_SIZE (1 << 20)
#define LLM_SAMPLING_MAX_EXTRA_OUTPUT 64
#define LLM_SAMPLING_MAX_LISTED 1024  // the largest num_top_logprobs and kept.max_ids

// Values of LlmSamplingArgs.dtype.
enum { LLM_SAMPLING_FLOAT32 = 0, LLM_SAMPLING_FLOAT16 = 1, LLM_SAMPLING_BFLOAT16 = 2 };

// Values of LlmSamplingArgs.advance.
enum {
  LLM_SAMPLING_ADVANCE_NEVER = 0,
  LLM_SAMPLING_ADVANCE_ALWAYS = 1,
  LLM_SAMPLING_ADVANCE_IF_ALL_VALID = 2  // only if the status of every row is 0
};

// Values of LlmSamplingArgs.position_of: what an entry of `position` belongs to.
enum {
  LLM_SAMPLING_POSITION_OF_ROW = 0,
  LLM_SAMPLING_POSITION_OF_SLOT = 1,
  // An entry for each row, which is the place in the whole text of the token whose logits these are: the
  // row's position is position[row] + 1 - prompt_lengths[slot]. It is not advanced.
  LLM_SAMPLING_POSITION_OF_TEXT = 2
};

// Bits of LlmSamplingArgs.status.
enum {
  LLM_SAMPLING_STATUS_NAN = 1,
  LLM_SAMPLING_STATUS_NO_CANDIDATE = 2,
  LLM_SAMPLING_STATUS_POS_INF = 4,
  LLM_SAMPLING_STATUS_TEXT_FULL = 8
};

// What an entry point returns; 0 is success. Nothing has been written where it is not 0, except that
// after OUT_OF_MEMORY the outputs (not the state) may be half written.
enum {
  LLM_SAMPLING_OK = 0,
  LLM_SAMPLING_BAD_STRUCT = 1,
  LLM_SAMPLING_BAD_SIZE = 2,
  LLM_SAMPLING_BAD_OPTION = 3,
  LLM_SAMPLING_NULL_POINTER = 4,
  LLM_SAMPLING_BAD_STRIDE = 5,
  LLM_SAMPLING_MISALIGNED = 6,
  LLM_SAMPLING_BAD_PARAMETER = 7,
  LLM_SAMPLING_OUT_OF_MEMORY = 8,
  LLM_SAMPLING_OVERLAP = 9
};

// Logprobs of one kind, all arrays contiguous; NULL for each that is not wanted. A row without a token gets
// NaN and -1. A token's rank is its place in the order, from 1: -1 if it has none.
typedef struct LlmSamplingLogprobs {
  float* logprobs;  // (rows, num_samples), of the tokens
  int32_t* ranks;   // (rows, num_samples)
  int32_t*
      top_ids;  // (rows, num_top_logprobs), the first ids of the order; -1 where there are fewer
  float* top_logprobs;  // (rows, num_top_logprobs); NaN where there is no id
  float* id_logprobs;   // (rows, num_token_ids); -inf for an id without a rank, NaN for padding
  int32_t* id_ranks;    // (rows, num_token_ids)
} LlmSamplingLogprobs;

// What steps 8 to 13 keep, all arrays contiguous; NULL for each that is not wanted. A row without a token
// has kept nothing: its numbers are 0, its ids -1 and its logits NaN.
typedef struct LlmSamplingKept {
  int32_t* counts;     // (rows,): how many tokens
  int64_t* total;      // (rows,): their mass
  int64_t* masses;     // (rows, num_samples): the masses of the tokens
  int64_t* id_masses;  // (rows, num_token_ids): 0 for ids that are not kept
  int32_t* mask;       // (rows, ceil(vocab_size / 32)), a bitmask like allowed_mask
  int32_t* ids;        // (rows, max_ids), in their order, then -1; all -1 where there are more
  int32_t* first_id;   // (rows,): the first token of the order
  float* first_logit;  // (rows,): its logit after step 6
  int32_t* last_id;    // (rows,): the last one that is kept
  float* last_logit;   // (rows,): its logit after step 6
  int64_t max_ids;     // 0 .. LLM_SAMPLING_MAX_LISTED
} LlmSamplingKept;

// Strides are in elements, from row to row; elements of a row are adjacent.
typedef struct LlmSamplingArgs {
  uint32_t struct_size;  // sizeof(LlmSamplingArgs) where the caller was compiled
  uint32_t version;      // LLM_SAMPLING_ABI_VERSION

  int64_t rows;
  int64_t vocab_size;
  int32_t dtype;
  int32_t num_samples;       // draws per row, >= 1
  int32_t num_top_logprobs;  // 0 .. LLM_SAMPLING_MAX_LISTED
  int32_t advance;           // record tokens in seen, counts, lengths and position
  int32_t num_threads;       // >= 1; CPU only
  int32_t position_of;

  const void* logits;  // (rows, vocab_size), never written
  int64_t logits_stride;

  // Parameters, (rows,) each; with param_slots (num_param_slots,) each.
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* min_p_cut;  // fl32(2^-18 - log2(min_p)); infinity where min-p is off
  const float* repetition_penalty;
  const float* frequency_penalty;
  const float* presence_penalty;
  const int32_t* min_tokens_to_keep;
  const int64_t* seed;
  int64_t* position;  // as position_of says; written where advance says so

  // Sparse bias: row r owns entries [offsets[r], offsets[r + 1]); NULL offsets: no bias. A value is finite,
  // or -infinity, which bans the token.
  const int64_t* logit_bias_offsets;  // (rows + 1,), rising, each in 0 .. logit_bias_size
  const int32_t* logit_bias_ids;      // (logit_bias_size,)
  const float* logit_bias_values;     // (logit_bias_size,)
  int64_t logit_bias_size;

  const int32_t* allowed_mask;  // (rows, ceil(vocab_size / 32)), bit set = allowed; NULL: all are
  int64_t allowed_mask_stride;

  // Token history by slot; NULL seen: no penalties. Where rows with parameters of their own advance, no two
  // share a slot.
  int32_t* seen;  // (num_slots, ceil(vocab_size / 32)): in prompt or output
  int64_t seen_stride;
  int32_t* counts;  // (num_slots, vocab_size): times in the output
  int64_t counts_stride;
  int64_t* lengths;      // (num_slots,): length of the output
  const int32_t* slots;  // (rows,), each in 0 .. num_slots - 1
  int64_t num_slots;

  // Results. tokens and status go together, and all others but filtered need them; each other may be NULL.
  // What is written, results and state, overlaps nothing else.
  int64_t* tokens;  // (rows, num_samples), contiguous; -1 without candidates
  int32_t* status;  // (rows,)
  float* filtered;  // (rows, vocab_size): processed logits over temperature, -inf if cut
  int64_t filtered_stride;
  LlmSamplingLogprobs processed;  // of the distribution that the tokens were drawn from
  LlmSamplingLogprobs raw;        // of the softmax of the logits of step 1, NaN counting as -inf
  LlmSamplingKept kept;
  const int32_t*
      token_ids;  // (rows, num_token_ids), for id_logprobs and others; a stride of 0: one row for all
  int64_t token_ids_stride;
  int64_t num_token_ids;  // ids outside of the vocabulary are padding

  // Parameters of slots: row r has those of slot param_slots[r], which rows may share. A row whose slot is
  // -1 is padding: its logits are not read, its token is -1 and its status 0. Any other slot that does not
  // exist leaves no candidate. Only a row whose slot no other row names is advanced, and of several rows
  // with one slot in `slots` none is.
  const int32_t* param_slots;  // (rows,); NULL: row r has the parameters at index r
  int64_t num_param_slots;
  const int32_t*
      logit_bias_counts;  // (num_param_slots,); slot s owns entries [offsets[s], offsets[s] + counts[s])
  const int64_t* prompt_lengths;  // (num_param_slots,), for POSITION_OF_TEXT

  // The ids of prompt and output in order, by slot of the history, so text_lengths[slot] of them; the first
  // text_prompt_lengths[slot] are the prompt's. NULL text: they are not kept. A row that is to be recorded
  // in a slot with max_text_length ids draws nothing, and its status is TEXT_FULL.
  int32_t* text;  // (num_slots, max_text_length), contiguous
  int64_t max_text_length;
  int64_t* text_lengths;               // (num_slots,)
  const int64_t* text_prompt_lengths;  // (num_slots,)

  // seen and counts are those of the last windows[slot] ids of the text, of all ids where it is negative.
  const int32_t* windows;  // (num_slots,); NULL: they are those of all ids
  const uint8_t* record;   // (rows,): 0 where a row is not recorded; NULL: all are

  // Which tokens the repetition penalty is for: 0 those of prompt and output, 1 those of the output.
  const int32_t* repetition_penalty_scope;  // like the other parameters; NULL: 0

  // Ids that come next in the output of the rows' histories, for this call alone; they need the history.
  // Those outside of the vocabulary are padding.
  const int32_t* extra_output;  // (rows, num_extra_output), contiguous; NULL: there are none
  int64_t num_extra_output;     // 0 .. LLM_SAMPLING_MAX_EXTRA_OUTPUT

  // CUDA only: memory with which a row is divided among more blocks; NULL: there is none. Its first 8 * rows
  // bytes are 0 before a call, and 0 again after it. Calls that may run at the same time need workspaces of
  // their own.
  void* workspace;
  int64_t workspace_bytes;  // at least what llm_sampling_cuda_workspace says

  // Rules that look at the history, like the other parameters: those of DRY, n-grams and bad words at its text,
  // without which they see no ids, and min_tokens at `lengths`. They need seen. NULL dry_multiplier: no row has
  // one.
  const float* dry_multiplier;
  const float* dry_base;
  const int32_t* dry_allowed_length;
  const int32_t* dry_penalty_last_n;  // negative: all ids
  const int32_t* no_repeat_ngram_size;
  const int32_t* no_repeat_ngram_window;  // 0: all ids
  const int32_t* min_tokens;

  // Their token sequences, as sparse as the biases: records, one after the other, of a kind, the number of ids,
  // and the ids. NULL offsets: there are none.
  const int64_t* sequence_offsets;  // (rows + 1,), rising, each in 0 .. sequences_size
  const int32_t* sequence_counts;   // (num_param_slots,), with param_slots
  const int32_t* sequences;
  int64_t sequences_size;

  // Where the logits are a slice of a vocabulary: logit i belongs to the id first_id + i, and the vocabulary has
  // whole_vocab_size ids. The rules take the text, extra_output and the token sequences as ids of the vocabulary.
  // Both are 0 where the logits are those of the whole vocabulary.
  int64_t first_id;
  int64_t whole_vocab_size;

  // CUDA only: memory for the lists of step 5a, which tell what the rules lower, and by how much. Needed where
  // there are rules, for one call at a time; all arrays are contiguous. The amount of a token whose bit is set is
  // at the place that list_before has for its word, plus the number of bits below its own in that word.
  // list_capacity is at least vocab_size, or max_text_length (with a text), MAX_EXTRA_OUTPUT and the numbers of a
  // row's records together; numbers of records beyond it are not read.
  int32_t* list_bits;    // (rows, ceil(vocab_size / 32)): the bit of each listed token is set
  int32_t* list_before;  // (rows, ceil(vocab_size / 32)): how many are listed in the words before
  int32_t* list_counts;  // (rows,): how many tokens are listed
  float* list_amounts;   // (rows, list_capacity): what is subtracted; infinity bans the token
  int64_t list_capacity;
} LlmSamplingArgs;

// Kinds of the records of `sequences`.
enum {
  LLM_SAMPLING_BREAKER_IDS = 0,  // each id is a breaker of DRY; rising
  LLM_SAMPLING_BREAKER = 1,      // the ids are a breaker of DRY
  LLM_SAMPLING_BAD_WORD = 2,     // its last id is banned where the others are the end of the text
  LLM_SAMPLING_STOP_IDS = 3      // banned until the output has min_tokens ids
};

// Values of LlmSamplingUpdate.kind: what happens to the history of a row's slot.
enum {
  LLM_SAMPLING_UPDATE_APPEND = 0,   // the ids come next in its output
  LLM_SAMPLING_UPDATE_FILL = 1,     // its prompt and output become the ids
  LLM_SAMPLING_UPDATE_ROLLBACK = 2  // the last ids of its output are taken away
};

// A change of histories by ids that were not drawn. An id outside of the vocabulary is padding and is left
// out; so are ids for which a text has no room. A row whose slot is not in 0 .. num_slots - 1 changes
// nothing. No two rows may have the same slot.
typedef struct LlmSamplingUpdate {
  uint32_t struct_size;  // sizeof(LlmSamplingUpdate) where the caller was compiled
  uint32_t version;      // LLM_SAMPLING_ABI_VERSION

  int64_t rows;
  int64_t vocab_size;
  int32_t kind;
  int32_t id_bytes;      // 4: ids are int32; 8: int64
  const int32_t* slots;  // (rows,)

  // numbers[row] of the row's ids, its first ones, are added, or so many ids are taken away. For FILL the
  // first prompt_lengths[row] of them are the prompt.
  const int32_t* numbers;  // (rows,)
  const void* ids;         // (rows, max_ids); ROLLBACK reads none
  int64_t ids_stride;
  int64_t max_ids;
  const int32_t* prompt_lengths;  // (rows,); NULL: 0

  // position[slot], or position[row], grows by the number of ids that are appended and falls by that of ids
  // that are taken away; FILL makes it the length of the output. NULL: there is none.
  int64_t* position;
  int32_t position_of;  // LLM_SAMPLING_POSITION_OF_ROW or _OF_SLOT
  int32_t reserved;     // 0

  // The histories, as in LlmSamplingArgs. ROLLBACK and windows need the text.
  int32_t* seen;
  int64_t seen_stride;
  int32_t* counts;
  int64_t counts_stride;
  int64_t* lengths;
  int64_t num_slots;
  int32_t* text;
  int64_t max_text_length;
  int64_t* text_lengths;
  int64_t* text_prompt_lengths;
  const int32_t* windows;
} LlmSamplingUpdate;

// Sample every row on the CPU. Thread-safe; state is written after the last row is done.
int32_t llm_sampling_cpu(const LlmSamplingArgs* args);

// Change histories on the CPU. Calls that change the same slot must come one after the other.
int32_t llm_sampling_cpu_update(const LlmSamplingUpdate* update);

// Call it in a process that was forked before the library was loaded, as its parent may have used
// OpenMP, whose threads are gone; the library hears of later forks by itself.
void llm_sampling_cpu_forked(void);

// The same on the current CUDA device, whose memory the pointers point to (the struct itself is the
// host's): one launch on the stream, a cudaStream_t, and no wait for it; with rules that look at the history
// one more before it, which makes the lists of step 5a. IF_ALL_VALID is a BAD_OPTION:
// one block knows of one row. The values of rows (parameters, slots, biases, bias ids in order) are not
// checked, but no value makes it read or write beyond the lengths that the struct states.
// Codes from 1000 on are 1000 and CUDA's own.
int32_t llm_sampling_cuda(const LlmSamplingArgs* args, void* stream);

// The same as llm_sampling_cpu_update on the current CUDA device, as llm_sampling_cuda does it.
int32_t llm_sampling_cuda_update(const LlmSamplingUpdate* update, void* stream);

// The bytes of the workspace with which a call of this size is faster on the current CUDA device, a multiple of
// 8; 0 where it would make no use of one.
int32_t llm_sampling_cuda_workspace(
    int64_t rows,
    int64_t vocab_size,
    int32_t dtype,
    int64_t* bytes
);

// What a call of this size with a workspace takes on the current CUDA device: blocks of a row, 1 if each copies
// its part of the row, 1 if they are no cluster.
int32_t llm_sampling_cuda_shape(int64_t rows, int64_t vocab_size, int32_t dtype, int32_t shape[3]);

// 0 if the library has code for this device, and its driver is new enough; else CUDA's reason, as above. It
// makes no context.
int32_t llm_sampling_cuda_usable(int32_t device);

// LLM_SAMPLING_ABI_VERSION, sizeof(LlmSamplingArgs) and sizeof(LlmSamplingUpdate) of this library.
uint32_t llm_sampling_abi_version(void);
uint32_t llm_sampling_args_size(void);
uint32_t llm_sampling_update_size(void);

// What a return code means, in words; never NULL.
const char* llm_sampling_error(int32_t code);

#ifdef __cplusplus
}
#endif

#endif  // LLM_SAMPLING_H_
