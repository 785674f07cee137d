"""What a cache is to do, as a value: which steps run in full, how reused features are corrected; in one file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from planish._support import CheckpointError, bad
from planish.diffusion.correction import ChannelMap
from planish.diffusion.grouping import check_schedule, steps_mask
from planish.quant.files import write_shard

_KIND, _VERSION = "planish cache plan", 1


@dataclass(frozen=True, eq=False)
class CachePlan:
    """Say which of a denoiser's calls run in full, and what is done to the features that the others reuse.

    Made by `fit_cache`, or by hand from a schedule alone.

    Args:
        schedule: Calls that run in full: rising, the first is 0.
        steps: T, the calls of one run (of each branch of guidance, where these are calls of their own).
        region: First and last block that are skipped, counted over all lists of blocks; None for a U-Net, or for the
            second to the last block.
        timesteps: The timestep of every call, checked at run time; None checks nothing.
        shape: Of one sample (channels, height, width, ...), checked at run time; None checks nothing.
        branches: Branches of guidance that are calls of their own, in turn; 1 where they share a batch, or where the
            pipeline names them by `cache_context`.
        corrections: For every call what is done to the feature it reuses; empty for nothing.
        outputs: For layers that meet the feature, what is done to their outputs at every call.
        extrapolate: Whether reused features go on as they went between the last two refreshes.
        made_for: Provenance: model, scheduler, figures of the fit.

    Raises:
        ValueError: The schedule is not one, or a list is not T long.

    Example:
        >>> plan = CachePlan((0, 3), 5)
        >>> plan.mask(), f"{plan.full_share:.0%}"
        ([1, 0, 0, 1, 0], '40%')
    """

    schedule: Sequence[int]
    steps: int
    region: tuple[int, int] | None = None
    timesteps: Sequence[int | float] | None = None
    shape: Sequence[int] | None = None
    branches: int = 1
    corrections: Sequence[ChannelMap | None] = ()
    outputs: Mapping[str, Sequence[ChannelMap | None]] = field(default_factory=dict)
    extrapolate: bool = False
    made_for: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "schedule", tuple(check_schedule("CachePlan", self.schedule, self.steps)))
        if self.branches < 1:
            raise bad("CachePlan", "branches", "at least 1", self.branches)
        lists = {"corrections": self.corrections, "timesteps": self.timesteps or ()}
        lists |= {f"outputs[{name!r}]": found for name, found in self.outputs.items()}
        for name, values in lists.items():
            if len(values) not in (0, self.steps):
                raise bad("CachePlan", name, f"a list of {self.steps}", len(values))

    @property
    def full_share(self) -> float:
        """Share of the calls that run in full."""
        return len(self.schedule) / self.steps

    def mask(self) -> list[int]:
        """Return 1 for each call that runs in full, 0 for one that reuses: what cache-dit calls a computation mask."""
        return steps_mask(self.schedule, self.steps)

    def __str__(self) -> str:
        """Say in one line what it does."""
        kept = [c.kept for c in self.corrections if c is not None]
        how = f", corrections kept at {sum(kept) / len(kept):.0%} on average" if kept else ""
        return f"{len(self.schedule)} of {self.steps} calls in full: {', '.join(map(str, self.schedule))}{how}"

    def save(self, path: str | Path) -> None:
        """Write the plan to one safetensors file, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for prefix, found in {"corrections": self.corrections, **self.outputs}.items():
            for i, fit in enumerate(found):
                if fit is not None:
                    tensors[f"{prefix}|{i}"] = torch.stack([fit.scale, fit.slope, fit.shift]).float().contiguous()
                    tensors[f"{prefix}|{i}|kept"] = torch.tensor(fit.kept)
        record = {
            "schedule": list(self.schedule), "steps": self.steps, "region": self.region, "shape": self.shape,
            "timesteps": self.timesteps, "branches": self.branches, "extrapolate": self.extrapolate,
            "outputs": list(self.outputs), "made_for": dict(self.made_for),
        }  # fmt: skip
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        write_shard(partial, tensors, {"format": _KIND, "version": str(_VERSION), "plan": json.dumps(record)})
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "CachePlan":
        """Read a plan.

        Raises:
            CheckpointError: The file is absent, is not a plan, or says what cannot be.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"CachePlan.load: there is no file {path}.", "missing")
        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"CachePlan.load: {path} cannot be read: {error}.", "unreadable") from None
        if meta.get("format") != _KIND or meta.get("version") != str(_VERSION):
            raise CheckpointError(f"CachePlan.load: {path} is no {_KIND} of version {_VERSION}.", "unsupported")
        try:
            record = json.loads(meta["plan"])
            steps, names = int(record["steps"]), list(record.pop("outputs"))
            found = {name: _read(tensors, name, steps) for name in ("corrections", *names)}
            corrections = found.pop("corrections")
            region = record.pop("region")
            return cls(
                **record, region=None if region is None else (int(region[0]), int(region[1])),
                corrections=corrections, outputs=found,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"CachePlan.load: {path} is damaged: {error}", "range") from None


def _read(tensors: Mapping[str, Tensor], prefix: str, steps: int) -> list[ChannelMap | None]:
    found: list[ChannelMap | None] = []
    for i in range(steps):
        stacked = tensors.get(f"{prefix}|{i}")
        if stacked is None:
            found.append(None)
            continue
        if stacked.ndim != 2 or len(stacked) != 3 or not torch.isfinite(stacked).all():
            raise ValueError(f"`{prefix}|{i}` must be three finite rows; got {tuple(stacked.shape)}.")
        scale, slope, shift = stacked.double()
        found.append(ChannelMap(scale, slope, shift, float(tensors[f"{prefix}|{i}|kept"])))
    return found if any(f is not None for f in found) else []
