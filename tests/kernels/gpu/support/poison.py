"""Uninitialised results hold NaN (or a huge integer), so that an element nobody writes is seen."""

import contextlib

import torch


@contextlib.contextmanager
def poisoned(monkeypatch):
    """While open, ``torch.empty``, ``empty_strided``, ``empty_like`` and ``Tensor.new_empty`` give such tensors."""
    stock_empty, stock_strided, stock_new = torch.empty, torch.empty_strided, torch.Tensor.new_empty
    stock_like = torch.empty_like

    def poison(t):
        # Bytes of ones are NaN in whatever floating type they are taken for.
        return t.fill_(float("nan") if t.is_floating_point() else 255 if t.dtype == torch.uint8 else 2**30)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **k: poison(stock_empty(*a, **k)))
        patch.setattr(torch, "empty_strided", lambda *a, **k: poison(stock_strided(*a, **k)))
        patch.setattr(torch, "empty_like", lambda *a, **k: poison(stock_like(*a, **k)))
        patch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(stock_new(*a, **k)))
        yield
