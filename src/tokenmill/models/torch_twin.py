"""The decoder in plain torch: the twin that the native runner is compared with, and that the trainer trains.

It exists to be read, to be differentiated and to be right: one forward pass over whole sequences, module
and parameter names are the canonical ones (see `families.py`), so that weights load one to one. Sequences of
different lengths stand one after the other in a row (`PackedRow`), without padding and without seeing each
other. It does not cover a KV cache, sampling or quantised weights; the engine does those. Importing this
module needs torch (the `train` extra); nothing else in `tokenmill.models` does.

Shape legend: B sequences, T tokens of each, D model width, H query heads, G key-value heads, E head width,
F inner width of the gated unit, X experts, K experts of a token, V vocabulary, R rows (any number of tokens,
flattened), P rows with padding between the sequences.

Named points carry the names they have in TransformerLens and the meaning they have in the engine: a
`hook_normalized` is the norm's output with its weight, what the next linears read (TransformerLens takes
it before the weight). For a model of N layers and each i < N:

    hook_embed                       BTD    blocks.i.ln1.hook_normalized   BTD
    blocks.i.hook_resid_pre          BTD    blocks.i.attn.hook_z           BTHE
    blocks.i.hook_resid_mid          BTD    blocks.i.ln2.hook_normalized   BTD
    blocks.i.hook_resid_post         BTD    blocks.i.mlp.hook_post         BTF
    ln_final.hook_normalized         BTD

A routed block has `mlp.hook_route` BTX, the weights of each token's experts, in place of `mlp.hook_post`; one
with norms on its outputs has no `hook_normalized`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, Self, TypeAlias

from tokenmill.core.errors import ModelFormatError, UsageError
from tokenmill.kernels import Activation
from tokenmill.models.architecture import Architecture, Experts, Layer
from tokenmill.models.rope import rope_tables
from tokenmill.models.weights import WeightSource

try:
    import torch
    from torch import Tensor, nn
    from torch.autograd.function import once_differentiable
    from torch.nn import functional
except ModuleNotFoundError as error:
    raise UsageError("torch is not installed", hint="run: pip install 'tokenmill[train]'") from error

from tokenmill.models.packed_row import SHORT, PackedRow, attend_short, pad, unpad

__all__ = ["HEAD_ROWS", "Hook", "Hooks", "TorchDecoder"]

Hook: TypeAlias = Callable[[Tensor], Tensor | None]
Hooks: TypeAlias = Mapping[str, Hook]

HEAD_ROWS = 256
"""Rows whose logits `logprobs` holds at once."""

_ACTIVATIONS: Final[Mapping[Activation, Callable[[Tensor], Tensor]]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


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


class _Places(NamedTuple):
    """Where the tokens of a pass stand: angles [T, E] by position, and the sequences of a packed row."""

    cos_TE: Tensor
    sin_TE: Tensor
    row: PackedRow | None


class _RmsNormFunction(torch.autograd.Function):
    """x / rms(x) * weight; a backward pass of few operations, in the type of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        normed = (wide * scale).to(x.dtype)
        ctx.save_for_backward(normed, scale, weight)
        return weight * normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        normed, scale, weight = ctx.saved_tensors
        grad_weight = (grads[0] * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        grad = grads[0] * weight
        along = (grad * normed).mean(-1, keepdim=True, dtype=scale.dtype).to(grad.dtype)
        return torch.addcmul(grad, normed, along, value=-1).mul_(scale.to(grad.dtype)), grad_weight, None


_rms_norm: Final[Callable[[Tensor, Tensor, float], Tensor]] = _RmsNormFunction.apply


class _RmsNorm(nn.Module):
    """x / rms(x) * weight, computed in at least float32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self.weight, self.eps)


class _Attention(nn.Module):
    """Causal attention; G key-value heads serve H query heads (Ainslie et al. 2023)."""

    def __init__(self, architecture: Architecture, kind: Layer) -> None:
        super().__init__()
        self.head_dim, self.kind = architecture.head_dim, kind
        self.norms_heads = architecture.qk_norm == "head"
        self.num_heads = [architecture.num_heads, architecture.num_kv_heads, architecture.num_kv_heads]
        hidden, q_size, kv_size = architecture.hidden_size, architecture.query_size, architecture.kv_size
        self.q_proj = nn.Linear(hidden, q_size, bias=architecture.qkv_bias)
        self.k_proj = nn.Linear(hidden, kv_size, bias=architecture.qkv_bias)
        self.v_proj = nn.Linear(hidden, kv_size, bias=architecture.qkv_bias)
        self.o_proj = nn.Linear(q_size, hidden, bias=architecture.out_bias)
        if architecture.qk_norm != "none":
            q_norm, k_norm = architecture.qk_norm_sizes()
            self.q_norm = _RmsNorm(q_norm, architecture.norm_eps)
            self.k_norm = _RmsNorm(k_norm, architecture.norm_eps)

    def forward(self, a_BTD: Tensor, places: _Places, taps: _Taps) -> Tensor:
        q_BTHE = self._normed(self.q_proj(a_BTD), "q_norm")
        k_BTGE = self._normed(self.k_proj(a_BTD), "k_norm")
        if self.kind.rotary:
            q_BTHE, k_BTGE = (_rotate(x, places.cos_TE, places.sin_TE) for x in (q_BTHE, k_BTGE))
        v_BTGE = self._heads(self.v_proj(a_BTD))
        if places.row is None:
            z_BTHE = self._attend(q_BTHE, k_BTGE, v_BTGE)
        else:
            z_BTHE = self._attend_packed(torch.cat((q_BTHE, k_BTGE, v_BTGE), dim=2)[0], places.row)[None]
        z_BTHE = taps("hook_z", z_BTHE)
        out_BTD: Tensor = self.o_proj(z_BTHE.flatten(2))
        return out_BTD

    def _attend(self, q_BTHE: Tensor, k_BTGE: Tensor, v_BTGE: Tensor) -> Tensor:
        """[B, T, H, E]: what each token of a sequence gathers from those that it sees."""
        seen_TT = _window_mask(q_BTHE.shape[1], self.kind.window, q_BTHE.device)
        q_BHTE, k_BGTE, v_BGTE = (x.transpose(1, 2) for x in (q_BTHE, k_BTGE, v_BTGE))
        z_BHTE = functional.scaled_dot_product_attention(
            q_BHTE, k_BGTE, v_BGTE, attn_mask=seen_TT, is_causal=seen_TT is None, enable_gqa=True
        )
        return z_BHTE.transpose(1, 2)

    def _attend_packed(self, qkv_TSE: Tensor, row: PackedRow) -> Tensor:
        """[T, H, E] from queries, keys and values side by side (S heads of E), a group at a time."""
        qkv_PSE = pad(qkv_TSE, row)
        parts = []
        for start, size, length in row.groups:
            qkv_BTSE = qkv_PSE[start : start + size * length].view(size, length, *qkv_PSE.shape[1:])
            is_short = length <= min(SHORT, self.kind.window or SHORT)
            attend = attend_short if is_short else self._attend
            parts.append(attend(*torch.split(qkv_BTSE, self.num_heads, dim=2)).flatten(0, 1))
        return unpad(torch.cat(parts), row)

    def _normed(self, x: Tensor, norm: str) -> Tensor:
        """[B, T, heads * E] to [B, T, heads, E], by way of the norm over each head or over all of them."""
        if not hasattr(self, norm):
            return self._heads(x)
        apply = getattr(self, norm)
        return apply(self._heads(x)) if self.norms_heads else self._heads(apply(x))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, heads * E] to [B, T, heads, E]."""
        return x.view(*x.shape[:-1], -1, self.head_dim)


class _GatedUnit(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, architecture: Architecture, inner: int, bias: bool) -> None:
        super().__init__()
        self.activation = architecture.activation
        self.gate_proj = nn.Linear(architecture.hidden_size, inner, bias=bias)
        self.up_proj = nn.Linear(architecture.hidden_size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, architecture.hidden_size, bias=bias)

    def forward(self, a_BTD: Tensor, taps: _Taps) -> Tensor:
        gate_BTF = _ACTIVATIONS[self.activation](self.gate_proj(a_BTD))
        out_BTD: Tensor = self.down_proj(taps("hook_post", gate_BTF * self.up_proj(a_BTD)))
        return out_BTD


class _RoutedUnit(nn.Module):
    """A mixture of gated units: each token takes the experts that its router finds most likely.

    Dropless, with the softmax over all experts in float32 before the choice (Jiang et al. 2024).
    """

    def __init__(self, architecture: Architecture, experts: Experts) -> None:
        super().__init__()
        self.num_active, self.renormalise = experts.num_active, experts.renormalise
        self.gate = nn.Linear(architecture.hidden_size, experts.num_experts, bias=False)
        units = (
            _GatedUnit(architecture, experts.intermediate_size, False) for _ in range(experts.num_experts)
        )
        self.experts = nn.ModuleList(units)

    def forward(self, a_BTD: Tensor, taps: _Taps) -> Tensor:
        chosen = functional.softmax(self.gate(a_BTD).float(), dim=-1).topk(self.num_active, dim=-1)
        weight_BTK = chosen.values
        if self.renormalise:
            weight_BTK = weight_BTK / weight_BTK.sum(-1, keepdim=True)
        none_BTX = weight_BTK.new_zeros(*a_BTD.shape[:2], len(self.experts))
        route_BTX = taps("hook_route", none_BTX.scatter(-1, chosen.indices, weight_BTK)).to(a_BTD.dtype)
        out_BTD = torch.zeros_like(a_BTD)
        for expert, unit in enumerate(self.experts):
            rows = route_BTX[..., expert].nonzero(as_tuple=True)
            out_RD = unit(a_BTD[rows], _Taps(hooks={})) * route_BTX[..., expert][rows][:, None]
            out_BTD = out_BTD.index_put(rows, out_RD, accumulate=True)
        return out_BTD


class _Block(nn.Module):
    """Attention and gated or routed unit, each added to the residual stream, with a norm before or after."""

    def __init__(self, architecture: Architecture, kind: Layer) -> None:
        super().__init__()
        self.post_norm = architecture.post_norm
        self.norm_names = architecture.norm_names()
        for name in self.norm_names:
            self.add_module(name, _RmsNorm(architecture.hidden_size, architecture.norm_eps))
        self.self_attn = _Attention(architecture, kind)
        self.mlp: nn.Module
        if kind.routed:
            assert architecture.experts is not None
            self.mlp = _RoutedUnit(architecture, architecture.experts)
        else:
            self.mlp = _GatedUnit(architecture, architecture.intermediate_size, architecture.mlp_bias)

    def forward(self, x_BTD: Tensor, places: _Places, taps: _Taps) -> Tensor:
        norm1, norm2 = (self.get_submodule(name) for name in self.norm_names)
        x_BTD = taps("hook_resid_pre", x_BTD)
        a_BTD = x_BTD if self.post_norm else taps("ln1.hook_normalized", norm1(x_BTD))
        out_BTD = self.self_attn(a_BTD, places, taps.within("attn"))
        x_BTD = taps("hook_resid_mid", x_BTD + (norm1(out_BTD) if self.post_norm else out_BTD))
        a_BTD = x_BTD if self.post_norm else taps("ln2.hook_normalized", norm2(x_BTD))
        out_BTD = self.mlp(a_BTD, taps.within("mlp"))
        return taps("hook_resid_post", x_BTD + (norm2(out_BTD) if self.post_norm else out_BTD))


class _Body(nn.Module):
    """Everything but the head; Hugging Face checkpoints call it `model`."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(architecture.vocab_size, architecture.hidden_size)
        self.layers = nn.ModuleList(_Block(architecture, kind) for kind in architecture.layers)
        self.norm = _RmsNorm(architecture.hidden_size, architecture.norm_eps)


class TorchDecoder(nn.Module):
    """A decoder of any family (RMSNorm, rotary positions, grouped queries, gated units or experts).

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
        points = [
            f"blocks.{layer}.{point}"
            for layer, kind in enumerate(self.architecture.layers)
            for point in _block_points(kind, self.architecture.post_norm)
        ]
        return ("hook_embed", *points, "ln_final.hook_normalized")

    def forward(
        self, tokens_BT: Tensor, hooks: Hooks | None = None, *, row: PackedRow | None = None
    ) -> Tensor:
        """Logits [B, T, V] of token ids [B, T], each from the tokens up to its own position.

        With `row`, B is 1 and the tokens are its sequences. A hook is called with the value of its point and
        may return another one of that shape, with which the pass goes on. Raises `UsageError` for an unknown
        point or too many tokens.
        """
        logits_BTV: Tensor = self.lm_head(self.hidden(tokens_BT, hooks, row=row))
        return logits_BTV

    def hidden(
        self, tokens_BT: Tensor, hooks: Hooks | None = None, *, row: PackedRow | None = None
    ) -> Tensor:
        """The input of the head, [B, T, D]; arguments and errors as in `forward`."""
        hooks = hooks or {}
        if unknown := sorted(hooks.keys() - set(self.hook_names)):
            raise UsageError(f"no point is named {unknown[0]}", hint="see TorchDecoder.hook_names")
        assert row is None or tokens_BT.shape == (1, row.num_tokens), (tokens_BT.shape, row)
        limit = self.architecture.max_positions
        num_tokens = tokens_BT.shape[1] if row is None else max(row.lengths)
        if num_tokens > limit:
            raise UsageError(f"{num_tokens} tokens in a sequence", hint=f"this model takes at most {limit}")
        taps = _Taps(hooks=hooks)
        x_BTD = taps("hook_embed", self.model.embed_tokens(tokens_BT))
        cos_TE, sin_TE = _rope_tables(self.architecture, num_tokens, like=x_BTD)
        if row is not None:
            cos_TE, sin_TE = cos_TE[row.positions_T], sin_TE[row.positions_T]
        places = _Places(cos_TE, sin_TE, row)
        for layer, block in enumerate(self.model.layers):
            x_BTD = block(x_BTD, places, taps.within(f"blocks.{layer}"))
        return taps("ln_final.hook_normalized", self.model.norm(x_BTD))

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


def _block_points(kind: Layer, post_norm: bool) -> tuple[str, ...]:
    """The points of one layer, in the order a pass reaches them."""
    points = ["hook_resid_pre", "ln1.hook_normalized", "attn.hook_z", "hook_resid_mid", "ln2.hook_normalized"]
    points += ["mlp.hook_route" if kind.routed else "mlp.hook_post", "hook_resid_post"]
    return tuple(point for point in points if not (post_norm and "hook_normalized" in point))


def _rope_tables(architecture: Architecture, num_tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, E], both halves of E alike."""
    tables = rope_tables(
        architecture.head_dim, architecture.rope_theta, architecture.rope_scaling, num_tokens
    )
    cos_TE, sin_TE = (torch.from_numpy(each).repeat(1, 2).to(like) for each in tables)
    return cos_TE, sin_TE


def _window_mask(num_tokens: int, window: int | None, device: torch.device) -> Tensor | None:
    """[T, T], true where a token sees another; None where it sees all before it."""
    if window is None or window >= num_tokens:
        return None
    at = torch.arange(num_tokens, device=device)
    back = at[:, None] - at
    return (back >= 0) & (back < window)


def _rotate(x: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotate [B, T, heads, E] by position; component i is paired with i + E/2, as in Hugging Face."""
    first, second = x.chunk(2, dim=-1)
    return x * cos_TE[:, None] + torch.cat((-second, first), dim=-1) * sin_TE[:, None]
