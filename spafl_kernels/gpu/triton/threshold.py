"""The threshold pass: scores, masks, active lists, counts and packed weights of all layers and clients in one launch.

A program has a few filters. Where their rows go depends on how many filters before them are active, which other
programs find out: they tell by look-back (``lookback.py``).

A filter that is not listed knows its place too: counted from the end, as many places as such filters are before it.
There it puts the -1 of the list and the row of zeros behind the packed weights, so that no program has all of them to
write.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import Estimator, check_estimator
from ..geometry import Memory, dense_rows, row_order
from ..packing import HEADER, Selection, capacity, row_stride, selection_size
from .bounds import within
from .device import device_of, on_device_of_first
from .kinds import DTYPES
from .launch import LINE, REMEMBERED, Launch, current_stream, unaligned
from .lookback import LANES, WARPS, look_back

ROWS = 4  # filters of a program
STEP = 512  # numbers of a row that are read at once
FIELDS = 12  # numbers per layer and client in the table of a model


@triton.jit
def _flags(
    weight, threshold, flags, scores, row, out, n_in,
    WINDOW: tl.constexpr, COMPARE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Flags of some rows, stored and returned (0 behind the last row), and their scores, stored.

    The sum runs in float32, as PyTorch's mean does.
    """
    live = row < out
    total = tl.zeros((ROWS, STEP), dtype=tl.float32)
    at = tl.where(live, row, 0)
    start = weight + tl.where(live, row.to(tl.int64) * n_in, 0)[:, None]
    for k0 in range(0, n_in, STEP):
        k = k0 + tl.arange(0, STEP)
        column = within(k, k < n_in)
        part = tl.load(start + column[None, :], mask=live[:, None] & (k < n_in)[None, :], other=0.0)
        total += tl.abs(part.to(tl.float32))
    kind: tl.constexpr = weight.dtype.element_ty
    mean = tl.sum(total, 1) / n_in
    # Rounded to the dtype of the weight before it is compared, as the definition compares.
    score = mean.to(kind).to(tl.float32)
    tau = tl.load(threshold + at, mask=live, other=0.0).to(tl.float32)
    flag = (score > tau).to(tl.int32) + tl.where(mean != mean, 8, 0)
    if WINDOW:
        margin = (score - tau).to(kind).to(tl.float32)
        flag += tl.where(tl.abs(margin) > 1.0, 2, 0)
    else:
        flag += 2
    if COMPARE:
        before = tl.load(flags + at, mask=live, other=0)
    else:
        before = tl.full((ROWS,), -1, tl.int32)
    flag += tl.where((before < 0) | ((before & 1) != (flag & 1)), 4, 0)
    tl.store(flags + row, flag, mask=live)
    tl.store(scores + row, score, mask=live)
    return tl.where(live, flag, 0)


@triton.jit
def _listed(flag):
    """1 for filters that are active or spoiled, else 0."""
    return (flag | (flag >> 3)) & 1


@triton.jit
def _pack(
    weight, flag, index, inverse, packed, row, rank, out, n_in, inner, outer, cap, stride,
    ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """List entries of some filters, and as many packed rows: those of listed filters at their rank, zeros elsewhere.

    A row of the weight lies in memory as ``(inner, outer)`` and is packed as ``(outer, inner)``: channels first to
    channels last. ``outer = 1`` copies it as it is.
    """
    live = row < out
    listed = _listed(flag)
    keep = listed > 0
    position = rank + tl.cumsum(listed, 0) - listed
    # All others fill the list from its end; rows behind the last filter stay where they are.
    place = tl.where(keep, position, tl.where(live, out - 1 - (row - position), row))
    tl.store(inverse + row, tl.where(keep, position, -1), mask=live)
    tl.store(index + place, tl.where(keep, row, -1), mask=live)
    for k0 in range(0, stride, STEP):
        k = k0 + tl.arange(0, STEP)
        column = within(k, k < n_in)
        source = (column % inner) * outer + column // inner
        part = tl.load(
            weight + tl.where(keep, row.to(tl.int64) * n_in, 0)[:, None] + source[None, :],
            mask=keep[:, None] & (k < n_in)[None, :],
            other=0.0,
        )
        part = tl.where(((flag & 1) > 0)[:, None], part, part * 0.0)  # NaN stays NaN
        tl.store(
            packed + place.to(tl.int64)[:, None] * stride + k[None, :],
            part.to(packed.dtype.element_ty),
            mask=(row < cap)[:, None] & (k < stride)[None, :],
        )


@triton.jit
def _block(
    weight, threshold, selection, scores, packed, words, mine, out, n_in, inner, outer, cap, stride,
    WINDOW: tl.constexpr, COMPARE: tl.constexpr, HEADER: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Block ``mine`` of a layer, from scores to packed rows; ``words``: of the blocks of this layer."""
    index = selection + HEADER
    inverse = index + out
    flags = inverse + out
    row = mine * ROWS + tl.arange(0, ROWS)
    flag = _flags(weight, threshold, flags, scores, row, out, n_in, WINDOW, COMPARE, ROWS, STEP)
    count, flipped = tl.sum(_listed(flag), 0), tl.max((flag >> 2) & 1, 0)
    rank, flipped = look_back(words, mine, count, flipped, LANES)
    _pack(weight, flag, index, inverse, packed, row, rank, out, n_in, inner, outer, cap, stride, ROWS, STEP)
    if (mine + 1) * ROWS >= cap:  # the last block of the layer
        tl.store(selection, rank + count)
        tl.store(selection + 1, flipped)


@triton.jit
def threshold_pass_layer(
    weight, threshold, selection, scores, packed, words, weight_client, threshold_client, selection_client,
    packed_client, out, n_in, inner, outer, cap, stride, blocks,
    WINDOW: tl.constexpr, COMPARE: tl.constexpr, HEADER: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The pass for one layer of every client; grid (blocks of ROWS rows * clients).

    ``words``: zeros; the last one counts tickets, the others belong to a block each.
    """
    ticket = tl.atomic_add(words + tl.num_programs(0), 1, sem="relaxed")
    client = (ticket // blocks).to(tl.int64)
    _block(
        weight + client * weight_client, threshold + client * threshold_client, selection + client * selection_client,
        scores + client * out, packed + client * packed_client, words + client * blocks, ticket % blocks,
        out, n_in, inner, outer, cap, stride, WINDOW, COMPARE, HEADER, ROWS, STEP, LANES,
    )  # fmt: skip


@triton.jit
def threshold_pass_model(
    table, owners, tickets, words, selections, scores, packed,
    DTYPE: tl.constexpr, WINDOW: tl.constexpr, COMPARE: tl.constexpr, HEADER: tl.constexpr, FIELDS: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The pass for every layer and client that ``table`` lists, by the addresses it holds; grid (all their blocks).

    ``owners``: the line of the table that the block of a ticket belongs to. ``tickets``: how many were ever drawn.
    ``words``: two rows of a word per block; launches use them by turns, and clear the one of the next launch.
    """
    programs = tl.num_programs(0)
    drawn = tl.atomic_add(tickets, 1, sem="relaxed")
    ticket = (drawn % programs).to(tl.int32)
    turn = (drawn // programs % 2).to(tl.int32)
    tl.store(words + (1 - turn) * programs + ticket, 0)
    entry = table + tl.load(owners + ticket) * FIELDS
    weight = tl.load(entry).to(tl.pointer_type(DTYPE))
    threshold = tl.load(entry + 1).to(tl.pointer_type(DTYPE))
    selection_at, scores_at, packed_at = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    out, n_in = tl.load(entry + 5).to(tl.int32), tl.load(entry + 6).to(tl.int32)
    inner, outer = tl.load(entry + 7).to(tl.int32), tl.load(entry + 8).to(tl.int32)
    cap, stride = tl.load(entry + 9).to(tl.int32), tl.load(entry + 10).to(tl.int32)
    first = tl.load(entry + 11).to(tl.int32)  # ticket of the layer's first block
    _block(
        weight, threshold, selections + selection_at, scores + scores_at, packed + packed_at,
        words + turn * programs + first,
        ticket - first, out, n_in, inner, outer, cap, stride, WINDOW, COMPARE, HEADER, ROWS, STEP, LANES,
    )  # fmt: skip


@on_device_of_first
def select_layer(
    weight: Tensor,
    threshold: Tensor,
    estimator: Estimator,
    dtype: torch.dtype | None = None,
    selection: Selection | None = None,
) -> tuple[Selection, Tensor, Tensor]:
    """Selection, packed weights and scores of one layer of every client.

    Args:
        weight: ``(clients, out, in)`` or ``(clients, out, in, kH, kW)``, float32, float16 or bfloat16.
        threshold: ``(clients, out)``, dtype of ``weight``.
        estimator: ``"identity"`` or ``"window"``.
        dtype: of the packed weights; that of ``weight`` by default.
        selection: overwritten in place if given, and compared with, for :attr:`Selection.changed`.

    Returns:
        ``(selection, packed, scores)``; packed ``(clients, capacity(out), row_stride(n_in))`` with every row in
        ``(kH, kW, in)`` order; scores float32 ``(clients, out)``.
    """
    weight, threshold = dense_rows(weight), threshold.contiguous()
    made = prepare(
        weight.shape, weight.stride(), threshold.stride(0), (weight.dtype, threshold.dtype, dtype or weight.dtype),
        weight.device, None if selection is None else selection.data.stride(0), estimator == "window",
    )  # fmt: skip
    stream = current_stream(weight.get_device())
    data, packed, scores = made.run(stream, weight, threshold, None if selection is None else selection.data)
    return selection or Selection(data, weight.shape[1]), packed, scores


@dataclasses.dataclass(frozen=True)
class LayerPass:
    """The pass of one layer of given sizes, see :func:`select_layer`."""

    selection: Memory
    packed: Memory
    scores: Memory
    words: int
    device: torch.device
    launch: Launch

    @functools.cached_property
    def scratch(self) -> int:
        """Bytes of words and scores, one behind the other."""
        return -(-4 * self.words // LINE) * LINE + self.scores.bytes

    def run(
        self, stream: int | None, weight: Tensor, threshold: Tensor, selection: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(selection, packed, scores)``; weight and threshold of one client may lack its dimension."""
        device, empty = self.device, torch.empty_strided
        if selection is None:
            size, strides, dtype = self.selection
            selection = empty(size, strides, dtype=dtype, device=device)
        size, strides, dtype = self.packed
        packed = empty(size, strides, dtype=dtype, device=device)
        size, strides, dtype = self.scores
        scores = empty(size, strides, dtype=dtype, device=device)
        words = torch.zeros(self.words, dtype=torch.int32, device=device)
        self.launch(stream, weight, threshold, selection, scores, packed, words)
        return selection, packed, scores

    def without_scores(self, stream: int | None, weight: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """A new selection and packed weights; scores are scratch memory, which is had at once with the words."""
        known = self.launch.known
        if stream is None or known is None:
            return self.run(stream, weight, threshold)[:2]
        device, empty = self.device, torch.empty_strided
        size, strides, dtype = self.selection
        selection = empty(size, strides, dtype=dtype, device=device)
        size, strides, dtype = self.packed
        packed = empty(size, strides, dtype=dtype, device=device)
        scratch = torch.zeros(self.scratch, dtype=torch.uint8, device=device)
        words = scratch.data_ptr()
        addresses = (
            weight.data_ptr(), threshold.data_ptr(), selection.data_ptr(), words + self.scratch - self.scores.bytes,
            packed.data_ptr(), words,
        )  # fmt: skip
        if unaligned(addresses):
            return self.run(stream, weight, threshold)[:2]
        run, grid, rest, values = known
        run(*grid, stream, *rest, *addresses, *values)
        return selection, packed


@functools.lru_cache(REMEMBERED)
def prepare(
    shape: tuple[int, ...], strides: tuple[int, ...], threshold: int, dtypes: tuple[torch.dtype, ...],
    device: torch.device, selection: int | None, window: bool,
) -> LayerPass:  # fmt: skip
    """The pass by everything that its launch depends on.

    Args:
        shape, strides: of the weight, clients first; rows are dense.
        threshold, selection: distances between clients; no selection: a new one is made.
        dtypes: of weight, threshold and packed weights.
        device: of all.
        window: the estimator.
    """
    clients, out = shape[:2]
    n_in, order = math.prod(shape[2:]), row_order(shape[1:], strides[1:])
    assert order is not None
    cap, stride = capacity(out), row_stride(n_in)
    blocks = triton.cdiv(cap, ROWS)
    launch = Launch(
        threshold_pass_layer,
        (blocks * clients,),
        (
            strides[0], threshold, selection_size(out) if selection is None else selection, cap * stride, out, n_in,
            *order, cap, stride, blocks,
        ),
        {
            "WINDOW": window, "COMPARE": selection is not None, "HEADER": HEADER, "ROWS": ROWS, "STEP": STEP,
            "LANES": LANES, "num_warps": WARPS,
        },
    )  # fmt: skip
    return LayerPass(
        Memory.dense((clients, selection_size(out)), torch.int32),
        Memory.dense((clients, cap, stride), dtypes[2]),
        Memory.dense((clients, out), torch.float32),
        blocks * clients + 1,
        device,
        launch,
    )


class ModelPass:
    """The threshold pass of all layers of a model, or of a cohort of models, in one launch; results stay on the device.

    Args:
        weights: one tensor per layer, ``(out, in)`` or ``(out, in, kH, kW)``, or for a cohort with the clients first;
            all of one dtype and device and number of clients, rows dense in memory. They are read in place at every
            call, so they must be updated in place (as optimisers do).
        thresholds: one tensor per layer, ``(out,)``, or ``(clients, out)`` for a cohort; contiguous, same dtype and
            device.
        estimator: ``"identity"`` or ``"window"``.
        dtype: of the packed weights; that of the weights by default.

    Raises:
        ValueError: no layer, mixed dtypes, devices or numbers of clients, a wrong shape, or a weight whose rows are not
            dense.

    Attributes:
        selections: one :class:`Selection` per layer, rewritten by every call.
        packed: one ``(clients, capacity(out), row_stride(n_in))`` tensor per layer, rows in ``(kH, kW, in)`` order.
        scores: one float32 ``(clients, out)`` tensor per layer.

    Clients are 1 where no cohort is given. Calls on several streams must not overlap: all write the same tensors.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        thresholds: Sequence[Tensor],
        estimator: Estimator = "identity",
        dtype: torch.dtype | None = None,
    ) -> None:
        check_estimator(estimator)
        if not weights or len(weights) != len(thresholds):
            raise ValueError(
                f"weights and thresholds must be lists of the same length, at least 1; got {len(weights)} and "
                f"{len(thresholds)}"
            )
        kind, device = weights[0].dtype, weights[0].device
        if kind not in DTYPES:
            raise ValueError(f"weights must be float32, float16 or bfloat16; got {kind}")
        self._layers = [
            _Layer.of(i, w, t, kind, device) for i, (w, t) in enumerate(zip(weights, thresholds, strict=True))
        ]
        if len(counts := {layer.clients for layer in self._layers}) > 1:
            raise ValueError(f"all layers must have the same number of clients; got {sorted(counts)}")
        self.estimator, self._dtype = estimator, DTYPES[kind]
        n = self._layers[0].clients

        def parts(sizes: list[int], dtype: torch.dtype, fill: int = 0) -> tuple[Tensor, list[Tensor]]:
            """One memory for all layers; that of each begins at a multiple of 16 bytes, which Triton compiles for."""
            spans = [-(-n * size // 16) * 16 for size in sizes]
            whole = torch.full((sum(spans),), fill, dtype=dtype, device=device)
            return whole, [part[: n * size].view(n, -1) for part, size in zip(whole.split(spans), sizes, strict=True)]

        self._selections, selections = parts(
            [selection_size(layer.out) for layer in self._layers], torch.int32, fill=-1
        )
        self._packed, packed = parts([layer.cap * layer.stride for layer in self._layers], dtype or kind)
        self._scores, self.scores = parts([layer.out for layer in self._layers], torch.float32)
        self.selections = [Selection(part, layer.out) for part, layer in zip(selections, self._layers, strict=True)]
        self.packed = [part.view(n, layer.cap, -1) for part, layer in zip(packed, self._layers, strict=True)]
        self._filters = torch.tensor([[layer.out] for layer in self._layers], dtype=torch.float64, device=device)
        blocks = [layer.blocks for layer in self._layers for _ in range(n)]
        self._programs = sum(blocks)
        self._owners = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(blocks)).int().to(device)
        self._tickets = torch.zeros(1, dtype=torch.int64, device=device)
        self._words = torch.zeros(2 * self._programs, dtype=torch.int32, device=device)
        self._addresses = self._current_addresses()
        self._table = self._make_table()
        constants = {
            "DTYPE": self._dtype, "WINDOW": estimator == "window", "COMPARE": True, "HEADER": HEADER,
            "FIELDS": FIELDS, "ROWS": ROWS, "STEP": STEP, "LANES": LANES, "num_warps": WARPS,
        }  # fmt: skip
        self._launch = Launch(threshold_pass_model, (self._programs,), (), constants)

    def _current_addresses(self) -> list[tuple[int, int]]:
        return [(layer.weight.data_ptr(), layer.threshold.data_ptr()) for layer in self._layers]

    def _make_table(self) -> Tensor:
        rows, ticket = [], 0
        for layer, selection, scores, packed in zip(
            self._layers, self.selections, self.scores, self.packed, strict=True
        ):
            for client, (weight, threshold) in enumerate(zip(layer.weight, layer.threshold, strict=True)):
                places = [t.storage_offset() + client * t.stride(0) for t in (selection.data, scores, packed)]
                at = [weight.data_ptr(), threshold.data_ptr(), *places]
                rows.append([*at, layer.out, layer.n_in, *layer.order, layer.cap, layer.stride, ticket])
                ticket += layer.blocks
        return torch.tensor(rows, dtype=torch.int64, device=self._selections.device)

    def __call__(self) -> list[Selection]:
        """Run the pass and return :attr:`selections`; waits for the device only if a weight was moved to new memory."""
        if (addresses := self._current_addresses()) != self._addresses:
            self._addresses = addresses
            self._table = self._make_table()
        with device_of(self._selections):
            self._launch(
                current_stream(self._selections.get_device()), self._table, self._owners, self._tickets, self._words,
                self._selections, self._scores, self._packed,
            )  # fmt: skip
        return self.selections

    def densities(self, out: Tensor) -> None:
        """Write the share of listed filters, as of the last call, to ``out``: floating, ``(layers, clients)``.

        It is the density, unless a weight is NaN.
        """
        torch.div(torch.stack([selection.count for selection in self.selections]), self._filters, out=out)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Weight and threshold of one layer of a :class:`ModelPass`, clients first, and its sizes."""

    weight: Tensor
    threshold: Tensor
    out: int
    n_in: int
    order: tuple[int, int]

    @property
    def clients(self) -> int:
        return self.weight.shape[0]

    @property
    def cap(self) -> int:
        return capacity(self.out)

    @property
    def stride(self) -> int:
        return row_stride(self.n_in)

    @property
    def blocks(self) -> int:
        """Programs that a client takes."""
        return triton.cdiv(self.cap, ROWS)

    @staticmethod
    def of(number: int, w: Tensor, t: Tensor, kind: torch.dtype, device: torch.device) -> _Layer:
        """Checked; ``number`` is for messages."""
        if {w.dtype, t.dtype} != {kind} or {w.device, t.device} != {device}:
            raise ValueError(
                f"all weights and thresholds must be {kind} on {device}; layer {number} has weight {w.dtype} on "
                f"{w.device} and threshold {t.dtype} on {t.device}"
            )
        first = w.dim() % 2  # dimensions before the filters: one, the clients, or none
        if w.dim() not in (2, 3, 4, 5) or not w.numel() or t.shape != w.shape[: first + 1] or not t.is_contiguous():
            raise ValueError(
                f"layer {number}: weight must be ([clients,] out, in[, kH, kW]) and not empty, threshold contiguous "
                f"([clients,] out); got {tuple(w.shape)} and {tuple(t.shape)}"
            )
        order = row_order(w.shape[first:], w.stride()[first:])
        if order is None:
            raise ValueError(
                f"layer {number}: the rows of the weight must lie dense in memory; got strides {w.stride()}"
            )
        w, t = (w, t) if first else (w.unsqueeze(0), t.unsqueeze(0))
        return _Layer(w, t, w.shape[1], math.prod(w.shape[2:]), order)
