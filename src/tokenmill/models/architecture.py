"""What a decoder looks like and what a token of it costs.

One description for all families: RMSNorm, rotary positions, grouped-query attention, gated units or a mixture
of experts, and for each layer whether heads are turned, how far it looks back and whether it is routed.
`hf_config.py` reads it from a `config.json` and writes it back; `families.py` has what families imply and
what they call things.
"""

from dataclasses import dataclass

from tokenmill.kernels import Activation, KvDtype, kv_block_bytes
from tokenmill.models.families import QkNorm, stored_name
from tokenmill.models.rope import RopeScaling

__all__ = ["Architecture", "Experts", "Layer"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What may differ between the layers of one model.

    `rotary`: queries and keys are turned by position. `window`: a token sees itself and the `window` - 1
    before it; None is all. `routed`: a mixture of experts takes the place of the gated unit.
    """

    rotary: bool = True
    window: int | None = None
    routed: bool = False


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture of experts of the routed layers: how many, how many a token takes, how wide each is.

    A token's experts have the `num_active` largest of softmax(router logits); with `renormalise` these are
    divided by their sum.
    """

    num_experts: int
    num_active: int
    intermediate_size: int
    renormalise: bool


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Shapes and constants of a decoder, and the cost that follows from them.

    `max_positions` is the longest context in tokens; `norm_eps` and `rope_theta` are plain numbers.
    `post_norm`: the norms of a block are on its two outputs and not on their inputs.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    layers: tuple[Layer, ...]
    activation: Activation = "silu"
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QkNorm = "none"
    post_norm: bool = False
    experts: Experts | None = None

    @property
    def query_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (and of all value heads)."""
        return self.num_kv_heads * self.head_dim

    def attention_shapes(self) -> dict[str, tuple[int, int]]:
        """The matrices of one block's attention as [outputs, inputs], by the end of their canonical name."""
        return {
            "self_attn.q_proj": (self.query_size, self.hidden_size),
            "self_attn.k_proj": (self.kv_size, self.hidden_size),
            "self_attn.v_proj": (self.kv_size, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, self.query_size),
        }

    def linear_shapes(self, layer: int) -> dict[str, tuple[int, int]]:
        """The matrices of one block as [outputs, inputs]; of a routed one: attention, router, each expert."""
        hidden, experts = self.hidden_size, self.experts
        if not self.layers[layer].routed:
            return self.attention_shapes() | _gated_unit("mlp", hidden, self.intermediate_size)
        assert experts is not None
        shapes = self.attention_shapes() | {"mlp.gate": (experts.num_experts, hidden)}
        for expert in range(experts.num_experts):
            shapes |= _gated_unit(f"mlp.experts.{expert}", hidden, experts.intermediate_size)
        return shapes

    def active_shapes(self) -> list[tuple[int, int]]:
        """The blocks' matrices that one token reads, [outputs, inputs]: of experts those it is sent to."""
        shapes: list[tuple[int, int]] = []
        for layer, kind in enumerate(self.layers):
            names = self.linear_shapes(layer)
            idle = self._idle_experts if kind.routed else 0
            shapes += list(names.values())[: len(names) - 3 * idle]
        return shapes

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a model by its canonical name. A tied head has no tensor of its own."""
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            for name, shape in self._layer_tensors(layer).items():
                shapes[f"model.layers.{layer}.{name}"] = shape
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def stored_parts(self) -> dict[str, list[str]]:
        """By the name of each tensor of a checkpoint: the canonical tensors that it stacks by outputs."""
        parts: dict[str, list[str]] = {}
        for name in self.tensor_shapes():
            parts.setdefault(stored_name(self.family, name), []).append(name)
        return parts

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a checkpoint by the name it has there."""
        shapes = self.tensor_shapes()
        return {
            stored: (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])
            for stored, parts in self.stored_parts().items()
        }

    @property
    def num_params(self) -> int:
        """Parameters that the checkpoint stores; a tied head counts once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        blocks = sum(self._layer_params(layer) for layer in self.layers)
        return embeddings + self.hidden_size + blocks

    @property
    def num_active_params(self) -> int:
        """Parameters that take part in one token: all but the experts that it is not sent to."""
        return self.num_params - self._num_routed * self._idle_experts * self._expert_macs

    @property
    def block_macs_per_token(self) -> int:
        """Multiply-accumulates of all blocks' matrices for one token, without attention scores."""
        attention = sum(rows * columns for rows, columns in self.attention_shapes().values())
        dense = (self.num_layers - self._num_routed) * 3 * self.hidden_size * self.intermediate_size
        routed = 0
        if self.experts is not None:
            routed = self.experts.num_active * self._expert_macs + self.experts.num_experts * self.hidden_size
        return self.num_layers * attention + dense + self._num_routed * routed

    @property
    def head_macs_per_token(self) -> int:
        """Multiply-accumulates of the output head for one token."""
        return self.vocab_size * self.hidden_size

    @property
    def macs_per_token(self) -> int:
        """Multiply-accumulates of all matrices for one generated token: blocks and head."""
        return self.block_macs_per_token + self.head_macs_per_token

    def attention_flops(self, context: int) -> int:
        """Floating point operations of the attention scores and sums for one token that sees `context`.

        Two products (scores, values) of two operations each, over every layer and query head.
        """
        seen = sum(min(context, layer.window or context) for layer in self.layers)
        return 4 * self.query_size * seen

    def kv_bytes_per_token(self, bytes_per_value: float = 2) -> int:
        """Bytes of keys and values that one token leaves in the cache."""
        return round(2 * self.num_layers * self.kv_size * bytes_per_value)

    def kv_block_bytes(self, kv_dtype: KvDtype = "bf16") -> int:
        """Bytes of one block of the KV cache as it lies in memory, padding and scales counted."""
        return kv_block_bytes(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            kv_dtype=kv_dtype,
        )

    def norm_names(self) -> tuple[str, str]:
        """The norms that belong to a block's attention and to what follows it, by the end of their name."""
        if self.post_norm:
            return "post_attention_layernorm", "post_feedforward_layernorm"
        return "input_layernorm", "post_attention_layernorm"

    def qk_norm_sizes(self) -> tuple[int, int]:
        """Weights of the norms of queries and of keys; 0 where there are none."""
        by_kind = {"none": (0, 0), "head": (self.head_dim,) * 2, "all": (self.query_size, self.kv_size)}
        return by_kind[self.qk_norm]

    def bias_sizes(self, routed: bool) -> dict[str, int]:
        """Outputs of the matrices that have a bias, by the end of their name."""
        sizes: dict[str, int] = {}
        if self.qkv_bias:
            sizes |= {"self_attn.q_proj": self.query_size}
            sizes |= {"self_attn.k_proj": self.kv_size, "self_attn.v_proj": self.kv_size}
        if self.out_bias:
            sizes["self_attn.o_proj"] = self.hidden_size
        if self.mlp_bias and not routed:
            sizes |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), self.intermediate_size)
            sizes["mlp.down_proj"] = self.hidden_size
        return sizes

    def _layer_tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            f"{name}.weight": (self.hidden_size,) for name in self.norm_names()
        }
        for name, size in zip(("q_norm", "k_norm"), self.qk_norm_sizes(), strict=True):
            if size:
                shapes[f"self_attn.{name}.weight"] = (size,)
        biases = self.bias_sizes(self.layers[layer].routed)
        for name, shape in self.linear_shapes(layer).items():
            shapes[f"{name}.weight"] = shape
            if name in biases:
                shapes[f"{name}.bias"] = (biases[name],)
        return shapes

    def _layer_params(self, layer: Layer) -> int:
        matrices = sum(rows * columns for rows, columns in self.attention_shapes().values())
        if layer.routed:
            assert self.experts is not None
            matrices += self.experts.num_experts * (self._expert_macs + self.hidden_size)
        else:
            matrices += 3 * self.hidden_size * self.intermediate_size
        vectors = (
            2 * self.hidden_size + sum(self.qk_norm_sizes()) + sum(self.bias_sizes(layer.routed).values())
        )
        return matrices + vectors

    @property
    def _num_routed(self) -> int:
        return sum(layer.routed for layer in self.layers)

    @property
    def _expert_macs(self) -> int:
        """Weights of one expert; each is used once for a token."""
        return 0 if self.experts is None else 3 * self.hidden_size * self.experts.intermediate_size

    @property
    def _idle_experts(self) -> int:
        return 0 if self.experts is None else self.experts.num_experts - self.experts.num_active


def _gated_unit(name: str, hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    return {
        f"{name}.gate_proj": (inner, hidden),
        f"{name}.up_proj": (inner, hidden),
        f"{name}.down_proj": (hidden, inner),
    }
