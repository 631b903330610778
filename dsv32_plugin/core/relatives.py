"""Architectures whose indexer is the same operation, and what each would need besides: none is served.

Read off their classes in Transformers 5.24. `docs/support.md` shows the same table.
"""

from __future__ import annotations

from typing import NamedTuple


class Relative(NamedTuple):
    """One architecture, by the `model_type` of its config."""

    architectures: tuple[str, ...]
    checkpoint: str
    needs: str


RELATIVES = {
    "axk2": Relative(
        ("AXK2ForCausalLM",),
        "skt/A.X-K2",
        "queries and an output gate from one product of the query latent before and after its norm, gated norms, "
        "128 latents and 32 rope dims in the kernels",
    ),
    "hy_v4": Relative(
        ("HYV4ForCausalLM", "HYV4VLForConditionalGeneration"),
        "tencent/Hy4-preview",
        "attention sinks, an output gate, half-split rope, index rope in the last dims, an index norm by rms_norm_eps, "
        "hyper-connections, a clamped SwiGLU",
    ),
    "mistral_large4": Relative(
        ("MistralLarge4ForConditionalGeneration",),
        "mistralai/Mistral-Large-4-1T-A52B",
        "queries without a latent, layers without rope, caches shared between layers, learned scales of rope and "
        "softmax, index queries from the hidden state, images",
    ),
    "dots3_note": Relative(
        ("Dots3NoteForConditionalGeneration", "Dots3NoteForCausalLM"),
        "dots-studio/dots3-note-prev",
        "sliding-window layers of other widths beside the sparse ones, scaled latents, a norm of the rope key, images "
        "and sound",
    ),
    "glm5_next": Relative(
        ("Glm5NextForConditionalGeneration",),
        "zai-org/GLM-5.3-Flash",
        "linear-attention layers beside the sparse ones, hyper-connections, images",
    ),
}


def needs(*names: str) -> str | None:
    """What the relative of this `model_type` or architecture would need, or None for a stranger."""
    for model_type, relative in RELATIVES.items():
        types = (model_type, f"{model_type}_text", f"{model_type}_vl", f"{model_type}_vl_text")
        if set(names) & {*types, *relative.architectures}:
            return relative.needs
    return None
