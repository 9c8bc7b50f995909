"""Advice from the record of a finished run: which limit, what exploded first, and the suspected cause.

Pure NumPy: reading (`formats`), detecting, asking rules for causes (`causes`), and replaying rules open loop.
"""

from karikomi.advising.advice import Advice, advise

__all__ = ["Advice", "advise"]
