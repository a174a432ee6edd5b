// Makes the lists of step 5a for the cases that stdin holds, and writes them to stdout; test_penalty_lists.py
// has the format.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../../csrc/cpu/sequence_rules.h"

namespace {

bool read(int32_t* to, size_t count) {
  return std::fread(to, sizeof(int32_t), count, stdin) == count;
}

void write(const void* from, size_t count) { std::fwrite(from, sizeof(int32_t), count, stdout); }

float as_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace

int main() {
  // vocabulary, output length, the numbers of SequenceRules, ids of the text, extra ids, words of the sequences, the
  // first id and the size of the slice
  int32_t head[14];
  llm_sampling::PenaltyList list;
  while (read(head, 14)) {
    std::vector<int32_t> text(static_cast<size_t>(head[9]));
    std::vector<int32_t> extra(static_cast<size_t>(head[10]));
    std::vector<int32_t> sequences(static_cast<size_t>(head[11]));
    if (!read(text.data(), text.size()) || !read(extra.data(), extra.size()) ||
        !read(sequences.data(), sequences.size())) {
      return 1;
    }
    const llm_sampling::SequenceRules rules = {
        as_float(head[2]),
        as_float(head[3]),
        head[4],
        head[5],
        head[6],
        head[7],
        head[8],
        {sequences.data(), sequences.data() + sequences.size()},
    };
    const llm_sampling::VocabSlice slice = {head[12], head[13], head[0]};
    const llm_sampling::RowIds ids(text.data(), head[9], extra.data(), head[10], slice);
    list.make(rules, ids, head[1], slice);
    const int32_t size = static_cast<int32_t>(list.size());
    write(&size, 1);
    write(list.ids(), static_cast<size_t>(size));
    write(list.amounts(), static_cast<size_t>(size));
  }
  return 0;
}
