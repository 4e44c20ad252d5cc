"""The kernel of `persistent_step`: one program per multiprocessor, five barriers a layer.

query, key, value | attention, by splits of the keys | their merge and the output projection | gate and up | down
Every program normalises the whole hidden state itself, which is cheaper than another barrier; no product is split among
programs, so each column of a result has one owner that walks its inner dimension in a fixed order.

What other programs wrote in this launch is read past the first-level cache (".cg"), which no barrier among programs
brings up to date for those that wait.
"""

from __future__ import annotations

from specdec.kernels.dispatch import kernel, triton

if triton is not None:
    import triton.language as tl

    # Entries of a layer's row in the table.
    BIAS, OUT, GATE, UP, DOWN = map(tl.constexpr, (3, 6, 7, 8, 9))
    ATTENTION_NORM, MLP_NORM, QUERY_NORM, KEY_NORM = map(tl.constexpr, (10, 11, 12, 13))
    KEYS, VALUES, WINDOW = map(tl.constexpr, (14, 15, 16))

    @triton.jit
    def _arrive(arrived_ptr, POLLS: tl.constexpr):
        """Comes after this program's stores; its next loads are in flight while others arrive."""
        tl.debug_barrier()
        if POLLS:
            tl.inline_asm_elementwise(
                """{ .reg .pred first; .reg .u32 thread;
                mov.u32 thread, %tid.x;
                setp.eq.u32 first, thread, 0;
                @first red.release.gpu.global.add.u64 [$1], 1;
                mov.u32 $0, 0; }""",
                "=r,l,~{memory}", [arrived_ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            tl.atomic_add(arrived_ptr, 1, sem="release", scope="gpu")

    @triton.jit
    def _wait(arrived_ptr, target, POLLS: tl.constexpr):
        """Until `target` arrivals: all programs' stores before theirs can be read, past the first-level cache (".cg").

        POLLS: one thread reads, in place of atomics, which would stand in the way of those that arrive.
        """
        if POLLS:
            tl.inline_asm_elementwise(
                """{ .reg .pred again; .reg .u32 thread; .reg .u64 count;
                mov.u32 thread, %tid.x;
                setp.ne.u32 again, thread, 0;
                @again bra DONE;
                AGAIN: ld.acquire.gpu.global.u64 count, [$1];
                setp.lt.u64 again, count, $2;
                @again bra AGAIN;
                DONE: mov.u32 $0, 0; }""",
                "=r,l,l,~{memory}", [arrived_ptr.to(tl.int64), target], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            while tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu") < target:
                pass
        tl.debug_barrier()

    @triton.jit
    def _spread_rows(ROWS: tl.constexpr):
        """Numbers of rows, [8, 1, ROWS / 8, 1], and below of columns, [1, BLOCK / 32, 1, 32].

        A tile of this shape is loaded 16 bytes a thread, 8 rows and 4 threads along each to a warp, a piece of 32
        columns to each warp: as a tensor core's operand lies in registers, but for the order of the columns.
        """
        LOW: tl.constexpr = min(8, ROWS)
        low = tl.arange(0, LOW)[:, None, None, None]
        return low + 8 * tl.arange(0, ROWS // LOW)[None, None, :, None]

    @triton.jit
    def _spread_columns(BLOCK: tl.constexpr):
        return tl.arange(0, BLOCK // 32)[None, :, None, None] * 32 + tl.arange(0, 32)[None, None, None, :]

    @triton.jit
    def _pointer(layer_ptr, entry, like_ptr):
        address = tl.load(layer_ptr + entry)
        # PyTorch's allocations and the wrapper's check give the alignment, which wide loads need.
        return tl.multiple_of(address.to(like_ptr.dtype), 16)

    @triton.jit
    def _load_rows(
        weight_ptr, first, num_rows, SIZE_IN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        """Rows [first, first + ROWS) of BLOCK columns, spread; zeros outside of [num_rows, SIZE_IN]."""
        TILE: tl.constexpr = triton.next_power_of_2(ROWS)
        row = _spread_rows(TILE)
        column = _spread_columns(BLOCK)
        ok = first + row < num_rows
        if TILE != ROWS:
            ok = ok & (row < ROWS)
        if SIZE_IN != BLOCK:
            ok = ok & (column < SIZE_IN)
        return tl.load(weight_ptr + (first + row).to(tl.int64) * SIZE_IN + column, mask=ok, other=0.0)

    @triton.jit
    def _load_inner(
        weight_ptr, step, SIZE: tl.constexpr, SIZE_IN: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    ):  # fmt: skip
        """A spread tile of weights [SIZE, SIZE_IN]: this program's number `step`, the chunks of its first rows before
        those of its next. DIM columns are padded to BLOCK_DIM each."""
        row = (tl.program_id(0) + step // CHUNKS * tl.num_programs(0)) * ROWS + _spread_rows(ROWS)
        column = step % CHUNKS * BLOCK + _spread_columns(BLOCK)
        ok = row < SIZE
        if DIM == BLOCK_DIM:
            if SIZE_IN % BLOCK != 0:
                ok = ok & (column < SIZE_IN)
        else:
            ok = ok & (column % BLOCK_DIM < DIM) & (column // BLOCK_DIM < SIZE_IN // DIM)
            column = column // BLOCK_DIM * DIM + column % BLOCK_DIM
        return tl.load(weight_ptr + row.to(tl.int64) * SIZE_IN + column, mask=ok, other=0.0)

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
            row = tl.minimum(first + tl.arange(0, triton.next_power_of_2(ROWS)), NUM_ROWS - 1)
            _prefetch(weight_ptr + row.to(tl.int64) * SIZE_IN, SIZE_IN)

    @triton.jit
    def _normed(hidden_ptr, weight_ptr, num_tokens, eps, SIZE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
        """RMSNorm of the hidden state, TOKENS spread rows of BLOCK; every program computes all of it."""
        token = _spread_rows(TOKENS)
        column = _spread_columns(BLOCK)
        ok = (token < num_tokens) & (column < SIZE)
        x = tl.load(hidden_ptr + token * SIZE + column, mask=ok, other=0.0, cache_modifier=".cg").to(tl.float32)
        # Once for each of up to 8 tokens, so that it has the layout of x.
        place = _spread_rows(min(8, TOKENS)) * 0 + column
        weight = tl.load(weight_ptr + place, mask=place < SIZE, other=0.0).to(tl.float32)
        squares = tl.reshape(tl.permute(x * x, (0, 2, 1, 3)), (x.shape[0], x.shape[2], BLOCK))
        squares = tl.sum(squares, 2)[:, None, :, None]
        dtype: tl.constexpr = hidden_ptr.dtype.element_ty
        return ((x * tl.rsqrt(squares / SIZE + eps)).to(dtype).to(tl.float32) * weight).to(dtype)

    @triton.jit
    def _operand(tile, PARTS: tl.constexpr):
        """A spread tile as [PARTS, rows, columns / PARTS]; columns in an order in which no thread gives one away."""
        LOW: tl.constexpr = tile.shape[0]
        PIECES: tl.constexpr = tile.shape[1]
        HIGH: tl.constexpr = tile.shape[2]
        tile = tl.reshape(tile, (LOW, PIECES // PARTS, PARTS, HIGH, 4, 2, 2, 2))
        return tl.reshape(tl.permute(tile, (2, 3, 0, 1, 5, 6, 4, 7)), (PARTS, HIGH * LOW, PIECES * 32 // PARTS))

    @triton.jit
    def _product(x, weight, NUM_WARPS: tl.constexpr):
        """Spread x of TOKENS rows and weight of ROWS to [TOKENS, ROWS] in float32."""
        if x.shape[0] == 1:
            total = tl.sum(tl.sum(x.to(tl.float32) * weight.to(tl.float32), 3), 1)
            return tl.reshape(tl.trans(total), (1, weight.shape[0] * weight.shape[2]))
        else:
            # A batched product gives each warp its own columns; alone, a warp's chain of additions would be too long.
            PARTS: tl.constexpr = min(NUM_WARPS, x.shape[1])
            right = tl.trans(_operand(weight, PARTS), 0, 2, 1)
            return tl.sum(tl.dot(_operand(x, PARTS), right, input_precision="ieee"), 0)

    @triton.jit
    def _own_hidden(hidden_ptr, first, num_tokens, SIZE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr):
        """Only the program that owns the rows of weights reads and writes these columns between two barriers."""
        token = tl.arange(0, TOKENS)
        column = first + tl.arange(0, ROWS)
        ok = (token < num_tokens)[:, None] & (column < SIZE)[None, :]
        return hidden_ptr + token[:, None] * SIZE + column[None, :], ok

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
    def _start_of(item, starts_ptr, rows, NUM_KV_HEADS: tl.constexpr, SPLITS: tl.constexpr):
        return tl.load(starts_ptr + tl.minimum(item // (SPLITS * NUM_KV_HEADS), rows - 1)).to(tl.int32)

    @triton.jit
    def _keys_of(
        item, start, window, width, num_text_slots, NUM_KV_HEADS: tl.constexpr, SPLITS: tl.constexpr,
        BLOCK_KEYS: tl.constexpr,
    ):  # fmt: skip
        """An item of attention: its row, key head and split and the slots of the split."""
        row = item // (SPLITS * NUM_KV_HEADS)
        split = item % SPLITS
        end = tl.where(start < num_text_slots, start + width, 0)
        lowest = tl.where(window > 0, tl.maximum(start + 1 - window, 0), 0)
        share = tl.cdiv(tl.cdiv(end - lowest, SPLITS), BLOCK_KEYS) * BLOCK_KEYS
        first = lowest + split * share
        return row, item // SPLITS % NUM_KV_HEADS, split, first, tl.minimum(first + share, end)

    @triton.jit
    def _attend(
        item, start, window, keys_ptr, values_ptr, query_norm_ptr, key_norm_ptr, cos_ptr, sin_ptr, qkv_ptr,
        partial_ptr, weights_ptr, num_tokens, width, num_text_slots, cache_row, head_eps, scaling,
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
        row, kv_head, split, first, last = _keys_of(
            item, start, window, width, num_text_slots, NUM_KV_HEADS, SPLITS, BLOCK_KEYS
        )
        keys_ptr += row.to(tl.int64) * cache_row + kv_head * DIM
        values_ptr += row.to(tl.int64) * cache_row + kv_head * DIM
        dim = tl.arange(0, BLOCK_DIM)
        dim_ok = (dim < DIM)[None, :]
        new = tl.arange(0, BLOCK_WIDTH)
        new_slot = start + new
        mine = (new < width) & (new_slot >= first) & (new_slot < last)
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
        """The attention's result for BLOCK_HEADS heads out of its splits: TOKENS spread rows."""
        BLOCK: tl.constexpr = BLOCK_HEADS * BLOCK_DIM
        token = _spread_rows(TOKENS)
        column = _spread_columns(BLOCK)
        head = chunk * BLOCK_HEADS + column // BLOCK_DIM
        dim = column % BLOCK_DIM
        ok = (token < num_tokens) & (head < NUM_HEADS) & (dim < DIM)
        if SPLITS == 1:
            source = partial_ptr + token * (NUM_HEADS * DIM) + head * DIM + dim
            return tl.load(source, mask=ok, other=0.0, cache_modifier=".cg")
        split = tl.arange(0, SPLITS)[None, None, None, :, None]
        values_ptr = partial_ptr + (token * (SPLITS * NUM_HEADS * DIM) + head * DIM + dim)[:, :, :, None, :]
        every = ok[:, :, :, None, :] & (split < SPLITS)
        values = tl.load(values_ptr + split * (NUM_HEADS * DIM), mask=every, other=0.0, cache_modifier=".cg")
        # No piece of 32 columns holds two heads.
        piece = tl.arange(0, BLOCK // 32)[None, :, None, None]
        head_of = chunk * BLOCK_HEADS + piece * 32 // BLOCK_DIM
        place = (token * SPLITS + tl.arange(0, SPLITS)[None, None, None, :]) * NUM_HEADS + head_of
        place_ok = (token < num_tokens) & (head_of < NUM_HEADS) & (place >= 0)
        highest = tl.load(weights_ptr + place, mask=place_ok, other=float("-inf"), cache_modifier=".cg")
        total_ptr = weights_ptr + num_tokens * (SPLITS * NUM_HEADS)
        total = tl.load(total_ptr + place, mask=place_ok, other=0.0, cache_modifier=".cg")
        overall = tl.max(highest, 3)[:, :, :, None]
        weight = total * tl.exp(highest - tl.where(overall == float("-inf"), 0.0, overall))
        weight = weight / tl.maximum(tl.sum(weight, 3), 1e-30)[:, :, :, None]
        return tl.sum(values.to(tl.float32) * weight[:, :, :, :, None], 3).to(partial_ptr.dtype.element_ty)

    @triton.jit
    def _prefetch_keys(
        start, window, keys_ptr, values_ptr, width, num_items, num_text_slots, cache_row,
        NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    ):  # fmt: skip
        """The keys and values that this program will attend to first."""
        item = tl.program_id(0)
        if item < num_items:
            row, kv_head, _, first, last = _keys_of(
                item, start, window, width, num_text_slots, NUM_KV_HEADS, SPLITS, BLOCK_KEYS
            )
            keys_ptr += row.to(tl.int64) * cache_row + kv_head * DIM
            values_ptr += row.to(tl.int64) * cache_row + kv_head * DIM
            for begin in range(first, last, BLOCK_KEYS):
                slot = tl.minimum(begin + tl.arange(0, BLOCK_KEYS), last - 1).to(tl.int64)
                _prefetch(keys_ptr + slot * (NUM_KV_HEADS * DIM), DIM)
                _prefetch(values_ptr + slot * (NUM_KV_HEADS * DIM), DIM)

    @triton.jit
    def _prefetch_norms(
        layer_ptr, next_ptr, like_ptr, HAS_HEAD_NORM: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr
    ):  # fmt: skip
        one = tl.zeros([1], tl.int32)
        _prefetch(_pointer(layer_ptr, MLP_NORM, like_ptr) + one, SIZE)
        _prefetch(_pointer(next_ptr, ATTENTION_NORM, like_ptr) + one, SIZE)
        if HAS_HEAD_NORM:
            _prefetch(_pointer(layer_ptr, QUERY_NORM, like_ptr) + one, DIM)
            _prefetch(_pointer(layer_ptr, KEY_NORM, like_ptr) + one, DIM)

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
        dtype: tl.constexpr = hidden_ptr.dtype.element_ty
        for step in range(num_blocks * CHUNKS):
            first = (tl.program_id(0) + step // CHUNKS * tl.num_programs(0)) * ROWS
            place, ok = _own_hidden(hidden_ptr, first, num_tokens, SIZE, TOKENS, ROWS)
            before = tl.load(place, mask=ok, other=0.0, cache_modifier=".cg").to(tl.float32)
            attended = _merged(
                partial_ptr, weights_ptr, step % CHUNKS, num_tokens, NUM_HEADS, DIM, TOKENS, SPLITS, BLOCK_HEADS,
                BLOCK_DIM,
            )  # fmt: skip
            total += _product(attended, tile, NUM_WARPS)
            if step % CHUNKS == CHUNKS - 1:
                tl.store(place, (before + total.to(dtype).to(tl.float32)).to(dtype), mask=ok)
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
            gate = _product(x, gate_tile, NUM_WARPS).to(dtype).to(tl.float32)
            up = _product(x, up_tile, NUM_WARPS).to(dtype).to(tl.float32)
            gated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
            row = block * ROWS + tl.arange(0, gate_tile.shape[0] * gate_tile.shape[2])
            ok = (token < num_tokens)[:, None] & (row < tl.minimum((block + 1) * ROWS, SIZE_GATE))[None, :]
            tl.store(gated_ptr + token[:, None] * SIZE_GATE + row[None, :], gated.to(dtype), mask=ok)
            first = (block + tl.num_programs(0)) * ROWS
            gate_tile = _load_rows(gate_ptr, first, SIZE_GATE, SIZE, ROWS, BLOCK)
            up_tile = _load_rows(up_ptr, first, SIZE_GATE, SIZE, ROWS, BLOCK)

    @triton.jit
    def _add_down(
        tile, down_ptr, hidden_ptr, gated_ptr, num_tokens, SIZE: tl.constexpr, SIZE_GATE: tl.constexpr,
        TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr, NUM_WARPS: tl.constexpr,
    ):  # fmt: skip
        CHUNKS: tl.constexpr = (SIZE_GATE + BLOCK_INNER - 1) // BLOCK_INNER
        num_blocks = ((SIZE + ROWS - 1) // ROWS - tl.program_id(0) + tl.num_programs(0) - 1) // tl.num_programs(0)
        token = _spread_rows(TOKENS)
        total = tl.zeros([TOKENS, ROWS], tl.float32)
        dtype: tl.constexpr = hidden_ptr.dtype.element_ty
        for step in range(num_blocks * CHUNKS):
            first = (tl.program_id(0) + step // CHUNKS * tl.num_programs(0)) * ROWS
            place, ok = _own_hidden(hidden_ptr, first, num_tokens, SIZE, TOKENS, ROWS)
            before = tl.load(place, mask=ok, other=0.0, cache_modifier=".cg").to(tl.float32)
            inner = step % CHUNKS * BLOCK_INNER + _spread_columns(BLOCK_INNER)
            inner_ok = (token < num_tokens) & (inner < SIZE_GATE)
            gated = tl.load(gated_ptr + token * SIZE_GATE + inner, mask=inner_ok, other=0.0, cache_modifier=".cg")
            total += _product(gated, tile, NUM_WARPS)
            if step % CHUNKS == CHUNKS - 1:
                tl.store(place, (before + total.to(dtype).to(tl.float32)).to(dtype), mask=ok)
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

    @kernel(do_not_specialize=["rows", "width", "num_layers", "num_text_slots"])
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
        ATTENTION_STAGES: tl.constexpr, PREFETCH: tl.constexpr, POLLS: tl.constexpr, NUM_WARPS: tl.constexpr,
    ):  # fmt: skip
        """Five parts a layer, each after a barrier. While a program waits at a barrier, the first tile of the next part
        is on its way into registers, and the data of the part after that is on its way into the cache.

        Launched with `step.Pointers`, `step.Numbers` and `step.Constants`, by keyword; a test pins that they agree.
        """
        QUERY: tl.constexpr = NUM_HEADS * DIM
        KEY: tl.constexpr = NUM_KV_HEADS * DIM
        OUT_CHUNKS: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
        DOWN_CHUNKS: tl.constexpr = (SIZE_GATE + BLOCK_INNER - 1) // BLOCK_INNER
        program = tl.program_id(0)
        num_programs = tl.num_programs(0)
        # None can pass a barrier at which this program has not arrived, so all see the same multiple.
        target = tl.load(arrived_ptr, volatile=True) // num_programs * num_programs
        num_tokens = rows * width
        num_items = rows * NUM_KV_HEADS * SPLITS
        column = tl.arange(0, BLOCK)
        for i in range(program, num_tokens, num_programs):
            source = embedding_ptr + tl.load(token_ids_ptr + i) * SIZE
            embedded = tl.load(source + column, mask=column < SIZE, other=0.0)
            tl.store(hidden_ptr + i * SIZE + column, embedded, mask=column < SIZE)
        _arrive(arrived_ptr, POLLS)
        first_start = _start_of(program, starts_ptr, rows, NUM_KV_HEADS, SPLITS)
        for layer in tl.range(num_layers, disable_licm=True):
            layer_ptr = table_ptr + layer * NUM_ENTRIES
            next_ptr = table_ptr + tl.minimum(layer + 1, num_layers - 1) * NUM_ENTRIES
            out_ptr = _pointer(layer_ptr, OUT, hidden_ptr)
            gate_ptr = _pointer(layer_ptr, GATE, hidden_ptr)
            up_ptr = _pointer(layer_ptr, UP, hidden_ptr)
            down_ptr = _pointer(layer_ptr, DOWN, hidden_ptr)
            attention_norm_ptr = _pointer(layer_ptr, ATTENTION_NORM, hidden_ptr)
            mlp_norm_ptr = _pointer(layer_ptr, MLP_NORM, hidden_ptr)
            query_norm_ptr = _pointer(layer_ptr, QUERY_NORM, hidden_ptr)
            key_norm_ptr = _pointer(layer_ptr, KEY_NORM, hidden_ptr)
            keys_ptr = _pointer(layer_ptr, KEYS, hidden_ptr)
            values_ptr = _pointer(layer_ptr, VALUES, hidden_ptr)
            window = tl.load(layer_ptr + WINDOW).to(tl.int32)
            qkv_tile = _load_qkv(layer_ptr, program, hidden_ptr, QUERY, KEY, SIZE, BLOCK_QKV, BLOCK)
            if PREFETCH:
                _prefetch_weight(out_ptr, SIZE, QUERY, BLOCK_OUT)
                _prefetch_keys(
                    first_start, window, keys_ptr, values_ptr, width, num_items, num_text_slots, cache_row,
                    NUM_KV_HEADS, DIM, SPLITS, BLOCK_KEYS,
                )  # fmt: skip
                if program == num_programs - 1:
                    _prefetch_norms(layer_ptr, next_ptr, hidden_ptr, HAS_HEAD_NORM, SIZE, DIM)
            target += num_programs
            _wait(arrived_ptr, target, POLLS)

            x = _normed(hidden_ptr, attention_norm_ptr, num_tokens, eps, SIZE, TOKENS, BLOCK)
            _store_qkv(
                x, qkv_tile, layer_ptr, qkv_ptr, num_tokens, HAS_BIAS, QUERY, KEY, SIZE, TOKENS, BLOCK_QKV, BLOCK,
                NUM_WARPS,
            )  # fmt: skip
            _arrive(arrived_ptr, POLLS)
            if PREFETCH:
                _prefetch_weight(gate_ptr, SIZE_GATE, SIZE, BLOCK_GATE)
                _prefetch_weight(up_ptr, SIZE_GATE, SIZE, BLOCK_GATE)
            target += num_programs
            _wait(arrived_ptr, target, POLLS)

            start = first_start
            for item in range(program, num_items, num_programs):
                _attend(
                    item, start, window, keys_ptr, values_ptr, query_norm_ptr, key_norm_ptr, cos_ptr, sin_ptr, qkv_ptr,
                    partial_ptr, weights_ptr, num_tokens, width, num_text_slots, cache_row, head_eps, scaling,
                    HAS_HEAD_NORM, NUM_HEADS, NUM_KV_HEADS, DIM, BLOCK_WIDTH, BLOCK_PAIRS, BLOCK_DIM, BLOCK_KEYS,
                    SPLITS, ATTENTION_STAGES,
                )  # fmt: skip
                start = _start_of(item + num_programs, starts_ptr, rows, NUM_KV_HEADS, SPLITS)
            _arrive(arrived_ptr, POLLS)
            out_tile = _load_inner(
                out_ptr, 0, SIZE, QUERY, DIM, BLOCK_DIM, BLOCK_OUT, BLOCK_HEADS * BLOCK_DIM, OUT_CHUNKS
            )
            if PREFETCH:
                _prefetch_weight(down_ptr, SIZE, SIZE_GATE, BLOCK_DOWN)
            target += num_programs
            _wait(arrived_ptr, target, POLLS)

            _add_attended(
                out_tile, out_ptr, hidden_ptr, partial_ptr, weights_ptr, num_tokens, SIZE, NUM_HEADS, DIM, TOKENS,
                SPLITS, BLOCK_HEADS, BLOCK_DIM, BLOCK_OUT, NUM_WARPS,
            )  # fmt: skip
            _arrive(arrived_ptr, POLLS)
            gate_tile = _load_rows(gate_ptr, program * BLOCK_GATE, SIZE_GATE, SIZE, BLOCK_GATE, BLOCK)
            up_tile = _load_rows(up_ptr, program * BLOCK_GATE, SIZE_GATE, SIZE, BLOCK_GATE, BLOCK)
            if PREFETCH:
                _prefetch_weight(_pointer(next_ptr, 0, hidden_ptr), QUERY, SIZE, BLOCK_QKV)
                _prefetch_weight(_pointer(next_ptr, 1, hidden_ptr), KEY, SIZE, BLOCK_QKV)
                _prefetch_weight(_pointer(next_ptr, 2, hidden_ptr), KEY, SIZE, BLOCK_QKV)
            target += num_programs
            _wait(arrived_ptr, target, POLLS)

            y = _normed(hidden_ptr, mlp_norm_ptr, num_tokens, eps, SIZE, TOKENS, BLOCK)
            _store_gated(
                y, gate_tile, up_tile, gate_ptr, up_ptr, gated_ptr, num_tokens, SIZE_GATE, SIZE, TOKENS, BLOCK_GATE,
                BLOCK, NUM_WARPS,
            )  # fmt: skip
            _arrive(arrived_ptr, POLLS)
            down_tile = _load_inner(down_ptr, 0, SIZE, SIZE_GATE, 1, 1, BLOCK_DOWN, BLOCK_INNER, DOWN_CHUNKS)
            target += num_programs
            _wait(arrived_ptr, target, POLLS)

            _add_down(
                down_tile, down_ptr, hidden_ptr, gated_ptr, num_tokens, SIZE, SIZE_GATE, TOKENS, BLOCK_DOWN,
                BLOCK_INNER, NUM_WARPS,
            )  # fmt: skip
            _arrive(arrived_ptr, POLLS)

        head_tile = _load_rows(head_ptr, program * BLOCK_HEAD, vocab, SIZE, BLOCK_HEAD, BLOCK)
        _wait(arrived_ptr, target + num_programs, POLLS)
        normed = _normed(hidden_ptr, norm_ptr, num_tokens, eps, SIZE, TOKENS, BLOCK)
        if program == 0:
            token = _spread_rows(TOKENS)
            spread = _spread_columns(BLOCK)
            tl.store(normed_ptr + token * SIZE + spread, normed, mask=(token < num_tokens) & (spread < SIZE))
        _store_logits(
            normed, head_ptr, head_tile, logits_ptr, num_tokens, vocab, SIZE, TOKENS, BLOCK_HEAD, BLOCK, PREFETCH,
            NUM_WARPS,
        )  # fmt: skip
