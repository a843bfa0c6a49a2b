"""The Llama.

Exported from book/07_model.md, which explains every part. Edit it there,
then `make export`.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection
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

PARAMS = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier"),
    *("vocab_size", "max_seq_len", "tie_embeddings"),
)
# As Meta's params.json files have them; 34b as Code Llama 34B has them, because Llama 2
# 34B was not released; 1b as TinyLlama (Zhang et al., 2024), 110m and 15m as llama2.c.
PRESETS: dict[str, dict[str, Any]] = {
    name: dict(zip(PARAMS, values, strict=True))
    for name, *values in [
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
        n_heads: query heads, H; must divide ``dim``, and leave an even D.
        n_kv_heads: key-value heads, K; must divide ``n_heads``.
        vocab_size: number of token ids, V.
        hidden_dim: width inside the feed-forward layer, F.
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
        for small, large in (("n_heads", "dim"), ("n_kv_heads", "n_heads")):
            divisor, number = getattr(self, small), getattr(self, large)
            if number % divisor:
                raise ValueError(
                    f"{small} = {divisor} does not divide {large} = {number}"
                )
        if self.head_dim % 2:
            raise ValueError(
                f"dim / n_heads must be even, for rotary pairs, but is {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head, D."""
        return self.dim // self.n_heads

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> "LlamaConfig":
        """From the entries of one of Meta's params.json files.

        Raises:
            ValueError: if an entry is unknown or missing.
        """
        params = {"n_kv_heads": params.get("n_heads"), **params}
        multiple_of = params.pop("multiple_of", 256)
        multiplier = params.pop("ffn_dim_multiplier", None)
        if "dim" in params and "hidden_dim" not in params:
            size = feed_forward_size(params["dim"], multiple_of, multiplier)
            params["hidden_dim"] = size
        try:
            return cls(**params)
        except TypeError as error:
            raise ValueError(f"the sizes of a Llama: {error}") from None

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
        """Number of parameters, by arithmetic."""
        attention = 2 * self.dim * self.head_dim * (self.n_heads + self.n_kv_heads)
        feed_forward = 3 * self.dim * self.hidden_dim
        block = attention + feed_forward + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return embeddings + self.n_layers * block + self.dim


class TransformerBlock(nn.Module):
    """Attention, then the feed-forward layer, each normalised before and added after.

    Source: paper §2.2; Meta's llama/model.py.
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

    Its weights are random, by `init_weights`: call ``torch.manual_seed`` before. On
    the device "meta" it has shapes only, and takes no memory.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        with torch.device("meta"):  # PyTorch would draw weights that are not ours
            self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
            self.layers = nn.ModuleList(
                TransformerBlock(config) for _ in range(config.n_layers)
            )
            self.norm = RMSNorm(config.dim, config.norm_eps)
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self._derive()
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Fill all parameters and the rotary tables, on the device they are on.

        Normal with standard deviation 0.02, divided by sqrt(2 L) for the matrices that
        write to the residual stream. Source: Radford et al., 2019 (the paper: none).

        Args:
            seed: drawn from torch's global generator if left out. Each matrix depends
                on it and on its own name only.
        """
        if seed is None:
            seed = int(torch.randint(2**31, (), device="cpu"))
        self._derive()
        for name, parameter in self.named_parameters():
            weight = torch.ones(parameter.shape, device=parameter.device)
            if parameter.dim() > 1:
                writes = name.endswith(("wo.weight", "w2.weight"))
                scale = math.sqrt(2 * self.config.n_layers) if writes else 1.0
                random = named_generator(seed, name, parameter.device)
                weight.normal_(std=0.02 / scale, generator=random)
            parameter.copy_(weight)

    def _derive(self) -> None:
        """Set what follows from the configuration: tied weights, rotary tables."""
        config, device = self.config, self.norm.weight.device
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.cos, self.sin = rope_table(
            config.max_seq_len, config.head_dim, config.rope_theta, device
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Llama":
        """What ``.to()`` and ``.bfloat16()`` call: the rotary tables stay fp32."""
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:
            self._derive()
        return self

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
                context = self.config.max_seq_len
                raise ValueError(
                    f"{end} tokens do not fit into the context of {context}; "
                    "leave some out"
                )
            cos, sin = self.cos[start:end], self.sin[start:end]  # (T, D/2)
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
        config, shards = read_folder(Path(folder))
        with torch.device("meta"):
            model = cls(config)
        stored = next(iter(shards[0].values())).dtype
        model.to(dtype or stored).to_empty(device=device)
        model.load_weights(folder)
        return model.eval()

    @torch.no_grad()
    def load_weights(self, folder: str | Path, ignore: Collection[str] = ()) -> None:
        """Fill all parameters from a model folder, one at a time, and rotary tables.

        Args:
            folder: see `from_pretrained`.
            ignore: names of tensors in the folder that this model has no use for.

        Raises:
            FileNotFoundError, ValueError: see `from_pretrained`.
        """
        folder = Path(folder)
        _, shards = read_folder(folder)
        is_meta = "tok_embeddings.weight" in shards[0]
        self._derive()
        parameters = dict(self.named_parameters())
        names = {
            name: name if is_meta else hugging_face_name(name) for name in parameters
        }
        for shard in shards:
            check_names(folder, set(names.values()), set(shard) - set(ignore))
        for name, parameter in parameters.items():
            tensor = join_shards(name, [shard[names[name]] for shard in shards])
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{folder}: tensor {names[name]} has shape {tuple(tensor.shape)}, "
                    f"but its configuration asks for {tuple(parameter.shape)}"
                )
            if not is_meta and name.endswith(ROTARY):
                tensor = rotary_pairs(tensor, self.config.head_dim)
            parameter.copy_(tensor.to(parameter.device))

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
                f"{folder} exists and is not empty; choose another folder, or give "
                "force=True to replace what is in it"
            )
        beside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        beside.mkdir(parents=True)
        try:
            write_weights(self, beside, shard_bytes)
            write_settings(self.config, beside, tokenizer)
            move_into_place(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def named_generator(
    seed: int, name: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Random numbers for one parameter, the same whatever else has been drawn."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))


HUGGING_FACE_NAMES = {
    "tok_embeddings": "model.embed_tokens",
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


def check_names(folder: Path, expected: set[str], found: set[str]) -> None:
    """Refuse a folder that lacks a tensor, or holds one that we would ignore."""
    for names, problem in (
        (expected - found, "is missing"),
        (found - expected, "is not expected"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{folder}: tensor {min(names)} {problem}{more}")


ROTARY = ("wq.weight", "wk.weight")


def rotary_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key matrix, from pairs (2i, 2i+1) to pairs (i, i + D/2)."""
    rows = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return rows.transpose(1, 2).reshape(weight.shape)


def rotary_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `rotary_halves`."""
    rows = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return rows.transpose(1, 2).reshape(weight.shape)


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


def read_config(path: Path) -> LlamaConfig:
    """The sizes in a config.json of transformers.

    Raises:
        ValueError: if it lacks one, or describes what a Llama 2 does not have.
    """
    given = read_json(path)
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    features = {
        "model_type": (given.get("model_type"), "llama"),
        "hidden_act": (given.get("hidden_act", "silu"), "silu"),
        "attention_bias": (given.get("attention_bias", False), False),
        "mlp_bias": (given.get("mlp_bias", False), False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    for key, (value, ours) in features.items():
        if value != ours:
            raise ValueError(f"{path}: {key} is {value!r}, but a Llama 2 has {ours!r}")
    silent: dict[str, Any] = {  # what transformers takes where the file says nothing
        "num_key_value_heads": given.get("num_attention_heads"),
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    found = silent | given
    sizes: dict[str, Any] = {ours: found.get(key) for ours, key in CONFIG_KEYS.items()}
    if missing := [CONFIG_KEYS[ours] for ours, value in sizes.items() if value is None]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    theta = rope.get("rope_theta") or given.get("rope_theta", 10000.0)
    try:
        config = LlamaConfig(**sizes, rope_theta=theta)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if given.get("head_dim") not in (None, config.head_dim):
        raise ValueError(
            f"{path}: head_dim is {given['head_dim']}, but a Llama 2 has "
            f"hidden_size / num_attention_heads = {config.head_dim}"
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


WEIGHTS = "model.safetensors"


def read_hugging_face(folder: Path) -> tuple[LlamaConfig, list[dict[str, Tensor]]]:
    """The configuration and the tensors, mapped into memory, of a Hugging Face folder.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not safetensors.
    """
    config = read_config(folder / "config.json")
    index, files = folder / f"{WEIGHTS}.index.json", [WEIGHTS]
    if index.is_file():
        files = sorted(set(read_json(index)["weight_map"].values()))
    elif not (folder / WEIGHTS).is_file() and (pickles := sorted(folder.glob("*.bin"))):
        raise ValueError(
            f"{pickles[0]} is a pickle, which can run any program when it is opened; "
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
                f"{path} is not a whole safetensors file ({error}); get it again"
            ) from None
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    # old folders store the rotary wavelengths, which follow from the configuration
    derived = [name for name in tensors if name.endswith("rotary_emb.inv_freq")]
    for name in derived:
        del tensors[name]
    return config, [tensors]


def write_weights(model: Llama, folder: Path, shard_bytes: int) -> None:
    """Write safetensors: one file, or several and an index."""
    parameters = dict(model.named_parameters())
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, parameter in parameters.items():
        if shards[-1] and parameter.nbytes > room:
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
        write_json(folder / f"{WEIGHTS}.index.json", index)


def write_settings(
    config: LlamaConfig, folder: Path, tokenizer: Tokenizer | None
) -> None:
    """Write config.json and what transformers needs for tokenizing and generating."""
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
        write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "generation_config.json", ids)
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    sizes = {key: getattr(config, ours) for ours, key in CONFIG_KEYS.items()}
    # transformers 4 looks for the first of these, 5 for the second
    rope: dict[str, Any] = {"rope_theta": config.rope_theta}
    rope |= {"rope_parameters": rope | {"rope_type": "default"}}
    write_json(folder / "config.json", kind | sizes | rope | ids)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one JSON object."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def move_into_place(beside: Path, folder: Path) -> None:
    """Make a finished folder the model, its config.json last."""
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


def read_folder(folder: Path) -> tuple[LlamaConfig, list[dict[str, Tensor]]]:
    """The configuration and the tensors of a model folder, in either layout.

    Raises:
        FileNotFoundError, ValueError: see `Llama.from_pretrained`.
    """
    is_hugging_face = (folder / "config.json").is_file()
    return read_hugging_face(folder) if is_hugging_face else read_meta(folder)


def read_meta(folder: Path) -> tuple[LlamaConfig, list[dict[str, Tensor]]]:
    """The configuration and the shards, mapped into memory, of Meta's own layout.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if a file holds anything else than tensors.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths or not (folder / "params.json").is_file():
        raise FileNotFoundError(
            f"{folder} is not a model: it has neither config.json nor params.json "
            "with consolidated.NN.pth"
        )
    shards = [read_pickled_tensors(path) for path in paths]
    for shard in shards:
        shard.pop("rope.freqs", None)  # follows from the configuration
    params = read_json(folder / "params.json")
    if params.get("vocab_size", -1) < 0 and "tok_embeddings.weight" in shards[0]:
        # -1 says: as the tokenizer has it
        params["vocab_size"] = shards[0]["tok_embeddings.weight"].shape[0]
    return LlamaConfig.from_params(params), shards


def read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a .pth file, by a reader that runs nothing else in it."""
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # any kind, depending on where the file is broken
        found = None
    is_dict = isinstance(found, dict)
    if not is_dict or not all(isinstance(x, Tensor) for x in found.values()):
        raise ValueError(
            f"{path} is broken or holds other things than named tensors, so it is not "
            "opened; get it again, or as safetensors"
        )
    return found


def join_shards(name: str, parts: list[Tensor]) -> Tensor:
    """Put the parts of one matrix together. Source: Meta's llama/model.py."""
    if len(parts) == 1 or parts[0].dim() == 1:
        return parts[0]
    by_columns = name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
    return torch.cat(parts, dim=1 if by_columns else 0)
