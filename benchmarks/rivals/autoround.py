"""AutoRound: `rtn` (its route at 0 iterations), `neuqi` (its grid search) and `train` (signed gradients).

At 0 iterations its activation-weighted search runs on the symmetric grid alone; on the asymmetric one that route is
plain min-max rounding, and `neuqi` is its search there.
"""

from torch import Tensor, nn

from benchmarks.driver import Read, Settings, main, targets


def quantize(model: nn.Module, tokens: Tensor, settings: Settings) -> Read:
    """Run AutoRound block by block on the tokens, in float32; what it leaves in the linears is read."""
    from auto_round import AutoRound  # noqa: PLC0415
    from auto_round.algorithms.quantization.rtn.config import RTNConfig  # noqa: PLC0415
    from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415

    if settings.method == "train" and settings.iters < 1:
        raise ValueError(f"autoround: `iters` must be at least 1 for `train`; got {settings.iters}.")
    algorithm = {
        "rtn": RTNConfig,
        "neuqi": lambda: RTNConfig(enable_neuqi=True),
        "train": lambda: SignRoundConfig(iters=settings.iters),
    }[settings.method]()
    names = list(targets(model))
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(settings.model),
        scheme="W4A16",
        bits=settings.bits,
        group_size=settings.group_size or -1,
        sym=settings.symmetric,
        alg_configs=algorithm,
        dataset=list(tokens.split(settings.batch_size)),
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        batch_size=settings.batch_size,
        device_map="cpu",
        amp=False,  # bfloat16 weights would blur a comparison made in float32
        disable_model_free=True,
    )
    quantized, _ = rounder.quantize()
    floats = dict(model.named_parameters())
    return lambda: floats | {f"{name}.weight": quantized.get_submodule(name).weight for name in names}


if __name__ == "__main__":
    main(quantize, ("auto-round",), ("rtn", "neuqi", "train"))
