"""What an export made: which layers run in integers, what it changed, and how fast it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer that multiplies: `macs` per example; `runs`: "int8" or "float32", with the reason for float."""

    name: str
    kind: str
    macs: int
    runs: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class OnnxExport:
    """The report of `karikomi.torch.export_onnx`.

    `path`, `bytes`: of the file. `weights`: names of the parameters that are stored as codes; `float_weights`: name of
    a parameter with codes that are not -> why. `layers`: each layer that multiplies (empty without onnxruntime).
    `max_difference`: of the outputs to those of the module on the example, relative to the largest; `cosine`:
    between both, over all outputs. None where onnxruntime is not installed. `open_axes`: names of the axes of
    any size. `engine`: what ran it. `rounded_again`: weights whose codes integer kernels do not take as they are.
    """

    path: str
    bytes: int
    bytes_float: int
    weights: tuple[str, ...]
    float_weights: dict[str, str]
    layers: tuple[LayerRow, ...] = ()
    max_difference: float | None = None
    cosine: float | None = None
    open_axes: tuple[str, ...] = ()
    engine: str = ""
    calibration: str = ""
    left_alone: dict[str, str] = field(default_factory=dict)
    rounded_again: tuple[str, ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-accumulates per example."""
        return sum(row.macs for row in self.layers)

    @property
    def macs_float(self) -> float:
        """The share of the multiply-accumulates in layers that fell back to float, 0..1."""
        rest = sum(row.macs for row in self.layers if row.runs != "int8")
        return rest / self.macs if self.macs else 0.0

    @property
    def fell_back(self) -> dict[str, str]:
        """Name of each layer that runs in float -> why."""
        return {row.name: row.reason for row in self.layers if row.runs != "int8"}

    def as_dict(self) -> dict[str, Any]:
        """Return the report as what JSON holds."""
        return {**asdict(self), "macs": self.macs, "macs_float": self.macs_float}

    def __str__(self) -> str:
        """Return the account."""
        parts = [f"{self.path}: {self.bytes:,} bytes (float32: {self.bytes_float:,})"]
        if self.layers and self.calibration:
            inside = sum(row.runs == "int8" for row in self.layers)
            parts.append(
                f"{inside} of {len(self.layers)} layers in int8; {100 * self.macs_float:.1f} % of the"
                " multiply-accumulates in float32"
            )
            parts += [
                f"  {row.name} ({row.kind}, {100 * row.macs / max(self.macs, 1):.1f} %): {row.reason}"
                for row in self.layers
                if row.runs != "int8"
            ]
        if again := self.rounded_again:
            parts.append(
                f"  {len(again)} weights rounded again for integer kernels: {', '.join(again[:3])}"
                f"{' ...' if len(again) > 3 else ''}"
            )
        parts += [f"  {name} stays float: {why}" for name, why in self.float_weights.items()]
        if self.max_difference is not None:
            parts.append(
                f"largest difference to the module {self.max_difference:.2e} of the largest output,"
                f" cosine {self.cosine:.5f} ({self.engine})"
            )
        return "\n".join(parts)
