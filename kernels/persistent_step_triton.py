"""The kernel of `persistent_step`: one program per multiprocessor, five barriers a layer.

query, key, value | attention, by splits of the keys | their merge and the output projection | gate and up | down
Every program normalises the whole hidden state itself, which is cheaper than another barrier; no product is split among
programs, so each column of a result has one owner that walks its inner dimension in a fixed order.

What other programs wrote in this launch is read past the first-level cache (".cg"), which no barrier among programs
brings up to date for those that wait.
"""

from __future__ import annotations

from specdec.kernels.dispatch import triton

if triton is not None:
    import triton.language as tl

    # Entries of a layer's row in the table.
    BIAS, OUT, GATE, UP, DOWN = map(tl.constexpr, (3, 6, 7, 8, 9))
    ATTENTION_NORM, MLP_NORM, QUERY_NORM, KEY_NORM = map(tl.constexpr, (10, 11, 12, 13))
    KEYS, VALUES, WINDOW = map(tl.constexpr, (14, 15, 16))

    @triton.jit
    def _wait_for_all(arrived_ptr):
        """All programs' stores before it can be read by all behind it, past the first-level cache (".cg").

        Exactly num_programs arrivals make a barrier, so the count itself tells which one this is.
        """
        tl.debug_barrier()
        arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
        target = (arrived // tl.num_programs(0) + 1) * tl.num_programs(0)
        while tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu") < target:
            pass
        tl.debug_barrier()

    @triton.jit
    def _pointer(layer_ptr, entry, like_ptr):
        address = tl.load(layer_ptr + entry)
        # PyTorch's allocations and the wrapper's check give the alignment, which wide loads need.
        return tl.multiple_of(address.to(like_ptr.dtype), 16)

    @triton.jit
    def _load_rows(weight_ptr, first, num_rows, SIZE_IN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """[ROWS, BLOCK], zeros outside of [num_rows, SIZE_IN]."""
        row = first + tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK)
        ok = (row < num_rows)[:, None]
        if SIZE_IN != BLOCK:
            ok = ok & (column < SIZE_IN)[None, :]
        return tl.load(weight_ptr + row.to(tl.int64)[:, None] * SIZE_IN + column[None, :], mask=ok, other=0.0)

    @triton.jit
    def _load_inner(
        weight_ptr, step, SIZE: tl.constexpr, SIZE_IN: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    ):  # fmt: skip
        """[ROWS, BLOCK] of weights [SIZE, SIZE_IN]: this program's tile number `step`, the chunks of its first rows
        before those of its next. DIM columns are padded to BLOCK_DIM each."""
        row = (tl.program_id(0) + step // CHUNKS * tl.num_programs(0)) * ROWS + tl.arange(0, ROWS)
        column = step % CHUNKS * BLOCK + tl.arange(0, BLOCK)
        ok = row < SIZE
        if DIM == BLOCK_DIM:
            inside = column < SIZE_IN
        else:
            inside = (column % BLOCK_DIM < DIM) & (column // BLOCK_DIM < SIZE_IN // DIM)
            column = column // BLOCK_DIM * DIM + column % BLOCK_DIM
        place = row.to(tl.int64)[:, None] * SIZE_IN + column[None, :]
        if DIM == BLOCK_DIM and SIZE_IN % BLOCK == 0:
            return tl.load(weight_ptr + place, mask=ok[:, None], other=0.0)
        return tl.load(weight_ptr + place, mask=ok[:, None] & inside[None, :], other=0.0)

    @triton.jit
    def _part(block, QUERY: tl.constexpr, KEY: tl.constexpr, ROWS: tl.constexpr):
        """Query, key and value have their own blocks, numbered through: which of the three, the first row in it."""
        query_blocks: tl.constexpr = (QUERY + ROWS - 1) // ROWS
        key_blocks: tl.constexpr = (KEY + ROWS - 1) // ROWS
        which = tl.where(block >= query_blocks, 1, 0) + tl.where(block >= query_blocks + key_blocks, 1, 0)
        before = tl.minimum(which, 1) * query_blocks + tl.maximum(which - 1, 0) * key_blocks
        return which, (block - before) * ROWS

    @triton.jit
    def _load_qkv(
        layer_ptr, block, like_ptr, QUERY: tl.constexpr, KEY: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        which, first = _part(block, QUERY, KEY, ROWS)
        num_rows = tl.where(which == 0, QUERY, KEY)
        return _load_rows(_pointer(layer_ptr, which, like_ptr), first, num_rows, SIZE, ROWS, BLOCK)

    @triton.jit
    def _prefetch(row_ptr, SIZE: tl.constexpr):
        """Ask the second-level cache for rows of SIZE elements, [rows] pointers."""
        LINE: tl.constexpr = 1024 // row_ptr.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = triton.next_power_of_2((SIZE + LINE - 1) // LINE)
        place = tl.minimum(tl.arange(0, LINES) * LINE, SIZE - 1)
        address = (row_ptr[:, None] + place[None, :]).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )

    @triton.jit
    def _prefetch_weight(weight_ptr, NUM_ROWS: tl.constexpr, SIZE_IN: tl.constexpr, ROWS: tl.constexpr):
        """All rows of a weight that this program will need."""
        for first in range(tl.program_id(0) * ROWS, NUM_ROWS, tl.num_programs(0) * ROWS):
            row = tl.minimum(first + tl.arange(0, ROWS), NUM_ROWS - 1)
            _prefetch(weight_ptr + row.to(tl.int64) * SIZE_IN, SIZE_IN)

    @triton.jit
    def _normed(hidden_ptr, weight_ptr, num_tokens, eps, SIZE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
        """RMSNorm of the hidden state, [TOKENS, BLOCK]; every program computes all of it."""
        token = tl.arange(0, TOKENS)
        column = tl.arange(0, BLOCK)
        ok = (token < num_tokens)[:, None] & (column < SIZE)[None, :]
        weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)
        x = tl.load(hidden_ptr + token[:, None] * SIZE + column[None, :], mask=ok, other=0.0, cache_modifier=".cg")
        x = x.to(tl.float32)
        y = x * tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps)[:, None]
        dtype: tl.constexpr = hidden_ptr.dtype.element_ty
        return (y.to(dtype).to(tl.float32) * weight[None, :]).to(dtype)

    @triton.jit
    def _product(x, weight, NUM_WARPS: tl.constexpr):
        """x [TOKENS, K] and weight [ROWS, K] to [TOKENS, ROWS] in float32."""
        TOKENS: tl.constexpr = x.shape[0]
        ROWS: tl.constexpr = weight.shape[0]
        K: tl.constexpr = x.shape[1]
        if TOKENS == 1:
            return tl.sum(x.to(tl.float32) * weight.to(tl.float32), 1)[None, :]
        else:
            # A batched product gives each warp its own part of K; alone, a warp's chain of additions would be too long.
            PARTS: tl.constexpr = min(NUM_WARPS, K // 16)
            REPEATS: tl.constexpr = max(16 // TOKENS, 1)  # to fill the tensor core's shorter side
            left = tl.broadcast_to(x[:, None, :], (TOKENS, REPEATS, K))
            left = tl.permute(tl.reshape(left, (TOKENS * REPEATS, PARTS, K // PARTS)), (1, 0, 2))
            right = tl.permute(tl.reshape(weight, (ROWS, PARTS, K // PARTS)), (1, 2, 0))
            total = tl.sum(tl.dot(left, right, input_precision="ieee"), 0)
            return tl.max(tl.reshape(total, (TOKENS, REPEATS, ROWS)), 1)

    @triton.jit
    def _add_to_hidden(hidden_ptr, total, first, num_tokens, SIZE: tl.constexpr):
        """Only the program that owns the rows of weights reads and writes these columns between two barriers."""
        token = tl.arange(0, total.shape[0])
        column = first + tl.arange(0, total.shape[1])
        place = hidden_ptr + token[:, None] * SIZE + column[None, :]
        ok = (token < num_tokens)[:, None] & (column < SIZE)[None, :]
        dtype: tl.constexpr = hidden_ptr.dtype.element_ty
        before = tl.load(place, mask=ok, other=0.0, cache_modifier=".cg").to(tl.float32)
        tl.store(place, (before + total.to(dtype).to(tl.float32)).to(dtype), mask=ok)

    @triton.jit
    def _rotated(
        qkv_ptr, token, head, position, ok, cos_ptr, sin_ptr, norm_ptr, eps, HAS_NORM: tl.constexpr,
        QKV: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    ):  # fmt: skip
        """Normalised and rotated heads, [n, BLOCK_DIM], rounded where transformers rounds. token, head: [n]."""
        dtype: tl.constexpr = qkv_ptr.dtype.element_ty
        dim = tl.arange(0, BLOCK_DIM)
        partner = (dim + DIM // 2) % DIM
        inside = ok[:, None] & (dim < DIM)[None, :]
        here = qkv_ptr + (token * QKV + head * DIM)[:, None]
        x = tl.load(here + dim[None, :], mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        turned = tl.load(here + partner[None, :], mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        at = position.to(tl.int64)[:, None] * DIM + dim[None, :]
        cos = tl.load(cos_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
            weight = tl.load(norm_ptr + dim, mask=dim < DIM, other=0.0).to(tl.float32)
            other = tl.load(norm_ptr + partner, mask=dim < DIM, other=0.0).to(tl.float32)
            x = ((x * scale).to(dtype).to(tl.float32) * weight[None, :]).to(dtype).to(tl.float32)
            turned = ((turned * scale).to(dtype).to(tl.float32) * other[None, :]).to(dtype).to(tl.float32)
        turned = turned * tl.where(dim < DIM // 2, -1.0, 1.0)[None, :]
        return ((x * cos).to(dtype).to(tl.float32) + (turned * sin).to(dtype).to(tl.float32)).to(dtype)

    @triton.jit
    def _keys_of(
        item, starts_ptr, layer_ptr, width, num_text_slots, NUM_KV_HEADS: tl.constexpr, SPLITS: tl.constexpr,
        BLOCK_KEYS: tl.constexpr,
    ):  # fmt: skip
        """An item of attention: its row, key head and split, the row's start and the slots of the split."""
        row = item // (SPLITS * NUM_KV_HEADS)
        split = item % SPLITS
        start = tl.load(starts_ptr + row).to(tl.int32)
        window = tl.load(layer_ptr + WINDOW).to(tl.int32)
        end = tl.where(start < num_text_slots, start + width, 0)
        lowest = tl.where(window > 0, tl.maximum(start + 1 - window, 0), 0)
        share = tl.cdiv(tl.cdiv(end - lowest, SPLITS), BLOCK_KEYS) * BLOCK_KEYS
        first = lowest + split * share
        return row, item // SPLITS % NUM_KV_HEADS, split, start, window, first, tl.minimum(first + share, end)

    @triton.jit
    def _attend(
        item, layer_ptr, starts_ptr, cos_ptr, sin_ptr, qkv_ptr, partial_ptr, weights_ptr, num_tokens, width,
        num_text_slots, cache_row, head_eps, scaling,
        HAS_HEAD_NORM: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
        SPLITS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """All queries of a row and key head over one split of its keys, of which it first writes those that are new.

        partial: [tokens, splits, heads, dim], what the split alone would give. weights: its maximum and its sum.
        """
        GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
        QKV: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * DIM
        dtype: tl.constexpr = qkv_ptr.dtype.element_ty
        row, kv_head, split, start, window, first, last = _keys_of(
            item, starts_ptr, layer_ptr, width, num_text_slots, NUM_KV_HEADS, SPLITS, BLOCK_KEYS
        )
        keys_ptr = _pointer(layer_ptr, KEYS, qkv_ptr) + row.to(tl.int64) * cache_row + kv_head * DIM
        values_ptr = _pointer(layer_ptr, VALUES, qkv_ptr) + row.to(tl.int64) * cache_row + kv_head * DIM
        dim = tl.arange(0, BLOCK_DIM)
        dim_ok = (dim < DIM)[None, :]
        new = tl.arange(0, BLOCK_WIDTH)
        new_slot = start + new
        mine = (new < width) & (new_slot >= first) & (new_slot < last)
        key_norm_ptr = _pointer(layer_ptr, KEY_NORM, qkv_ptr)
        key_head = tl.zeros([BLOCK_WIDTH], tl.int32) + NUM_HEADS + kv_head
        new_key = _rotated(
            qkv_ptr,
            row * width + new,
            key_head,
            new_slot,
            mine,
            cos_ptr,
            sin_ptr,
            key_norm_ptr,
            head_eps,
            HAS_HEAD_NORM,
            QKV,
            DIM,
            BLOCK_DIM,
        )
        source = (row * width + new) * QKV + (key_head + NUM_KV_HEADS) * DIM
        new_value = tl.load(
            qkv_ptr + source[:, None] + dim[None, :], mask=mine[:, None] & dim_ok, other=0.0, cache_modifier=".cg"
        )
        new_place = new_slot.to(tl.int64)[:, None] * (NUM_KV_HEADS * DIM) + dim[None, :]
        tl.store(keys_ptr + new_place, new_key, mask=mine[:, None] & dim_ok)
        tl.store(values_ptr + new_place, new_value, mask=mine[:, None] & dim_ok)
        pair = tl.arange(0, BLOCK_PAIRS)
        column = pair // GROUP
        pair_ok = column < width
        token = row * width + column
        head = kv_head * GROUP + pair % GROUP
        position = start + column
        query_norm_ptr = _pointer(layer_ptr, QUERY_NORM, qkv_ptr)
        query = _rotated(
            qkv_ptr,
            token,
            head,
            position,
            pair_ok,
            cos_ptr,
            sin_ptr,
            query_norm_ptr,
            head_eps,
            HAS_HEAD_NORM,
            QKV,
            DIM,
            BLOCK_DIM,
        )
        low = tl.where(window > 0, position - window, -1)
        highest = tl.full([BLOCK_PAIRS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_PAIRS], tl.float32)
        values = tl.zeros([BLOCK_PAIRS, BLOCK_DIM], tl.float32)
        tl.debug_barrier()  # the new keys are read back below, by other threads of this program
        for begin in tl.range(first, last, BLOCK_KEYS, num_stages=STAGES):
            slot = begin + tl.arange(0, BLOCK_KEYS)
            slot_ok = (slot < last)[:, None] & dim_ok
            place = slot.to(tl.int64)[:, None] * (NUM_KV_HEADS * DIM) + dim[None, :]
            key = tl.load(keys_ptr + place, mask=slot_ok, other=0.0, cache_modifier=".cg")
            value = tl.load(values_ptr + place, mask=slot_ok, other=0.0, cache_modifier=".cg")
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
            visible = (slot < last)[None, :] & (slot[None, :] <= position[:, None]) & (slot[None, :] > low[:, None])
            score = tl.where(visible, score, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(score, 1))
            # While a query has seen nothing its maximum stays -inf; 0 in its place keeps NaN out.
            finite = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            weight = tl.exp(score - finite[:, None])
            scale = tl.exp(highest - finite)
            total = total * scale + tl.sum(weight, 1)
            values = tl.dot(weight.to(dtype), value, values * scale[:, None], input_precision="ieee")
            highest = new_highest
        values = values / tl.where(total == 0.0, 1.0, total)[:, None]
        result = (token * SPLITS + split) * NUM_HEADS + head
        tl.store(partial_ptr + result[:, None] * DIM + dim[None, :], values.to(dtype), mask=pair_ok[:, None] & dim_ok)
        tl.store(weights_ptr + result, highest, mask=pair_ok)
        tl.store(weights_ptr + num_tokens * SPLITS * NUM_HEADS + result, total, mask=pair_ok)

    @triton.jit
    def _merged(
        partial_ptr, weights_ptr, chunk, num_tokens, NUM_HEADS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr,
        SPLITS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
    ):  # fmt: skip
        """The attention's result for BLOCK_HEADS heads out of its splits, [TOKENS, BLOCK_HEADS * BLOCK_DIM]."""
        if SPLITS == 1:
            alone = tl.arange(0, TOKENS)[:, None]
            padded = tl.arange(0, BLOCK_HEADS * BLOCK_DIM)[None, :]
            of_head = chunk * BLOCK_HEADS + padded // BLOCK_DIM
            alone_ok = (alone < num_tokens) & (of_head < NUM_HEADS) & (padded % BLOCK_DIM < DIM)
            source = partial_ptr + alone * (NUM_HEADS * DIM) + of_head * DIM + padded % BLOCK_DIM
            return tl.load(source, mask=alone_ok, other=0.0, cache_modifier=".cg")
        token = tl.arange(0, TOKENS)[:, None, None]
        head = chunk * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[None, None, :]
        place = (token * SPLITS + tl.arange(0, SPLITS)[None, :, None]) * NUM_HEADS + head
        ok = (token < num_tokens) & (head < NUM_HEADS) & (place >= 0)  # of all three dimensions
        highest = tl.load(weights_ptr + place, mask=ok, other=float("-inf"), cache_modifier=".cg")
        total = tl.load(weights_ptr + num_tokens * SPLITS * NUM_HEADS + place, mask=ok, other=0.0, cache_modifier=".cg")
        dim = tl.arange(0, BLOCK_DIM)[None, None, None, :]
        values = tl.load(
            partial_ptr + place[:, :, :, None] * DIM + dim,
            mask=ok[:, :, :, None] & (dim < DIM),
            other=0.0,
            cache_modifier=".cg",
        )
        overall = tl.max(highest, 1)[:, None, :]
        weight = total * tl.exp(highest - tl.where(overall == float("-inf"), 0.0, overall))
        weight = weight / tl.maximum(tl.sum(weight, 1), 1e-30)[:, None, :]
        attended = tl.sum(values.to(tl.float32) * weight[:, :, :, None], 1)
        return tl.reshape(attended.to(partial_ptr.dtype.element_ty), (TOKENS, BLOCK_HEADS * BLOCK_DIM))

    @triton.jit
    def _prefetch_keys(
        layer_ptr, starts_ptr, like_ptr, width, num_items, num_text_slots, cache_row, NUM_KV_HEADS: tl.constexpr,
        DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    ):  # fmt: skip
        """The keys and values that this program will attend to first."""
        item = tl.program_id(0)
        if item < num_items:
            row, kv_head, _, _, _, first, last = _keys_of(
                item, starts_ptr, layer_ptr, width, num_text_slots, NUM_KV_HEADS, SPLITS, BLOCK_KEYS
            )
            keys_ptr = _pointer(layer_ptr, KEYS, like_ptr) + row.to(tl.int64) * cache_row + kv_head * DIM
            values_ptr = _pointer(layer_ptr, VALUES, like_ptr) + row.to(tl.int64) * cache_row + kv_head * DIM
            for begin in range(first, last, BLOCK_KEYS):
                slot = tl.minimum(begin + tl.arange(0, BLOCK_KEYS), last - 1).to(tl.int64)
                _prefetch(keys_ptr + slot * (NUM_KV_HEADS * DIM), DIM)
                _prefetch(values_ptr + slot * (NUM_KV_HEADS * DIM), DIM)

    @triton.jit
    def _store_qkv(
        x, tile, layer_ptr, qkv_ptr, num_tokens, HAS_BIAS: tl.constexpr, QUERY: tl.constexpr, KEY: tl.constexpr,
        SIZE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, NUM_WARPS: tl.constexpr,
    ):  # fmt: skip
        NUM_BLOCKS: tl.constexpr = (QUERY + ROWS - 1) // ROWS + 2 * ((KEY + ROWS - 1) // ROWS)
        token = tl.arange(0, TOKENS)
        for block in range(tl.program_id(0), NUM_BLOCKS, tl.num_programs(0)):
            total = _product(x, tile, NUM_WARPS)
            which, first = _part(block, QUERY, KEY, ROWS)
            row = first + tl.arange(0, ROWS)
            ok = row < tl.where(which == 0, QUERY, KEY)
            if HAS_BIAS:
                bias_ptr = _pointer(layer_ptr, BIAS + which, qkv_ptr)
                total += tl.load(bias_ptr + row, mask=ok, other=0.0).to(tl.float32)[None, :]
            begin = tl.minimum(which, 1) * QUERY + tl.maximum(which - 1, 0) * KEY
            place = token[:, None] * (QUERY + 2 * KEY) + begin + row[None, :]
            ok = (token < num_tokens)[:, None] & ok[None, :]
            tl.store(qkv_ptr + place, total.to(qkv_ptr.dtype.element_ty), mask=ok)
            # Mostly there is no further tile; a second one in registers would leave none for the product.
            tile = _load_qkv(layer_ptr, block + tl.num_programs(0), qkv_ptr, QUERY, KEY, SIZE, ROWS, BLOCK)

    @triton.jit
    def _add_attended(
        tile, out_ptr, hidden_ptr, partial_ptr, weights_ptr, num_tokens, SIZE: tl.constexpr, NUM_HEADS: tl.constexpr,
        DIM: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
        BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, NUM_WARPS: tl.constexpr,
    ):  # fmt: skip
        CHUNKS: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
        num_blocks = ((SIZE + ROWS - 1) // ROWS - tl.program_id(0) + tl.num_programs(0) - 1) // tl.num_programs(0)
        total = tl.zeros([TOKENS, ROWS], tl.float32)
        for step in range(num_blocks * CHUNKS):
            attended = _merged(
                partial_ptr, weights_ptr, step % CHUNKS, num_tokens, NUM_HEADS, DIM, TOKENS, SPLITS, BLOCK_HEADS,
                BLOCK_DIM,
            )  # fmt: skip
            total += _product(attended, tile, NUM_WARPS)
            if step % CHUNKS == CHUNKS - 1:
                first = (tl.program_id(0) + step // CHUNKS * tl.num_programs(0)) * ROWS
                _add_to_hidden(hidden_ptr, total, first, num_tokens, SIZE)
                total = tl.zeros([TOKENS, ROWS], tl.float32)
            tile = _load_inner(
                out_ptr, step + 1, SIZE, NUM_HEADS * DIM, DIM, BLOCK_DIM, ROWS, BLOCK_HEADS * BLOCK_DIM, CHUNKS
            )

    @triton.jit
    def _store_gated(
        x, gate_tile, up_tile, gate_ptr, up_ptr, gated_ptr, num_tokens, SIZE_GATE: tl.constexpr, SIZE: tl.constexpr,
        TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, NUM_WARPS: tl.constexpr,
    ):  # fmt: skip
        dtype: tl.constexpr = gated_ptr.dtype.element_ty
        token = tl.arange(0, TOKENS)
        for block in range(tl.program_id(0), (SIZE_GATE + ROWS - 1) // ROWS, tl.num_programs(0)):
            first = (block + tl.num_programs(0)) * ROWS
            next_gate = _load_rows(gate_ptr, first, SIZE_GATE, SIZE, ROWS, BLOCK)
            next_up = _load_rows(up_ptr, first, SIZE_GATE, SIZE, ROWS, BLOCK)
            gate = _product(x, gate_tile, NUM_WARPS).to(dtype).to(tl.float32)
            up = _product(x, up_tile, NUM_WARPS).to(dtype).to(tl.float32)
            gated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
            row = block * ROWS + tl.arange(0, ROWS)
            ok = (token < num_tokens)[:, None] & (row < SIZE_GATE)[None, :]
            tl.store(gated_ptr + token[:, None] * SIZE_GATE + row[None, :], gated.to(dtype), mask=ok)
            gate_tile = next_gate
            up_tile = next_up

    @triton.jit
    def _add_down(
        tile, down_ptr, hidden_ptr, gated_ptr, num_tokens, SIZE: tl.constexpr, SIZE_GATE: tl.constexpr,
        TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr, NUM_WARPS: tl.constexpr,
    ):  # fmt: skip
        CHUNKS: tl.constexpr = (SIZE_GATE + BLOCK_INNER - 1) // BLOCK_INNER
        num_blocks = ((SIZE + ROWS - 1) // ROWS - tl.program_id(0) + tl.num_programs(0) - 1) // tl.num_programs(0)
        token = tl.arange(0, TOKENS)
        total = tl.zeros([TOKENS, ROWS], tl.float32)
        for step in range(num_blocks * CHUNKS):
            inner = step % CHUNKS * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
            place = token[:, None] * SIZE_GATE + inner[None, :]
            ok = (token < num_tokens)[:, None] & (inner < SIZE_GATE)[None, :]
            gated = tl.load(gated_ptr + place, mask=ok, other=0.0, cache_modifier=".cg")
            total += _product(gated, tile, NUM_WARPS)
            if step % CHUNKS == CHUNKS - 1:
                first = (tl.program_id(0) + step // CHUNKS * tl.num_programs(0)) * ROWS
                _add_to_hidden(hidden_ptr, total, first, num_tokens, SIZE)
                total = tl.zeros([TOKENS, ROWS], tl.float32)
            tile = _load_inner(down_ptr, step + 1, SIZE, SIZE_GATE, 1, 1, ROWS, BLOCK_INNER, CHUNKS)

    @triton.jit
    def _store_logits(
        x, head_ptr, tile, logits_ptr, num_tokens, vocab, SIZE: tl.constexpr, TOKENS: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr, PREFETCH: tl.constexpr, NUM_WARPS: tl.constexpr,
    ):  # fmt: skip
        token = tl.arange(0, TOKENS)
        num_programs = tl.num_programs(0)
        for block in range(tl.program_id(0), tl.cdiv(vocab, ROWS), num_programs):
            row = block * ROWS + tl.arange(0, ROWS)
            if PREFETCH:
                ahead = tl.minimum(row + 2 * num_programs * ROWS, vocab - 1)
                _prefetch(head_ptr + ahead.to(tl.int64) * SIZE, SIZE)
            following = _load_rows(head_ptr, (block + num_programs) * ROWS, vocab, SIZE, ROWS, BLOCK)
            total = _product(x, tile, NUM_WARPS)
            place = token.to(tl.int64)[:, None] * vocab + row[None, :]
            ok = (token < num_tokens)[:, None] & (row < vocab)[None, :]
            tl.store(logits_ptr + place, total.to(logits_ptr.dtype.element_ty), mask=ok)
            tile = following

    @triton.jit(do_not_specialize=["rows", "width", "num_layers", "num_text_slots"])
    def persistent_step_kernel(
        token_ids_ptr, starts_ptr, table_ptr, arrived_ptr, embedding_ptr, norm_ptr, head_ptr, cos_ptr, sin_ptr,
        hidden_ptr, qkv_ptr, partial_ptr, weights_ptr, gated_ptr, normed_ptr, logits_ptr,
        rows, width, num_layers, num_text_slots, cache_row, vocab, eps, head_eps, scaling,
        HAS_BIAS: tl.constexpr, HAS_HEAD_NORM: tl.constexpr, NUM_ENTRIES: tl.constexpr,
        SIZE: tl.constexpr, SIZE_GATE: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
        DIM: tl.constexpr, TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
        BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
        BLOCK_INNER: tl.constexpr, BLOCK_QKV: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_GATE: tl.constexpr,
        BLOCK_DOWN: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_KEYS: tl.constexpr,
        ATTENTION_STAGES: tl.constexpr, PREFETCH: tl.constexpr, NUM_WARPS: tl.constexpr,
    ):  # fmt: skip
        """Five parts a layer, each behind a barrier. In each, the cache is first asked for what later parts read, and
        the first tile of the next part is loaded last, before the wait."""
        QUERY: tl.constexpr = NUM_HEADS * DIM
        KEY: tl.constexpr = NUM_KV_HEADS * DIM
        OUT_CHUNKS: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
        DOWN_CHUNKS: tl.constexpr = (SIZE_GATE + BLOCK_INNER - 1) // BLOCK_INNER
        program = tl.program_id(0)
        num_tokens = rows * width
        num_items = rows * NUM_KV_HEADS * SPLITS
        column = tl.arange(0, BLOCK)
        for i in range(program, num_tokens, tl.num_programs(0)):
            source = embedding_ptr + tl.load(token_ids_ptr + i) * SIZE
            embedded = tl.load(source + column, mask=column < SIZE, other=0.0)
            tl.store(hidden_ptr + i * SIZE + column, embedded, mask=column < SIZE)
        qkv_tile = _load_qkv(table_ptr, program, hidden_ptr, QUERY, KEY, SIZE, BLOCK_QKV, BLOCK)
        for layer in tl.range(num_layers, disable_licm=True):
            layer_ptr = table_ptr + layer * NUM_ENTRIES
            next_ptr = table_ptr + tl.minimum(layer + 1, num_layers - 1) * NUM_ENTRIES
            out_ptr = _pointer(layer_ptr, OUT, hidden_ptr)
            gate_ptr = _pointer(layer_ptr, GATE, hidden_ptr)
            up_ptr = _pointer(layer_ptr, UP, hidden_ptr)
            down_ptr = _pointer(layer_ptr, DOWN, hidden_ptr)
            attention_norm_ptr = _pointer(layer_ptr, ATTENTION_NORM, hidden_ptr)
            mlp_norm_ptr = _pointer(layer_ptr, MLP_NORM, hidden_ptr)
            _wait_for_all(arrived_ptr)

            if PREFETCH:
                _prefetch_weight(out_ptr, SIZE, QUERY, BLOCK_OUT)
                _prefetch_keys(
                    layer_ptr, starts_ptr, hidden_ptr, width, num_items, num_text_slots, cache_row, NUM_KV_HEADS, DIM,
                    SPLITS, BLOCK_KEYS,
                )  # fmt: skip
            x = _normed(hidden_ptr, attention_norm_ptr, num_tokens, eps, SIZE, TOKENS, BLOCK)
            _store_qkv(
                x, qkv_tile, layer_ptr, qkv_ptr, num_tokens, HAS_BIAS, QUERY, KEY, SIZE, TOKENS, BLOCK_QKV, BLOCK,
                NUM_WARPS,
            )  # fmt: skip
            _wait_for_all(arrived_ptr)

            if PREFETCH:
                _prefetch_weight(gate_ptr, SIZE_GATE, SIZE, BLOCK_GATE)
                _prefetch_weight(up_ptr, SIZE_GATE, SIZE, BLOCK_GATE)
            for item in range(program, num_items, tl.num_programs(0)):
                _attend(
                    item, layer_ptr, starts_ptr, cos_ptr, sin_ptr, qkv_ptr, partial_ptr, weights_ptr, num_tokens,
                    width, num_text_slots, cache_row, head_eps, scaling, HAS_HEAD_NORM, NUM_HEADS, NUM_KV_HEADS, DIM,
                    BLOCK_WIDTH, BLOCK_PAIRS, BLOCK_DIM, BLOCK_KEYS, SPLITS, ATTENTION_STAGES,
                )  # fmt: skip
            out_tile = _load_inner(
                out_ptr, 0, SIZE, QUERY, DIM, BLOCK_DIM, BLOCK_OUT, BLOCK_HEADS * BLOCK_DIM, OUT_CHUNKS
            )
            _wait_for_all(arrived_ptr)

            if PREFETCH:
                _prefetch_weight(down_ptr, SIZE, SIZE_GATE, BLOCK_DOWN)
            _add_attended(
                out_tile, out_ptr, hidden_ptr, partial_ptr, weights_ptr, num_tokens, SIZE, NUM_HEADS, DIM, TOKENS,
                SPLITS, BLOCK_HEADS, BLOCK_DIM, BLOCK_OUT, NUM_WARPS,
            )  # fmt: skip
            gate_tile = _load_rows(gate_ptr, program * BLOCK_GATE, SIZE_GATE, SIZE, BLOCK_GATE, BLOCK)
            up_tile = _load_rows(up_ptr, program * BLOCK_GATE, SIZE_GATE, SIZE, BLOCK_GATE, BLOCK)
            _wait_for_all(arrived_ptr)

            if PREFETCH:
                _prefetch_weight(_pointer(next_ptr, 0, hidden_ptr), QUERY, SIZE, BLOCK_QKV)
                _prefetch_weight(_pointer(next_ptr, 1, hidden_ptr), KEY, SIZE, BLOCK_QKV)
                _prefetch_weight(_pointer(next_ptr, 2, hidden_ptr), KEY, SIZE, BLOCK_QKV)
            y = _normed(hidden_ptr, mlp_norm_ptr, num_tokens, eps, SIZE, TOKENS, BLOCK)
            _store_gated(
                y, gate_tile, up_tile, gate_ptr, up_ptr, gated_ptr, num_tokens, SIZE_GATE, SIZE, TOKENS, BLOCK_GATE,
                BLOCK, NUM_WARPS,
            )  # fmt: skip
            down_tile = _load_inner(down_ptr, 0, SIZE, SIZE_GATE, 1, 1, BLOCK_DOWN, BLOCK_INNER, DOWN_CHUNKS)
            _wait_for_all(arrived_ptr)

            _add_down(
                down_tile, down_ptr, hidden_ptr, gated_ptr, num_tokens, SIZE, SIZE_GATE, TOKENS, BLOCK_DOWN,
                BLOCK_INNER, NUM_WARPS,
            )  # fmt: skip
            qkv_tile = _load_qkv(next_ptr, program, hidden_ptr, QUERY, KEY, SIZE, BLOCK_QKV, BLOCK)

        head_tile = _load_rows(head_ptr, program * BLOCK_HEAD, vocab, SIZE, BLOCK_HEAD, BLOCK)
        _wait_for_all(arrived_ptr)
        normed = _normed(hidden_ptr, norm_ptr, num_tokens, eps, SIZE, TOKENS, BLOCK)
        if program == 0:
            token = tl.arange(0, TOKENS)
            ok = (token < num_tokens)[:, None] & (column < SIZE)[None, :]
            tl.store(normed_ptr + token[:, None] * SIZE + column[None, :], normed, mask=ok)
        _store_logits(
            normed, head_ptr, head_tile, logits_ptr, num_tokens, vocab, SIZE, TOKENS, BLOCK_HEAD, BLOCK, PREFETCH,
            NUM_WARPS,
        )  # fmt: skip
