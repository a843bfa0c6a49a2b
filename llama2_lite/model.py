"""The model.

Exported from book/07_model.md, which explains every part. Edit it there,
then `make export`.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llama2_lite.attention import Attention, KVCache
from llama2_lite.layers import FeedForward, RMSNorm, feed_forward_size, rope_table
from llama2_lite.tokenizer import Tokenizer

PRESET_KEYS = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier"),
    *("vocab_size", "max_seq_len", "tie_embeddings"),
)
# As Meta's params.json files have it, and as Code Llama 34B has it for the 34B model,
# which was not released. The "1b" is TinyLlama's (Zhang et al., 2024), "15m" and "110m"
# are known from llama2.c, the others are this book's.
PRESETS: dict[str, dict[str, Any]] = {
    name: dict(zip(PRESET_KEYS, values, strict=True))
    for name, *values in [
        # name, dim, layers, heads, key-value heads, multiple of, multiplier,
        # vocabulary, context, tied
        ("7b", 4096, 32, 32, 32, 256, None, 32000, 4096, False),
        ("13b", 5120, 40, 40, 40, 256, None, 32000, 4096, False),
        ("34b", 8192, 48, 64, 8, 256, 1.0, 32000, 4096, False),
        ("70b", 8192, 80, 64, 8, 4096, 1.3, 32000, 4096, False),
        ("1b", 2048, 22, 32, 4, 256, None, 32000, 2048, False),
        ("110m", 768, 12, 12, 12, 32, None, 32000, 1024, True),
        ("34m", 512, 8, 8, 8, 64, None, 8192, 1024, False),
        ("15m", 288, 6, 6, 6, 32, None, 32000, 1024, True),
        ("8m", 256, 8, 8, 8, 32, None, 4096, 1024, False),
        ("town-large", 192, 6, 6, 6, 32, None, 1024, 1024, False),
        ("town", 128, 4, 4, 4, 32, None, 1024, 1024, False),
        ("town-small", 64, 3, 2, 2, 32, None, 1024, 1024, False),
    ]
}


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama.

    Attributes:
        dim: model width, C.
        n_layers: number of blocks, L.
        n_heads: query heads, H; must divide ``dim``, with an even quotient D.
        n_kv_heads: key-value heads, K; must divide ``n_heads``.
        vocab_size: number of token ids, V.
        hidden_dim: width inside the feed-forward layer.
        norm_eps: added to the mean square in RMSNorm.
        max_seq_len: context, in tokens.
        rope_theta: base of the rotary wavelengths.
        tie_embeddings: whether input and output embeddings are one matrix.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    hidden_dim: int
    norm_eps: float = 1e-5
    max_seq_len: int = 4096
    rope_theta: float = 10000.0
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "tie_embeddings" and not value > 0:
                raise ValueError(f"{name} must be positive, but is {value}")
        if self.dim % self.n_heads:
            raise ValueError(
                f"n_heads = {self.n_heads} does not divide dim = {self.dim}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"dim / n_heads must be even for rotary pairs, but {self.dim} / "
                f"{self.n_heads} is {self.head_dim}"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_kv_heads = {self.n_kv_heads} does not divide n_heads = "
                f"{self.n_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head, D."""
        return self.dim // self.n_heads

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> "LlamaConfig":
        """From the entries of one of Meta's params.json files.

        These give no ``hidden_dim`` but how to round it, and no key-value heads where
        every query head has its own.
        """
        params = dict(params)
        params.setdefault("n_kv_heads", params["n_heads"])
        multiple_of = params.pop("multiple_of", 256)
        multiplier = params.pop("ffn_dim_multiplier", None)
        size = feed_forward_size(params["dim"], multiple_of, multiplier)
        params.setdefault("hidden_dim", size)
        return cls(**params)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "LlamaConfig":
        """A named size, for example "7b" or "town", with some entries changed.

        Raises:
            ValueError: if there is no such size.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls.from_params(PRESETS[name] | overrides)

    def parameter_count(self) -> int:
        """Number of parameters, computed without building the model."""
        attention = 2 * self.dim * self.head_dim * (self.n_heads + self.n_kv_heads)
        feed_forward = 3 * self.dim * self.hidden_dim
        layer = attention + feed_forward + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return embeddings + self.n_layers * layer + self.dim


class TransformerBlock(nn.Module):
    """Attention, then the feed-forward layer, each normalised before and added after.

    Source: paper §2.2 ("pre-normalization"); Touvron et al., 2023.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention = Attention(config.dim, config.n_heads, config.n_kv_heads)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """From (B, T, C) to (B, T, C); the arguments are those of `Attention`."""
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """The Llama 2 language model (paper §2.2), with Meta's parameter names.

    Random weights come from torch's global generator: call ``torch.manual_seed``.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            TransformerBlock(config) for _ in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Fill all parameters and the rotary tables, on the device they are on.

        Normal with standard deviation 0.02, divided by sqrt(2 L) for the two matrices
        that write to the residual stream. The paper gives none; this is GPT-2's
        (Radford et al., 2019).
        """
        self._derive()
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                residual = name.endswith(("wo.weight", "w2.weight"))
                scale = math.sqrt(2 * self.config.n_layers) if residual else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)

    def _derive(self) -> None:
        """Set what follows from the configuration: tied weights, rotary tables."""
        config, device = self.config, self.norm.weight.device
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.cos, self.sin = rope_table(
            config.max_seq_len, config.head_dim, config.rope_theta, device
        )

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: list[KVCache] | None = None,
        return_hidden: bool = False,
    ) -> Tensor:
        """Logits of the token that follows each of T new tokens.

        Args:
            tokens: ids, (B, T).
            positions: of the new tokens, (T,) or (B, T); if left out, they follow on
                what the cache holds.
            mask: (B or 1, 1, T, S), True where a token may look; causal if left out.
            cache: one for each layer, from `new_cache`; the new tokens are added.
            return_hidden: stop before the output matrix.

        Returns:
            (B, T, V), or (B, T, C) with ``return_hidden``.

        Raises:
            ValueError: if the tokens do not fit into the context or the cache.
        """
        if positions is None:
            start = cache[0].length if cache else 0
            end = start + tokens.shape[1]
            if end > self.config.max_seq_len:
                raise ValueError(
                    f"{end} tokens are longer than the context of "
                    f"{self.config.max_seq_len}"
                )
            cos, sin = self.cos[start:end], self.sin[start:end]
        else:
            cos, sin = self.cos[positions], self.sin[positions]
        x = self.tok_embeddings(tokens)  # (B, T, C)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, cache[i] if cache else None)
        x = self.norm(x)
        return x if return_hidden else self.output(x)

    def new_cache(self, batch_size: int, room: int) -> list[KVCache]:
        """An empty cache for each layer, with room for so many tokens."""
        weight = self.norm.weight
        shape = (batch_size, self.config.n_kv_heads, room, self.config.head_dim)
        return [KVCache(shape, weight.dtype, weight.device) for _ in self.layers]

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> "Llama":
        """Open a model folder, in Hugging Face's or Meta's layout.

        Args:
            folder: with config.json and safetensors, or with params.json and
                consolidated.NN.pth.
            dtype: of the weights; as stored if left out.
            device: where they go; they are copied there one at a time.

        Raises:
            FileNotFoundError: if the folder or a file of it is missing.
            ValueError: if it holds another kind of model, or a tensor is missing, has
                another shape, or is not expected.
        """
        folder = Path(folder)
        is_meta = not (folder / "config.json").is_file()
        config, shards = (read_meta if is_meta else read_hugging_face)(folder)
        with torch.device("meta"):
            model = cls(config)
        names = {
            name: name if is_meta else hugging_face_name(name)
            for name, _ in model.named_parameters()
        }
        for shard in shards:
            _check_names(folder, set(names.values()), set(shard))
        stored = shards[0][names["norm.weight"]].dtype
        model.to(dtype or stored).to_empty(device=device)
        model._derive()
        for name, parameter in model.named_parameters():
            tensor = _join(name, [shard[names[name]] for shard in shards])
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{folder}: tensor {names[name]} has shape {tuple(tensor.shape)}, "
                    f"but the configuration asks for {tuple(parameter.shape)}"
                )
            if not is_meta and name.endswith(ROTARY):
                tensor = rotary_pairs(tensor, config.head_dim)
            with torch.no_grad():
                parameter.copy_(tensor)
        return model.eval()

    def save_pretrained(
        self,
        folder: str | Path,
        tokenizer: Tokenizer | None = None,
        force: bool = False,
        shard_bytes: int = 5 * 10**9,
    ) -> None:
        """Write a Hugging Face folder, which transformers opens as it is.

        Everything is written beside and moved into place at the end, config.json
        last, so that what looks like a model is one.

        Args:
            folder: new or empty, unless ``force`` is given.
            tokenizer: copied into the folder.
            force: replace the model in the folder; other files are left alone.
            shard_bytes: weights beyond this are split over several files.

        Raises:
            FileExistsError: if the folder has contents and ``force`` is not given.
        """
        folder = Path(folder)
        if folder.is_file():
            raise FileExistsError(f"{folder} is a file, not a folder")
        if folder.exists() and any(folder.iterdir()) and not force:
            raise FileExistsError(
                f"{folder} exists and is not empty; it is replaced only by force"
            )
        beside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        beside.mkdir(parents=True)
        try:
            _write_weights(self, beside, shard_bytes)
            _write_settings(self.config, beside, tokenizer)
            _move(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


WEIGHTS = "model.safetensors"
ROTARY = ("wq.weight", "wk.weight")
HUGGING_FACE_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "layers": "model.layers",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def hugging_face_name(name: str) -> str:
    """What transformers calls one of our parameters."""
    module = name.removesuffix(".weight")
    if not module.startswith("layers."):
        return f"{HUGGING_FACE_NAMES[module]}.weight"
    _, index, part = module.split(".", 2)
    return f"model.layers.{index}.{HUGGING_FACE_NAMES[part]}.weight"


def rotary_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key matrix, from pairs (2i, 2i+1) to pairs (i, i + D/2)."""
    rows = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return rows.transpose(1, 2).reshape(weight.shape)


def rotary_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `rotary_halves`."""
    rows = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return rows.transpose(1, 2).reshape(weight.shape)


def read_hugging_face(folder: Path) -> tuple[LlamaConfig, list[dict[str, Tensor]]]:
    """The configuration and the tensors, mapped into memory, of a Hugging Face folder.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not safetensors; a pickle is never opened.
    """
    config = _read_config(folder / "config.json")
    index, files = folder / f"{WEIGHTS}.index.json", [WEIGHTS]
    if index.is_file():
        files = sorted(set(_read_json(index)["weight_map"].values()))
    elif not (folder / WEIGHTS).is_file() and (pickles := [*folder.glob("*.bin")]):
        raise ValueError(
            f"{pickles[0]} is a pickle, which can run any code when it is opened: "
            f"a model needs {WEIGHTS}"
        )
    tensors: dict[str, Tensor] = {}
    for path in (folder / file for file in files):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        try:
            with safe_open(path, framework="pt") as opened:
                names = opened.keys()
                tensors |= {name: opened.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a complete safetensors file: {error}"
            ) from None
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    old = "rotary_emb.inv_freq"  # which old folders store needlessly
    return config, [{k: v for k, v in tensors.items() if not k.endswith(old)}]


def read_meta(folder: Path) -> tuple[LlamaConfig, list[dict[str, Tensor]]]:
    """The configuration and the shards, mapped into memory, of Meta's own layout.

    Its consolidated.NN.pth are the only pickles that are ever opened, and only with
    ``weights_only=True``.

    Raises:
        FileNotFoundError: if there is no such model.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths or not (folder / "params.json").is_file():
        raise FileNotFoundError(
            f"{folder} is not a model: it has neither config.json nor params.json "
            "with consolidated.NN.pth"
        )
    shards = [
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        for path in paths
    ]
    for shard in shards:
        shard.pop("rope.freqs", None)
    params = _read_json(folder / "params.json")
    if params.get("vocab_size", -1) < 0:  # in Meta's code the tokenizer decides
        params["vocab_size"] = shards[0]["tok_embeddings.weight"].shape[0]
    return LlamaConfig.from_params(params), shards


def _join(name: str, parts: list[Tensor]) -> Tensor:
    """One matrix of the parts that Meta's tensor-parallel processes hold."""
    if len(parts) == 1 or parts[0].dim() == 1:
        return parts[0]
    by_input = name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
    return torch.cat(parts, dim=1 if by_input else 0)


CONFIG_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}
# What transformers assumes where config.json is silent.
DEFAULTS = {
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def _check_names(folder: Path, expected: Iterable[str], found: set[str]) -> None:
    expected = set(expected)
    for names, what in (
        (expected - found, "is missing"),
        (found - expected, "is not expected"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{folder}: tensor {min(names)} {what}{more}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _read_config(path: Path) -> LlamaConfig:
    """The sizes in transformers' config.json; refuses what a Llama 2 does not have."""
    given = _read_json(path)
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    expected = {
        "model_type": (given.get("model_type"), "llama"),
        "hidden_act": (given.get("hidden_act", "silu"), "silu"),
        "attention_bias": (given.get("attention_bias", False), False),
        "mlp_bias": (given.get("mlp_bias", False), False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    for key, (value, needed) in expected.items():
        if value != needed:
            raise ValueError(
                f"{path}: {key} is {value!r}, but a Llama 2 has {needed!r}"
            )
    missing = [key for key in CONFIG_KEYS.values() if key not in given | DEFAULTS]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    given = DEFAULTS | {"num_key_value_heads": given["num_attention_heads"]} | given
    theta: float = rope.get("rope_theta") or given.get("rope_theta", 10000.0)
    sizes = {ours: given[theirs] for ours, theirs in CONFIG_KEYS.items()}
    config = LlamaConfig(**sizes, rope_theta=theta)
    if given.get("head_dim") not in (None, config.head_dim):
        raise ValueError(
            f"{path}: head_dim is {given['head_dim']}, but a Llama 2 has hidden_size / "
            f"num_attention_heads, {config.head_dim}"
        )
    return config


def _write_weights(model: Llama, folder: Path, shard_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    parameters = dict(model.named_parameters())
    room = shard_bytes
    for name, parameter in parameters.items():
        if parameter.nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= parameter.nbytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = file if len(shards) > 1 else WEIGHTS
        tensors = {}
        for name in names:
            tensor = parameters[name].detach().cpu().contiguous()
            if name.endswith(ROTARY):
                tensor = rotary_halves(tensor, model.config.head_dim)
            tensors[hugging_face_name(name)] = tensor
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        size = sum(parameter.nbytes for parameter in parameters.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(folder / f"{WEIGHTS}.index.json", index)


def _write_settings(
    config: LlamaConfig, folder: Path, tokenizer: Tokenizer | None
) -> None:
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
        _write_json(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True},
        )
    _write_json(folder / "generation_config.json", ids)
    sizes = {theirs: getattr(config, ours) for ours, theirs in CONFIG_KEYS.items()}
    rope = {"rope_theta": config.rope_theta}
    _write_json(
        folder / "config.json",
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        | sizes
        | {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        | rope  # up to transformers 4
        | {"rope_parameters": rope | {"rope_type": "default"}}
        | ids,
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _move(beside: Path, folder: Path) -> None:
    """Put a finished folder in place, configuration last."""
    for file in beside.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    if not folder.exists():
        beside.rename(folder)
        return
    (folder / "config.json").unlink(missing_ok=True)
    for old in [*folder.glob("*.safetensors"), folder / f"{WEIGHTS}.index.json"]:
        old.unlink(missing_ok=True)
    for file in sorted(beside.iterdir(), key=lambda file: file.name == "config.json"):
        file.rename(folder / file.name)
