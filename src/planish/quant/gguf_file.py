"""GGUF: one file that llama.cpp runs, with metadata, tokenizer, and the codes as they are.

Blocks of 32 along the inputs: Q4_0 is d (n - 8), Q4_1 is d n + m, Q8_0 is d n with signed n; d and m are float16.
Llama's rotary pairs lie next to each other in GGUF and half a head apart in transformers, so rows of q and k move.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy.typing as npt
import torch
from jaxtyping import UInt8
from torch import Tensor

from planish._support import CheckpointError, require
from planish.quant import files, layouts
from planish.quant.directory import Checkpoint
from planish.quant.layers import QLinear

_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2"}  # model_type -> the name that GGUF knows
_BLOCK = 32


def write(found: Checkpoint, source: Path, place: Path, *, allow_rounding: bool) -> dict[str, Any]:
    """Write a checkpoint as one GGUF file.

    Args:
        found: The checkpoint.
        source: Its directory, for the tokenizer.
        place: The file to make.
        allow_rounding: See `export`.

    Returns:
        How many layers of each type were written, the largest change, and the tokenizer's kind.

    Raises:
        CheckpointError: The architecture, a layer or the tokenizer cannot be written faithfully.
        MissingExtra: The package `gguf` is not installed.
    """
    gguf = require("gguf", "demo", "export to GGUF")
    shape = _Shape(found.config)
    arch = getattr(gguf.MODEL_ARCH, _ARCHITECTURES[shape.kind])
    names = gguf.get_tensor_name_map(arch, shape.blocks)
    moved = ("q_proj", "k_proj") if _ARCHITECTURES[shape.kind] == "LLAMA" else ()
    types: dict[str, int] = {}
    largest = 0.0
    writer = gguf.GGUFWriter(place, gguf.MODEL_ARCH_NAMES[arch])
    try:
        shape.describe(writer)
        try:
            tokenizer = _tokenizer(gguf, writer, source, shape.vocabulary)
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"`tokenizer.json` is damaged: {type(error).__name__} {error}.") from None
        for name, tensor in found.tensors.items():
            part = name.split(".")[-2] if "." in name else ""
            heads = shape.heads_of(part) if part in moved else 0
            writer.add_tensor(_rename(names, name), _plain(name, _move_rows(tensor, heads) if heads else tensor))
        for name, made in found.layers.items():
            layer = layouts.plain(name, "GGUF", made)
            part = name.rpartition(".")[2]
            kind, raw, change = _blocks(name, layer, shape.heads_of(part) if part in moved else 0, allow_rounding)
            writer.add_tensor(_rename(names, f"{name}.weight"), raw.numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
            if layer.bias is not None:
                bias = _move_rows(layer.bias, shape.heads_of(part)) if part in moved else layer.bias
                writer.add_tensor(_rename(names, f"{name}.bias"), _plain(name, bias))
            types[kind] = types.get(kind, 0) + 1
            largest = max(largest, change)
        most = max(types, key=lambda kind: types[kind])
        writer.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{most}"]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return {"layers": types, "largest_change": largest, "tokenizer": tokenizer}


class _Shape:
    """What GGUF wants to know of a config, checked against what llama.cpp computes."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.kind = str(config.get("model_type"))
        if self.kind not in _ARCHITECTURES:
            raise self._refuse(f"model_type must be one of {', '.join(_ARCHITECTURES)}; got {self.kind!r:.60}")
        self.config = config
        self.blocks, self.hidden, self.inner, self.heads, self.vocabulary = (
            self._int(key)
            for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        )
        self.kv_heads = self._int("num_key_value_heads", self.heads)
        self.head_dim = self._int("head_dim", self.hidden // self.heads)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind not in (None, "default"):
            raise self._refuse(f"scaled rotary positions ({kind!r:.40}) are not written")
        self.theta = config.get("rope_theta", rope.get("rope_theta", 10000.0))
        if config.get("hidden_act", "silu") != "silu":
            raise self._refuse(f"hidden_act must be silu; got {config['hidden_act']!r:.40}")
        if config.get("sliding_window") and config.get("use_sliding_window", True):
            raise self._refuse("sliding windows are not written")

    @staticmethod
    def _refuse(why: str) -> CheckpointError:
        return CheckpointError(f"`config.json` cannot be written as GGUF: {why}.", "unsupported")

    def _int(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise self._refuse(f"{key} must be an integer above 0; got {value!r:.40}")
        return value

    def heads_of(self, part: str) -> int:
        """Return how many heads the rows of a projection hold."""
        return self.heads if part == "q_proj" else self.kv_heads

    def describe(self, writer: Any) -> None:  # noqa: ANN401  (gguf carries no types)
        """Write the metadata of the model."""
        writer.add_type("model")
        writer.add_name(str(self.config.get("_name_or_path") or self.kind))
        writer.add_block_count(self.blocks)
        writer.add_context_length(self._int("max_position_embeddings"))
        writer.add_embedding_length(self.hidden)
        writer.add_feed_forward_length(self.inner)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_layer_norm_rms_eps(float(self.config.get("rms_norm_eps", 1e-6)))
        writer.add_rope_freq_base(float(self.theta))
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_vocab_size(self.vocabulary)
        if self.head_dim * self.heads != self.hidden:
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)


def _rename(names: Any, name: str) -> str:  # noqa: ANN401
    made = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if made is None:
        raise CheckpointError(f"`{name}` has no place in GGUF's model of this architecture.", "name")
    return str(made)


def _move_rows(rows: Tensor, heads: int) -> Tensor:
    """Bring rotary pairs from half a head apart to neighbours, within each head."""
    paired: Tensor = rows.unflatten(0, (heads, 2, -1))
    return paired.transpose(1, 2).flatten(0, 2).contiguous()


def _plain(name: str, tensor: Tensor) -> npt.NDArray[Any]:
    """Return a float tensor as float16 where it is one and is a matrix, else float32, never changed."""
    single = tensor.float()
    if not torch.equal(single.to(tensor.dtype), tensor) or not tensor.is_floating_point():
        raise layouts.lossy(name, "GGUF", f"{tensor.dtype} values are not all float32 values")
    half = single.half()
    if tensor.ndim > 1 and tensor.dtype != torch.float32 and torch.equal(half.float(), single):
        return half.numpy()
    return single.numpy()


def _blocks(
    name: str, layer: QLinear, heads: int, allow_rounding: bool
) -> tuple[str, UInt8[Tensor, "out bytes"], float]:
    """Return a layer's GGUF type, its bytes, and the largest change relative to a weight's scale."""
    bits, inputs = layer.format.bits, layer.in_features
    zero, codes = layer.zeros(), layer.weight.codes
    symmetric = bool((zero == layer.format.middle).all())
    size = layer.format.group_size or inputs
    why = layouts.not_plain(layer)
    if why is None and (inputs % _BLOCK or size % _BLOCK):
        why = f"groups of {size} in {inputs} inputs do not fill blocks of {_BLOCK}"
    if why is None and not (bits == 4 or (bits == 8 and symmetric)):
        why = f"GGUF has 4 bits, or 8 symmetric ones; the layer is {layer.format}"
    if why is not None:
        raise layouts.lossy(name, "GGUF", why)
    scale = layouts.half_scales(name, "GGUF", layer)
    if heads:
        zero, codes, scale = (_move_rows(t, heads) for t in (zero, codes, scale))
    each = size // _BLOCK
    scale, zero = (t.repeat_interleave(each, 1) for t in (scale, zero))
    grouped = codes.unflatten(1, (-1, _BLOCK))  # (O, blocks, 32)
    d = scale[..., None].contiguous().view(torch.uint8)
    if bits == 8:
        return "Q8_0", torch.cat([d, grouped ^ 0x80], -1).flatten(1), 0.0
    nibbles = grouped[..., :16] | grouped[..., 16:] << 4
    if symmetric:
        return "Q4_0", torch.cat([d, nibbles], -1).flatten(1), 0.0
    wanted = -scale.double() * zero.double()
    minimum = wanted.half()
    change = ((minimum.double() - wanted).abs() / scale.double()).max().item()
    if change and not allow_rounding:
        raise layouts.lossy(
            name, "GGUF",
            f"Q4_1 keeps -scale * zero in float16, which moves weights by up to {change:.2g} of a step; "
            "quantize with symmetric=True, or pass allow_rounding=True",
        )  # fmt: skip
    if not torch.isfinite(minimum).all():
        raise layouts.lossy(name, "GGUF", "-scale * zero is beyond float16")
    return "Q4_1", torch.cat([d, minimum[..., None].contiguous().view(torch.uint8), nibbles], -1).flatten(1), change


def _tokenizer(gguf: ModuleType, writer: Any, source: Path, vocabulary: int) -> str | None:  # noqa: ANN401
    """Write the tokenizer that lies in the directory, if there is one; byte-level BPE only."""
    if not (source / "tokenizer.json").is_file():
        writer.add_tokenizer_model("none")  # llama.cpp then takes and gives token numbers
        return None
    made = files.read_json(source / "tokenizer.json")
    options = files.read_json(source / "tokenizer_config.json") if (source / "tokenizer_config.json").is_file() else {}
    model = made.get("model")
    pre = _pre_tokenizer(made.get("pre_tokenizer"))
    if (
        not isinstance(model, dict)
        or model.get("type") != "BPE"
        or pre is None
        or model.get("byte_fallback")
        or not model.get("merges")
    ):
        raise CheckpointError(
            "`tokenizer.json` cannot be written as GGUF: only byte-level BPE with the splitting of GPT-2, Llama 3, "
            "Qwen2 or SmolLM is; take it away to export without a tokenizer.", "unsupported"
        )  # fmt: skip
    kinds = gguf.TokenType
    tokens = {number: (text, kinds.NORMAL) for text, number in model["vocab"].items()}
    for added in made.get("added_tokens") or ():
        tokens[added["id"]] = (added["content"], kinds.CONTROL if added.get("special") else kinds.USER_DEFINED)
    if max(tokens) >= vocabulary:
        raise CheckpointError(
            f"`tokenizer.json` has token {max(tokens)}, the model only {vocabulary} of them.", "shape"
        )
    rows = [tokens.get(number, (f"[PAD{number}]", kinds.UNUSED)) for number in range(vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([text for text, _ in rows])
    writer.add_token_types([int(kind) for _, kind in rows])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    by_text = {text: number for number, (text, _) in tokens.items()}
    for key, add in (
        ("bos_token", writer.add_bos_token_id), ("eos_token", writer.add_eos_token_id),
        ("unk_token", writer.add_unk_token_id), ("pad_token", writer.add_pad_token_id),
    ):  # fmt: skip
        token = options.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if text in by_text:
            add(by_text[text])
    writer.add_add_bos_token(_adds_bos(made.get("post_processor"), options))
    writer.add_add_space_prefix(False)
    template = source / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else options.get("chat_template")
    if isinstance(text, str):
        writer.add_chat_template(text)
    return pre


def _pre_tokenizer(found: object) -> str | None:
    """Name the way in which a tokenizer cuts text before merging, in llama.cpp's words."""
    if not isinstance(found, dict):
        return None
    parts: list[Any] = found["pretokenizers"] if found.get("type") == "Sequence" else [found]
    kinds = [part.get("type") for part in parts]
    if not kinds or kinds[-1] != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and isinstance(parts[0].get("pattern"), dict):
        rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        return {words + r"\p{N}{1,3}" + rest: "llama-bpe", words + r"\p{N}" + rest: "qwen2"}.get(
            parts[0]["pattern"].get("Regex")
        )
    return None


def _adds_bos(post: object, options: dict[str, Any]) -> bool:
    """Tell whether encoding begins with the token of beginnings."""
    if isinstance(options.get("add_bos_token"), bool):
        return bool(options["add_bos_token"])
    steps = [post, *(post.get("processors") or ())] if isinstance(post, dict) else []
    for step in steps:
        if isinstance(step, dict) and step.get("type") == "TemplateProcessing" and step.get("single"):
            return "SpecialToken" in step["single"][0]
    return False
