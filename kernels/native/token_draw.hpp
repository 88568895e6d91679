// The next token of each row of logits, and log-probabilities.
//
// A weight is what a logit's exponential is of the greatest one's, as an integer multiple of 2^-44. Sums of
// integers are the same in any order, so that a token depends on nothing but its own row and number: not on the
// batch, the threads or the instruction set. What is less than 2^-45 of the greatest is never drawn.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>
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
            total = weight_from(-kInfinity);
        } else {
            total = weigh_all(-kInfinity);
        }
        const auto limit = std::max<int64_t>(1, int64_t(std::ceil(how.top_p * double(total))));
        if (!counts) collect_weight(limit);
        arrange();
        if (how.top_p < 1.0) total = reach(limit - 1).weight;
        // What is left are the first candidates in any case: those of the lesser weight.
        total = std::min(total, weight_from(floor));
        return reach(target(how.number, total)).token;
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

    struct Reached {
        int token;
        int64_t weight;  // of all candidates up to it
    };

    static constexpr int kChunk = kSampledChunk, kBins = 1024;
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
        for (float depth = kWeightless / 16; depth <= kWeightless; depth *= 4) {
            collect(highest_ - depth);
            if (weight_from(-kInfinity) >= weight) return;
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

    // Of candidates with values of at least `floor`.
    int64_t weight_from(float floor) const {
        int64_t total = 0;
        for (const Candidate& candidate : candidates_)
            if (candidate.value >= floor) total += candidate.weight;
        return total;
    }

    static int bin_of(float depth) { return std::min(kBins - 1, int(depth * (kBins / kWeightless))); }

    // Sorts the candidates by bins of their value, greatest first, so that `reach` need look at one bin.
    void arrange() {
        std::fill(ends_, ends_ + kBins, 0);
        std::fill(bin_weights_, bin_weights_ + kBins, 0);
        for (const Candidate& c : candidates_) {
            const int bin = bin_of(highest_ - c.value);
            ++ends_[bin];
            bin_weights_[bin] += c.weight;
        }
        for (int bin = 0, begin = 0; bin < kBins; ++bin) begin += std::exchange(ends_[bin], begin);
        arranged_.resize(candidates_.size());
        for (const Candidate& c : candidates_) arranged_[ends_[bin_of(highest_ - c.value)]++] = c;
        candidates_.swap(arranged_);
    }

    // The first candidate, in order, that makes them weigh more than `target` together, and what they weigh. Takes
    // linear time at worst, where equal logits by the ten thousand share a bin.
    Reached reach(int64_t target) {
        int64_t before = 0;
        int bin = 0;
        while (before + bin_weights_[bin] <= target) before += bin_weights_[bin++];
        size_t low = bin == 0 ? 0 : ends_[bin - 1], high = ends_[bin];
        while (high - low > 1) {
            const size_t middle = (low + high) / 2;
            const auto begin = candidates_.begin();
            std::nth_element(begin + low, begin + middle, begin + high, comes_first);
            int64_t weight = 0;
            for (size_t i = low; i < middle; ++i) weight += candidates_[i].weight;
            if (target < before + weight) {
                high = middle;
            } else {
                before += weight;
                low = middle;
            }
        }
        return {candidates_[low].token, before + candidates_[low].weight};
    }

    const DecoderKernels* kernels_;
    const int size_, num_chunks_;
    const float* logits_ = nullptr;
    float temperature_ = 1.0f, greatest_ = 0.0f, highest_ = 0.0f, floor_ = 0.0f;  // highest_ of the values
    std::vector<float> maxima_, order_;  // of each chunk
    std::vector<int64_t> sums_;
    std::vector<Candidate> candidates_, arranged_;
    int ends_[kBins];
    int64_t bin_weights_[kBins];
    float padded_[kChunk];
    int64_t weights_[kChunk];
};

}  // namespace scone
