// THE kernel on the CPU. The arithmetic is in ../semantics.h; step numbers are docs/semantics.md's.
// tile.h has the values of a row, passes.h every loop over tiles (simd_x86.h two of them), select.h
// lists and estimates.
//
// Work: one thread owns a row; a lone row is split over threads by tiles. A row is read in tiles of
// 512 tokens; a tile is widened, biased, masked and penalised (steps 1 to 5) into 2 KiB of the stack,
// or read in place where none of that is needed. No copy of the row is kept.
//
// Passes over the row:
//   maxima       every row: the maximum of each tile and of each of its 16 groups (tokens j = g mod 16).
//   (no more)    greedy, and top-k: the k-th largest group maximum bounds the k-th largest logit from
//                below, so only the few tiles that reach it are looked at again. Where the penalties
//                only lower, the maxima are those before them, and only candidates are penalised.
//   mass         top-p, or no filter: the mass of every tile, exact in two int32 halves.
//   mass, split  top-p on a flat row: the mass above a cut estimated from a sample as well; the tokens
//                between the estimate and the exact cut are then few.
//   band         the same row: those tokens.
// What is left to choose from is a short list in token-id order; a bisection by exact counts, or a radix
// select with exact masses, finds a cut in it, in linear time, whatever the ties.
//
// A kept set is a prefix of the order, so a Cut (a logit, and the last id that is kept among its
// equals) says it all. Estimates choose only where to look: every decision is on exact integers.
//
// Hazards: NaN is never made canonical; every comparison is written so that NaN is not a candidate.
// Loops marked LLM_SAMPLING_CLONES are vectorised by the compiler, once per instruction set. Flags
// that this file needs: -ffp-contract=off -fno-trapping-math -fno-math-errno.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>

#include "../llm_sampling.h"
#include "../semantics.h"
#include "../validate.h"
#include "passes.h"
#include "select.h"
#include "thread_pool.h"
#include "tile.h"

namespace llm_sampling {
namespace {

// Memory that grows and is not touched before it is used.
template <typename T>
class Buffer {
 public:
  T* at_least(int64_t size) {
    if (size > size_) {
      data_.reset(new T[static_cast<size_t>(size)]);
      size_ = size;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<T[]> data_;
  int64_t size_ = 0;
};

struct Workspace {
  Buffer<float> group_max, tile_max, maxima, sample_depth, sample_mass, list_x, bias_values;
  Buffer<int64_t> tile_mass, tile_kept, list_w, weights, bias_order;
  Buffer<uint32_t> list_id, keys;
  Buffer<int32_t> bias_ids, bins;
  Histogram histogram;
};

// ---- One row -------------------------------------------------------------------------------------

class RowSampler {
 public:
  RowSampler(const LlmSamplingArgs& args, Workspace& workspace, int threads)
      : args_(args), ws_(workspace), threads_(threads) {}

  // Everything for one row but the state, which `advance` writes.
  void run(int64_t index) {
    row_ = make_row(index);
    tiles_ = row_.tiles();
    status_ = 0;
    listed_ = false;
    if (!find_penalised_late(index)) {
      find_maxima(row_);
      find_kept(index);
    }
    if (args_.filtered != nullptr) filter(index);
    if (args_.tokens == nullptr) return;
    draw(index);
    if (args_.logprobs_mode == LLM_SAMPLING_LOGPROBS_RAW) write_raw_logprobs(index);
    args_.status[index] = status_;
  }

 private:
  Row make_row(int64_t index);
  void find_maxima(const Row& row);
  bool find_penalised_late(int64_t index);
  void find_kept(int64_t index);
  int64_t top_k_of(int64_t index) const;

  void keep_nothing();
  void keep_first();
  void keep_top_k_of_list(int64_t index, int64_t k);
  void keep_at_least(int64_t k);
  void keep_top_p(float top_p, float low, int64_t at_least);
  void keep_flat_nucleus(float top_p, float guess, float low, int64_t at_least);
  void keep_from(float low, int64_t at_least);
  void keep_every_candidate();
  void keep_list();

  float bound_of_first(int64_t k);
  int64_t gather(const Row& row, float from, float to = kInfinity);
  void drop_below(float bound);
  void shorten_list(int64_t size);
  void shorten_list_to(LastKept last);
  LastKept where_reached(int64_t target);
  void start_list();
  void finish_list(int64_t target, float low, int64_t at_least);
  int64_t weigh_list();

  float lowest_kept(int64_t index) const;
  float lowest_within(float depth_limit) const;
  int64_t total(const int64_t* tile_mass) const;
  int64_t mass_of_row();
  int64_t count_kept();

  void filter(int64_t index);
  void draw(int64_t index);
  void write_raw_logprobs(int64_t index);

  // part(begin, end) for ranges that cover all tiles, on all threads.
  template <typename F>
  void over_tiles(const F& part);

  const LlmSamplingArgs& args_;
  Workspace& ws_;
  const int threads_;

  Row row_ = {};
  int64_t tiles_ = 0;
  int32_t status_ = 0;
  float* group_max_ = nullptr;
  float* tile_max_ = nullptr;

  // The kept set: its cut, its mass, and either its tokens or the kept mass of each tile.
  Cut cut_ = {};
  int64_t mass_ = 0;
  bool listed_ = false;
  List list_ = {};
  int64_t* tile_kept_ = nullptr;
};

template <typename F>
void RowSampler::over_tiles(const F& part) {
  constexpr int64_t kLeast = 16;  // tiles that are worth another thread
  // more parts than threads, since a worker may come late
  const int64_t wanted = threads_ > 1 ? 4 * threads_ : 1;
  const int64_t parts = std::min<int64_t>(wanted, std::max<int64_t>(1, tiles_ / kLeast));
  struct Context {
    const F& part;
    int64_t tiles, parts;
  } context{part, tiles_, parts};
  Pool::run(
      parts,
      threads_,
      [](void* opaque, int64_t i) {
        const Context& c = *static_cast<Context*>(opaque);
        c.part(c.tiles * i / c.parts, c.tiles * (i + 1) / c.parts);
      },
      &context
  );
}

Row RowSampler::make_row(int64_t index) {
  Row row = {};
  const int64_t element_size = args_.dtype == LLM_SAMPLING_FLOAT32 ? 4 : 2;
  row.logits = static_cast<const char*>(args_.logits) + index * args_.logits_stride * element_size;
  row.dtype = args_.dtype;
  row.vocab_size = args_.vocab_size;
  row.scale = depth_scale(args_.temperature[index]);

  if (args_.logit_bias_offsets != nullptr) {
    const int64_t begin = args_.logit_bias_offsets[index];
    row.bias_count = args_.logit_bias_offsets[index + 1] - begin;
    row.bias_ids = args_.logit_bias_ids + begin;
    row.bias_values = args_.logit_bias_values + begin;
    if (!std::is_sorted(row.bias_ids, row.bias_ids + row.bias_count)) {
      int64_t* order = ws_.bias_order.at_least(row.bias_count);
      int32_t* ids = ws_.bias_ids.at_least(row.bias_count);
      float* values = ws_.bias_values.at_least(row.bias_count);
      for (int64_t i = 0; i < row.bias_count; ++i) order[i] = i;
      std::stable_sort(order, order + row.bias_count, [&](int64_t a, int64_t b) {
        return row.bias_ids[a] < row.bias_ids[b];
      });
      for (int64_t i = 0; i < row.bias_count; ++i) {
        ids[i] = row.bias_ids[order[i]];
        values[i] = row.bias_values[order[i]];
      }
      row.bias_ids = ids;
      row.bias_values = values;
    }
  }
  if (args_.allowed_mask != nullptr) {
    row.allowed =
        reinterpret_cast<const uint32_t*>(args_.allowed_mask + index * args_.allowed_mask_stride);
  }
  row.repetition_penalty = args_.repetition_penalty[index];
  row.frequency_penalty = args_.frequency_penalty[index];
  row.presence_penalty = args_.presence_penalty[index];
  const bool penalised = row.repetition_penalty != 1.0f || row.frequency_penalty != 0.0f ||
                         row.presence_penalty != 0.0f;
  if (args_.seen != nullptr && penalised) {
    const int64_t slot = args_.slots[index];
    row.seen = reinterpret_cast<const uint32_t*>(args_.seen + slot * args_.seen_stride);
    if (row.frequency_penalty != 0.0f || row.presence_penalty != 0.0f) {
      row.counts = args_.counts + slot * args_.counts_stride;
    }
  }
  return row;
}

void RowSampler::find_maxima(const Row& row) {
  group_max_ = ws_.group_max.at_least(tiles_ * kGroups);
  tile_max_ = ws_.tile_max.at_least(tiles_);
  std::atomic<bool> nan{false};
  over_tiles([&](int64_t begin, int64_t end) {
    if (scan_maxima(row, begin, end, group_max_, tile_max_) && has_nan(row, begin, end)) {
      nan.store(true, std::memory_order_relaxed);
    }
  });
  if (nan.load(std::memory_order_relaxed)) status_ |= LLM_SAMPLING_STATUS_NAN;
  row_.m = *std::max_element(tile_max_, tile_max_ + tiles_) + 0.0f;  // not -0.0
}

// How many step 11 keeps, 1 where step 8 keeps the first; 0 where all.
int64_t RowSampler::top_k_of(int64_t index) const {
  if (args_.temperature[index] == 0.0f) return 1;
  const int64_t k = args_.top_k[index];
  const int64_t kept = k > 0 ? std::max<int64_t>(k, args_.min_tokens_to_keep[index]) : 0;
  return kept < row_.vocab_size ? kept : 0;
}

// Steps 3 to 13 where top-k is on and the penalties only lower: the penalised logit of a token is at
// most its logit before. So of those before, only the tokens from some bound on are looked at, and only
// they are penalised; if k of them are still at or above the bound, the first k of the order are among
// them. What a history costs then does not grow with it. False where that is not so, or too many tokens
// would have to be tried.
bool RowSampler::find_penalised_late(int64_t index) {
  const int64_t k = top_k_of(index);
  const bool lowers = row_.seen != nullptr && row_.repetition_penalty >= 1.0f &&
                      row_.frequency_penalty >= 0.0f && row_.presence_penalty >= 0.0f;
  if (k == 0 || !lowers) return false;

  Row before = row_;
  before.seen = nullptr;
  find_maxima(before);
  for (int64_t tried = k + k / 4 + 16; tried <= row_.vocab_size / 8; tried *= 4) {
    const float bound = bound_of_first(tried);
    gather(before, bound);
    penalise_list(row_, list_.x, list_.id, list_.size);
    drop_below(bound);
    if (list_.size < k && bound > kLowest) continue;
    if (list_.size == 0) {
      status_ |= LLM_SAMPLING_STATUS_NO_CANDIDATE;
      keep_nothing();
      return true;
    }
    float least;
    find_ends(list_.x, list_.size, least, row_.m);
    row_.m += 0.0f;  // not -0.0
    if (row_.m == kInfinity) status_ |= LLM_SAMPLING_STATUS_POS_INF;
    keep_top_k_of_list(index, k);
    return true;
  }
  return false;
}

// Steps 7 to 13.
void RowSampler::find_kept(int64_t index) {
  if (row_.m == -kInfinity) {
    status_ |= LLM_SAMPLING_STATUS_NO_CANDIDATE;
    return keep_nothing();
  }
  if (row_.m == kInfinity) status_ |= LLM_SAMPLING_STATUS_POS_INF;

  const int64_t at_least = args_.min_tokens_to_keep[index];
  const float top_p = args_.top_p[index];
  const int64_t k = top_k_of(index);
  if (k == 1) return keep_first();
  if (k > 0) {
    gather(row_, bound_of_first(k));
    return keep_top_k_of_list(index, k);
  }
  const float low = lowest_kept(index);
  if (top_p < 1.0f) {
    keep_top_p(top_p, low, at_least);
  } else if (low > kLowest) {
    keep_from(low, at_least);
  } else {
    keep_every_candidate();
  }
}

// 13 as a bound on x, so that it is a prefix of the order like the others.
float RowSampler::lowest_kept(int64_t index) const {
  const float cut = depth_cut(args_, index);
  return cut < kInfinity ? lowest_within(cut) : kLowest;
}

// The smallest x whose depth is at most the limit.
float RowSampler::lowest_within(float depth_limit) const {
  uint32_t inside = order_key(row_.m);
  uint32_t outside = order_key(kLowest) - 1;
  while (inside - outside > 1) {
    const uint32_t middle = outside + (inside - outside) / 2;
    const bool within = depth(from_order_key(middle), row_.m, row_.scale) <= depth_limit;
    (within ? inside : outside) = middle;
  }
  return from_order_key(inside);
}

int64_t RowSampler::total(const int64_t* tile_mass) const {
  int64_t sum = 0;
  for (int64_t tile = 0; tile < tiles_; ++tile) sum += tile_mass[tile];
  return sum;
}

void RowSampler::keep_nothing() {
  cut_ = {kInfinity, -1};
  mass_ = 0;
}

// 8, and top-k of one: the smallest id among the largest logits.
void RowSampler::keep_first() {
  const int64_t tile = std::find(tile_max_, tile_max_ + tiles_, row_.m) - tile_max_;
  start_list();
  tile_band(row_, tile, row_.m, row_.m, list_.x, list_.id, 0);
  list_.size = 1;
  keep_list();
}

// 11 to 13 where top-k is on and the list holds the first k of the order.
void RowSampler::keep_top_k_of_list(int64_t index, int64_t k) {
  shorten_list(k);
  if (args_.temperature[index] == 0.0f) return keep_list();  // 8
  const float top_p = args_.top_p[index];
  const int64_t target = top_p < 1.0f ? top_p_target(weigh_list(), top_p) : 0;
  finish_list(target, lowest_kept(index), args_.min_tokens_to_keep[index]);
}

// The first k of the order, whatever comes after them.
void RowSampler::keep_at_least(int64_t k) {
  gather(row_, bound_of_first(k));
  shorten_list(k);
  keep_list();
}

// A lower bound of the k-th largest logit: about the k-th largest maximum of the groups.
float RowSampler::bound_of_first(int64_t k) {
  if (k > tiles_ * kGroups) return kLowest;
  const int64_t close = 4 + k / 4;  // so many tokens too many are cheaper than an exact bound
  float bound = kLowest;
  if (k <= tiles_) {
    // the k-th largest maximum of the tiles is not above it, and leaves less to look at
    bound = std::max(bound, bisect(tile_max_, tiles_, k, close).value());
    if (count_groups(group_max_, tile_max_, tiles_, bound) <= k + close) return bound;
  }
  float* maxima = ws_.maxima.at_least(tiles_ * kGroups);
  int64_t size = 0;
  for (int64_t tile = 0; tile < tiles_; ++tile) {
    if (!(tile_max_[tile] >= bound)) continue;
    std::copy_n(group_max_ + tile * kGroups, kGroups, maxima + size);
    size += kGroups;
  }
  return size < k ? bound : std::max(bound, bisect(maxima, size, k, close).value());
}

// An empty list with room for the row and for one write past its end.
void RowSampler::start_list() {
  list_.x = ws_.list_x.at_least(row_.vocab_size + 1);
  list_.id = ws_.list_id.at_least(row_.vocab_size + 1);
  list_.w = nullptr;
  list_.size = 0;
}

// Makes the list of all tokens with from <= x <= to; its size.
int64_t RowSampler::gather(const Row& row, float from, float to) {
  start_list();
  for (int64_t tile = 0; tile < tiles_; ++tile) {
    if (!(tile_max_[tile] >= from)) continue;
    list_.size = tile_band(row, tile, from, to, list_.x, list_.id, list_.size);
  }
  return list_.size;
}

// Drops what is below the bound, and the masses, if there were any.
void RowSampler::drop_below(float bound) {
  int64_t size = 0;
  for (int64_t i = 0; i < list_.size; ++i) {
    const bool kept = list_.x[i] >= bound;
    list_.x[size] = list_.x[i];
    list_.id[size] = list_.id[i];
    size += kept;
  }
  list_.size = size;
  list_.w = nullptr;
}

// The list's masses; their sum.
int64_t RowSampler::weigh_list() {
  if (list_.w == nullptr) {
    list_.w = ws_.list_w.at_least(list_.size);
    list_masses(row_, list_.x, list_.size, list_.w);
  }
  int64_t sum = 0;
  for (int64_t i = 0; i < list_.size; ++i) sum += list_.w[i];
  return sum;
}

// Keeps the first `size` of the order.
void RowSampler::shorten_list(int64_t size) {
  if (list_.size <= size) return;
  const Bound last = bisect(list_.x, list_.size, size, 0);
  if (last.number == size) return drop_below(last.value());
  const int64_t above = count_from(list_.x, list_.size, from_order_key(last.key + 1));
  shorten_list_to({last.key, size - above});
}

// Where the masses of the list's tokens, in order, reach the target.
LastKept RowSampler::where_reached(int64_t target) {
  weigh_list();
  uint32_t* keys = ws_.keys.at_least(list_.size);
  int64_t* weights = ws_.weights.at_least(list_.size);
  for (int64_t i = 0; i < list_.size; ++i) keys[i] = order_key(list_.x[i]);
  std::copy(list_.w, list_.w + list_.size, weights);
  const Reached reached = select(keys, weights, list_.size, target);
  const float value = from_order_key(reached.key);
  const int64_t each = static_cast<int64_t>(mass(depth(value, row_.m, row_.scale)));
  return {reached.key, (reached.missing + each - 1) / each};
}

void RowSampler::shorten_list_to(LastKept last) {
  int64_t size = 0;
  for (int64_t i = 0; i < list_.size; ++i) {
    const bool kept = last.keeps(list_.x[i]);
    list_.x[size] = list_.x[i];
    list_.id[size] = list_.id[i];
    if (list_.w != nullptr) list_.w[size] = list_.w[i];
    size += kept;
  }
  list_.size = size;
}

// 12 (where target > 0) and 13 on the list: a prefix of the order with at least that mass and
// that many tokens, or every candidate.
void RowSampler::finish_list(int64_t target, float low, int64_t at_least) {
  if (target > 0) {
    const LastKept last = where_reached(target);
    int64_t kept = last.equals;
    for (int64_t i = 0; i < list_.size; ++i) kept += order_key(list_.x[i]) > last.key;
    if (kept >= at_least) {
      shorten_list_to(last);
    } else {
      shorten_list(at_least);
    }
  }
  if (low > kLowest) {
    int64_t kept = 0;
    for (int64_t i = 0; i < list_.size; ++i) kept += list_.x[i] >= low;
    if (kept >= at_least) {
      shorten_list_to({order_key(low), kept});
    } else {
      shorten_list(at_least);
    }
  }
  keep_list();
}

void RowSampler::keep_list() {
  listed_ = true;
  mass_ = weigh_list();
  float most;
  find_ends(list_.x, list_.size, cut_.value, most);
  int64_t last = list_.size - 1;
  while (list_.x[last] > cut_.value) --last;
  cut_.last_id = list_.id[last];
}

// 14 without filters.
void RowSampler::keep_every_candidate() {
  tile_kept_ = ws_.tile_kept.at_least(tiles_);
  over_tiles([&](int64_t begin, int64_t end) {
    scan_mass(row_, begin, end, tile_max_, tile_kept_);
  });
  cut_ = {kLowest, kEveryId};
  mass_ = total(tile_kept_);
}

// 13 where only min-p, or nothing that cuts deeper, is on.
void RowSampler::keep_from(float low, int64_t at_least) {
  const int64_t groups = count_groups(group_max_, tile_max_, tiles_, low);
  const Cut cut = {low, kEveryId};
  listed_ = false;
  if (groups <= 1024 || at_least > groups) {
    if (gather(row_, low) >= at_least) return keep_list();
    // fewer than asked for: the first of the order instead
    return keep_at_least(at_least);
  }
  cut_ = cut;
  tile_kept_ = ws_.tile_kept.at_least(tiles_);
  over_tiles([&](int64_t begin, int64_t end) {
    scan_kept_mass(row_, begin, end, cut, tile_max_, tile_kept_);
  });
  mass_ = total(tile_kept_);
}

// ---- 12 on its own: the nucleus ------------------------------------------------------------------

// 12, and 13 after it, where top-k is off.
void RowSampler::keep_top_p(float top_p, float low, int64_t at_least) {
  constexpr int64_t kHead = 64;  // groups to gather from where the estimate was too high
  if (tiles_ == 1) {
    gather(row_, kLowest);
    return finish_list(top_p_target(weigh_list(), top_p), low, at_least);
  }

  const int64_t size = tiles_ * kGroups;
  const int64_t listed = std::min<int64_t>(1024, size / 2);  // groups: more are not worth a list
  float* sample_depth = ws_.sample_depth.at_least(2 * size);
  float* sample_mass = ws_.sample_mass.at_least(2 * size);
  Sample sample =
      {{}, {sample_depth, sample_depth + size}, {sample_mass, sample_mass + size}, 0, 0, 0};
  take_sample(row_, group_max_, sample);
  Histogram& histogram = ws_.histogram;
  histogram.fill(sample, ws_.bins.at_least(size));
  if (sample.maxima < 0.5 * sample.total) {
    // a flat row: one pass takes its mass, and the mass above where the nucleus should end
    const double goal = static_cast<double>(top_p) * sample.total;
    return keep_flat_nucleus(top_p, histogram.value_at(row_, goal), low, at_least);
  }
  // few tokens have most: the nucleus is likely to be short, and what is outside of it is known well
  const double outside = (1.0 - static_cast<double>(top_p)) * sample.total;
  float bound = histogram.value_over(row_, 0.5 * outside);
  if (count_groups(group_max_, tile_max_, tiles_, bound) > listed) {
    return keep_flat_nucleus(top_p, histogram.value_over(row_, outside), low, at_least);
  }
  const int64_t target = top_p_target(mass_of_row(), top_p);
  if (at_least > 1) bound = std::min(bound, bound_of_first(at_least));
  for (int64_t tried = kHead;; tried *= 8) {
    gather(row_, bound);
    if (weigh_list() >= target || bound == kLowest) return finish_list(target, low, at_least);
    bound = std::min(bound, bound_of_first(tried));
  }
}

int64_t RowSampler::mass_of_row() {
  int64_t* tile_mass = ws_.tile_mass.at_least(tiles_);
  over_tiles([&](int64_t begin, int64_t end) {
    scan_mass(row_, begin, end, tile_max_, tile_mass);
  });
  return total(tile_mass);
}

// The same where the nucleus is large; `guess` is about where it ends.
void RowSampler::keep_flat_nucleus(float top_p, float guess, float low, int64_t at_least) {
  int64_t* tile_mass = ws_.tile_mass.at_least(tiles_);
  tile_kept_ = ws_.tile_kept.at_least(tiles_);
  over_tiles([&](int64_t begin, int64_t end) {
    scan_split_mass(row_, begin, end, guess, tile_max_, tile_mass, tile_kept_);
  });
  const int64_t target = top_p_target(total(tile_mass), top_p);
  const int64_t above = total(tile_kept_);

  // The cut is among the tokens between the guess and a second one beyond the target, which is found
  // from the sampled mass near the guess.
  const bool lower = above < target;
  const double wrong_by = std::abs(static_cast<double>(target) - static_cast<double>(above));
  const double of_a_token = static_cast<double>(mass(depth(guess, row_.m, row_.scale)));
  const double sampled = ws_.histogram.mass_above(row_, guess);
  int64_t goal = 0;
  for (double margin = 0.25;; margin *= 4) {
    if (margin > 10) {  // the sample misled us: choose among all
      gather(row_, kLowest);
      return finish_list(target, low, at_least);
    }
    const double step = (1 + margin) * wrong_by + 32 * margin * of_a_token;
    const float far = ws_.histogram.value_at(row_, lower ? sampled + step : sampled - step);
    const float below_guess = std::nextafter(guess, -kInfinity);
    const float from = lower ? std::min(far, below_guess) : guess;
    const float to = lower ? below_guess : std::max(far, guess);
    gather(row_, from, to);
    const int64_t between = weigh_list();
    goal = lower ? target - above : target - (above - between);
    if (goal >= 1 && goal <= between) break;
  }

  LastKept last = where_reached(goal);
  cut_ = {from_order_key(last.key), -1};
  for (int64_t i = 0; i < list_.size; ++i) {
    const bool kept = last.keeps(list_.x[i]);
    // below the guess kept tokens are to be added, above it those that are not to be taken away
    tile_kept_[list_.id[i] / kTile] += (lower ? list_.w[i] : -list_.w[i]) * (kept == lower);
    if (kept & (list_.x[i] == cut_.value)) cut_.last_id = list_.id[i];
  }
  listed_ = false;
  mass_ = total(tile_kept_);

  // no token has a mass above 2^42, which bounds the size of the set from below
  if (at_least > target >> 42 && count_kept() < at_least) {
    return keep_at_least(at_least);
  }
  if (low > cut_.value) keep_from(low, at_least);
}

int64_t RowSampler::count_kept() {
  std::atomic<int64_t> sum{0};
  over_tiles([&](int64_t begin, int64_t end) {
    sum.fetch_add(scan_count(row_, begin, end, cut_, tile_max_), std::memory_order_relaxed);
  });
  return sum.load(std::memory_order_relaxed);
}

// ---- 14 and the results --------------------------------------------------------------------------

void RowSampler::filter(int64_t index) {
  float* out = args_.filtered + index * args_.filtered_stride;
  const float temperature = args_.temperature[index];
  const float divisor = temperature == 0.0f ? 1.0f : temperature;
  over_tiles([&](int64_t begin, int64_t end) {
    write_filtered(row_, begin, end, cut_, divisor, out);
  });
}

void RowSampler::draw(int64_t index) {
  int64_t* tokens = args_.tokens + index * args_.num_samples;
  float* logprobs = args_.logprobs_mode == LLM_SAMPLING_LOGPROBS_NONE
                        ? nullptr
                        : args_.logprobs + index * args_.num_samples;
  if ((status_ & LLM_SAMPLING_STATUS_NO_CANDIDATE) != 0) {
    std::fill(tokens, tokens + args_.num_samples, -1);
    if (logprobs != nullptr) std::fill(logprobs, logprobs + args_.num_samples, std::nanf(""));
    return;
  }
  const int64_t parts = listed_ ? list_.size : tiles_;
  const int64_t* part_mass = listed_ ? list_.w : tile_kept_;
  int64_t* reached = ws_.weights.at_least(parts);
  int64_t sum = 0;
  for (int64_t i = 0; i < parts; ++i) reached[i] = sum += part_mass[i];

  const uint64_t seed = static_cast<uint64_t>(args_.seed[index]);
  const uint64_t position = static_cast<uint64_t>(args_.position[index]);
  for (int32_t sample = 0; sample < args_.num_samples; ++sample) {
    const uint64_t random = random_bits(seed, position, static_cast<uint32_t>(sample));
    int64_t r = scaled_random(random, mass_);
    const int64_t part = std::upper_bound(reached, reached + parts, r) - reached;
    int64_t token;
    int64_t w = part_mass[part];
    if (listed_) {
      token = list_.id[part];
    } else {
      alignas(64) float tile_w[kTile];
      tile_kept_masses(row_, part, cut_, tile_w);
      r -= reached[part] - w;
      int j = 0;
      while (r >= (w = static_cast<int64_t>(tile_w[j]))) r -= w, ++j;
      token = part * kTile + j;
    }
    tokens[sample] = token;
    if (logprobs != nullptr) {
      const double share = std::log(static_cast<double>(w)) - std::log(static_cast<double>(mass_));
      logprobs[sample] = static_cast<float>(share);
    }
  }
}

// log-softmax of step 1's logits, by the same masses at T = 1.
void RowSampler::write_raw_logprobs(int64_t index) {
  const int64_t* tokens = args_.tokens + index * args_.num_samples;
  float* logprobs = args_.logprobs + index * args_.num_samples;
  if (tokens[0] < 0) return;  // NaN already
  Row& row = row_;
  if (!row.is_raw()) {
    row.bias_count = 0;
    row.allowed = row.seen = nullptr;
    over_tiles([&](int64_t begin, int64_t end) {
      scan_maxima(row, begin, end, group_max_, tile_max_);
    });
    row.m = *std::max_element(tile_max_, tile_max_ + tiles_) + 0.0f;
  }
  row.scale = depth_scale(1.0f);
  const double all = std::log(static_cast<double>(mass_of_row())) - 42.0 * std::log(2.0);
  alignas(64) float buffer[kTile];
  for (int32_t sample = 0; sample < args_.num_samples; ++sample) {
    const float x = load_tile(row, tokens[sample] / kTile, buffer)[tokens[sample] % kTile];
    const double below = x == row.m ? 0.0 : static_cast<double>(x) - static_cast<double>(row.m);
    logprobs[sample] = static_cast<float>(below - all);
  }
}

// ---- The batch -----------------------------------------------------------------------------------

// One more; after the largest value comes the smallest, as in torch.
template <typename T>
void count_up(T& value) {
  value = static_cast<T>(static_cast<std::make_unsigned_t<T>>(value) + 1);
}

// Adds every row's token to its history and 1 to its position.
void advance(const LlmSamplingArgs& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t token = args.tokens[row * args.num_samples];
    if (token < 0) continue;
    count_up(args.position[row]);
    if (args.seen == nullptr) continue;
    const int64_t slot = args.slots[row];
    uint32_t* seen = reinterpret_cast<uint32_t*>(args.seen + slot * args.seen_stride);
    seen[token >> 5] |= 1u << (token & 31);
    count_up(args.counts[slot * args.counts_stride + token]);
    count_up(args.lengths[slot]);
  }
}

// LLM_SAMPLING_OK if the batch can be run without reading or writing out of bounds.
int32_t check(const LlmSamplingArgs& a) {
  const int32_t code = check_struct(a);
  if (code != LLM_SAMPLING_OK || a.rows == 0) return code;
  if (a.logit_bias_offsets != nullptr) {
    const int64_t* offsets = a.logit_bias_offsets;
    if (offsets[0] < 0 || !std::is_sorted(offsets, offsets + a.rows + 1))
      return LLM_SAMPLING_BAD_SIZE;
    if (offsets[a.rows] > 0 && (a.logit_bias_ids == nullptr || a.logit_bias_values == nullptr)) {
      return LLM_SAMPLING_NULL_POINTER;
    }
  }
  for (int64_t row = 0; a.seen != nullptr && row < a.rows; ++row) {
    if (a.slots[row] < 0 || a.slots[row] >= a.num_slots) return LLM_SAMPLING_BAD_SIZE;
  }
  for (int64_t row = 0; row < a.rows; ++row) {
    const auto is_within = [](float x, float least, float most) { return x >= least && x <= most; };
    if (!(is_within(a.temperature[row], 0.0f, -kLowest) &&
          is_within(a.top_p[row], 0.0f, 1.0f) &&  // one that is tiny has become 0
          is_within(a.min_p[row], 0.0f, 1.0f) && a.min_p_cut[row] >= 0.0f &&
          a.repetition_penalty[row] > 0.0f && a.repetition_penalty[row] < kInfinity &&
          is_within(a.frequency_penalty[row], -2.0f, 2.0f) &&
          is_within(a.presence_penalty[row], -2.0f, 2.0f) && a.min_tokens_to_keep[row] >= 1)) {
      return LLM_SAMPLING_BAD_PARAMETER;
    }
  }
  return LLM_SAMPLING_OK;
}

// What the tasks of a batch share.
struct Batch {
  const LlmSamplingArgs& args;
  int threads_per_row;
  std::atomic<bool> out_of_memory{false};

  void run_row(int64_t index) noexcept {
    static thread_local Workspace workspace;
    try {
      RowSampler(args, workspace, threads_per_row).run(index);
    } catch (const std::bad_alloc&) {
      out_of_memory.store(true, std::memory_order_relaxed);
    }
  }
};

int32_t run(const LlmSamplingArgs& args) {
  const int32_t code = check(args);
  if (code != LLM_SAMPLING_OK || args.rows == 0) return code;
  const DefaultFloats floats;
  constexpr int64_t kLeast = 32768;  // tokens that are worth a second thread, for torch too
  // more than this many a core are of no use, and OpenMP ends the process where it cannot start them
  static const int most_threads =
      4 * std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const bool is_small = args.rows < kLeast && args.rows * args.vocab_size < kLeast;
  const int threads = is_small ? 1 : std::min(args.num_threads, most_threads);
  const bool split_rows = args.rows < threads;
  Batch batch{args, split_rows ? threads : 1};
  if (split_rows) {
    for (int64_t row = 0; row < args.rows; ++row) batch.run_row(row);
  } else {
    Pool::run(
        args.rows,
        threads,
        [](void* context, int64_t row) { static_cast<Batch*>(context)->run_row(row); },
        &batch
    );
  }
  if (batch.out_of_memory.load()) return LLM_SAMPLING_OUT_OF_MEMORY;
  const auto is_valid = [](int32_t status) { return status == 0; };
  if (args.advance == LLM_SAMPLING_ADVANCE_ALWAYS ||
      (args.advance == LLM_SAMPLING_ADVANCE_IF_ALL_VALID &&
       std::all_of(args.status, args.status + args.rows, is_valid))) {
    advance(args);
  }
  return LLM_SAMPLING_OK;
}

}  // namespace
}  // namespace llm_sampling

extern "C" {

__attribute__((visibility("default"))) int32_t llm_sampling_cpu(const LlmSamplingArgs* args) {
  LlmSamplingArgs own = {};
  const int32_t code = llm_sampling::read_struct(args, own);
  return code != LLM_SAMPLING_OK ? code : llm_sampling::run(own);
}

__attribute__((visibility("default"))) void llm_sampling_cpu_forked(void) {
  llm_sampling::Pool::forked();
}

__attribute__((visibility("default"))) uint32_t llm_sampling_abi_version(void) {
  return LLM_SAMPLING_ABI_VERSION;
}

__attribute__((visibility("default"))) uint32_t llm_sampling_args_size(void) {
  return sizeof(LlmSamplingArgs);
}

__attribute__((visibility("default"))) const char* llm_sampling_error(int32_t code) {
  return llm_sampling::error_text(code);
}

}  // extern "C"
