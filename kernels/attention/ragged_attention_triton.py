"""The kernels of `ragged_attention`: partial results per split and their merge, or both in one program."""

from __future__ import annotations

from specdec.kernels.dispatch import kernel, triton

if triton is not None:
    import triton.language as tl

    from specdec.kernels.overlap import wait_for_previous_kernel

    @kernel(do_not_specialize=["begin", "count", "width", "num_slots"])
    def split_kernel(
        query_ptr,
        key_ptr,
        value_ptr,
        spans_ptr,
        tree_starts_ptr,
        tree_mask_ptr,
        partial_ptr,
        begin,
        count,
        width,
        num_slots,
        scaling,
        softcap,
        query_row,
        query_head,
        query_column,
        key_row,
        key_head,
        key_slot,
        value_row,
        value_head,
        value_slot,
        NUM_KV_HEADS: tl.constexpr,
        GROUP: tl.constexpr,
        DIM: tl.constexpr,
        VALUE_DIM: tl.constexpr,
        BLOCK_DIM: tl.constexpr,
        BLOCK_VALUE: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        IS_TREE: tl.constexpr,
        TREE_SLOTS: tl.constexpr,
        BLOCK_QUERIES: tl.constexpr,
        BLOCK_KEYS: tl.constexpr,
        SPLIT_KEYS: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """partial: [rows, heads, count, splits, value_dim + 2]: the sum of weighted values, the maximum, the sum."""
        wait_for_previous_kernel(OVERLAP)
        COLUMNS: tl.constexpr = BLOCK_QUERIES // GROUP
        row = (tl.program_id(0) // NUM_KV_HEADS).to(tl.int64)
        kv_head = (tl.program_id(0) % NUM_KV_HEADS).to(tl.int64)
        pair = tl.arange(0, BLOCK_QUERIES)
        column = tl.program_id(1) * COLUMNS + pair // GROUP
        head = kv_head * GROUP + pair % GROUP
        pair_ok = (pair < COLUMNS * GROUP) & (column < count)
        span = spans_ptr + (row * width + begin + column) * 3
        low = tl.load(span, mask=pair_ok, other=0)
        high = tl.load(span + 1, mask=pair_ok, other=0)
        origin = tl.load(spans_ptr + row * width * 3 + 2)
        sees = high > low
        lowest = tl.min(tl.where(sees, low, num_slots), 0)
        highest = tl.max(tl.where(sees, high, 0), 0)
        split = tl.program_id(2) + tl.maximum(-origin, 0) // SPLIT_KEYS
        first = tl.maximum(split * SPLIT_KEYS, (lowest - origin) // BLOCK_KEYS * BLOCK_KEYS)
        end = tl.minimum((split + 1) * SPLIT_KEYS, highest - origin)
        if first < end:
            dim = tl.arange(0, BLOCK_DIM)
            value_dim = tl.arange(0, BLOCK_VALUE)
            dim_ok = dim < DIM
            value_ok = value_dim < VALUE_DIM
            query_at = row * query_row + head * query_head + (begin + column).to(tl.int64) * query_column
            query = tl.load(
                query_ptr + query_at[:, None] + dim[None, :], mask=pair_ok[:, None] & dim_ok[None, :], other=0.0
            )
            own_begin = 0
            own_mask = 0
            if IS_TREE:
                own_begin = tl.load(tree_starts_ptr + row)
                own_mask = tl.load(tree_mask_ptr + row * width + begin + column, mask=pair_ok, other=0)
            values, highest_score, total = _attend(
                query, key_ptr + row * key_row + kv_head * key_head, value_ptr + row * value_row + kv_head * value_head,
                first, end, origin, lowest, highest, low, high, own_begin, own_mask, scaling, softcap, key_slot,
                value_slot, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, HAS_SOFTCAP, IS_TREE, TREE_SLOTS, BLOCK_QUERIES,
                BLOCK_KEYS,
            )  # fmt: skip
            num_splits = tl.num_programs(2)
            place = ((row * NUM_KV_HEADS * GROUP + head) * count + column) * num_splits + tl.program_id(2)
            place = place * (VALUE_DIM + 2)
            tl.store(
                partial_ptr + place[:, None] + value_dim[None, :], values, mask=pair_ok[:, None] & value_ok[None, :]
            )
            tl.store(partial_ptr + place + VALUE_DIM, highest_score, mask=pair_ok)
            tl.store(partial_ptr + place + VALUE_DIM + 1, total, mask=pair_ok)

    @kernel(do_not_specialize=["begin", "count", "width", "num_splits"])
    def merge_kernel(
        partial_ptr,
        spans_ptr,
        sinks_ptr,
        out_ptr,
        begin,
        count,
        width,
        num_splits,
        NUM_HEADS: tl.constexpr,
        VALUE_DIM: tl.constexpr,
        BLOCK_VALUE: tl.constexpr,
        HAS_SINKS: tl.constexpr,
        IS_TREE: tl.constexpr,
        SPLIT_KEYS: tl.constexpr,
        UNROLL: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """One program per query and head; it reads only the splits of which the query sees any slot."""
        wait_for_previous_kernel(OVERLAP)
        head = tl.program_id(0) % NUM_HEADS
        column = tl.program_id(0) // NUM_HEADS % count
        row = (tl.program_id(0) // NUM_HEADS // count).to(tl.int64)
        span = spans_ptr + (row * width + begin + column) * 3
        low = tl.load(span)
        high = tl.load(span + 1)
        origin = tl.load(spans_ptr + row * width * 3 + 2)
        value_dim = tl.arange(0, BLOCK_VALUE)
        value_ok = value_dim < VALUE_DIM
        values = tl.zeros([BLOCK_VALUE], tl.float32)
        if HAS_SINKS:
            highest_score = tl.load(sinks_ptr + head).to(tl.float32)
            total = tl.full([], 1.0, tl.float32)
        else:
            highest_score = tl.full([], float("-inf"), tl.float32)
            total = tl.full([], 0.0, tl.float32)
        skipped = tl.maximum(-origin, 0) // SPLIT_KEYS
        first = (low - origin) // SPLIT_KEYS - skipped
        last = tl.where(high > low, (high - 1 - origin) // SPLIT_KEYS - skipped, first - 1)
        place = ((row * NUM_HEADS + head) * count + column) * num_splits
        # Several splits' loads are under way at once; each alone would wait for memory.
        for begin_split in range(first, last + 1, UNROLL):
            for i in tl.static_range(UNROLL):
                split = begin_split + i
                taken = split <= last
                at = partial_ptr + (place + tl.minimum(split, last)) * (VALUE_DIM + 2)
                split_values = tl.load(at + value_dim, mask=value_ok, other=0.0)
                split_highest = tl.load(at + VALUE_DIM)
                split_total = tl.load(at + VALUE_DIM + 1)
                scale, split_scale, new_highest = _merge_scales(highest_score, split_highest, IS_TREE)
                total = tl.where(taken, _merged(total, scale, split_total, split_scale), total)
                values = tl.where(taken, _merged(values, scale, split_values, split_scale), values)
                highest_score = tl.where(taken, new_highest, highest_score)
        values = values / tl.where(total == 0.0, 1.0, total)
        place_out = ((row * width + begin + column) * NUM_HEADS + head) * VALUE_DIM
        tl.store(out_ptr + place_out + value_dim, values.to(out_ptr.dtype.element_ty), mask=value_ok)

    @kernel(do_not_specialize=["width", "num_slots"])
    def wide_kernel(
        query_ptr,
        key_ptr,
        value_ptr,
        spans_ptr,
        sinks_ptr,
        out_ptr,
        width,
        num_slots,
        scaling,
        softcap,
        query_row,
        query_head,
        query_column,
        key_row,
        key_head,
        key_slot,
        value_row,
        value_head,
        value_slot,
        NUM_KV_HEADS: tl.constexpr,
        GROUP: tl.constexpr,
        DIM: tl.constexpr,
        VALUE_DIM: tl.constexpr,
        BLOCK_DIM: tl.constexpr,
        BLOCK_VALUE: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        HAS_SINKS: tl.constexpr,
        BLOCK_QUERIES: tl.constexpr,
        BLOCK_KEYS: tl.constexpr,
        SPLIT_KEYS: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """One program per block of queries of a key head: it merges its splits in registers, as `merge_kernel` does."""
        wait_for_previous_kernel(OVERLAP)
        COLUMNS: tl.constexpr = BLOCK_QUERIES // GROUP
        row = (tl.program_id(1) // NUM_KV_HEADS).to(tl.int64)
        kv_head = (tl.program_id(1) % NUM_KV_HEADS).to(tl.int64)
        pair = tl.arange(0, BLOCK_QUERIES)
        # Later columns see more keys; the longest work begins first.
        column = (tl.num_programs(0) - 1 - tl.program_id(0)) * COLUMNS + pair // GROUP
        head = kv_head * GROUP + pair % GROUP
        pair_ok = (pair < COLUMNS * GROUP) & (column < width)
        span = spans_ptr + (row * width + column) * 3
        low = tl.load(span, mask=pair_ok, other=0)
        high = tl.load(span + 1, mask=pair_ok, other=0)
        origin = tl.load(spans_ptr + row * width * 3 + 2)
        sees = high > low
        lowest = tl.min(tl.where(sees, low, num_slots), 0)
        highest = tl.max(tl.where(sees, high, 0), 0)
        dim = tl.arange(0, BLOCK_DIM)
        value_dim = tl.arange(0, BLOCK_VALUE)
        value_ok = value_dim < VALUE_DIM
        query_at = row * query_row + head * query_head + column.to(tl.int64) * query_column
        query = tl.load(
            query_ptr + query_at[:, None] + dim[None, :], mask=pair_ok[:, None] & (dim < DIM)[None, :], other=0.0
        )
        values = tl.zeros([BLOCK_QUERIES, BLOCK_VALUE], tl.float32)
        if HAS_SINKS:
            highest_score = tl.load(sinks_ptr + head, mask=pair_ok, other=0.0).to(tl.float32)
            total = tl.full([BLOCK_QUERIES], 1.0, tl.float32)
        else:
            highest_score = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_QUERIES], tl.float32)
        first_split = (low - origin) // SPLIT_KEYS
        last_split = (high - 1 - origin) // SPLIT_KEYS
        begin = tl.maximum(lowest - origin, 0) // BLOCK_KEYS * BLOCK_KEYS
        for split in range(begin // SPLIT_KEYS, tl.cdiv(tl.maximum(highest - origin, 0), SPLIT_KEYS)):
            split_values, split_highest, split_total = _attend(
                query, key_ptr + row * key_row + kv_head * key_head, value_ptr + row * value_row + kv_head * value_head,
                tl.maximum(split * SPLIT_KEYS, begin), tl.minimum((split + 1) * SPLIT_KEYS, highest - origin), origin,
                lowest, highest, low, high, 0, 0, scaling, softcap, key_slot, value_slot, DIM, VALUE_DIM, BLOCK_DIM,
                BLOCK_VALUE, HAS_SOFTCAP, False, 0, BLOCK_QUERIES, BLOCK_KEYS,
            )  # fmt: skip
            scale, split_scale, new_highest = _merge_scales(highest_score, split_highest, False)
            # A query leaves out the splits of which it sees nothing, as its own program of the merge kernel does.
            taken = sees & (split >= first_split) & (split <= last_split)
            total = tl.where(taken, _merged(total, scale, split_total, split_scale), total)
            merged = _merged(values, scale[:, None], split_values, split_scale[:, None])
            values = tl.where(taken[:, None], merged, values)
            highest_score = tl.where(taken, new_highest, highest_score)
        values = values / tl.where(total == 0.0, 1.0, total)[:, None]
        place_out = ((row * width + column) * NUM_KV_HEADS * GROUP + head) * VALUE_DIM
        tl.store(
            out_ptr + place_out[:, None] + value_dim[None, :],
            values.to(out_ptr.dtype.element_ty),
            mask=pair_ok[:, None] & value_ok[None, :],
        )

    @triton.jit
    def _attend(
        query, key_ptr, value_ptr, first, end, origin, lowest, highest, low, high, own_begin, own_mask, scaling,
        softcap, key_slot, value_slot, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
        BLOCK_VALUE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, IS_TREE: tl.constexpr, TREE_SLOTS: tl.constexpr,
        BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    ):  # fmt: skip
        """A split's sum of weighted values, maximum and sum of weights: positions first to end of one row and head."""
        dim = tl.arange(0, BLOCK_DIM)
        value_dim = tl.arange(0, BLOCK_VALUE)
        dim_ok = dim < DIM
        value_ok = value_dim < VALUE_DIM
        highest_score = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_QUERIES], tl.float32)
        values = tl.zeros([BLOCK_QUERIES, BLOCK_VALUE], tl.float32)
        for position in range(first, end, BLOCK_KEYS):
            slot = position + origin + tl.arange(0, BLOCK_KEYS)
            slot_ok = (slot >= lowest) & (slot < highest)
            key_at = slot.to(tl.int64) * key_slot
            key = tl.load(key_ptr + key_at[None, :] + dim[:, None], mask=slot_ok[None, :] & dim_ok[:, None], other=0.0)
            score = tl.dot(query, key, input_precision="ieee") * scaling
            if HAS_SOFTCAP:
                score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * score / softcap) + 1.0))
            visible = (slot[None, :] >= low[:, None]) & (slot[None, :] < high[:, None])
            if IS_TREE:
                own = slot.to(tl.int64) - own_begin
                bit = tl.minimum(tl.maximum(own, 0), TREE_SLOTS - 1)
                is_set = ((own_mask[:, None] >> bit[None, :]) & 1) != 0
                visible = visible & ((own < 0)[None, :] | ((own < TREE_SLOTS)[None, :] & is_set))
            score = tl.where(visible, score, float("-inf"))
            new_highest = tl.maximum(highest_score, tl.max(score, 1))
            # Until a query has seen a key its maximum stays -inf; using 0 instead avoids NaN.
            finite = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            weight = tl.exp(score - finite[:, None])
            scale = tl.exp(highest_score - finite)
            total = total * scale + tl.sum(weight, 1)
            value_at = slot.to(tl.int64) * value_slot
            value = tl.load(
                value_ptr + value_at[:, None] + value_dim[None, :],
                mask=slot_ok[:, None] & value_ok[None, :],
                other=0.0,
            )
            values = values * scale[:, None]
            values = tl.dot(weight.to(value.dtype), value, values, input_precision="ieee")
            highest_score = new_highest
        return values, highest_score, total

    @triton.jit
    def _merge_scales(highest_score, split_highest, IS_TREE: tl.constexpr):
        """What the sums so far and a further split's are multiplied by, and the maximum of both."""
        new_highest = tl.maximum(highest_score, split_highest)
        finite = new_highest
        if IS_TREE:  # every slot of a split may be hidden
            finite = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        return tl.exp(highest_score - finite), tl.exp(split_highest - finite), new_highest

    @triton.jit
    def _merged(sums, scale, split_sums, split_scale):
        # Written out, so that no kernel's compiler fuses the other product with the sum.
        return tl.fma(sums, scale, split_sums * split_scale)
