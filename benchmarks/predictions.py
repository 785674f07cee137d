"""What a model's predictions say beside the float model's, token by token. Imports torch alone: rivals run it too."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 256  # tokens whose probabilities over the whole vocabulary are held at a time


def token_scores(clean: Tensor, ours: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Score a few tokens' logits.

    Args:
        clean: The float model's logits [tokens, vocabulary].
        ours: The subject's.
        targets: The tokens that came [tokens].

    Returns:
        Per token: `nll` in nats, `kl` from the float distribution to the subject's in nats, `top1` whether both have
        the same first choice.
    """
    p, q = F.log_softmax(clean, dim=-1), F.log_softmax(ours, dim=-1)
    return {
        "nll": F.nll_loss(q, targets, reduction="none"),
        "kl": F.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1),
        "top1": (q.argmax(dim=-1) == p.argmax(dim=-1)).float(),
    }


@torch.no_grad()
def window_scores(clean: nn.Module, ours: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Score a causal model beside its float self on running text: means over the predicted tokens of each window.

    Args:
        clean: The float model.
        ours: The subject, called as a whole: its embeddings and head may be turned as it likes.
        ids: Evaluation windows [windows, length].
    """
    columns: dict[str, list[Tensor]] = {}
    for row in ids:
        pair = [model(input_ids=row[None]).logits[0, :-1] for model in (clean, ours)]
        parts = [token_scores(p, q, t) for p, q, t in zip(*(x.split(CHUNK) for x in (*pair, row[1:])), strict=True)]
        for name in parts[0]:
            columns.setdefault(name, []).append(torch.cat([part[name] for part in parts]).double().mean())
    return {name: torch.stack(column) for name, column in columns.items()}
