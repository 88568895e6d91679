// Tokens whose hidden states are asked for. With the others the last layer stops once their keys and values are
// stored: of a prompt it is all but the last.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace scone {

// Consecutive tokens of one sequence that attend together.
struct TokenTile {
    int first_row, num_rows, sequence;
};

inline void add_tiles(std::vector<TokenTile>& tiles, int begin, int end, int per_tile, int sequence) {
    for (int r = begin; r < end; r += per_tile) tiles.push_back({r, std::min(per_tile, end - r), sequence});
}

class WantedTokens {
public:
    void clear() {
        rows_.clear();
        positions_.clear();
        tiles_.clear();
    }

    // Rows [begin, end) of a sequence, after all that were added before.
    void add(int begin, int end, int per_tile, int sequence, const int32_t* positions) {
        add_tiles(tiles_, size(), size() + end - begin, per_tile, sequence);
        for (int r = begin; r < end; ++r) {
            rows_.push_back(r);
            positions_.push_back(positions[r]);
        }
    }

    int size() const { return int(rows_.size()); }
    // Of the tokens where they follow one another.
    const int32_t* positions() const { return positions_.data(); }
    const std::vector<TokenTile>& tiles() const { return tiles_; }

    // Their rows of x (rows, width), one after the other from the front on, over what was there.
    void to_front(float* x, size_t width) const {
        for (size_t i = 0; i < rows_.size(); ++i) copy(x + i * width, x + size_t(rows_[i]) * width, width);
    }
    // And back to where they were.
    void to_places(float* x, size_t width) const {
        for (size_t i = rows_.size(); i-- > 0;) copy(x + size_t(rows_[i]) * width, x + i * width, width);
    }

private:
    static void copy(float* target, const float* source, size_t width) {
        if (target != source) std::memcpy(target, source, width * sizeof(float));
    }

    std::vector<int> rows_;
    std::vector<int32_t> positions_;
    std::vector<TokenTile> tiles_;
};

}  // namespace scone
