"""Where the kernels stand under an H100's roof, by the counts in their READMEs: FLOPs over bytes, and which of the
two is the floor of their time.

Bytes are what a launch asks of memory if nothing is found in a cache; FLOPs are those of its matrix products. Times
that were measured on a GPU are set beside the floors where ``benchmarks/results/`` has any.
"""

from __future__ import annotations

from dataclasses import dataclass

BANDWIDTH = 3.35e12  # bytes/s of an H100 SXM, by its data sheet
REACHED = 800e12  # FLOP/s that large bf16 products really reach there


@dataclass(frozen=True)
class Count:
    """One operation at a published shape, bf16."""

    name: str
    shape: str
    flops: float
    bytes: float
    measured: tuple[str, str] | None = None  # the row of a GPU's results file and its key in milliseconds

    @property
    def floor(self) -> float:
        """Seconds: the longer of moving the bytes and of multiplying."""
        return max(self.flops / REACHED, self.bytes / BANDWIDTH)


TOKENS, HEADS = 16384, 16
COUNTS = (
    Count(
        "delta rule, forward", "16K tokens, 16 heads of 128", 61e9, TOKENS * HEADS * 1812,
        ("delta rule 1 x 16384: ours", "forward_ms"),
    ),
    Count("delta rule, backward", "16K tokens, 16 heads of 128", 115e9, TOKENS * HEADS * 5920),
    Count(
        "decode, 64 branches x 5", "16 heads of 128", 64 * 16 * 5 * 6 * 128 * 128, 139e6,
        ("decode 64 branches x 5: ours", "ms"),
    ),
    Count("LaCT, a chunk forward", "2,048 tokens, 4 heads of 384", 21.7e9, 166e6),
    Count("LaCT, a chunk backward", "2,048 tokens, 4 heads of 384", 55.6e9, 343e6),
    Count(
        "LM head, forward with entropy", "16K x 2048 x 32000", 2 * 16384 * 2048 * 32000,
        2 * 2048 * (16384 + 32000) + 16 * 16384,
        ("head 16384 x 2048 x 32000: forward with entropy", "ms"),
    ),
)  # fmt: skip


def measured(contents: dict | None) -> dict[str, float]:
    """Milliseconds by the name of an operation, from a GPU's results file."""
    if contents is None:
        return {}
    rows = {row["what"]: row for part in contents["table"].values() for row in part}
    return {
        count.name: rows[count.measured[0]][count.measured[1]]
        for count in COUNTS
        if count.measured and count.measured[1] in rows.get(count.measured[0], {})
    }


def table(contents: dict | None) -> str:
    """Markdown: FLOPs a byte, what bounds, the floor, and the measured time where there is one."""
    times = measured(contents)
    lines = [
        "| an H100's floor, bf16 (counted) | shape | FLOPs a byte | bound by | floor, us | measured, us |",
        "|---|---|---|---|---|---|",
    ]
    for count in COUNTS:
        bound = "bytes" if count.bytes / BANDWIDTH > count.flops / REACHED else "products"
        time = f"{1e3 * times[count.name]:.0f}" if count.name in times else "-"
        intensity = f"{count.flops / count.bytes:.0f}"
        lines.append(
            f"| {count.name} | {count.shape} | {intensity} | {bound} | {1e6 * count.floor:.0f} | {time} |"
        )
    return "\n".join(lines)


def draw(axis, contents: dict | None) -> None:
    """The roof, every operation on it, and below it what was measured."""
    ridge = REACHED / BANDWIDTH
    x = [1, ridge, 1e4]
    axis.plot(x, [BANDWIDTH * min(i, ridge) / 1e12 for i in x], "k-", lw=1)
    times = measured(contents)
    for i, count in enumerate(COUNTS):
        intensity = count.flops / count.bytes
        color = f"C{i}"
        roof = count.flops / count.floor / 1e12
        axis.plot(intensity, roof, "o", color=color, mfc="none", label=count.name)
        if count.name in times:
            axis.plot(intensity, count.flops / times[count.name] / 1e9, "o", color=color)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOPs a byte")
    axis.set_ylabel("TFLOP/s")
    axis.set_title("H100, bf16: counted (hollow), measured (full)", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=7, loc="lower right")
