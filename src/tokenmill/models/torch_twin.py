"""The decoder in plain torch: the twin that the native runner is compared with, and that the trainer trains.

It exists to be read, to be differentiated and to be right: one forward pass over whole sequences, module
and parameter names of a Hugging Face Llama checkpoint, so that a state dict loads one to one. It does not
cover a KV cache, sampling, padding, quantised weights or speed; the engine does those. Importing this module
needs torch (the `train` extra); nothing else in `tokenmill.models` does.

Shape legend: B sequences, T tokens of each, D model width, H query heads, G key-value heads, E head width,
F inner width of the gated unit, V vocabulary, R rows (any number of tokens, flattened).

Named points carry the names they have in TransformerLens and the meaning they have in the engine: a
`hook_normalized` is the norm's output with its weight, what the next linears read (TransformerLens takes
it before the weight). For a model of N layers and each i < N:

    hook_embed                       BTD    blocks.i.ln1.hook_normalized   BTD
    blocks.i.hook_resid_pre          BTD    blocks.i.attn.hook_z           BTHE
    blocks.i.hook_resid_mid          BTD    blocks.i.ln2.hook_normalized   BTD
    blocks.i.hook_resid_post         BTD    blocks.i.mlp.hook_post         BTF
    ln_final.hook_normalized         BTD
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self, TypeAlias

from tokenmill.core.errors import ModelFormatError, UsageError
from tokenmill.models.architecture import Architecture
from tokenmill.models.weights import WeightSource

try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional
except ModuleNotFoundError as error:
    raise UsageError("torch is not installed", hint="run: pip install 'tokenmill[train]'") from error

__all__ = ["HEAD_ROWS", "Hook", "Hooks", "TorchDecoder"]

Hook: TypeAlias = Callable[[Tensor], Tensor | None]
Hooks: TypeAlias = Mapping[str, Hook]

HEAD_ROWS = 256
"""Rows whose logits `logprobs` holds at once."""

_BLOCK_POINTS = (
    "hook_resid_pre",
    "ln1.hook_normalized",
    "attn.hook_z",
    "hook_resid_mid",
    "ln2.hook_normalized",
    "mlp.hook_post",
    "hook_resid_post",
)


@dataclass(frozen=True, kw_only=True)
class _Taps:
    """The hooks of one pass, seen from the part of the model that `prefix` names."""

    hooks: Hooks
    prefix: str = ""

    def within(self, part: str) -> Self:
        return type(self)(hooks=self.hooks, prefix=f"{self.prefix}{part}.")

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """`value`, or what the hook on this point puts in its place."""
        hook = self.hooks.get(self.prefix + name)
        new = None if hook is None else hook(value)
        if new is None:
            return value
        if new.shape != value.shape:
            raise UsageError(
                f"the hook on {self.prefix}{name} returned shape {tuple(new.shape)}",
                hint=f"return a tensor of shape {tuple(value.shape)}, or None to leave the value as it is",
            )
        return new


class _RmsNorm(nn.Module):
    """x / rms(x) * weight, computed in at least float32 (Zhang and Sennrich 2019)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.eps = architecture.norm_eps
        self.weight = nn.Parameter(torch.ones(architecture.hidden_size))

    def forward(self, x_BTD: Tensor, taps: _Taps) -> Tensor:
        wide_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        wide_BTD = wide_BTD * torch.rsqrt(wide_BTD.square().mean(-1, keepdim=True) + self.eps)
        return taps("hook_normalized", self.weight * wide_BTD.to(x_BTD.dtype))


class _Attention(nn.Module):
    """Causal attention; G key-value heads serve H query heads (Ainslie et al. 2023)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.head_dim = architecture.head_dim
        q_size = architecture.num_heads * architecture.head_dim
        kv_size = architecture.num_kv_heads * architecture.head_dim
        self.q_proj = nn.Linear(architecture.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(architecture.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(architecture.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, architecture.hidden_size, bias=False)

    def forward(self, a_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor, taps: _Taps) -> Tensor:
        q_BHTE = _rotate(self._heads(self.q_proj(a_BTD)), cos_TE, sin_TE)
        k_BGTE = _rotate(self._heads(self.k_proj(a_BTD)), cos_TE, sin_TE)
        v_BGTE = self._heads(self.v_proj(a_BTD))
        z_BHTE = functional.scaled_dot_product_attention(
            q_BHTE, k_BGTE, v_BGTE, is_causal=True, enable_gqa=True
        )
        z_BTHE = taps("hook_z", z_BHTE.transpose(1, 2))
        out_BTD: Tensor = self.o_proj(z_BTHE.flatten(2))
        return out_BTD

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, heads * E] to [B, heads, T, E]."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class _GatedUnit(nn.Module):
    """down(silu(gate(x)) * up(x)), SwiGLU (Shazeer 2020)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width, inner = architecture.hidden_size, architecture.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, a_BTD: Tensor, taps: _Taps) -> Tensor:
        h_BTF = taps("hook_post", functional.silu(self.gate_proj(a_BTD)) * self.up_proj(a_BTD))
        out_BTD: Tensor = self.down_proj(h_BTF)
        return out_BTD


class _Block(nn.Module):
    """Attention and gated unit, each added to the residual stream after its own norm."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.input_layernorm = _RmsNorm(architecture)
        self.self_attn = _Attention(architecture)
        self.post_attention_layernorm = _RmsNorm(architecture)
        self.mlp = _GatedUnit(architecture)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor, taps: _Taps) -> Tensor:
        x_BTD = taps("hook_resid_pre", x_BTD)
        a_BTD = self.input_layernorm(x_BTD, taps.within("ln1"))
        x_BTD = x_BTD + self.self_attn(a_BTD, cos_TE, sin_TE, taps.within("attn"))
        x_BTD = taps("hook_resid_mid", x_BTD)
        a_BTD = self.post_attention_layernorm(x_BTD, taps.within("ln2"))
        return taps("hook_resid_post", x_BTD + self.mlp(a_BTD, taps.within("mlp")))


class _Body(nn.Module):
    """Everything but the head; Hugging Face checkpoints call it `model`."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(architecture.vocab_size, architecture.hidden_size)
        self.layers = nn.ModuleList(_Block(architecture) for _ in range(architecture.num_layers))
        self.norm = _RmsNorm(architecture)


class TorchDecoder(nn.Module):
    """A Llama-family decoder (RMSNorm, rotary positions, grouped queries, gated unit, tied or own head).

    Made from an architecture its weights are torch's random defaults; `load` reads them. A tied head is the
    embedding's own parameter: `named_parameters()` names it once, `state_dict()` under both names.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.model = _Body(architecture)
        self.lm_head = nn.Linear(architecture.hidden_size, architecture.vocab_size, bias=False)
        if architecture.tied_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def load(
        cls, architecture: Architecture, weights: WeightSource, dtype: torch.dtype = torch.float32
    ) -> Self:
        """The decoder with the weights of `weights`, in `dtype`.

        Raises `ModelFormatError` if a tensor is missing or has another shape than the architecture says.
        """
        with torch.device("meta"):
            decoder = cls(architecture)
        state: dict[str, nn.Parameter] = {}
        for name, empty in decoder.named_parameters():
            if (shape := weights.shape(name)) != tuple(empty.shape):
                raise ModelFormatError(
                    f"tensor {name} has shape {shape}, not {tuple(empty.shape)}",
                    hint="check that config.json belongs to these weights",
                )
            state[name] = nn.Parameter(torch.from_numpy(weights.float32(name)).to(dtype))
        if architecture.tied_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        decoder.load_state_dict(state, assign=True)
        return decoder

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Every named point, in the order a pass reaches them."""
        layers = range(self.architecture.num_layers)
        points = [f"blocks.{layer}.{point}" for layer in layers for point in _BLOCK_POINTS]
        return ("hook_embed", *points, "ln_final.hook_normalized")

    def forward(self, tokens_BT: Tensor, hooks: Hooks | None = None) -> Tensor:
        """Logits [B, T, V] of token ids [B, T], each from the tokens up to its own position.

        A hook is called with the value of its point and may return another one of that shape, with
        which the pass goes on. Raises `UsageError` for an unknown point or too many tokens.
        """
        logits_BTV: Tensor = self.lm_head(self.hidden(tokens_BT, hooks))
        return logits_BTV

    def hidden(self, tokens_BT: Tensor, hooks: Hooks | None = None) -> Tensor:
        """The input of the head, [B, T, D]; arguments and errors as in `forward`."""
        hooks = hooks or {}
        if unknown := sorted(hooks.keys() - set(self.hook_names)):
            raise UsageError(f"no point is named {unknown[0]}", hint="see TorchDecoder.hook_names")
        num_tokens, limit = tokens_BT.shape[1], self.architecture.max_positions
        if num_tokens > limit:
            raise UsageError(f"{num_tokens} tokens in a sequence", hint=f"this model takes at most {limit}")
        taps = _Taps(hooks=hooks)
        x_BTD = taps("hook_embed", self.model.embed_tokens(tokens_BT))
        cos_TE, sin_TE = _rope_tables(self.architecture, num_tokens, like=x_BTD)
        for layer, block in enumerate(self.model.layers):
            x_BTD = block(x_BTD, cos_TE, sin_TE, taps.within(f"blocks.{layer}"))
        a_BTD: Tensor = self.model.norm(x_BTD, taps.within("ln_final"))
        return a_BTD

    def logprobs(self, tokens_BT: Tensor, hooks: Hooks | None = None) -> Tensor:
        """Natural log-probability [B, T-1], float32, of each token but the first after those before it.

        Under `torch.inference_mode()` only `HEAD_ROWS` rows of logits exist at a time.
        """
        hidden_RD = self.hidden(tokens_BT, hooks)[:, :-1].flatten(0, 1)
        target_BT = tokens_BT[:, 1:]
        chunks = (torch.split(each, HEAD_ROWS) for each in (hidden_RD, target_BT.flatten()))
        losses = [
            functional.cross_entropy(self.lm_head(rows_RD).float(), target_R, reduction="none")
            for rows_RD, target_R in zip(*chunks, strict=True)
        ]
        return -torch.cat(losses).view(target_BT.shape)


def _rope_tables(architecture: Architecture, num_tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, E] of position times frequency, both halves of E alike (Su et al. 2021)."""
    even = torch.arange(0, architecture.head_dim, 2, dtype=torch.float32, device=like.device)
    frequencies = 1.0 / architecture.rope_theta ** (even / architecture.head_dim)
    positions = torch.arange(num_tokens, dtype=torch.float32, device=like.device)
    angles_TE = torch.outer(positions, frequencies).repeat(1, 2)
    return angles_TE.cos().to(like.dtype), angles_TE.sin().to(like.dtype)


def _rotate(x: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotate [B, heads, T, E] by position; component i is paired with i + E/2, as in Hugging Face."""
    first, second = x.chunk(2, dim=-1)
    return x * cos_TE + torch.cat((-second, first), dim=-1) * sin_TE
