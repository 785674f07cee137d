"""Rows that groups do not divide: SmolLM2's 576 channels in groups of 128, the last of 64. See `benchmarks.quant`."""

from collections.abc import Iterator

from benchmarks import quant
from benchmarks.harness import Row

GRIDS = ((4, 128),)


def rows(
    quick: bool,
    *,
    against: tuple[str, ...] | None = None,
    only: tuple[str, ...] | None = None,
    models: tuple[str, ...] | None = None,
    fresh: bool = False,
    skipped: dict[str, str] | None = None,
    **_: object,
) -> Iterator[Row]:
    """Yield the rows of `benchmarks.quant` on this grid; rivals that cannot split such a row are named as skipped."""
    yield from quant.rows(quick, against=against, only=only, grids=GRIDS, models=models, fresh=fresh, skipped=skipped)
