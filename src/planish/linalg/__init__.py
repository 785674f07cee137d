"""Matrix functions.

How to choose: `low_rank_correction` for the error of a rounded layer.
"""

from planish.linalg.low_rank import low_rank_correction

__all__ = ["low_rank_correction"]
