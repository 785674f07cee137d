"""Find the blocks by which a model is walked: its heaviest list of equal modules, or both of an encoder-decoder."""

from torch import nn

_NEARLY_ALL = 0.95


def find_blocks(model: nn.Module) -> tuple[list[str], list[nn.Module]]:
    """Return names and modules of the heaviest list of equal blocks, or the model itself.

    A denoiser whose weights are spread over several lists (a U-Net's levels, two kinds of blocks) is one block: all of
    it is to be quantized, not its largest part.

    Example:
        >>> import torch
        >>> find_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2)))[0]
        ['']
    """
    lists = _lists(model)
    if not lists:
        return [""], [model]
    most, name, blocks = max(lists, key=lambda item: item[0])
    outer = [size for size, n, _ in lists if not any(n.startswith(f"{other}.") for _, other, _ in lists)]
    if _is_denoiser(model) and most < _NEARLY_ALL * sum(outer):
        return [""], [model]
    return [f"{name}.{i}" for i in range(len(blocks))], list(blocks)


def _is_denoiser(model: nn.Module) -> bool:
    """Whether a model is one of diffusers', or made of one."""
    return any(base.__module__.partition(".")[0] == "diffusers" for base in type(model).__mro__)


def find_stacks(model: nn.Module) -> list[tuple[list[str], list[nn.Module]]]:
    """Return the stacks of blocks to be walked, in order: both of an encoder-decoder, of other models the heaviest.

    Example:
        >>> import torch
        >>> find_stacks(torch.nn.Sequential(torch.nn.Linear(2, 2)))[0][0]
        ['']
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return [find_blocks(model)]
    lists = [(name, blocks) for _, name, blocks in _lists(model) if any(type(m) is nn.Linear for m in blocks.modules())]
    outer = [(n, blocks) for n, blocks in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    return [([f"{n}.{i}" for i in range(len(blocks))], list(blocks)) for n, blocks in outer] or [find_blocks(model)]


def _lists(model: nn.Module) -> list[tuple[int, str, nn.ModuleList]]:
    """Return the lists of modules of one class that hold parameters, and how many."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1:
            size = sum(p.numel() for p in module.parameters())
            if size and not all(isinstance(m, nn.Linear) for m in module):
                found.append((size, name, module))
    return found
