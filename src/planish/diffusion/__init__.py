"""Generate by diffusion: text.

How to choose: `TextDiffusionModel` with `SmoothieScheduler` writes all tokens of a text at once; the siblings
`EmbeddingGaussianScheduler` and `SimplexScheduler` are other noises for the same network. `train_text_diffusion` trains
it, `TextDiffusionPipeline` keeps and runs it. Schedulers are those of diffusers: `pip install 'planish[diffusers]'`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planish.diffusion.embeddings import EmbeddingSpace
    from planish.diffusion.smoothie import SmoothieScheduler
    from planish.diffusion.symbols import SymbolTokenizer
    from planish.diffusion.text_model import TextDiffusionConfig, TextDiffusionModel
    from planish.diffusion.text_pipeline import TextDiffusionPipeline
    from planish.diffusion.text_schedulers import EmbeddingGaussianScheduler, SimplexScheduler
    from planish.diffusion.text_training import TextTrainingReport, train_text_diffusion
    from planish.diffusion.token_state import TokenState

_HOMES = {
    "EmbeddingGaussianScheduler": "text_schedulers",
    "EmbeddingSpace": "embeddings",
    "SimplexScheduler": "text_schedulers",
    "SmoothieScheduler": "smoothie",
    "SymbolTokenizer": "symbols",
    "TextDiffusionConfig": "text_model",
    "TextDiffusionModel": "text_model",
    "TextDiffusionPipeline": "text_pipeline",
    "TextTrainingReport": "text_training",
    "TokenState": "token_state",
    "train_text_diffusion": "text_training",
}

__all__ = [
    "EmbeddingGaussianScheduler",
    "EmbeddingSpace",
    "SimplexScheduler",
    "SmoothieScheduler",
    "SymbolTokenizer",
    "TextDiffusionConfig",
    "TextDiffusionModel",
    "TextDiffusionPipeline",
    "TextTrainingReport",
    "TokenState",
    "train_text_diffusion",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562: what needs diffusers loads on first touch)
    if name in _HOMES:
        return getattr(importlib.import_module(f"planish.diffusion.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'planish.diffusion' has no attribute {name!r}")
