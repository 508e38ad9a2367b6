"""One implementation of every figure, on a compact table with one row an expression. Torch-free.

>>> tally = Tally()
>>> tally.add(ExpressionScore("1", "a.jpg", 6, 8, 7, 7))
>>> round(summarize(tally.table(), "native")["miou"], 2)
0.75
"""

from risam_cli.metrics.figures import FIGURES, figures, summarize, terms
from risam_cli.metrics.protocols import PROTOCOLS, Protocol, get_protocol
from risam_cli.metrics.table import ExpressionScore, ScoreTable, Tally, score_masks

__all__ = [
    "FIGURES",
    "PROTOCOLS",
    "ExpressionScore",
    "Protocol",
    "ScoreTable",
    "Tally",
    "figures",
    "get_protocol",
    "score_masks",
    "summarize",
    "terms",
]
