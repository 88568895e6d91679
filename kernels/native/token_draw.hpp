// The next token of each row of logits, and log-probabilities.
//
// A weight is what a logit's exponential is of the greatest one's, as an integer multiple of 2^-44. Sums of
// integers are the same in any order, so that a token depends on nothing but its own row and number: not on the
// batch, the threads or the instruction set. What is less than 2^-45 of the greatest is never drawn.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "decoder_kernels.hpp"

namespace scone {

// How one row's token is chosen. Truncation goes by falling logit, equal ones by token: the top_k first, of these
// those that make up top_p, of these those with at least exp(log_min_p) of the greatest one's probability.
struct Draw {
    float temperature;  // 0: the first greatest
    int top_k;          // 0: all
    double top_p;
    float log_min_p;  // -inf: all
    double number;    // in [0, 1), a multiple of 2^-53: where the distribution function is inverted
};

struct TokenValue {
    float value;
    int token;
};

// One thread's work on rows of `size` logits.
class RowSampler {
public:
    RowSampler(const DecoderKernels* kernels, int size)
        : kernels_(kernels), size_(size), num_chunks_((size + kChunk - 1) / kChunk), maxima_(num_chunks_),
          sums_(num_chunks_) {}

    // -1 where the row is not finite: a NaN, an infinite logit, or none that is more than -inf.
    int draw(const float* logits, const Draw& how) {
        if (!look_at(logits, how.temperature == 0.0f ? 1.0f : how.temperature)) return -1;
        if (how.temperature == 0.0f) return first_greatest();
        const float floor = highest_ + how.log_min_p;
        const bool counts = how.top_k > 0 && how.top_k < size_;
        if (!counts && !(how.top_p < 1.0)) return at_number(how.number, weigh_all(floor));
        int64_t total = 0;
        if (counts) {
            collect(cut_for(how.top_k));
            keep_first(how.top_k);
            total = sum();
        } else {
            total = weigh_all(-kInfinity);
        }
        if (how.top_p < 1.0) {
            const auto limit = std::max<int64_t>(1, int64_t(std::ceil(how.top_p * double(total))));
            if (!counts) collect_weight(limit);
            candidates_.resize(reach(limit - 1));
        }
        const auto is_rare = [&](const Candidate& c) { return c.value < floor; };
        candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(), is_rare), candidates_.end());
        return candidates_[reach(target(how.number, sum())) - 1].token;
    }

    // The log-probability of one token; NaN where the row is not finite. The greatest ones go to `top`
    // (num_top,), by falling value; where there are fewer, -inf.
    float logprob(const float* logits, int token, TokenValue* top, int num_top) {
        std::fill(top, top + num_top, TokenValue{-kInfinity, 0});
        if (!look_at(logits, 1.0f)) return std::numeric_limits<float>::quiet_NaN();
        const double log_total = double(highest_) + std::log(double(weigh_all(-kInfinity)) / kOne);
        if (num_top > 0) {
            collect_values(kth_maximum(num_top));
            const size_t count = std::min(size_t(num_top), candidates_.size());
            std::partial_sort(candidates_.begin(), candidates_.begin() + count, candidates_.end(), comes_first);
            for (size_t i = 0; i < count; ++i)
                top[i] = {float(double(candidates_[i].value) - log_total), candidates_[i].token};
        }
        return float(double(logits[token]) - log_total);
    }

private:
    struct Candidate {
        float value;  // logit / temperature
        int token;
        int64_t weight;
    };
    static bool comes_first(const Candidate& a, const Candidate& b) {
        return a.value > b.value || (a.value == b.value && a.token < b.token);
    }

    static constexpr int kChunk = kSampledChunk;
    static constexpr float kInfinity = std::numeric_limits<float>::infinity();
    static constexpr double kOne = double(int64_t(1) << 44);  // the greatest one's weight
    static constexpr float kWeightless = 32.0f;               // e^-32 is less than 2^-45

    // Whether the row is finite; from then on it is the one that is worked on.
    bool look_at(const float* logits, float temperature) {
        logits_ = logits;
        temperature_ = temperature;
        for (int c = 0; c < num_chunks_; ++c) maxima_[c] = kernels_->greatest_of_chunk(chunk(c));
        float greatest = -kInfinity;
        for (float maximum : maxima_) greatest = maximum > greatest || maximum != maximum ? maximum : greatest;
        greatest_ = greatest;
        highest_ = greatest / temperature;
        return std::isfinite(greatest) && std::isfinite(highest_);
    }

    // A chunk's logits; the last one's padded with -inf.
    const float* chunk(int c) {
        const int first = c * kChunk, count = size_ - first;
        if (count >= kChunk) return logits_ + first;
        std::fill(std::copy_n(logits_ + first, count, padded_), padded_ + kChunk, -kInfinity);
        return padded_;
    }

    int first_greatest() {
        const auto c = std::find(maxima_.begin(), maxima_.end(), greatest_) - maxima_.begin();
        return int(std::find(logits_ + c * kChunk, logits_ + size_, greatest_) - logits_);
    }

    int64_t weigh(int c, float floor) {
        return kernels_->weigh_chunk(chunk(c), temperature_, highest_, floor, weights_);
    }

    // The sum of all weights, leaving out values below the floor.
    int64_t weigh_all(float floor) {
        int64_t total = 0;
        floor_ = std::max(floor, highest_ - kWeightless);
        for (int c = 0; c < num_chunks_; ++c)
            total += sums_[c] = maxima_[c] / temperature_ < floor_ ? 0 : weigh(c, floor_);
        return total;
    }

    // Of all that `weigh_all` has weighed, in the order of tokens.
    int at_number(double number, int64_t total) {
        int64_t rest = target(number, total);
        int c = 0, i = 0;
        while (rest >= sums_[c]) rest -= sums_[c++];
        weigh(c, floor_);
        while (rest >= weights_[i]) rest -= weights_[i++];
        return c * kChunk + i;
    }

    static int64_t target(double number, int64_t total) {
        return int64_t((unsigned __int128)(uint64_t(number * 9007199254740992.0)) * uint64_t(total) >> 53);
    }

    // What the k greatest logits are not less than.
    float kth_maximum(int k) {
        if (k > num_chunks_) return -kInfinity;
        order_ = maxima_;
        std::nth_element(order_.begin(), order_.begin() + (k - 1), order_.end(), std::greater<float>());
        return order_[k - 1];
    }

    float cut_for(int top_k) { return std::max(highest_ - kWeightless, kth_maximum(top_k) / temperature_); }

    // Candidates are the tokens with values of at least `cut`.
    void collect(float cut) {
        candidates_.clear();
        for (int c = 0; c < num_chunks_; ++c) {
            if (maxima_[c] / temperature_ < cut) continue;
            weigh(c, -kInfinity);
            for (int i = 0, end = std::min(kChunk, size_ - c * kChunk); i < end; ++i) {
                const float value = logits_[c * kChunk + i] / temperature_;
                if (value >= cut) candidates_.push_back({value, c * kChunk + i, weights_[i]});
            }
        }
    }

    // Candidates are those with the greatest values, at least so many that they weigh that much.
    void collect_weight(int64_t weight) {
        for (float depth = kWeightless / 16; depth <= kWeightless; depth *= 2) {
            collect(highest_ - depth);
            if (sum() >= weight) return;
        }
    }

    // As `collect`, without weights, logits that are more than -inf.
    void collect_values(float cut) {
        candidates_.clear();
        for (int c = 0; c < num_chunks_; ++c) {
            if (maxima_[c] < cut) continue;
            for (int t = c * kChunk, end = std::min(t + kChunk, size_); t < end; ++t)
                if (logits_[t] >= cut && logits_[t] > -kInfinity) candidates_.push_back({logits_[t], t, 0});
        }
    }

    void keep_first(size_t count) {
        if (count >= candidates_.size()) return;
        std::nth_element(candidates_.begin(), candidates_.begin() + count, candidates_.end(), comes_first);
        candidates_.resize(count);
    }

    int64_t sum() const {
        int64_t total = 0;
        for (const Candidate& candidate : candidates_) total += candidate.weight;
        return total;
    }

    // The least n for which the first n candidates weigh more than `target`, or their number; puts these first,
    // and of them the last one last. Takes linear time: a flat distribution has candidates by the ten thousand.
    size_t reach(int64_t target) {
        size_t low = 0, high = candidates_.size();
        while (high - low > 1) {
            const size_t middle = (low + high) / 2;
            const auto begin = candidates_.begin();
            std::nth_element(begin + low, begin + middle, begin + high, comes_first);
            int64_t weight = 0;
            for (size_t i = low; i < middle; ++i) weight += candidates_[i].weight;
            if (target < weight) {
                high = middle;
            } else {
                target -= weight;
                low = middle;
            }
        }
        return high;
    }

    const DecoderKernels* kernels_;
    const int size_, num_chunks_;
    const float* logits_ = nullptr;
    float temperature_ = 1.0f, greatest_ = 0.0f, highest_ = 0.0f, floor_ = 0.0f;  // highest_ of the values
    std::vector<float> maxima_, order_;  // of each chunk
    std::vector<int64_t> sums_;
    std::vector<Candidate> candidates_;
    float padded_[kChunk];
    int64_t weights_[kChunk];
};

}  // namespace scone
