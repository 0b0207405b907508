"""Megatron module specs, and the transformer layer that ``recompute.layers`` recomputes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from moe_train.model.qk_norm import FullWidthNorm

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch.distributed as dist
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.transformer_config import TransformerConfig


class Layer(TransformerLayer):
    """A TransformerLayer that is recomputed whole if its 1-based global number is listed.

    Megatron's own full recompute chooses layers by method and count per stage; a list of global
    numbers (``recompute.layers=2-15``) means the same in every layout.
    """

    def __init__(self, *args: Any, recomputed: frozenset[int] = frozenset(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recompute = self.layer_number in recomputed

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """Hidden states [sequence / TP, batch, hidden] in and out, and Megatron's context."""
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")

        def run(hidden: torch.Tensor) -> tuple[torch.Tensor, Any]:
            return super(Layer, self).forward(hidden, *args, **kwargs)

        return tensor_parallel.checkpoint(run, False, hidden)


def layer_spec(
    provider: BackendSpecProvider,
    config: TransformerConfig,
    recomputed: frozenset[int],
    moe_layer: Callable[..., Any] | None = None,
    full_width: dist.ProcessGroup | None = None,
) -> ModuleSpec:
    """One MoE transformer layer on the provider's modules.

    Args:
        recomputed: 1-based global numbers of the layers that are recomputed whole.
        moe_layer: builds the MoE layer instead of Megatron's class.
        full_width: tensor-parallel ranks over which queries and keys are normalised
            (``model.qk_norm=full``); None normalises each head, where Megatron's config says so.
    """
    mlp = get_mlp_module_spec_for_backend(
        backend=provider, num_experts=config.num_moe_experts, moe_grouped_gemm=True
    )
    if moe_layer is not None:
        mlp = partial(moe_layer, **mlp.keywords)
    fused = provider.fuse_layernorm_and_linear()
    norm = provider.layer_norm(rms_norm=True, has_residual=True)
    qk_norms = _qk_norms(provider, config, full_width)
    qkv = (
        provider.column_parallel_layer_norm_linear() if fused else provider.column_parallel_linear()
    )
    submodules = TransformerLayerSubmodules(
        input_layernorm=IdentityOp if fused else norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=qkv,
                core_attention=provider.core_attention(),
                linear_proj=provider.row_parallel_linear(),
                q_layernorm=qk_norms[0],
                k_layernorm=qk_norms[1],
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp=mlp,
        mlp_bda=get_bias_dropout_add,
        # TE fuses the input norm into the QKV linear and keeps pre_mlp_layernorm by itself
        # before an MoE: with this map both providers write the same keys.
        sharded_state_dict_keys_map=(
            {} if fused else {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
        ),
    )
    return ModuleSpec(module=Layer, submodules=submodules, params={"recomputed": recomputed})


def _qk_norms(
    provider: BackendSpecProvider, config: TransformerConfig, full_width: dist.ProcessGroup | None
) -> tuple[Any, Any]:
    """Builders of the norms of queries and of keys."""
    if not config.qk_layernorm:
        return IdentityOp, IdentityOp
    if full_width is None:
        each_head = provider.layer_norm(rms_norm=True, for_qk=True)
        return each_head, each_head
    assert config.num_query_groups is not None
    return (
        partial(FullWidthNorm, heads=config.num_attention_heads, group=full_width),
        partial(FullWidthNorm, heads=config.num_query_groups, group=full_width),
    )


def block_spec(
    provider: BackendSpecProvider,
    config: TransformerConfig,
    layers: int,
    recomputed: frozenset[int],
    moe_layer: Callable[..., Any] | None = None,
    full_width: dist.ProcessGroup | None = None,
) -> TransformerBlockSubmodules:
    """The ``layers`` layers of one pipeline stage (or chunk of one), and the final norm."""
    layer = layer_spec(provider, config, recomputed, moe_layer, full_width)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * layers,
        layer_norm=provider.layer_norm(rms_norm=True),
    )
