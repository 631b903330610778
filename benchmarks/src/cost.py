"""`dsv32 bench cost`: what a million tokens cost at each position of a context, from a measured layer and a price.

The curve of the DeepSeek-V3.2 paper's figure 3 for the part that the context changes: the attention layers. The rest of
a model (experts, head, communication) costs the same at every position; it is added only where its time is given.
"""

from __future__ import annotations

from typing import Any

from dsv32_plugin.benchmarks.layer_record import SIDES, curves
from dsv32_plugin.console import CommandError

LAYERS = 61
PRICE_PER_GPU_HOUR = 2.0
"""US dollars, the price that the paper assumes for an H800."""


def cost_per_million(us_per_token: float, price_per_gpu_hour: float) -> float:
    """Dollars for a million tokens, each of which keeps one GPU busy for so long."""
    return us_per_token * price_per_gpu_hour / 3600.0


def compute(
    layer: dict[str, Any],
    *,
    price: float = PRICE_PER_GPU_HOUR,
    batch: int | None = None,
    heads: int | None = None,
    layers: int = LAYERS,
    rest_us: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The record of the costs.

    Args:
        layer: a record of `dsv32 bench layer`.
        price: dollars for a GPU hour.
        batch: sequences of the decode; default the largest measured.
        heads: attention heads on the GPU; default the most measured.
        layers: of the model.
        rest_us: "prefill" and "decode" -> microseconds of one GPU a token that everything else takes.

    Raises:
        CommandError: the record has no such batch or heads.
    """
    rest = {"prefill": 0.0, "decode": 0.0} | (rest_us or {})
    measured = curves(layer["rows"])
    heads = heads or max((key[2] for key in measured), default=0)
    batch = batch or max((key[1] for key in measured if key[0] == "decode" and key[2] == heads), default=0)
    rows = []
    for key in (("prefill", 1, heads), ("decode", batch, heads)):
        if key not in measured:
            known = ", ".join(f"{mode} batch {b} heads {h}" for mode, b, h in measured)
            wanted = f"{key[0]} batch {key[1]} heads {key[2]}"
            raise CommandError(f"the layer record lacks {wanted}; it has {known}")
        for side in (name for name in SIDES if name in measured[key]):
            for context, row in sorted(measured[key][side].items()):
                us = row["us_per_token"] * layers + rest[key[0]]
                usd = round(cost_per_million(us, price), 5)
                figures = {"usd_per_million": {"median": usd}, "us_per_token": {"median": us}}
                rows.append({"case": {"mode": key[0], "L": context}, "side": side, "figures": figures})
    return {
        "kind": "cost",
        **{name: layer[name] for name in ("gpu", "commit", "date")},
        **({"meaningless": layer["meaningless"]} if "meaningless" in layer else {}),
        "price_per_gpu_hour": price,
        "batch": batch,
        "heads": heads,
        "layers": layers,
        "rest_us": rest,
        "method": method(price, batch, heads, layers, layer["chunk"], rest),
        "rows": rows,
    }


def method(price: float, batch: int, heads: int, layers: int, chunk: int, rest: dict[str, float]) -> str:
    """What the figures hold and what they leave out, for the plot itself."""
    if any(rest.values()):
        others = f"plus {rest['prefill']:g} µs a token in prefill and {rest['decode']:g} in decode for all else (given)"
    else:
        others = "experts, head, communication and idle time are not in it"
    return (
        f"{layers} × one measured attention layer (projections in bf16), {heads} heads on one GPU at ${price:g} an "
        f"hour; prefill in chunks of {chunk}, decode with {batch} sequences; {others}"
    )
