"""Tables for LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

_SIGNS = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
          "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "±": r"$\pm$", "†": r"$^\dagger$"}  # fmt: skip


def escaped(text: str) -> str:
    """Text as LaTeX prints it literally."""
    return "".join(_SIGNS.get(c, c) for c in text)


def tabular(columns: str, heads: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A ``tabular`` with rules of the booktabs package, notes as comments.

    Args:
        columns: one letter each.
        heads: lines of the head, LaTeX already.
        rows: cells as text.
    """
    body = [" & ".join(map(escaped, row)) + r" \\" for row in rows]
    return "\n".join([
        *(f"% {' '.join(note.split())}" for note in notes), rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *heads,
        r"\midrule", *body, r"\bottomrule", r"\end{tabular}", "",
    ])  # fmt: skip
